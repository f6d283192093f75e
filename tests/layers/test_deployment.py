"""What is deployed is what was trained: every layer, width, codebook and activation dtype."""

import pytest
import torch
from quantized import convert, hard_weights, packed_weights, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton import layers
from gq_triton.layers import PackedLayer

LAYERS = {
    "Linear": (lambda: nn.Linear(13, 7), lambda: (torch.randn(3, 13),)),
    "Embedding": (lambda: nn.Embedding(11, 5), lambda: (torch.randint(11, (2, 3)),)),
    "Conv1d": (lambda: nn.Conv1d(6, 9, 3, groups=3), lambda: (torch.randn(2, 6, 8),)),
    "Conv2d": (lambda: nn.Conv2d(3, 5, (3, 2)), lambda: (torch.randn(2, 3, 6, 5),)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(12, 3), lambda: (torch.randn(4, 2, 12),) * 3),
    "LSTM": (lambda: nn.LSTM(5, 6, 2), lambda: (torch.randn(4, 2, 5),)),
    "GRU": (lambda: nn.GRU(5, 6, bidirectional=True), lambda: (torch.randn(4, 2, 5),)),
}


def output(model, inputs):
    result = model(*inputs)
    return result[0] if isinstance(result, tuple) else result


def split_in_three(weights):
    """Attention's in_proj_weight is packed as query, key and value parts."""
    whole = weights.pop("in_proj_weight", None)
    if whole is not None:
        weights.update(zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), whole.chunk(3), strict=True))
    return weights


@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_layers_equal_prepared_ones(kind, bits, codebook, activations, device):
    make, inputs = LAYERS[kind]
    inputs = tuple(x.to(device) for x in inputs())
    config = gq.GQConfig(bits=bits, mu=5.0, codebook=codebook, activations=activations)
    prepared = gq.quantize_(make().to(device).eval(), config)
    packed = convert(prepared)
    assert type(prepared) is getattr(layers, f"QAT{kind}")
    assert type(packed) is getattr(layers, f"Packed{kind}")
    assert isinstance(prepared, getattr(nn, kind))

    expected, actual = split_in_three(hard_weights(prepared)), packed_weights(packed)
    assert expected.keys() == actual.keys()
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name
    with torch.no_grad():
        # A quantized activation may round the other way where the sums before it were taken in another order; training
        # does not see that hidden states are quantized.
        steps = {"MultiheadAttention": 1e-2, "LSTM": 4e-2, "GRU": 4e-2} if activations else {}
        same(output(packed, inputs), output(prepared, inputs), atol=2e-6 + steps.get(kind, 0.0))


@pytest.mark.parametrize("kind", LAYERS)
def test_no_float_weight_is_left(kind):
    make, _ = LAYERS[kind]
    layer = make()
    names = set(hard_weights(prepare(layer)[0]))
    packed = gq.quantize_(layer, step="convert")
    assert names.isdisjoint(dict(packed.named_parameters()))
    assert names.isdisjoint(vars(packed))
    floats = [t for t in packed.state_dict().values() if t.is_floating_point() and t.dim() > 1]
    assert not floats
    for module in packed.modules():
        held = [t for value in vars(module).values() if isinstance(value, list) for t in value]
        assert not any(isinstance(t, torch.Tensor) and t.dim() > 1 for t in held)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_weights_are_decoded_where_they_are_read(kind):
    layer = prepare(LAYERS[kind][0]())[0]
    expected, packed = hard_weights(layer), convert(layer)
    for name in {"weight", "in_proj_weight", "q_proj_weight"} & set(expected):
        same(getattr(packed, name), expected[name])
    for name in (name for name in expected if name.startswith(("weight_ih", "weight_hh", "weight_hr"))):
        assert not hasattr(packed, name)
        with pytest.raises(AttributeError, match=rf"{name} is packed and cannot be read: decode {name}_packed"):
            getattr(packed, name)
    with pytest.raises(AttributeError, match="nothing"):
        _ = packed.nothing


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("kind", LAYERS)
def test_granularity(kind, granularity):
    make, inputs = LAYERS[kind]
    prepared, twin = prepare(make().eval(), granularity=granularity)
    x = inputs()
    same(output(prepared, x), output(twin, x))
    same(output(convert(prepared), x), output(twin, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_low_precision_models(kind, dtype):
    make, inputs = LAYERS[kind]
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs())
    prepared, twin = prepare(make().to(dtype).eval(), codebook="int8")
    packed = convert(prepared)
    expected = output(twin, inputs)
    assert output(prepared, inputs).dtype == output(packed, inputs).dtype == dtype
    same(output(prepared, inputs), expected, atol=2e-2, rtol=2e-2)
    same(output(packed, inputs), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_casting_a_packed_model_changes_its_dtype_but_not_its_codes(kind, codebook):
    make, inputs = LAYERS[kind]
    packed = convert(prepare(make().eval(), codebook=codebook)[0])
    before = {name: (t.clone(), t.dtype) for name, t in packed.state_dict().items() if "_packed." in name}
    inputs = inputs()
    expected = output(packed, inputs)
    packed.bfloat16()
    for name, (tensor, dtype) in before.items():
        assert packed.state_dict()[name].dtype == dtype
        assert torch.equal(packed.state_dict()[name].float(), tensor.float())
    result = output(packed, tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs))
    assert result.dtype == torch.bfloat16
    same(result.float(), expected, atol=3e-2, rtol=3e-2)
    same(output(packed.float(), inputs), expected, atol=3e-2, rtol=3e-2)  # biases went through bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dicts_round_trip(kind):
    make, inputs = LAYERS[kind]
    inputs = inputs()
    first, second = prepare(make().eval())[0], prepare(make().eval())[0]
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(output(first, inputs), output(second, inputs))
    first, second = convert(first), convert(prepare(make().eval())[0])
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(output(first, inputs), output(second, inputs))


@pytest.mark.parametrize("kind", LAYERS)
def test_every_parameter_gets_a_gradient(kind):
    make, inputs = LAYERS[kind]
    prepared, _ = prepare(make(), learn_mu=True, activations="int8")
    result = output(prepared, inputs())
    (result * torch.randn_like(result)).sum().backward()
    for name, parameter in prepared.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_float64_models_train_but_are_not_packed():
    prepared, twin = prepare(nn.Linear(5, 3).double())
    x = torch.randn(2, 5, dtype=torch.float64)
    same(prepared(x), twin(x))
    with pytest.raises(ValueError, match=r"^weight cannot be packed: weight is torch.float64"):
        gq.quantize_(prepared, step="convert")
    assert not isinstance(prepared, PackedLayer)
