"""Decoding of tiled codes in the interpreter and, with its inline assembly, on a GPU."""

import itertools

import numpy as np
import pytest
import torch

from gq_triton.kernels import decode, packing, tiles
from gq_triton.kernels.backend import INTERPRETED, jit, tl

OPERANDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("float", "int8", "fp8")
CODED = [*itertools.product(FORMS, OPERANDS), ("int8", "byte"), ("fp8", "byte")]
WIDTHS = [pytest.param(bits, marks=() if bits in (1, 4) else pytest.mark.full) for bits in range(1, 9)]
ASM = [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@jit
def _permute_kernel(a, b, selector, out, ASM: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + at, decode.byte_permute(tl.load(a + at), tl.load(b + at), tl.load(selector + at), ASM))


@jit
def _natural_kernel(
    tiled,
    codebook,
    out,  # (16 blocks, 64 SUBS) float32
    blocks,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
    SUBS: tl.constexpr,
    NB: tl.constexpr,
):
    block = tl.program_id(0) * NB + tl.arange(0, NB)
    tables = decode.load_tables(codebook, BITS, FORM, OPERAND, WAY, ASM)
    row, column = tl.program_id(0) * (16 * NB) + tl.arange(0, 16 * NB), tl.arange(0, 64)
    for SUB in tl.static_range(SUBS):
        words = decode.decoded(
            tiled, block, blocks, block * 0, 0, 1, codebook, tables, SUB, BITS, FORM, OPERAND, WAY, ASM
        )
        weights = decode.natural(words, NB, FORM, OPERAND, True)
        tl.store(out + row[:, None] * (64 * SUBS) + (SUB * 64 + column)[None, :], weights)


@jit
def _multiply_kernel(
    x,  # (tokens, columns)
    tiled,
    codebook,
    out,  # (rows, tokens) float32
    tokens,
    columns,
    blocks,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
    EXACT: tl.constexpr,
    RB: tl.constexpr,
    WN: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
):
    """16 RB WN rows for 8 MB tokens."""
    first = tl.program_id(1) * (8 * MB)
    block = tl.program_id(0) * (RB * WN) + tl.arange(0, RB * WN)
    y = decode.multiply(
        x,
        first,
        tokens,
        columns,
        tiled,
        tl.reshape(tl.trans(tl.reshape(block, (WN, RB))), (RB * WN,)),
        blocks,
        codebook,
        BITS,
        FORM,
        OPERAND,
        WAY,
        ASM,
        "ieee",
        EXACT,
        RB,
        WN,
        WK,
        MB,
    )
    row = tl.program_id(0) * (16 * RB * WN) + tl.arange(0, 16 * RB * WN)
    token = first + tl.arange(0, 8 * MB)
    mask = (row < 16 * blocks)[:, None] & (token < tokens)[None, :]
    tl.store(out + row[:, None] * tokens + token[None, :], tl.reshape(y, (16 * RB * WN, 8 * MB)), mask=mask)


def ways(bits, operand):
    """All that decode codes of this width to such operands."""
    found = {"gather", decode.way_of(bits, operand, permutes=True)}
    return sorted(found | {"permute"} if bits == 1 and operand != "fp32" else found)


def stored(values, form):
    """Entries as kernels take them, and the numbers that they are."""
    if form == "float":
        return values, values
    entries = values.clamp(-127, 127).to({"int8": torch.int8, "fp8": torch.float8_e4m3fn}[form])
    return entries.view(torch.uint8) if form == "fp8" else entries, entries.float()


def as_operand(numbers, operand):
    return numbers.to(OPERANDS.get(operand, torch.float32)).float()


def needs_part(operand, form, device):
    if operand == "byte" and form == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no e4m3")


def natural(codes, entries, bits, form, operand, way, asm):
    """Codes (rows, columns of one step) through `decoded` and `natural`."""
    rows, columns = codes.shape
    tiled = tiles.tile(packing.pack(codes, bits), bits, rows, columns).view(torch.int32)
    out = torch.full((rows, columns), torch.nan, device=codes.device)
    blocks = rows // 16
    own = blocks if INTERPRETED else 2  # of a program; the interpreter takes long for every one
    options = bits, form, operand, way, asm, columns // 64, own
    _natural_kernel[(blocks // own,)](tiled, entries, out, blocks, *options, num_warps=1)
    return out


def every_code_in_every_place(bits, device):
    """Codes, as many row blocks as there are codes by the columns of a step."""
    columns = 256 // packing.PLANES[bits][-1]
    place = torch.randperm(16 * columns, device=device).view(1, 16, columns)
    return ((place + torch.arange(2**bits, device=device).view(-1, 1, 1)) % 2**bits).to(torch.uint8).view(-1, columns)


# --- byte permutation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asm", ASM)
def test_byte_permutation_by_every_selector(kernel_device, asm):
    generator = np.random.default_rng(0)
    places = np.stack(np.unravel_index(np.arange(8**4), (8,) * 4), axis=1)
    selector = (places << np.array([0, 4, 8, 12])).sum(1) | generator.integers(0, 1 << 16, 8**4) << 16
    sources = generator.integers(0, 256, (8**4, 8)).astype(np.uint8)
    expected = np.take_along_axis(sources, places, 1).view(np.int32)[:, 0]
    a, b = np.ascontiguousarray(sources[:, :4]).view(np.int32), np.ascontiguousarray(sources[:, 4:]).view(np.int32)
    inputs = [torch.from_numpy(array.reshape(-1)).to(kernel_device) for array in (a, b, selector.astype(np.int32))]
    out = torch.empty_like(inputs[0])
    _permute_kernel[(4,)](*inputs, out, asm)
    assert np.array_equal(out.cpu().numpy(), expected)


# --- operands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("form", "operand"), CODED)
def test_every_code_in_every_place_becomes_its_entry(kernel_device, asm, bits, form, operand):
    needs_part(operand, form, kernel_device)
    codes = every_code_in_every_place(bits, kernel_device)
    values = (torch.randn(2**bits, device=kernel_device) * 60).clamp(-127, 127)  # that operands of 16 bits must round
    if INTERPRETED and operand == "bf16":  # which it does not round to the nearest
        values = as_operand(values, operand)
    entries, numbers = stored(values if form == "float" else values.round(), form)
    expected = as_operand(numbers, operand)[codes.int()]
    for way in ways(bits, operand):
        if way != "sign":  # whose order is not the natural one
            assert torch.equal(natural(codes, entries, bits, form, operand, way, asm), expected)


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("operand", [*OPERANDS, "byte"])
def test_every_byte_as_an_e4m3_number(kernel_device, asm, operand):
    needs_part(operand, "fp8", kernel_device)
    codes = every_code_in_every_place(8, kernel_device)[:, :64]
    entries = torch.arange(256, dtype=torch.uint8, device=kernel_device)
    entries[[127, 255]] = 0  # not numbers
    expected = entries.view(torch.float8_e4m3fn).float()[codes.int()]
    actual = natural(codes, entries, 8, "fp8", operand, "gather", asm)
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


# --- products ---------------------------------------------------------------------------------------------------------


def products(x, codes, entries, bits, form, operand, way, asm, shape):
    """The products (rows, tokens) of a weight with ``x``, as `multiply` has them."""
    (tokens, columns), rows = x.shape, len(codes)
    tiled = tiles.tile(packing.pack(codes, bits), bits, rows, columns).view(torch.int32)
    blocks, (rb, wn, wk, mb) = -(-rows // 16), shape
    out = torch.full((16 * blocks, tokens), torch.nan, device=x.device)
    options = bits, form, operand, way, asm, INTERPRETED, *shape
    grid = -(-blocks // (rb * wn)), -(-tokens // (8 * mb))
    _multiply_kernel[grid](x, tiled, entries, out, tokens, columns, blocks, *options, num_warps=wn * wk)
    return out[:rows]


def exact_problem(bits, form, operand, shape, device):
    """(x, codes, entries, numbers) whose sums every operand and order gives exactly."""
    tokens, rows, columns = shape
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    values = torch.randint(-8, 9, (2**bits,), device=device).float()
    entries, numbers = stored(values, form)
    x = torch.randint(-8, 9, (tokens, columns), device=device).float()
    dtype = OPERANDS.get(operand, torch.float8_e4m3fn if form == "fp8" else torch.int8)
    return x.to(dtype), codes, entries, numbers


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("form", "operand"), CODED)
def test_products_the_same_in_every_way(kernel_device, asm, bits, form, operand):
    needs_part(operand, form, kernel_device)
    x, codes, entries, numbers = exact_problem(bits, form, operand, (9, 20, 140), kernel_device)
    expected = numbers[codes.int()] @ x.float().T
    for way in ways(bits, operand):
        assert torch.equal(products(x, codes, entries, bits, form, operand, way, asm, (1, 1, 2, 1)), expected)


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("operand", ["bf16", "byte"])
@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (2, 2, 1, 2), (1, 2, 4, 4), (4, 4, 2, 1)])
def test_products_in_any_shape_of_a_program(kernel_device, asm, bits, operand, shape):
    x, codes, entries, numbers = exact_problem(bits, "int8", operand, (12, 40, 270), kernel_device)
    way = decode.way_of(bits, operand, permutes=True)
    actual = products(x, codes, entries, bits, "int8", operand, way, asm, shape)
    assert torch.equal(actual, numbers[codes.int()] @ x.float().T)


def test_ways():
    assert [decode.way_of(bits, "bf16", True) for bits in range(1, 9)] == ["sign", *["permute"] * 3, *["gather"] * 4]
    assert [decode.way_of(bits, "byte", False) for bits in (1, 2, 5)] == ["sign", "gather", "gather"]
    assert decode.way_of(1, "fp32", True) == "gather"
