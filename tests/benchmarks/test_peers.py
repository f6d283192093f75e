import sys

import peers
import pytest
import torch
from harness import Unavailable
from hypothesis import given
from hypothesis import strategies as st


@given(bits=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_uniform_levels(bits, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(4, 50, generator=draw, dtype=torch.float64)
    step = torch.rand(4, generator=draw, dtype=torch.float64) + 0.1
    units = peers.uniform(weight, step, bits=bits) / step[:, None]
    torch.testing.assert_close(units - 0.5, (units - 0.5).round())
    assert units.min() >= -(2 ** (bits - 1)) + 0.5 - 1e-9
    assert units.max() <= 2 ** (bits - 1) - 0.5 + 1e-9
    error = (weight / step[:, None] - units).abs()
    within = (weight / step[:, None]).abs() <= 2 ** (bits - 1)
    assert (error[within] <= 0.5 + 1e-9).all()


def test_uniform_passes_the_gradient_straight_through_where_nothing_is_clamped():
    weight = torch.tensor([[-3.0, -1.9, 0.2, 1.7, 2.5]], requires_grad=True)
    peers.uniform(weight, torch.ones(1), bits=2).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]


def test_lsq_is_that_of_the_paper():
    weight = torch.tensor([[-5.0, -1.2, 0.3, 0.8, 9.0]], dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    out = peers.lsq(weight, step, bits=3)  # integers -4..3
    assert out.tolist() == [[-2.0, -1.0, 0.5, 1.0, 1.5]]
    grad = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    out.backward(grad)
    assert weight.grad.tolist() == [[0, 2, 3, 4, 0]]
    # equation 3: round(w/s) - w/s inside, the limit outside; scaled as in section 2.2
    slopes = torch.tensor([[-4, -2 + 2.4, 1 - 0.6, 2 - 1.6, 3]], dtype=torch.float64)
    torch.testing.assert_close(step.grad, (grad * slopes).sum(1) / (5 * 3) ** 0.5)


def test_plain_form_is_differentiable_in_all_its_inputs():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = (1.1 * weight.detach().abs().amax(1)).requires_grad_()
    centroids = torch.tensor([-1.0, -0.3, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    mu, hardness = torch.tensor(8.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    torch.autograd.gradcheck(lambda *x: peers.plain(*x, mu=mu, hardness=hardness), [weight, scale, centroids])


@pytest.mark.parametrize("peer", [lambda: peers.lsq(torch.ones(1, 1), torch.ones(1), bits=1), lambda: peers.torchao(1)])
def test_peers_without_a_1_bit_form_say_so(peer):
    with pytest.raises(Unavailable, match="1"):
        peer()


def test_torchao_that_is_not_installed_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(Unavailable, match="torchao does not import"):
        peers.torchao(4)


def test_torchao_quantizes_linear_layers_only():
    pytest.importorskip("torchao")
    model = torch.nn.ModuleList([torch.nn.Linear(8, 4), torch.nn.LSTM(8, 4), torch.nn.Linear(4, 2)])
    assert peers.prepare_torchao(model, 4, leave="2") == 8 * 4
    assert [type(layer).__name__ for layer in model] == ["FakeQuantizedLinear", "LSTM", "Linear"]
    assert 8 < len(model[0].weight_fake_quantizer(torch.linspace(-1, 1, 1000)[None]).unique()) <= 16
