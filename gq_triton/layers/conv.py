"""Quantized twins of ``nn.Conv1d`` and ``nn.Conv2d``, with any stride, padding, padding mode, dilation and groups.

Activations, where quantized, are scaled per position, over the channels.

Packed pointwise convolutions run as linear layers, and depthwise ones over time as an operator of their own: neither
holds its weight as floats. All other packed convolutions decode theirs once per call. The outputs of the first two have
channels adjacent in memory where their inputs have: use ``reshape`` on those rather than ``view``.
"""

from torch import Tensor, nn
from torch.nn.functional import pad

from gq_triton import functional as F
from gq_triton.layers.base import PackedLayer, QATLayer, ReadWeight, autocast
from gq_triton.layers.packed_weight import PackedWeight


def _channels_last(layer: QATLayer | PackedLayer, input: Tensor, spatial_dims: int) -> Tensor:
    """Quantizes an input (..., channels, *spatial) over its channels."""
    channel = -1 - spatial_dims
    return layer.quantized_input(input.movedim(channel, -1), "weight").movedim(-1, channel)


def _is_pointwise(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a convolution is a product over the channels at each position."""
    padded = any(layer.padding) if isinstance(layer.padding, tuple) else False  # "same" adds nothing to one tap
    return {*layer.kernel_size, *layer.stride, layer.groups} == {1} and not padded


def _is_plain(layer: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether no subclass has changed how a convolution is computed."""
    return type(layer)._conv_forward in (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward)


def _pointwise(layer: PackedLayer, input: Tensor, spatial_dims: int) -> Tensor:
    channel = -1 - spatial_dims
    output = layer.linear(input.movedim(channel, -1), "weight", layer.bias).movedim(-1, channel)
    return output.contiguous() if input.is_contiguous() else output


class QATConv1d(QATLayer, nn.Conv1d):
    """``nn.Conv1d`` that computes with the quantized weight, (out_channels, in_channels / groups, kernel)."""

    autocasts = True
    weight = ReadWeight()

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, L) or (in_channels, L) to as many outputs as ``nn.Conv1d`` does."""
        return self._conv_forward(_channels_last(self, input, 1), self.quantized("weight"), self.bias)


class PackedConv1d(PackedLayer, nn.Conv1d):
    """``nn.Conv1d`` that holds its weight packed, and computes from codes if it is pointwise or depthwise."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, L) or (in_channels, L) to as many outputs as ``nn.Conv1d`` does."""
        plain = _is_plain(self)
        if plain and _is_pointwise(self):
            return _pointwise(self, input, 1)
        input = _channels_last(self, input, 1)
        if plain and self.groups == self.in_channels and self.weight_packed.dense is None:
            return self._depthwise(input)
        return self._conv_forward(input, self.decoded("weight"), self.bias)

    def _depthwise(self, input: Tensor) -> Tensor:
        packed: PackedWeight = self.weight_packed
        left, right = self._padding()
        if self.padding_mode != "zeros" or left != right:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, left = pad(input, (left, right), mode=mode), 0
        return F.packed_depthwise_conv1d(
            autocast(input),
            packed.codes,
            packed.codebook,
            packed.scale,
            self.bias,
            bits=packed.config.bits,
            kernel_size=self.kernel_size[0],
            out_channels=self.out_channels,
            stride=self.stride[0],
            padding=left,
            dilation=self.dilation[0],
            layout=packed.layout,
        )

    def _padding(self) -> tuple[int, int]:
        """Returns how many steps of time are added before and after."""
        if isinstance(self.padding, tuple):
            return self.padding[0], self.padding[0]
        total = self.dilation[0] * (self.kernel_size[0] - 1) if self.padding == "same" else 0
        return total // 2, total - total // 2


class QATConv2d(QATLayer, nn.Conv2d):
    """``nn.Conv2d`` that computes with the quantized weight, (out_channels, in_channels / groups, height, width)."""

    autocasts = True
    weight = ReadWeight()

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) or (in_channels, H, W) to as many outputs as ``nn.Conv2d`` does."""
        return self._conv_forward(_channels_last(self, input, 2), self.quantized("weight"), self.bias)


class PackedConv2d(PackedLayer, nn.Conv2d):
    """``nn.Conv2d`` that holds its weight packed, and computes from codes if it is pointwise."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, in_channels, H, W) or (in_channels, H, W) to as many outputs as ``nn.Conv2d`` does."""
        if _is_plain(self) and _is_pointwise(self):
            return _pointwise(self, input, 2)
        return self._conv_forward(_channels_last(self, input, 2), self.decoded("weight"), self.bias)
