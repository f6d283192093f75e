import pytest
import torch

from gq_triton.baselines import LSQConfig, LSQQuantizer

WIDTHS = range(1, 9)


def fitted(weight, bits, **options):
    quantizer = LSQQuantizer(LSQConfig(bits=bits, **options), len(weight))
    quantizer.fit(weight)
    return quantizer


def limits(bits):
    """Qn and Qp."""
    return (1, 1) if bits == 1 else (2 ** (bits - 1), 2 ** (bits - 1) - 1)


def step(quantizer, bits):
    return quantizer.scale().detach().double() / limits(bits)[0]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_step_can_start_as_the_paper_has_it(bits):
    weight = torch.randn(3, 4, 5)
    mean = weight.abs().mean((1, 2))
    expected = mean if bits == 1 else 2 * mean / limits(bits)[1] ** 0.5
    torch.testing.assert_close(step(fitted(weight, bits, init="magnitude"), bits).float(), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_step_starts_where_the_error_is_least(bits):
    weight = torch.distributions.StudentT(5.0).sample((4, 300))
    quantizer = fitted(weight, bits)
    scale, error = quantizer.log_scale.data.clone(), (quantizer(weight) - weight).square().sum().item()
    for factor in torch.logspace(-1, 1, 41).log():
        quantizer.log_scale.data.copy_(scale + factor)
        assert (quantizer(weight) - weight).square().sum().item() > 0.97 * error


class PaperLSQ(torch.autograd.Function):
    """Equations 1 to 3 and 5 of arXiv 1902.08153, in float64."""

    @staticmethod
    def forward(ctx, weight, step, negative, positive):
        v = weight / step[:, None]
        clipped = v.clamp(-negative, positive)
        q = torch.where(v < 0, -1.0, 1.0) if negative == positive else clipped.round()
        ctx.save_for_backward(v, q)
        ctx.limits = negative, positive
        return q * step[:, None]

    @staticmethod
    def backward(ctx, grad):
        (v, q), (negative, positive) = ctx.saved_tensors, ctx.limits
        inside = (v > -negative) & (v < positive)
        edge = torch.where(v < 0, -negative, positive)
        by_step = torch.where(inside, q - v, edge)
        return grad * inside, (grad * by_step).sum(1) / (v.shape[1] * positive) ** 0.5, None, None


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_and_gradients_are_the_papers(bits):
    weight = torch.randn(6, 50)
    weight[:, :5] *= 30  # far beyond the limits
    quantizer = fitted(torch.randn(6, 50), bits)
    ours = weight.clone().requires_grad_()
    theirs, their_step = weight.double().requires_grad_(), step(quantizer, bits).requires_grad_()
    value, expected = quantizer(ours), PaperLSQ.apply(theirs, their_step, *limits(bits))
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.randn(6, 50)
    value.backward(gradient)
    expected.backward(gradient.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad)
    # What is trained is the step's logarithm.
    by_log = their_step.grad * their_step.detach()
    torch.testing.assert_close(quantizer.log_scale.grad.double(), by_log, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [-1e30, -1e4, 1e4, 1e30])
def test_the_step_stays_positive_and_finite_under_any_update(change):
    quantizer = fitted(torch.randn(2, 5), 3)
    quantizer.log_scale.data.add_(change)
    weight = torch.randn(2, 5, requires_grad=True)
    quantizer(weight).sum().backward()
    for value in (quantizer.scale(), quantizer(weight), weight.grad, quantizer.log_scale.grad):
        assert value.isfinite().all()
    assert (quantizer.scale() >= 0).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_descent_finds_the_step_of_least_error(bits):
    weight = torch.randn(2, 400)
    quantizer = fitted(weight, bits, init="magnitude")
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(weight) - weight).square().sum().backward()
        quantizer.log_scale.grad /= quantizer.log_scale.grad.abs().clamp(min=1.0) * 20
        optimizer.step()
    found = (quantizer(weight) - weight).square().sum().item()
    scales = quantizer.log_scale.data.clone()
    for factor in torch.logspace(-0.5, 0.5, 21).log():
        quantizer.log_scale.data.copy_(scales + factor)
        assert (quantizer(weight) - weight).square().sum().item() > 0.8 * found
