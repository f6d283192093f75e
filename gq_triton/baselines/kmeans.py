"""A Lloyd-Max codebook per tensor: the K levels and the scales per channel with the least squared error.

For weights w of channel c, with scales s_c and levels l_j, Lloyd's algorithm (1982; Max, 1960) minimizes

    sum (w - s_c l_code)^2

by turns over the codes (the nearest level), the levels (l_j = sum s_c w / sum s_c^2 over the weights of code j: the
centroids of their cells) and the scales (s_c = sum w l / sum l^2 over the channel), none of which can raise it, until a
round gains less than one part in 10^4. It starts from the companded grid to which the General Quantizer is fitted and
finds a local minimum near it; should the best uniform grid be better than that, it starts again from there, so it is
never worse. It goes on once from the best scales for the levels found, which may lie past a local minimum, and keeps
the better. A level whose cell is empty stays where it is.

Training holds the levels and goes on as :mod:`gq_triton.baselines.uniform` does, with straight-through gradients and
scales that follow the weights.
"""

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.config import GQConfig
from gq_triton.fitting import TINY, Grid, checked_rows, fit_scale
from gq_triton.quantizer import WeightQuantizer

from .uniform import UniformQuantizer

__all__ = ["KMeansQuantizer", "lloyd"]

_ROUNDS = 200
_LEAST_GAIN = 1e-4


class KMeansQuantizer(UniformQuantizer):
    """Lloyd-Max levels, with scales that follow the weights where a :class:`gq_triton.Annealer` steps."""

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        super().fit(weight)
        rows = checked_rows(weight, len(self.scales))
        companded = WeightQuantizer(GQConfig(bits=self.config.bits), len(weight), weight.device)
        companded.fit(weight)
        found = lloyd(rows, companded.codebook(), companded.scale())
        if found[2] > self._error(rows):
            found = lloyd(rows, self.levels, self.scales)
        again = lloyd(rows, found[0], fit_scale(rows, Grid(found[0], 0.0, found[0])))
        levels, scale, _ = min(found, again, key=lambda result: result[2])
        self.set_levels(levels)
        self.scales.copy_(scale if self.config.codebook == "float" else fit_scale(rows, self.grid()))

    def _error(self, rows: Tensor) -> float:
        errors = (rows - self.hard(rows)).double().square().sum()
        return float(errors / rows.double().square().sum().clamp(min=TINY))


def lloyd(rows: Tensor, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """Runs Lloyd's algorithm for a weight (C, n), from levels (K,), ascending within [-1, 1], and scales (C,).

    Returns:
        levels, the largest of magnitude 1, scales, and the squared error relative to the weight's energy.
    """
    unit = rows.abs().amax().clamp(min=TINY)
    rows, scale, error = rows.float() / unit, scale / unit, float("inf")
    total = rows.double().square().sum().clamp(min=TINY)
    for _ in range(_ROUNDS):
        codes = F.encode(rows, scale, levels, mu=0.0)
        levels = _centroids(rows, scale, codes, levels)
        decoded = levels[codes.int()]
        energy = decoded.square().sum(1)
        scale = torch.where(energy > 0, (rows * decoded).sum(1).clamp(min=0.0) / energy, scale)
        peak = levels.abs().amax().clamp(min=TINY)
        levels, scale = levels / peak, scale * peak
        previous, error = error, float((rows - decoded * (scale / peak).unsqueeze(1)).double().square().sum() / total)
        if error >= (1.0 - _LEAST_GAIN) * previous:
            break
    return levels, scale * unit, error


def _centroids(rows: Tensor, scale: Tensor, codes: Tensor, levels: Tensor) -> Tensor:
    """The levels that fit best for given codes and scales, (K,)."""
    column = scale.double().unsqueeze(1)
    cells = codes.flatten().int()
    mass = torch.bincount(cells, column.square().expand_as(rows).flatten(), len(levels))
    moment = torch.bincount(cells, (rows * column).flatten(), len(levels))
    return torch.where(mass > 0, moment / mass, levels.double()).float()
