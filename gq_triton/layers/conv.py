"""Quantized twins of ``nn.Conv1d`` and ``nn.Conv2d``, with any stride, padding, padding mode, dilation and groups.

Activations, where quantized, are scaled per position, over the channels. Packed convolutions decode their weight once
per call.
"""

from torch import Tensor, nn

from gq_triton.layers.base import PackedLayer, QATLayer


def _channels_last(layer: QATLayer | PackedLayer, input: Tensor, spatial_dims: int) -> Tensor:
    """Quantizes an input (..., channels, *spatial) over its channels."""
    channel = -1 - spatial_dims
    return layer.quantized_input(input.movedim(channel, -1), "weight").movedim(-1, channel)


class QATConv1d(QATLayer, nn.Conv1d):
    """``nn.Conv1d`` that computes with the quantized weight, (out_channels, in_channels / groups, kernel)."""

    autocasts = True

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, L) or (in_channels, L) to as many outputs as ``nn.Conv1d`` does."""
        return self._conv_forward(_channels_last(self, input, 1), self.quantized("weight"), self.bias)


class PackedConv1d(PackedLayer, nn.Conv1d):
    """``nn.Conv1d`` that holds its weight packed."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, L) or (in_channels, L) to as many outputs as ``nn.Conv1d`` does."""
        return self._conv_forward(_channels_last(self, input, 1), self.decoded("weight"), self.bias)


class QATConv2d(QATLayer, nn.Conv2d):
    """``nn.Conv2d`` that computes with the quantized weight, (out_channels, in_channels / groups, height, width)."""

    autocasts = True

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) or (in_channels, H, W) to as many outputs as ``nn.Conv2d`` does."""
        return self._conv_forward(_channels_last(self, input, 2), self.quantized("weight"), self.bias)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """``nn.Conv2d`` that holds its weight packed."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) or (in_channels, H, W) to as many outputs as ``nn.Conv2d`` does."""
        return self._conv_forward(_channels_last(self, input, 2), self.decoded("weight"), self.bias)
