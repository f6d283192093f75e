"""Other low-bit layers; what only runs on a GPU is tested in its parts."""

import sys

import linear_peers
import pytest
import torch
from harness import Unavailable

BF16, FP32 = torch.bfloat16, torch.float32


def relative_error(layer, weight, x):
    expected = x.double() @ weight.double().t()
    return ((layer.forward(layer.prepare(x)).double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    "peer, dtype, bits, limits",
    [
        (linear_peers.torch_int8, FP32, 8 + 32 / 128, (0.005, 0.03)),
        (linear_peers.torch_int4, BF16, 4 + 32 / 64, (0.05, 0.11)),
    ],
)
@pytest.mark.parametrize("tokens", [1, 20])
def test_layers_on_a_cpu_err_by_their_rounding(peer, dtype, bits, limits, tokens):
    weight = torch.randn(64, 128)
    layer = peer(weight, dtype)
    assert limits[0] < relative_error(layer, weight, torch.randn(tokens, 128).to(dtype)) < limits[1]
    assert layer.weight_bytes == weight.numel() * bits / 8


def test_nf4_errs_by_its_rounding():
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 128)
    layer = linear_peers.nf4(weight, FP32)
    assert 0.05 < relative_error(layer, weight, torch.randn(5, 128)) < 0.12
    assert layer.weight_bytes == weight.numel() * (4 + 32 / 64) / 8


def test_int8_rows():
    x = torch.randn(5, 30)
    units, scale = linear_peers._int8(x)
    assert units.dtype == torch.int8
    assert units.abs().amax(1).tolist() == [127] * 5
    assert ((units * scale - x).abs() <= scale / 2 + 1e-6).all()


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
def test_int8_products_of_few_tokens_are_padded(tokens):
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randint(-127, 128, (rows, 32), generator=draw, dtype=torch.int8) for rows in (tokens, 24))
    assert torch.equal(linear_peers._int8_product(one, other), one.int() @ other.int().t())


def test_int4_groups():
    weight = torch.randn(6, 256)
    codes, scale, low = linear_peers._int4(weight, 64)
    assert codes.dtype == torch.uint8
    assert (codes.min(), codes.max()) == (0, 15)
    restored = low.repeat_interleave(64, 1) + codes * scale.repeat_interleave(64, 1)
    assert ((restored - weight).abs() <= scale.repeat_interleave(64, 1) / 2 + 1e-5).all()


@pytest.mark.parametrize(
    "peer, dtype, shape, reason",
    [
        (linear_peers.torch_int8, BF16, (8, 64), "takes float32"),
        (linear_peers.torch_int8_product, FP32, (8, 64), "one operation"),
        (linear_peers.torch_int4, FP32, (8, 64), "made for bfloat16"),
        (linear_peers.torch_int4, BF16, (16, 144), "whole groups of 64, and there are 144"),
        (linear_peers.gemlite_int4, BF16, (4096, 4096), "runs on a GPU"),
    ],
)
def test_what_cannot_run_says_why(peer, dtype, shape, reason):
    with pytest.raises(Unavailable, match=reason):
        peer(torch.empty(shape), dtype)


def test_bitsandbytes_that_is_not_installed_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(Unavailable, match="bitsandbytes does not import"):
        linear_peers.nf4(torch.ones(2, 64), FP32)
