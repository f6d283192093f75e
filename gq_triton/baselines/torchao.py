"""torchao's fake quantizer, for linear layers.

torchao (https://github.com/pytorch/ao, ``torchao.quantization.qat``) fake-quantizes a weight to the integers
-2^(bits-1) .. 2^(bits-1) - 1, symmetrically, with a scale per output channel that is computed at every forward pass
from the channel's largest magnitude; its gradient is straight through, zero where a weight is clipped. In training that
very module runs. Its integers q are deployed as the entries q / 2^(bits-1) of a codebook, with 2^(bits-1) times its
scales: powers of two, so every product is its own, bit for bit.
"""

import torch
from torch import Tensor, nn

from gq_triton.fitting import checked_rows
from gq_triton.quantizer import Quantizer

from .config import TorchaoConfig

__all__ = ["TorchaoQuantizer"]


class TorchaoQuantizer(Quantizer):
    """torchao's integers, with scales that are functions of the weight.

    Attributes:
        scales: buffer, (C,), float32: those of the weight that was fitted or encoded last.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """

    scales: Tensor

    def __init__(self, config: TorchaoConfig, channels: int, device: torch.device | None = None) -> None:
        super().__init__(config)
        self.fake_quantizer = _fake_quantizer(config.bits)
        self.half = 2 ** (config.bits - 1)
        self.register_buffer("scales", torch.zeros(channels, device=device))

    @staticmethod
    def refuse(layer: nn.Module) -> str | None:
        if not isinstance(layer, nn.Linear) or layer.in_features == 1:
            return "torchao fake-quantizes linear layers of two and more inputs only"
        return None

    def scale(self) -> Tensor:
        return self.scales

    def codebook(self) -> Tensor:
        return torch.arange(-self.half, self.half, device=self.scales.device) / self.half

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Tensor:
        quantized = self.fake_quantizer(weight).float()
        step = self.fake_quantizer.scale
        self.scales.copy_(step.flatten() * self.half)
        return (quantized / step).round().add(self.half).to(torch.uint8)

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        self.encode(checked_rows(weight, len(self.scales)))

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        self.trained |= self.training
        quantized = self.fake_quantizer(weight)
        return quantized if dtype is None else quantized.to(dtype)


def _fake_quantizer(bits: int) -> nn.Module:
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer
    except ModuleNotFoundError as error:
        message = "method 'torchao' needs torchao; install it with: pip install 'gq-triton[bench]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    integers = {4: torch.int4, 8: torch.int8}[bits]
    return IntxFakeQuantizer(IntxFakeQuantizeConfig(integers, "per_channel", is_symmetric=True))
