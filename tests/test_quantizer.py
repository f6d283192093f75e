import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gq_triton import GQConfig, WeightQuantizer
from gq_triton import functional as F
from gq_triton.quantizer import quantize_group

WIDTHS = range(1, 9)


def fitted(weight, **options):
    quantizer = WeightQuantizer(GQConfig(**options), len(weight))
    quantizer.fit(weight)
    return quantizer


def relative_error(quantizer, weight):
    quantized = quantizer.eval()(weight).detach()
    return float((quantized - weight).square().sum() / weight.square().sum())


# --- parameters


@given(st.integers(1, 8), st.integers(0, 2**31), st.floats(0.0, 1e30))
@settings(deadline=None, max_examples=60)
def test_centroids_stay_sorted_and_pinned_under_any_step(bits, seed, size):
    quantizer = WeightQuantizer(GQConfig(bits=bits), 3)
    noise = torch.randn(2**bits - 1, generator=torch.Generator().manual_seed(seed))
    quantizer.centroid_logits.data.add_(size * noise)
    z = quantizer.centroids()
    assert z.shape == (2**bits,)
    assert z.dtype == torch.float32
    assert z[0] == -1
    assert z[-1] == 1
    assert (z.diff() > 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_centroids_start_uniform_and_symmetric(bits):
    z = WeightQuantizer(GQConfig(bits=bits), 1).centroids()
    torch.testing.assert_close(z, torch.linspace(-1, 1, 2**bits), rtol=0, atol=1e-7)
    assert torch.equal(z, -z.flip(0))


@pytest.mark.parametrize("step", [-1e30, -1e4, 0.0, 1e4, 1e30])
def test_scale_and_mu_stay_finite_and_not_negative_under_any_step(step):
    quantizer = WeightQuantizer(GQConfig(learn_mu=True), 2)
    quantizer.log_scale.data.add_(step)
    quantizer.log_mu.data.add_(step)
    for value in (quantizer.scale(), quantizer.companding(), quantizer(torch.randn(2, 5))):
        assert value.isfinite().all()
    assert (quantizer.scale() >= 0).all()
    assert (quantizer.companding() >= 0).all()


def test_what_is_not_learned_is_a_buffer():
    fixed = WeightQuantizer(GQConfig(learn_centroids=False), 3)
    assert set(dict(fixed.named_parameters())) == {"log_scale"}
    assert set(dict(fixed.named_buffers())) == {"centroid_logits", "mu", "hardness"}
    learned = WeightQuantizer(GQConfig(learn_mu=True, granularity="tensor"), 3)
    assert {name: tuple(p.shape) for name, p in learned.named_parameters()} == {
        "log_scale": (1,),
        "centroid_logits": (15,),
        "log_mu": (1,),
    }


def test_casts_leave_the_dtype_and_moves_do_not():
    quantizer = WeightQuantizer(GQConfig(), 3)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        assert {tensor.dtype for tensor in cast(quantizer).state_dict().values()} == {torch.float32}
    assert quantizer.to("meta").log_scale.is_meta


# --- fit


@pytest.mark.parametrize("bits", WIDTHS)
def test_fit_of_gaussian_weights_is_near_the_best_scalar_quantizer(bits):
    # Squared error of the optimal (Lloyd-Max) quantizer of a unit normal, Max 1960, table I; 6 to 8 bits from the
    # high-resolution formula sqrt(3) pi / 2 / 4^bits.
    optimum = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
    best = optimum.get(bits, 3**0.5 * torch.pi / 2 / 4**bits)
    weight = torch.randn(32, 600)
    assert relative_error(fitted(weight, bits=bits), weight) < 1.15 * best


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_fit_beats_every_scale_of_a_grid(bits, granularity):
    weight = torch.distributions.StudentT(5.0).sample((6, 300))
    quantizer = fitted(weight, bits=bits, granularity=granularity)
    error = relative_error(quantizer, weight)
    others = []
    for factor in torch.logspace(-1, 1, 41).tolist():
        other = copy.deepcopy(quantizer)
        other.log_scale.data.add_(torch.tensor(factor).log())
        others.append(relative_error(other, weight))
    assert error < 1.05 * min(others)


def test_fit_chooses_mu_by_the_weights():
    assert fitted(torch.rand(8, 200) - 0.5, bits=4).mu == 0
    assert fitted(torch.distributions.Laplace(0.0, 1.0).sample((8, 200)), bits=4).mu > 2


@pytest.mark.parametrize("learn_mu", [False, True])
def test_fit_keeps_a_given_mu(learn_mu):
    quantizer = fitted(torch.randn(4, 50), mu=7.0, learn_mu=learn_mu)
    torch.testing.assert_close(quantizer.companding(), torch.tensor([7.0]))


def test_fit_is_deterministic_and_follows_the_weights_magnitude():
    weight = torch.randn(5, 700)
    first, again = fitted(weight), fitted(weight)
    assert torch.equal(first.log_scale, again.log_scale)
    for factor in (1e-30, 1e-3, 1e30):
        scaled = fitted(factor * weight)
        torch.testing.assert_close(scaled.scale(), factor * first.scale(), rtol=1e-4, atol=0)
        assert scaled.mu == first.mu


def test_fit_in_pieces_equals_fit_of_each_row(monkeypatch):
    weight = torch.randn(7, 130)
    whole = fitted(weight, mu=3.0).log_scale
    monkeypatch.setattr("gq_triton.fitting._CHUNK", 300)
    assert torch.equal(fitted(weight, mu=3.0).log_scale, whole)
    rows = torch.cat([fitted(row[None], mu=3.0).log_scale for row in weight])
    torch.testing.assert_close(rows, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("shape", [(3, 1), (1, 7), (4, 1, 3), (2, 3, 1, 2)])
def test_fit_of_odd_shapes(shape, bits):
    weight = torch.randn(shape)
    # With one weight per channel the scale alone reproduces it.
    assert relative_error(fitted(weight, bits=bits), weight) < (1e-10 if shape == (3, 1) else 0.6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fit_of_other_dtypes(dtype):
    weight = torch.randn(4, 100).to(dtype)
    torch.testing.assert_close(fitted(weight).scale(), fitted(weight.float()).scale())


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_zero_channels_stay_zero_and_have_finite_gradients(granularity):
    weight = torch.zeros(3, 5)
    if granularity == "channel":
        weight[1] = torch.randn(5)
    weight.requires_grad_()
    quantizer = fitted(weight, granularity=granularity)
    quantized = quantizer(weight)
    assert torch.equal(quantized[[0, 2]], torch.zeros(2, 5))
    quantized.square().sum().backward()
    for tensor in (weight, *quantizer.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_fit_refuses_weights_that_are_not_finite(bad):
    weight = torch.randn(3, 4)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight must be finite"):
        fitted(weight)


def test_fit_refuses_empty_and_misshapen_weights():
    with pytest.raises(ValueError, match="must not be empty"):
        fitted(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="4 channels where the quantizer has 3"):
        WeightQuantizer(GQConfig(), 3).fit(torch.randn(4, 2))


# --- forward


@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_eval_is_what_encode_deploys(bits, codebook):
    weight = torch.randn(5, 33)
    quantizer = fitted(weight, bits=bits, codebook=codebook, forward="soft").eval()
    decoded = F.decode(quantizer.encode(weight), quantizer.scale(), quantizer.codebook())
    assert torch.equal(quantizer(weight), decoded)


def test_training_computes_soft_or_hard_values():
    weight = torch.randn(3, 50)
    hard, soft = fitted(weight, forward="hard"), fitted(weight, forward="soft")
    assert torch.equal(hard.train()(weight), hard.eval()(weight))
    assert not torch.equal(soft.train()(weight), soft.eval()(weight))
    soft.train().hardness.fill_(1e4)
    torch.testing.assert_close(soft(weight), hard.eval()(weight), rtol=0, atol=5e-3)


@pytest.mark.parametrize("learn_mu", [False, True])
@pytest.mark.parametrize("forward", ["hard", "soft"])
def test_gradients_reach_everything_learned(forward, learn_mu):
    weight = torch.randn(3, 50, requires_grad=True)
    quantizer = fitted(weight, bits=3, forward=forward, learn_mu=learn_mu)
    (quantizer(weight) * torch.randn(3, 50)).sum().backward()
    for tensor in (weight, *quantizer.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().sum() > 0


def test_gradients_of_scale_and_centroids_match_finite_differences():
    weight, g = torch.randn(2, 40, dtype=torch.float64), torch.randn(2, 40, dtype=torch.float64)
    quantizer = fitted(weight, bits=2, mu=3.0, forward="soft", straight_through=0.0)
    (quantizer(weight) * g).sum().backward()
    for parameter in (quantizer.log_scale, quantizer.centroid_logits):
        for index in range(len(parameter)):
            step = 1e-3
            with torch.no_grad():
                parameter[index] += step
                above = (quantizer(weight) * g).sum()
                parameter[index] -= 2 * step
                below = (quantizer(weight) * g).sum()
                parameter[index] += step
            # float32 parameters limit the difference quotient to about three digits
            torch.testing.assert_close(
                parameter.grad[index].double(), (above - below) / (2 * step), rtol=5e-3, atol=5e-3
            )


@pytest.mark.parametrize("learn_mu", [False, True])
@pytest.mark.parametrize("learn_centroids", [False, True])
def test_gradients_while_tables_do_not_learn(learn_centroids, learn_mu):
    weight = torch.randn(3, 50, requires_grad=True)
    quantizer = fitted(weight, learn_mu=learn_mu, learn_centroids=learn_centroids)
    quantizer(weight).square().sum().backward()
    expected = weight.grad, quantizer.log_scale.grad
    weight.grad = quantizer.log_scale.grad = None
    quantizer.zero_grad()
    quantizer.learn_tables = False
    quantizer(weight).square().sum().backward()
    assert torch.equal(weight.grad, expected[0])
    assert torch.equal(quantizer.log_scale.grad, expected[1])
    for name, parameter in quantizer.named_parameters():
        if name != "log_scale":
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_group_is_its_members_bit_for_bit(bits, granularity):
    weights = [torch.randn(shape) for shape in ((5, 3), (1, 7), (4, 2, 3), (64, 1))]
    quantizers = [fitted(weight, bits=bits, granularity=granularity, learn_mu=True) for weight in weights]
    for quantizer in quantizers:
        quantizer.hardness.add_(torch.rand(()))
        for parameter in quantizer.parameters():
            parameter.data.add_(torch.randn_like(parameter))
    for dtype in (None, torch.bfloat16):
        values = quantize_group(quantizers, weights, dtype)
        for quantizer, weight, value in zip(quantizers, weights, values, strict=True):
            assert torch.equal(value, quantizer(weight).to(value.dtype))
            assert value.dtype == (dtype or weight.dtype)


def test_parameters_of_another_dtype_are_refused():
    quantizer = WeightQuantizer(GQConfig(), 3)
    quantizer.log_scale = nn.Parameter(quantizer.log_scale.bfloat16())
    with pytest.raises(TypeError, match="must be float32; got torch.bfloat16"):
        quantizer(torch.randn(3, 2))


# --- requantize_every


def step_all(*parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05)


def test_requantization_interval_counts_updates_of_the_weight():
    weight = nn.Parameter(torch.randn(3, 40))
    quantizer = fitted(weight, bits=3, requantize_every=3).train()
    first = quantizer(weight).detach()
    for update in range(1, 7):
        step_all(weight)
        for _ in range(2):  # several passes between two updates count once
            value = quantizer(weight).detach()
            fresh = quantizer.eval()(weight).detach()
            quantizer.train()
            if update % 3 == 0:
                first = fresh
            assert torch.equal(value, first)
        assert torch.equal(value, fresh) == (update % 3 == 0)


def test_gradients_between_requantizations():
    weight = nn.Parameter(torch.randn(3, 40))
    quantizer = fitted(weight, requantize_every=2).train()
    quantizer(weight).sum().backward()
    assert quantizer.log_scale.grad.abs().sum() > 0
    quantizer.zero_grad()
    weight.grad = None
    step_all(weight)
    g = torch.randn(3, 40)
    (quantizer(weight) * g).sum().backward()
    assert torch.equal(weight.grad, g)
    for parameter in quantizer.parameters():  # present, for DDP, and zero
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_a_remembered_weight_is_forgotten_by_fits_moves_and_loads():
    weight = nn.Parameter(torch.randn(3, 40))
    quantizer = fitted(weight, requantize_every=100).train()
    quantizer(weight)
    step_all(weight)
    quantizer.fit(weight)
    assert torch.equal(quantizer(weight), quantizer.eval()(weight))
    quantizer.train()
    step_all(weight)
    quantizer.cpu()
    assert torch.equal(quantizer(weight), quantizer.eval()(weight))
    quantizer.train()
    step_all(weight)
    quantizer.load_state_dict(quantizer.state_dict())
    assert torch.equal(quantizer(weight), quantizer.eval()(weight))


def test_deepcopy_is_independent():
    weight = nn.Parameter(torch.randn(3, 40))
    quantizer = fitted(weight, requantize_every=5).train()
    quantizer(weight)
    twin = copy.deepcopy(quantizer)
    twin.log_scale.data.add_(1.0)
    assert not torch.equal(twin.eval()(weight), quantizer.eval()(weight))
