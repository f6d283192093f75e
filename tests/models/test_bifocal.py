"""The bifocal encoder: where it switches, that streams of it are whole utterances, and what its parts are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gq_triton as gq
from gq_triton.models import RNNT, RNNTConfig
from gq_triton.models.rnnt import BifocalEncoder, BifocalState, Encoder
from gq_triton.speech.decoding import greedy

SIZES = dict(
    features=6,
    stack=3,
    encoder_layers=3,
    encoder_hidden=10,
    small_encoder_layers=2,
    small_encoder_hidden=4,
    predictor_embedding=5,
    predictor_hidden=7,
    joint=8,
    dropout=0.0,
)


def model_of(**changes):
    torch.manual_seed(0)
    return RNNT(RNNTConfig(vocab_size=9, **(SIZES | changes))).eval()


def halves(encoder, features, switch):
    """What comes out of each encoder alone, for one utterance: the definition."""
    frames = features.shape[1] // encoder.subsampling
    place = min(switch // encoder.subsampling, frames)
    cut = place * encoder.subsampling
    parts = [features.new_zeros(1, 0, encoder.output_size)]
    if place:
        parts.append(encoder.widen(encoder.small(features[:, :cut], torch.tensor([cut]))[0]))
    if place < frames:
        parts.append(encoder.large(features[:, cut:], torch.tensor([features.shape[1] - cut]))[0])
    return torch.cat(parts, 1)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(reduce_after=0), dict(encoder_projection=4)])
def test_each_encoder_takes_its_side_of_the_switch(changes):
    """A switch at the start, within an encoder frame, between two, at the end and beyond it."""
    encoder = model_of(**changes).encoder
    features, switch = torch.randn(6, 40, 6), torch.tensor([0, 5, 18, 20, 36, 1000])
    encoded, lengths = encoder(features, torch.full((6,), 40), switch)
    assert lengths.tolist() == [40 // encoder.subsampling] * 6
    assert encoded.shape == (6, 40 // encoder.subsampling, encoder.output_size)
    for row, place in enumerate(switch.tolist()):
        assert_close(encoded[row : row + 1], halves(encoder, features[row : row + 1], place))


def test_without_a_switch_it_is_the_large_encoder():
    encoder = model_of().encoder
    features, lengths = torch.randn(2, 25, 6), torch.tensor([25, 13])
    found, found_lengths = encoder(features, lengths)
    expected, expected_lengths = encoder.large(features, lengths)
    assert torch.equal(found, expected) and torch.equal(found_lengths, expected_lengths)
    assert_close(encoder(features, lengths, torch.tensor([0, 5]))[0], expected)
    assert_close(encoder.stream(features, encoder.initial_state(features))[0], expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.lists(st.integers(0, 13), max_size=8))
def test_streaming_equals_the_whole_utterance(switch, chunks):
    """Chunks of any length, batches with streams before and after their switches."""
    encoder = model_of().encoder
    chunks = [*chunks, max(0, 40 - sum(chunks))]
    features = torch.randn(len(switch), sum(chunks), 6, generator=torch.Generator().manual_seed(1))
    whole, _ = encoder(features, torch.full((len(switch),), sum(chunks)), torch.tensor(switch))
    state, parts = encoder.initial_state(features, torch.tensor(switch)), []
    for part in features.split(chunks, 1):
        encoded, state = encoder.stream(part, state)
        parts.append(encoded)
    assert_close(torch.cat(parts, 1), whole)
    assert state.left == [max(0, place // 6 - sum(chunks) // 6) for place in switch]


def test_streams_before_and_after_their_switches_are_joined_and_split():
    encoder = model_of().encoder
    chunk, switch = 2 * encoder.subsampling, torch.tensor([0, 30, 12, 500])
    features = torch.randn(4, 3 * chunk, 6)
    whole, _ = encoder(features, torch.full((4,), 3 * chunk), switch)
    states = [encoder.initial_state(features[:1], place[None]) for place in switch]
    found = [[] for _ in states]
    for start, streams in [(0, [0, 1, 2]), (0, [3]), (chunk, [3, 1]), (2 * chunk, [1]), (chunk, [2, 0])]:
        joined = BifocalState.join([states[stream] for stream in streams])
        encoded, joined = encoder.stream(features[streams, start : start + chunk], joined)
        for stream, part, state in zip(streams, encoded.split(1), joined.split(), strict=True):
            states[stream] = state
            found[stream].append(part)
    for stream, parts in enumerate(found):
        assert_close(torch.cat(parts, 1), whole[stream : stream + 1, : 2 * len(parts)])


def test_each_encoder_runs_on_its_streams_only():
    encoder, seen = model_of().encoder, []
    for name in ("small", "large"):
        getattr(encoder, name).layers[0].register_forward_hook(
            lambda _, inputs, __, name=name: seen.append((name, *inputs[0].shape[:2]))
        )
    features = torch.randn(3, 24, 6)
    state = encoder.initial_state(features, torch.tensor([24, 0, 12]))
    encoder.stream(features, state)
    assert seen == [("small", 2, 4), ("large", 1, 4), ("small", 1, 4), ("large", 2, 4)]


def test_a_state_is_not_changed_in_place():
    encoder = model_of().encoder
    features = torch.randn(2, 12, 6)
    state = encoder.initial_state(features, torch.tensor([6, 24]))
    first, _ = encoder.stream(features, state)
    again, _ = encoder.stream(features, state)
    assert torch.equal(first, again) and state.left == [1, 4]


def test_all_but_the_encoder_is_as_without():
    names = {name for name, _ in model_of().named_parameters()}
    plain = {name for name, _ in model_of(small_encoder_layers=0, small_encoder_hidden=0).named_parameters()}
    assert {name for name in names if not name.startswith("encoder.")} == {
        name for name in plain if not name.startswith("encoder.")
    }
    assert {name.removeprefix("encoder.large.") for name in names if name.startswith("encoder.large.")} == {
        name.removeprefix("encoder.") for name in plain if name.startswith("encoder.")
    }
    assert isinstance(model_of().encoder, BifocalEncoder)
    assert type(model_of(small_encoder_layers=0, small_encoder_hidden=0).encoder) is Encoder


def test_gradients_reach_the_small_encoder_by_switch_frames_only():
    model = model_of().train()
    features, lengths, targets = torch.randn(2, 24, 6), torch.tensor([24, 18]), torch.ones(2, 3, dtype=torch.long)
    model(features, lengths, targets).encoded.sum().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.large.parameters())
    assert all(parameter.grad is None for parameter in model.encoder.small.parameters())
    model.encoder(features, lengths, torch.tensor([12, 6]))[0].square().sum().backward()
    for part in (model.encoder.small, model.encoder.widen):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters())


def test_it_is_quantized_like_any_model():
    model = model_of()
    features, lengths, switch = torch.randn(2, 36, 6), torch.tensor([36, 30]), torch.tensor([18, 7])
    expected, _ = model.encoder(features, lengths, switch)
    packed = gq.quantize_(gq.quantize_(model, gq.GQConfig(bits=8), step="prepare"), step="convert")
    small = [name for name in packed.state_dict() if name.startswith(("encoder.small.layers", "encoder.widen"))]
    assert sum(name.endswith("_packed.codes") for name in small) == 5
    found, _ = packed.encoder(features, lengths, switch)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(found, expected)
    assert len(greedy(packed, features, lengths)) == 2


def test_is_made_of_plain_torch_layers():
    leaves = {type(module) for module in model_of().modules() if not list(module.children())}
    assert leaves == {nn.LSTM, nn.LayerNorm, nn.Linear, nn.Embedding, nn.Dropout}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(small_encoder_layers=0), "small_encoder_layers is 0 and small_encoder_hidden is 4; both or neither"),
        (dict(small_encoder_hidden=0), "small_encoder_layers is 2 and small_encoder_hidden is 0; both or neither"),
        (dict(small_encoder_layers=-1), "small_encoder_layers is -1"),
        (dict(small_encoder_layers=1), "reduce_after is 1; allowed: 0..0"),
        (dict(reduce_after=2), "reduce_after is 2; allowed: 0..1"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        RNNTConfig(9, **(SIZES | changes))


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        (torch.tensor([6]), r"switch is torch.int64 \(1,\); \(2,\) integers"),
        (torch.tensor([6.0, 6.0]), r"switch is torch.float32 \(2,\)"),
        (torch.tensor([6, -6]), r"switch is \[6, -6\]; frames are counted from 0"),
    ],
)
def test_bad_switches_are_named(switch, message):
    with pytest.raises(ValueError, match=message):
        model_of().encoder(torch.randn(2, 12, 6), torch.tensor([12, 12]), switch)


@pytest.mark.parametrize("switch", [None, torch.tensor([6])])
def test_bad_features_are_named(switch):
    encoder = model_of().encoder
    with pytest.raises(ValueError, match=r"features is \(1, 20, 5\)"):
        encoder(torch.zeros(1, 20, 5), torch.tensor([20]), switch)
    with pytest.raises(ValueError, match="features has 5 frames; at least 6"):
        encoder(torch.zeros(1, 5, 6), torch.tensor([5]), switch)
