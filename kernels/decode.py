"""Decoding of tiled codes in registers, in the order in which tensor cores want them.

A 16-byte load of the tiled layout (`gq_triton.kernels.tiles`) gives a lane four words, of rows g and g + 8 of a row
block and of two 32-column halves of a K block.  After shifting and masking, each of the eight 4-bit fields ("nibbles")
of a word is the code of one of eight consecutive columns 8 t .. 8 t + 7.  From nibbles to entries of the codebook there
are three ways, for operands of 16 bits:

    sign      1 bit: the bit becomes the sign of 1.0, and  sum x c = mid sum x + half sum +-x  is finished afterwards
    permute   2 to 4 bits: one byte permutation looks up four codes at a time in a table of eight bytes that lies in two
              registers; twice, for the low and the high byte of an entry, then interleaved
    gather    any width: one load per code from the codebook, which the L1 cache holds

and for operands of 8 bits the same, with one table instead of two.  Byte permutation is an instruction of NVIDIA's
parts, reached through inline assembly; where that is missing (`ASM` is False) everything is gathered, except for tests,
which run a twin of it in plain arithmetic.

Fragments.  A product over 16 columns with 16-bit operands, or over 32 with 8-bit ones, takes from lane (g, t) the rows
g and g + 8 and four, or eight, consecutive places 4 t .. or 8 t .. in the order of its columns.  Which column of the
tile comes to which place is ours to choose, as long as the other operand is permuted alike.  So a lane's eight columns
of a half go to two products of 16-bit operands (columns 0 to 3 and 4 to 7), or to one of 8-bit operands, and no value
ever changes its lane.  That these are the compiler's places too is a matter of speed, not of correctness; the budgets
in `gq_triton.kernels.budgets` notice when a compiler chooses others.
"""

from __future__ import annotations

from gq_triton.kernels.backend import bound, jit, tl
from gq_triton.kernels.tables import e4m3_numbers

__all__ = ["affine", "byte_permute", "decoded", "load_tables", "multiply", "natural", "way_of"]


def way_of(bits: int, operand: str, permutes: bool) -> str:
    """How codes become entries of the codebook: "sign", "permute" or "gather"."""
    if operand == "fp32" or bits > 4:
        return "gather"
    if bits == 1:
        return "sign"
    return "permute" if permutes else "gather"


# --- instructions -----------------------------------------------------------------------------------------------------


@jit
def byte_permute(a, b, selector, ASM: tl.constexpr):
    """Byte n of the result is the one of the eight bytes of (b, a) that nibble n of ``selector`` names, for n < 4; the
    nibbles are below 8. All int32."""
    if ASM:
        result = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = selector * 0
        for n in tl.static_range(4):
            place = (selector >> (4 * n)) & 7
            byte = tl.where(place < 4, a >> (8 * (place & 3)), b >> (8 * (place & 3))) & 255
            result |= byte << (8 * n)
    return result


@jit
def _in_every_lane(word, ASM: tl.constexpr):
    """``word``, in a register of every lane: what is the same for a warp, ptxas would copy from a shared register each
    time that it is used."""
    if ASM:
        word = tl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.u32 zero, %laneid; shr.u32 zero, zero, 5; add.u32 $0, $1, zero;}",
            "=r,r",
            [word],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return word


@jit
def _signed_ones(word, ONES: tl.constexpr, ASM: tl.constexpr):
    """Bits 31 and 15 of ``word`` as the signs of the two numbers in ``ONES``."""
    if ASM:
        signed = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, $2, 0xEA;",
            "=r,r,r",
            [word, ONES],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        signed = (word & -2147450880) | ONES
    return signed


@jit
def _constant(words, VALUE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        words = tl.inline_asm_elementwise(
            "{.reg .b32 unused; mov.b32 unused, $1; mov.b32 $0, $2;}",
            "=r,r,r",
            [words, VALUE],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        words = words * 0 + VALUE
    return words


# --- the codebook -----------------------------------------------------------------------------------------------------


@jit
def _stored(codebook, code, FORM: tl.constexpr, ASM: tl.constexpr):
    """Entries as they are stored, int32: of float32, or bytes with zeros above.

    The assembly is a load that the compiler cannot move to a layout that it deems better for loads.
    """
    if ASM:
        if FORM == "float":
            LOAD: tl.constexpr = "{.reg .b64 a; mad.wide.u32 a, $1, 4, $2; ld.global.nc.b32 $0, [a];}"
        else:
            LOAD: tl.constexpr = "{.reg .b64 a; mad.wide.u32 a, $1, 1, $2; ld.global.nc.u8 $0, [a];}"
        address = codebook.to(tl.int64)
        stored = tl.inline_asm_elementwise(LOAD, "=r,r,l", [code, address], dtype=tl.int32, is_pure=True, pack=1)
    elif FORM == "float":
        stored = tl.load(codebook + code).to(tl.int32, bitcast=True)
    else:
        stored = tl.load(codebook + code).to(tl.int32) & 255
    return stored


@jit
def _number(stored, FORM: tl.constexpr):
    """`_stored` entries as float32."""
    if FORM == "float":
        number = stored.to(tl.float32, bitcast=True)
    elif FORM == "int8":
        number = ((stored << 24) >> 24).to(tl.float32)
    else:
        number = e4m3_numbers(stored)
    return number


@jit
def _pattern(codebook, code, FORM: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """Entries as operands, their bits in int32: of float32, of bfloat16 or float16 (zero-extended), or bytes as they
    are."""
    bits = _stored(codebook, code, FORM, ASM)
    if OPERAND == "fp32":
        bits = _number(bits, FORM).to(tl.int32, bitcast=True)
    elif OPERAND == "bf16":
        bits = _number(bits, FORM).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    elif OPERAND == "fp16":
        bits = _number(bits, FORM).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
    return bits


@jit
def _table(
    codebook,
    FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    ASM: tl.constexpr,
):
    """One byte, from bit ``SHIFT`` on, of each of four entries, in a register."""
    LAST: tl.constexpr = (1 << BITS) - 1
    word = (_pattern(codebook, FIRST & LAST, FORM, OPERAND, False) >> SHIFT) & 255
    word |= ((_pattern(codebook, (FIRST + 1) & LAST, FORM, OPERAND, False) >> SHIFT) & 255) << 8
    word |= ((_pattern(codebook, (FIRST + 2) & LAST, FORM, OPERAND, False) >> SHIFT) & 255) << 16
    word |= ((_pattern(codebook, (FIRST + 3) & LAST, FORM, OPERAND, False) >> SHIFT) & 255) << 24
    return _in_every_lane(word, ASM)


@jit
def load_tables(
    codebook, BITS: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr, WAY: tl.constexpr, ASM: tl.constexpr
):
    """What `decoded` looks entries up in: for "permute", four registers of low bytes of entries, then high bytes."""
    tables = (0, 0, 0, 0, 0, 0, 0, 0)
    if WAY == "permute":
        tables = (
            _table(codebook, 0, 0, BITS, FORM, OPERAND, ASM),
            _table(codebook, 4, 0, BITS, FORM, OPERAND, ASM),
            _table(codebook, 8, 0, BITS, FORM, OPERAND, ASM),
            _table(codebook, 12, 0, BITS, FORM, OPERAND, ASM),
            _table(codebook, 0, 8, BITS, FORM, OPERAND, ASM),
            _table(codebook, 4, 8, BITS, FORM, OPERAND, ASM),
            _table(codebook, 8, 8, BITS, FORM, OPERAND, ASM),
            _table(codebook, 12, 8, BITS, FORM, OPERAND, ASM),
        )
    return tables


@jit
def affine(codebook, FORM: tl.constexpr, OPERAND: tl.constexpr):
    """(a, b) such that  sum x c = a sum x + b sum x d  for the numbers d that the way "sign" decodes to."""
    first, second = _number(_stored(codebook, 0, FORM, False), FORM), _number(_stored(codebook, 1, FORM, False), FORM)
    if OPERAND == "byte":  # a bit set is 1
        a, b = first, second - first
    else:  # a bit set is -1
        a, b = 0.5 * (first + second), 0.5 * (first - second)
    return a, b


# --- words and nibbles ------------------------------------------------------------------------------------------------


@jit
def _words(tiles, block, blocks, own, start, steps, PER_STEP: tl.constexpr, BEFORE: tl.constexpr, PLACE: tl.constexpr):
    """Words (R, 128) of one plane: K block ``PLACE`` of the ``PER_STEP`` that it has in each of the steps
    ``own + start`` (R,), for row blocks ``block`` (R,). ``BEFORE`` of a step's K blocks belong to earlier planes.

    Beyond the last row block or step it is the last one's: inputs are 0 there and outputs are not stored, so that this
    is as good as zeros, and costs less.
    """
    block = tl.minimum(block, blocks - 1)
    first = (block.to(tl.int64) * PER_STEP + blocks * BEFORE) * steps + PLACE
    source = tiles + first[:, None] * 128 + tl.arange(0, 128)[None, :]  # the same for every start
    return tl.load(source + tl.minimum(own + start, steps - 1)[:, None] * (PER_STEP * 128))


@jit
def _twos(tiles, block, blocks, own, start, steps, PER_STEP: tl.constexpr, BEFORE: tl.constexpr, SUB: tl.constexpr):
    words = _words(tiles, block, blocks, own, start, steps, PER_STEP, BEFORE, SUB // 2)
    return (words >> (2 * (SUB % 2))) & 0x33333333


@jit
def _ones(tiles, block, blocks, own, start, steps, PER_STEP: tl.constexpr, BEFORE: tl.constexpr, SUB: tl.constexpr):
    words = _words(tiles, block, blocks, own, start, steps, PER_STEP, BEFORE, SUB // 4)
    return (words >> (SUB % 4)) & 0x11111111


@jit
def _nibbles(tiles, block, blocks, own, start, steps, SUB: tl.constexpr, BITS: tl.constexpr):
    """Eight nibbles to a word: of the codes' high bits, at most four, and of the rest (of `BITS` - 4; or the same)."""
    if BITS == 1:
        high = _ones(tiles, block, blocks, own, start, steps, 1, 0, SUB)
    elif BITS == 2:
        high = _twos(tiles, block, blocks, own, start, steps, 1, 0, SUB)
    elif BITS == 3:
        high = 2 * _twos(tiles, block, blocks, own, start, steps, 2, 0, SUB)
        high += _ones(tiles, block, blocks, own, start, steps, 1, 2, SUB)
    elif BITS == 5 or BITS == 7:
        high = _words(tiles, block, blocks, own, start, steps, 4, 0, SUB)
    elif BITS == 6:
        high = _words(tiles, block, blocks, own, start, steps, 2, 0, SUB)
    else:
        high = _words(tiles, block, blocks, own, start, steps, 1, 0, SUB)
    low = high
    if BITS == 5:
        low = _ones(tiles, block, blocks, own, start, steps, 1, 4, SUB)
    elif BITS == 6:
        low = _twos(tiles, block, blocks, own, start, steps, 1, 2, SUB)
    elif BITS == 7:
        low = 2 * _twos(tiles, block, blocks, own, start, steps, 2, 4, SUB)
        low += _ones(tiles, block, blocks, own, start, steps, 1, 6, SUB)
    elif BITS == 8:
        low = _words(tiles, block, blocks, own, start, steps, 1, 1, SUB)
    return high, low


# --- from nibbles to operands -----------------------------------------------------------------------------------------


@jit
def _permuted(codes, choice, t0, t1, t2, t3, BITS: tl.constexpr, ASM: tl.constexpr):
    """Bytes of the entries of four codes, in the low nibbles of ``codes``; ``choice`` tells lower from upper eight."""
    if BITS <= 2:
        found = byte_permute(t0, t0, codes, ASM)
    elif BITS == 3:
        found = byte_permute(t0, t1, codes, ASM)
    else:
        found = byte_permute(byte_permute(t0, t1, codes, ASM), byte_permute(t2, t3, codes, ASM), choice, ASM)
    return found


@jit
def _looked_up(high, tables, BITS: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    codes, choice = high, high
    if BITS == 4:
        codes, choice = high & 0x77777777, ((high >> 1) & 0x44444444) | 0x32103210
    l0, l1, l2, l3, h0, h1, h2, h3 = tables
    first = _permuted(codes, choice, l0, l1, l2, l3, BITS, ASM)
    second = _permuted(codes >> 16, choice >> 16, l0, l1, l2, l3, BITS, ASM)
    if OPERAND == "byte":
        operands = (first, second)
    else:
        upper_first = _permuted(codes, choice, h0, h1, h2, h3, BITS, ASM)
        upper_second = _permuted(codes >> 16, choice >> 16, h0, h1, h2, h3, BITS, ASM)
        operands = (
            byte_permute(first, upper_first, 0x5140, ASM),
            byte_permute(first, upper_first, 0x7362, ASM),
            byte_permute(second, upper_second, 0x5140, ASM),
            byte_permute(second, upper_second, 0x7362, ASM),
        )
    return operands


@jit
def _signs(words, SUB: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """Columns with like low bits of their number share a word, as what lies 16 (or 8) bits apart takes no shift."""
    if OPERAND == "byte":
        ONE: tl.constexpr = 0x38 if FORM == "fp8" else 1
        operands = (((words >> SUB) & 0x01010101) * ONE, ((words >> (SUB + 4)) & 0x01010101) * ONE)
    else:
        ONES: tl.constexpr = 0x3F803F80 if OPERAND == "bf16" else 0x3C003C00
        operands = (
            _signed_ones(words << (15 - SUB), ONES, ASM),
            _signed_ones(words << (11 - SUB), ONES, ASM),
            _signed_ones(words << (7 - SUB), ONES, ASM),
            _signed_ones(words << (3 - SUB), ONES, ASM),
        )
    return operands


@jit
def _all_ones(words, FORM: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    """Ones in place of `_signs`.

    They come from ``words`` by an instruction that the compiler does not look into: of a constant it would choose the
    layout by itself, and shuffle the inputs for it.
    """
    if OPERAND == "byte":
        ONE: tl.constexpr = 0x38383838 if FORM == "fp8" else 0x01010101
        ones = _constant(words, ONE, ASM)
    elif OPERAND == "bf16":
        ones = _constant(words, 0x3F803F80, ASM)
    else:
        ones = _constant(words, 0x3C003C00, ASM)
    return (ones, ones, ones, ones)


@jit
def _code_bytes(high, low, BITS: tl.constexpr):
    """Codes in bytes: those of even columns in one word, those of odd ones in another."""
    even, odd = high & 0x0F0F0F0F, (high >> 4) & 0x0F0F0F0F
    if BITS > 4:
        even = (even << (BITS - 4)) | (low & 0x0F0F0F0F)
        odd = (odd << (BITS - 4)) | ((low >> 4) & 0x0F0F0F0F)
    return even, odd


@jit
def _entry(codes, BYTE: tl.constexpr, codebook, FORM: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    return _pattern(codebook, (codes >> (8 * BYTE)) & 255, FORM, OPERAND, ASM)


@jit
def _gathered(high, low, codebook, BITS: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr):
    even, odd = _code_bytes(high, low, BITS)
    v0, v1 = _entry(even, 0, codebook, FORM, OPERAND, ASM), _entry(odd, 0, codebook, FORM, OPERAND, ASM)
    v2, v3 = _entry(even, 1, codebook, FORM, OPERAND, ASM), _entry(odd, 1, codebook, FORM, OPERAND, ASM)
    v4, v5 = _entry(even, 2, codebook, FORM, OPERAND, ASM), _entry(odd, 2, codebook, FORM, OPERAND, ASM)
    v6, v7 = _entry(even, 3, codebook, FORM, OPERAND, ASM), _entry(odd, 3, codebook, FORM, OPERAND, ASM)
    if OPERAND == "fp32":
        operands = (v0, v1, v2, v3, v4, v5, v6, v7)
    elif OPERAND == "byte":
        operands = (v0 | (v1 << 8) | (v2 << 16) | (v3 << 24), v4 | (v5 << 8) | (v6 << 16) | (v7 << 24))
    else:
        operands = (v0 | (v1 << 16), v2 | (v3 << 16), v4 | (v5 << 16), v6 | (v7 << 16))
    return operands


@jit
def decoded(
    tiles,
    block,
    blocks,
    own,
    start,
    steps,
    codebook,
    tables,
    SUB: tl.constexpr,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
):
    """Operands of sub-block ``SUB`` as words (R, 128) int32, of a lane's eight columns in order: two words of bytes,
    four of 16 bits or eight of 32. The way "sign" has them in another order, that of `_inputs`."""
    if WAY == "sign":
        words = _words(tiles, block, blocks, own, start, steps, 1, 0, 0)
        operands = _signs(words, SUB, FORM, OPERAND, ASM)
    elif WAY == "permute":
        high, _ = _nibbles(tiles, block, blocks, own, start, steps, SUB, BITS)
        operands = _looked_up(high, tables, BITS, OPERAND, ASM)
    else:
        high, low = _nibbles(tiles, block, blocks, own, start, steps, SUB, BITS)
        operands = _gathered(high, low, codebook, BITS, FORM, OPERAND, ASM)
    return operands


# --- fragments --------------------------------------------------------------------------------------------------------


@jit
def _typed(bits, FORM: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr):
    """Bit patterns as numbers; as float32, if ``EXACT``, where the interpreter cannot multiply them."""
    if OPERAND == "bf16":
        value = bits.to(tl.bfloat16, bitcast=True)
    elif OPERAND == "fp16":
        value = bits.to(tl.float16, bitcast=True)
    elif OPERAND == "fp32":
        value = bits.to(tl.float32, bitcast=True)
    elif FORM == "fp8":
        value = bits.to(tl.float8e4nv, bitcast=True)
    else:
        value = bits
    if EXACT:
        value = value.to(tl.float32)
    return value


@jit
def _fragments(words, Q: tl.constexpr, RB: tl.constexpr, W: tl.constexpr, OPERAND: tl.constexpr):
    """Bits of the weights in product ``Q`` of each half of a sub-block: two tensors (W, 16 RB, 16), of bytes
    (W, 16 RB, 32). ``words`` are `decoded` for (RB, W) row blocks.
    """
    if OPERAND == "byte":
        pair = tl.join(words[0], words[1])
        pair = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
        places = tl.join(pair.to(tl.int8), (pair >> 8).to(tl.int8))
        places = tl.reshape(places, (RB, W, 8, 4, 2, 2, 8))  # row block, warp, g, t, r, u, place
        places = tl.reshape(tl.permute(places, (1, 0, 4, 2, 3, 6, 5)), (W, 16 * RB, 32, 2))
    else:
        if OPERAND == "fp32":
            places = tl.join(tl.join(words[4 * Q], words[4 * Q + 2]), tl.join(words[4 * Q + 1], words[4 * Q + 3]))
        else:
            pair = tl.join(words[2 * Q], words[2 * Q + 1])
            places = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
        places = tl.reshape(places, (RB, W, 8, 4, 2, 2, 4))
        places = tl.reshape(tl.permute(places, (1, 0, 4, 2, 3, 6, 5)), (W, 16 * RB, 16, 2))
    first, second = tl.split(places)
    return first, second


@jit
def _inputs(
    source,
    present,
    column,
    offset,
    limit,
    MB: tl.constexpr,
    W: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The other side of the products of one half: two tensors (W, 16, 8 MB), of bytes one (W, 32, 8 MB), twice.

    ``source`` (MB * W * 8, 32) points to tokens at the columns ``column``, which ``offset`` shifts; from ``limit`` on
    they are 0.
    """
    values = tl.load(source + offset, mask=present & (column < limit - offset), other=0.0)
    if OPERAND == "byte":
        if WAY == "sign":
            values = tl.permute(tl.reshape(values, (MB, W, 8, 4, 4, 2)), (1, 3, 5, 4, 0, 2))
        else:
            values = tl.permute(tl.reshape(values, (MB, W, 8, 32)), (1, 3, 0, 2))
        first = tl.reshape(values, (W, 32, 8 * MB))
        second = first
    else:
        if WAY == "sign":
            values = tl.permute(tl.reshape(values, (MB, W, 8, 4, 2, 2, 2)), (1, 3, 6, 4, 0, 2, 5))
        else:
            values = tl.permute(tl.reshape(values, (MB, W, 8, 4, 2, 4)), (1, 3, 5, 0, 2, 4))
        first, second = tl.split(tl.reshape(values, (W, 16, 8 * MB, 2)))
    if EXACT:
        first, second = first.to(tl.float32), second.to(tl.float32)
    return first, second


@jit
def _products(
    total,
    words,
    x00,
    x01,
    x10,
    x11,
    RB: tl.constexpr,
    W: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """``total`` and the products of a sub-block: ``words`` `decoded`, inputs by half and by product."""
    w0, w1 = _fragments(words, 0, RB, W, OPERAND)
    w0, w1 = _typed(w0, FORM, OPERAND, EXACT), _typed(w1, FORM, OPERAND, EXACT)
    total = tl.dot(w0, x00, total, input_precision=PRECISION, out_dtype=total.dtype)
    total = tl.dot(w1, x10, total, input_precision=PRECISION, out_dtype=total.dtype)
    if OPERAND != "byte":
        w0, w1 = _fragments(words, 1, RB, W, OPERAND)
        w0, w1 = _typed(w0, FORM, OPERAND, EXACT), _typed(w1, FORM, OPERAND, EXACT)
        total = tl.dot(w0, x01, total, input_precision=PRECISION, out_dtype=total.dtype)
        total = tl.dot(w1, x11, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@jit
def multiply(
    x,
    first,
    tokens,
    columns,
    tiles,
    block,
    blocks,
    codebook,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    RB: tl.constexpr,
    WN: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
    PART=0,
    PARTS: tl.constexpr = 1,
):
    """Products of rows of a packed weight with tokens, in units of the codebook's entries: (WN, 16 RB, 8 MB) float32.

    A program of WN * WK warps computes RB row blocks in each of WN warps; the columns of one are split over WK warps,
    whose sums are added in a fixed order.

    Args:
        x: (tokens, columns), contiguous, of the operand's dtype.
        first: of the 8 * MB tokens; beyond ``tokens`` they are 0.
        tiles: of the weight, int32.
        block: (RB, WN) row blocks in a row, an int32 tensor (RB * WN,); sums of one of ``blocks`` or
            more are meaningless.
        blocks: row blocks of the weight.
        codebook: its entries as ``FORM`` says: float32, int8, or e4m3 as uint8.
        OPERAND: "bf16", "fp16", "fp32", or "byte": int8, or e4m3 if ``FORM`` is "fp8".
        WAY: of `way_of`.
        PRECISION: of `tl.dot`, for "fp32".
        EXACT: multiply in float32 whatever the operands, for the interpreter.
        PART: take only this one of ``PARTS`` equal parts of the columns. Default: all columns.
    """
    W: tl.constexpr = WN * WK
    SUBS: tl.constexpr = 1 if BITS % 4 == 0 else (2 if BITS % 2 == 0 else 4)  # sub-blocks of 64 columns in a step
    INTEGER: tl.constexpr = OPERAND == "byte" and FORM == "int8" and not EXACT
    UNROLL: tl.constexpr = 1 if WAY == "gather" else 2  # a gather is long as it is
    steps = tl.cdiv(columns, 64 * SUBS)
    block = tl.reshape(tl.broadcast_to(tl.reshape(block, (RB, 1, WN)), (RB, WK, WN)), (RB * W,))
    own = tl.arange(0, RB * W) % W // WN  # a warp's place among those that share columns
    row = tl.arange(0, MB * W * 8)
    token = (first + row // (8 * W) * 8 + row % 8)[:, None]
    column = (row // 8 % W // WN)[:, None] * (64 * SUBS) + tl.arange(0, 32)[None, :]
    source = x + token.to(tl.int64) * columns + column
    tables = load_tables(codebook, BITS, FORM, OPERAND, WAY, ASM)
    total = tl.zeros((W, 16 * RB, 8 * MB), tl.int32 if INTEGER else tl.float32)
    plain = total  # sums of x alone
    each = tl.cdiv(steps, PARTS)
    limit = tl.minimum(columns, (PART + 1) * each * (64 * SUBS))
    begin = PART * each
    end = tl.maximum(begin, tl.minimum(steps, begin + each))  # below `begin`, unrolling takes it for one far above
    for start in tl.range(bound(begin), bound(end), WK, loop_unroll_factor=UNROLL):
        for SUB in tl.static_range(SUBS):
            words = decoded(
                tiles, block, blocks, own, start, steps, codebook, tables, SUB, BITS, FORM, OPERAND, WAY, ASM
            )
            offset = (start * SUBS + SUB) * 64
            present = token < tokens
            x00, x01 = _inputs(source, present, column, offset, limit, MB, W, OPERAND, WAY, EXACT)
            x10, x11 = _inputs(source, present, column, offset + 32, limit, MB, W, OPERAND, WAY, EXACT)
            total = _products(total, words, x00, x01, x10, x11, RB, W, FORM, OPERAND, PRECISION, EXACT)
            if WAY == "sign":
                ones = _all_ones(words[0], FORM, OPERAND, ASM)
                plain = _products(plain, ones, x00, x01, x10, x11, RB, W, FORM, OPERAND, PRECISION, EXACT)
    total = tl.sum(tl.reshape(total, (WK, WN, 16 * RB, 8 * MB)), 0).to(tl.float32)
    if WAY == "sign":
        a, b = affine(codebook, FORM, OPERAND)
        total = b * total + a * tl.sum(tl.reshape(plain, (WK, WN, 16 * RB, 8 * MB)), 0).to(tl.float32)
    return total


@jit
def natural(words, NB: tl.constexpr, FORM: tl.constexpr, OPERAND: tl.constexpr, EXACT: tl.constexpr):
    """Weights (16 NB, 64) in the order of rows and columns, of words `decoded` for NB row blocks."""
    if OPERAND == "byte":
        pair = tl.join(words[0], words[1])
        pair = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
        columns = tl.join(pair.to(tl.int8), (pair >> 8).to(tl.int8))
    elif OPERAND == "fp32":
        even = tl.join(tl.join(words[0], words[4]), tl.join(words[2], words[6]))
        odd = tl.join(tl.join(words[1], words[5]), tl.join(words[3], words[7]))
        columns = tl.join(even, odd)
    else:
        pair = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))
        columns = tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))
    columns = tl.permute(tl.reshape(columns, (NB, 8, 4, 2, 2, 8)), (0, 3, 1, 4, 2, 5))  # block, r, g, u, t, column
    return _typed(tl.reshape(columns, (16 * NB, 64)), FORM, OPERAND, EXACT)
