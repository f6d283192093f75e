"""Streams against whole recordings, however they are cut, batched, saved, restored and ended."""

import copy
import io
import math
from itertools import pairwise

import pytest
import tones
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gq_triton as gq
from gq_triton.models import RNNT, ConformerConfig, RNNTConfig, model_of
from gq_triton.speech.decoding import BeamDecoder, GreedyDecoder
from gq_triton.speech.features import LogMel
from gq_triton.speech.graphs import GraphedEncoder, GraphedGreedyDecoder, graphed
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import Endpointing, Result, StreamingRecognizer
from gq_triton.speech.tokens import WordTokenizer

CHUNK = 3840  # samples of 240 ms


SIZES = dict(encoder_layers=2, predictor_embedding=8, predictor_hidden=12, joint=16, dropout=0.1)
CONFORMER = dict(encoder_size=16, heads=2, channels=4, kernel=3, chunk=3, left=7)  # chunks of 120 ms


def recognizer_of(seed=0, adapt_frames=20, tail_ms=300, **changes) -> Recognizer:
    """Untrained, but talkative: labels of every kind at some frames, none at others."""
    torch.manual_seed(seed)
    tokenizer = WordTokenizer(sorted(tones.PITCHES))
    kind, sizes = (ConformerConfig, {}) if "encoder_size" in changes else (RNNTConfig, dict(encoder_hidden=16))
    model = model_of(kind(tokenizer.vocab_size, **{**SIZES, **sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
        output = model.joint.output if isinstance(model, RNNT) else model.output
        output.bias[0] += 3
    front_end = LogMel(adapt_frames=adapt_frames, tail_ms=tail_ms).fit([0.1 * torch.randn(16000)])
    return Recognizer(front_end, tokenizer, model).eval()


@pytest.fixture(scope="module")
def recognizer():
    return recognizer_of()


@pytest.fixture(scope="module")
def stages(recognizer):
    config = gq.GQConfig(bits=4, codebook="int8", activations="int8")
    prepared = recognizer_of().prepare(config).eval()
    return {"float": recognizer, "qat": prepared, "packed": recognizer.packed_copy(config).eval()}


def audio(seconds: float, seed: int = 0) -> torch.Tensor:
    """Noise whose loudness comes and goes."""
    draw = torch.Generator().manual_seed(seed)
    samples = torch.arange(int(16000 * seconds))
    return 0.1 * torch.randn(len(samples), generator=draw) * (1 + torch.sin(samples / 900 + seed))


def streamed(streaming: StreamingRecognizer, wave: torch.Tensor, sizes: list[int], stream: int = 0) -> list[Result]:
    """The results of pushes of those sizes, of the rest, and of the end."""
    results = [streaming.push(part, stream) for part in wave.split([*sizes, len(wave) - sum(sizes)])]
    return [*results, streaming.finish(stream)]


def with_graphs(streaming: StreamingRecognizer) -> StreamingRecognizer:
    """The code that CUDA graphs capture, on the CPU, where it is called as it is."""
    model, frames = streaming.recognizer.model, streaming.chunk_ms // 10
    streaming.encoder = graphed(model.encoder, frames)
    streaming.decoder = GraphedGreedyDecoder(model, frames // model.encoder.subsampling)
    return streaming


@pytest.mark.parametrize("stage", ["float", "qat", "packed"])
@pytest.mark.parametrize("beam_width", [1, 3])
def test_a_stream_ends_with_what_is_found_offline(stages, stage, beam_width):
    recognizer = stages[stage]
    found = []
    for seed, seconds in enumerate([0.01, 0.2, 0.24, 1.23, 2.2]):
        wave = audio(seconds, seed)
        result = streamed(StreamingRecognizer(recognizer, beam_width=beam_width), wave, [1000] * (len(wave) // 1000))[
            -1
        ]
        assert result.is_final and result.text == recognizer.transcribe(wave, beam_width=beam_width)
        found.append(result.text)
    assert len(set(found)) > 2


@pytest.mark.parametrize(
    "changes",
    [
        dict(chunk_ms=80),
        dict(chunk_ms=960),
        dict(chunk_ms=420, stack=7, reduce_after=0),
        dict(encoder_projection=6, predictor_layers=2),
        dict(adapt_frames=None, tail_ms=0),
        CONFORMER,
        dict(chunk_ms=600, **CONFORMER),
        dict(predictor_layers=0),
        dict(predictor_layers=0, **CONFORMER),
    ],
)
def test_any_chunk_and_model_end_with_what_is_found_offline(changes):
    changes = dict(changes)
    chunk_ms = changes.pop("chunk_ms", 240)
    recognizer, wave = recognizer_of(**changes), audio(2.0)
    result = streamed(StreamingRecognizer(recognizer, chunk_ms=chunk_ms), wave, [])[-1]
    assert result.text == recognizer.transcribe(wave) != ""


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_result_depends_on_the_cuts(recognizer, data):
    wave = audio(data.draw(st.floats(0, 2)), data.draw(st.integers(0, 99)))
    endpointing = data.draw(st.sampled_from([None, Endpointing(0.3, 0.5, 1.0)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wave)), max_size=8)))
    sizes = [end - start for start, end in pairwise([0, *cuts])]
    streaming = StreamingRecognizer(recognizer, endpointing=endpointing)
    results = streamed(streaming, wave, sizes)
    streaming.reset()
    chunked = streamed(streaming, wave, [CHUNK] * (len(wave) // CHUNK))
    assert finals(results) == finals(chunked)
    assert set(partials(results)) <= set(partials(chunked))


def finals(results):
    parts = [part for result in results for part in (*result.ended, result) if part.is_final]
    return [(part.text, part.ids, part.times, part.start, part.end) for part in parts]


def partials(results):
    """Of segments that have begun."""
    return [(result.text, result.end) for result in results if not result.is_final and result.end > result.start]


@pytest.mark.parametrize(("beam_width", "graphs"), [(1, False), (1, True), (2, False)])
def test_streams_do_not_depend_on_one_another(recognizer, beam_width, graphs):
    """Three streams that start and end at different times, in pushes of different sizes."""
    waves = [audio(2.3, 1), audio(0.9, 2), audio(1.7, 3)]
    sizes, starts = [1700, 5000, 3840], [0, 3, 1]
    several = StreamingRecognizer(recognizer, 3, beam_width=beam_width)
    alone = StreamingRecognizer(recognizer, beam_width=beam_width)
    several = with_graphs(several) if graphs else several
    parts = [list(wave.split(size)) for wave, size in zip(waves, sizes, strict=True)]
    found, batches = {index: [] for index in range(3)}, set()
    for turn in range(60):
        pushed = {i: parts[i][turn - starts[i]] for i in range(3) if 0 <= turn - starts[i] < len(parts[i])}
        for index, result in several.push_many(pushed).items():
            found[index].append(result)
        batches.add(len(pushed))
        for index in pushed:
            if turn - starts[index] == len(parts[index]) - 1:
                found[index].append(several.finish(index))
    assert batches >= {0, 1, 2, 3}
    for index, wave in enumerate(waves):
        expected = streamed(alone, wave, [sizes[index]] * (len(wave) // sizes[index]))
        assert found[index][-1] == expected[-1]
        assert [result.text for result in found[index]][:-1] == [result.text for result in expected][
            : len(parts[index])
        ]
        alone.reset()
    assert sum(results[-1].text != "" for results in found.values()) > 1


def test_streams_that_are_ready_are_encoded_together(recognizer):
    streaming, batches = StreamingRecognizer(recognizer, 4), []
    advance = streaming.decoder.advance
    streaming.decoder.advance = lambda state, encoded, lengths: (
        batches.append(len(encoded)),
        advance(state, encoded, lengths),
    )[1]
    streaming.push_many({0: audio(0.6), 1: audio(0.3), 3: audio(0.1)})
    assert batches == [2, 1]


@torch.inference_mode()
def test_graphed_parts_compute_what_the_plain_ones_do(stages, device):
    """Also where max_symbols cuts a frame's labels short, where rows have fewer frames, and for more than a chunk."""
    model = copy.deepcopy(stages["packed"].model).to(device)
    plain, graphed = (
        kind(model, *args, max_symbols=2) for kind, args in ((GreedyDecoder, ()), (GraphedGreedyDecoder, (3,)))
    )
    encoder = GraphedEncoder(model.encoder, 24)
    expected, found = plain.start(4), graphed.start(4)
    cuts = torch.tensor([24, 24, 56, 24]).cumsum(0)
    chunks = (2 * torch.randn(4, 136, 80, device=device)).tensor_split(cuts, 1)
    states = [model.encoder.initial_state(chunks[0])] * 2
    for chunk in chunks:
        encoded, states[0] = model.encoder.stream(chunk, states[0])
        graphed_encoded, states[1] = encoder.stream(chunk, states[1])
        torch.testing.assert_close(graphed_encoded, encoded)
        lengths = torch.tensor([3, 2, 0, 1]).clamp(max=encoded.shape[1]) + max(0, encoded.shape[1] - 3)
        expected = plain.advance(expected, encoded, lengths)
        found = graphed.advance(found, graphed_encoded, lengths)
        assert graphed.results(found) == plain.results(expected) and found.frames == expected.frames
        torch.testing.assert_close(found.predicted, expected.predicted)
    assert max(len(row) for row in expected.labels) > 5
    nothing = graphed.advance(found, encoded[:, :0], torch.zeros(4, dtype=torch.int64))
    assert graphed.results(nothing) == graphed.results(found) and torch.equal(nothing.predicted, found.predicted)


def test_a_partial_result_grows_and_has_times(recognizer):
    wave = audio(2.5, 4)
    streaming = StreamingRecognizer(recognizer)
    results = streamed(streaming, wave, [CHUNK] * (len(wave) // CHUNK))
    for before, after in pairwise(results):
        assert after.ids[: len(before.ids)] == before.ids and after.times[: len(before.times)] == before.times
    last = results[-1]
    assert last.ids and last.stable == len(last.ids) == len(last.times)
    assert list(last.times) == sorted(last.times) and all(0 <= time < last.end for time in last.times)
    assert all(math.isclose(time / 0.08, round(time / 0.08)) for time in last.times)
    assert streaming.frame_seconds == 0.08
    for result in results[:-1]:  # a label is known as soon as its frame's chunk is
        assert result.ids == tuple(i for i, time in zip(last.ids, last.times, strict=True) if time < result.end)


def test_labels_are_emitted_at_their_frames(recognizer):
    """By a decoder that emits what it is told to, as a benchmark's does."""

    class Told(GreedyDecoder):
        script = ((1, 2), (1, 3), (4, 4), (9, 5))  # frame and label

        def choose(self, logits, frames, counts):
            return [
                [self._label(frame + place, count) for place in range(logits.shape[1])]
                for frame, count in zip(frames, counts, strict=True)
            ]

        def _label(self, frame, count):
            time, label = self.script[count] if count < len(self.script) else (math.inf, 0)
            return label if frame >= time else 0

    streaming = StreamingRecognizer(recognizer, 2)
    streaming.decoder = Told(recognizer.model)
    for stream in range(2):
        streaming.reset(stream)
    streaming.push_many({0: audio(1), 1: audio(0.5)})
    for stream, seconds in enumerate([0.0, 0.5]):
        streaming.push(audio(seconds), stream)
        result = streaming.finish(stream)
        assert result.ids == (2, 3, 4, 5)
        assert result.times == (0.08, 0.08, 0.32, 0.72)


def test_beam_search_knows_what_is_stable(recognizer):
    wave = audio(2.5, 4)
    results = streamed(StreamingRecognizer(recognizer, beam_width=4), wave, [CHUNK] * (len(wave) // CHUNK))
    last = results[-1]
    assert last.stable == len(last.ids) > 0
    assert any(result.stable < len(result.ids) for result in results)
    for before, after in pairwise(results):
        assert after.ids[: before.stable] == before.ids[: before.stable]


@pytest.mark.parametrize("beam_width", [1, 3])
@pytest.mark.parametrize("stage", ["float", "packed"])
def test_a_stream_goes_on_from_its_state_elsewhere(stages, stage, beam_width):
    wave = audio(2.0, 5)
    first = StreamingRecognizer(stages[stage], beam_width=beam_width)
    first.push(wave[:17000])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = StreamingRecognizer(stages[stage], 2, beam_width=beam_width)
    second.push(wave, 1)
    second.finish(1)
    second.restore(torch.load(file, weights_only=True), 1)
    assert second.push(wave[:0], 1) == first.push(wave[:0])
    second.push(wave[17000:], 1)
    first.push(torch.zeros(5000))  # the two are apart from here on
    assert second.finish(1).text == stages[stage].transcribe(wave, beam_width=beam_width)


def test_a_state_does_not_change_with_its_stream(recognizer):
    streaming, wave = StreamingRecognizer(recognizer), audio(1.5, 6)
    streaming.push(wave[:9000])
    state = streaming.state()
    ends = []
    for _ in range(2):
        streaming.push(wave[9000:])
        ends.append(streaming.finish())
        streaming.restore(state)
    assert ends[0] == ends[1]


def test_a_state_is_as_small_as_its_stream(recognizer):
    """It keeps neither the push nor the batch that its tensors were cut from."""
    streaming, files = StreamingRecognizer(recognizer, 8), []
    streaming.push_many({stream: audio(8.0) for stream in range(8)})
    for wave in (audio(0.0), audio(2 * CHUNK / 16000)):
        streaming.push(wave)
        file = io.BytesIO()
        torch.save(streaming.state()["stream"] | {"decoder": None}, file)
        files.append(len(file.getvalue()))
    assert files[0] == files[1] < 4 * 16000


def test_audio_that_was_decoded_is_not_kept(recognizer):
    streaming = StreamingRecognizer(recognizer)
    streaming.push(audio(8.0))
    left = streaming._streams[0].audio
    assert left.untyped_storage().nbytes() == left.nbytes < 4 * 4080


def test_a_finished_stream_is_saved_as_finished(recognizer):
    streaming = StreamingRecognizer(recognizer)
    streaming.finish()
    state = streaming.state()
    streaming.reset()
    streaming.restore(state)
    with pytest.raises(ValueError, match="stream 0 has finished"):
        streaming.push(audio(0.1))


def test_states_that_do_not_fit_are_refused(recognizer):
    state = StreamingRecognizer(recognizer).state()
    for other in (
        StreamingRecognizer(recognizer, chunk_ms=480),
        StreamingRecognizer(recognizer, beam_width=2),
        StreamingRecognizer(recognizer_of(encoder_hidden=8)),
        StreamingRecognizer(recognizer_of(tail_ms=0)),
    ):
        with pytest.raises(ValueError, match="state was taken with"):
            other.restore(state)
    streaming = StreamingRecognizer(recognizer)
    for broken in (None, {}, state["stream"]):
        with pytest.raises(ValueError, match="state was taken with None"):
            streaming.restore(broken)
    edits = [
        ({"audio": torch.zeros(3, dtype=torch.int16)}, "state.audio must be a 1-D tensor, torch.float32"),
        ({"audio": [1.0]}, "state.audio"),
        ({"start": 1.5}, "state.start must be of type int, got float"),
        ({"decoder": {"labels": []}}, "state.decoder must hold labels, times"),
        ({"encoder": 3}, "state.encoder must hold pending"),
        ({"more": 1}, "state must hold audio"),
    ]
    for edit, message in edits:
        with pytest.raises(ValueError, match=message):
            streaming.restore({**state, "stream": {**state["stream"], **edit}})
    streaming.restore(state)


def test_a_reset_stream_has_heard_nothing(recognizer):
    streaming, wave = StreamingRecognizer(recognizer, 2), audio(1.0, 7)
    expected = streamed(streaming, wave, [], 1)
    streaming.push(audio(0.7))
    streaming.reset()
    assert streaming.push(wave[:0]) == Result("", False, (), (), 0, 0.0, 0.0)
    assert streamed(streaming, wave, []) == expected
    streaming.reset()  # also after its end
    assert streamed(streaming, wave, []) == expected


class Scripted(GreedyDecoder):
    """Emits label 2 at the given frames of each segment and nothing else."""

    def __init__(self, model, *frames):
        super().__init__(model)
        self.frames = frames

    def choose(self, logits, frames, counts):
        return [
            [2 if frame + place in self.frames[count:] else 0 for place in range(logits.shape[1])]
            for frame, count in zip(frames, counts, strict=True)
        ]


def endpointed(recognizer, rules, frames, seconds, chunk_ms=80):
    """(tokens, start, end) of the final results of a stream that is pushed chunk by chunk."""
    streaming = StreamingRecognizer(recognizer, chunk_ms=chunk_ms, endpointing=rules)
    streaming.decoder = Scripted(recognizer.model, *frames)
    streaming.reset()
    results = streamed(streaming, audio(seconds), [chunk_ms * 16] * int(1000 * seconds / chunk_ms))
    return [(len(part[1]), *part[3:]) for part in finals(results)], results


@pytest.fixture(scope="module")
def tailless():
    return recognizer_of(tail_ms=0)


def test_trailing_silence_ends_a_segment(tailless):
    rules = Endpointing(trailing_silence=0.4, leading_silence=9, max_length=9)
    ends, results = endpointed(tailless, rules, (1, 4), 2.1)
    # Frame 4 ends at 0.40 s; 0.40 s later the segment does, and the next one is like it.
    assert ends == [(2, 0.0, 0.8), (2, 0.8, 1.6), (2, 1.6, 2.08)]
    assert results[-1].times == (1.68, 1.92)


def test_leading_silence_ends_a_segment_without_labels(tailless):
    rules = Endpointing(trailing_silence=0.1, leading_silence=0.64, max_length=9)
    assert endpointed(tailless, rules, (), 1.5)[0] == [(0, 0.0, 0.64), (0, 0.64, 1.28), (0, 1.28, 1.44)]


def test_no_segment_is_longer_than_max_length(tailless):
    rules = Endpointing(trailing_silence=9, leading_silence=9, max_length=0.5)
    assert endpointed(tailless, rules, (0, 1), 1.3)[0] == [(2, 0.0, 0.56), (2, 0.56, 1.12), (2, 1.12, 1.28)]


def test_rules_are_looked_at_after_every_chunk(tailless):
    rules = Endpointing(trailing_silence=math.inf, leading_silence=0.5, max_length=math.inf)
    ends, _ = endpointed(tailless, rules, (), 1.3, chunk_ms=400)
    assert ends == [(0, 0.0, 0.8), (0, 0.8, 1.28)]
    assert endpointed(tailless, Endpointing(math.inf, math.inf, math.inf), (0,), 1.3)[0] == [(1, 0.0, 1.28)]


def test_an_endpoint_is_reported_once_and_segments_of_one_push_all_are(tailless):
    streaming = StreamingRecognizer(tailless, chunk_ms=80, endpointing=Endpointing(max_length=0.4))
    wave = audio(3.0)
    first = streaming.push(wave[: 400 * 16 + 240])
    assert first.is_final and first.ended == () and first.end == 0.4
    again = streaming.push(wave[:0])
    assert not again.is_final and again.text == "" and again.start == again.end == 0.4
    several = streaming.push(wave[: 1000 * 16])
    assert [part.end for part in several.ended] == [0.8, 1.2] and not several.is_final and several.end == 1.36
    last = streaming.finish()
    assert last.is_final and last.ended == () and last.start == 1.2


def test_a_segment_after_an_endpoint_is_found_as_if_it_were_the_first(tailless):
    """The encoder and the search start afresh; the front end goes on."""
    recognizer = recognizer_of(tail_ms=0, adapt_frames=None)
    rules = Endpointing(trailing_silence=9, leading_silence=9, max_length=0.96)
    streaming, wave = StreamingRecognizer(recognizer, endpointing=rules), audio(2.5, 8)
    result = streamed(streaming, wave, [])
    segments = [*result[0].ended, result[-1]]
    assert [segment.start for segment in segments] == [0.0, 0.96, 1.92]
    texts = [recognizer.transcribe(wave[start : start + 4 * CHUNK + 240]) for start in (0, 4 * CHUNK, 8 * CHUNK)]
    assert [segment.text for segment in segments] == texts and any(texts)


def test_defaults_of_endpointing():
    rules = Endpointing()
    assert rules.ends(2.4, 2.4, 0) and not rules.ends(2.39, 2.39, 0)
    assert rules.ends(3.0, 1.2, 1) and not rules.ends(3.0, 1.19, 1)
    assert rules.ends(20.0, 0.0, 9) and not rules.ends(19.9, 0.0, 9)


@pytest.mark.parametrize("name", ["trailing_silence", "leading_silence", "max_length"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, None, "1", True])
def test_bad_rules_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive number of seconds"):
        Endpointing(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(streams=0), "streams must be at least 1, got 0"),
        (dict(chunk_ms=100), "chunk_ms must be a positive multiple of 80, the encoder's chunk, got 100"),
        (dict(chunk_ms=0), "chunk_ms must be a positive multiple of 80"),
        (dict(chunk_ms=240.0), "chunk_ms must be a positive multiple of 80, .* got 240.0"),
        (dict(chunk_ms=-80), "chunk_ms must be a positive multiple of 80"),
        (dict(beam_width=0), "beam_width must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(recognizer, settings, message):
    with pytest.raises(ValueError, match=message):
        StreamingRecognizer(recognizer, **settings)


def test_a_recognizer_in_training_is_refused():
    with pytest.raises(ValueError, match="recognizer is in training mode"):
        StreamingRecognizer(recognizer_of().train())


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            torch.zeros(100, dtype=torch.int16),
            r"audio must be a floating-point tensor \(samples,\), got torch.int16 \(100,\)",
        ),
        (torch.zeros(1, 100), r"got torch.float32 \(1, 100\)"),
        ([0.0], "got list"),
        (torch.tensor([0.0, math.nan]), "NaN or infinite"),
        (torch.tensor([math.inf]), "NaN or infinite"),
        (torch.tensor([1e39], dtype=torch.float64), "NaN or infinite"),  # as float32 it is
    ],
)
def test_bad_audio_is_refused_and_none_is_taken(recognizer, samples, message):
    streaming, wave = StreamingRecognizer(recognizer, 2), audio(0.5)
    with pytest.raises(ValueError, match=message):
        streaming.push_many({1: wave, 0: samples})
    assert streaming.push(wave[:0], 1).end == 0
    assert len(streaming.state(1)["stream"]["audio"]) == 0


def test_streams_that_are_not_there_or_over_are_refused(recognizer):
    streaming = StreamingRecognizer(recognizer, 2)
    for call in (
        lambda stream: streaming.push(audio(0.1), stream),
        streaming.finish,
        streaming.reset,
        streaming.state,
        lambda stream: streaming.restore({}, stream),
    ):
        for stream in (-1, 2, "0", 0.5):
            with pytest.raises(ValueError, match=r"stream must lie in 0..1, got"):
                call(stream)
    streaming.finish(1)
    for call in (lambda: streaming.push(audio(0.1), 1), lambda: streaming.finish(1)):
        with pytest.raises(ValueError, match=r"stream 1 has finished: reset\(1\) makes it anew"):
            call()
    streaming.push(audio(0.1), 0)


def test_a_stream_runs_where_its_model_is(device, recognizer):
    wave = audio(1.5, 9)
    streaming = StreamingRecognizer(recognizer_of().to(device), 2)
    for part in wave.split(4000):
        streaming.push_many({0: part, 1: part.to(device)})
    texts = [streaming.finish(stream).text for stream in range(2)]
    assert texts == [recognizer.transcribe(wave)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("stage", ["float", "qat", "packed"])
def test_chunks_are_replayed_on_a_gpu(stages, stage):
    recognizer = copy.deepcopy(stages[stage]).cuda()
    streaming = StreamingRecognizer(recognizer, 3)
    waves = [audio(2.0, seed) for seed in range(3)]
    for start in range(0, 32000, 4000):
        streaming.push_many({index: wave[start : start + 4000] for index, wave in enumerate(waves)})
    assert streaming.encoder._steps and streaming.decoder._loops
    for index, wave in enumerate(waves):
        assert streaming.finish(index).text == recognizer.transcribe(wave)


# --- bifocal models: a small encoder up to a switch, a large one after it


@pytest.fixture(scope="module")
def bifocal():
    return recognizer_of(small_encoder_layers=2, small_encoder_hidden=8)


@pytest.fixture(scope="module")
def bifocal_stages(bifocal):
    config = gq.GQConfig(bits=5, codebook="int8", activations="int8")
    prepared = copy.deepcopy(bifocal).prepare(config).eval()
    return {"float": bifocal, "qat": prepared, "packed": bifocal.packed_copy(config).eval()}


@torch.inference_mode()
def found_offline(recognizer, wave, seconds, width=1) -> tuple[int, ...]:
    """Labels of a recording whose wake word ends after so many seconds."""
    model, front_end = recognizer.model, recognizer.front_end
    features, lengths = front_end(wave[None], torch.tensor([len(wave)]))
    encoded, lengths = model.encoder(features, lengths, torch.tensor([round(100 * min(seconds, 1000))]))
    decoder = GreedyDecoder(model) if width == 1 else BeamDecoder(model, width=width)
    return tuple(decoder.results(decoder.advance(decoder.start(1), encoded, lengths))[0].labels)


SWITCHES = [0, 0.07, 0.08, 0.24, 0.5, 1.13, 2.4, 3, math.inf]  # within and between encoder frames of 80 ms and chunks


@pytest.mark.parametrize(("stage", "width"), [("float", 1), ("float", 3), ("qat", 1), ("packed", 1), ("packed", 3)])
def test_a_stream_with_a_switch_ends_with_what_is_found_offline(bifocal_stages, stage, width):
    recognizer, wave = bifocal_stages[stage], audio(2.2, 11)
    streaming, found = StreamingRecognizer(recognizer, beam_width=width), set()
    for seconds in SWITCHES if (stage, width) == ("float", 1) else SWITCHES[3:6]:
        streaming.reset()
        streaming.switch_at(seconds)
        ids = streamed(streaming, wave, [1000] * 30)[-1].ids
        assert ids == found_offline(recognizer, wave, seconds, width)
        found.add(ids)
    assert len(found) > 2


def test_without_a_switch_the_large_encoder_takes_all(bifocal):
    wave = audio(1.5, 12)
    text = streamed(StreamingRecognizer(bifocal), wave, [])[-1].text
    assert text == bifocal.transcribe(wave) != ""


@pytest.mark.parametrize("graphs", [False, True])
def test_streams_may_switch_at_different_times(bifocal, graphs):
    """Some before their switches beside others after them, and one that switches in the middle of a chunk."""
    switches, waves = [0.4, 0, 1.2, 9], [audio(2.0, seed) for seed in range(20, 24)]
    streaming = StreamingRecognizer(bifocal, 4)
    streaming = with_graphs(streaming) if graphs else streaming
    for stream, seconds in enumerate(switches):
        streaming.switch_at(seconds, stream)
    for start in range(0, 32000, 1600):
        streaming.push_many({stream: wave[start : start + 1600] for stream, wave in enumerate(waves)})
    found = [streaming.finish(stream).ids for stream in range(4)]
    assert found == [found_offline(bifocal, *case) for case in zip(waves, switches, strict=True)]


def test_the_end_of_a_wake_word_may_become_known_later(bifocal):
    wave, streaming = audio(2.0, 13), StreamingRecognizer(bifocal)
    for told, seconds, at in [(0.8, 0.8, 0.5), (0.3, 0.48, 0.5), (1.5, 1.5, 0), (0, 0, 0.2), (math.inf, 9, 1.0)]:
        streaming.reset()
        streaming.switch_at(math.inf)
        streaming.push(wave[: int(16000 * at)])
        streaming.switch_at(told)  # 0.3 s are past then: 0.48 s have been encoded
        streaming.push(wave[int(16000 * at) :])
        assert streaming.finish().ids == found_offline(bifocal, wave, seconds)


@pytest.mark.parametrize("pushed", [0.1, 0.5, 1.5])
def test_a_stream_goes_on_from_its_state_before_and_after_its_switch(bifocal, pushed):
    wave, first, second = audio(2.0, 14), StreamingRecognizer(bifocal), StreamingRecognizer(bifocal)
    first.switch_at(1.1)
    first.push(wave[: int(16000 * pushed)])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.restore(torch.load(file, weights_only=True))
    second.push(wave[int(16000 * pushed) :])
    assert second.finish().ids == found_offline(bifocal, wave, 1.1)


def test_a_switch_outlasts_an_endpoint_and_each_segment_may_have_its_own():
    bifocal = recognizer_of(small_encoder_layers=2, small_encoder_hidden=8, tail_ms=0, adapt_frames=None)
    streaming = StreamingRecognizer(bifocal, endpointing=Endpointing(9, 9, max_length=0.96))
    wave = audio(2.5, 15)
    streaming.switch_at(1.2)
    result = streaming.push(wave[: 8 * CHUNK + 240])
    streaming.switch_at(2.16)
    streaming.push(wave[8 * CHUNK + 240 :])
    segments = [*result.ended, result, streaming.finish()]
    assert [segment.start for segment in segments] == [0.0, 0.96, 1.92]
    for segment, start, switch in zip(segments, (0, 4 * CHUNK, 8 * CHUNK), (9, 0.24, 0.24), strict=True):
        assert segment.ids == found_offline(bifocal, wave[start : start + 4 * CHUNK + 240], switch)


def test_switches_that_cannot_be_are_refused(bifocal, recognizer):
    streaming = StreamingRecognizer(bifocal, 2)
    for seconds in (-0.1, math.nan, "1", None, True):
        with pytest.raises(ValueError, match="seconds must be a number from 0 on, got"):
            streaming.switch_at(seconds)
    with pytest.raises(ValueError, match=r"stream must lie in 0..1, got 2"):
        streaming.switch_at(0.5, 2)
    streaming.switch_at(0.3)
    streaming.push(audio(1.0))
    with pytest.raises(ValueError, match=r"stream 0 has switched already: reset\(0\) makes it anew"):
        streaming.switch_at(5)
    streaming.finish()
    with pytest.raises(ValueError, match="stream 0 has finished"):
        streaming.switch_at(5)
    with pytest.raises(ValueError, match="small_encoder_layers is 0"):
        StreamingRecognizer(recognizer).switch_at(0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("stage", ["float", "packed"])
def test_bifocal_chunks_are_replayed_on_a_gpu(bifocal_stages, stage):
    recognizer, switches = copy.deepcopy(bifocal_stages[stage]).cuda(), [0.4, 0, 1.2]
    streaming = StreamingRecognizer(recognizer, 3)
    waves = [audio(2.0, seed) for seed in range(3)]
    for stream, seconds in enumerate(switches):
        streaming.switch_at(seconds, stream)
    for start in range(0, 32000, 4000):
        streaming.push_many({index: wave[start : start + 4000] for index, wave in enumerate(waves)})
    assert set(streaming.encoder.small._steps) == {1, 2} and set(streaming.encoder.large._steps) == {1, 2, 3}
    found = [streaming.finish(stream).ids for stream in range(3)]
    assert found == [found_offline(recognizer, *case) for case in zip(waves, switches, strict=True)]


def test_a_packed_conformer_streams_as_it_transcribes():
    config = gq.GQConfig(bits=5, codebook="int8", activations="int8")
    recognizer = recognizer_of(**CONFORMER).prepare(config).convert().eval()
    waves = [audio(1.9, 1), audio(1.1, 2)]
    several = StreamingRecognizer(recognizer, 2)
    for index, wave in enumerate(waves):  # of different ages when their chunks meet
        several.push(wave[: 4000 * index], index)
    several.push_many({index: wave[4000 * index :] for index, wave in enumerate(waves)})
    assert [several.finish(index).text for index in range(2)] == [recognizer.transcribe(wave) for wave in waves]


def test_a_conformer_goes_on_from_a_saved_state():
    recognizer, wave = recognizer_of(**CONFORMER), audio(2.0)
    streaming = StreamingRecognizer(recognizer)
    streaming.push(wave[:20000])
    other = StreamingRecognizer(recognizer)
    other.restore(streaming.state())
    other.push(wave[20000:])
    assert other.finish().text == recognizer.transcribe(wave) != ""


def test_chunks_are_whole_chunks_of_the_conformer():
    with pytest.raises(ValueError, match="chunk_ms must be a positive multiple of 120, the encoder's chunk, got 160"):
        StreamingRecognizer(recognizer_of(**CONFORMER), chunk_ms=160)
