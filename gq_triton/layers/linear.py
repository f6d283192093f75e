"""Quantized twins of ``nn.Linear``."""

from torch import Tensor, nn
from torch.nn.functional import linear

from gq_triton.layers.base import PackedLayer, QATLayer, ReadWeight


class QATLinear(QATLayer, nn.Linear):
    """``nn.Linear`` that computes with the quantized weight, (out_features, in_features)."""

    autocasts = True
    weight = ReadWeight()

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return linear(self.quantized_input(input, "weight"), self.quantized("weight"), self.bias)


class PackedLinear(PackedLayer, nn.Linear):
    """``nn.Linear`` that computes from packed codes; the float weight is never materialised."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        return self.linear(input, "weight", self.bias)
