"""The streaming Conformer: sizes, attention by its definition, streams, padding, and that it learns and quantizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gq_triton as gq
from gq_triton.models import CONFORMER_PRESETS, PRESETS, RNNT, ConformerConfig, preset
from gq_triton.models.config import config_from_dict
from gq_triton.models.conformer import ConformerEncoder, ConformerState
from gq_triton.training.objective import TransducerObjective

SMALL = dict(
    features=10,
    channels=4,
    encoder_layers=2,
    encoder_size=16,
    heads=2,
    kernel=3,
    chunk=3,
    left=5,
    predictor_embedding=5,
    predictor_hidden=7,
    joint=8,
    dropout=0.0,
)
CHUNK = 4 * SMALL["chunk"]  # input frames


def model_of(**changes) -> RNNT:
    torch.manual_seed(0)
    model = RNNT(ConformerConfig(vocab_size=9, **(SMALL | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # zero at first, which would hide them
                parameter.normal_()
    return model


def in_chunks(encoder: ConformerEncoder, features: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The encoding of a stream of chunks, cut at multiples of the encoder's."""
    state, parts = encoder.initial_state(features), []
    for chunk in features.tensor_split([CHUNK * cut for cut in sorted(cuts)], 1):
        encoded, state = encoder.stream(chunk, state)
        parts.append(encoded)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "name, vocabulary, low, high", [("tiny", 40, 3e5, 1.5e6), ("S", 256, 9e6, 11e6), ("M", 512, 27e6, 33e6)]
)
def test_presets_have_the_sizes_they_claim(name, vocabulary, low, high):
    with torch.device("meta"):
        model = RNNT(ConformerConfig.preset(name, vocabulary))
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high


def test_presets_of_every_architecture():
    assert set(PRESETS) >= {"small", "base", "conformer-tiny", "conformer-S", "conformer-M"}
    assert preset("conformer-S", 30) == ConformerConfig(30, **CONFORMER_PRESETS["S"])
    assert preset("small", 30, dropout=0.5).dropout == 0.5
    with pytest.raises(ValueError, match="preset is 'S'; allowed: tiny, small, base, bifocal, conformer-tiny"):
        preset("S", 30)
    with pytest.raises(ValueError, match="preset is 'small'; allowed: tiny, S, M"):
        ConformerConfig.preset("small", 30)


def test_config_round_trip_and_refusals():
    config = ConformerConfig.preset("tiny", 50, left=7)
    assert config_from_dict(config.to_dict()) == config
    for changes, message in [
        (dict(heads=5), "encoder_size is 144 with heads 5; a multiple of 10"),
        (dict(encoder_size=4), "encoder_size is 4 with heads 4; a multiple of 8"),
        (dict(chunk=0), "chunk is 0; a positive number"),
        (dict(kernel=1.5), "kernel is 1.5"),
        (dict(left=10**30), "at most 10,000 frames"),
    ]:
        with pytest.raises(ValueError, match=message):
            ConformerConfig(9, **(dict(encoder_size=144) | changes))
    with pytest.raises(ValueError, match="architecture is None; allowed: rnnt, conformer"):
        config_from_dict({"vocab_size": 9})


def test_is_made_of_plain_torch_layers():
    leaves = {type(module) for module in model_of().encoder.modules() if not list(module.children())}
    assert {nn.Conv2d, nn.Conv1d, nn.LayerNorm, nn.Linear, nn.Dropout} == {
        leaf for leaf in leaves if leaf.__module__.startswith("torch")
    }


@torch.no_grad()
def test_attention_is_as_defined():
    """Frame by frame, in float64: softmax of ((q + u) k + (q + v) r_d) / sqrt(size) over what is within reach."""
    encoder = model_of().encoder.double()
    attention, frames, left, chunk = encoder.blocks[0].attention, 11, SMALL["left"], SMALL["chunk"]
    x = torch.randn(1, frames, 16, dtype=torch.float64)
    state = encoder.blocks[0].initial_state(x)
    visible = encoder.context(frames, torch.zeros(1, dtype=torch.int64), None)
    found, _, _ = attention(x, state, encoder.context.distances(x), visible)
    normed = attention.norm(x[0])
    heads = (layer(normed).view(frames, 2, 8) for layer in (attention.query, attention.key, attention.value))
    query, key, value = heads
    rates = 10000 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    expected = torch.zeros(frames, 2, 8, dtype=torch.float64)
    for t in range(frames):
        start = t // chunk * chunk
        reach = range(max(0, start - left), min(frames, start + chunk))
        for head in range(2):
            scores = []
            for k in reach:
                angle = (t - k) * rates
                sinusoid = torch.stack([angle.sin(), angle.cos()], 1).flatten()
                distance = attention.distance(sinusoid).view(2, 8)[head]
                content = (query[t, head] + attention.key_bias[head, 0]) @ key[k, head]
                scores.append((content + (query[t, head] + attention.distance_bias[head, 0]) @ distance) / math.sqrt(8))
            weights = torch.stack(scores).softmax(0)
            expected[t, head] = sum(weight * value[k, head] for weight, k in zip(weights, reach, strict=True))
    torch.testing.assert_close(found[0], attention.output(expected.flatten(1)), rtol=0, atol=1e-5)


@torch.no_grad()
@settings(deadline=None, max_examples=25)
@given(frames=st.integers(4, 130), cuts=st.lists(st.integers(0, 10), max_size=4))
def test_a_stream_is_encoded_as_the_whole(frames, cuts):
    encoder = model_of().encoder
    features = torch.randn(2, frames, 10)
    whole, lengths = encoder(features, torch.full((2,), frames))
    assert whole.shape == (2, frames // 4, 16) and lengths.tolist() == [frames // 4] * 2
    torch.testing.assert_close(in_chunks(encoder, features, cuts), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_long_utterance_is_encoded_in_pieces():
    """As in one, which training takes it in."""
    encoder = model_of().encoder
    features, lengths = torch.randn(2, 90 * CHUNK + 7, 10), torch.tensor([90 * CHUNK + 7, 47 * CHUNK + 5])
    found, frames = encoder(features, lengths)
    expected, _ = encoder.train()(features, lengths)
    assert found.shape == expected.shape
    for row, count in enumerate(frames.tolist()):
        torch.testing.assert_close(found[row, :count], expected[row, :count], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_streams_of_different_ages_side_by_side():
    encoder = model_of().encoder
    features = torch.randn(3, 5 * CHUNK, 10)
    whole, _ = encoder(features, torch.full((3,), 5 * CHUNK))
    states = []
    for row, chunks in enumerate((0, 1, 3)):
        state = encoder.initial_state(features[:1])
        if chunks:
            state = encoder.stream(features[row : row + 1, : chunks * CHUNK], state)[1]
        states.append(state)
    joined = ConformerState.join(states)
    chunk = torch.stack([features[row, place * CHUNK : (place + 1) * CHUNK] for row, place in enumerate((0, 1, 3))])
    encoded, after = encoder.stream(chunk, joined)
    for row, place in enumerate((0, 1, 3)):
        expected = whole[row, 3 * place : 3 * (place + 1)]
        torch.testing.assert_close(encoded[row], expected, rtol=1e-4, atol=1e-5)
    again = ConformerState.join(after.split())
    for left, right in zip(again[:4], after[:4], strict=True):
        assert torch.equal(left, right)
    assert all(
        torch.equal(a, b) for x, y in zip(again.layers, after.layers, strict=True) for a, b in zip(x, y, strict=True)
    )


@torch.no_grad()
def test_frames_beyond_a_length_change_nothing_before_it():
    encoder = model_of().encoder
    features, lengths = torch.randn(2, 50, 10), torch.tensor([50, 22])
    encoded, frames = encoder(features, lengths)
    alone, _ = encoder(features[1:, :22], lengths[1:])
    assert frames.tolist() == [12, 5]
    torch.testing.assert_close(encoded[1, :5], alone[0], rtol=1e-4, atol=1e-5)
    features[1, 24:] = 1e3
    torch.testing.assert_close(encoder(features, lengths)[0][1, :5], encoded[1, :5], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_seen_ends_with_the_chunk():
    encoder = model_of().encoder
    features, lengths = torch.randn(1, 4 * CHUNK, 10), torch.tensor([4 * CHUNK])
    before, _ = encoder(features, lengths)
    later = features.clone()
    later[:, 2 * CHUNK - 1] += 1  # the last frame of the second chunk
    changed = (encoder(later, lengths)[0] - before).abs().amax(2)[0] > 1e-6
    assert not changed[:3].any() and changed[3:6].all()


@torch.no_grad()
def test_what_is_seen_begins_a_limited_number_of_frames_before():
    encoder = model_of(encoder_layers=1).encoder
    features, lengths = torch.randn(1, 8 * CHUNK, 10), torch.tensor([8 * CHUNK])
    before, _ = encoder(features, lengths)
    earlier = features.clone()
    earlier[:, 0] += 1  # which the strided convolutions let the first two encoder frames see
    changed = (encoder(earlier, lengths)[0] - before).abs().amax(2)[0] > 1e-6
    last = 1 + SMALL["left"] + SMALL["kernel"] - 1 + SMALL["chunk"]
    assert changed[: SMALL["chunk"]].all() and not changed[last + 1 :].any()


def test_every_parameter_learns():
    model = model_of()
    objective = TransducerObjective(model, ctc_weight=0.5)
    targets = torch.randint(1, 9, (2, 3))
    loss = objective(torch.randn(2, 48, 10), torch.tensor([48, 30]), targets, torch.tensor([3, 2]))
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_weight_has_a_width_of_its_own():
    model = model_of().train()
    gq.quantize_(model, {"encoder.blocks.0.*": gq.GQConfig(bits=2), "*": gq.GQConfig(bits=5)}, step="prepare")
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1 and "bias" not in name]
    widths = {row.name: row.bits for row in gq.report(model).rows}
    assert {name for name in matrices if "weight" in name and "centroid" not in name} <= set(widths)
    assert {bits for name, bits in widths.items() if name.startswith("encoder.blocks.0.") and bits < 16} == {2}
    features, lengths = torch.randn(2, 40, 10), torch.tensor([40, 31])
    labels = torch.ones(2, 2, dtype=torch.int64), torch.tensor([2, 1])
    TransducerObjective(model, ctc_weight=0.0)(features, lengths, *labels).backward()
    model.eval()
    with torch.no_grad():
        prepared, _ = model.encoder(features, lengths)
        gq.quantize_(model, step="convert")
        packed, _ = model.encoder(features, lengths)
        streamed = in_chunks(model.encoder, features, [1, 2])
    torch.testing.assert_close(packed, prepared, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(streamed[0], packed[0], rtol=1e-3, atol=1e-4)


def test_bad_features_are_named():
    encoder = model_of().encoder
    with pytest.raises(ValueError, match=r"features is \(1, 20, 5\); \(B, T, 10\) is needed"):
        encoder(torch.zeros(1, 20, 5), torch.tensor([20]))
    with pytest.raises(ValueError, match="features has 3 frames; at least 4 are needed"):
        encoder(torch.zeros(1, 3, 10), torch.tensor([3]))
