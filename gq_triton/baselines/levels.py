"""What the rival methods share: a weight of channel c is quantized to the nearest of K fixed levels,

    q(w) = s_c l_j,    j = argmin_i |w / s_c - l_i|,    -1 <= l_0 <= ... <= l_{K-1} <= 1

by the kernels of the General Quantizer, of which this is the case mu = 0 with the levels for centroids. So codes,
training and deployment agree bit for bit, and differences in accuracy are the methods', not the arithmetic's.
"""

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.fitting import Grid
from gq_triton.quantizer import Quantizer

from .config import BaselineConfig

__all__ = ["LevelQuantizer"]


class LevelQuantizer(Quantizer):
    """Quantizes to levels that stay as they were fitted, with the straight-through gradient: that of the identity.

    Args:
        config: the settings.
        channels: C, the size of the weight's dim 0.
        device: where the buffers live. Default: torch's default device.

    Attributes:
        levels: buffer, (2**bits,), float32, ascending, within [-1, 1]: the codebook, in its deployed dtype's values.
    """

    levels: Tensor

    def __init__(self, config: BaselineConfig, channels: int, device: torch.device | None = None) -> None:
        super().__init__(config)
        self.register_buffer("levels", torch.linspace(-1.0, 1.0, 2**config.bits, device=device))

    def set_levels(self, levels: Tensor) -> None:
        """Sets the levels, rounded to what the configuration's codebook can hold."""
        self.levels.copy_(F.codebook(levels, mu=0.0, dtype=self.config.codebook))

    def codebook(self) -> Tensor:
        return self.levels

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Tensor:
        return F.encode(weight, self.scale(), self.levels, mu=0.0)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.trained |= self.training
        return self.quantize(weight).to(weight.dtype if dtype is None else dtype)

    def quantize(self, weight: Tensor) -> Tensor:
        """Returns ``weight`` quantized, with the method's gradient."""
        return self.hard(weight) + (weight - weight.detach())

    @torch.no_grad()
    def hard(self, weight: Tensor) -> Tensor:
        """Returns ``weight`` quantized, without a gradient; NaN where it is not finite."""
        return F.fake_quantize(weight, self.scale(), self.levels, mu=0.0, hardness=1.0)

    def grid(self) -> Grid:
        """Returns the levels, for fits of scales."""
        return Grid(self.levels, 0.0, self.levels)

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}"
