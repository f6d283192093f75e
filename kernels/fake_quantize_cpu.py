"""Fake quantization on the CPU: native kernels, or vectorised torch over chunks that stay in the cache.

Mathematics, notation and reference in `gq_triton.kernels.fake_quantize`, of whose operators these are the CPU
implementation.  The bytes that must move are 8 for each float32 weight forward (5 to encode) and 12 backward.

*Native* (native/fake_quantize.h), for all but float64 (16-bit weights are converted), passes over memory once.  Sixteen
weights take `bits` comparisons, of four instructions each; the curve some 50 instructions more, a logarithm and an
exponential among them; the backward pass another 30, and to add each weight to its cell another 80.  So with AVX-512,
which issues two of most of them at a time, hard values cost little more than a copy does, and instructions bound the
rest.

*Torch*, for float64 and machines without the library, takes many passes over a chunk, so intermediate results are
overwritten, comparisons give numbers (masks of bool are several times slower), and what is looked up by one index is
looked up at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.tables import Table, split_table

__all__ = ["backward", "encode", "forward"]

CHUNK = 1 << 15  # weights per step: its dozen temporaries (1.5 MB) stay in the second-level cache
BINS = 1024  # at most, of a `_Finder`
SMALL_MU = 4e-3  # below it dF/dmu in closed form cancels in float32; the series errs by mu^3


# --- dispatch ---------------------------------------------------------------------------------------------------------


def _is_native(scale: Tensor) -> bool:
    """Whether the native kernels compute it: not in float64, and not in plain C++, which is slower than torch."""
    return scale.dtype == torch.float32 and native.isa() not in (None, "portable")


def _ready(tensor: Tensor) -> Tensor:
    """As the native kernels take it."""
    return tensor.float().contiguous()


def forward(weight: Tensor, scale: Tensor, table: Tensor, soft: bool) -> Tensor:
    if not _is_native(scale):
        return _forward(weight, scale, table, soft)
    out = table.new_empty(weight.shape)
    native.fake_quantize(_ready(weight), _ready(scale), _ready(table), soft, out, torch.get_num_threads())
    return out.to(weight.dtype)


def encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    if not _is_native(scale):
        return _encode(weight, scale, borders)
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    native.encode(_ready(weight), _ready(scale), _ready(borders), codes, torch.get_num_threads())
    return codes


def backward(
    grad: Tensor, weight: Tensor, scale: Tensor, table: Tensor, straight_through: float, table_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _is_native(scale):
        return _backward(grad, weight, scale, table, straight_through, table_grad)
    dweight, dscale, dtable = table.new_empty(weight.shape), torch.empty_like(scale), torch.zeros_like(table)
    inputs = (_ready(tensor) for tensor in (grad, weight, scale, table))
    outputs = dweight, dscale, dtable if table_grad else None
    native.fake_quantize_backward(*inputs, straight_through, *outputs, torch.get_num_threads())
    return dweight.to(weight.dtype), dscale, dtable


# --- torch ------------------------------------------------------------------------------------------------------------


class _Finder:
    """Finds how many borders lie below a value: a look-up by the value's bin, then as many comparisons as it takes to
    tell the borders near one bin apart. The answers are indices into ``counts``."""

    def __init__(self, borders: Tensor, radius: float = 1.0):
        """``borders``: sorted; may be infinite. ``radius``: of the values."""
        bins = min(BINS, 16 << borders.numel().bit_length())
        self.origin, self.mask, limits = _bins(bins, borders.dtype)
        self.slope = (bins / 2 - 1) / radius
        surely, possibly = torch.searchsorted(borders, limits * radius, out_int32=True).unbind()
        depth = int((possibly - surely).max()).bit_length()
        padded = torch.cat([borders, borders.new_full((1 << depth,), torch.inf)])
        if depth <= 1:  # one comparison with the bin's own border; the index is the bin's, plus ``bins`` if it is below
            self.start, self.steps = None, [(padded.index_select(0, surely), bins)] * depth
            self.counts = torch.cat([surely, surely + 1]).clamp_(max=borders.numel())
        else:  # bisection; the index is the count
            self.start, self.steps = surely, [(padded[step - 1 :], step) for step in _halving(1 << depth)]
            self.counts = torch.arange(borders.numel() + 1, dtype=torch.int32, device="cpu")

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """For every weight the index into ``counts`` of how many borders b satisfy ``scale * b < weight``, flat.

        ``x`` is weight / scale but for rounding, within the radius; not finite, it gives some index.
        """
        index = torch.add(self.origin, x, alpha=self.slope).view(-1).view(self.mask.dtype).bitwise_and_(self.mask)
        if self.start is not None:
            index = self.start.index_select(0, index)
        for borders, step in self.steps:
            border = borders.index_select(0, index).view(weight.shape)
            below = (border if scale is None else border.mul_(scale)).lt_(weight).view(-1)
            index.add_(below.to(index.dtype), alpha=step)
        return index


def _halving(power: int) -> list[int]:
    """power / 2, power / 4, ..., 1"""
    return [1 << bit for bit in reversed(range(power.bit_length() - 1))]


@lru_cache
def _bins(bins: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(origin, mask, limits (2, bins)) of the bins of [-1, 1].

    The bin of x is the integer closest to (x + 1) bins / 2 - x. Added to a power of two so large that the mantissa has
    no room for fractions, it is found in the lowest bits. No x of a bin lies outside its limits, for which rounding has
    a margin; the last bin ends below infinity, which no weight exceeds.
    """
    power, integer = {torch.float32: (2.0**23, torch.int32), torch.float64: (2.0**52, torch.int64)}[dtype]
    center, reach = torch.arange(bins, dtype=torch.float64, device="cpu") - bins / 2, 0.51
    limits = torch.stack([center - reach, center + reach]) / (bins / 2 - 1)
    limits[0, :2], limits[1, -1] = -torch.inf, torch.finfo(dtype).max
    mask = torch.tensor(bins - 1, dtype=integer, device="cpu")
    return torch.tensor(power + bins / 2, dtype=dtype, device="cpu"), mask, limits.to(dtype)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of at most CHUNK elements that cover tensors (rows, columns), the first among them, and (rows, 1)."""
    rows, columns = tensors[0].shape
    if rows * columns <= CHUNK:
        yield tensors
        return
    strips = zip(*(tensor.split(max(1, CHUNK // columns)) for tensor in tensors), strict=True)
    if columns <= CHUNK:
        yield from strips
        return
    for row in strips:
        parts = (part.split(CHUNK, 1) if part.shape[1] == columns else repeat(part) for part in row)
        yield from zip(*parts, strict=False)


def _rows(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor.reshape(scale.numel(), -1)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0 or too small to invert, so that x is 0 there and not NaN."""
    return scale.reciprocal().nan_to_num_(posinf=0)


class _Point(NamedTuple):
    """The curve at x = weight / scale, one entry per weight."""

    clamped: Tensor  # x within the bounds
    inside: Tensor  # 1 where x is within the bounds, else 0
    inner: Tensor  # x, or 0 where it is not within the bounds
    grown: Tensor  # 1 + mu |clamped|
    y: Tensor
    index: Tensor  # of the cell, in the finder's counts
    cells: Tensor  # (3, n): A, J, sigma


class _Curve:
    """The elementwise part of soft quantization, flat; names as in `gq_triton.kernels.fake_quantize`, but y and what
    meets it is still multiplied by ln(1 + mu)."""

    def __init__(self, parts: Table):
        self.levels = parts.values.numel()
        self.low, self.high = parts.bounds.tolist()
        self.k, mu, low, high = parts.curve.tolist()
        self.mu = max(mu, 1e-20)  # where log1p(mu |x|) / log1p(mu) is |x| to the last bit
        self.log = math.log1p(self.mu)
        self.y_low, self.y_high = low * self.log, high * self.log
        self.find = _Finder(parts.edges * self.log, max(1, -low, high) * self.log)
        self.cells = torch.stack([parts.left, parts.jump, parts.offset]).index_select(1, self.find.counts)

    def at(self, x: Tensor) -> _Point:
        """``x`` is overwritten."""
        clamped = x.clamp(self.low, self.high)
        inside = torch.eq(x, clamped, out=torch.empty_like(x))
        inner = torch.mul(clamped, inside, out=x)
        y, grown = self.compress(clamped)
        return _Point(clamped, inside, inner, grown, y, *self.look_up(y))

    def compress(self, clamped: Tensor) -> tuple[Tensor, Tensor]:
        """(y, grown)"""
        sign = clamped.sign()
        grown = torch.addcmul(_number(1.0, sign.dtype), clamped, sign, value=self.mu)
        log = grown.log() if self.mu > 0.5 else torch.mul(clamped, sign).mul_(self.mu).log1p_()  # the slower one
        return log.mul_(sign), grown

    def look_up(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(index, cells)"""
        index = self.find(y, y)
        cells = self.cells.index_select(1, index)
        cells[2].add_(y, alpha=self.k / self.log).sigmoid_()
        return index, cells


@lru_cache
def _number(value: float, dtype: torch.dtype) -> Tensor:
    """As a tensor: elementwise functions of three tensors take no Python numbers."""
    return torch.tensor(value, dtype=dtype, device="cpu")


def _forward(weight: Tensor, scale: Tensor, table: Tensor, soft: bool) -> Tensor:
    out = weight.new_empty(weight.shape)
    if not weight.numel():
        return out
    quantize, column = (_soft if soft else _hard)(split_table(table)), scale.unsqueeze(1)
    for w, s, flat in _blocks(_rows(weight, scale), column, _rows(out, scale)):
        w = w.to(scale.dtype).contiguous()
        unit = quantize(w, s).view(w.shape)
        torch.addcmul(w - w, unit, s, out=flat)  # w - w: NaN where w is not finite, else +0 (and -0 + 0 is +0)
    return out


def _hard(parts: Table) -> Callable[[Tensor, Tensor], Tensor]:
    find = _Finder(parts.thresholds)
    values = parts.values.index_select(0, find.counts)
    return lambda w, s: values.index_select(0, find((w / s).clamp_(-1, 1), w, s))


def _soft(parts: Table) -> Callable[[Tensor, Tensor], Tensor]:
    curve = _Curve(parts)

    def quantize(w: Tensor, s: Tensor) -> Tensor:
        y, _ = curve.compress((w * _inverse(s)).view(-1).clamp_(curve.low, curve.high))
        left, jump, sigma = curve.look_up(y)[1].unbind()
        return left.addcmul_(jump, sigma)

    return quantize


def _encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    if not weight.numel():
        return codes
    find = _Finder(borders)
    counts = find.counts.to(torch.uint8)
    for w, s, flat in _blocks(_rows(weight, scale), scale.unsqueeze(1), _rows(codes, scale)):
        w = w.to(scale.dtype).contiguous()
        flat.copy_(counts.index_select(0, find((w / s).clamp_(-1, 1), w, s)).view(w.shape))
    return codes


def _backward(
    grad: Tensor, weight: Tensor, scale: Tensor, table: Tensor, straight_through: float, table_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dscale, dtable = weight.new_empty(weight.shape), torch.zeros_like(scale), torch.zeros_like(table)
    if not weight.numel():
        return dweight, dscale, dtable
    curve = _Curve(split_table(table))
    sums = _TableSums(curve) if table_grad else None
    wide = [_rows(tensor, scale) for tensor in (grad, weight, dweight)]
    for block in _blocks(*wide, *(tensor.unsqueeze(1) for tensor in (scale, _inverse(scale), dscale))):
        _backward_block(curve, straight_through, sums, *block)
    if sums:
        tail = sums.gradient()
        dtable[-len(tail) :] = tail
    return dweight, dscale, dtable


def _backward_block(
    curve: _Curve,
    straight_through: float,
    sums: _TableSums | None,
    g: Tensor,
    w: Tensor,
    dweight: Tensor,
    s: Tensor,
    inverse: Tensor,
    dscale: Tensor,
) -> None:
    """Write ``dweight``, add to ``dscale`` and ``sums``. A function of its own: what it returns from is freed at once,
    and the next block finds it in the cache."""
    g, w = g.to(s.dtype).contiguous(), w.to(s.dtype).contiguous()
    at = curve.at(torch.addcmul(w - w, w, inverse).view(-1))  # NaN where w is not finite
    left, jump, sigma = at.cells.unbind()
    q = left.addcmul_(jump, sigma)
    spread = jump.mul_(torch.addcmul(sigma, sigma, sigma, value=-1))
    factor = (1 - straight_through) * curve.k * curve.mu / curve.log
    slope = torch.addcdiv(_number(straight_through, s.dtype), spread, at.grown, value=factor)
    torch.mul(g, slope.view(g.shape), out=dweight)
    dscale += q.addcmul_(slope, at.inner, value=-1).view(g.shape).mul_(g).sum(1, keepdim=True)
    if sums:
        torch.mul(g, s, out=q.view(g.shape))
        sums.add(at)  # whose cells are now G, J sigma (1 - sigma), sigma


class _TableSums:
    """The sums over weights that are a table's gradient. Those per cell are kept for every index of the finder, many
    more: adding to one address twice in a row stalls."""

    def __init__(self, curve: _Curve):
        self.curve = curve
        self.cells = torch.zeros_like(curve.cells, dtype=torch.float64)
        self.y = self.inside = self.outside = self.mu = 0.0

    def add(self, at: _Point) -> None:
        """Add a block with the cells (G, J sigma (1 - sigma), sigma), which are overwritten."""
        at.cells[1:].mul_(at.cells[0])
        index = at.index.long().expand(3, -1)
        self.cells += at.cells.new_zeros(self.cells.shape).scatter_add_(1, index, at.cells)
        through = at.cells[1]
        self.y += _dot(through, at.y)
        self.inside += _dot(through, at.inside)
        self.outside += _dot(through, at.clamped.sub_(at.inner))
        self.mu += _dot(through, self.series(at.inner) if self.curve.mu < SMALL_MU else at.inner.div_(at.grown))

    def series(self, x: Tensor) -> Tensor:
        """dF/dmu for a small mu."""
        size = x.abs()
        first, second = (1 + 4 * size) / 6, (1 + 2 * size + 6 * size.square()) / 8
        return x * (1 - size) * (0.5 - self.curve.mu * (first - self.curve.mu * second))

    def gradient(self) -> Tensor:
        """The end of the table's gradient: A, J, o, curve; float64."""
        curve = self.curve
        cell = curve.find.counts.long().expand(3, -1)
        left, offset, jump = self.cells.new_zeros(3, curve.levels - 1).scatter_add_(1, cell, self.cells).unbind()
        clamped = offset.sum().item() - self.inside
        above = (self.outside - curve.low * clamped) / (curve.high - curve.low)
        below = clamped - above
        dmu = self.mu
        if curve.mu >= SMALL_MU:
            inner_y = self.y - below * curve.y_low - above * curve.y_high
            dmu = (dmu - inner_y / (curve.log * (1 + curve.mu))) / curve.log
        ends = [self.y / curve.log, curve.k * dmu, curve.k * below, curve.k * above]
        return torch.cat([left, jump, offset, left.new_tensor(ends)])


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a, b).item()
