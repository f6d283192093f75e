"""Fake quantization on a GPU: Triton kernels and their launchers.

Mathematics, notation and reference in `gq_triton.kernels.fake_quantize`, of whose operators these are the CUDA
implementation.

A model has hundreds of weights, most of them small, so one launch serves a whole group.  `plan` has a record for every
chunk of every weight - some of its channels by a span of their columns - and a program works through one chunk, ROWS by
COLS weights at a time.  `matrices` has each weight's addresses and strides.

Floor.  Forward, a weight is read once and written once; backward, weight and gradient are read and a gradient is
written: 8 and 12 bytes in float32.  An H100 can issue 8.9 instructions (of one lane) in the time that it moves a byte,
so nothing here may depend on K: thresholds are found from a small table of bins in one or two steps, and the curve
takes one logarithm, one exponential and one division.  The gradient of the table needs sums over cells, taken on
tensor cores as products with one-hot matrices.

Sums have a fixed order: every chunk writes its own, a second kernel adds them up, and nothing depends on timing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gq_triton.kernels.backend import INTERPRETED, bound, cdiv, jit, launching, tl

__all__ = ["backward", "encode", "forward"]

# With K = LEVELS, the parts of a weight's flat table begin at: thresholds 0, values K - 1, edges 2 K - 1,
# bounds 3 K - 3, A 3 K - 1, J 4 K - 2, o 5 K - 3, curve 6 K - 4.


@jit
def _chunk(plan, ALIGN: tl.constexpr):
    """(number, weight's number, first row, end row, first column, end column) of this program's chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    record = plan + chunk * 8
    begin, end = tl.multiple_of(tl.load(record + 3), ALIGN), tl.multiple_of(tl.load(record + 4), ALIGN)
    return chunk, tl.load(record), tl.load(record + 1), tl.load(record + 2), begin, end


@jit
def _scales(plan, scale, chunk, row, inside):
    """The scales of rows (ROWS, 1); one scale for all has stride 0."""
    record = plan + chunk * 8
    return tl.load(scale + tl.load(record + 5) + row * tl.load(record + 6), mask=inside, other=0.0)


@jit
def _matrix(record, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """(start, row stride) of a matrix from its address and stride in memory."""
    start = tl.load(record).to(tl.pointer_type(TYPE))
    if ALIGN > 1:
        start = tl.multiple_of(start, 16)
    return start, tl.multiple_of(tl.load(record + 1), ALIGN)


@jit
def _bisect(borders, x, scale, STEPS: tl.constexpr):
    """How many of the 2**STEPS - 1 sorted borders b satisfy scale * b < x."""
    count = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        count += tl.where(scale * tl.load(borders + (count + (half - 1))) < x, half, 0)
    return count


@jit
def _bin(y, BITS: tl.constexpr):
    """The bin of y in companded space, one of 4 for every centroid; the outer ones hold what lies beyond [-1, 1]."""
    HALF: tl.constexpr = 2 << BITS
    place = y * HALF + HALF
    return tl.where(place > 0, tl.minimum(place, 2.0 * HALF - 1.0), 0.0).to(tl.int32)  # 0 for NaN, too


@jit
def _search(borders, x, scale, bin, lookup, BITS: tl.constexpr):
    """How many borders b satisfy scale * b < x: bisection from what x's bin says, one or two steps for common grids."""
    steps = tl.load(lookup + (4 << BITS)).to(tl.int32)
    count = tl.load(lookup + bin).to(tl.int32)
    for step in tl.range(0, bound(steps), num_stages=1, loop_unroll_factor=1):
        half = 1 << (steps - 1 - step)
        count += tl.where(scale * tl.load(borders + (count + (half - 1))) < x, half, 0)
    return count


@jit
def _rough_size(x, mu):
    """Increases with |x| much as ln(1 + mu |x|) does: the bits of a number are nearly its logarithm."""
    return ((tl.abs(x) * mu + 1.0).to(tl.int32, bitcast=True) - 0x3F800000).to(tl.float32)


@jit
def _roughly_companded(x, mu):
    """From [-1, 1] onto [-1, 1], increasing, and close enough to F to spread a grid over its bins."""
    mu = tl.maximum(mu, 0.25)
    size = _rough_size(x, mu) * (1.0 / _rough_size(tl.full((), 1.0, tl.float32), mu))
    return tl.where(x < 0, -size, size)


@jit
def _log1p(x):
    """ln(1 + x), x >= 0, to a relative error of 1e-7 however small x is, by sums and products alone.

    1 + x = 2^n (1 + f), f in [-1/4, 1/2), where f is formed without rounding 1 + x; ln(1 + f) is f plus f^2 times a
    polynomial fitted for the smallest relative error.
    """
    exponent = ((1.0 + x).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
    shrink = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    f = x * shrink + (shrink - 1.0)
    p = 0.05413075 * f - 0.12067228
    p = p * f + 0.14983917
    p = p * f - 0.1682283
    p = p * f + 0.19977078
    p = p * f - 0.24993443
    p = p * f + 0.3333355
    p = p * f - 0.5000006
    return (p * f) * f + f + exponent.to(tl.float32) * 8.2629582e-08  # ln 2 / 2^23


@jit
def _inverse_of(scale):
    return tl.where(scale > 1.1754943508222875e-38, 1.0 / scale, 0.0)


@jit
def _curve(table, BITS: tl.constexpr):
    """(k, mu, 1 / ln(1 + mu), lower bound, upper bound) of a weight; a mu that vanishes makes F the identity."""
    LEVELS: tl.constexpr = 1 << BITS
    mu = tl.maximum(tl.load(table + (6 * LEVELS - 3)), 1e-20)
    low, high = tl.load(table + (3 * LEVELS - 3)), tl.load(table + (3 * LEVELS - 2))
    return tl.load(table + (6 * LEVELS - 4)), mu, 1.0 / _log1p(mu), low, high


@jit
def _soft(x, table, lookup, k, mu, inverse_log, low, high, BITS: tl.constexpr):
    """(clamped x, y, F'(x), cell, A, J, sigma) of x = weight / scale."""
    LEVELS: tl.constexpr = 1 << BITS
    clamped = tl.minimum(tl.maximum(x, low), high)
    stretch = tl.abs(clamped) * mu
    size = _log1p(stretch) * inverse_log
    y = tl.where(clamped < 0, -size, size)
    edges = table + (2 * LEVELS - 1)
    if BITS <= 2:
        cell = _bisect(edges, y, 1.0, BITS)
    else:
        cell = _search(edges, y, 1.0, _bin(y, BITS), lookup + (4 * LEVELS + 16), BITS)
    cell = tl.minimum(cell, LEVELS - 2)  # what follows the last edge in the table is no edge
    left, jump = tl.load(table + (3 * LEVELS - 1) + cell), tl.load(table + (4 * LEVELS - 2) + cell)
    offset = tl.load(table + (5 * LEVELS - 3) + cell)
    grown = 1.0 + tl.exp2(tl.minimum((k * y + offset) * -1.442695, 60.0))
    stretch += 1.0
    shared = 1.0 / (grown * stretch)  # one division serves the logistic and F'
    return clamped, y, mu * inverse_log * grown * shared, cell, left, jump, stretch * shared


@jit
def _borders_before(bin, borders, mu, count, kind, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """How many borders, moved by SHIFT bins, lie in bins before each of ``bin``: bisection."""
    below = tl.zeros(bin.shape, tl.int32)
    for step in tl.static_range(BITS):
        half = 1 << (BITS - 1 - step)
        index = below + (half - 1)
        border = tl.load(borders + index, mask=index < count, other=float("inf"))
        y = border if kind == 1 else _roughly_companded(border, mu)
        before = (index < count) & (_bin(y + SHIFT / (2 << BITS), BITS) < bin)
        below += tl.where(before, half, 0)
    return below


@jit
def _lookup_kernel(tables, lookups, BITS: tl.constexpr):
    """For a weight's thresholds, or its edges: how many surely lie below each bin, and the bisection steps left then.

    The margin, 1/16 of a bin, is far above the rounding of weight / scale and of y.
    """
    LEVELS: tl.constexpr = 1 << BITS
    member, kind = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table, lookup = tables + member * (6 * LEVELS), lookups + (member * 2 + kind) * (4 * LEVELS + 16)
    borders, count, mu = table + kind * (2 * LEVELS - 1), LEVELS - 1 - kind, tl.load(table + (6 * LEVELS - 3))
    bin = tl.arange(0, 4 * LEVELS)
    surely = _borders_before(bin, borders, mu, count, kind, 1 / 16, BITS)
    possibly = _borders_before(bin + 1, borders, mu, count, kind, -1 / 16, BITS)
    window, steps = tl.max(possibly - surely, axis=0), 0
    for bit in tl.static_range(BITS):
        steps += tl.where(window >= (1 << bit), 1, 0)
    last = tl.maximum(count + 1 - (1 << steps), 0)  # from a later start the bisection would leave the borders
    tl.store(lookup + bin, tl.minimum(surely, last).to(tl.uint8))
    tl.store(lookup + 4 * LEVELS, steps.to(tl.uint8))


@jit
def _forward_kernel(
    matrices,  # (G, 4): addresses and row strides of weight and result
    plan,
    scale,
    tables,
    lookups,
    SOFT: tl.constexpr,
    BITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    LEVELS: tl.constexpr = 1 << BITS
    chunk, member, top, bottom, begin, end = _chunk(plan, ALIGN)
    weight, weight_stride = _matrix(matrices + member * 4, WEIGHT, ALIGN)
    out, out_stride = _matrix(matrices + member * 4 + 2, OUT, ALIGN)
    table, lookup = tables + member * (6 * LEVELS), lookups + member * (8 * LEVELS + 32)
    k, mu, inverse_log, low, high = _curve(table, BITS)
    for row_start in tl.range(bound(top), bound(bottom), ROWS, num_stages=1):
        row = row_start + tl.arange(0, ROWS)[:, None]
        s = _scales(plan, scale, chunk, row, row < bottom)
        inverse = _inverse_of(s)
        for column_start in tl.range(bound(begin), bound(end), COLS, num_stages=1):
            column = column_start + tl.arange(0, COLS)[None, :]
            mask = (row < bottom) & (column < end)
            w = tl.load(weight + row * weight_stride + column, mask=mask, other=0.0).to(tl.float32)
            if SOFT:
                _1, _2, _3, _4, left, jump, sigma = _soft(
                    w * inverse, table, lookup, k, mu, inverse_log, low, high, BITS
                )
                unit = left + jump * sigma
            else:
                if BITS <= 4:
                    code = _bisect(table, w, s, BITS)
                else:
                    code = _search(table, w, s, _bin(_roughly_companded(w * inverse, mu), BITS), lookup, BITS)
                unit = tl.load(table + (LEVELS - 1) + code)
            quantized = unit * s + (w - w)  # NaN where w is not finite
            tl.store(out + row * out_stride + column, quantized.to(OUT), mask=mask)


@jit
def _encode_kernel(
    weight, scale, borders, codes, rows, columns, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    across = tl.cdiv(columns, COLS)
    tile = tl.program_id(0).to(tl.int64)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLS + tl.arange(0, COLS)[None, :]
    mask = (row < rows) & (column < columns)
    w = tl.load(weight + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scale + row, mask=row < rows, other=0.0)
    tl.store(codes + row * columns + column, _bisect(borders, w, s, BITS).to(tl.uint8), mask=mask)


@jit
def _halves(x, TYPE: tl.constexpr):
    """x as the sum of two numbers of a 16-bit type."""
    high = x.to(TYPE)
    return high, (x - high.to(tl.float32)).to(TYPE)


@jit
def _one_hot(digit, identity, SIZE: tl.constexpr):
    """(SIZE, n): a column of the identity for each of n digits. Loading it takes fewer instructions than comparing."""
    return tl.trans(tl.load(identity + digit[:, None] * SIZE + tl.arange(0, SIZE)[None, :]))


@jit
def _no_cell_sums(N: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, HALVES: tl.constexpr):
    """What `_add_cell_sums` begins with, for tiles of N weights."""
    if BITS == 1:
        sums = (tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32), tl.zeros((N,), tl.float32))
    elif BITS <= 5:
        sums = (tl.zeros((SIZE, HALVES), tl.float32),)
    else:
        sums = (tl.zeros((16, 16), tl.float32), tl.zeros((16, 16), tl.float32), tl.zeros((16, 16), tl.float32))
    return sums


@jit
def _add_cell_sums(
    sums, cell, mass, moved, through, identity, BITS: tl.constexpr, SIZE: tl.constexpr, HALVES: tl.constexpr
):
    """Add to ``sums`` those of mass, moved and through (n,) over each cell: products with one-hot matrices on tensor
    cores.  Both halves of a number meet exact ones and zeros there and are added in float32.

    With 1 bit there is one cell.  Up to 5 bits: one (SIZE, n) one-hot matrix times an (n, HALVES) matrix of the
    three numbers' halves and zeros.  Above, the cell has two base-16 digits, and each number scales the one-hot matrix
    of the higher.
    """
    TYPE: tl.constexpr = identity.dtype.element_ty
    if BITS == 1:
        updated = (sums[0] + mass, sums[1] + moved, sums[2] + through)
    elif BITS <= 5:
        a, a_rest = _halves(mass, TYPE)
        b, b_rest = _halves(moved, TYPE)
        c, c_rest = _halves(through, TYPE)
        zero = tl.zeros(a.shape, TYPE)
        high = tl.join(tl.join(a, c), tl.join(b, zero))
        low = tl.join(tl.join(a_rest, c_rest), tl.join(b_rest, zero))
        values = tl.reshape(tl.join(high, low), (cell.shape[0], 8))
        if HALVES == 16:
            values = tl.reshape(tl.join(values, tl.zeros(values.shape, TYPE)), (cell.shape[0], 16))
        updated = (tl.dot(_one_hot(cell, identity, SIZE), values, sums[0], input_precision="ieee"),)
    else:
        ones, high = tl.trans(_one_hot(cell % 16, identity, SIZE)), _one_hot(cell // 16, identity, SIZE)
        updated = ()
        for index in tl.static_range(3):
            half, rest = _halves((mass, moved, through)[index], TYPE)
            total = tl.dot(high * half[None, :], ones, sums[index], input_precision="ieee")
            updated = updated + (tl.dot(high * rest[None, :], ones, total, input_precision="ieee"),)  # noqa: RUF005
    return updated


@jit
def _store_cell_sums(start, sums, BITS: tl.constexpr, SIZE: tl.constexpr, HALVES: tl.constexpr):
    """Write what `_add_cell_sums` added up as the gradients of A, J and o, in the table's order."""
    CELLS: tl.constexpr = (1 << BITS) - 1
    if BITS == 1:
        for number in tl.static_range(3):
            tl.store(start + number, tl.sum(sums[number]))
    elif BITS <= 5:
        cell, number = tl.arange(0, SIZE)[:, None], tl.arange(0, 4)[None, :]
        both = tl.sum(tl.reshape(sums[0], (SIZE, 4, HALVES // 4)), axis=2)
        tl.store(start + number * CELLS + cell, both, mask=(number < 3) & (cell < CELLS))
    else:
        cell = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        for number in tl.static_range(3):
            tl.store(start + number * CELLS + cell, sums[number], mask=cell < CELLS)


@jit
def _companding_slope_mu(x, y, slope, mu, inverse_log):
    """dF/dmu; the closed form cancels for small mu, where the series errs by mu^2."""
    if mu < 4e-3:
        size = tl.abs(x)
        result = x * (1.0 - size) * (0.5 - mu / 6.0 * (1.0 + 4.0 * size))
    else:
        result = x * slope * (1.0 / mu) - y * (inverse_log / (1.0 + mu))
    return result


@jit
def _backward_kernel(
    matrices,  # (G, 6): addresses and row strides of weight, incoming gradient and the weight's gradient
    plan,
    scale,
    tables,
    lookups,
    identity,
    dscale,  # one partial sum for every row of every chunk
    dtables,  # (chunks, 3 K + 1): one partial row per chunk, laid out as the table from A onward
    straight_through,
    TABLE_GRAD: tl.constexpr,
    BITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SIZE: tl.constexpr,
    HALVES: tl.constexpr,
):
    LEVELS: tl.constexpr = 1 << BITS
    chunk, member, top, bottom, begin, end = _chunk(plan, ALIGN)
    weight, weight_stride = _matrix(matrices + member * 6, WEIGHT, ALIGN)
    grad, grad_stride = _matrix(matrices + member * 6 + 2, GRAD, ALIGN)
    dweight, dweight_stride = _matrix(matrices + member * 6 + 4, WEIGHT, ALIGN)
    table, lookup = tables + member * (6 * LEVELS), lookups + member * (8 * LEVELS + 32)
    k, mu, inverse_log, low, high = _curve(table, BITS)
    soft_share = (1.0 - straight_through) * k
    dscale += tl.load(plan + chunk * 8 + 7) - top
    zeros = tl.zeros((ROWS, COLS), tl.float32)
    inner_y, inner_mu, below, above = zeros, zeros, zeros, zeros
    N: tl.constexpr = ROWS * COLS
    sums = _no_cell_sums(N, BITS, SIZE, HALVES)
    for row_start in tl.range(bound(top), bound(bottom), ROWS, num_stages=1):
        row = row_start + tl.arange(0, ROWS)[:, None]
        s = _scales(plan, scale, chunk, row, row < bottom)
        inverse = _inverse_of(s)
        total = zeros
        for column_start in tl.range(bound(begin), bound(end), COLS, num_stages=1):
            column = column_start + tl.arange(0, COLS)[None, :]
            mask = (row < bottom) & (column < end)
            w = tl.load(weight + row * weight_stride + column, mask=mask, other=0.0).to(tl.float32)
            g = tl.load(grad + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
            x, bad = w * inverse, w - w  # NaN where w is not finite; x overflows where the scale is tiny
            clamped, y, slope, cell, left, jump, sigma = _soft(x, table, lookup, k, mu, inverse_log, low, high, BITS)
            raised = jump * sigma
            spread = raised - raised * sigma
            mixed = soft_share * slope * spread + straight_through + bad
            tl.store(dweight + row * dweight_stride + column, (g * mixed).to(WEIGHT), mask=mask)
            total += g * (left + raised - tl.where(clamped == x, x, 0.0) * mixed)
            if TABLE_GRAD:
                g = g * s + bad
                through = g * spread
                inner = tl.where(clamped == x, through, 0.0)
                inner_y += inner * y
                inner_mu += inner * _companding_slope_mu(clamped, y, slope, mu, inverse_log)
                below += tl.where(x < clamped, through, 0.0)
                above += tl.where(x > clamped, through, 0.0)
                cell, mass = tl.reshape(cell, (N,)), tl.reshape(g, (N,))
                moved, through = mass * tl.reshape(sigma, (N,)), tl.reshape(through, (N,))
                sums = _add_cell_sums(sums, cell, mass, moved, through, identity, BITS, SIZE, HALVES)
        index = row_start + tl.arange(0, ROWS)
        tl.store(dscale + index, tl.sum(total, axis=1), mask=index < bottom)
    if TABLE_GRAD:
        start = dtables + chunk * (3 * LEVELS + 1)
        _store_cell_sums(start, sums, BITS, SIZE, HALVES)
        low_sum, high_sum = tl.sum(below), tl.sum(above)
        low_y, high_y = tl.load(table + (6 * LEVELS - 2)), tl.load(table + (6 * LEVELS - 1))
        curve = start + (3 * LEVELS - 3)
        tl.store(curve, tl.sum(inner_y) + low_y * low_sum + high_y * high_sum)
        tl.store(curve + 1, k * tl.sum(inner_mu))
        tl.store(curve + 2, k * low_sum)
        tl.store(curve + 3, k * high_sum)


@jit
def _sum_kernel(partial, segments, out, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """out[to + j] = sum_i partial[start + i * stride + j], i < count, j < width, for each segment; in a fixed order."""
    record = segments + tl.program_id(0).to(tl.int64) * 5
    start, count, stride = tl.load(record), tl.load(record + 1), tl.load(record + 2)
    width, to = tl.load(record + 3), tl.load(record + 4)
    for left in tl.range(bound(tl.program_id(1) * WIDTH), bound(width), bound(tl.num_programs(1) * WIDTH)):
        j = left + tl.arange(0, WIDTH)[None, :]
        total = tl.zeros((COUNT, WIDTH), tl.float32)
        for top in tl.range(0, bound(count), COUNT):
            i = top + tl.arange(0, COUNT)[:, None]
            total += tl.load(partial + start + i * stride + j, mask=(i < count) & (j < width), other=0.0)
        j = left + tl.arange(0, WIDTH)
        tl.store(out + to + j, tl.sum(total, axis=0), mask=j < width)


# --- launchers --------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a program holds at a time, and how much it works through."""

    rows: int
    columns: int
    chunk: int  # weights
    warps: int


FORWARD = Tile(8, 128, 4096, 4)
BACKWARD = Tile(8, 128, 8192, 4)
SUM = (64, 32)  # partial sums that a program of `_sum_kernel` holds at a time: how many, and of how many columns
HALVES = 8 if torch.version.hip is None else 16  # columns of the matrix of halves; AMD multiplies no narrower ones
ALIGN = 8  # weights: rows of a multiple of it are read 16 bytes at a time, whatever the dtype


def table_grad_tile(bits: int) -> Tile:
    """Where the table's gradient is formed, a program is one warp, which multiplies matrices by itself; its chunk is
    long enough for its 3 K sums to be few beside the weights."""
    return Tile(1, 256 if bits <= 5 else 128, 8192 if bits <= 5 else 32768, 1)


def one_hot_size(bits: int) -> int:
    """Rows of the one-hot matrix: all cells up to 5 bits, a digit's values above."""
    return 32 if bits == 5 else 16


class _Matrix(NamedTuple):
    """A tensor as a matrix of one row per channel."""

    tensor: Tensor  # keeps the memory
    address: int
    stride: int  # from row to row
    aligned: bool


Matrices = tuple[_Matrix, ...]  # the weight's and those of its size that go with it


def _as_matrix(tensor: Tensor) -> _Matrix:
    """Without a copy where every channel lies in one piece."""
    columns = stride = tensor.numel() // max(len(tensor), 1)
    if not tensor.is_contiguous():
        tensor, stride = _with_whole_rows(tensor, columns)
    address = tensor.data_ptr()
    return _Matrix(tensor, address, stride, columns % ALIGN == 0 and stride % ALIGN == 0 and address % 16 == 0)


def _with_whole_rows(tensor: Tensor, columns: int) -> tuple[Tensor, int]:
    """(the tensor, or a copy, in which every row lies in one piece; the stride of the rows)"""
    try:
        matrix = tensor.view(len(tensor), columns)
    except RuntimeError:
        return tensor.contiguous(), columns
    return (matrix, matrix.stride(0)) if matrix.stride(1) == 1 else (tensor.contiguous(), columns)


class _Plan(NamedTuple):
    """Who does what, for weights of given shapes."""

    chunks: Tensor  # (chunks, 8): weight, first and end row, first and end column, first scale, its stride, first sum
    aligned: int  # chunks of aligned weights, which come first
    rows: int  # partial sums of the scales' gradients
    scale_segments: Tensor  # what `_sum_kernel` makes of the partial sums
    table_segments: Tensor


@functools.lru_cache(maxsize=256)
def _plan(
    shapes: tuple[tuple[int, int], ...],
    aligned: tuple[bool | None, ...],
    per_channel: bool,
    levels: int,
    tile: Tile,
    device: torch.device,
) -> _Plan:
    """``aligned`` says of each weight whether its matrices are; None leaves the weight out."""
    offsets = list(itertools.accumulate((rows if per_channel else 1 for rows, _ in shapes), initial=0))
    tail = 3 * levels + 1  # entries of a table from A onward
    records, scale_segments, table_segments = [], [], []
    chunks = first_sum = aligned_chunks = 0
    members = [member for member, known in enumerate(aligned) if known is not None]
    for member in sorted(members, key=lambda member: not aligned[member]):
        (rows, columns), offset = shapes[member], offsets[member]
        record, spans = _chunks_of(member, rows, columns, tile)
        record[:, 5:] += torch.tensor([offset, int(per_channel), first_sum], device="cpu")
        records.append(record)
        sums = [spans, rows, rows] if per_channel else [spans * rows, 1, 1]
        scale_segments.append([first_sum, *sums, offset])
        table_segments.append([chunks * tail, len(record), tail, tail, (2 * member + 1) * 3 * levels - 1])
        chunks, first_sum = chunks + len(record), first_sum + spans * rows
        aligned_chunks += len(record) if aligned[member] else 0
    segments = (torch.tensor(lists, device="cpu").to(device) for lists in (scale_segments, table_segments))
    return _Plan(torch.cat(records).to(device), aligned_chunks, first_sum, *segments)


def _chunks_of(member: int, rows: int, columns: int, tile: Tile) -> tuple[Tensor, int]:
    """(records of the chunks of a weight, spans side by side)"""
    widest = tile.chunk // (tile.rows * tile.columns) * tile.columns
    span = max(1, min(columns, widest))
    height = max(1, tile.chunk // (span * tile.rows)) * tile.rows
    starts = torch.arange(0, rows, height, device="cpu"), torch.arange(0, columns, span, device="cpu")
    top, left = torch.meshgrid(*starts, indexing="ij")
    spans = left.shape[1]
    top, left = top.flatten(), left.flatten()
    bottom, right = (top + height).clamp(max=rows), (left + span).clamp(max=columns)
    nothing = torch.zeros_like(top)
    return torch.stack(
        [nothing + member, top, bottom, left, right, nothing, nothing, left // span * rows + top], 1
    ), spans


_captured: list[tuple[_Plan, Tensor]] = []  # what CUDA graphs will read again whenever they are replayed


@functools.lru_cache(maxsize=1024)
def _uploaded(numbers: tuple[int, ...], device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """``numbers`` on ``device``, and the page-locked memory from which they are copied while the CPU goes on."""
    host = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    host = host.pin_memory() if device.type == "cuda" else host
    return host.to(device, non_blocking=True), host


def _layout(
    weights: Sequence[Tensor], matrices: Sequence[Matrices | None]
) -> tuple[tuple[tuple[int, int], ...], tuple[bool | None, ...]]:
    """(shapes as matrices, whether everything of it is aligned) of each weight."""
    shapes = tuple((len(weight), weight.numel() // max(len(weight), 1)) for weight in weights)
    return shapes, tuple(None if some is None else all(m.aligned for m in some) for some in matrices)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _addresses(matrices: Sequence[Matrices | None], plan: _Plan, device: torch.device) -> Tensor:
    """Address and row stride of each weight's matrices, on the device; of those left out, anything."""
    some = next(some for some in matrices if some is not None)
    numbers = tuple(number for own in matrices for m in own or some for number in (m.address, m.stride))
    if not _capturing(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _uploaded(numbers, device, stream)[0]
    # Not from the cache, nor into it: this copy is made by the graph's replay, and its target is the graph's memory.
    addresses, host = _uploaded.__wrapped__(numbers, device, 0)
    _captured.append((plan, host))
    return addresses


@functools.lru_cache(maxsize=16)
def _identity(size: int, device: torch.device) -> Tensor:
    """Copied, so complete on every stream.  The interpreter multiplies bfloat16 wrongly."""
    return torch.eye(size, dtype=torch.float32 if INTERPRETED else torch.bfloat16, device="cpu").to(device)


def _bits(tables: Tensor) -> int:
    return (tables.shape[-1] // 6).bit_length() - 1


def _type(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _lookups(tables: Tensor) -> Tensor:
    """(G, 2, 4 K + 16) uint8: where the search among thresholds and among edges begins, and its steps."""
    bits = _bits(tables)
    lookups = torch.empty(len(tables), 2, (4 << bits) + 16, dtype=torch.uint8, device=tables.device)
    if bits > 2:  # with fewer borders nothing is looked up
        _lookup_kernel[(len(tables), 2)](tables, lookups, bits)
    return lookups


def _sum(partial: Tensor, segments: Tensor, out: Tensor, width: int) -> None:
    _sum_kernel[(len(segments), min(64, cdiv(width, SUM[1])))](partial, segments, out, *SUM)


def forward(
    weights: Sequence[Tensor], scale: Tensor, tables: Tensor, per_channel: bool, soft: bool, dtype: torch.dtype | None
) -> list[Tensor]:
    """Arguments and result are those of the operator."""
    dtype = dtype or weights[0].dtype
    results = [torch.empty(weight.shape, dtype=dtype, device=weight.device) for weight in weights]
    tables, bits = tables.contiguous(), _bits(tables)
    types = _type(weights[0].dtype), _type(dtype)
    matrices = [(_as_matrix(weight), _as_matrix(out)) for weight, out in zip(weights, results, strict=True)]
    with launching(weights[0]):
        plan = _plan(*_layout(weights, matrices), per_channel, 1 << bits, FORWARD, scale.device)
        tensors = scale.contiguous(), tables, _lookups(tables)
        addresses = _addresses(matrices, plan, scale.device)
        for chunks, align in ((plan.chunks[: plan.aligned], ALIGN), (plan.chunks[plan.aligned :], 1)):
            if len(chunks):
                options = soft, bits, *types, align, FORWARD.rows, FORWARD.columns
                _forward_kernel[(len(chunks),)](
                    addresses, chunks, *tensors, *options, num_warps=FORWARD.warps, enable_fp_fusion=True
                )
    return results


def backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    scale: Tensor,
    tables: Tensor,
    per_channel: bool,
    straight_through: float,
    table_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Arguments and result are those of the operator."""
    dweights = [w.new_empty(0 if grad is None else w.shape) for grad, w in zip(grads, weights, strict=True)]
    dscale, dtables = torch.zeros_like(scale), torch.zeros_like(tables, memory_format=torch.contiguous_format)
    used = [grad for grad in grads if grad is not None]
    if not used:
        return dweights, dscale, dtables
    tables, bits = tables.contiguous(), _bits(tables)
    types = _type(weights[0].dtype), _type(used[0].dtype)
    matrices = [
        None if grad is None else (_as_matrix(weight), _as_matrix(grad), _as_matrix(dweight))
        for weight, grad, dweight in zip(weights, grads, dweights, strict=True)
    ]
    tile = table_grad_tile(bits) if table_grad else BACKWARD
    size = one_hot_size(bits)
    with launching(weights[0]):
        plan = _plan(*_layout(weights, matrices), per_channel, 1 << bits, tile, scale.device)
        scale_sums, tail = scale.new_empty(plan.rows), 3 * 2**bits + 1
        table_sums = tables.new_empty(len(plan.chunks) if table_grad else 0, tail)
        tensors = scale.contiguous(), tables, _lookups(tables), _identity(size, scale.device), scale_sums
        addresses = _addresses(matrices, plan, scale.device)
        for part, align in ((slice(plan.aligned), ALIGN), (slice(plan.aligned, None), 1)):
            if chunks := len(plan.chunks[part]):
                options = straight_through, table_grad, bits, *types, align, tile.rows, tile.columns, size, HALVES
                arguments = addresses, plan.chunks[part], *tensors, table_sums[part], *options
                _backward_kernel[(chunks,)](*arguments, num_warps=tile.warps, enable_fp_fusion=True)
        _sum(scale_sums, plan.scale_segments, dscale, max(map(len, weights)))
        if table_grad:
            _sum(table_sums, plan.table_segments, dtables, tail)
    return dweights, dscale, dtables


def encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    """Arguments and result are those of the operator."""
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return codes
    rows, columns = scale.numel(), weight.numel() // scale.numel()
    tile = FORWARD.rows, FORWARD.columns
    grid = (cdiv(rows, tile[0]) * cdiv(columns, tile[1]),)
    tensors = weight.contiguous(), scale.contiguous(), borders.contiguous(), codes
    with launching(weight):
        _encode_kernel[grid](*tensors, rows, columns, borders.numel().bit_length(), *tile)
    return codes
