import sys

import pytest
import torch
from torch import nn

import gq_triton as gq
from gq_triton.baselines import TorchaoConfig, TorchaoQuantizer


@pytest.fixture
def fake_quantizer():
    qat = pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")

    def of(bits):
        integers = {4: torch.int4, 8: torch.int8}[bits]
        return qat.IntxFakeQuantizer(qat.IntxFakeQuantizeConfig(integers, "per_channel", is_symmetric=True))

    return of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_gradients_and_deployment_are_torchaos(fake_quantizer, bits, dtype):
    weight = torch.randn(7, 33).to(dtype)
    weight[2] = 0
    layer = nn.Sequential(nn.Linear(33, 7).to(dtype))
    layer[0].weight.data.copy_(weight)
    gq.quantize_(layer, TorchaoConfig(bits=bits))
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    value, expected = layer[0].weight_quantizer(ours), fake_quantizer(bits)(theirs)
    assert torch.equal(value, expected)
    gradient = torch.randn(7, 33).to(dtype)
    value.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)
    packed = gq.quantize_(layer, step="convert")[0].weight_packed
    assert torch.equal(packed.decode(), expected)


def test_scales_are_those_of_the_weight_at_conversion(fake_quantizer):
    layer = gq.quantize_(nn.Sequential(nn.Linear(9, 4)), TorchaoConfig())
    with torch.no_grad():
        layer[0].weight.mul_(5.0)
    expected = fake_quantizer(4)(layer[0].weight).detach()
    assert torch.equal(gq.quantize_(layer, step="convert")[0].weight_packed.decode(), expected)


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.Conv1d(3, 4, 2), nn.Embedding(5, 4), nn.Linear(1, 4)])
def test_other_layers_are_refused(layer):
    with pytest.raises(ValueError, match="torchao fake-quantizes linear layers of two and more inputs only"):
        gq.quantize_(nn.ModuleList([layer]), TorchaoConfig())
    assert gq.quantize_(nn.ModuleList([layer, nn.Linear(3, 3)]), {"0": None, "*": gq.GQConfig()})


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gq-triton\[bench\]'"):
        TorchaoQuantizer(TorchaoConfig(), 3)
