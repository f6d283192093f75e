import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.baselines import KMeansConfig, KMeansQuantizer, UniformConfig, UniformQuantizer
from gq_triton.baselines.kmeans import lloyd


def fitted(weight, bits, kind=KMeansQuantizer, config=KMeansConfig, **options):
    quantizer = kind(config(bits=bits, **options), len(weight))
    quantizer.fit(weight)
    return quantizer


def relative_error(quantizer, weight):
    return float((quantizer.hard(weight) - weight).double().square().sum() / weight.double().square().sum())


def draw_weight(kind, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 40, generator=draw)
    if kind == "heavy":
        weight = weight**3
    if kind == "lumpy":
        weight = weight.round()
    if kind == "positive":
        weight = weight.abs()
    return weight * torch.tensor([[1.0], [10.0], [0.0], [0.1]])


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(["normal", "heavy", "lumpy", "positive"]))
@settings(deadline=None, max_examples=25)
def test_the_error_is_never_above_that_of_the_best_uniform_grid(bits, seed, kind):
    weight = draw_weight(kind, seed)
    uniform = relative_error(fitted(weight, bits, UniformQuantizer, UniformConfig), weight)
    assert relative_error(fitted(weight, bits), weight) <= uniform * (1 + 1e-5) + 1e-13


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_and_scales_are_centroids_of_their_cells(bits):
    weight = torch.randn(6, 900) * torch.logspace(-1, 1, 6)[:, None]
    start = torch.linspace(-1, 1, 2**bits), weight.abs().amax(1)
    levels, scale, error = lloyd(weight, *start)
    # In float64, for the nearest levels: the conditions of Lloyd (1982) and Max (1960), as near as the last round came.
    w, s, z = weight.double(), scale.double()[:, None], levels.double()
    codes = (w / s).unsqueeze(-1).sub(z).abs().argmin(-1)
    for code in range(2**bits):
        cell = codes == code
        centroid = (s * w)[cell].sum() / s.expand_as(w)[cell].square().sum()
        assert abs(centroid - z[code]) < 0.05 * 2 / 2**bits
    best = (w * z[codes]).sum(1) / z[codes].square().sum(1)
    torch.testing.assert_close(best, s.squeeze(1), rtol=0.01, atol=0)
    assert error == pytest.approx(float((w - s * z[codes]).square().sum() / w.square().sum()), rel=1e-3)
    assert levels.abs().max() == 1


@pytest.mark.parametrize(("bits", "best"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_gaussian_weights_reach_the_optimum_of_max(bits, best):
    weight = torch.randn(4, 8000)  # Max 1960, table I: the least squared error of a unit normal
    assert relative_error(fitted(weight, bits), weight) < 1.03 * best


def test_weights_on_a_uniform_grid_are_found_exactly():
    chosen = torch.randint(64, (4, 40), generator=torch.Generator().manual_seed(46))
    weight = torch.linspace(-1, 1, 64)[chosen]  # the companded start ends in another minimum
    assert relative_error(fitted(weight, 6), weight) < 1e-10


@pytest.mark.parametrize("codebook", ["int8", "fp8"])
def test_rounded_codebooks_have_scales_of_their_own(codebook):
    weight = torch.randn(5, 300)
    exact, rounded = (relative_error(fitted(weight, 4, codebook=kind), weight) for kind in ("float", codebook))
    assert exact < rounded < 1.1 * exact


def test_training_leaves_the_levels():
    weight = torch.randn(3, 50)
    quantizer = fitted(weight, 2)
    levels, scale = quantizer.levels.clone(), quantizer.scales.clone()
    quantizer.update(weight.sign(), 1)
    assert torch.equal(quantizer.levels, levels)
    assert not torch.equal(quantizer.scales, scale)
