"""The packed linear operator: by native kernels, by torch on the CPU and, in the interpreter or on a GPU, by Triton."""

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gq_triton.kernels import activations as token_quantizer
from gq_triton.kernels import native, packing, tiles
from gq_triton.kernels import packed_linear as pl
from gq_triton.kernels.layouts import LAYOUTS, convert
from gq_triton.kernels.packed_linear_triton import Plan, candidates, launch, multiplies_bytes, plan

# Largest error allowed, as a part of 1 + the largest output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CODEBOOKS = (torch.float32, torch.int8, torch.float8_e4m3fn)
ACTIVATIONS = ("none", "int8", "fp8")
SHAPES = [(1, 1, 1), (3, 20, 70), (66, 5, 129)]
LONG = [(20, 37, 129), (65, 33, 64), (1, 256, 300), (130, 40, 17)]
CASES = [pytest.param(*case) for case in SHAPES] + [pytest.param(*case, marks=pytest.mark.full) for case in LONG]
KNOWN = [name for name in LAYOUTS if name != "panels" or native.available()]
WIDTHS = [pytest.param(bits, marks=() if bits in (1, 4, 7) else pytest.mark.full) for bits in range(1, 9)]
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]


class Problem(NamedTuple):
    x: Tensor
    packed: Tensor
    codebook: Tensor
    scale: Tensor
    bias: Tensor | None


def problem(bits, m, n, k, dtype=torch.float32, codebook=torch.float32, device="cpu"):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    if codebook == torch.float32:
        entries = torch.linspace(-1, 1, 2**bits).to(dtype).float()  # tensor cores take it in the dtype of x
    else:
        entries = torch.linspace(-127, 127, 2**bits).to(codebook)
    tensors = torch.randn(m, k, dtype=dtype), packing.pack(codes, bits), entries, torch.rand(n) + 0.1, torch.randn(n)
    return Problem(*(tensor.to(device) for tensor in tensors))


def close(actual, expected, dtype, tolerance=0.0):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    bound = max(tolerance, TOLERANCE[dtype]) * (1 + expected.abs().max()) if expected.numel() else 0
    assert ((actual.double() - expected).abs() <= bound).all()


def stored(inputs, layout, bits):
    """The problem with its codes in that layout."""
    shape = bits, inputs.scale.numel(), inputs.x.shape[-1]
    return inputs._replace(packed=convert(inputs.packed, inputs.codebook, "planes", layout, *shape))


def _cpu(x, packed, codebook, scale, bias, bits, epilogue="none", activations="none"):
    layout = "panels" if native.available() else "planes"
    inputs = stored(Problem(x, packed, codebook, scale, bias), layout, bits)
    return pl._forward_cpu(*inputs, bits, epilogue, activations, layout)


def _triton(x, packed, codebook, scale, bias, bits, epilogue="none", activations="none", chosen=None):
    tiled = tiles.tile(packed, bits, scale.numel(), x.shape[-1])
    return launch(x, tiled, codebook, scale, bias, bits, epilogue, activations, chosen)


@pytest.fixture
def implementation(kernels, request):
    if kernels == "triton":
        return request.getfixturevalue("kernel_device"), _triton
    return torch.device("cpu"), _cpu


# --- forward ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), CASES)
def test_matches_the_reference(implementation, bits, dtype, m, n, k):
    device, forward = implementation
    inputs = problem(bits, m, n, k, dtype, device=device)
    for bias in (inputs.bias.to(dtype), None):
        arguments = inputs._replace(bias=bias)
        close(forward(*arguments, bits), pl.reference(*arguments, bits), dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_codebooks_and_activations(implementation, bits, dtype, codebook, activations):
    device, forward = implementation
    e4m3 = device.type == "cuda" and (codebook, activations) == (torch.float8_e4m3fn, "fp8")
    tolerance = 4e-3 if e4m3 else 0.0  # some tensor cores keep 14 bits of sums of e4m3 products
    for m in (1, 70):
        inputs = problem(bits, m, 18, 70, dtype, codebook, device)
        expected = pl.reference(*inputs, bits, "silu", activations)
        close(forward(*inputs, bits, "silu", activations), expected, dtype, tolerance)


@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("m", [1, 6, 70])
def test_epilogues(implementation, epilogue, biased, m):
    device, forward = implementation
    inputs = problem(4, m, 38, 30, device=device)
    inputs = inputs if biased else inputs._replace(bias=None)
    close(forward(*inputs, 4, epilogue), pl.reference(*inputs, 4, epilogue), torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
def test_every_combination(implementation, bits, dtype, codebook, activations, epilogue):
    device, forward = implementation
    inputs = problem(bits, 5, 18, 70, dtype, codebook, device)
    expected = pl.reference(*inputs, bits, epilogue, activations)
    close(forward(*inputs, bits, epilogue, activations), expected, dtype)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 20), st.integers(0, 40), st.integers(0, 300), st.sampled_from(CODEBOOKS))
def test_any_shape_in_any_layout(bits, m, n, k, codebook):
    inputs = problem(bits, m, n, k, codebook=codebook)
    actual, *others = (pl.packed_linear(*stored(inputs, name, bits), bits, "none", "none", name) for name in KNOWN)
    assert all(torch.equal(actual, other) for other in others)
    close(actual, pl.reference(*inputs, bits), torch.float32)


@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_not_a_number_propagates(implementation, epilogue, activations):
    device, forward = implementation
    inputs = problem(2, 3, 4, 5, device=device)
    inputs.x[1, 2] = torch.nan
    out = forward(*inputs, 2, epilogue, activations)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


def test_any_stride_and_any_leading_shape(implementation):
    device, forward = implementation
    inputs = problem(3, 12, 7, 10, device=device)
    inputs = inputs._replace(scale=torch.full((1,), 0.5, device=device).expand(7))
    batched = inputs._replace(x=inputs.x.view(3, 4, 10).transpose(0, 1))
    actual = forward(*batched, 3)
    assert actual.shape == (4, 3, 7)
    close(actual.transpose(0, 1).reshape(12, 7), pl.reference(*inputs, 3), torch.float32)
    columns = inputs._replace(x=inputs.x.t().contiguous().t())
    close(forward(*columns, 3), pl.reference(*inputs, 3), torch.float32)
    vector = inputs._replace(x=inputs.x[4])
    close(forward(*vector, 3), pl.reference(*inputs, 3)[4], torch.float32)
    interleaved = inputs._replace(codebook=torch.stack([inputs.codebook, inputs.codebook + 1], 1)[:, 0])
    close(forward(*interleaved, 3), pl.reference(*inputs, 3), torch.float32)


@pytest.mark.parametrize(("bits", "columns"), [(1, 33 * 256), (4, 33 * 64), (5, 33 * 256)])
def test_columns_split_over_programs_of_which_the_last_have_none(kernel_device, bits, columns):
    inputs = problem(bits, 9, 20, columns, torch.bfloat16, device=kernel_device)
    split = Plan("gemv", 128, 8, 4, 1, 16)  # parts of 3 steps, of which there are 33
    close(_triton(*inputs, bits, chosen=split), pl.reference(*inputs, bits), torch.bfloat16)


def test_integers_are_multiplied_where_their_sums_fit():
    cpu, most = torch.device("cpu"), 132_000
    assert multiplies_bytes("int8", "int8", 1, most, cpu)
    assert not multiplies_bytes("int8", "int8", 1, most + 1000, cpu)  # 127 * 127 * 133 000 is above 2^31 already
    assert not multiplies_bytes("int8", "float", 1, 1, cpu)


def test_sums_are_float32_whatever_the_default_dtype(kernel_device, set_default_dtype):
    inputs = problem(4, 3, 20, 300, device=kernel_device)
    set_default_dtype(torch.float16)
    close(_triton(*inputs, 4, chosen=Plan("gemv", 128, 8, 4, 1, 2)), pl.reference(*inputs, 4), torch.float32)
    actual, expected = (gradients(inputs, [inputs.scale], 4, "none", "none", f)[0] for f in (None, pl.reference))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("epilogue", ["none", "glu"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 6), (2, 0, 6), (0, 0, 0)])
def test_empty(implementation, m, n, k, epilogue, activations):
    device, forward = implementation
    inputs = problem(4, m, n, k, device=device)
    assert forward(*inputs, 4, epilogue, activations).shape == (m, n // 2 if epilogue == "glu" else n)


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_without_inputs_the_bias_is_left(implementation, activations):
    device, forward = implementation
    inputs = problem(4, 2, 3, 0, device=device)
    assert torch.equal(forward(*inputs, 4, "none", activations), inputs.bias.expand(2, 3))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_unit_vector_reads_the_weight_bit_for_bit(bits, codebook):
    inputs = problem(bits, 1, 9, 33, codebook=codebook)._replace(x=torch.eye(33), bias=None)
    codes = packing.unpack(inputs.packed, bits, (9, 33)).long()
    decoded = inputs.scale[:, None] * pl.stored_values(inputs.codebook)[codes]
    read = _cpu(*inputs, bits).t()
    if codebook == torch.int8 and native.available():  # which multiplies by scale / 127
        torch.testing.assert_close(read, decoded, rtol=2.5e-7, atol=0)
    else:
        assert torch.equal(read, decoded)


@pytest.mark.parametrize("chunk", [1, 100])
def test_blocks_of_rows_do_not_change_the_result(monkeypatch, chunk):
    inputs = problem(5, 4, 9, 33)
    leaves = [inputs.x, inputs.codebook, inputs.scale, inputs.bias]
    monkeypatch.setattr(native, "available", lambda: False)
    whole = [_cpu(*inputs, 5), *gradients(inputs, leaves, 5, "none")]
    monkeypatch.setitem(pl.CHUNK, "cpu", chunk)
    for actual, expected in zip([_cpu(*inputs, 5), *gradients(inputs, leaves, 5, "none")], whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_summed_exactly(bits, biased):
    inputs = problem(bits, 9, 35, 300, codebook=torch.int8)
    inputs = inputs if biased else inputs._replace(bias=None)
    q, token_scale = token_quantizer.quantize_tokens(inputs.x, "int8")
    weight = inputs.codebook[packing.unpack(inputs.packed, bits, (35, 300)).int()]
    sums = (q.double() @ weight.double().t()).float()  # of integers, each exact
    expected = sums * (token_scale[:, None] * (inputs.scale / 127))
    assert torch.equal(_cpu(*inputs, bits, "none", "int8"), expected + inputs.bias if biased else expected)


@pytest.mark.skipif(not native.available(), reason="no native library")
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 100),
    st.sampled_from(CODEBOOKS),
    st.sampled_from(ACTIVATIONS),
    st.data(),
)
def test_a_token_does_not_depend_on_its_neighbours(bits, n, k, codebook, activations, data):
    inputs = problem(bits, 33, n, k, codebook=codebook)
    first = data.draw(st.integers(0, 32))
    part = slice(first, data.draw(st.integers(first + 1, 33)))
    alone = _cpu(*inputs._replace(x=inputs.x[part]), bits, "none", activations)
    assert torch.equal(alone, _cpu(*inputs, bits, "none", activations)[part])


# --- gradients --------------------------------------------------------------------------------------------------------


def gradients(inputs, leaves, bits, epilogue, activations="none", function=None, layout="planes"):
    """The gradients of a fixed weighting of the output in ``leaves``, which are among ``inputs``."""
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(*inputs, bits, epilogue, activations) if function else None
    if out is None:
        out = pl.packed_linear(*stored(inputs, layout, bits), bits, epilogue, activations, layout)
    weighting = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape)
    found = torch.autograd.grad((out.double() * weighting).sum(), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return found


def compare_gradients(inputs, leaves, bits, epilogue, activations="none", layout="planes"):
    actual = gradients(inputs, leaves, bits, epilogue, activations, layout=layout)
    expected = gradients(inputs, leaves, bits, epilogue, activations, pl.reference)
    for leaf, mine, theirs in zip(leaves, actual, expected, strict=True):
        assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
        bound = 10 * TOLERANCE[inputs.x.dtype] * (1 + theirs.abs().max())
        assert ((mine - theirs).abs() <= bound).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("epilogue", pl.EPILOGUES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_gradients(bits, epilogue, activations, device):
    inputs = problem(bits, 6, 20, 30, device=device)
    leaves = [inputs.x, inputs.codebook, inputs.scale, inputs.bias]
    for layout in KNOWN:
        compare_gradients(inputs, leaves, bits, epilogue, activations, layout)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_gradients_in_every_dtype(dtype, codebook, device):
    inputs = problem(4, 6, 20, 30, dtype, codebook, device)
    inputs = inputs._replace(bias=inputs.bias.to(dtype))
    compare_gradients(inputs, [inputs.x, inputs.scale, inputs.bias], 4, "gelu")


LEAVES = ("x", "codebook", "scale", "bias")


@pytest.mark.parametrize("names", [names for count in (1, 2) for names in itertools.combinations(LEAVES, count)])
def test_only_the_gradients_asked_for_are_computed(names, monkeypatch, device):
    inputs = problem(3, 4, 6, 10, device=device)
    computed = []
    for name in ("input", "codebook", "scale"):
        function = getattr(pl, f"_{name}_gradient")
        monkeypatch.setattr(pl, f"_{name}_gradient", lambda *a, f=function, n=name: computed.append(n) or f(*a))
    compare_gradients(inputs, [getattr(inputs, name) for name in names], 3, "tanh")
    assert computed == ["input" if name == "x" else name for name in names if name != "bias"]


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_gradients_of_empty_tensors(m, n, k, device):
    inputs = problem(2, m, n, k, device=device)
    leaves = [inputs.x, inputs.codebook, inputs.scale, inputs.bias]
    found = gradients(inputs, leaves, 2, "none")
    for leaf, gradient in zip(leaves, found, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.isfinite().all()
    assert not any(gradient.any() for gradient in found[:3])


def test_gradients_without_a_bias_and_with_one_scale(device):
    inputs = problem(3, 4, 6, 10, device=device)
    scale = torch.tensor([0.5], device=device, requires_grad=True)
    out = [f(*inputs._replace(scale=scale.expand(6), bias=None), 3, "relu", "none", *rest) for f, *rest in FUNCTIONS]
    mine, theirs = (torch.autograd.grad(y.double().square().sum(), scale)[0] for y in out)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


FUNCTIONS = ((pl.packed_linear, "planes"), (pl.reference,))


def test_gradients_are_the_same_each_time(device):
    inputs = problem(6, 33, 70, 130, device=device)
    leaves = [inputs.x, inputs.codebook, inputs.scale, inputs.bias]
    first, second = (gradients(inputs, leaves, 6, "silu") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_second_derivatives_are_refused(device):
    inputs = problem(2, 3, 4, 5, device=device)
    x = inputs.x.requires_grad_()
    out = pl.packed_linear(*inputs, 2, "silu", "none", "planes")
    (dx,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="packed_linear_backward"):
        dx.sum().backward()


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "glu"])
def test_operator_registration(epilogue, activations, layout, device):
    inputs = stored(problem(3, 4, 6, 5, device=device), layout, 3)
    for arguments in (inputs, inputs._replace(x=inputs.x.t().contiguous().t(), bias=None)):
        torch.library.opcheck(pl.packed_linear, (*arguments, 3, epilogue, activations, layout))
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in LEAVES}
    torch.library.opcheck(pl.packed_linear, (*inputs._replace(**leaves), 3, epilogue, activations, layout))


@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, True]])
def test_gradient_registration(wanted, layout, device):
    inputs = stored(problem(3, 4, 6, 5, device=device), layout, 3)
    grad = torch.randn(4, 6, device=device)
    for arguments in (inputs, inputs._replace(x=inputs.x.t().contiguous().t())):
        torch.library.opcheck(pl.packed_linear_backward, (grad, *arguments, 3, "relu", "none", layout, wanted))


@pytest.mark.parametrize(
    ("tokens", "activations", "expected"), [(1, "none", False), (4096, "none", True), (4096, "int8", False)]
)
def test_where_a_dense_copy_is_preferred(tokens, activations, expected, cpu_kernels):
    assert pl.prefers_dense(tokens, activations, torch.device("cuda")) is expected
    assert pl.prefers_dense(tokens, activations, torch.device("cpu")) is (expected or not cpu_kernels)


@pytest.mark.parametrize(
    "chosen, bits, operand, needed",
    [
        (Plan("gemm", 256, 128, 8, 3), 4, "bf16", 98304),
        (Plan("gemm", 256, 128, 8, 3), 1, "bf16", 245760),
        (Plan("gemm", 256, 128, 8, 3), 3, "fp16", 278528),
        (Plan("gemm", 256, 128, 8, 3), 2, "fp32", 278528),
        (Plan("gemv", 256, 16, 8, 3, 16), 1, "bf16", 327680),
    ],
)
def test_no_more_stages_than_fit(chosen, bits, operand, needed):
    """What Triton 3.6 says that kernels take for sm_90."""
    assert chosen.fitting_stages(bits, operand, needed) == 3
    assert chosen.fitting_stages(bits, operand, needed - 1) == 2
    assert chosen.fitting_stages(bits, operand, 0) == 1


@given(
    st.integers(0, 5000),
    st.integers(1, 20000),
    st.integers(0, 20000),
    st.integers(1, 8),
    st.sampled_from([1, 132, 304]),
)
def test_plans_are_possible(tokens, rows, columns, bits, processors):
    for operand in ("bf16", "fp32", "byte", "fp8"):
        chosen = plan(tokens, rows, columns, bits, processors, operand)
        assert chosen.kernel in ("gemv", "gemm") and chosen.warps in (1, 2, 4, 8, 16) and chosen.parts >= 1
        assert chosen.warps >= chosen.row_warps and chosen.rows % 16 == 0 and chosen.tokens % 8 == 0
    for each in candidates(tokens, rows, columns, bits):
        assert each.warps >= each.row_warps and each.rows % 16 == 0 and each.tokens % 8 == 0
