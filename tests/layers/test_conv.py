import pytest
import torch
from quantized import convert, prepare, same
from torch import nn

from gq_triton import functional as F

OPTIONS = [
    {},
    {"bias": False, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid", "groups": 2},
    {"groups": 6, "padding": "same", "dilation": 2},  # depthwise
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate", "groups": 3},
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_every_option(dims, options, batched):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    prepared, twin = prepare(kind(6, 12, 3, **options), bits=3)
    x = torch.randn(*[2] * batched, 6, *[8] * dims)
    same(prepared(x), twin(x))
    same(convert(prepared)(x), twin(x))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
def test_activations_are_quantized_over_the_channels(dims, batched):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    prepared, twin = prepare(kind(6, 4, 3), activations="int8")
    x = torch.randn(*[2] * batched, 6, *[5] * dims)
    channel = int(batched)
    expected = twin(F.quantize_activations(x.movedim(channel, -1), "int8").movedim(-1, channel))
    same(prepared(x), expected)
    same(convert(prepared)(x), expected)


def test_gradients_reach_weight_bias_and_input():
    prepared, _ = prepare(nn.Conv1d(6, 12, 3, groups=3), bits=2)
    x = torch.randn(2, 6, 9, requires_grad=True)
    prepared(x).square().sum().backward()
    for tensor in (x, *prepared.parameters()):
        assert tensor.grad.abs().sum() > 0
