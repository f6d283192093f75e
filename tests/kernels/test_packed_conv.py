import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.kernels import backend, native, packing
from gq_triton.kernels import packed_conv as pc
from gq_triton.kernels.layouts import LAYOUTS, convert

CODEBOOKS = {
    "float": lambda levels: torch.linspace(-1, 1, levels),
    "int8": lambda levels: torch.linspace(-127, 127, levels).round().to(torch.int8),
    "fp8": lambda levels: torch.linspace(-256, 256, levels).to(torch.float8_e4m3fn),
}
TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-3, "rtol": 1e-3},
    torch.bfloat16: {"atol": 1e-2, "rtol": 2**-7},  # the interpreter cuts off instead of rounding
}


def weight(bits, rows, kernel_size, device="cpu", codebook="float"):
    """(packed, codebook, scale)"""
    codes = torch.randint(0, 2**bits, (rows, kernel_size), dtype=torch.uint8)
    tensors = packing.pack(codes, bits), CODEBOOKS[codebook](2**bits), torch.rand(rows)
    return [tensor.to(device) for tensor in tensors]


READS = {"native": "panels", "torch": "planes", "triton": "tiles"}
KNOWN = [name for name in LAYOUTS if name != "panels" or native.available()]


@pytest.fixture
def implementation(kernels, request):
    """A device, what convolves on it, and the layout that this reads."""
    device = request.getfixturevalue("kernel_device") if kernels == "triton" else torch.device("cpu")
    return device, pc._launch if kernels == "triton" else pc._forward_cpu, READS[kernels]


def assert_equals_reference(implementation, x, packed, codebook, scale, bias, bits, kernel_size, *options):
    _, forward, layout = implementation
    stored = convert(packed, codebook, "planes", layout, bits, len(scale), kernel_size)
    actual = forward(x, stored, codebook, scale, bias, bits, kernel_size, *options, layout)
    expected = pc.reference(x, packed, codebook, scale, bias, bits, kernel_size, *options)
    assert (actual.dtype, actual.device) == (x.dtype, x.device)
    torch.testing.assert_close(actual.double(), expected, **TOLERANCE[x.dtype])
    assert pc._channels_last(actual) == pc._channels_last(x)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_codebook(implementation, bits, codebook):
    device = implementation[0]
    x, bias = torch.randn(1, 19, 12, device=device), torch.randn(19, device=device)
    assert_equals_reference(implementation, x, *weight(bits, 19, 5, device, codebook), bias, bits, 5, 1, 2, 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "multiplier", "length", "kernel_size", "stride", "padding", "dilation"),
    [
        (1, 1, 1, 1, 1, 1, 0, 1),
        (2, 3, 1, 300, 3, 1, 1, 1),  # several blocks of time
        (2, 35, 2, 21, 4, 2, 0, 3),  # several blocks of channels
        (1, 3, 3, 5, 7, 3, 6, 2),  # some windows see only padding
        (1, 4, 1, 75, 70, 1, 0, 1),  # several column blocks of tiles
        (1, 70, 1, 9, 9, 1, 0, 1),  # a single moment
    ],
)
def test_shapes(
    implementation, dtype, channels_last, batch, channels, multiplier, length, kernel_size, stride, padding, dilation
):
    device, rows = implementation[0], channels * multiplier
    x = torch.randn(batch, channels, length, device=device).to(dtype)
    if channels_last:
        x = x.movedim(1, 2).contiguous().movedim(2, 1)
    bias = torch.randn(rows, device=device).to(dtype)
    tensors = *weight(3, rows, kernel_size, device), bias
    assert_equals_reference(implementation, x, *tensors, 3, kernel_size, stride, padding, dilation)


def problem(data):
    """A drawn input, weight and options."""
    kernel_size, stride, dilation = (data.draw(st.integers(1, high)) for high in (6, 4, 4))
    padding = data.draw(st.integers(0, dilation * (kernel_size - 1) + 2))
    shortest = max(1, dilation * (kernel_size - 1) + 1 - 2 * padding)
    length = shortest + data.draw(st.integers(0, 20))
    channels, multiplier, bits = (
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 8)),
    )
    x = torch.randn(data.draw(st.integers(1, 3)), channels, length)
    bias = torch.randn(channels * multiplier) if data.draw(st.booleans()) else None
    return x, *weight(bits, channels * multiplier, kernel_size), bias, bits, kernel_size, stride, padding, dilation


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("forward", [pc._forward_cpu, pc._launch])
def test_any_stride_padding_and_dilation(forward, data):
    device = torch.device("cuda" if torch.cuda.is_available() and forward is pc._launch else "cpu")
    if forward is pc._launch and device.type == "cpu" and not backend.INTERPRETED:
        pytest.skip("no GPU, and triton is missing or was imported without TRITON_INTERPRET=1")
    arguments = [each.to(device) if isinstance(each, torch.Tensor) else each for each in problem(data)]
    assert_equals_reference((device, forward, data.draw(st.sampled_from(KNOWN))), *arguments)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_cpu_equals_torch(data):
    x, packed, codebook, scale, bias, bits, kernel_size, *options = problem(data)
    decoded = scale[:, None] * codebook[packing.unpack(packed, bits, (len(scale), kernel_size)).long()]
    expected = torch.nn.functional.conv1d(x, decoded[:, None], bias, *options, groups=x.shape[1])
    assert expected.shape[2] == pc.output_length(x.shape[2], kernel_size, *options)
    actual = pc.packed_depthwise_conv1d(x, packed, codebook, scale, bias, bits, kernel_size, *options, "planes")
    torch.testing.assert_close(actual, expected)


def test_sums_stay_float32_under_autocast():
    x, (packed, codebook, scale) = torch.randn(2, 8, 20), weight(4, 8, 5)
    arguments = x, packed, codebook, scale, None, 4, 5, 1, 2, 1
    with torch.autocast("cpu", torch.bfloat16):
        actual = pc.packed_depthwise_conv1d(*arguments, "planes")
    torch.testing.assert_close(actual.double(), pc.reference(*arguments), **TOLERANCE[torch.float32])


def test_empty_batch(implementation):
    device, forward, layout = implementation
    packed, *table = weight(3, 6, 3, device)
    stored = convert(packed, table[0], "planes", layout, 3, 6, 3)
    y = forward(torch.zeros(0, 6, 9, device=device), stored, *table, None, 3, 3, 2, 1, 1, layout)
    assert y.shape == (0, 6, 5)


def test_strided_input_and_expanded_scale(implementation):
    device = implementation[0]
    x = torch.randn(3, 40, 12, device=device).permute(2, 0, 1)[::2, :, 1:]
    packed, codebook, _ = weight(4, 3, 5, device)
    scale = torch.tensor([0.5], device=device).expand(3)
    codebook = torch.stack([codebook, codebook], 1)[:, 1]
    assert_equals_reference(implementation, x, packed, codebook, scale, None, 4, 5, 1, 2, 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_only_its_windows(implementation, bad):
    device, forward, layout = implementation
    x = torch.ones(1, 2, 10, device=device)
    x[0, 1, 5] = bad
    packed, *table = weight(8, 2, 3, device)
    stored = convert(packed, table[0], "planes", layout, 8, 2, 3)
    y = forward(x, stored, *table, None, 8, 3, 1, 1, 1, layout)
    assert (~y.isfinite()).nonzero()[:, 1:].tolist() == [[1, 4], [1, 5], [1, 6]]


@pytest.mark.parametrize("options", [(1, 2, 1), (2, 0, 2)])
def test_gradients(device, options, layout):
    packed, codebook, scale = weight(4, 12, 5, device)
    stored = convert(packed, codebook, "planes", layout, 4, 12, 5)
    actual = [torch.randn(2, 6, 14, device=device), codebook, scale, torch.randn(12, device=device)]
    actual = [tensor.requires_grad_() for tensor in actual]
    exact = [tensor.detach().double().requires_grad_() for tensor in actual]
    expected = pc.reference(exact[0], packed, *exact[1:], 4, 5, *options)
    y = pc.packed_depthwise_conv1d(actual[0], stored, *actual[1:], 4, 5, *options, layout)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    y.backward(grad.float())
    for one, other in zip(actual, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone(wanted):
    packed, codebook, scale = weight(2, 6, 3)
    tensors = [torch.randn(2, 3, 7), codebook, scale, torch.randn(6)]
    options = 2, 3, 1, 0, 1, "planes"

    def gradients(indices):
        chosen = [tensor.clone().requires_grad_(index in indices) for index, tensor in enumerate(tensors)]
        y = pc.packed_depthwise_conv1d(chosen[0], packed, *chosen[1:], *options)
        return torch.autograd.grad(y.square().sum(), [chosen[index] for index in indices])

    assert torch.equal(gradients([wanted])[0], gradients(range(4))[wanted])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_registration(device, layout, channels_last, dtype):
    x = torch.randn(2, 6, 11, device=device).to(dtype)
    if channels_last:
        x = x.movedim(1, 2).contiguous().movedim(2, 1)
    packed, *table = weight(5, 6, 3, device)
    stored = convert(packed, table[0], "planes", layout, 5, 6, 3)
    bias = torch.randn(6, device=device, requires_grad=True)
    arguments = x.requires_grad_(), stored, *table, bias, 5, 3, 2, 1, 1, layout
    torch.library.opcheck(pc.packed_depthwise_conv1d, arguments, atol=1e-3, rtol=1e-2)
