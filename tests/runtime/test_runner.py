"""Packed recognizers without torch, beside the same with torch."""

import copy
import json
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import may_be_refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gq_triton import GQConfig
from gq_triton.baselines import KMeansConfig, LSQConfig, UniformConfig
from gq_triton.kernels import native
from gq_triton.models import RNNT, ConformerConfig
from gq_triton.runtime import Runner, Stream
from gq_triton.speech.audio import save_audio
from gq_triton.speech.features import LogMel
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import StreamingRecognizer
from gq_triton.speech.tokens import train_tokenizer

pytestmark = pytest.mark.usefixtures("needs_native")

ROOT = Path(__file__).resolve().parent.parent.parent
QUANTIZATIONS = {
    "integers": {"*": GQConfig(bits=5, codebook="int8", activations="int8")},
    "8 bits": {"*": GQConfig(bits=8, codebook="int8", activations="int8")},
    "floats": {"*": GQConfig(bits=4)},
    "fp8": {"*": GQConfig(bits=6, codebook="fp8", activations="fp8")},
    "one scale": {"*": GQConfig(bits=5, granularity="tensor")},
    "widths": {"encoder.layers.1": GQConfig(bits=3, codebook="int8"), "joint": GQConfig(bits=7), "*": GQConfig(bits=5)},
    "rival methods": {
        "joint": UniformConfig(bits=8, codebook="int8", activations="int8"),
        "predictor.*": KMeansConfig(bits=3),
        "*": LSQConfig(bits=4, codebook="int8"),
    },
    "some float": {
        "encoder.layers.1": None,
        "*.weight_hh_l0": None,
        "joint.output": None,
        "predictor.embedding": None,
        "*": GQConfig(bits=5),
    },
}


@pytest.fixture(scope="module")
def runner(packed) -> Runner:
    return Runner.load(packed[0])


def samples_of(utterance):
    return utterance.load().numpy()


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_texts_are_those_of_torch(quantization, save, spoken):
    path, recognizer = save(quantization)
    runner = Runner.load(path)
    for utterance in spoken[:8]:
        assert runner.transcribe(samples_of(utterance)) == recognizer.transcribe(utterance.load())


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_logits_are_those_of_torch(quantization, save, spoken):
    """Of the same features: those of torch differ in their last digits, and rounding may follow another way."""
    path, recognizer = save(quantization)
    runner = Runner.load(path)
    features, lengths = recognizer.front_end(spoken[0].load()[None], torch.tensor([len(spoken[0].load())]))
    with torch.inference_mode():
        model = recognizer.model
        encoded, _ = model.encoder(features, lengths)
        predicted, _ = model.predictor(torch.tensor([[0, 3, 2]]))
        expected = model.joint(encoded[0], predicted[0, -1])
    model = runner.model
    encoded, _ = model.encoder.stream(features[0].numpy(), model.encoder.start())
    states = model.predictor.start()
    for label in (0, 3, 2):
        predicted, states = model.predictor(label, states)
    found = model.joint.combine(model.joint.encoder(encoded), model.joint.predictor(predicted))
    integers = any(config and config.activations for config in quantization.values())
    error = np.abs(found - expected.numpy())
    assert np.median(error) < 1e-5
    assert error.max() < (0.05 if integers else 1e-4)  # a number near the middle of two integers may become the other


def test_packed_layers_on_integers_are_torch_s_to_the_bit(packed, runner):
    """What lies between them, LayerNorm, differs in its last digits."""
    recognizer = packed[1]
    x = torch.randn(1, 7, 320)
    with torch.inference_mode():
        for layer, lstm in zip(runner.model.encoder.layers, recognizer.model.encoder.layers, strict=True):
            x = x[:, :, : lstm.input_size]
            found, _ = layer(np.ascontiguousarray(x[0].numpy()), layer.start())
            x, _ = lstm(x)
            np.testing.assert_array_equal(found, x[0].numpy())
            x = x.repeat(1, 1, 2)
        x = torch.randn(7, recognizer.model.encoder.output_size)
        np.testing.assert_array_equal(runner.model.joint.encoder(x.numpy()), recognizer.model.joint.encoder(x).numpy())
        found, _ = runner.model.predictor(3, runner.model.predictor.start())
        np.testing.assert_array_equal(found, recognizer.model.predictor(torch.tensor([[3]]))[0][0].numpy())


def test_it_understands(runner, spoken):
    heard = [runner.transcribe(samples_of(utterance)) for utterance in spoken[:8]]
    assert sum(text == utterance.text for text, utterance in zip(heard, spoken[:8], strict=True)) >= 7


def test_streams_give_what_torch_streams_give(packed, runner, spoken):
    recognizer, frame_ms = packed[1], runner.frame_ms
    for utterance in spoken[:4]:
        expected = StreamingRecognizer(recognizer, chunk_ms=3 * frame_ms)
        stream = runner.stream(3 * frame_ms)
        for part in utterance.load().split(2000):
            assert stream.push(part.numpy()) == expected.push(part).text
        assert stream.finish() == expected.finish().text


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 6000), max_size=6), st.sampled_from([1, 2, 5]))
def test_cuts_do_not_matter(runner, spoken, cuts, chunk):
    """Not to one bit: labels, and the logits that they were chosen by."""
    samples = samples_of(spoken[0])
    whole, pieces = Recorded(runner, chunk * runner.frame_ms), Recorded(runner, chunk * runner.frame_ms)
    whole.push(samples)
    place = 0
    for cut in cuts:
        pieces.push(samples[place : place + cut])
        place += cut
    pieces.push(samples[place:])
    assert pieces.finish() == whole.finish()
    np.testing.assert_array_equal(np.concatenate(pieces.seen), np.concatenate(whole.seen))


class Recorded(Stream):
    """Keeps the logits that it sees."""

    def reset(self):
        self.seen = []
        super().reset()

    def choose(self, logits, frame):
        self.seen.append(logits.copy())
        return super().choose(logits, frame)


def test_threads_do_not_matter(packed, spoken):
    one, two = (Recorded(Runner.load(packed[0], threads), 240) for threads in (1, 2))
    for stream in (one, two):
        stream.push(samples_of(spoken[0]))
        stream.finish()
    np.testing.assert_array_equal(np.concatenate(one.seen), np.concatenate(two.seen))


def test_the_text_grows_with_the_audio(runner, spoken):
    stream = runner.stream(runner.frame_ms)
    texts = [stream.push(part.numpy()) for part in spoken[0].load().split(800)]
    assert texts[0] == "" != texts[-1]
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert stream.finish() == stream.text == runner.transcribe(samples_of(spoken[0]))


def test_a_text_is_only_put_together_when_it_grows(runner, spoken, monkeypatch):
    """Of hours of speech that takes longer than a short push lasts."""
    calls, decode = [], runner.tokenizer.decode
    monkeypatch.setattr(runner.tokenizer, "decode", lambda ids: calls.append(len(ids)) or decode(ids))
    stream = runner.stream()
    for part in spoken[0].load().split(160):
        stream.push(part.numpy())
    assert stream.finish() == decode(stream.labels) != ""
    assert calls == sorted(set(calls)) and calls[-1] == len(stream.labels)


def test_reset_forgets_everything(runner, spoken):
    stream = runner.stream()
    stream.push(samples_of(spoken[1]))
    stream.reset()
    assert (stream.text, stream.labels) == ("", [])
    stream.push(samples_of(spoken[0]))
    first = stream.finish()
    stream.reset()
    stream.push(samples_of(spoken[0]))
    assert stream.finish() == first


def test_streams_do_not_disturb_each_other(runner, spoken):
    streams, audio = [runner.stream() for _ in range(2)], [u.load().split(1000) for u in spoken[:2]]
    for parts in zip(*audio, strict=False):
        for stream, part in zip(streams, parts, strict=True):
            stream.push(part.numpy())
    alone = runner.stream()
    for part in audio[1][: min(map(len, audio))]:
        alone.push(part.numpy())
    assert streams[1].finish() == alone.finish()


def test_a_copied_stream_goes_on_by_itself(runner, spoken):
    first, second = samples_of(spoken[0]), samples_of(spoken[1])
    stream = runner.stream()
    stream.push(first[:9000])
    copied = copy.deepcopy(stream)
    stream.push(second)
    copied.push(first[9000:])
    assert copied.finish() == runner.transcribe(first)


def test_labels_may_be_chosen(runner, spoken):
    script = [(1, 3), (4, 2), (5, 4)]  # frames and labels

    class Forced(Stream):
        def choose(self, logits, frame):
            due, label = (*script, (np.inf, 0))[len(self.labels)]
            return [label if frame + place >= due else 0 for place in range(len(logits))]

    stream = Forced(runner, runner.frame_ms)
    stream.push(samples_of(spoken[0]))
    stream.finish()
    assert stream.labels == [3, 2, 4]


def test_no_frame_has_more_than_five_labels(runner, spoken):
    class Endless(Stream):
        def choose(self, logits, frame):
            self.frames = frame + len(logits)
            return [2] * len(logits)

    stream = Endless(runner, 240)
    stream.push(samples_of(spoken[0]))
    stream.finish()
    assert len(stream.labels) == 5 * stream.frames > 0


@pytest.mark.parametrize("samples", [0, 10, 399, 400, 1000, 1500])
def test_audio_shorter_than_an_encoder_frame_is_empty(runner, samples):
    assert runner.transcribe(np.zeros(samples, np.float32)) == ""


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_taken(runner, spoken, dtype):
    samples = samples_of(spoken[0])
    assert runner.transcribe(samples.astype(dtype)) == runner.transcribe(samples)


@pytest.mark.parametrize("kind", ["char", "subword"])
def test_tokenizers_and_front_ends_travel_in_the_file(kind, trained, spoken, tmp_path):
    if kind == "subword":
        pytest.importorskip("sentencepiece")
    tokenizer = train_tokenizer(kind, [utterance.text for utterance in spoken], 16)
    config = trained.model.config.from_dict(trained.model.config.to_dict() | {"vocab_size": tokenizer.vocab_size})
    front_end = LogMel(n_mels=80, f_min=50.0, adapt_frames=30, tail_ms=200).fit(u.load() for u in spoken)
    torch.manual_seed(0)
    recognizer = Recognizer(front_end, tokenizer, type(trained.model)(config)).eval()
    with torch.no_grad():
        recognizer.model.joint.output.bias[0] -= 0.3  # so that it says something
    recognizer.prepare(GQConfig(bits=6)).convert().save(tmp_path / "m")
    text = Runner.load(tmp_path / "m").transcribe(samples_of(spoken[0]))
    assert text == recognizer.transcribe(spoken[0].load()) != ""


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_ms", [0, -80, 79, 80.0])
def test_chunks_must_be_whole_encoder_frames(runner, chunk_ms):
    with pytest.raises(ValueError, match=f"chunk_ms must be a positive multiple of 80, .* got {chunk_ms}"):
        runner.stream(chunk_ms)


@pytest.mark.parametrize(
    "samples, match",
    [
        ([0.0], "got list"),
        (np.zeros((1, 4), np.float32), r"got float32 \(1, 4\)"),
        (np.zeros(4, np.int16), r"got int16 \(4,\)"),
        (np.array([0, np.nan], np.float32), "NaN or infinite"),
        (np.array([0, 1e39]), "NaN or infinite"),
    ],
)
def test_bad_samples_are_refused(runner, samples, match):
    stream = runner.stream()
    with pytest.raises(ValueError, match=match):
        stream.push(samples)
    assert stream.finish() == ""


def test_a_finished_stream_takes_no_more(runner):
    stream = runner.stream()
    stream.finish()
    with pytest.raises(ValueError, match="has finished"):
        stream.push(np.zeros(4))
    with pytest.raises(ValueError, match="has finished"):
        stream.finish()


def test_arguments_of_load_are_checked(packed, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Runner.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        Runner.load(packed[0], threads=0)
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "it was not built")
    with pytest.raises(RuntimeError, match="native kernels are not available: it was not built"):
        Runner.load(packed[0])


def test_a_float_recognizer_is_refused_with_what_to_do(trained, tmp_path):
    trained.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"m cannot be loaded: .*stage 'float'.*gq-triton convert"):
        Runner.load(tmp_path / "m")


def test_a_conformer_is_refused(trained, tmp_path):
    config = ConformerConfig.preset("tiny", trained.tokenizer.vocab_size, encoder_layers=1)
    recognizer = Recognizer(trained.front_end, trained.tokenizer, RNNT(config)).eval()
    recognizer.prepare(GQConfig(bits=5)).convert().save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="architecture is 'conformer'; 'rnnt' is needed"):
        Runner.load(tmp_path / "model.safetensors")


def rewrite(path, target, *, metadata=lambda state, packed: None, data=lambda name, content: None):
    """Copies a packed file with parts of it changed in place; returns the copy."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    fields, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    texts = fields["__metadata__"]
    state, weights = json.loads(texts["state"]), json.loads(texts["gq_triton"])
    metadata(state, weights)
    texts["state"], texts["gq_triton"] = json.dumps(state), json.dumps(weights)
    for name, entry in fields.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            data(name, memoryview(body)[start:stop])
    text = json.dumps(fields).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return target


def changed(part, **values):
    """A change of the description."""
    return lambda state, weights: state[part].update(values)


@pytest.mark.parametrize(
    "metadata, match",
    [
        (lambda state, weights: state.update(format="other"), "no recognizer that this version reads"),
        (lambda state, weights: state.update(stage="qat"), "stage 'qat'"),
        (lambda state, weights: state.pop("model"), "must have 'model', an object"),
        (lambda state, weights: state.update(tokenizer=[]), "must have 'tokenizer', an object"),
        (changed("model", encoder_hidden=25), "has shape"),
        (changed("model", encoder_layers=3), "lacks a tensor that the model has: model.encoder.layers.2"),
        (changed("model", encoder_layers=10**12), "lacks a tensor"),
        (changed("model", encoder_hidden=2**60), "has shape"),
        (changed("model", reduce_after=0), "has shape"),
        (changed("model", encoder_layers=1, reduce_after=0), "weights that the model has not: model.encoder.layers.1"),
        (changed("model", joint="a"), "joint is 'a'"),
        (changed("model", joint=True), "joint is True"),
        (changed("model", dropout=float("nan")), "dropout is nan"),
        (changed("model", unheard_of=1), "no field unheard_of"),
        (changed("model", features=81), "front end gives 80 values a frame, its model takes 81"),
        (changed("model", vocab_size=7), "tokenizer has 6 ids, its model emits 7"),
        (changed("front_end", n_mels="80"), "n_mels must be an integer"),
        (changed("front_end", f_min=None), "f_min and f_max must"),
        (changed("front_end", unheard_of=1), "unheard_of"),
        (changed("front_end", tail_ms=10**15), "tail_ms"),
        (changed("tokenizer", kind="morse"), "kind must be"),
        (changed("tokenizer", symbols=[["do"], "mi"]), "symbols must be"),
        (lambda state, weights: weights.update(version=2), "version 2"),
        (lambda state, weights: weights["weights"].popitem(), "lacks a tensor that the model has"),
        (lambda state, weights: weights["weights"]["model.joint.output.weight"]["config"].update(bits=4), "has shape"),
        (lambda state, weights: weights["weights"]["model.joint.output.weight"]["config"].update(bits=9), "bits must"),
        (
            lambda state, weights: weights["weights"]["model.joint.output.weight"]["config"].update(codebook="fp8"),
            "has dtype I8 in it and F8_E4M3 in the model",
        ),
        (
            lambda state, weights: weights["weights"].update(other={"config": {}}),
            "packed weights .* has not: other",
        ),
        (
            lambda state, weights: weights["aliases"].update({"model.nothing": "model.joint.output.bias"}),
            "tensors that the model has not: model.nothing",
        ),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(metadata, match, packed, tmp_path):
    path = rewrite(packed[0], tmp_path / "m", metadata=metadata)
    with pytest.raises(ValueError, match=rf"{path} cannot be loaded: .*{match}"):
        Runner.load(path)


@pytest.mark.parametrize(
    "name, place, value, match",
    [
        ("model.joint.output.weight_packed.scale", 0, np.float32(np.nan), "values that are not finite"),
        ("model.joint.output.weight_packed.scale", 1, np.float32(np.inf), "values that are not finite"),
        ("model.joint.output.weight_packed.scale", 0, np.float32(-1), "scales that are negative"),
        ("model.joint.output.weight_packed.codebook", 3, np.int8(-128), r"codebook values outside of \[-1, 1\]"),
        ("model.encoder.norms.0.bias", 2, np.float32(np.nan), "values that are not finite"),
        ("front_end.std", 5, np.float32(0), "front_end.std has values that are not above 0"),
    ],
)
def test_values_that_no_recognizer_has_are_refused(name, place, value, match, packed, tmp_path):
    def data(tensor, content):
        if tensor == name:
            content.cast("B")[place * value.itemsize : (place + 1) * value.itemsize] = value.tobytes()

    path = rewrite(packed[0], tmp_path / "m", data=data)
    with pytest.raises(ValueError, match=rf"{path} cannot be loaded: .*{match}"):
        Runner.load(path)


@pytest.mark.parametrize("codebook, byte", [("fp8", 0x79), ("fp8", 0xFF), ("fp8", 0x7F), ("float", 0x7F)])
def test_codebooks_of_other_kinds_are_checked(codebook, byte, save, tmp_path):
    path, _ = save({"*": GQConfig(bits=2, codebook=codebook)})

    def data(name, content):
        if name == "model.joint.encoder.weight_packed.codebook":
            content[-1] = byte

    with pytest.raises(ValueError, match=r"model.joint.encoder.weight has codebook values outside of \[-1, 1\]"):
        Runner.load(rewrite(path, tmp_path / "m", data=data))


def test_a_shared_weight_is_held_once(packed, spoken, tmp_path):
    first, second = "model.predictor.lstm.weight_hh_l0", "model.predictor.lstm.weight_hh_l1"
    aliases = {f"{second}_packed.{part}": f"{first}_packed.{part}" for part in ("codes", "codebook", "scale")}
    tensors = {name: tensor for name, tensor in load_file(packed[0]).items() if name not in aliases}
    with safe_open(packed[0], framework="pt") as file:
        metadata = file.metadata()
    metadata["gq_triton"] = json.dumps(json.loads(metadata["gq_triton"]) | {"aliases": aliases})
    save_file(tensors, tmp_path / "m", metadata)
    shared = Runner.load(tmp_path / "m")
    assert shared.model.predictor.layers[0].hh is shared.model.predictor.layers[1].hh
    recognizer = Recognizer.load(tmp_path / "m")
    assert shared.transcribe(samples_of(spoken[0])) == recognizer.transcribe(spoken[0].load())


def test_shared_floats_are_held_once(packed, tmp_path):
    """Else a small file whose names all stand for one large tensor would fill the memory."""
    first, second = "model.encoder.norms.0.weight", "model.encoder.norms.1.weight"
    tensors = {name: tensor for name, tensor in load_file(packed[0]).items() if name != second}
    with safe_open(packed[0], framework="pt") as file:
        metadata = file.metadata()
    metadata["gq_triton"] = json.dumps(json.loads(metadata["gq_triton"]) | {"aliases": {second: first}})
    save_file(tensors, tmp_path / "m", metadata)
    norms = Runner.load(tmp_path / "m").model.encoder.norms
    assert norms[0].weight is norms[1].weight


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_are_loaded_or_refused(packed, tmp_path_factory, data):
    """Any bytes of the header changed, cut or added, and of the data as well: a ValueError that names the file."""
    content = bytearray(packed[0].read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 8 + length) | st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"9", b"-1", b"0", b"[]", b"{", b'"', b"1e9", b"null", b"true"])
        )
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    with may_be_refused(path):
        Runner.load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_descriptions_of_any_values_are_loaded_or_refused(packed, tmp_path_factory, data):
    value = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
    value |= st.lists(value, max_size=2) | st.just({})

    def metadata(state, weights):
        weight = weights["weights"][data.draw(st.sampled_from(sorted(weights["weights"])))]
        parts = [state, state["model"], state["front_end"], state["tokenizer"], weights, weight]
        part = data.draw(st.sampled_from(parts))
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(value)

    path = rewrite(packed[0], tmp_path_factory.getbasetemp() / "described", metadata=metadata)
    with may_be_refused(path):
        Runner.load(path)


# --- a process without torch ------------------------------------------------------------------------------------------

PROCESS = """
import sys
sys.modules["torch"] = sys.modules["safetensors"] = sys.modules["scipy"] = None
from gq_triton.runtime import Runner
print(Runner.load(sys.argv[1]).transcribe(sys.argv[2]))
try:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
except FileNotFoundError:
    print(0)  # not Linux
"""


def test_a_process_needs_no_torch_and_little_memory(packed, spoken, tmp_path):
    save_audio(tmp_path / "a.wav", spoken[0].load())
    command = [sys.executable, "-c", PROCESS, str(packed[0]), str(tmp_path / "a.wav")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    text, kilobytes = run.stdout.splitlines()
    assert text == packed[1].transcribe(tmp_path / "a.wav")
    assert int(kilobytes) < 80_000
