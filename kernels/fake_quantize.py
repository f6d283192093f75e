"""Fake quantization of a weight: hard and soft forward, their shared backward, and encoding.

Mathematics (arXiv 2210.09188; notation and tables in `gq_triton.kernels.tables`).  For a weight w of a channel with
scale s > 0:

    x = w / s                      y = F(clamp(x, F^-1(z_0), F^-1(z_{K-1})))
    hard = s c_code                code = how many thresholds t_i satisfy fp32(s t_i) < w
    soft = s q                     q = A_j + J_j sigma,  sigma = sigmoid(k y + o_j),  j = how many edges lie below y

Backward, of both (hard uses the derivative of soft), for an incoming gradient g and a straight-through share h:

    dq/dx = J_j k sigma (1 - sigma) F'(x)        m = (1 - h) dq/dx + h
    dw = g m                                     ds = sum over the channel of g (q - [x not clamped] x m)

with dq/dx taken at the clamped x: a weight beyond the outer centroids keeps the derivative of the border, or it could
never return.  The gradient of the table, summed over all weights with G = g s and d = J_j sigma (1 - sigma), is

    dA_j = sum_j G          dJ_j = sum_j G sigma               do_j = sum_j G d
    dk = sum G d y          dmu = k sum_{not clamped} G d dF/dmu
    dz_0 = k sum_{clamped to z_0} G d                          and likewise z_{K-1}

where sum_j runs over the weights of cell j.  Everything is computed in float32 (float64 for float64 weights).  A
channel of scale 0 gives exact zeros.  A weight that is not finite gives NaN at its place, and NaN gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.kernels import fake_quantize_cpu as cpu
from gq_triton.kernels import fake_quantize_triton as gpu
from gq_triton.kernels.tables import compress, split_table

__all__ = ["encode", "fake_quantize", "reference"]


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    weight: Tensor,
    scale: Tensor,
    centroids: Tensor,
    values: Tensor,
    *,
    mu: Tensor,
    hardness: Tensor,
    forward: str = "soft",
    squared: bool = False,
) -> Tensor:
    """The definition, with one probability for every weight and centroid, in the dtype it is given; arguments as those
    of `gq_triton.functional.fake_quantize`, with the codebook ``values`` (K,) and a 0-d ``mu``.

    ``squared`` takes the squared instead of the absolute distance (an ablation; the kernels have no such form).
    """
    column = scale.reshape(-1, *[1] * (weight.dim() - 1))
    y = compress((weight / column).clamp(-1, 1), mu)
    distance = (y.unsqueeze(-1) - centroids).abs()
    if forward == "hard":
        return column * values[distance.argmin(-1)]
    spacing = (centroids[-1] - centroids[0]) / (centroids.numel() - 1)
    relative = distance / spacing
    probability = torch.softmax(-hardness * (relative.square() if squared else relative), dim=-1)
    return column * (probability * values).sum(-1)


# --- operators --------------------------------------------------------------------------------------------------------

# The launchers cache small tensors on the GPU, which the CUDA graphs of `torch.compile` take for leaks in their memory;
# `torch.cuda.graph` has no such check and captures the operators like any other.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("gq_triton::fake_quantize", mutates_args=(), device_types="cpu", tags=_TAGS)
def fake_quantize(
    weights: Sequence[Tensor],
    scale: Tensor,
    tables: Tensor,
    per_channel: bool,
    soft: bool,
    straight_through: float,
    table_grad: bool,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Quantized ``weights``, contiguous: a group of G weights in one call.

    Args:
        weights: G tensors (C_i, ...) of one floating dtype.
        scale: float32 (float64 for float64 weights): the scales of all weights in a row, (sum of C_i,) or, one per
            weight, (G,).
        tables: (G, 6 K), flat tables (`build_tables`) in the scale's dtype.
        per_channel: whether a weight has a scale per channel or one for all.
        soft: the soft instead of the hard value.
        straight_through: share h of the identity in the weights' gradients.
        table_grad: whether the backward pass forms the gradient of the tables.
        dtype: of the result; None: that of the weights.
    """
    _check_values(scale, tables)
    dtype = dtype or weights[0].dtype
    widest = torch.promote_types(weights[0].dtype, dtype)
    members = zip(weights, _split_scale(scale, weights, per_channel), tables, strict=True)
    return [cpu.forward(weight.to(widest), own, table, soft).to(dtype) for weight, own, table in members]


@fake_quantize.register_kernel("cuda")
def _(weights, scale, tables, per_channel, soft, straight_through, table_grad, dtype):
    return gpu.forward(weights, scale, tables, per_channel, soft, dtype)


@fake_quantize.register_fake
def _(weights, scale, tables, per_channel, soft, straight_through, table_grad, dtype):
    return [weight.new_empty(weight.shape, dtype=dtype or weight.dtype) for weight in weights]


@torch.library.custom_op("gq_triton::fake_quantize_backward", mutates_args=(), device_types="cpu", tags=_TAGS)
def fake_quantize_backward(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    scale: Tensor,
    tables: Tensor,
    per_channel: bool,
    straight_through: float,
    table_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of weights (empty where the incoming one is None), scale and tables (zeros without ``table_grad``)."""
    dweights = [w.new_empty(0 if grad is None else w.shape) for grad, w in zip(grads, weights, strict=True)]
    dscale, dtables = torch.zeros_like(scale), torch.zeros_like(tables)
    scales, dscales = (_split_scale(tensor, weights, per_channel) for tensor in (scale, dscale))
    for member, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        if grad is not None:
            options = straight_through, table_grad
            own = cpu.backward(grad, weight, scales[member], tables[member], *options)
            dweights[member], dscales[member][:], dtables[member] = own
    return dweights, dscale, dtables


fake_quantize_backward.register_kernel("cuda")(gpu.backward)


@fake_quantize_backward.register_fake
def _(grads, weights, scale, tables, per_channel, straight_through, table_grad):
    shapes = [(0,) if grad is None else weight.shape for grad, weight in zip(grads, weights, strict=True)]
    dweights = [weight.new_empty(shape) for weight, shape in zip(weights, shapes, strict=True)]
    return dweights, torch.empty_like(scale), torch.empty_like(tables)


def _setup_context(ctx, inputs, output) -> None:
    weights, scale, tables, per_channel, _, straight_through, table_grad, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*weights, scale, tables)
    ctx.options = per_channel, straight_through, table_grad


def _backward(ctx, grads):
    *weights, scale, tables = ctx.saved_tensors
    dweights, dscale, dtables = fake_quantize_backward(grads, weights, scale, tables, *ctx.options)
    dweights = [None if grad is None else dweight for grad, dweight in zip(grads, dweights, strict=True)]
    return dweights, dscale, dtables if ctx.options[2] else None, None, None, None, None, None


fake_quantize.register_autograd(_backward, setup_context=_setup_context)


def _split_scale(scale: Tensor, weights: Sequence[Tensor], per_channel: bool) -> Sequence[Tensor]:
    return scale.split([len(weight) if per_channel else 1 for weight in weights])


@torch.library.custom_op("gq_triton::encode", mutates_args=(), device_types="cpu")
def encode(weight: Tensor, scale: Tensor, borders: Tensor) -> Tensor:
    """Codes (uint8, contiguous, shape of ``weight``): how many borders b (K-1,) satisfy ``scale * b < weight``."""
    return cpu.encode(weight, scale, borders)


encode.register_kernel("cuda")(gpu.encode)


@encode.register_fake
def _(weight, scale, borders):
    return weight.new_empty(weight.shape, dtype=torch.uint8)


def _check_values(scale: Tensor, tables: Tensor) -> None:
    """Checked on the CPU only: on a GPU the answer would have to be waited for."""
    if (scale < 0).any():
        raise ValueError(f"scale must not be negative, but its smallest entry is {scale.min().item():g}")
    parts = split_table(tables)
    k = parts.curve[..., 0]
    if not bool(((k >= 0) & (k < torch.inf)).all()) or bool((parts.thresholds.diff() < 0).any()):
        raise ValueError("centroids must be sorted and not all equal, and hardness finite and not negative")
