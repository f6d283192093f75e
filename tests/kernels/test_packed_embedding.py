import pytest
import torch

from gq_triton.kernels import packed_embedding as pe
from gq_triton.kernels import packing


def problem(bits, rows, columns, device="cpu"):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    tensors = packing.pack(codes, bits), torch.linspace(-1, 1, 2**bits), torch.rand(rows)
    return [tensor.to(device) for tensor in tensors]


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    if request.param == "cpu":
        return torch.device("cpu"), pe._forward_cpu
    return request.getfixturevalue("kernel_device"), pe._launch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (11, 13), (3, 1100)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_equals_the_reference(implementation, bits, rows, columns, dtype):
    device, forward = implementation
    table = problem(bits, rows, columns, device)
    indices = torch.randint(0, rows, (2, 3), device=device).to(dtype)
    actual = forward(indices, *table, bits, columns)
    assert actual.shape == (2, 3, columns)
    assert torch.equal(actual, pe.reference(indices, *table, bits, columns))


def test_any_stride(implementation):
    device, forward = implementation
    packed, values, _ = problem(4, 6, 5, device)
    scale, indices = torch.full((1,), 0.5, device=device).expand(6), torch.tensor([[0, 5], [2, 3]], device=device).t()
    assert torch.equal(
        forward(indices, packed, values, scale, 4, 5), pe.reference(indices, packed, values, scale, 4, 5)
    )


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_empty_and_single(implementation, shape):
    device, forward = implementation
    indices = torch.zeros(shape, dtype=torch.int64, device=device)
    assert forward(indices, *problem(3, 4, 5, device), 3, 5).shape == (*shape, 5)


@pytest.mark.parametrize("bad", [-1, 4])
def test_index_out_of_range(implementation, bad):
    device, forward = implementation
    indices, table = torch.tensor([0, bad, 3], device=device), problem(3, 4, 5, device)
    if forward is pe._forward_cpu:
        with pytest.raises(IndexError, match=rf"indices must lie in \[0, 4\).*{bad}"):
            forward(indices, *table, 3, 5)
    else:
        out = forward(indices, *table, 3, 5)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


def test_operator_registration(device):
    indices = torch.tensor([[1, 2], [0, 3]], device=device).t()
    torch.library.opcheck(pe.packed_embedding, (indices, *problem(5, 4, 6, device), 5, 6))
