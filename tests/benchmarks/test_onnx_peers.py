"""onnxruntime's layers."""

import sys

import onnx_peers
import pytest
import torch
from harness import Unavailable


@pytest.fixture
def installed():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")


def relative_error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


def run(layer, count, x):
    return [out for call in layer.copies(count, threads=1) for out in call(x)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "layer, bits, limits",
    [
        (onnx_peers.int8, 8 + 32 / 240, (0.001, 0.03)),
        (lambda weight: onnx_peers.nbits(weight, 8), (8 * 256 + 2 * 32) / 240, (0.001, 0.03)),
        (lambda weight: onnx_peers.nbits(weight, 4), (4 * 256 + 2 * 32) / 240, (0.03, 0.15)),
        (lambda weight: onnx_peers.nbits(weight, 2), (2 * 256 + 2 * 32) / 240, (0.15, 0.6)),
    ],
    ids=["int8", "8 bits", "4 bits", "2 bits"],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_linear_layers_err_by_their_rounding(layer, bits, limits, tokens):
    weight, x = torch.randn(50, 240), torch.randn(tokens, 240)
    made = layer(weight)
    (out,) = run(made, 1, x)
    assert limits[0] < relative_error(out, x @ weight.t()) < limits[1]
    assert made.weight_bytes == pytest.approx(weight.numel() * bits / 8)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("steps", [1, 7])
def test_the_lstm_errs_by_its_rounding(steps):
    lstm, x = torch.nn.LSTM(40, 24), torch.randn(steps, 1, 40)
    layer = onnx_peers.lstm_int8(lstm)
    (out,) = run(layer, 1, x)
    assert out.shape == (steps, 1, 1, 24)
    assert relative_error(out.view(steps, 1, 24), lstm(x)[0]) < 0.03
    assert layer.weight_bytes == 4 * 24 * (40 + 24) + 2 * 4 * 4 * 24


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("count", [1, onnx_peers.NODES, onnx_peers.NODES + 3])
def test_all_copies_run(count):
    outputs = run(onnx_peers.int8(torch.eye(8)), count, torch.ones(2, 8))
    assert len(outputs) == count
    for out in outputs:
        torch.testing.assert_close(out, torch.ones(2, 8), atol=0.15, rtol=0)


@pytest.mark.usefixtures("installed")
def test_no_copy_has_the_weights_of_another():
    lstm = onnx_peers.lstm_int8(torch.nn.LSTM(40, 24))
    for layer, x in (
        (onnx_peers.int8(torch.randn(50, 240)), torch.randn(1, 240)),
        (onnx_peers.nbits(torch.randn(50, 240), 4), torch.randn(1, 240)),
        (lstm, torch.randn(1, 1, 40)),
    ):
        outputs = run(layer, 3, x)
        assert len({tuple(out.flatten().tolist()) for out in outputs}) == 3


@pytest.mark.usefixtures("installed")
def test_a_weight_of_zeros_is_no_failure():
    for layer in (onnx_peers.int8(torch.zeros(8, 32)), onnx_peers.nbits(torch.zeros(8, 32), 4)):
        (out,) = run(layer, 1, torch.ones(1, 32))
        assert not out.any()


@pytest.mark.parametrize("package", ["onnxruntime", "onnx"])
def test_what_is_not_installed_is_unavailable(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match="onnx(runtime)? does not import"):
        onnx_peers.int8(torch.ones(4, 32)).copies(1, threads=1)
