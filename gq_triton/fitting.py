"""Scales that fit a weight on a given grid best, by least squares. Deterministic, and exact in chunks of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton import functional as F

__all__ = ["TINY", "Grid", "checked_rows", "coarse_scale", "fit_scale", "refit", "sample_columns"]

TINY = torch.finfo(torch.float32).tiny

_COLUMNS = 512  # that choose each channel's scale at first; all columns decide
_TENSOR_COLUMNS = 32768  # the same where one scale serves the whole tensor
_STARTS = 8
_FACTORS = (1.0, *(0.75 * 1.05**i for i in range(14)))  # at many bits the error has many local minima
_CHUNK = 1 << 20  # elements worked on at a time, to bound temporaries


class Grid(NamedTuple):
    """What a weight divided by its scale is quantized to.

    Attributes:
        centroids: (K,), companded.
        mu: companding.
        values: (K,), the codebook that the centroids stand for.
    """

    centroids: Tensor
    mu: float
    values: Tensor


def checked_rows(weight: Tensor, channels: int, per_tensor: bool = False) -> Tensor:
    """Returns ``weight``, (C, ...), as one row per scale.

    Raises:
        ValueError: if it is empty, holds NaN or infinity, or has not as many rows as there are ``channels``.
    """
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty; its shape is {tuple(weight.shape)}")
    rows = weight.detach().reshape(1 if per_tensor else len(weight), -1)
    if len(rows) != channels:
        raise ValueError(f"weight has {len(rows)} channels where the quantizer has {channels}")
    if not rows.isfinite().all():
        raise ValueError("weight must be finite; it holds NaN or infinity")
    return rows


def fit_scale(rows: Tensor, grid: Grid) -> Tensor:
    """Returns the scale, (C,), at least 0, that fits each of the ``rows`` (C, n) best.

    It is the best of a few between the mean and the largest magnitude, each replaced by the closed-form optimum for the
    codes that it leads to; and then the best of some factors times that one, each replaced likewise. It is the one
    search of all methods, so that none begins ahead of another.
    """
    sample = sample_columns(rows)
    step = max(1, _CHUNK // rows.shape[1])
    chunks = zip(sample.split(step), rows.split(step), strict=True)
    return torch.cat([_fit_chunk(*chunk, grid) for chunk in chunks])


def sample_columns(rows: Tensor) -> Tensor:
    """Returns ``rows`` (C, n) or, of long ones, columns drawn at random, always the same."""
    columns = _TENSOR_COLUMNS if len(rows) == 1 else _COLUMNS
    if rows.shape[1] <= columns:
        return rows
    chosen = torch.randint(rows.shape[1], (columns,), generator=torch.Generator().manual_seed(0))
    return rows[:, chosen.to(rows.device)]


def coarse_scale(sample: Tensor, mean: Tensor, largest: Tensor, grid: Grid) -> Tensor:
    """Returns the best scale for each row of ``sample`` among those from ``mean`` to ``largest`` magnitude, (C,)."""
    shares = torch.linspace(0, 1, _STARTS).tolist()
    return _best_scale(sample, [mean ** (1 - share) * largest**share for share in shares], grid)


def refit(rows: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Assigns with ``scale`` and returns the scale that then fits best, with its squared error, both per row."""
    decoded = grid.values[F.encode(rows, scale, grid.centroids, mu=grid.mu).int()]
    correlation = (rows * decoded).sum(1)
    energy = (decoded * decoded).sum(1).clamp(min=TINY)
    error = (rows * rows).sum(1) - correlation * correlation / energy
    return (correlation / energy).clamp(min=0.0), error


def _fit_chunk(sample: Tensor, rows: Tensor, grid: Grid) -> Tensor:
    rows = rows.float()
    unit = rows.abs().amax(1, keepdim=True).clamp(min=TINY)
    rows, sample = rows / unit, sample.float() / unit
    largest = rows.abs().amax(1)
    coarse = coarse_scale(sample, rows.abs().mean(1), largest, grid)
    # A sample misses the few largest weights, and clipping those is what matters at many bits.
    best = _best_scale(rows, [coarse, (coarse * largest).sqrt(), largest], grid)
    return unit.squeeze(1) * _best_scale(rows, [best * factor for factor in _FACTORS], grid)


def _best_scale(rows: Tensor, starts: list[Tensor], grid: Grid) -> Tensor:
    """Refits each start and returns, per row, the scale with the least squared error."""
    scales, errors = zip(*(refit(rows, start, grid) for start in starts), strict=True)
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best).squeeze(0)
