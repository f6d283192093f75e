"""Dynamic fake quantization of activations, one scale per token.

Mathematics.  For each vector v of the last dimension, with limit Q = 127 (int8) or 448 (fp8 e4m3):

    s = max|v| / Q        v' = s round(v / s)

where round goes to the nearest integer (int8, ties to even) or e4m3 number (fp8).  No entry is ever clipped, so the
gradient passes straight through.  Computed in float32 with true divisions, so that every device agrees; a vector of
zeros stays zero, one that is not finite becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LIMITS", "quantize_activations", "reference"]

LIMITS = {"int8": 127.0, "fp8": 448.0}


def reference(x: Tensor, dtype: str) -> Tensor:
    """The definition, in the dtype of ``x``."""
    limit = LIMITS[dtype]
    scale = x.abs().amax(-1, keepdim=True) / limit
    unit = torch.where(scale > 0, x / scale, 0)
    rounded = unit.round() if dtype == "int8" else unit.float().to(torch.float8_e4m3fn).to(x.dtype)
    return rounded * scale


@torch.library.custom_op("gq_triton::quantize_activations", mutates_args=())
def quantize_activations(x: Tensor, dtype: str) -> Tensor:
    """``x`` (..., features), contiguous, fake-quantized per token to ``dtype`` (``"int8"`` or ``"fp8"``)."""
    work = x if x.dtype == torch.float64 else x.float()
    quantized = reference(work, dtype) if x.numel() else work
    return quantized.to(x.dtype, copy=True).contiguous()


@quantize_activations.register_fake
def _(x, dtype):
    return x.new_empty(x.shape)


def _backward(ctx, grad):
    return grad, None


quantize_activations.register_autograd(_backward)
