import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import backend, tables
from gq_triton.kernels.backend import tl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: branches not taken

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
@pytest.mark.parametrize("mu", [1e-6, 0.99e-5, 1.01e-5, 0.1, 30.0])
def test_companding_derivatives(function, mu):
    x = torch.tensor([-0.8, -0.1, 0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor(mu, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, mu), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("function", "sign"), [(tables.compress, 1), (tables.expand, -1)])
def test_companding_derivative_without_mu(function, sign):
    x, mu = torch.linspace(-1, 1, 9).double(), torch.zeros(9, dtype=torch.float64, requires_grad=True)
    function(x, mu).sum().backward()
    torch.testing.assert_close(mu.grad, sign * x * (1 - x.abs()) / 2)


def test_companding_has_a_derivative_at_zero():
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    tables.compress(x, torch.tensor(255.0).double()).backward()
    torch.testing.assert_close(x.grad, torch.tensor([255 / math.log(256)], dtype=torch.float64))


def test_snap_rounds_to_what_is_stored():
    values = torch.tensor([-1.0, -0.501, 0.0, 0.004, 0.3, 1.0], dtype=torch.float64)
    assert torch.equal(tables.snap(values, None), values)
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
        table = tables.build_tables(centroids, mu, problem.hardness.repeat(2), None, torch.float64)
        return torch.cat(tables.split_table(table)[4:], 1)

    centroids = torch.stack([problem.centroids, problem.centroids * 0.9]).requires_grad_()
    mu = torch.tensor([2.0, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(differentiable, (centroids, mu))


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


# --- both implementations, and the definition -------------------------------------------------------------------------


class Implementation:
    """The two functions behind the operators; the interpreter launches kernels on CPU tensors too."""

    def __init__(self, device, triton):
        self.device = device
        self.forward, self.backward = (
            (tables._launch_forward, tables._launch_backward) if triton else (tables._forward, tables._backward)
        )


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    if request.param == "cpu":
        return Implementation(torch.device("cpu"), triton=False)
    return Implementation(request.getfixturevalue("kernel_device"), triton=True)


MU_AND_HARDNESS = [(0.0, 0.5), (1e-6, 3.0), (2.0, 1e4), (255.0, 50.0), (0.9e-5, 7.0), (0.03, 0.0)]


def make_group(bits, limit=1.0, dtype=torch.float64):
    """(centroids, mu, hardness) of quantizers that differ in everything: uneven grids within [-limit, limit]."""
    generator, levels = torch.Generator().manual_seed(bits), 2**bits
    count = len(MU_AND_HARDNESS)
    centroids = torch.linspace(-limit, limit, levels, dtype=torch.float64).repeat(count, 1)
    centroids += (torch.rand(count, levels, generator=generator, dtype=torch.float64) - 0.5) * limit / levels
    centroids = centroids.clamp(-limit, limit)
    mu, hardness = torch.tensor(MU_AND_HARDNESS, dtype=torch.float64).unbind(1)
    return centroids.to(dtype), mu.to(dtype), hardness


def assert_near(actual, expected, tolerance):
    """Every row equal to within ``tolerance`` times its largest entry; infinities in the same places."""
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite])
    actual, expected = actual.where(finite, 0), expected.where(finite, 0)
    largest = expected.abs().amax(-1, keepdim=True) if expected.numel() else 0
    assert ((actual - expected).abs() <= tolerance * largest).all()


EVERY_BITS = [1, 2, 4, *[pytest.param(bits, marks=pytest.mark.full) for bits in (3, 5, 6, 7)], 8]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", EVERY_BITS)
@pytest.mark.parametrize("codebook", [None, "int8", "fp8"])
@pytest.mark.parametrize("limit", [1.0, 0.9])
def test_tables_and_gradients_match_the_definition(implementation, bits, codebook, limit):
    centroids, mu, hardness = make_group(bits, limit)
    if bits == 8 and backend.INTERPRETED and implementation.forward is tables._launch_forward:
        centroids, mu, hardness = centroids[2:4], mu[2:4], hardness[2:4]  # the interpreter needs seconds for a row
    leaves = centroids.requires_grad_(), mu.requires_grad_()
    expected = tables.reference(*leaves, hardness, codebook)
    inputs = [tensor.detach().to(implementation.device) for tensor in (*leaves, hardness)]
    actual = implementation.forward(*inputs, codebook, torch.float64).cpu()
    for mine, theirs in zip(tables.split_table(actual), tables.split_table(expected.detach()), strict=True):
        assert_near(mine, theirs, 1e-12)
    grad = torch.randn_like(expected)
    dcentroids, dmu = implementation.backward(grad.to(implementation.device), *inputs, codebook)
    expected = torch.autograd.grad(expected, leaves, grad)
    assert_near(dcentroids.cpu(), expected[0], 1e-12)
    assert_near(dmu.cpu()[:, None], expected[1][:, None], 1e-9)


@pytest.mark.parametrize("codebook", [None, "int8"])
def test_float32_tables_are_the_rounded_ones(implementation, codebook):
    inputs = [tensor.to(implementation.device) for tensor in make_group(3, dtype=torch.float32)]
    actual = implementation.forward(*inputs, codebook, torch.float32).cpu()
    expected = tables._forward(*[tensor.cpu() for tensor in inputs], codebook, torch.float64).float()
    torch.testing.assert_close(actual, expected, rtol=2**-23, atol=1e-13)
    grad = torch.randn(actual.shape)
    mine = implementation.backward(grad.to(implementation.device), *inputs, codebook)
    theirs = tables._backward(grad.double(), *[tensor.cpu().double() for tensor in inputs], codebook)
    assert [tensor.dtype for tensor in mine] == [torch.float32, torch.float32]
    for gradient, exact in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient.cpu(), exact.float(), rtol=2**-22, atol=1e-9)


def test_coinciding_centroids(implementation):
    centroids = torch.tensor([[-1.0, 0.0, 0.0, 1.0]]).double()
    inputs = [tensor.to(implementation.device) for tensor in (centroids, *torch.ones(2, 1).double())]
    actual = implementation.forward(*inputs, None, torch.float64).cpu()
    assert_near(actual, tables.reference(centroids, *torch.ones(2, 1).double(), None), 1e-13)


def test_strides(implementation):
    centroids, mu, hardness = [tensor.to(implementation.device) for tensor in make_group(2)]
    grad = torch.randn(24, 6, dtype=torch.float64, device=implementation.device).T
    strided = centroids.T.contiguous().T, mu[:1].expand(6), hardness[:1].expand(6)
    plain = [tensor.contiguous() for tensor in strided]
    assert not any(tensor.is_contiguous() for tensor in (grad, *strided))
    expected = implementation.forward(*plain, None, torch.float64)
    assert torch.equal(implementation.forward(*strided, None, torch.float64), expected)
    expected = implementation.backward(grad.contiguous(), *plain, None)
    assert all(map(torch.equal, implementation.backward(grad, *strided, None), expected))


def test_empty(implementation):
    centroids, mu = torch.empty(0, 8, device=implementation.device), torch.empty(0, device=implementation.device)
    empty = implementation.forward(centroids, mu, mu, None, torch.float32)
    assert empty.shape == (0, 48)
    assert [tensor.shape for tensor in implementation.backward(empty, centroids, mu, mu, None)] == [(0, 8), (0,)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_one_row_holds_what_encode_and_codebook_use(bits):
    """To the last bit: codes and weights that are not computed from one table must still agree."""
    centroids, mu, hardness = make_group(bits, dtype=torch.float32)
    group = tables.build_tables(centroids, mu, hardness, "fp8", torch.float64)
    for row, *single in zip(group, centroids, mu, hardness, strict=True):
        parts = tables.split_table(row)
        assert torch.equal(row, tables.build_tables(*[value[None] for value in single], "fp8", torch.float64)[0])
        assert torch.equal(parts.thresholds, tables.thresholds(*single[:2]))
        assert torch.equal(parts.values, tables.codebook(*single[:2], "fp8"))
    assert torch.equal(tables.split_table(group).thresholds, tables.thresholds(centroids, mu[:, None]))
    assert torch.equal(tables.split_table(group).values, tables.codebook(centroids, mu[:, None], "fp8"))


@backend.jit
def _store_snapped(values, out, CODEBOOK: tl.constexpr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, tables._snap_kernel(tl.load(values + lane), CODEBOOK))


@pytest.mark.parametrize("codebook", ["int8", "fp8"])
def test_kernel_rounds_a_codebook_as_torch_does(kernel_device, codebook):
    """All that can be stored, all ties between them, and their neighbours."""
    stored = torch.arange(-127, 128).double() / 127
    if codebook == "fp8":
        stored = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double() / 256
        stored = stored[stored.isfinite()].unique()
    exact = torch.cat([stored, (stored[1:] + stored[:-1]) / 2])
    near = [exact.nextafter(torch.tensor(end).double()) for end in (-torch.inf, torch.inf)]
    near_float32 = [exact.float().nextafter(torch.tensor(end)).double() for end in (-torch.inf, torch.inf)]
    values = torch.cat([exact, *near, *near_float32])
    values = torch.nn.functional.pad(values, (0, 4096 - len(values))).to(kernel_device)
    out = torch.empty_like(values)
    _store_snapped[(1,)](values, out, codebook, 4096, enable_fp_fusion=False)
    assert torch.equal(out.cpu(), tables.snap(values.cpu(), codebook))


# --- operators --------------------------------------------------------------------------------------------------------


def test_operator_registration(device):
    centroids, mu, hardness = [tensor.to(device) for tensor in make_group(2, dtype=torch.float32)]
    leaves = centroids.clone().requires_grad_(), mu.clone().requires_grad_()
    torch.library.opcheck(tables.build_tables, (*leaves, hardness, "int8", torch.float32))
    grad = torch.randn(len(centroids), tables.table_size(4), device=device)
    torch.library.opcheck(tables.build_tables_backward, (grad, centroids, mu, hardness, "int8"))


def test_compiled_whole(device):
    centroids, mu, hardness = [tensor.to(device) for tensor in make_group(3)]

    def loss(centroids, mu):
        return tables.build_tables(centroids, mu, hardness, "fp8", torch.float64)[:, 2**3 :].sin().sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = centroids.clone().requires_grad_(), mu.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for mine, theirs in zip(*grads, strict=True):
        assert torch.equal(mine, theirs)


def test_launching_without_triton_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    with pytest.raises(RuntimeError, match="triton is needed"):
        tables._launch_forward(*make_group(1), None, torch.float32)
