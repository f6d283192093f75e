"""Greedy and beam search against exhaustive scoring, chunk by chunk, batched and alone."""

import itertools

import pytest
import torch

from gq_triton.models import CTC, RNNT, RNNTConfig
from gq_triton.speech.decoding import BeamDecoder, CTCDecoder, Decoded, GreedyDecoder, beam, greedy
from gq_triton.training.objective import transducer_loss


@pytest.fixture
def model():
    torch.manual_seed(3)
    config = RNNTConfig(
        vocab_size=4,
        features=5,
        stack=2,
        encoder_layers=2,
        encoder_hidden=12,
        predictor_embedding=6,
        predictor_hidden=9,
        joint=10,
        dropout=0.5,
    )
    model = RNNT(config).eval()
    with torch.no_grad():  # random weights near zero would decode every frame alike
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def utterances():
    draw = torch.Generator().manual_seed(5)
    return torch.randn(3, 32, 5, generator=draw), torch.tensor([32, 9, 20])


def plain_greedy(model, features, max_symbols):
    """One utterance, one step at a time, as the definition reads."""
    encoded, _ = model.encoder(features[None], torch.tensor([len(features)]))
    labels, (predicted, state) = [], model.predictor(torch.zeros(1, 1, dtype=torch.long))
    for frame in encoded[0]:
        for _ in range(max_symbols):
            best = int(model.joint(frame, predicted[0, 0]).argmax())
            if best == 0:
                break
            labels.append(best)
            predicted, state = model.predictor(torch.tensor([[best]]), state)
    return labels


@pytest.mark.parametrize("max_symbols", [1, 3])
def test_batched_greedy_equals_the_definition(model, utterances, max_symbols):
    features, lengths = utterances
    with torch.no_grad():
        expected = [plain_greedy(model, x[:n], max_symbols) for x, n in zip(features, lengths, strict=True)]
    assert any(expected)
    assert greedy(model, features, lengths, max_symbols=max_symbols) == expected


@pytest.mark.parametrize("decoder", [lambda m: GreedyDecoder(m), lambda m: BeamDecoder(m, width=3)])
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_chunks_give_the_same_labels(model, utterances, decoder, chunk):
    features, lengths = utterances
    encoded, encoded_lengths = model.encoder(features, lengths)
    search = decoder(model)
    whole = search.results(search.advance(search.start(3), encoded, encoded_lengths))
    state = search.start(3)
    for start in range(0, encoded.shape[1], chunk):
        part = encoded[:, start : start + chunk]
        state = search.advance(state, part, (encoded_lengths - start).clamp(0, part.shape[1]))
    assert search.results(state) == whole and any(decoded.labels for decoded in whole)


@torch.no_grad()
def test_a_wide_beam_finds_the_most_probable_labels(model):
    """With room for every label sequence of the lattice, the search is exact."""
    features, lengths, most = torch.randn(1, 12, 5), torch.tensor([12]), 3
    encoded, encoded_lengths = model.encoder(features, lengths)
    frames = int(encoded_lengths)
    decoder = BeamDecoder(model, width=4000, max_symbols=most)
    state = decoder.advance(decoder.start(1), encoded, encoded_lengths)
    scores = {hypothesis.labels: hypothesis.score for hypothesis in state.beams[0]}
    for count in range(most + 1):  # up to max_symbols labels no alignment is cut off
        for labels in itertools.product(range(1, 4), repeat=count):
            targets = torch.tensor([labels], dtype=torch.long).reshape(1, count)
            lattice = model(features, lengths, targets)
            expected = -transducer_loss(model.joint, lattice, targets, torch.tensor([count]))
            assert scores[labels] == pytest.approx(expected.item(), abs=1e-3)
    assert frames == 3
    assert decoder.results(state)[0].labels == list(max(scores, key=scores.get))


def test_beam_is_no_worse_than_greedy(model, utterances):
    features, lengths = utterances

    def score(labels):
        longest = max(map(len, labels))
        targets = torch.tensor([row + [1] * (longest - len(row)) for row in labels])
        with torch.no_grad():
            lattice = model(features, lengths, targets)
        sizes = torch.tensor([len(row) for row in labels])
        return -transducer_loss(model.joint, lattice, targets, sizes, reduction="none")

    best, first = beam(model, features, lengths, width=8), greedy(model, features, lengths)
    assert (score(best) >= score(first) - 1e-4).all()


def test_decoding_leaves_the_training_mode_alone_and_ignores_dropout(model, utterances):
    expected = greedy(model, *utterances)
    model.train()
    assert greedy(model, *utterances) == expected and model.training


def test_no_frames_change_nothing(model):
    for decoder in (GreedyDecoder(model), BeamDecoder(model)):
        state = decoder.advance(decoder.start(2), torch.zeros(2, 0, 12), torch.tensor([0, 0]))
        assert decoder.results(state) == [Decoded([], [], 0)] * 2


@pytest.mark.parametrize("decoder", [lambda m: GreedyDecoder(m), lambda m: BeamDecoder(m, width=3)])
@torch.no_grad()
def test_states_are_joined_and_split(model, utterances, decoder):
    """Utterances that are decoded together go on alone, and the other way round."""
    features, lengths = utterances
    encoded, encoded_lengths = model.encoder(features, lengths)
    search, half = decoder(model), encoded.shape[1] // 2
    whole = search.results(search.advance(search.start(3), encoded, encoded_lengths))
    first, second = encoded_lengths.clamp_max(half), (encoded_lengths - half).clamp_min(0)
    together = search.advance(search.start(3), encoded[:, :half], first)
    rows = enumerate(together.split())
    apart = [search.advance(state, encoded[n : n + 1, half:], second[n : n + 1]) for n, state in rows]
    assert [search.results(state)[0] for state in apart] == whole
    apart = [search.advance(search.start(1), encoded[n : n + 1, :half], first[n : n + 1]) for n in range(3)]
    together = search.advance(apart[0].join(apart), encoded[:, half:], second)
    assert search.results(together) == whole and together.frames == encoded_lengths.tolist()


@pytest.mark.parametrize("decoder", [lambda m: GreedyDecoder(m), lambda m: BeamDecoder(m, width=3)])
@torch.no_grad()
def test_times_are_the_frames_that_labels_are_emitted_at(model, utterances, decoder):
    """Up to a label's frame the label is not there, and from then on it is."""
    features, lengths = utterances
    encoded, _ = model.encoder(features[:1], lengths[:1])
    search = decoder(model)
    state, known = search.start(1), []
    for time in range(encoded.shape[1]):
        state = search.advance(state, encoded[:, time : time + 1], torch.tensor([1]))
        labels, times, stable = search.results(state)[0]
        assert len(labels) == len(times) and times == sorted(times) and all(at <= time for at in times)
        assert stable >= len(known) and labels[: len(known)] == known
        known = labels[:stable]
    (whole,) = search.results(search.advance(search.start(1), encoded, lengths[:1] // 4))
    assert (whole.labels, whole.times) == (labels, times) and len(set(times)) > 1


def test_the_greedy_search_takes_what_is_chosen(model):
    asked = []

    class Told(GreedyDecoder):
        def choose(self, logits, frames, counts):
            asked.append((tuple(logits.shape), frames, counts))
            return [
                [2 if frame + n >= 3 + count else 0 for n in range(logits.shape[1])]
                for frame, count in zip(frames, counts, strict=True)
            ]

    decoder = Told(model, max_symbols=1)
    state = decoder.advance(decoder.start(2), torch.zeros(2, 5, 12), torch.tensor([5, 2]))
    assert state.labels == [[2, 2], []] and state.times == [[3, 4], []]
    assert asked[0] == ((2, 4, 4), [0, 0], [0, 0]) and asked[1] == ((1, 1, 4), [4], [1])
    state = decoder.advance(state, torch.zeros(2, 2, 12), torch.tensor([2, 2]))
    assert state.times == [[3, 4, 5, 6], [3]] and state.frames == [7, 4]


def test_bad_settings_are_named(model):
    with pytest.raises(ValueError, match="width is 0"):
        BeamDecoder(model, width=0)
    with pytest.raises(ValueError, match="max_symbols is 0"):
        GreedyDecoder(model, max_symbols=0)


# --- CTC --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctc():
    torch.manual_seed(3)
    sizes = dict(features=5, stack=2, encoder_layers=2, encoder_hidden=12, dropout=0.5, predictor_layers=0)
    model = CTC(RNNTConfig(vocab_size=4, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def plain_ctc(model, features):
    """One utterance as the definition reads: repetitions are one label, then blanks go."""
    logits, _ = model(features[None], torch.tensor([len(features)]))
    frames = [label for label, _ in itertools.groupby(logits[0].argmax(-1).tolist())]
    return [label for label in frames if label]


def test_ctc_equals_the_definition(ctc, utterances):
    features, lengths = utterances
    with torch.no_grad():
        expected = [plain_ctc(ctc, x[:n]) for x, n in zip(features, lengths, strict=True)]
    assert len(expected[0]) > 2
    assert greedy(ctc, features, lengths) == expected


@torch.no_grad()
def test_ctc_frames_may_come_in_pieces(ctc, utterances):
    """A label that goes on across a cut is one; its time is where it began."""
    decoder = CTCDecoder(ctc)
    encoded, lengths = ctc.encoder(*utterances)
    whole = decoder.advance(decoder.start(3), encoded, lengths)
    for size in (1, 2, 3):
        state = decoder.start(3)
        for start in range(0, encoded.shape[1], size):
            left = (lengths - start).clamp(0, size)
            state = decoder.advance(state, encoded[:, start : start + size], left)
        assert state == whole
    assert type(whole).join(whole.split()) == whole
    (found, *_), chosen = decoder.results(whole), ctc.output(encoded)[0].argmax(-1).tolist()
    assert found.labels == [chosen[time] for time in found.times] and found.stable == len(found.labels)
    assert all(time == 0 or chosen[time - 1] != chosen[time] for time in found.times)


def test_beam_search_of_a_ctc_model_is_refused(ctc, utterances):
    with pytest.raises(ValueError, match="a CTC model's beam_width must be 1"):
        beam(ctc, *utterances)
