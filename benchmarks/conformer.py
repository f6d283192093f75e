"""A Conformer encoder of plain torch layers (Gulati et al., arXiv 2005.08100), to have its costs measured.

Sinusoidal instead of relative positions; otherwise the paper's blocks, so that weights and operations are those of a
recognizer. It takes the place of the encoder of a :class:`gq_triton.models.rnnt.RNNT`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gq_triton.models.rnnt import RNNT, RNNTConfig


def conformer_transducer(vocab_size: int, features: int = 80, width: int = 256, blocks: int = 16) -> RNNT:
    """A transducer with a Conformer for an encoder: 30 million parameters for 512 labels."""
    config = RNNTConfig(
        vocab_size,
        features,
        encoder_layers=1,
        encoder_hidden=width,
        reduce_after=0,
        predictor_embedding=width,
        predictor_hidden=640,
        joint=640,
    )
    model = RNNT(config)
    model.encoder = Conformer(features, width, blocks)
    return model


class Conformer(nn.Module):
    """``(B, T, features)`` -> ``(B, T', width)`` and lengths, T' a quarter of T, rounded up."""

    def __init__(self, features: int, width: int, blocks: int, heads: int = 4, kernel: int = 31) -> None:
        super().__init__()
        self.output_size = width
        self.subsampling = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.input = nn.Linear(width * math.ceil(math.ceil(features / 2) / 2), width)
        self.blocks = nn.ModuleList(Block(width, heads, kernel) for _ in range(blocks))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input(self.subsampling(features[:, None]).transpose(1, 2).flatten(2))
        x = x + _positions(x)
        lengths = (lengths + 3) // 4
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        for block in self.blocks:
            x = block(x, valid)
        return x, lengths


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward: each normalized first and added."""

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.first, self.last = _feed_forward(width), _feed_forward(width)
        self.attention = Attention(width, heads)
        self.convolution = Convolution(width, kernel)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = x + 0.5 * self.first(x)
        x = x + self.attention(x, valid)
        x = x + self.convolution(x, valid)
        return self.norm(x + 0.5 * self.last(x))


class Attention(nn.Module):
    """Self-attention over valid frames."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.input, self.output = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        query, key, value = self.input(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = valid[:, None, None, :]
        x = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.output(x.transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Gated pointwise, depthwise and pointwise convolution."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.input = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.output = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = nn.functional.glu(self.input(self.norm(x).transpose(1, 2)), dim=1)
        x = self.depthwise(x * valid[:, None])
        return self.output(nn.functional.silu(self.batch_norm(x))).transpose(1, 2)


def _feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def _positions(x: Tensor) -> Tensor:
    frame = torch.arange(x.shape[1], device=x.device)[:, None]
    rate = torch.exp(torch.arange(0, x.shape[2], 2, device=x.device) * (-math.log(10000) / x.shape[2]))
    return torch.cat([torch.sin(frame * rate), torch.cos(frame * rate)], 1).to(x.dtype)
