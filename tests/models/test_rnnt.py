"""The reference RNN transducer: sizes, streaming, padding, and that it learns."""

import pytest
import torch
from torch import nn

from gq_triton.kernels.joint_loss import joint_rnnt_loss
from gq_triton.models import RNNT, RNNT_PRESETS, RNNTConfig
from gq_triton.models.rnnt import EncoderState

SMALL = dict(
    features=6,
    stack=3,
    encoder_layers=3,
    encoder_hidden=10,
    predictor_embedding=5,
    predictor_hidden=7,
    joint=8,
    dropout=0.0,
)


def model_of(**changes):
    torch.manual_seed(0)
    return RNNT(RNNTConfig(vocab_size=9, **(SMALL | changes))).eval()


@pytest.mark.parametrize(
    "preset, vocabulary, low, high",
    [("tiny", 40, 1e5, 6e5), ("small", 100, 1e6, 3.2e6), ("base", 2500, 55e6, 65e6), ("bifocal", 2500, 55e6, 65e6)],
)
def test_presets_have_the_sizes_they_claim(preset, vocabulary, low, high):
    with torch.device("meta"):
        model = RNNT(RNNTConfig.preset(preset, vocabulary))
    assert low <= sum(parameter.numel() for parameter in model.parameters()) <= high


def test_is_made_of_plain_torch_layers():
    leaves = {type(module) for module in model_of().modules() if not list(module.children())}
    assert leaves == {nn.LSTM, nn.LayerNorm, nn.Linear, nn.Embedding, nn.Dropout}


@pytest.mark.parametrize("changes", [{}, dict(reduce_after=2), dict(reduce_after=0), dict(encoder_projection=4)])
def test_lattice_shapes(changes):
    model = model_of(**changes)
    features, lengths = torch.randn(2, 25, 6), torch.tensor([25, 13])
    lattice = model(features, lengths, torch.ones(2, 4, dtype=torch.long))
    frames = 25 // model.config.subsampling
    assert lattice.frames.shape == (2, frames, 8) and lattice.positions.shape == (2, 5, 8)
    assert lattice.lengths.tolist() == [frames, 13 // model.config.subsampling]
    assert lattice.encoded.shape == (2, frames, model.encoder.output_size)


def test_the_joint_is_its_projections_combined():
    model = model_of()
    features, lengths, targets = torch.randn(2, 25, 6), torch.tensor([25, 13]), torch.randint(1, 9, (2, 4))
    lattice = model(features, lengths, targets)
    encoded, _ = model.encoder(features, lengths)
    predicted, _ = model.predictor(torch.cat([torch.zeros(2, 1, dtype=torch.long), targets], 1))
    assert torch.equal(lattice.encoded, encoded)
    for t, u in [(0, 0), (3, 4)]:
        expected = model.joint(encoded[:, t], predicted[:, u])
        assert expected.shape == (2, 9)
        torch.testing.assert_close(model.joint.combine(lattice.frames[:, t], lattice.positions[:, u]), expected)


@pytest.mark.parametrize("changes", [{}, dict(reduce_after=2), dict(reduce_after=0), dict(encoder_projection=4)])
@pytest.mark.parametrize("chunk", [1, 2, 5, 7, 40])
def test_streaming_equals_the_whole_utterance(changes, chunk):
    encoder = model_of(**changes).encoder
    features = torch.randn(2, 40, 6)
    whole, _ = encoder(features, torch.tensor([40, 40]))
    state, parts = encoder.initial_state(features), []
    for part in features.split(chunk, 1):
        encoded, state = encoder.stream(part, state)
        parts.append(encoded)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, dict(encoder_projection=4)])
def test_states_of_streams_are_joined_and_split(changes):
    encoder = model_of(**changes).encoder
    chunk = encoder.subsampling * 2
    features = torch.randn(3, 3 * chunk, 6)
    whole, _ = encoder(features, torch.tensor([3 * chunk] * 3))
    states = [encoder.initial_state(features[:1]) for _ in range(3)]
    _, states[1] = encoder.stream(features[1:2, :chunk], states[1])  # one is ahead of the others
    joined = EncoderState.join(states)
    encoded, joined = encoder.stream(
        torch.stack([features[0, :chunk], features[1, chunk : 2 * chunk], features[2, :chunk]]), joined
    )
    for row, state in enumerate(joined.split()):
        ahead = 1 if row == 1 else 0
        last, _ = encoder.stream(features[row : row + 1, (1 + ahead) * chunk :], state)
        found = torch.cat([encoded[row : row + 1], last], 1)
        torch.testing.assert_close(found, whole[row : row + 1, 2 * ahead :], rtol=1e-5, atol=1e-6)


def test_padding_and_the_future_do_not_reach_back():
    encoder = model_of().encoder
    features = torch.randn(1, 24, 6)
    changed = features.clone()
    changed[:, 12:] = 100.0
    before, after = (encoder(x, torch.tensor([24]))[0] for x in (features, changed))
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:], after[:, 2:])


def test_predictor_continues_from_its_state():
    predictor = model_of(predictor_layers=2).predictor
    labels = torch.tensor([[0, 3, 4, 8, 1]])
    whole, _ = predictor(labels)
    first, state = predictor(labels[:, :2])
    second, _ = predictor(labels[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_every_parameter_gets_a_gradient():
    model = model_of().train()
    lattice = model(torch.randn(2, 24, 6), torch.tensor([24, 18]), torch.randint(1, 9, (2, 3)))
    output = model.joint.output
    labels = torch.ones(2, 3, dtype=torch.long), lattice.lengths, torch.tensor([3, 2])
    joint_rnnt_loss(lattice.frames, lattice.positions, output.weight, output.bias, *labels).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_config_round_trip_and_refusals():
    config = RNNTConfig.preset("small", 50, dropout=0.5)
    assert RNNTConfig.from_dict(config.to_dict()) == config
    assert config.dropout == 0.5 and set(RNNT_PRESETS) == {"tiny", "small", "base", "bifocal"}
    for changes, message in [
        (dict(vocab_size=1), "vocab_size is 1"),
        (dict(encoder_layers=0), "encoder_layers is 0"),
        (dict(reduce_after=3), "reduce_after is 3; allowed: 0..2"),
        (dict(encoder_hidden=8, encoder_projection=8), "encoder_projection is 8; allowed: 0..7"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(joint=-1), "joint is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            RNNTConfig(**(dict(vocab_size=9) | changes))
    with pytest.raises(ValueError, match="preset is 'large'; allowed: tiny, small, base, bifocal"):
        RNNTConfig.preset("large", 9)
    with pytest.raises(ValueError, match="no field attention"):
        RNNTConfig.from_dict(dict(architecture="rnnt", vocab_size=9, attention=1))
    with pytest.raises(ValueError, match="architecture is 'conformer'; 'rnnt' is needed"):
        RNNTConfig.from_dict(dict(architecture="conformer", vocab_size=9))


def test_bad_features_are_named():
    model = model_of()
    with pytest.raises(ValueError, match=r"features is \(1, 20, 5\)"):
        model.encoder(torch.zeros(1, 20, 5), torch.tensor([20]))
    with pytest.raises(ValueError, match="features has 5 frames; at least 6"):
        model.encoder(torch.zeros(1, 5, 6), torch.tensor([5]))
