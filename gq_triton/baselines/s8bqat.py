"""Regularized training towards fixed centroids, in the manner of S8BQAT (Zhen et al., arXiv 2206.15408).

From the paper's abstract: centroids are derived from the float model, after Lloyd-Max; a "multi-regional absolute
cosine" regularizer in the loss draws weights to their nearest centroid (the absolute cosine of Nguyen et al.,
Interspeech 2020, on a grid of regions of different widths); and a hard compressor, invoked periodically, replaces the
weights by their centroids. In between, the network computes with its float weights.

The rest is ours. Centroids s_c l_j are the Lloyd-Max levels and scales of :mod:`gq_triton.baselines.kmeans`, fixed from
then on. A weight with x = w / s_c between l_j and l_{j+1} costs

    r(w) = |cos(pi (1/2 + u))| = sin(pi u),    u = (x - l_j) / (l_{j+1} - l_j)

which is 0 at the centroids, 1 half way between them, and is flat nowhere else. Beyond the outer levels r rises by
pi / D for each unit of x, so that no phantom centroid attracts. The term of a tensor of N weights is

    strength / sqrt(N) sum_w s_c D / pi r(w),    D = (l_{K-1} - l_0) / (K - 1), the mean spacing

whose gradient in each weight is about strength / sqrt(N), and in the tensor about ``strength`` in norm, whatever
the tensor's size and width are. After every ``compress_every``-th optimizer step w becomes q(w). In ``eval``, and as
deployed, the weights are q(w).
"""

import math

import torch
from torch import Tensor

from gq_triton.fitting import TINY

from .config import S8BQATConfig
from .kmeans import KMeansQuantizer

__all__ = ["S8BQATQuantizer"]


class S8BQATQuantizer(KMeansQuantizer):
    """Lloyd-Max levels and scales, fixed; a regularizer, and hard compression where a :class:`gq_triton.Annealer`
    steps."""

    config: S8BQATConfig

    def quantize(self, weight: Tensor) -> Tensor:
        return weight if self.training else super().quantize(weight)

    def penalty(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        unit = self.scales.clamp(min=TINY).unsqueeze(1)
        x = rows.detach() / unit
        # From the nearest centroid, where compression puts weights: there |.| has the slope 0, and u of 0 or 1 has not.
        distance = ((weight - self.hard(weight)).flatten(1) / unit).abs()
        region = torch.bucketize(x, self.levels[1:-1])
        gap = (self.levels[region + 1] - self.levels[region]).clamp(min=TINY)
        spacing = (self.levels[-1] - self.levels[0]) / (len(self.levels) - 1)
        beyond = (x < self.levels[0]) | (x > self.levels[-1])
        within = torch.sin(math.pi * (distance / gap).clamp(max=0.5))
        cost = torch.where(beyond, math.pi / spacing * distance, within)
        factor = self.config.strength * spacing / (math.pi * math.sqrt(rows.numel()))
        return factor * (self.scales * cost.sum(1)).sum()

    def follow(self, weight: Tensor) -> None:
        """Does nothing: levels and scales are fixed."""

    @torch.no_grad()
    def update(self, weight: Tensor, step: int) -> None:
        if step % self.config.compress_every == 0:
            weight.copy_(self.hard(weight))
