"""What the CPU's implementations, native and torch, owe to their chunks and look-ups; the operators' tests cover the
rest."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gq_triton.kernels import fake_quantize_cpu, native, tables


def count_by_definition(weight, scale, borders):
    return (scale[:, None, None] * borders < weight[..., None]).sum(-1).to(torch.uint8)


def soft_by_table(weight, scale, table):
    """What a table means, one operation at a time; autograd gives its gradient."""
    parts = tables.split_table(table)
    k, mu, low, high = parts.curve
    x = weight / scale[:, None]
    y = tables.compress(x.clamp(*parts.bounds.tolist()), mu)
    y = torch.where(x < parts.bounds[0], low, torch.where(x > parts.bounds[1], high, y))
    cell = torch.searchsorted(parts.edges, y.detach())
    return scale[:, None] * (parts.left[cell] + parts.jump[cell] * torch.sigmoid(k * y + parts.offset[cell]))


def table_of(centroids, mu, dtype=torch.float64):
    z, mu = torch.tensor(centroids, dtype=torch.float64), torch.tensor([mu], dtype=torch.float64)
    return tables.build_tables(z[None], mu, torch.tensor([3.0]).double(), None, dtype)[0]


# --- finding codes ----------------------------------------------------------------------------------------------------

SPACED = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=255)
CROWDED = st.lists(st.integers(-20, 20).map(lambda i: i * 2.0**-20), min_size=1, max_size=255)
ANYWHERE = st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=255)
BOTH = pytest.mark.usefixtures("cpu_kernels")


@BOTH
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # which nothing changes
@given(
    borders=SPACED | CROWDED | ANYWHERE,
    scale=st.just(1.0) | st.floats(2.0**-100, 2.0**100, width=32),
    weights=st.lists(st.floats(width=32), max_size=20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_codes_count_borders_exactly(borders, scale, weights, dtype):
    """Any number of borders, in any crowd, finite or not; any weight, on a border and beside it too."""
    borders, scale = torch.tensor(borders, dtype=dtype).sort().values, torch.tensor([scale], dtype=dtype)
    on = scale * borders
    near = [torch.nextafter(on, torch.full_like(on, side)) for side in (-torch.inf, torch.inf)]
    weight = torch.cat([torch.tensor(weights, dtype=dtype), on, *near])[None]
    expected = count_by_definition(weight, scale, borders)
    actual = fake_quantize_cpu.encode(weight, scale, borders)
    assert torch.equal(actual, expected)


@BOTH
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("bits", range(1, 9))
def test_hard_values_are_those_of_the_codes(bits, spread):
    """``spread``: of the centroids about 0; a crowd that shares one bin must be told apart by comparisons."""
    outer = [-1.0, 1.0]
    inner = torch.linspace(-spread / 2, spread / 2, 2**bits - 2).tolist()
    table = table_of(sorted(outer + inner), 2.0, torch.float32)
    scale = torch.tensor([0.7, 3.0])
    weight = torch.randn(2, 400, generator=torch.Generator().manual_seed(bits)) * scale[:, None]
    weight[:, ::2] *= spread
    parts = tables.split_table(table)
    codes = count_by_definition(weight, scale, parts.thresholds)
    expected = scale[:, None] * parts.values[codes.long()]
    assert torch.equal(fake_quantize_cpu.forward(weight, scale, table, False), expected)


@BOTH
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_without_a_scale_the_codes_still_count(bits):
    borders = torch.linspace(-1, 1, 2**bits - 1)
    weight, scale = torch.tensor([[-torch.inf, -1.0, -0.0, 0.0, 1e-45, torch.inf]]), torch.zeros(1)
    codes = fake_quantize_cpu.encode(weight, scale, borders)
    assert codes.tolist() == [[0, 0, 0, 0, len(borders), len(borders)]]


# --- soft values and gradients ----------------------------------------------------------------------------------------


@given(
    gaps=st.lists(st.floats(1e-4, 1), min_size=1, max_size=31),
    mu=st.sampled_from([0.0, 1e-3, 0.3, 2.0, 255.0]),
    limit=st.sampled_from([0.6, 1.0, 1.5]),
    seed=st.integers(0, 2**30),
)
@example(gaps=[0.5, 1.0, 1.0], mu=0.001, limit=1.5, seed=1)  # where two terms of the series in mu are too few
def test_gradients_are_those_of_the_table(gaps, mu, limit, seed):
    """Centroids however uneven, beyond -1 and 1 too; all gradients, in float64."""
    position = torch.tensor([0.0, *gaps]).double().cumsum(0)
    levels = 2 ** (len(position).bit_length() - 1)
    position = position[:levels] / position[levels - 1]
    table = table_of((2 * position - 1).mul(limit).tolist(), mu).detach()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    grad = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 2.0]).double()
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, scale, table)]
    expected = soft_by_table(*leaves)
    torch.testing.assert_close(fake_quantize_cpu.forward(weight, scale, table, True), expected.detach())
    dweight, dscale, dtable = torch.autograd.grad(expected, leaves, grad)
    actual = fake_quantize_cpu.backward(grad, weight, scale, table, 0.0, True)
    bounds = tables.split_table(table).bounds
    x = weight / scale[:, None]
    inside = (x >= bounds[0]) & (x <= bounds[1])
    torch.testing.assert_close(actual[0] * inside, dweight * inside, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(actual[1], dscale, rtol=1e-7, atol=1e-9)
    series = {"rtol": 1e-5, "atol": 1e-6} if 0 < mu < fake_quantize_cpu.SMALL_MU else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(actual[2], dtable, **series)


@BOTH
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mu", [0.0, 0.01, 0.4, 0.6, 255.0])
def test_float32_is_close_to_float64(make_quantizer, bits, mu):
    problem = make_quantizer(bits, (7, 130), mu=mu)
    inputs = [problem.weight.float(), problem.scale.float(), problem.table()]
    grad = torch.randn(7, 130)
    soft = fake_quantize_cpu.forward(*inputs, True)
    exact = [tensor.double() for tensor in inputs]
    torch.testing.assert_close(soft.double(), fake_quantize_cpu.forward(*exact, True), rtol=0, atol=4e-6)
    actual = fake_quantize_cpu.backward(grad, *inputs, 0.1, True)
    expected = fake_quantize_cpu.backward(grad.double(), *exact, 0.1, True)
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.double() - theirs).norm() < (2e-4 if bits > 5 else 2e-5) * theirs.norm()


@BOTH
def test_a_scale_that_is_almost_nothing_gives_finite_gradients(make_quantizer):
    """weight / scale overflows, which is clamped like any other weight beyond the outer centroids."""
    problem = make_quantizer(3)
    weight, scale = problem.weight.float() * 1e3, torch.full((5,), 2e-38)
    grads = fake_quantize_cpu.backward(torch.ones_like(weight), weight, scale, problem.table(), 0.1, True)
    assert all(grad.isfinite().all() for grad in grads)


# --- chunks -----------------------------------------------------------------------------------------------------------


def run(weight, scale, table, grad):
    borders = tables.split_table(table).thresholds
    outputs = [fake_quantize_cpu.forward(weight, scale, table, soft) for soft in (False, True)]
    gradients = fake_quantize_cpu.backward(grad, weight, scale, table, 0.1, True)
    return [*outputs, fake_quantize_cpu.encode(weight, scale, borders), *gradients]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chunk", [1, 19, 20, 50, 114])
@pytest.mark.parametrize("per_channel", [True, False])
def test_chunks_cover_the_weight(make_quantizer, monkeypatch, chunk, per_channel):
    """Chunks of part of a row, of a row, of some rows, of all rows."""
    problem = make_quantizer(4, (6, 19), per_channel=per_channel)
    inputs = problem.weight, problem.scale, problem.table(torch.float64), torch.randn(6, 19).double()
    whole = run(*inputs)
    monkeypatch.setattr(fake_quantize_cpu, "CHUNK", chunk)
    chunked = run(*inputs)
    assert torch.equal(chunked[0], whole[0])
    assert torch.equal(chunked[2], whole[2])
    for mine, theirs in zip(chunked, whole, strict=True):  # a vector's functions may round unlike those of its rest
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1 << 15, 5])
def test_transposed_weight_and_gradient(make_quantizer, monkeypatch, chunk):
    problem = make_quantizer(4, (6, 19))
    inputs = problem.weight, problem.scale, problem.table(torch.float64), torch.randn(6, 19).double()
    monkeypatch.setattr(fake_quantize_cpu, "CHUNK", chunk)
    expected = run(*inputs)
    weight, grad = (tensor.T.contiguous().T for tensor in (inputs[0], inputs[3]))
    assert not weight.is_contiguous()
    assert all(map(torch.equal, run(weight, *inputs[1:3], grad), expected))


class LiveBytes(TorchDispatchMode):
    """Records the most bytes that tensors made by operations have occupied at one time."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self.known:
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@BOTH
@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("shape", [(256, 1024), (1, 262_144)])
def test_temporaries_take_less_than_two_weights(make_quantizer, bits, shape):
    problem = make_quantizer(bits, shape)
    weight, scale, table = problem.weight.float(), problem.scale.float(), problem.table()
    grad = torch.ones_like(weight)
    calls = [lambda soft=soft: fake_quantize_cpu.forward(weight, scale, table, soft) for soft in (False, True)]
    calls.append(lambda: fake_quantize_cpu.backward(grad, weight, scale, table, 0.1, True))
    calls.append(lambda: fake_quantize_cpu.encode(weight, scale, tables.split_table(table).thresholds))
    for call in calls:
        with LiveBytes(grad, weight, scale, table) as memory:
            result = call()
        outputs = sum(tensor.nbytes for tensor in tree_leaves(result))
        assert outputs <= memory.peak < outputs + 2 * weight.nbytes


def test_temporaries_do_not_grow_with_the_weight(make_quantizer, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)  # which needs none
    peaks = []
    for rows in (200, 400):
        problem = make_quantizer(4, (rows, 1000))
        weight, scale, table = problem.weight.float(), problem.scale.float(), problem.table()
        grad = torch.ones_like(weight)
        with LiveBytes(grad, weight, scale, table) as memory:
            result = fake_quantize_cpu.backward(grad, weight, scale, table, 0.1, True)
        peaks.append(memory.peak - sum(tensor.nbytes for tensor in result))
    assert abs(peaks[1] - peaks[0]) < 10_000  # 1 / scale
