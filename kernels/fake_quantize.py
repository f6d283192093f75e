"""Fake quantization of a weight: hard and soft forward, their shared backward, and encoding.

Mathematics (arXiv 2210.09188; notation and tables in `gq_triton.kernels.tables`).  For a weight w of a channel with
scale s > 0:

    x = w / s                      y = F(clamp(x, F^-1(z_0), F^-1(z_{K-1})))
    hard = s c_code                code = how many thresholds t_i satisfy fp32(s t_i) < w
    soft = s q                     q = A_j + J_j sigma,  sigma = sigmoid(k y + o_j),  j = how many edges lie below y

Backward, of both (hard uses the derivative of soft), for an incoming gradient g and a straight-through share h:

    dq/dx = J_j k sigma (1 - sigma) F'(x)        m = (1 - h) dq/dx + h
    dw = g m                                     ds = sum over the channel of g (q - [x not clamped] x m)

with dq/dx taken at the clamped x: a weight beyond the outer centroids keeps the derivative of the border, or it could
never return.  The gradient of the table, summed over all weights with G = g s and d = J_j sigma (1 - sigma), is

    dA_j = sum_j G          dJ_j = sum_j G sigma               do_j = sum_j G d
    dk = sum G d y          dmu = k sum_{not clamped} G d dF/dmu
    dz_0 = k sum_{clamped to z_0} G d                          and likewise z_{K-1}

where sum_j runs over the weights of cell j.  Everything is computed in float32 (float64 for float64 weights).  A
channel of scale 0 gives exact zeros.  A weight that is not finite gives NaN at its place, and NaN gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import fake_quantize_cpu as cpu
from gq_triton.kernels.backend import INTERPRETED, bound, cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.tables import compress, split_table

__all__ = ["encode", "fake_quantize", "reference"]


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    weight: Tensor,
    scale: Tensor,
    centroids: Tensor,
    values: Tensor,
    *,
    mu: Tensor,
    hardness: Tensor,
    forward: str = "soft",
    squared: bool = False,
) -> Tensor:
    """The definition, with one probability for every weight and centroid, in the dtype it is given; arguments as those
    of `gq_triton.functional.fake_quantize`, with the codebook ``values`` (K,) and a 0-d ``mu``.

    ``squared`` takes the squared instead of the absolute distance (an ablation; the kernels have no such form).
    """
    column = scale.reshape(-1, *[1] * (weight.dim() - 1))
    y = compress((weight / column).clamp(-1, 1), mu)
    distance = (y.unsqueeze(-1) - centroids).abs()
    if forward == "hard":
        return column * values[distance.argmin(-1)]
    spacing = (centroids[-1] - centroids[0]) / (centroids.numel() - 1)
    relative = distance / spacing
    probability = torch.softmax(-hardness * (relative.square() if squared else relative), dim=-1)
    return column * (probability * values).sum(-1)


# --- Triton -----------------------------------------------------------------------------------------------------------
# A tile is ROWS channels by COLS weights; offsets are 64-bit.  With K = LEVELS, the parts of the flat table begin at:
# thresholds 0, values K - 1, edges 2 K - 1, bounds 3 K - 3, A 3 K - 1, J 4 K - 2, o 5 K - 3, curve 6 K - 4.


@jit
def _tile(tile, rows, columns, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(row indices, offsets, mask) of a tile; tiles are numbered along the rows."""
    across = tl.cdiv(columns, COLS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLS + tl.arange(0, COLS)
    offset = row[:, None] * columns + column[None, :]
    return row, offset, (row[:, None] < rows) & (column[None, :] < columns)


@jit
def _count_below(borders, x, scale, BITS: tl.constexpr, COUNT: tl.constexpr):
    """How many of the COUNT < 2**BITS sorted borders b satisfy scale * b < x: one bisection step per bit."""
    count = tl.zeros(x.shape, tl.int32)
    for bit in tl.static_range(BITS):
        step = 1 << (BITS - 1 - bit)
        index = count + (step - 1)
        border = tl.load(borders + index, mask=index < COUNT, other=float("inf"))
        count += tl.where(scale * border < x, step, 0)
    return count


@jit
def _log1p(x):
    """ln(1 + x) to a few ulp for x >= 0, however small (Kahan): the rounding of 1 + x cancels in the quotient."""
    one_plus = 1.0 + x
    rounded = one_plus - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_plus) * (x / rounded))


@jit
def _inverse_of(scale):
    return tl.where(scale > 1.1754943508222875e-38, 1.0 / scale, 0.0)


@jit
def _soft(x, table, BITS: tl.constexpr):
    """(clamped x, y, mu |x|, cell, J, sigma) of x = weight / scale."""
    LEVELS: tl.constexpr = 1 << BITS
    mu = tl.maximum(tl.load(table + (6 * LEVELS - 3)), 1e-20)
    low, high = tl.load(table + (3 * LEVELS - 3)), tl.load(table + (3 * LEVELS - 2))
    clamped = tl.minimum(tl.maximum(x, low), high)
    stretch = tl.abs(clamped) * mu
    size = _log1p(stretch) / _log1p(mu)
    y = tl.where(clamped < 0, -size, size)
    cell = _count_below(table + (2 * LEVELS - 1), y, 1.0, BITS, LEVELS - 2)
    k = tl.load(table + (6 * LEVELS - 4))
    sigma = tl.sigmoid(k * y + tl.load(table + (5 * LEVELS - 3) + cell))
    return clamped, y, stretch, cell, tl.load(table + (4 * LEVELS - 2) + cell), sigma


@jit
def _forward_kernel(
    weight,
    scale,
    table,
    out,
    rows,
    columns,
    SOFT: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    LEVELS: tl.constexpr = 1 << BITS
    row, offset, mask = _tile(tl.program_id(0).to(tl.int64), rows, columns, ROWS, COLS)
    w = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    if SOFT:
        _, _, _, cell, jump, sigma = _soft(w * _inverse_of(s), table, BITS)
        unit = tl.load(table + (3 * LEVELS - 1) + cell) + jump * sigma
    else:
        unit = tl.load(table + (LEVELS - 1) + _count_below(table, w, s, BITS, LEVELS - 1))
    quantized = unit * s + (w - w)  # NaN where w is not finite
    tl.store(out + offset, quantized.to(out.dtype.element_ty), mask=mask)


@jit
def _encode_kernel(
    weight, scale, borders, codes, rows, columns, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, offset, mask = _tile(tl.program_id(0).to(tl.int64), rows, columns, ROWS, COLS)
    w = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
    code = _count_below(borders, w, s, BITS, (1 << BITS) - 1)
    tl.store(codes + offset, code.to(tl.uint8), mask=mask)


@jit
def _add_dot(sums, ones, total):
    """total + sums @ ones on tensor cores: the sums keep two mantissas of the one-hot's dtype (16 bits of bfloat16)."""
    high = sums.to(ones.dtype)
    low = (sums - high.to(tl.float32)).to(ones.dtype)
    return tl.dot(low, ones, tl.dot(high, ones, total, input_precision="ieee"), input_precision="ieee")


@jit
def _companding_slope_mu(clamped, y, stretch, mu, log):
    """dF/dmu; the closed form cancels for small mu, where the series errs by mu^2."""
    size = tl.abs(clamped)
    series = clamped * (1.0 - size) * (0.5 - mu / 6.0 * (1.0 + 4.0 * size))
    closed = clamped / (stretch + 1.0) / log - y / (log * (1.0 + mu))
    return tl.where(mu < 4e-3, series, closed)


@jit
def _add_cell_sums(cell, g, moved, through, mass, raised, passed, ONE_HOT: tl.constexpr, BITS: tl.constexpr):
    """Add the sums of g, moved and through (1, n) over the weights of every cell: one-hot matrices times vectors.

    Up to 4 bits the three sums are rows 0, 1, 2 of ``mass`` and the cell is the column; above, each has its own matrix
    and the cell's two base-16 digits are row and column.
    """
    digit = tl.arange(0, 16)
    ones = (tl.reshape(cell % 16, (cell.shape[1], 1)) == digit[None, :]).to(ONE_HOT)
    if BITS <= 4:
        row = digit[:, None]
        sums = tl.where(row == 0, g, tl.where(row == 1, moved, tl.where(row == 2, through, 0.0)))
        mass = _add_dot(sums, ones, mass)
    else:
        here = cell // 16 == digit[:, None]
        mass = _add_dot(tl.where(here, g, 0.0), ones, mass)
        raised = _add_dot(tl.where(here, moved, 0.0), ones, raised)
        passed = _add_dot(tl.where(here, through, 0.0), ones, passed)
    return mass, raised, passed


@jit
def _store_cell_sums(start, mass, raised, passed, BITS: tl.constexpr):
    """Write what `_add_cell_sums` added up as the gradients of A, J and o, in the table's order."""
    CELLS: tl.constexpr = (1 << BITS) - 1
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    if BITS <= 4:
        tl.store(start + row * CELLS + column, mass, mask=(row < 3) & (column < CELLS))
    else:
        cell = row * 16 + column
        tl.store(start + cell, mass, mask=cell < CELLS)
        tl.store(start + CELLS + cell, raised, mask=cell < CELLS)
        tl.store(start + 2 * CELLS + cell, passed, mask=cell < CELLS)


@jit
def _backward_kernel(
    grad,
    weight,
    scale,
    table,
    dweight,
    dscale,  # (tiles across, rows): one partial sum per tile
    dtable,  # (programs, 3 LEVELS + 1): one partial row per program, laid out as the table from A onward
    rows,
    columns,
    straight_through,
    TABLE_GRAD: tl.constexpr,
    ONE_HOT: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    LEVELS: tl.constexpr = 1 << BITS
    SIZE: tl.constexpr = ROWS * COLS
    across = tl.cdiv(columns, COLS)
    k, mu = tl.load(table + (6 * LEVELS - 4)), tl.maximum(tl.load(table + (6 * LEVELS - 3)), 1e-20)
    log = _log1p(mu)
    mass, raised, passed = (
        tl.zeros((16, 16), tl.float32),
        tl.zeros((16, 16), tl.float32),
        tl.zeros((16, 16), tl.float32),
    )
    dk, dmu, dlow, dhigh = 0.0, 0.0, 0.0, 0.0
    first, tiles, programs = tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS) * across, tl.num_programs(0)
    # One stage: a pipelined loop would carry every dependent look-up of the bisection across iterations.
    for tile in tl.range(bound(first), bound(tiles), bound(programs), num_stages=1):
        row, offset, mask = _tile(tile, rows, columns, ROWS, COLS)
        w = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        x = w * _inverse_of(s) + (w - w)
        clamped, y, stretch, cell, jump, sigma = _soft(x, table, BITS)
        q = tl.load(table + (3 * LEVELS - 1) + cell) + jump * sigma
        spread = jump * sigma * (1.0 - sigma)
        slope = (1.0 - straight_through) * k * spread * (mu / log) / (stretch + 1.0) + straight_through + (w - w)
        tl.store(dweight + offset, (g * slope).to(dweight.dtype.element_ty), mask=mask)
        inside = clamped == x
        partial = tl.sum(g * (q - tl.where(inside, x, 0.0) * slope), axis=1)
        tl.store(dscale + (tile % across) * rows + row, partial, mask=row < rows)
        if TABLE_GRAD:
            g = g * s + (w - w)
            through = g * spread
            inner = tl.where(inside, through, 0.0)
            dk += tl.sum(through * y)
            dmu += k * tl.sum(inner * _companding_slope_mu(clamped, y, stretch, mu, log))
            dlow += k * tl.sum(tl.where(x < clamped, through, 0.0))
            dhigh += k * tl.sum(tl.where(x > clamped, through, 0.0))
            cell, g = tl.reshape(cell, (1, SIZE)), tl.reshape(g, (1, SIZE))
            moved, through = g * tl.reshape(sigma, (1, SIZE)), tl.reshape(through, (1, SIZE))
            sums = _add_cell_sums(cell, g, moved, through, mass, raised, passed, ONE_HOT, BITS)
            mass, raised, passed = sums
    if TABLE_GRAD:
        start = dtable + tl.program_id(0).to(tl.int64) * (3 * LEVELS + 1)
        _store_cell_sums(start, mass, raised, passed, BITS)
        curve = start + (3 * LEVELS - 3)
        tl.store(curve, dk)
        tl.store(curve + 1, dmu)
        tl.store(curve + 2, dlow)
        tl.store(curve + 3, dhigh)


# --- launchers --------------------------------------------------------------------------------------------------------

TILE = 512  # weights of a program
BACKWARD_PROGRAMS = 1024  # enough to fill a GPU, few enough that summing their partial rows is cheap


def backward_tile(bits: int) -> int:
    """Weights per step of a backward program, which is a single warp: wider one-hot matrices overflow its registers."""
    return 128 if bits <= 3 else 64


def choose_tile(columns: int, size: int) -> tuple[int, int]:
    """(ROWS, COLS) of a tile of ``size`` weights: several rows where they are short."""
    cols = min(size, max(16, next_power_of_2(columns)))
    return size // cols, cols


def _bits(table: Tensor) -> int:
    return (table.numel() // 6).bit_length() - 1


def _launch_forward(weight: Tensor, scale: Tensor, table: Tensor, soft: bool) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if not weight.numel():
        return out
    rows, columns = scale.numel(), weight.numel() // scale.numel()
    tile = choose_tile(columns, TILE)
    grid = (cdiv(rows, tile[0]) * cdiv(columns, tile[1]),)
    tensors = weight.contiguous(), scale.contiguous(), table.contiguous(), out
    with launching(weight):
        _forward_kernel[grid](*tensors, rows, columns, soft, _bits(table), *tile)
    return out


def _launch_encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if not weight.numel():
        return codes
    rows, columns = scale.numel(), weight.numel() // scale.numel()
    tile = choose_tile(columns, TILE)
    grid = (cdiv(rows, tile[0]) * cdiv(columns, tile[1]),)
    tensors = weight.contiguous(), scale.contiguous(), borders.contiguous(), codes
    with launching(weight):
        _encode_kernel[grid](*tensors, rows, columns, borders.numel().bit_length(), *tile)
    return codes


def _launch_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, table: Tensor, straight_through: float, table_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if not weight.numel():
        return dweight, torch.zeros_like(scale), torch.zeros_like(table)
    rows, columns, bits = scale.numel(), weight.numel() // scale.numel(), _bits(table)
    tile = choose_tile(columns, backward_tile(bits))
    across = cdiv(columns, tile[1])
    programs = min(BACKWARD_PROGRAMS, cdiv(rows, tile[0]) * across)
    dscale = scale.new_empty(across, rows)
    tail = 3 * 2**bits + 1
    dtable = table.new_empty(programs, tail) if table_grad else table.new_zeros(1, tail)
    tensors = [t.contiguous() for t in (grad, weight, scale, table)] + [dweight, dscale, dtable]
    options = straight_through, table_grad, tl.float32 if INTERPRETED else tl.bfloat16, bits
    with launching(weight):
        _backward_kernel[(programs,)](*tensors, rows, columns, *options, *tile, num_warps=1)
    return dweight, dscale.sum(0), torch.nn.functional.pad(dtable.sum(0), (table.numel() - tail, 0))


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::fake_quantize", mutates_args=(), device_types="cpu")
def fake_quantize(
    weight: Tensor, scale: Tensor, table: Tensor, soft: bool, straight_through: float, table_grad: bool
) -> Tensor:
    """Quantized ``weight``, contiguous, in its dtype.

    Args:
        weight: (C, ...), any floating dtype.
        scale: (C,) or (1,), float32 (float64 for a float64 weight).
        table: flat table (`build_table`) in the scale's dtype.
        soft: the soft instead of the hard value.
        straight_through: share h of the identity in the weight's gradient.
        table_grad: whether the backward pass forms the gradient of the table.
    """
    _check_values(scale, table)
    return cpu.forward(weight, scale, table, soft)


@fake_quantize.register_kernel("cuda")
def _(weight, scale, table, soft, straight_through, table_grad):
    return _launch_forward(weight, scale, table, soft)


@fake_quantize.register_fake
def _(weight, scale, table, soft, straight_through, table_grad):
    return weight.new_empty(weight.shape)


@torch.library.custom_op("gq_triton::fake_quantize_backward", mutates_args=(), device_types="cpu")
def fake_quantize_backward(
    grad: Tensor, weight: Tensor, scale: Tensor, table: Tensor, straight_through: float, table_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, scale and table (zeros where ``table_grad`` is false)."""
    return cpu.backward(grad, weight, scale, table, straight_through, table_grad)


fake_quantize_backward.register_kernel("cuda")(_launch_backward)


@fake_quantize_backward.register_fake
def _(grad, weight, scale, table, straight_through, table_grad):
    return weight.new_empty(weight.shape), torch.empty_like(scale), torch.empty_like(table)


def _setup_context(ctx, inputs, output) -> None:
    weight, scale, table, _, ctx.straight_through, ctx.table_grad = inputs
    ctx.save_for_backward(weight, scale, table)


def _backward(ctx, grad):
    weight, scale, table = ctx.saved_tensors
    grads = fake_quantize_backward(grad, weight, scale, table, ctx.straight_through, ctx.table_grad)
    return *grads, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("gq_triton::encode", mutates_args=(), device_types="cpu")
def encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    """Codes (uint8, contiguous, shape of ``weight``): how many borders b (K-1,) satisfy ``scale * b < weight``."""
    return cpu.encode(weight, scale, borders)


encode.register_kernel("cuda")(_launch_encode)


@encode.register_fake
def _(weight, scale, borders):
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def _check_values(scale: Tensor, table: Tensor) -> None:
    """Checked on the CPU only: on a GPU the answer would have to be waited for."""
    if (scale < 0).any():
        raise ValueError(f"scale must not be negative, but its smallest entry is {scale.min().item():g}")
    parts = split_table(table)
    if not 0 <= parts.curve[0] < torch.inf or (parts.thresholds.diff() < 0).any():
        raise ValueError("centroids must be sorted and not all equal, and hardness finite and not negative")
