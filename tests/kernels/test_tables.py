import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import tables

MU = st.one_of(st.just(0.0), st.floats(1e-9, 1e4))


@given(x=st.lists(st.floats(-1, 1), min_size=1, max_size=20), mu=MU)
def test_expand_inverts_compress(x, mu):
    x, mu = torch.tensor(x, dtype=torch.float64), torch.tensor(mu, dtype=torch.float64)
    torch.testing.assert_close(tables.expand(tables.compress(x, mu), mu), x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mu", [0.0, 1e-6, 1e-3, 1.0, 255.0])
def test_companding_is_odd_increasing_and_fixes_the_ends(mu):
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for function in (tables.compress, tables.expand):
        y = function(x, torch.tensor(mu).double())
        assert (y.diff() > 0).all()
        torch.testing.assert_close(y, -y.flip(0), rtol=0, atol=1e-14)
        torch.testing.assert_close(y[[0, 20, 40]], x[[0, 20, 40]], rtol=0, atol=1e-14)


def test_companding_without_mu_is_the_identity():
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    zero = torch.tensor(0.0).double()
    assert torch.equal(tables.compress(x, zero), x)
    assert torch.equal(tables.expand(x, zero), x)


def test_companding_formula():
    x, mu = torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor(255.0).double()
    expected = [math.log(1 + 255 * 0.3) / math.log(256), -math.log(1 + 255 * 0.7) / math.log(256)]
    torch.testing.assert_close(tables.compress(x, mu), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("function", [tables.compress, tables.expand])
@pytest.mark.parametrize("mu", [1e-5, 0.99e-4, 1.01e-4, 0.1, 30.0])
def test_companding_derivatives(function, mu):
    x = torch.tensor([-0.8, -0.1, 0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, mu), eps=1e-6, atol=1e-6)


def test_companding_has_a_derivative_at_zero():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    tables.compress(x, torch.tensor(255.0).double()).backward()
    torch.testing.assert_close(x.grad, torch.tensor([255 / math.log(256)], dtype=torch.float64))


def test_snap_rounds_to_what_is_stored():
    values = torch.tensor([-1.0, -0.501, 0.0, 0.004, 0.3, 1.0], dtype=torch.float64)
    assert tables.snap(values, None) is values
    assert torch.equal(tables.snap(values, "int8") * 127, (values * 127).round())
    fp8 = (values * 256).to(torch.float8_e4m3fn).double() / 256
    assert torch.equal(tables.snap(values, "fp8"), fp8)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_snap_passes_the_gradient_through(dtype):
    values = torch.linspace(-1, 1, 7, dtype=torch.float64, requires_grad=True)
    tables.snap(values, dtype).sum().backward()
    assert torch.equal(values.grad, torch.ones(7).double())


def test_thresholds_are_expanded_borders():
    mu = torch.tensor(4.0).double()
    borders = tables.thresholds(torch.tensor([-1.0, -0.2, 0.4, 1.0]), mu)
    torch.testing.assert_close(borders, tables.expand(torch.tensor([-0.6, 0.1, 0.7]).double(), mu), rtol=1e-6, atol=0)


def test_thresholds_beyond_the_clamp_are_infinite():
    borders = tables.thresholds(torch.tensor([-1.5, -1.0, 1.0, 1.0]), torch.tensor(0.0))
    assert torch.equal(borders, torch.tensor([-torch.inf, 0.0, torch.inf]).double())


def soft_by_definition(y, centroids, values, hardness):
    spacing = (centroids[-1] - centroids[0]) / (len(centroids) - 1)
    return torch.softmax(-hardness * (y[:, None] - centroids).abs() / spacing, 1) @ values


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("hardness", [0.05, 1.0, 7.0, 200.0])
@pytest.mark.parametrize("codebook", [None, "int8", "fp8"])
def test_table_reproduces_the_softmax(make_quantizer, bits, hardness, codebook):
    problem = make_quantizer(bits, hardness=hardness)
    table = tables.split_table(problem.table(torch.float64, codebook))
    y = torch.linspace(-1, 1, 301, dtype=torch.float64)
    cell = torch.bucketize(y, table.edges)
    soft = table.left[cell] + table.jump[cell] * torch.sigmoid(table.curve[0] * y + table.offset[cell])
    expected = soft_by_definition(y, problem.centroids, table.values, hardness)
    torch.testing.assert_close(soft, expected, rtol=0, atol=1e-10 if hardness == 200 else 1e-12)


def test_table_survives_any_hardness(make_quantizer):
    assert make_quantizer(8, hardness=1e6).table().isfinite().all()


def test_table_gradient(make_quantizer):
    problem = make_quantizer(3)

    def differentiable(centroids, mu):
        table = tables.build_table(centroids, mu, problem.hardness, None, torch.float64)
        return torch.cat(tables.split_table(table)[4:])

    assert torch.autograd.gradcheck(differentiable, (problem.centroids.requires_grad_(), problem.mu.requires_grad_()))


def test_table_has_the_documented_layout(make_quantizer):
    problem = make_quantizer(2)
    table = problem.table(torch.float64)
    assert table.numel() == tables.table_size(4)
    parts = tables.split_table(table)
    assert [part.numel() for part in parts] == [3, 4, 2, 2, 3, 3, 3, 4]
    assert torch.equal(parts.thresholds, tables.thresholds(problem.centroids, problem.mu))
    assert torch.equal(parts.values, tables.codebook(problem.centroids, problem.mu, None))
    assert torch.equal(parts.bounds, parts.values[[0, 3]])
    assert torch.equal(parts.edges, problem.centroids[1:-1])
    assert torch.equal(parts.curve[1:], torch.stack([problem.mu, problem.centroids[0], problem.centroids[-1]]))
