"""Companding, codebooks, thresholds, and the tables that make the quantizer's cost independent of the number of
centroids.

Mathematics (arXiv 2210.09188, section 2; the table form is ours).  K = 2^bits centroids z_0 < ... < z_{K-1} live in
companded space, where x in [-1, 1] becomes

    y = F(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu)          mu -> 0: y = x
    c_i = F^-1(z_i) = sign(z_i) ((1 + mu)^|z_i| - 1) / mu    the codebook, snapped to its deployed dtype

*Hard*: the nearest centroid in companded space.  Its code is the number of borders (z_i + z_{i+1}) / 2 below y, ties
going to the lower code; F is increasing, so the borders are expanded once (thresholds t_i) and no weight is ever
companded.  x beyond [-1, 1] is clamped, so a border at or above 1 is never crossed (t = +inf) and one below -1 always
is (t = -inf).

*Soft*: p_i = softmax_i(-a |y - z_i| / D) with hardness a and mean spacing D = (z_{K-1} - z_0) / (K - 1).  With kappa =
a / D and y in the cell [z_j, z_{j+1}], every centroid on the left has the factor e^{-kappa y} in common and every one
on the right e^{+kappa y}, hence

    sum_i p_i c_i = A_j + J_j sigmoid(2 kappa y + o_j)
    l_j = sum_{i<=j} e^{-kappa (z_j - z_i)}      m_j = sum_{i<=j} e^{-kappa (z_j - z_i)} c_i     A_j = m_j / l_j
    r_j = sum_{i>=j} e^{-kappa (z_i - z_j)}      n_j = sum_{i>=j} e^{-kappa (z_i - z_j)} c_i     B_j = n_j / r_j
    J_j = B_{j+1} - A_j                          o_j = ln r_{j+1} - ln l_j - kappa (z_j + z_{j+1})

which is exact for every K and every spacing.  Beyond the outer centroids the sum is constant: y is clamped to [z_0,
z_{K-1}].  No exponent is positive, so no hardness overflows, and the sums are linear recurrences: with f_j =
e^{-kappa (z_j - z_{j-1})}

    l_j = 1 + f_j l_{j-1}        m_j = c_j + f_j m_{j-1}        r_j = 1 + f_{j+1} r_{j+1}    n_j = c_j + f_{j+1} n_{j+1}

The table of one quantizer is one flat row, so that one pointer and one gradient serve every kernel (`split_table`):

    thresholds (K-1) | values c (K) | edges z_1..z_{K-2} (K-2) | bounds F^-1(z_0), F^-1(z_{K-1})
    | A (K-1) | J (K-1) | o (K-1) | curve 2 kappa, mu, z_0, z_{K-1}

It is computed in float64 and is differentiable in the centroids and mu.  Thresholds, edges and bounds only say *where*;
they have no gradient, and neither have the values, whose place A and J take.

Backward, from the gradients dA, dJ, do and those of the curve.  Each sum receives (none from a cell that is not there)

    dm_j = (dA_j - dJ_j) / l_j      dl_j = -(do_j + A_j l_j dm_j) / l_j
    dn_j = dJ_{j-1} / r_j           dr_j = (do_{j-1} - B_j r_j dn_j) / r_j

The adjoint of a recurrence is the same recurrence in the other direction: M, L from dm, dl in that of r and n, and N, R
from dn, dr in that of l and m.  The exponent kappa (z_j - z_{j-1}) of f_j so receives -q_j, and u_j = kappa z_j and c_j

    q_j = f_j (M_j m_{j-1} + L_j l_{j-1} + N_{j-1} n_j + R_{j-1} r_j)
    du_j = q_{j+1} - q_j - do_j - do_{j-1}                       dc_j = M_j + N_j

The rounding of the codebook passes its gradient straight through.  What remains is

    dkappa = 2 d(2 kappa) + sum_j z_j du_j      dz_j = kappa du_j + dc_j dF^-1/dy(z_j)      dmu += dc_j dF^-1/dmu(z_j)
    dz_{K-1} += dz_{K-1}(curve) - dkappa kappa / (z_{K-1} - z_0)        dz_0 += dz_0(curve) + the same with +

The bytes that must move, 28 K per quantizer forward and 20 K backward, are nothing: a launch is what the tables of any
number of quantizers cost.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gq_triton.kernels.backend import jit, launching, tl

__all__ = [
    "CODEBOOK_SCALES",
    "Table",
    "build_tables",
    "codebook",
    "compress",
    "expand",
    "load_values",
    "reference",
    "snap",
    "split_table",
    "stored_values",
    "thresholds",
]

SMALL_MU = 1e-5  # below it the closed forms cancel in the derivative by mu; that of the series is exact to 2e-10
TINY_MU = 2.0**-67  # the closed form of F^-1 is the identity, to the last bit
CODEBOOK_SCALES = {torch.int8: 127.0, torch.float8_e4m3fn: 256.0}  # a stored entry q stands for the value q / scale
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Table(NamedTuple):
    """Views of flat tables (..., 6 K); the names are those of the module docstring."""

    thresholds: Tensor  # (..., K - 1)
    values: Tensor  # (..., K)
    edges: Tensor  # (..., K - 2)
    bounds: Tensor  # (..., 2)      F^-1(z_0), F^-1(z_{K-1})
    left: Tensor  # (..., K - 1)   A
    jump: Tensor  # (..., K - 1)   J
    offset: Tensor  # (..., K - 1) o
    curve: Tensor  # (..., 4)      2 kappa, mu, z_0, z_{K-1}


def table_size(levels: int) -> int:
    """Entries in the flat table of ``levels`` centroids."""
    return 6 * levels


def split_table(table: Tensor) -> Table:
    """The parts of flat tables (..., 6 K), as views."""
    levels = table.shape[-1] // 6
    return Table(*table.split([levels - 1, levels, levels - 2, 2, levels - 1, levels - 1, levels - 1, 4], -1))


# --- companding -------------------------------------------------------------------------------------------------------


def compress(x: Tensor, mu: Tensor) -> Tensor:
    """F: mu-law companding of ``x`` (any shape); odd, increasing, fixes -1, 0 and 1; ``mu`` >= 0 broadcasts to it."""
    sign = torch.where(x < 0, -1, 1)  # abs() would have no gradient at 0
    size = x * sign
    series = size + mu * size * (1 - size) * (0.5 - mu * (4 * size + 1) / 12)
    large = mu.clamp(min=SMALL_MU)
    closed = torch.log1p(large * size) / torch.log1p(large)
    return torch.where(mu < SMALL_MU, series, closed) * sign


def expand(y: Tensor, mu: Tensor) -> Tensor:
    """F^-1: the inverse of `compress`."""
    return _Expand.apply(y, mu)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, mu: Tensor) -> Tensor:
        ctx.save_for_backward(y, mu)
        return _expand(y, mu)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, mu = ctx.saved_tensors
        slope, slope_mu = _expand_slopes(y, mu, _expand(y, mu))
        return grad * slope, (grad * slope_mu).sum_to_size(mu.shape)


def _expand(y: Tensor, mu: Tensor) -> Tensor:
    mu = mu.clamp(min=TINY_MU)
    return torch.expm1(y.abs() * torch.log1p(mu)).div_(mu).copysign_(y)


def _expand_slopes(y: Tensor, mu: Tensor, expanded: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of ``expanded = expand(y, mu)`` in y and in mu."""
    size, reach, large = y.abs(), expanded.abs(), mu.clamp(min=TINY_MU)
    power = large * reach + 1
    slope = power * (torch.log1p(large) / large)
    series = size * (size - 1) * (mu * (size - 2) / 3 + 0.5)
    slope_mu = torch.where(mu < SMALL_MU, series, (size * power / (large + 1) - reach) / large)
    return slope, slope_mu * y.sign()


def snap(values: Tensor, dtype: str | None) -> Tensor:
    """Round codebook values to those their deployed dtype can hold; the gradient passes straight through."""
    return values + (_round_to(values.detach(), dtype) - values).detach()


def _round_to(values: Tensor, dtype: str | None) -> Tensor:
    if dtype in (None, "float"):
        return values
    stored = _DTYPES[dtype]
    scale = CODEBOOK_SCALES[stored]
    scaled = values * scale
    return (scaled.round() if dtype == "int8" else scaled.float().to(stored).to(values.dtype)) / scale


def codebook(centroids: Tensor, mu: Tensor, dtype: str | None) -> Tensor:
    """The deployed values c (..., K), float64: expanded centroids (..., K), snapped; ``mu`` broadcasts to them."""
    return snap(expand(centroids.double(), mu.double()), dtype)


def stored_values(codebook: Tensor) -> Tensor:
    """The values, float32, of a codebook in its deployed dtype: float32, int8 or float8_e4m3fn."""
    return codebook.float() / CODEBOOK_SCALES.get(codebook.dtype, 1.0)


def as_stored(codebook: Tensor) -> Tensor:
    """A codebook in its deployed dtype as kernels take it: contiguous, e4m3 as uint8, since not every GPU knows it."""
    return (codebook.view(torch.uint8) if codebook.dtype == torch.float8_e4m3fn else codebook).contiguous()


@torch.no_grad()
def thresholds(centroids: Tensor, mu: Tensor) -> Tensor:
    """The borders between codes (..., K - 1), in units of the scale, float64; infinite where clamping decides."""
    z = centroids.double()
    borders = (z[..., 1:] + z[..., :-1]) / 2
    return _beyond_clamp(borders, expand(borders, mu.double()))


def _beyond_clamp(borders: Tensor, expanded: Tensor) -> Tensor:
    """``expanded``, changed in place to be infinite where clamping decides."""
    return expanded.masked_fill_(borders >= 1, torch.inf).masked_fill_(borders < -1, -torch.inf)


# --- reference --------------------------------------------------------------------------------------------------------


def reference(centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None) -> Tensor:
    """The definition, with one factor for every cell and centroid: the float64 tables of `build_tables`, which takes
    the same arguments, differentiable by autograd."""
    z, mu = centroids.double(), mu.double()[:, None]
    expanded = expand(z, mu)
    values = snap(expanded, codebook_dtype)
    kappa = hardness.double()[:, None] * (z.shape[1] - 1) / (z[:, -1:] - z[:, :1])
    factor = torch.exp(-kappa[..., None] * (z[:, :, None] - z[:, None, :]).abs())
    before, after = factor[:, :-1].tril(), factor[:, 1:].triu(1)  # (G, K - 1, K)
    mass, tail = before.sum(2), after.sum(2)
    left, right = (before @ values[..., None]).squeeze(2) / mass, (after @ values[..., None]).squeeze(2) / tail
    offset = torch.log(tail) - torch.log(mass) - kappa * (z[:, 1:] + z[:, :-1])
    where = torch.cat([thresholds(z, mu), values, z[:, 1:-1], expanded[:, [0, -1]]], 1).detach()
    return torch.cat([where, left, right - left, offset, 2 * kappa, mu, z[:, [0, -1]]], 1)


# --- CPU --------------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """What forward and backward both need, float64."""

    z: Tensor  # (G, K)
    mu: Tensor  # (G, 1)
    span: Tensor  # (G, 1)      z_{K-1} - z_0
    kappa: Tensor  # (G, 1)
    factor: Tensor  # (G, K - 1)   f_1 .. f_{K-1}


def _rows(centroids: Tensor, mu: Tensor, hardness: Tensor) -> _Rows:
    z = centroids.double()
    span = z[:, -1:] - z[:, :1]
    kappa = hardness.double().unsqueeze(1) * (z.shape[1] - 1) / span
    return _Rows(z, mu.double().unsqueeze(1), span, kappa, torch.exp(kappa * (z[:, :-1] - z[:, 1:])))


def _recur(factor: Tensor, rising: Tensor, falling: Tensor) -> tuple[Tensor, Tensor]:
    """v_j = rising_j + f_j v_{j-1} and v_j = falling_j + f_{j+1} v_{j+1}, both for (2, G, K), by doubling."""
    value = torch.stack([rising, falling.flip(2)])
    factor = torch.stack([factor, factor.flip(1)]).unsqueeze(1)
    levels, step = value.shape[3], 1
    while step < levels:  # value_j holds the terms of the last `step` places, factor_j the product over them
        value[..., step:].add_(factor * value[..., :-step])
        factor = factor[..., step:] * factor[..., :-step]
        step *= 2
    return value[0], value[1].flip(2)


def _forward(centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None, dtype: torch.dtype) -> Tensor:
    z, mu, _, kappa, factor = _rows(centroids, mu, hardness)
    total = z[:, 1:] + z[:, :-1]
    borders = total / 2
    expanded, reach = _expand(torch.cat([z, borders], 1), mu).split([z.shape[1], borders.shape[1]], 1)
    values = _round_to(expanded, codebook_dtype)
    terms = torch.stack([torch.ones_like(values), values])
    (mass, moment), (tail, rest) = _recur(factor, terms, terms)
    left = (moment / mass)[:, :-1]
    jump = (rest / tail)[:, 1:] - left
    offset = torch.log(tail[:, 1:] / mass[:, :-1]) - kappa * total
    ends = expanded[:, :: z.shape[1] - 1]
    where = _beyond_clamp(borders, reach), values, z[:, 1:-1], ends
    return torch.cat([*where, left, jump, offset, kappa + kappa, mu, z[:, :1], z[:, -1:]], 1).to(dtype)


def _backward(
    grad: Tensor, centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None
) -> tuple[Tensor, Tensor]:
    z, wide_mu, span, kappa, factor = _rows(centroids, mu, hardness)
    levels = z.shape[1]
    cells, curve = grad[:, 3 * levels - 1 :].double().split([3 * levels - 3, 4], 1)
    cells = pad(cells.view(-1, 3, levels - 1), (1, 1))  # one that is not there at either end
    dleft, djump, doffset = cells[..., 1:].unbind(1)
    _, djump_before, doffset_before = cells[..., :-1].unbind(1)
    expanded = _expand(z, wide_mu)
    values = _round_to(expanded, codebook_dtype)
    terms = torch.stack([torch.ones_like(values), values])
    left, right = _recur(factor, terms, terms)  # (l, m) and (r, n)
    (mass, moment), (tail, rest) = left, right
    dmoment, drest = (dleft - djump) / mass, djump_before / tail
    dmass = -(doffset + moment * dmoment) / mass
    dtail = (doffset_before - rest * drest) / tail
    dright, dleft = _recur(factor, torch.stack([dtail, drest]), torch.stack([dmass, dmoment]))  # (R, N) and (L, M)
    products = dleft[..., 1:] * left[..., :-1] + dright[..., :-1] * right[..., 1:]
    q = pad(factor * products.sum(0), (1, 1))
    du = q[:, 1:] - q[:, :-1] - doffset - doffset_before
    slope, slope_mu = _expand_slopes(z, wide_mu, expanded)
    dvalues = dleft[1] + dright[1]
    dkappa = 2 * curve[:, :1] + (z * du).sum(1, keepdim=True)
    stretch = dkappa * kappa / span
    dz = kappa * du + dvalues * slope
    dz[:, :1] += curve[:, 2:3] + stretch
    dz[:, -1:] += curve[:, 3:] - stretch
    dmu = curve[:, 1] + (dvalues * slope_mu).sum(1)
    return dz.to(centroids.dtype), dmu.to(mu.dtype)


# --- Triton -----------------------------------------------------------------------------------------------------------
# One program per quantizer; lane i holds what belongs to centroid i or to cell i.  Literals are such that float32 holds
# them.  Products and sums are not fused, so that codebooks round as on the CPU.


@jit
def e4m3_numbers(stored):
    """The float32 numbers of e4m3 bytes: their exponent and mantissa where float32 has them, where it is 120 too small,
    also if they are subnormal."""
    bits = (stored.to(tl.int32) & 0x7F) << 20 | (stored.to(tl.int32) & 0x80) << 24
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@jit
def load_values(codebook, codes):
    """As `stored_values`, of the entries that ``codes`` name; the codebook is `as_stored`."""
    values = tl.load(codebook + codes)
    if codebook.dtype.element_ty == tl.int8:
        values = tl.div_rn(values.to(tl.float32), tl.full(values.shape, 127.0, tl.float32))
    elif codebook.dtype.element_ty == tl.uint8:
        values = e4m3_numbers(values) * 0.00390625
    return values


@jit
def _log1p(x):
    """ln(1 + x) to a few ulp for x >= 0, however small (Kahan): the rounding of 1 + x cancels in the quotient."""
    one_plus = 1.0 + x
    rounded = one_plus - 1.0
    return tl.where(rounded == 0.0, x, tl.log(one_plus) * (x / rounded))


@jit
def _expm1(x):
    """e^x - 1 to a few ulp for x >= 0, however small (Kahan)."""
    power = tl.exp(x)
    return tl.where(power == 1.0, x, (power - 1.0) * (x / tl.log(power)))


@jit
def _expand_kernel(y, mu):
    """As `_expand`."""
    mu = tl.maximum(mu, 6.776263578034403e-21)
    size = _expm1(tl.abs(y) * _log1p(mu)) / mu
    return tl.where(y < 0.0, -size, size)


@jit
def _slopes_kernel(y, mu, expanded):
    """As `_expand_slopes`."""
    size, reach, large = tl.abs(y), tl.abs(expanded), tl.maximum(mu, 6.776263578034403e-21)
    power = large * reach + 1.0
    slope = power * (_log1p(large) / large)
    series = size * (size - 1.0) * (mu * (size - 2.0) / 3.0 + 0.5)
    slope_mu = tl.where(mu < 1e-5, series, (size * power / (large + 1.0) - reach) / large)
    return slope, tl.where(y < 0.0, -slope_mu, slope_mu)


@jit
def _round(x, quantum):
    """x to a multiple of the power of two ``quantum``, ties to even: what the last bit of the sum is worth."""
    large = quantum * 6755399441055744.0  # 1.5 * 2^52
    return (x + large) - large


@jit
def _snap_kernel(values, CODEBOOK: tl.constexpr):
    """As `_round_to`."""
    if CODEBOOK == "int8":
        values = _round(values * 127.0, 1.0) / 127.0
    if CODEBOOK == "fp8":
        scaled = (values * 256.0).to(tl.float32)
        power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^exponent
        quantum = tl.maximum(power, 0.015625) / 8.0  # 3 bits of mantissa; subnormal below 2^-6
        values = _round(scaled.to(tl.float64), quantum.to(tl.float64)) / 256.0
    return values


@jit
def _append(factor, value, carried, next_factor, next_value, next_carried):
    """Two stretches of v_j = x_j + f_j v_{j-1} as one: the product of f, and v and v - x at its end."""
    more = next_factor * value
    return factor * next_factor, more + next_value, more + next_carried


@jit
def _recur_kernel(factor, value, REVERSE: tl.constexpr):
    """v_j = value_j + f_j v_{j-1} and its part f_j v_{j-1}, which v_j - value_j would leave without digits; REVERSE:
    from j + 1, with the factor of lane j."""
    _, total, carried = tl.associative_scan((factor, value, tl.zeros_like(value)), 0, _append, reverse=REVERSE)
    return total, carried


@jit
def _load_row(centroids, mu, hardness, LEVELS: tl.constexpr):
    """(first centroid's pointer, mu, z_0, z_{K-1}, kappa) of this program's quantizer."""
    row = tl.program_id(0).to(tl.int64)
    start = centroids + row * LEVELS
    low, high = tl.load(start).to(tl.float64), tl.load(start + (LEVELS - 1)).to(tl.float64)
    kappa = tl.load(hardness + row).to(tl.float64) * (LEVELS - 1) / (high - low)
    return start, tl.load(mu + row).to(tl.float64), low, high, kappa


@jit
def _load_level(start, level, LEVELS: tl.constexpr):
    """z of the levels, of those beyond the ends that of the end."""
    return tl.load(start + tl.minimum(tl.maximum(level, 0), LEVELS - 1)).to(tl.float64)


@jit
def _forward_kernel(centroids, mu, hardness, out, CODEBOOK: tl.constexpr, BITS: tl.constexpr):
    LEVELS: tl.constexpr = 1 << BITS
    start, mu, low, high, kappa = _load_row(centroids, mu, hardness, LEVELS)
    level = tl.arange(0, LEVELS)
    before, z = _load_level(start, level - 1, LEVELS), _load_level(start, level, LEVELS)
    after, beyond = _load_level(start, level + 1, LEVELS), _load_level(start, level + 2, LEVELS)
    border = (z + after) / 2.0
    threshold = tl.where(border < -1.0, -float("inf"), _expand_kernel(border, mu))
    threshold = tl.where(border >= 1.0, float("inf"), threshold)
    expanded = _expand_kernel(z, mu)
    values = _snap_kernel(expanded, CODEBOOK)
    ones = tl.full((LEVELS,), 1.0, tl.float64)
    rise = tl.exp(kappa * (before - z))
    mass, _ = _recur_kernel(rise, ones, False)
    moment, _ = _recur_kernel(rise, values, False)
    # r and n are wanted right of cell j: lane j sums from centroid j + 1 on.
    values_after = _snap_kernel(_expand_kernel(after, mu), CODEBOOK)
    fall = tl.where(level < LEVELS - 2, tl.exp(kappa * (after - beyond)), 0.0)
    tail, _ = _recur_kernel(fall, ones, True)
    rest, _ = _recur_kernel(fall, values_after, True)
    left = moment / mass
    cell, last = level < LEVELS - 1, level == LEVELS - 1
    out += tl.program_id(0).to(tl.int64) * (6 * LEVELS)
    tl.store(out + level, threshold, mask=cell)
    tl.store(out + (LEVELS - 1) + level, values)
    tl.store(out + (2 * LEVELS - 2) + level, z, mask=(level > 0) & cell)
    tl.store(out + (3 * LEVELS - 3) + level // (LEVELS - 1), expanded, mask=(level == 0) | last)
    tl.store(out + (3 * LEVELS - 1) + level, left, mask=cell)
    tl.store(out + (4 * LEVELS - 2) + level, rest / tail - left, mask=cell)
    tl.store(out + (5 * LEVELS - 3) + level, tl.log(tail / mass) - kappa * (z + after), mask=cell)
    tl.store(out + (6 * LEVELS - 4), 2.0 * kappa)
    tl.store(out + (6 * LEVELS - 3), mu)
    tl.store(out + (6 * LEVELS - 2), low)
    tl.store(out + (6 * LEVELS - 1), high)


@jit
def _backward_kernel(grad, centroids, mu, hardness, dcentroids, dmu, CODEBOOK: tl.constexpr, BITS: tl.constexpr):
    LEVELS: tl.constexpr = 1 << BITS
    start, mu, low, high, kappa = _load_row(centroids, mu, hardness, LEVELS)
    row, level = tl.program_id(0).to(tl.int64), tl.arange(0, LEVELS)
    first, last = level == 0, level == LEVELS - 1
    grad += row * (6 * LEVELS)
    jump, offset = grad + (4 * LEVELS - 2) + level, grad + (5 * LEVELS - 3) + level
    z = _load_level(start, level, LEVELS)
    rise = tl.exp(kappa * (_load_level(start, level - 1, LEVELS) - z))
    fall = tl.exp(kappa * (z - _load_level(start, level + 1, LEVELS)))
    expanded = _expand_kernel(z, mu)
    values = _snap_kernel(expanded, CODEBOOK)
    ones = tl.full((LEVELS,), 1.0, tl.float64)

    # q_i multiplies what is carried to the right, q_{i+1} what is carried to the left; du is their difference.
    dleft = tl.load(grad + (3 * LEVELS - 1) + level, mask=level < LEVELS - 1, other=0.0).to(tl.float64)
    djump = tl.load(jump, mask=level < LEVELS - 1, other=0.0).to(tl.float64)
    doffset = tl.load(offset, mask=level < LEVELS - 1, other=0.0).to(tl.float64)
    mass, mass_carried = _recur_kernel(rise, ones, False)
    moment, moment_carried = _recur_kernel(rise, values, False)
    dmoment = (dleft - djump) / mass
    dmass = -(doffset + moment * dmoment) / mass
    total, carried = _recur_kernel(fall, dmoment, True)
    dvalues = total
    du = carried * moment - total * moment_carried - doffset
    total, carried = _recur_kernel(fall, dmass, True)
    du += carried * mass - total * mass_carried

    djump = tl.load(jump - 1, mask=level > 0, other=0.0).to(tl.float64)
    doffset = tl.load(offset - 1, mask=level > 0, other=0.0).to(tl.float64)
    tail, tail_carried = _recur_kernel(fall, ones, True)
    rest, rest_carried = _recur_kernel(fall, values, True)
    drest = djump / tail
    dtail = (doffset - rest * drest) / tail
    total, carried = _recur_kernel(rise, drest, False)
    dvalues += total
    du += total * rest_carried - carried * rest - doffset
    total, carried = _recur_kernel(rise, dtail, False)
    du += total * tail_carried - carried * tail

    slope, slope_mu = _slopes_kernel(z, mu, expanded)
    curve = grad + (6 * LEVELS - 4)
    dkappa = 2.0 * tl.load(curve).to(tl.float64) + tl.sum(z * du)
    stretch = dkappa * kappa / (high - low)
    dlow, dhigh = tl.load(curve + 2).to(tl.float64) + stretch, tl.load(curve + 3).to(tl.float64) - stretch
    dz = kappa * du + dvalues * slope + tl.where(first, dlow, tl.where(last, dhigh, 0.0))
    tl.store(dcentroids + row * LEVELS + level, dz)
    tl.store(dmu + row, tl.load(curve + 1).to(tl.float64) + tl.sum(dvalues * slope_mu))


# --- launchers --------------------------------------------------------------------------------------------------------


def warps(levels: int) -> int:
    """Of a program: as many as give each of their lanes one centroid; several would run out of registers."""
    return max(1, levels // 32)


def _launch_forward(
    centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None, dtype: torch.dtype
) -> Tensor:
    count, levels = centroids.shape
    out = centroids.new_empty(count, table_size(levels), dtype=dtype)
    if not count:
        return out
    inputs = centroids.contiguous(), mu.contiguous(), hardness.contiguous()
    options = codebook_dtype or "float", levels.bit_length() - 1
    with launching(centroids, float64=True):
        _forward_kernel[(count,)](*inputs, out, *options, num_warps=warps(levels), enable_fp_fusion=False)
    return out


def _launch_backward(
    grad: Tensor, centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None
) -> tuple[Tensor, Tensor]:
    count, levels = centroids.shape
    dcentroids, dmu = centroids.new_empty(count, levels), mu.new_empty(count)
    if not count:
        return dcentroids, dmu
    inputs = grad.contiguous(), centroids.contiguous(), mu.contiguous(), hardness.contiguous()
    options = codebook_dtype or "float", levels.bit_length() - 1
    with launching(centroids, float64=True):
        _backward_kernel[(count,)](*inputs, dcentroids, dmu, *options, num_warps=warps(levels), enable_fp_fusion=False)
    return dcentroids, dmu


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::build_tables", mutates_args=(), device_types="cpu")
def build_tables(
    centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None, dtype: torch.dtype
) -> Tensor:
    """The flat tables (G, 6 K), in ``dtype``, of G quantizers; differentiable in centroids and mu.

    Args:
        centroids: (G, K), sorted, within [-1, 1], K a power of two.
        mu, hardness: (G,), >= 0.
        codebook_dtype: None, "float", "int8" or "fp8".
        dtype: float32 or float64; the arithmetic is float64.
    """
    return _forward(centroids, mu, hardness, codebook_dtype, dtype)


build_tables.register_kernel("cuda")(_launch_forward)


@build_tables.register_fake
def _(centroids, mu, hardness, codebook_dtype, dtype):
    count, levels = centroids.shape
    return centroids.new_empty(count, table_size(levels), dtype=dtype)


@torch.library.custom_op("gq_triton::build_tables_backward", mutates_args=(), device_types="cpu")
def build_tables_backward(
    grad: Tensor, centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None
) -> tuple[Tensor, Tensor]:
    """Gradients of centroids and mu, for that of the tables."""
    return _backward(grad, centroids, mu, hardness, codebook_dtype)


build_tables_backward.register_kernel("cuda")(_launch_backward)


@build_tables_backward.register_fake
def _(grad, centroids, mu, hardness, codebook_dtype):
    return centroids.new_empty(centroids.shape), mu.new_empty(mu.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.codebook_dtype, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad):
    return *build_tables_backward(grad, *ctx.saved_tensors, ctx.codebook_dtype), None, None, None


build_tables.register_autograd(_differentiate, setup_context=_setup_context)
