"""Weight normalization, in torch's two ways, is folded into the weights that are quantized."""

import copy

import pytest
import torch
from quantized import prepare, same
from torch import nn
from torch.nn.utils import parametrizations

import gq_triton as gq
from gq_triton.layers import weight_norm

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # that the older one is deprecated

NORMS = [parametrizations.weight_norm, nn.utils.weight_norm]


def stretched(norm, layer, name="weight", dim=0):
    """A layer with random g: not the one that follows from the weight."""
    norm(layer, name, dim=dim)
    with torch.no_grad():
        for part in weight_norm.parts(layer, name).values():
            part.mul_(1 + torch.rand_like(part))
    return layer


class Model(nn.Module):
    """As in wav2vec 2.0: a positional convolution, normed over its taps, before other layers."""

    def __init__(self, norm):
        super().__init__()
        self.positions = stretched(norm, nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.positions(x).mT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "layer, name, dim, shape",
    [
        (lambda: nn.Linear(5, 3), "weight", 0, (2, 5)),
        (lambda: nn.Linear(5, 3), "weight", None, (2, 5)),
        (lambda: nn.Conv1d(6, 4, 3, groups=2), "weight", 2, (2, 6, 7)),
        (lambda: nn.Conv2d(2, 4, 3), "weight", 1, (1, 2, 5, 4)),
        (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", 0, None),
    ],
)
def test_folding_keeps_the_weight(norm, layer, name, dim, shape):
    layer, plain = (stretched(norm, seeded(layer), name, dim) for _ in range(2))
    weight_norm.fold(plain, [name])
    assert isinstance(plain.get_parameter(name), nn.Parameter)
    assert type(plain) is nn.utils.parametrize.type_before_parametrizations(layer)
    assert torch.equal(getattr(plain, name), weight_norm.value(layer, name))
    assert not weight_norm.parts(plain, name) and weight_norm.value(plain, name) is None
    if shape is not None:
        x = torch.randn(shape)
        same(plain(x), layer(x))


def seeded(build):
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("norm", NORMS)
def test_prepared_models_compute_with_the_normed_weight(norm):
    model, plain = (seeded(lambda: Model(norm)) for _ in range(2))
    x = torch.randn(2, 8, 9)
    before = model(x)
    weight_norm.fold(plain.positions, ["weight"])
    _, twin = prepare(plain, bits=3)
    gq.quantize_(model, gq.GQConfig(bits=3))
    same(model(x), twin(x))
    assert not torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert model.positions.weight.grad.any()
    assert all("parametrizations" not in name and "_g" not in name for name in model.state_dict())
    expected = model.eval()(x)
    same(gq.quantize_(model, step="convert")(x), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("learned", [True, False])
def test_frozen_weights_stay_frozen(norm, learned):
    model = Model(norm)
    model.positions.requires_grad_(learned)
    with torch.no_grad():
        gq.quantize_(model, gq.GQConfig())
    assert "positions.weight" in model.state_dict()
    assert all(parameter.requires_grad == learned for parameter in model.positions.parameters())


def test_copies_stay_weight_normed():
    model = Model(parametrizations.weight_norm)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 8, 9)
    expected = model(x)
    gq.quantize_(twin, gq.GQConfig())
    assert torch.equal(model(x), expected)
    assert "positions.parametrizations.weight.original0" in model.state_dict()


def test_values_that_were_loaded_since_the_last_call():
    model, trained = (Model(nn.utils.weight_norm) for _ in range(2))
    model.load_state_dict(trained.state_dict())
    for each in (model, trained):
        gq.quantize_(each, gq.GQConfig())
    assert torch.equal(model.positions.weight, trained.positions.weight)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("config", [{"*": gq.GQConfig()}, {"positions": None, "*": gq.GQConfig()}])
def test_packed_files_load_into_weight_normed_models(norm, config, tmp_path):
    model = gq.quantize_(gq.quantize_(Model(norm), config), step="convert").eval()
    gq.save_packed(model, tmp_path / "model.safetensors")
    x = torch.randn(2, 8, 9)
    for skeleton in map(Model, NORMS if len(config) == 1 else [norm]):
        assert torch.equal(gq.load_packed(skeleton.eval(), tmp_path / "model.safetensors")(x), model(x))


def test_skeletons_that_a_file_does_not_fit_stay_weight_normed(tmp_path):
    model = Model(parametrizations.weight_norm)
    gq.quantize_(gq.quantize_(model, gq.GQConfig()), step="convert")
    model.extra = nn.Linear(1, 1)
    gq.save_packed(model, tmp_path / "model.safetensors")
    skeleton = Model(parametrizations.weight_norm)
    names = list(skeleton.state_dict())
    with pytest.raises(gq.PackedFileError, match="tensors that the model has not"):
        gq.load_packed(skeleton, tmp_path / "model.safetensors")
    assert list(skeleton.state_dict()) == names


def test_a_recurrent_layer_of_which_one_weight_is_quantized(tmp_path):
    def build():
        torch.manual_seed(1)
        lstm = stretched(parametrizations.weight_norm, nn.LSTM(4, 3), "weight_hh_l0")
        return nn.ModuleDict({"lstm": stretched(parametrizations.weight_norm, lstm, "weight_ih_l0")})

    x = torch.randn(5, 2, 4)
    for config in ({"*_ih_*": gq.GQConfig(bits=8)}, {"*": gq.GQConfig(bits=8)}):
        model = build()
        expected = model["lstm"](x)[0]
        gq.quantize_(model, config)
        assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0"} < set(dict(model.named_parameters()))
        output = model["lstm"](x)[0]
        same(output, expected, atol=0.02)
        same(gq.quantize_(model, step="convert")["lstm"](x)[0], output)
        gq.save_packed(model, tmp_path / "model.safetensors")
        loaded = gq.load_packed(build(), tmp_path / "model.safetensors")
        assert torch.equal(loaded["lstm"](x)[0], model["lstm"](x)[0])


def test_a_model_that_is_refused_stays_weight_normed():
    model = Model(parametrizations.weight_norm)
    parametrizations.orthogonal(model.head)
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=r"^head\.weight cannot be quantized: its layer is parametrized"):
        gq.quantize_(model, gq.GQConfig())
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("more", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_weight_normalization_with_something_else(more):
    layer = more(parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="its layer is parametrized"):
        gq.quantize_(layer, gq.GQConfig())


def test_normalization_of_a_bias_is_no_business_of_ours():
    layer = parametrizations.weight_norm(nn.Linear(3, 3), "bias")
    with pytest.raises(ValueError, match="its layer is parametrized"):
        gq.quantize_(layer, gq.GQConfig())


def test_weights_that_share_their_parts():
    model = nn.ModuleList([parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(2)])
    model[1].parametrizations.weight.original1 = model[0].parametrizations.weight.original1
    with pytest.raises(ValueError, match=r"0\.weight is shared with 1\.parametrizations\.weight\.original1"):
        gq.quantize_(model, gq.GQConfig())


def test_normalization_after_preparing_is_folded_when_converted():
    model = gq.quantize_(nn.Sequential(nn.Linear(4, 3)), gq.GQConfig()).eval()
    parametrizations.weight_norm(model[0])
    x = torch.randn(2, 4)
    expected = model(x)
    same(gq.quantize_(model, step="convert")(x), expected)


def test_other_parametrizations_after_preparing_cannot_be_packed():
    model = gq.quantize_(nn.Sequential(nn.Linear(3, 3)), gq.GQConfig())
    parametrizations.orthogonal(model[0])
    with pytest.raises(ValueError, match=r"^0 cannot be packed: it is parametrized"):
        gq.quantize_(model, step="convert")
