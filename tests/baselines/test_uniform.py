import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gq_triton as gq
from gq_triton.baselines import KMeansQuantizer, UniformConfig, UniformQuantizer

WIDTHS = range(1, 9)


def fitted(weight, bits, **options):
    quantizer = UniformQuantizer(UniformConfig(bits=bits, **options), len(weight))
    quantizer.fit(weight)
    return quantizer


def reference(weight, scale, bits):
    """The nearest of 2^bits evenly spaced values from -scale to scale, in float64."""
    levels = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    column = scale.double().view(-1, *[1] * (weight.dim() - 1))
    nearest = (weight.double() / column).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return column * levels[nearest]


def squared_error(quantizer, weight):
    return float((quantizer(weight).detach() - weight).double().square().sum())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(5, 40), (3, 1), (1, 7), (4, 3, 2, 2)])
def test_values_are_the_nearest_of_a_uniform_grid(bits, shape):
    weight = torch.randn(shape)
    quantizer = fitted(weight, bits)
    expected = reference(weight, quantizer.scale(), bits)
    torch.testing.assert_close(quantizer(weight).detach(), expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_other_scale_is_better(bits):
    weight = torch.distributions.StudentT(5.0).sample((4, 300))
    quantizer = fitted(weight, bits)
    scale, error = quantizer.scales.clone(), squared_error(quantizer, weight)
    for factor in torch.logspace(-1, 1, 41).tolist():
        quantizer.scales.copy_(factor * scale)
        assert squared_error(quantizer, weight) > 0.97 * error


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    weight = torch.randn(3, 50)
    torch.testing.assert_close(fitted(weight, 1)(weight), weight.sign() * weight.abs().mean(1, keepdim=True))


def test_eight_bits_of_an_int8_codebook_are_the_integers():
    levels = fitted(torch.randn(2, 9), 8, codebook="int8").levels
    torch.testing.assert_close(levels.mul(127).unique(), torch.arange(-127.0, 128.0))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_is_the_identity_beyond_the_outer_levels_too(bits):
    weight = (3 * torch.randn(4, 9)).requires_grad_()
    quantizer = fitted(torch.randn(4, 9), bits)
    gradient = torch.randn(4, 9)
    quantizer(weight).backward(gradient)
    assert torch.equal(weight.grad, gradient)


@given(st.integers(1, 8), st.integers(0, 2**31), st.floats(0.0, 2.0))
@settings(deadline=None, max_examples=40)
def test_scales_follow_the_weights_by_least_squares(bits, seed, change):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 60, generator=draw)
    quantizer = fitted(weight, bits)
    moved = weight + change * torch.randn(4, 60, generator=draw)
    scale = quantizer.scales.double()
    levels = reference(moved, quantizer.scales, bits) / scale[:, None]
    before = squared_error(quantizer, moved)
    quantizer.update(moved, 1)
    expected = (moved.double() * levels).sum(1) / levels.square().sum(1)
    torch.testing.assert_close(quantizer.scales.double(), expected, rtol=1e-5, atol=1e-7)
    assert squared_error(quantizer, moved) <= before * (1 + 1e-5)


def test_weights_that_fsdp_has_sharded_are_refused():
    layer = gq.quantize_(nn.Linear(3, 4), UniformConfig())
    layer.weight.full_tensor = layer.weight.clone  # as a DTensor has
    with pytest.raises(ValueError, match="'uniform' works on whole weights; use DDP"):
        gq.Annealer(layer, 10)


@pytest.mark.parametrize("kind", [UniformQuantizer, KMeansQuantizer])
def test_a_scale_that_would_not_be_positive_stays(kind):
    quantizer = kind(UniformConfig(bits=1), 3)
    quantizer.levels.copy_(torch.tensor([-0.1, 1.0]))  # the first row's weights are nearest to the negative level
    quantizer.scales.copy_(torch.tensor([1.0, 1.0, 0.0]))
    quantizer.update(torch.tensor([[0.4, 0.3, 0.2], [0.8, 0.9, 1.0], [0.0, 0.0, 0.0]]), 1)
    torch.testing.assert_close(quantizer.scales, torch.tensor([1.0, 0.9, 0.0]))


def draw(kind, draws):
    if kind == "uniform":
        return 2 * torch.rand(16, 512, generator=draws) - 1
    normal = torch.randn(5, 16, 512, generator=draws)
    return normal[0] if kind == "gaussian" else normal[0] / normal[1:].square().mean(0).sqrt()  # Student's t of 4


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("kind", ["uniform", "gaussian", "student"])
def test_the_general_quantizer_is_fitted_as_well_on_the_same_grid(kind, bits):
    weight = draw(kind, torch.Generator().manual_seed(bits))
    general = gq.WeightQuantizer(gq.GQConfig(bits=bits, mu=0.0), len(weight)).eval()
    general.fit(weight)
    # Its scale is stored as a logarithm, which rounds it.
    assert squared_error(general, weight) <= 1.001 * squared_error(fitted(weight, bits), weight)
