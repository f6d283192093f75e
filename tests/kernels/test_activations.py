import pytest
import torch

from gq_triton.kernels import activations

DTYPES = ["int8", "fp8"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values(device, dtype, x_dtype):
    x = torch.randn(3, 5, 33, device=device).to(x_dtype)
    scale = x.double().abs().amax(-1, keepdim=True) / activations.LIMITS[dtype]
    unit = x.double() / scale
    rounded = unit.round() if dtype == "int8" else unit.to(torch.float8_e4m3fn).double()
    result = activations.quantize_activations(x, dtype)
    assert result.dtype == x_dtype
    step = scale * (1 if dtype == "int8" else 32)  # a tie may fall either way
    assert ((result.double() - rounded * scale).abs() <= step + x.double().abs() * 2**-7).all()
    assert ((result.double() - rounded * scale).abs() > scale * 0.1 + x.double().abs() * 2**-7).float().mean() < 0.01


def test_int8_by_hand():
    x = torch.tensor([[127.0, -127.0, 1.4, -2.6, 0.0], [0.5, 0.25, 0.0, 0.0, 0.0]])
    quantized = activations.quantize_activations(x, "int8")
    assert torch.equal(quantized[0], torch.tensor([127.0, -127.0, 1.0, -3.0, 0.0]))
    torch.testing.assert_close(quantized[1], torch.tensor([127, 64, 0, 0, 0]) * 0.5 / 127)


def test_fp8_by_hand():
    x = torch.tensor([448.0, 17.0, -19.0, 1.0 + 1 / 16, 0.0])
    quantized = activations.quantize_activations(x, "fp8")
    assert quantized.tolist() == [448.0, 16.0, -20.0, 1.0, 0.0]  # e4m3 has 3 bits of mantissa; ties go to even


@pytest.mark.parametrize("dtype", DTYPES)
def test_idempotent(dtype):
    once = activations.quantize_activations(torch.randn(4, 64), dtype)
    torch.testing.assert_close(activations.quantize_activations(once, dtype), once)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zero_and_empty_stays_empty(dtype):
    assert torch.equal(activations.quantize_activations(torch.zeros(2, 3), dtype), torch.zeros(2, 3))
    for shape in [(0, 4), (4, 0)]:
        assert activations.quantize_activations(torch.zeros(shape), dtype).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_becomes_nan(dtype, bad):
    x = torch.ones(2, 4)
    x[0, 1] = bad
    quantized = activations.quantize_activations(x, dtype)
    assert quantized[0].isnan().all()
    assert torch.equal(quantized[1], x[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_straight_through(dtype):
    x, grad = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    activations.quantize_activations(x, dtype).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_registration(device, dtype):
    x = torch.randn(4, 3, device=device).t().requires_grad_()
    torch.library.opcheck(activations.quantize_activations, (x, dtype))
