"""A uniform grid with a scale per channel: post-training quantization and straight-through training.

The levels of channel c are s_c l_j with l_j = -1 + 2 j / (K - 1): evenly spaced and symmetric, so all K = 2^bits are of
use, at 1 bit {-s, +s}. (Of an int8 codebook at 8 bits they are the integers -127 .. 127.) The scale is that of least
squared error, not the largest magnitude: at few bits, clipping the tails is worth far more than it costs.

Training is the straight-through estimator (Bengio et al., arXiv 1308.3432): forward q(w), backward the identity, also
beyond the outer levels, so no weight freezes. The scale follows the weights: after each optimizer step

    s_c <- sum w l(w) / sum l(w)^2,    l(w) the level of w under the old scale,

the least-squares scale for the codes that are in force, as the 1-bit mean |w| of XNOR-Net (Rastegari et al., arXiv
1603.05279) is, and the alternation of LQ-Nets (Zhang et al., arXiv 1807.10029) with the grid held uniform. No step
raises the squared error. A channel keeps its scale where this one would not be positive, so one that was fitted to
zeros stays at zero.

At 8 bits this is linear quantization-aware training, what arXiv 2210.09188 compares with.
"""

import torch
from torch import Tensor

from gq_triton.fitting import TINY, checked_rows, fit_scale

from .config import BaselineConfig
from .levels import LevelQuantizer

__all__ = ["UniformQuantizer"]


class UniformQuantizer(LevelQuantizer):
    """Evenly spaced levels, with scales that follow the weights where a :class:`gq_triton.Annealer` steps.

    Attributes:
        scales: buffer, (C,), float32, at least 0.
    """

    whole_weights = True
    scales: Tensor

    def __init__(self, config: BaselineConfig, channels: int, device: torch.device | None = None) -> None:
        super().__init__(config, channels, device)
        self.register_buffer("scales", torch.zeros(channels, device=device))

    def scale(self) -> Tensor:
        return self.scales

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        rows = checked_rows(weight, len(self.scales))
        self.set_levels(torch.linspace(-1.0, 1.0, len(self.levels)))
        self.scales.copy_(fit_scale(rows, self.grid()))

    def update(self, weight: Tensor, step: int) -> None:
        self.follow(weight)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        unit = self.scales.clamp(min=TINY).unsqueeze(1)
        rows, levels = weight.flatten(1) / unit, self.hard(weight).flatten(1) / unit
        correlation = (rows * levels).sum(1)
        # Of levels that lie unevenly about 0, the nearest to a weight may have the other sign.
        self.scales.mul_(torch.where(correlation > 0, correlation / levels.square().sum(1), 1.0))
