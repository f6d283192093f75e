import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.kernels import activations, backend

DTYPES = ["int8", "fp8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    """(device, quantize_tokens, quantize_activations) of the CPU or of the kernel."""
    if request.param == "cpu":
        return torch.device("cpu"), activations.quantize_tokens, activations.quantize_activations
    return request.getfixturevalue("kernel_device"), activations.launch_quantize, activations._launch_fake


def bits(tensor):
    """What a tensor holds, bit for bit, with one NaN."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.nan, tensor.float()).to(tensor.dtype)
    return tensor.cpu().view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def interpreted(tensor):
    """As the interpreter has it, which knows no subnormal bfloat16."""
    if tensor.dtype == torch.bfloat16 and backend.INTERPRETED:
        return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0, tensor)
    return tensor


def cast(x, dtype):
    """As a kernel casts float32: the interpreter cuts bfloat16 off."""
    if dtype == torch.bfloat16 and backend.INTERPRETED:
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


def assert_kernel_equals_cpu(x, dtype, device):
    x = interpreted(x)
    q, scale = activations.launch_quantize(x.to(device), dtype)
    expected_q, expected_scale = activations.quantize_tokens(x, dtype)
    assert (q.dtype, q.shape) == (expected_q.dtype, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, x.shape[:-1])
    assert torch.equal(bits(scale), bits(expected_scale))
    assert torch.equal(bits(q), bits(expected_q))
    fake = activations._launch_fake(x.to(device), dtype)
    expected = cast(activations.quantize_activations(x.float(), dtype), x.dtype)
    assert fake.dtype == x.dtype
    assert fake.is_contiguous()
    assert torch.equal(bits(interpreted(fake)), bits(interpreted(expected)))


def adversarial():
    """Ties, neighbours of ties, subnormals, extremes of scale, and tokens that are not finite, one a row."""
    halves = torch.arange(-126.5, 127.5)
    eighths = torch.tensor([(8 + m / 2) / 8 * 2.0**e for e in range(-10, 9) for m in range(16)]).clamp(max=448.0)
    eighths = torch.cat([eighths, -eighths])
    spread = torch.cat([halves, eighths, torch.nextafter(eighths, torch.tensor(0.0)), torch.zeros(1)])
    rows = []
    for limit in (127.0, 448.0):
        for scale in (1.0, 2.0**-100, 2.0**-126, 2.0**-127, 2.0**-149, 2.0**118, 0.3, 1e-37, 7e35):
            rows.append(torch.cat([spread.clamp(-limit, limit), torch.tensor([limit])]) * scale)
    for bad in (torch.inf, -torch.inf, torch.nan, -torch.nan):
        rows.append(torch.cat([spread, torch.tensor([bad])]))
    rows += [torch.zeros_like(rows[0]), -torch.zeros_like(rows[0]), torch.full_like(rows[0], 2.0**-149)]
    return torch.stack(rows)


# --- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.float64])
def test_values(dtype, x_dtype):
    x = torch.randn(3, 5, 33).to(x_dtype)
    scale = x.double().abs().amax(-1, keepdim=True) / activations.LIMITS[dtype]
    unit = x.double() / scale
    rounded = unit.round() if dtype == "int8" else unit.to(torch.float8_e4m3fn).double()
    result = activations.quantize_activations(x, dtype)
    assert result.dtype == x_dtype
    step = scale * (1 if dtype == "int8" else 32)  # a tie may fall either way
    assert ((result.double() - rounded * scale).abs() <= step + x.double().abs() * 2**-7).all()
    assert ((result.double() - rounded * scale).abs() > scale * 0.1 + x.double().abs() * 2**-7).float().mean() < 0.01


def test_int8_by_hand(implementation):
    device, quantize, fake_quantize = implementation
    x = torch.tensor([[127.0, -127.0, 1.4, -2.6, 0.0], [0.5, 0.25, -0.001, 0.0, 0.0]], device=device)
    q, scale = quantize(x, "int8")
    assert q.tolist() == [[127, -127, 1, -3, 0], [127, 64, 0, 0, 0]]
    torch.testing.assert_close(scale.cpu(), torch.tensor([1.0, 0.5 / 127]), rtol=1e-7, atol=0)
    fake = fake_quantize(x, "int8")
    torch.testing.assert_close(fake, q * scale[:, None], rtol=0, atol=0)
    assert not fake.signbit()[fake == 0].any()


def test_fp8_by_hand(implementation):
    device, quantize, fake_quantize = implementation
    x = torch.tensor([448.0, 17.0, -19.0, 1.0 + 1 / 16, -3 * 2.0**-10, -(2.0**-11), 0.0], device=device)
    rounded = [448.0, 16.0, -20.0, 1.0, -(2.0**-8), 0.0, 0.0]  # 3 bits of mantissa, least 2^-9; ties go to even
    q, scale = quantize(x, "fp8")
    assert (q.float().tolist(), scale.item()) == (rounded, 1.0)
    assert fake_quantize(x, "fp8").tolist() == rounded


@pytest.mark.parametrize("dtype", DTYPES)
def test_idempotent(dtype):
    once = activations.quantize_activations(torch.randn(4, 64), dtype)
    torch.testing.assert_close(activations.quantize_activations(once, dtype), once)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiny", [0.0, -0.0, 2.0**-149, -(2.0**-127)])
def test_a_token_without_a_normal_scale_becomes_zero(implementation, dtype, tiny):
    device, quantize, fake_quantize = implementation
    x = torch.full((2, 3), tiny, device=device)
    for tensor in (*quantize(x, dtype), fake_quantize(x, dtype)):
        assert torch.equal(bits(tensor), torch.zeros_like(bits(tensor)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_becomes_nan(implementation, dtype, bad):
    device, quantize, fake_quantize = implementation
    x = torch.ones(2, 4, device=device)
    x[0, 1] = bad
    q, scale = quantize(x, dtype)
    assert (q[0].float() == 0).all()
    assert scale.isnan().tolist() == [True, False]
    fake = fake_quantize(x, dtype)
    assert fake[0].isnan().all()
    assert torch.equal(fake[1], x[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 5)])
def test_empty(implementation, dtype, shape):
    device, quantize, fake_quantize = implementation
    x = torch.zeros(shape, device=device)
    q, scale = quantize(x, dtype)
    assert (q.shape, q.dtype) == (x.shape, activations.STORED[dtype])
    assert torch.equal(scale.cpu(), torch.zeros(shape[:-1]))
    assert fake_quantize(x, dtype).shape == shape


# --- kernel and CPU ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (7,), (1, 33), (3, 5, 130), (2, 3, 2, 17), (2, 4099)])
def test_kernel_equals_cpu(kernel_device, dtype, x_dtype, shape):
    assert_kernel_equals_cpu((torch.randn(shape) * 3).to(x_dtype), dtype, kernel_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", FLOATS)
def test_kernel_equals_cpu_on_adversarial_tokens(kernel_device, dtype, x_dtype):
    assert_kernel_equals_cpu(adversarial().to(x_dtype), dtype, kernel_device)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # signaling NaN
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_kernel_equals_cpu_on_every_16_bit_number(kernel_device, dtype, x_dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(x_dtype)
    assert_kernel_equals_cpu(numbers.view(-1, 256), dtype, kernel_device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.movedim(1, -1),  # channels last, as convolutions see them
        lambda x: x[:, ::2, 3:],
        lambda x: x[:, 1],
        lambda x: x[0, 0, ::2],
        lambda x: x[:, :1].expand(2, 5, 90),
        lambda x: x.unflatten(-1, (9, 10)).movedim(1, -1),
        lambda x: x.unflatten(-1, (9, 10)).permute(3, 0, 2, 1),
    ],
)
def test_any_stride(kernel_device, dtype, view):
    assert_kernel_equals_cpu(view(torch.randn(2, 6, 90)), dtype, kernel_device)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the largest number may round up
@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_cpu_on_any_tokens(dtype, data):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not backend.INTERPRETED:
        pytest.skip("no GPU, and triton is missing or was imported without TRITON_INTERPRET=1")
    columns = data.draw(st.integers(1, 20))
    token = st.lists(st.floats(width=32), min_size=columns, max_size=columns)
    x = torch.tensor(data.draw(st.lists(token, min_size=1, max_size=5)), dtype=torch.float32)
    assert_kernel_equals_cpu(x, dtype, device)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), exponent=st.integers(-120, 118))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_clipped_and_the_error_is_half_a_step(dtype, data, exponent):
    finite = st.floats(-1, 1, width=32)
    x = torch.tensor(data.draw(st.lists(finite, min_size=1, max_size=9)), dtype=torch.float32) * 2.0**exponent
    q, scale = activations.quantize_tokens(x, dtype)
    if scale:
        error = (q.double() * scale.double() - x.double()).abs() / scale.double()
        size = (x.double() / scale.double()).abs()
        step = 1.0 if dtype == "int8" else torch.exp2(size.log2().floor().clamp(min=-6)) / 8
        assert (error <= step / 2 * (1 + 1e-5) + 1e-5).all()
        assert q.float().abs().max() == activations.LIMITS[dtype]


def test_float64_is_refused_on_a_gpu(kernel_device):
    with pytest.raises(TypeError, match="float64 is computed on the CPU only"):
        activations.launch_quantize(torch.ones(2, dtype=torch.float64, device=kernel_device), "int8")


# --- operator ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_passes_straight_through(device, dtype):
    x, grad = torch.randn(2, 6, device=device, requires_grad=True), torch.randn(2, 6, device=device)
    activations.quantize_activations(x, dtype).backward(grad)
    assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operator_registration(device, dtype):
    x = torch.randn(4, 3, device=device).t().requires_grad_()
    torch.library.opcheck(activations.quantize_activations, (x, dtype))
