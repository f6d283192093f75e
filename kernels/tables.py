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

*Soft*: p_i = softmax_i(-a |y - z_i| / D) with hardness a and mean spacing D = (z_{K-1} - z_0) / (K - 1).  For y in the
cell [z_j, z_{j+1}] every centroid on the left has the factor e^{-ay/D} in common and every one on the right e^{+ay/D},
hence

    sum_i p_i c_i = A_j + J_j sigmoid(k y + o_j),    k = 2a / D,   J_j = B_j - A_j,   o_j = ln R_j - ln L_j
    L_j = sum_{i<=j} e^{a z_i / D}     A_j = (1 / L_j) sum_{i<=j} e^{a z_i / D} c_i
    R_j = sum_{i>j} e^{-a z_i / D}     B_j = (1 / R_j) sum_{i>j} e^{-a z_i / D} c_i

which is exact for every K and every spacing.  Beyond the outer centroids the sum is constant: y is clamped to [z_0,
z_{K-1}].

The table of one quantizer is one flat tensor, so that one pointer and one gradient serve every kernel (`split_table`):

    thresholds (K-1) | values c (K) | edges z_1..z_{K-2} (K-2) | bounds F^-1(z_0), F^-1(z_{K-1})
    | A (K-1) | J (K-1) | o (K-1) | curve k, mu, z_0, z_{K-1}

It is computed in float64 and is differentiable in the centroids and mu (thresholds, edges and bounds only say *where*;
they have no gradient, and neither have the values, whose place A and J take); the per-cell sums that the kernels return
are its gradient and ordinary autograd does the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CODEBOOK_SCALES",
    "Table",
    "build_table",
    "codebook",
    "compress",
    "expand",
    "snap",
    "split_table",
    "thresholds",
]

SMALL_MU = 1e-4  # below it the closed forms cancel in their derivative; the series is exact to 1e-12
CODEBOOK_SCALES = {torch.int8: 127.0, torch.float8_e4m3fn: 256.0}  # a stored entry q stands for the value q / scale
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Table(NamedTuple):
    """Views of a flat table; the names are those of the module docstring."""

    thresholds: Tensor  # (K - 1,)
    values: Tensor  # (K,)
    edges: Tensor  # (K - 2,)
    bounds: Tensor  # (2,)      F^-1(z_0), F^-1(z_{K-1})
    left: Tensor  # (K - 1,)   A
    jump: Tensor  # (K - 1,)   J
    offset: Tensor  # (K - 1,) o
    curve: Tensor  # (4,)      k, mu, z_0, z_{K-1}


def table_size(levels: int) -> int:
    """Entries in the flat table of ``levels`` centroids."""
    return 6 * levels


def split_table(table: Tensor) -> Table:
    """The parts of a flat table, as views."""
    levels = table.numel() // 6
    return Table(*table.split([levels - 1, levels, levels - 2, 2, levels - 1, levels - 1, levels - 1, 4]))


def compress(x: Tensor, mu: Tensor) -> Tensor:
    """F: mu-law companding of ``x`` (any shape); odd, increasing, fixes -1, 0 and 1; ``mu`` a 0-d tensor >= 0."""
    size = torch.where(x < 0, -x, x)  # abs() would have no gradient at 0
    series = size + mu * size * (1 - size) * (0.5 - mu * (4 * size + 1) / 12)
    large = mu.clamp(min=SMALL_MU)
    closed = torch.log1p(large * size) / torch.log1p(large)
    result = torch.where(mu < SMALL_MU, series, closed)
    return torch.where(x < 0, -result, result)


def expand(y: Tensor, mu: Tensor) -> Tensor:
    """F^-1: the inverse of `compress`."""
    size = torch.where(y < 0, -y, y)
    series = size * (1 + mu * (size - 1) * (0.5 + mu * (size - 2) / 6))
    large = mu.clamp(min=SMALL_MU)
    closed = torch.expm1(size * torch.log1p(large)) / large
    result = torch.where(mu < SMALL_MU, series, closed)
    return torch.where(y < 0, -result, result)


def snap(values: Tensor, dtype: str | None) -> Tensor:
    """Round codebook values to those their deployed dtype can hold; the gradient passes straight through."""
    if dtype in (None, "float"):
        return values
    stored = _DTYPES[dtype]
    scale = CODEBOOK_SCALES[stored]
    scaled = values.detach() * scale
    rounded = scaled.round() if dtype == "int8" else scaled.float().to(stored).to(values.dtype)
    return values + (rounded / scale - values).detach()


def codebook(centroids: Tensor, mu: Tensor, dtype: str | None) -> Tensor:
    """The deployed values c (K,), float64: expanded centroids, snapped."""
    values = expand(centroids.double(), mu.double())
    return snap(values, dtype)


@torch.no_grad()
def thresholds(centroids: Tensor, mu: Tensor) -> Tensor:
    """The K - 1 borders between codes, in units of the scale, float64; infinite where clamping decides."""
    z = centroids.double()
    borders = (z[1:] + z[:-1]) / 2
    expanded = expand(borders, mu.double())
    expanded = expanded.masked_fill(borders >= 1, torch.inf)
    return expanded.masked_fill(borders < -1, -torch.inf)


def build_table(
    centroids: Tensor, mu: Tensor, hardness: Tensor, codebook_dtype: str | None, dtype: torch.dtype
) -> Tensor:
    """The flat table, in ``dtype``, of centroids (K,), mu and hardness (0-d); differentiable in the first two."""
    z, mu = centroids.double(), mu.double()
    expanded = expand(z, mu)
    values = snap(expanded, codebook_dtype)
    rate = hardness.double() * (z.numel() - 1) / (z[-1] - z[0])  # a / D
    left, jump, offset = _cells(z * rate, values)
    curve = torch.stack([2 * rate, mu, z[0], z[-1]])
    bounds = torch.stack([expanded[0], expanded[-1]])
    where = torch.cat([thresholds(z, mu), values, z[1:-1], bounds]).detach()
    return torch.cat([where, left, jump, offset, curve]).to(dtype)


def _cells(exponent: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, J, o) of the K - 1 cells.  The sums are taken in the log domain, where no hardness overflows; a shift makes
    every value positive, so that its logarithm exists."""
    shift = 1 - values.detach().min()
    weighted = torch.log(values + shift)
    rising = torch.stack([exponent, exponent + weighted])
    falling = torch.stack([-exponent, weighted - exponent]).flip(1)
    log_mass, log_left, log_tail, log_right = torch.cat([rising, falling]).logcumsumexp(1)[:, :-1]
    left = torch.exp(log_left - log_mass)
    right = torch.exp(log_right - log_tail).flip(0)
    return left - shift, right - left, log_tail.flip(0) - log_mass
