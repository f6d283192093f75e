import pytest
import torch

from gq_triton.kernels import packed_embedding as pe
from gq_triton.kernels import packing
from gq_triton.kernels.layouts import convert

CODEBOOKS = {
    "float": lambda levels: torch.linspace(-1, 1, levels),
    "int8": lambda levels: torch.linspace(-127, 127, levels).round().to(torch.int8),
    "fp8": lambda levels: torch.cat([torch.linspace(-256, 256, levels - 1), torch.tensor([0.006])]).to(
        torch.float8_e4m3fn  # from the largest to subnormal numbers
    ),
}


def problem(bits, rows, columns, device="cpu", codebook="float"):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    tensors = packing.pack(codes, bits), CODEBOOKS[codebook](2**bits), torch.rand(rows)
    return [tensor.to(device) for tensor in tensors]


READS = {"native": "panels", "torch": "planes", "triton": "tiles"}


@pytest.fixture
def implementation(kernels, request):
    """A device, what looks up on it, and the layout that this reads."""
    device = request.getfixturevalue("kernel_device") if kernels == "triton" else torch.device("cpu")
    return device, pe._launch if kernels == "triton" else pe._forward_cpu, READS[kernels]


def stored(problem, layout, bits, rows, columns, groups=1):
    """The problem with its codes in that layout."""
    packed, codebook, scale = problem
    return convert(packed, codebook, "planes", layout, bits, rows, columns, groups), codebook, scale


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (21, 13), (3, 1100)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_the_reference(implementation, bits, rows, columns, dtype):
    device, forward, layout = implementation
    table = problem(bits, rows, columns, device)
    indices = torch.randint(0, rows, (2, 3), device=device).to(dtype)
    actual = forward(indices, *stored(table, layout, bits, rows, columns), bits, columns, layout, 1)
    assert actual.shape == (2, 3, columns)
    assert torch.equal(actual, pe.reference(indices, *table, bits, columns))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", ["int8", "fp8"])
def test_stored_codebooks(implementation, bits, codebook):
    device, forward, layout = implementation
    table = problem(bits, 3, 900, device, codebook)
    indices = torch.arange(3, device=device)
    actual = forward(indices, *stored(table, layout, bits, 3, 900), bits, 900, layout, 1)
    assert torch.equal(actual, pe.reference(indices, *table, bits, 900))


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_any_layout_of_any_groups(implementation, layout, groups):
    device, forward, _ = implementation
    table = problem(5, 60, 7, device)
    indices = torch.arange(60, device=device)
    actual = forward(indices, *stored(table, layout, 5, 60, 7, groups), 5, 7, layout, groups)
    assert torch.equal(actual, pe.reference(indices, *table, 5, 7))


def test_any_stride(implementation, layout):
    device, forward, _ = implementation
    packed, codebook, _ = problem(4, 6, 5, device)
    codes = convert(packed, codebook, "planes", layout, 4, 6, 5)
    scale, indices = torch.full((1,), 0.5, device=device).expand(6), torch.tensor([[0, 5], [2, 3]], device=device).t()
    codebook = torch.stack([codebook, codebook], 1)[:, 1]
    assert torch.equal(
        forward(indices, codes, codebook, scale, 4, 5, layout, 1),
        pe.reference(indices, packed, codebook, scale, 4, 5),
    )


def test_a_subnormal_scale_counts_as_zero(implementation):
    device, forward, _ = implementation
    packed, codebook, _ = problem(4, 2, 5, device)
    scale = torch.tensor([1e-40, 1.0], device=device)
    rows = forward(torch.arange(2, device=device), packed, codebook, scale, 4, 5, "planes", 1)
    assert not rows[0].any()
    assert rows[1].all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single(implementation, shape):
    device, forward, _ = implementation
    indices = torch.zeros(shape, dtype=torch.int64, device=device)
    assert forward(indices, *problem(3, 4, 5, device), 3, 5, "planes", 1).shape == (*shape, 5)


@pytest.mark.parametrize("bad", [-1, 4])
def test_index_out_of_range(implementation, bad):
    device, forward, _ = implementation
    indices, table = torch.tensor([0, bad, 3], device=device), problem(3, 4, 5, device)
    if forward is pe._forward_cpu:
        with pytest.raises(IndexError, match=rf"indices must lie in \[0, 4\).*{bad}"):
            forward(indices, *table, 3, 5, "planes", 1)
    else:
        out = forward(indices, *table, 3, 5, "planes", 1)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_operator_registration(device, layout):
    indices = torch.tensor([[1, 2], [0, 3]], device=device).t()
    table = stored(problem(5, 4, 6, device), layout, 5, 4, 6)
    torch.library.opcheck(pe.packed_embedding, (indices, *table, 5, 6, layout, 1))


def test_rows_are_float32_whatever_the_default_dtype(implementation, set_default_dtype):
    device, forward, layout = implementation
    table = stored(problem(4, 5, 7, device), layout, 4, 5, 7)
    set_default_dtype(torch.float16)
    assert forward(torch.arange(5, device=device), *table, 4, 7, layout, 1).dtype == torch.float32
