import pytest
import torch

from gq_triton.kernels import packed_embedding as pe
from gq_triton.kernels import packing, tiles

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


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    """A device, what looks up on it, and whether that reads tiles."""
    if request.param == "cpu":
        return torch.device("cpu"), pe._forward_cpu, False
    return request.getfixturevalue("kernel_device"), pe._launch, True


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (21, 13), (3, 1100)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_the_reference(implementation, bits, rows, columns, dtype):
    device, forward, tiled = implementation
    packed, *table = problem(bits, rows, columns, device)
    stored = tiles.tile(packed, bits, rows, columns) if tiled else packed
    indices = torch.randint(0, rows, (2, 3), device=device).to(dtype)
    actual = forward(indices, stored, *table, bits, columns, tiled, 1)
    assert actual.shape == (2, 3, columns)
    assert torch.equal(actual, pe.reference(indices, packed, *table, bits, columns))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", ["int8", "fp8"])
def test_stored_codebooks(implementation, bits, codebook):
    device, forward, tiled = implementation
    packed, *table = problem(bits, 3, 900, device, codebook)
    stored = tiles.tile(packed, bits, 3, 900) if tiled else packed
    indices = torch.arange(3, device=device)
    actual = forward(indices, stored, *table, bits, 900, tiled, 1)
    assert torch.equal(actual, pe.reference(indices, packed, *table, bits, 900))


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("tiled", [False, True])
def test_either_layout_of_any_groups(implementation, tiled, groups):
    device, forward, _ = implementation
    packed, *table = problem(5, 60, 7, device)
    indices = torch.arange(60, device=device)
    stored = tiles.tile(packed, 5, 60, 7, groups) if tiled else packed
    actual = forward(indices, stored, *table, 5, 7, tiled, groups)
    assert torch.equal(actual, pe.reference(indices, packed, *table, 5, 7))


@pytest.mark.parametrize("tiled", [False, True])
def test_any_stride(implementation, tiled):
    device, forward, _ = implementation
    packed, codebook, _ = problem(4, 6, 5, device)
    stored = tiles.tile(packed, 4, 6, 5) if tiled else packed
    scale, indices = torch.full((1,), 0.5, device=device).expand(6), torch.tensor([[0, 5], [2, 3]], device=device).t()
    codebook = torch.stack([codebook, codebook], 1)[:, 1]
    assert torch.equal(
        forward(indices, stored, codebook, scale, 4, 5, tiled, 1),
        pe.reference(indices, packed, codebook, scale, 4, 5),
    )


def test_a_subnormal_scale_counts_as_zero(implementation):
    device, forward, _ = implementation
    packed, codebook, _ = problem(4, 2, 5, device)
    scale = torch.tensor([1e-40, 1.0], device=device)
    rows = forward(torch.arange(2, device=device), packed, codebook, scale, 4, 5, False, 1)
    assert not rows[0].any()
    assert rows[1].all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single(implementation, shape):
    device, forward, _ = implementation
    indices = torch.zeros(shape, dtype=torch.int64, device=device)
    assert forward(indices, *problem(3, 4, 5, device), 3, 5, False, 1).shape == (*shape, 5)


@pytest.mark.parametrize("bad", [-1, 4])
def test_index_out_of_range(implementation, bad):
    device, forward, _ = implementation
    indices, table = torch.tensor([0, bad, 3], device=device), problem(3, 4, 5, device)
    if forward is pe._forward_cpu:
        with pytest.raises(IndexError, match=rf"indices must lie in \[0, 4\).*{bad}"):
            forward(indices, *table, 3, 5, False, 1)
    else:
        out = forward(indices, *table, 3, 5, False, 1)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tiled", [False, True])
def test_operator_registration(device, tiled):
    indices = torch.tensor([[1, 2], [0, 3]], device=device).t()
    packed, *table = problem(5, 4, 6, device)
    stored = tiles.tile(packed, 5, 4, 6) if tiled else packed
    torch.library.opcheck(pe.packed_embedding, (indices, stored, *table, 5, 6, tiled, 1))


def test_rows_are_float32_whatever_the_default_dtype(implementation, set_default_dtype):
    device, forward, tiled = implementation
    packed, *table = problem(4, 5, 7, device)
    stored = tiles.tile(packed, 4, 5, 7) if tiled else packed
    set_default_dtype(torch.float16)
    assert forward(torch.arange(5, device=device), stored, *table, 4, 7, tiled, 1).dtype == torch.float32
