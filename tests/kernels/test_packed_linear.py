import pytest
import torch

from gq_triton.kernels import packed_linear as pl
from gq_triton.kernels import packing

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1, 1), (3, 37, 70), (20, 5, 129)]
LONG = [(65, 33, 64), (1, 256, 300), (130, 40, 17)]
CASES = [pytest.param(*case) for case in SHAPES] + [pytest.param(*case, marks=pytest.mark.full) for case in LONG]


def problem(bits, m, n, k, dtype=torch.float32, device="cpu"):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    values = torch.linspace(-1, 1, 2**bits).to(dtype).float()  # 16-bit inputs meet 16-bit codebooks on tensor cores
    tensors = torch.randn(m, k, dtype=dtype), packing.pack(codes, bits), values, torch.rand(n), torch.randn(n)
    return [tensor.to(device) for tensor in tensors]


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    if request.param == "cpu":
        return torch.device("cpu"), pl._forward_cpu
    return request.getfixturevalue("kernel_device"), pl._launch


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_matches_the_reference(implementation, bits, dtype, m, n, k):
    device, forward = implementation
    inputs = problem(bits, m, n, k, dtype, device)
    for bias in (inputs[4], inputs[4].to(dtype), None):
        actual = forward(*inputs[:4], bias, bits, "none")
        expected = pl.reference(*inputs[:4], bias, bits, "none")
        assert actual.dtype == dtype
        bound = TOLERANCE[dtype] * (1 + expected.abs().max())
        assert ((actual.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
def test_epilogues(implementation, epilogue):
    device, forward = implementation
    inputs = problem(4, 6, 20, 30, device=device)
    expected = pl.reference(*inputs, 4, epilogue)
    torch.testing.assert_close(forward(*inputs, 4, epilogue).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
def test_gradients_reach_inputs_and_bias(epilogue, device):
    x, *weight, bias = problem(4, 6, 20, 30, device=device)
    gradients = []
    for function in (pl.packed_linear, pl.reference):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        function(leaves[0], *weight, leaves[1], 4, epilogue).double().square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epilogue", ["none", "relu"])
def test_not_a_number_propagates(implementation, epilogue):
    device, forward = implementation
    inputs = problem(2, 3, 4, 5, device=device)
    inputs[0][1, 2] = torch.nan
    out = forward(*inputs, 2, epilogue)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_any_stride_and_any_leading_shape(implementation):
    device, forward = implementation
    x, packed, values, _, bias = problem(3, 12, 7, 10, device=device)
    scale = torch.full((1,), 0.5, device=device).expand(7)
    expected = pl.reference(x, packed, values, scale, bias, 3, "none")
    batched = x.view(3, 4, 10).transpose(0, 1)
    actual = forward(batched, packed, values, scale, bias, 3, "none")
    assert actual.shape == (4, 3, 7)
    torch.testing.assert_close(actual.transpose(0, 1).reshape(12, 7).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (2, 0, 4)])
def test_empty(implementation, m, n, k):
    device, forward = implementation
    inputs = problem(4, m, n, k, device=device)
    assert forward(*inputs, 4, "none").shape == (m, n)


def test_without_inputs_the_bias_is_left(implementation):
    device, forward = implementation
    inputs = problem(4, 2, 3, 0, device=device)
    assert torch.equal(forward(*inputs, 4, "none"), inputs[4].expand(2, 3))


@pytest.mark.parametrize("chunk", [1, 100])
def test_chunks_of_rows_do_not_change_the_result(monkeypatch, chunk):
    inputs = problem(5, 4, 9, 33)
    whole = pl._forward_cpu(*inputs, 5, "none")
    monkeypatch.setattr(pl, "CHUNK", chunk)
    torch.testing.assert_close(pl._forward_cpu(*inputs, 5, "none"), whole)


def test_operator_registration(device):
    x, packed, values, scale, bias = problem(3, 4, 5, 6, device=device)
    for arguments in [(x, packed, values, scale, bias), (x.t().contiguous().t(), packed, values, scale, None)]:
        torch.library.opcheck(pl.packed_linear, (*arguments, 3, "relu"))
    torch.library.opcheck(
        pl.packed_linear, (x.requires_grad_(), packed, values, scale, bias.requires_grad_(), 3, "gelu")
    )
