"""Fake quantization on the CPU: vectorised torch over chunks that stay in the cache.

Mathematics, notation and reference in `gq_triton.kernels.fake_quantize`, of whose operators these are the CPU
implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gq_triton.kernels.tables import Table, split_table

__all__ = ["backward", "encode", "forward"]

BINS = 4096  # of the look-up table that finds a code's neighbourhood at once
CHUNK = 1 << 16  # weights per step: its temporaries stay in the second-level cache


class _Counter:
    """Counts the borders below each value: one look-up, then as many comparisons as a bin and its neighbours need."""

    def __init__(self, borders: Tensor):
        """``borders``: sorted, within [-1, 1] or infinite."""
        self.borders = torch.cat([borders, borders.new_full((1,), torch.inf)])
        counts = torch.bincount(_bin(borders), minlength=BINS).cumsum(0)
        surely = torch.cat([counts.new_zeros(2), counts[:-2]])  # a margin of one bin for the rounding of weight / scale
        possibly = torch.cat([counts[1:], counts[-1:]])
        self.surely = surely.int()
        self.steps = int((possibly - surely).max())

    def __call__(self, x: Tensor, scale: Tensor | float, weight: Tensor) -> Tensor:
        """How many borders b satisfy ``scale * b < weight``, int32; ``x`` is weight / scale but for rounding."""
        count = self.surely.index_select(0, _bin(x).view(-1)).view(x.shape)
        for _ in range(self.steps):
            count += _take(self.borders, count).mul_(scale).lt_(weight).int()  # lt_: floats compare faster than to bool
        return count


def _bin(x: Tensor) -> Tensor:
    """The bin of each x in [-1, 1], int32; clamped twice because NaN survives the first and no integer does."""
    return x.add(1).mul_(BINS / 2).clamp_(0, BINS - 1).int().clamp_(0, BINS - 1)


def _take(entries: Tensor, index: Tensor) -> Tensor:
    """``entries[index]``; index_select with 32-bit indices is several times faster than indexing."""
    return entries.index_select(0, index.view(-1)).view(index.shape)


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Contiguous blocks of at most about CHUNK elements that cover (rows, columns)."""
    height = max(1, CHUNK // columns)
    for top in range(0, rows, height):
        for left in range(0, columns, CHUNK):
            yield slice(top, top + height), slice(left, left + CHUNK)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or too small to invert, so that x is 0 there and not NaN."""
    usable = scale > torch.finfo(scale.dtype).tiny
    return torch.where(usable, 1 / scale, 0)


class _Curve:
    """The elementwise part of soft quantization on a block of x = weight / scale; names as in the module docstring."""

    def __init__(self, x: Tensor, table: Table, count: _Counter):
        self.k, mu, self.low, self.high = table.curve.tolist()
        self.mu = max(mu, 1e-20)  # where log1p(mu |x|) / log1p(mu) is |x| to the last bit
        self.log = math.log1p(self.mu)
        self.x = x.clamp(*table.bounds.tolist())
        self.stretch = self.x.abs().mul_(self.mu)  # mu |x|
        self.y = self.stretch.log1p().mul_(1 / self.log).copysign_(x)
        self.cell = count(self.y, 1.0, self.y)
        self.sigma = _take(table.offset, self.cell).add_(self.y, alpha=self.k).sigmoid_()
        self.jump = _take(table.jump, self.cell)

    def value(self, table: Table) -> Tensor:
        """q"""
        return _take(table.left, self.cell).addcmul_(self.jump, self.sigma)

    def logistic_slope(self) -> Tensor:
        """J sigma (1 - sigma)"""
        return torch.addcmul(self.sigma, self.sigma, self.sigma, value=-1).mul_(self.jump)

    def companding_slope(self) -> Tensor:
        """F'(x)"""
        return self.stretch.add(1).reciprocal_().mul_(self.mu / self.log)

    def companding_slope_mu(self) -> Tensor:
        """dF/dmu at x"""
        if self.mu < 4e-3:  # the closed form cancels in float32; the series errs by mu^2
            size = self.stretch / self.mu
            return self.x * (1 - size) * (0.5 - self.mu / 6 * (1 + 4 * size))
        return self.x / (self.stretch + 1) / self.log - self.y / (self.log * (1 + self.mu))


def _rows(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor.reshape(scale.numel(), -1)


def forward(weight: Tensor, scale: Tensor, table: Tensor, soft: bool) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype)
    if not weight.numel():
        return out
    parts, rows, flat = split_table(table), _rows(weight, scale), _rows(out, scale)
    column, inverse = scale.unsqueeze(1), _inverse(scale).unsqueeze(1)
    count = _Counter(parts.edges if soft else parts.thresholds)
    for block in _blocks(*rows.shape):
        w, s = rows[block].to(scale.dtype), column[block[0]]
        if soft:
            unit = _Curve(w * inverse[block[0]], parts, count).value(parts)
        else:
            unit = _take(parts.values, count(w / s, s, w))
        torch.add(unit.mul_(s), w - w, out=flat[block])  # w - w: NaN where w is not finite, else +0 (and -0 + 0 is +0)
    return out


def encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    if not weight.numel():
        return codes
    rows, flat, column = _rows(weight, scale), _rows(codes, scale), scale.unsqueeze(1)
    count = _Counter(borders)
    for block in _blocks(*rows.shape):
        w, s = rows[block].to(scale.dtype), column[block[0]]
        flat[block] = count(w / s, s, w)
    return codes


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, table: Tensor, straight_through: float, table_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dscale = torch.empty(weight.shape, dtype=weight.dtype), torch.zeros_like(scale)
    dtable = torch.zeros_like(table, dtype=torch.float64)
    if not weight.numel():
        return dweight, dscale, dtable.to(table.dtype)
    parts, sums = split_table(table), split_table(dtable)
    rows, grads, flat = _rows(weight, scale), _rows(grad, scale), _rows(dweight, scale)
    column, inverse = scale.unsqueeze(1), _inverse(scale).unsqueeze(1)
    count = _Counter(parts.edges)
    for block in _blocks(*rows.shape):
        g, w = grads[block].to(scale.dtype), rows[block].to(scale.dtype)
        x = torch.addcmul(w - w, w, inverse[block[0]])  # NaN where w is not finite
        curve = _Curve(x, parts, count)
        spread = curve.logistic_slope()
        slope = (spread * curve.companding_slope()).mul_(curve.k * (1 - straight_through)).add_(straight_through)
        torch.mul(g, slope, out=flat[block])
        inside = torch.eq(x, curve.x, out=torch.empty_like(x))  # as numbers: masks of bool are several times slower
        dscale[block[0]] += curve.value(parts).addcmul_(slope.mul_(inside), x, value=-1).mul_(g).sum(1)
        if table_grad:
            _add_table_grad(sums, curve, g * column[block[0]], spread, inside)
    return dweight, dscale, dtable.to(table.dtype)


def _add_table_grad(sums: Table, curve: _Curve, g: Tensor, spread: Tensor, inside: Tensor) -> None:
    """Add one block's part of the table's gradient; ``g`` is dL/dq."""
    cell, through = curve.cell.long().view(-1), spread.mul_(g)
    for total, part in [(sums.left, g), (sums.jump, g * curve.sigma), (sums.offset, through)]:
        total += g.new_zeros(total.numel()).scatter_add_(0, cell, part.view(-1))
    inner = through * inside
    outer = through.sub_(inner)  # here y is z_0 or z_{K-1}, which the two sums tell apart
    inner_y, outer_y, outer_sum = _dot(inner, curve.y), _dot(outer, curve.y), outer.sum().item()
    above = (outer_y - curve.low * outer_sum) / (curve.high - curve.low)
    dmu = _dot(inner, curve.companding_slope_mu())
    dk, dlow, dhigh = inner_y + outer_y, curve.k * (outer_sum - above), curve.k * above
    sums.curve.add_(torch.tensor([dk, curve.k * dmu, dlow, dhigh], dtype=sums.curve.dtype))


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.view(-1), b.view(-1)).item()
