"""Dynamic quantization of activations, one scale per token.

Mathematics.  For each token, a vector v of the last dimension, with limit Q = 127 (int8) or 448 (fp8 e4m3):

    s = max|v| / Q        q = round(v / s)        v' = q s

where round goes to the nearest integer (int8) or e4m3 number (fp8), ties to even.  Computed in float32 with true
divisions, so that every device agrees bit for bit.  A subnormal s, too coarse a divisor to keep |q| <= Q, counts as 0,
and a scale of 0 gives zeros; a token that is not finite has q = 0 and s = NaN, so that all it enters becomes NaN.
Otherwise no entry is ever clipped, and the gradient of v' passes straight through.  No zero is negative.

Bytes that must move: the token once, q and s (or v') once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels.backend import bound, cdiv, jit, launching, next_power_of_2, tl

__all__ = ["LIMITS", "STORED", "launch_quantize", "quantize_activations", "quantize_tokens", "reference"]

LIMITS = {"int8": 127.0, "fp8": 448.0}
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


# --- reference and CPU ------------------------------------------------------------------------------------------------


def reference(x: Tensor, dtype: str) -> Tensor:
    """The definition of v', in the dtype of ``x``."""
    q, scale = _quantize(x, dtype)
    return q.to(x.dtype) * scale.unsqueeze(-1)


def _quantize(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """q and s, which is in the dtype of ``x``, float32 or float64."""
    if not x.shape[-1]:
        return x.to(STORED[dtype]), x.new_zeros(x.shape[:-1])
    scale = x.abs().amax(-1) / LIMITS[dtype]
    scale = torch.where(scale < torch.finfo(x.dtype).tiny, 0.0, torch.where(scale.isfinite(), scale, torch.nan))
    column = scale.unsqueeze(-1)
    unit = torch.where(column > 0, x / column, 0.0)
    rounded = unit.round() if dtype == "int8" else torch.where(unit.abs() > 2.0**-10, unit, 0.0).float()
    return rounded.to(STORED[dtype]), scale


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _load(row, column, inside, features, feature_stride):
    """Float32 entries of a block of tokens, 0 beyond the edges."""
    mask = inside & (column < features)[None, :]
    place = column[None, :].to(tl.int64) * feature_stride
    return tl.load(row + place, mask=mask, other=0.0).to(tl.float32)


@jit
def _size(values):
    """|v| as its bits: integers in the same order, of which NaN is the largest, so that no maximum passes it over."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def _round(values, scale, FP8: tl.constexpr):
    """q as float32 numbers; 0 where the scale is 0 or NaN."""
    usable = scale > 0.0
    unit = tl.div_rn(tl.where(usable, values, 0.0), tl.where(usable, scale, 1.0))
    quantum = tl.full(unit.shape, 1.0, tl.float32)
    if FP8:  # 3 bits of mantissa; subnormal below 2^-6
        power = (unit.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        quantum = tl.maximum(power, 0.015625) * 0.125
    large = quantum * 12582912.0  # 1.5 * 2^23: the last bit of the sum is worth a quantum
    return (unit + large) - large


@jit
def _encode(q, FP8: tl.constexpr):
    """The byte that stores q.  An e4m3 number times 2^-120, subnormal or not, has its exponent and mantissa in bits 20
    to 26 of float32: no part needs to know the type."""
    if FP8:
        bits = (q * 7.52316384526264e-37).to(tl.int32, bitcast=True)
        return (((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)).to(tl.int8)
    return q.to(tl.int8)


@jit
def _store(out, q, scale, place, mask, FP8: tl.constexpr, FAKE: tl.constexpr):
    if FAKE:
        tl.store(out + place, (q * scale).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + place, _encode(q, FP8), mask=mask)


@jit
def _kernel(
    x,  # (outer, inner, features), any stride
    out,  # the same, contiguous: q as bytes, or v' if FAKE
    scales,  # (outer, inner)
    inner,
    features,
    outer_stride,
    inner_stride,
    feature_stride,
    FP8: tl.constexpr,
    FAKE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """TOKENS tokens of one outer index; their first BLOCK entries, mostly all of them, are read once."""
    across = tl.cdiv(inner, TOKENS)
    outer = (tl.program_id(0) // across).to(tl.int64)
    token = (tl.program_id(0) % across).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = x + (outer * outer_stride + token * inner_stride)[:, None]
    column, inside = tl.arange(0, BLOCK), (token < inner)[:, None]
    values = _load(row, column, inside, features, feature_stride)
    size = _size(values)
    for start in range(BLOCK, bound(features), BLOCK):
        size = tl.maximum(size, _size(_load(row, start + column, inside, features, feature_stride)))
    largest = tl.max(size, 1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0 if FP8 else 127.0, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, tl.where(scale < float("inf"), scale, float("nan")))
    place = (outer * inner + token)[:, None] * features + column[None, :]
    wide = scale[:, None]
    _store(out, _round(values, wide, FP8), wide, place, inside & (column < features)[None, :], FP8, FAKE)
    for start in range(BLOCK, bound(features), BLOCK):
        q = _round(_load(row, start + column, inside, features, feature_stride), wide, FP8)
        _store(out, q, wide, place + start, inside & (start + column < features)[None, :], FP8, FAKE)
    if not FAKE:
        tl.store(scales + outer * inner + token, scale, mask=token < inner)


# --- launchers --------------------------------------------------------------------------------------------------------


def choose_tile(features: int, transposed: bool) -> tuple[int, int, int]:
    """(tokens, features, warps) of a program; ``transposed``: neighbours in memory are tokens, not features."""
    if transposed:
        return 32, min(64, max(16, next_power_of_2(features))), 4
    block = min(4096, max(16, next_power_of_2(features)))
    return max(1, 1024 // block), block, max(4, block // 512)


def _launch(x: Tensor, out: Tensor, scale: Tensor, dtype: str, fake: bool) -> None:
    features = x.shape[-1]
    if x.numel():
        x = x.reshape(x.shape[0] if x.dim() > 2 and not x.is_contiguous() else 1, -1, features)
        outer, inner, _ = x.shape
        *tile, warps = choose_tile(features, x.stride(2) != 1 and x.stride(1) == 1)
        grid = (outer * cdiv(inner, tile[0]),)
        with launching(x):
            _kernel[grid](x, out, scale, inner, features, *x.stride(), dtype == "fp8", fake, *tile, num_warps=warps)


def launch_quantize(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """`quantize_tokens` in one launch."""
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    make = torch.empty if x.shape[-1] else torch.zeros
    scale = make(x.shape[:-1], dtype=torch.float32, device=x.device)
    _launch(x, q, scale, dtype, False)
    return q.view(STORED[dtype]), scale


def _launch_fake(x: Tensor, dtype: str) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, out, out, dtype, True)
    return out


# --- operator ---------------------------------------------------------------------------------------------------------


def quantize_tokens(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """(q, s): int8 or float8_e4m3fn of the shape of ``x``, (..., features), and float32 (...,).

    Args:
        x: float32, bfloat16, float16, or on the CPU float64, which is rounded first; any stride.
        dtype: ``"int8"`` or ``"fp8"``.
    """
    return launch_quantize(x, dtype) if x.is_cuda else _quantize(x.float(), dtype)


@torch.library.custom_op("gq_triton::quantize_activations", mutates_args=(), device_types="cpu")
def quantize_activations(x: Tensor, dtype: str) -> Tensor:
    """``x`` (..., features), contiguous, fake-quantized per token to ``dtype`` (``"int8"`` or ``"fp8"``)."""
    work = x if x.dtype == torch.float64 else x.float()
    return reference(work, dtype).to(x.dtype).contiguous()


quantize_activations.register_kernel("cuda")(_launch_fake)


@quantize_activations.register_fake
def _(x, dtype):
    return x.new_empty(x.shape)


def _backward(ctx, grad):
    return grad, None


quantize_activations.register_autograd(_backward)
