"""Other ways to fake-quantize a weight (C, n) with one step size per channel, as peers in time.

All of them round straight through: the gradient of rounding is taken for 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from harness import Unavailable
from torch import Tensor, nn

from gq_triton.kernels import fake_quantize, tables


def plain(weight: Tensor, scale: Tensor, centroids: Tensor, *, mu: Tensor, hardness: Tensor) -> Tensor:
    """The General Quantizer as it is written: a probability for every weight and centroid. Its soft value, the cheapest
    form with all its gradients: a hard one costs an argmin more."""
    values = tables.codebook(centroids, mu, None).to(weight.dtype)
    return fake_quantize.reference(weight, scale, centroids, values, mu=mu, hardness=hardness)


def lsq(weight: Tensor, step: Tensor, *, bits: int) -> Tensor:
    """Learned step size (Esser et al., arXiv 1902.08153, equations 1 to 5): integers of ``bits`` bits times ``step``
    (C,), whose gradient is scaled by 1 / sqrt(weights per step * largest integer)."""
    if bits < 2:
        raise Unavailable("LSQ has no 1-bit form: the largest of its integers would be 0")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    share = 1 / math.sqrt(weight.shape[1] * high)
    step = _straight_through(step * share, step).unsqueeze(1)
    units = (weight / step).clamp(low, high)
    return _straight_through(units, units.round()) * step


def uniform(weight: Tensor, step: Tensor, *, bits: int) -> Tensor:
    """2**bits levels, ``step`` (C,) apart and symmetric about 0."""
    step, half = step.unsqueeze(1), 2 ** (bits - 1)
    units = (weight / step).clamp(-half, half)
    return _straight_through(units, units.floor().clamp(max=half - 1) + 0.5) * step


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``."""
    return x + (value - x).detach()


def torchao_config(bits: int):
    """torchao's weight quantizer: symmetric integers, a scale from each channel's largest weight at every call."""
    if bits < 2:
        raise Unavailable("torchao's symmetric integers of 1 bit round every weight to 0")
    try:
        from torchao.quantization.qat import IntxFakeQuantizeConfig
    except ImportError as error:
        raise Unavailable(f"torchao does not import: {error}") from error
    return IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), granularity="per_channel", is_symmetric=True)


def torchao(bits: int) -> Callable[[Tensor], Tensor]:
    """torchao's fake quantizer of a linear layer's weight."""
    config = torchao_config(bits)
    from torchao.quantization.qat import IntxFakeQuantizer

    return IntxFakeQuantizer(config)


def prepare_torchao(model: nn.Module, bits: int, leave: str) -> int:
    """Makes torchao's QAT layers of the model's linear layers, the only kind of weight layer that it prepares, but the
    one named ``leave``; returns how many weights they have."""
    config = torchao_config(bits)
    from torchao.quantization import quantize_
    from torchao.quantization.qat import FakeQuantizedLinear, QATConfig

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != leave

    quantize_(model, QATConfig(weight_config=config, step="prepare"), filter_fn=chosen)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, FakeQuantizedLinear))
