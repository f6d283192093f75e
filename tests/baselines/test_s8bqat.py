import math

import pytest
import torch
from torch import nn

import gq_triton as gq
from gq_triton.baselines import KMeansConfig, KMeansQuantizer, S8BQATConfig, S8BQATQuantizer

WIDTHS = range(1, 9)


def fitted(weight, bits=4, **options):
    quantizer = S8BQATQuantizer(S8BQATConfig(bits=bits, **options), len(weight))
    quantizer.fit(weight)
    return quantizer


def reference(weight, scale, levels, strength):
    """The penalty of one weight at a time, from its formula, in float64."""
    levels, total = levels.double().tolist(), 0.0
    spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
    for row, s in zip(weight.double().tolist(), scale.double().tolist(), strict=True):
        for w in row:
            x = w / s
            if levels[0] < x < levels[-1]:
                low = max(level for level in levels[:-1] if level <= x)
                high = levels[levels.index(low) + 1]
                r = abs(math.cos(math.pi * (0.5 + (x - low) / (high - low))))
            else:
                r = math.pi / spacing * min(abs(x - levels[0]), abs(x - levels[-1]))
            total += s * r
    return strength * spacing / math.pi * total / math.sqrt(weight.numel())


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_the_penalty_is_that_of_the_formula(bits):
    weight = torch.randn(4, 70)
    quantizer = fitted(weight, bits, strength=0.3)
    strange = 1.7 * weight
    expected = reference(strange, quantizer.scale(), quantizer.levels, 0.3)
    assert float(quantizer.penalty(strange)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_penalty_is_zero_at_centroids_and_draws_to_them(bits):
    weight = torch.randn(4, 300)
    quantizer = fitted(weight, bits)
    centroids = quantizer.hard(weight)
    largest = float(quantizer.penalty(weight))
    assert 0 <= float(quantizer.penalty(centroids)) < 2e-3 * largest
    free = weight.clone().requires_grad_()
    quantizer.penalty(free).backward()
    apart = (weight - centroids).abs() > 1e-4 * quantizer.scale()[:, None] / 2**bits
    assert (free.grad.sign() == (weight - centroids).sign())[apart].float().mean() > 0.97
    assert 0.3 < free.grad.norm() / quantizer.config.strength < 3.0


@pytest.mark.parametrize("codebook", ["int8", "fp8"])
def test_levels_that_rounding_made_equal_do_no_harm(codebook):
    weight = torch.randn(4, 300)
    quantizer = fitted(weight, 8, codebook=codebook)
    assert len(quantizer.levels.unique()) < 256
    free = (2 * weight).requires_grad_()
    quantizer.penalty(free).backward()
    assert free.grad.isfinite().all()
    assert free.grad.norm() < 3.0 * quantizer.config.strength


def test_centroids_are_those_of_kmeans_and_stay():
    weight = torch.randn(4, 90)
    kmeans, quantizer = KMeansQuantizer(KMeansConfig(bits=3), 4), fitted(weight, 3, compress_every=1)
    kmeans.fit(weight)
    quantizer.update(2 * weight, 1)
    assert torch.equal(quantizer.levels, kmeans.levels)
    assert torch.equal(quantizer.scales, kmeans.scales)


def test_weights_train_as_floats_and_are_compressed_periodically():
    layer = nn.Sequential(nn.Linear(6, 5))
    gq.quantize_(layer, S8BQATConfig(bits=2, compress_every=3))
    quantizer, x = layer[0].weight_quantizer, torch.randn(4, 6)
    annealer = gq.Annealer(layer, total_steps=6)
    with torch.no_grad():
        for step in range(1, 7):
            layer[0].weight.add_(0.01)
            free = layer[0].weight.clone()
            annealer.step()
            expected = quantizer.hard(free) if step % 3 == 0 else free
            assert torch.equal(layer[0].weight, expected)
            torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, layer[0].bias))
    layer.eval()
    hard = quantizer.hard(layer[0].weight)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, hard, layer[0].bias))


def test_the_penalty_of_a_model_counts_each_weight_once():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    gq.quantize_(model, {"1": gq.GQConfig(), "*": S8BQATConfig(strength=2.0)})
    weight, quantizer = model[0].weight, model[0].weight_quantizer
    torch.testing.assert_close(gq.penalty(model), quantizer.penalty(weight))


def test_models_without_a_penalty_have_none():
    assert gq.penalty(nn.Linear(2, 2)) == 0
    assert gq.penalty(gq.quantize_(nn.Linear(2, 2), gq.GQConfig())) == 0


def test_zero_channels_cost_nothing():
    weight = torch.randn(3, 20)
    weight[1] = 0
    quantizer = fitted(weight)
    free = weight.clone().requires_grad_()
    quantizer.penalty(free).backward()
    assert free.grad.isfinite().all() and not free.grad[1].any()


def old_penalty(quantizer, weight):
    """The regularizer as its formula has it, from the lower level of each weight's region."""
    levels = quantizer.levels.double()
    x = weight / quantizer.scales.double()[:, None]
    within = x.clamp(levels[0], levels[-1])
    region = torch.bucketize(within.detach(), levels[1:-1])
    low, high = levels[region], levels[region + 1]
    spacing = (levels[-1] - levels[0]) / (len(levels) - 1)
    cost = torch.sin(math.pi * (within - low) / (high - low)).abs() + math.pi / spacing * (x - within).abs()
    factor = quantizer.config.strength * spacing / (math.pi * math.sqrt(weight.numel()))
    return factor * (quantizer.scales.double() * cost.sum(1)).sum()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_away_from_centroids_value_and_gradient_are_the_formulas(bits):
    weight = 1.5 * torch.randn(4, 300, dtype=torch.float64)
    quantizer = fitted(weight / 1.5, bits)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    value, expected = quantizer.penalty(ours), old_penalty(quantizer, theirs)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward()
    expected.backward()
    # Scale times level is rounded to float32.
    away = (weight - quantizer.hard(weight)).abs() > 1e-5 * quantizer.scales[:, None]
    assert away.float().mean() > 0.99
    torch.testing.assert_close(ours.grad[away], theirs.grad[away], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_is_zero_just_after_compression(bits, codebook):
    weight = torch.randn(4, 300)
    quantizer = fitted(weight, bits, codebook=codebook, compress_every=1)
    quantizer.update(weight, 1)
    weight.requires_grad_()
    value = quantizer.penalty(weight)
    value.backward()
    assert value == 0
    assert not weight.grad.any()
