"""Learned Step Size Quantization (Esser et al., arXiv 1902.08153, sections 2 and 3), with a step per channel.

With v = w / s, Qn = 2^(bits-1) and Qp = Qn - 1, the weight is quantized to the integers -Qn .. Qp,

    q = round(clamp(v, -Qn, Qp))     w' = s q

and the gradients, straight through the rounding, are

    dw'/dw = 1 where -Qn <= v <= Qp, else 0
    dw'/ds = q - v where dw'/dw = 1, else q (-Qn or Qp)

The gradient of s is multiplied by g = 1 / sqrt(N Qp), N the number of weights that share the step; the step starts at
2 mean|w| / sqrt(Qp).

Ours, as the paper trains one step per layer, by stochastic gradient descent, at 2 bits and more:

- A step for each channel, as all methods here have it; N counts the channel's weights.
- What is trained is ln s. So s stays positive under any step of any optimizer, and Adam, which divides by the
  gradient's size and would move all steps by the same absolute amount however small they are, moves them in proportion.
  The gradient of ln s is g s dL/ds = g sum_w dL/dw' (w' - w dw'/dw).
- With ``init="error"`` the step starts where the squared error is least. The paper's start is far above that at many
  bits (at 8 by a factor of 4), which its ninety epochs make good and a short training does not.
- One bit has no zero and Qp would be 0: the levels are -s and s, Qp is 1, and s starts at mean|w|, the binary step of
  least squared error. The gradients are those above, with the levels for the limits.
- A channel that was fitted to zeros stays at zero.
"""

import torch
from torch import Tensor, nn

from gq_triton.fitting import checked_rows, fit_scale
from gq_triton.quantizer import from_log_scale, to_log_scale

from .config import BaselineConfig, LSQConfig
from .levels import LevelQuantizer

__all__ = ["LSQQuantizer"]


class LSQQuantizer(LevelQuantizer):
    """Integers times a learned step.

    Args:
        config, channels, device: as :class:`gq_triton.baselines.levels.LevelQuantizer` takes them.

    Attributes:
        log_scale: parameter, (C,), float32: ln(s Qn), Qn being 1 at one bit.
    """

    config: LSQConfig

    def __init__(self, config: BaselineConfig, channels: int, device: torch.device | None = None) -> None:
        super().__init__(config, channels, device)
        self.negative = 2 ** (config.bits - 1)
        self.positive = max(self.negative - 1, 1)
        self.log_scale = nn.Parameter(torch.zeros(channels, device=device))

    def scale(self) -> Tensor:
        return from_log_scale(self.log_scale)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        rows = checked_rows(weight, len(self.log_scale))
        one_bit = self.config.bits == 1
        grid = torch.tensor([-1.0, 1.0]) if one_bit else torch.arange(-self.negative, self.negative) / self.negative
        self.set_levels(grid)
        if one_bit or self.config.init == "error":
            scale = fit_scale(rows, self.grid())
        else:
            scale = 2.0 * rows.float().abs().mean(1) / self.positive**0.5 * self.negative
        self.log_scale.copy_(to_log_scale(scale))

    def quantize(self, weight: Tensor) -> Tensor:
        column = [-1, *[1] * (weight.dim() - 1)]
        quantized, scale = self.hard(weight), self.scale().detach().view(column)
        inside = (weight >= scale * self.levels[0]) & (weight <= scale * self.levels[-1])
        slope = (quantized - weight.detach() * inside) * (weight[0].numel() * self.positive) ** -0.5
        log_scale = self.log_scale.view(column)
        # Differences of equals: they have the gradients of the formulas above, and no value.
        return quantized + (weight - weight.detach()) * inside + slope * (log_scale - log_scale.detach())
