"""Linear layer on packed low-bit weights.

Mathematics.  With the codes of row n unpacked from bit planes (layout in `gq_triton.kernels.packing`),

    y[m, n] = epilogue(s[n] * sum_k x[m, k] c[code[n, k]] + b[n])

The scale leaves the sum, so that the inner product runs on codebook values alone.  The float weight never exists as a
whole: the CPU decodes a few rows at a time into its cache, the GPU decodes a tile into registers.  Only the backward
pass, for whatever else is trained around a packed layer, decodes it whole: x and b get gradients, the packed weight
none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gq_triton.kernels.backend import INTERPRETED, bound, cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.packing import load_codes, unpack, unpack_range

__all__ = ["EPILOGUES", "packed_linear", "reference"]

EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
_EPILOGUE_GRADS = {
    "relu": lambda grad, before: torch.where(before > 0, grad, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
}
CHUNK = 1 << 16  # weights decoded at a time on the CPU


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, bits: int, epilogue: str
) -> Tensor:
    """The definition, in float64; ``scale`` (N,), ``values`` (K,) as numbers."""
    codes = unpack(packed, bits, (scale.numel(), x.shape[-1]))
    weight = scale.double().unsqueeze(1) * values.double()[codes.long()]
    return EPILOGUES[epilogue](torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double()))


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    x: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, bits: int, epilogue: str
) -> Tensor:
    rows, features = scale.numel(), x.shape[-1]
    work = x.reshape(math.prod(x.shape[:-1]), features).to(values.dtype)
    out = work.new_zeros(work.shape[0], rows)
    step = max(1, CHUNK // max(1, features))
    for top in range(0, rows if out.numel() and features else 0, step):
        bottom = min(top + step, rows)
        codes = unpack_range(packed, bits, rows * features, top * features, bottom * features)
        block = values.index_select(0, codes.int()).view(-1, features)
        torch.mm(work, block.t(), out=out[:, top:bottom])
    out = torch.mul(out, scale) if bias is None else torch.addcmul(bias.to(out.dtype), out, scale)
    return EPILOGUES[epilogue](out).to(x.dtype).view(*x.shape[:-1], rows)


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _kernel(
    x,  # (m, features), contiguous
    packed,
    values,
    scale,
    bias,
    out,  # (m, rows)
    m,
    rows,
    features,
    count,  # rows * features
    scale_stride,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    OPERAND: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One BLOCK_M x BLOCK_N tile of the output; weights are decoded where the product wants them."""
    across = tl.cdiv(rows, BLOCK_N)
    tile = tl.program_id(0).to(tl.int64)
    row_m = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = row_m < m, row_n < rows
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, bound(features), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        in_k = column < features
        inputs = tl.load(x + row_m[:, None] * features + column[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0)
        mask = in_k[:, None] & in_n[None, :]
        codes = load_codes(packed, row_n[None, :] * features + column[:, None], count, mask, BITS)
        units = tl.load(values + codes).to(x.dtype.element_ty)
        total = tl.dot(inputs.to(OPERAND), units.to(OPERAND), total, input_precision="ieee")
    y = total * tl.load(scale + row_n * scale_stride, mask=in_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + row_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif EPILOGUE == "silu":
        y = y * tl.sigmoid(y)
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    tl.store(
        out + row_m[:, None] * rows + row_n[None, :], y.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :]
    )


# --- launcher ---------------------------------------------------------------------------------------------------------

_OPERANDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def choose_blocks(m: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K) that fit the registers; float32 products, outside tensor cores, take more of them."""
    exact = dtype == torch.float32
    height = max(16, min(32 if exact else 64, next_power_of_2(m)))
    return height, 32, 32 if exact or height == 64 else 64


def _launch(
    x: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, bits: int, epilogue: str
) -> Tensor:
    rows, features = scale.numel(), x.shape[-1]
    out = torch.empty(*x.shape[:-1], rows, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    m = out.numel() // rows
    blocks = choose_blocks(m, x.dtype)
    operand = tl.float32 if INTERPRETED else getattr(tl, _OPERANDS[x.dtype])  # numpy has no bfloat16
    grid = (cdiv(m, blocks[0]) * cdiv(rows, blocks[1]),)
    tensors = (
        x.contiguous(),
        packed.contiguous(),
        values.contiguous(),
        scale,
        scale if bias is None else bias.contiguous(),
        out,
    )
    with launching(x):
        _kernel[grid](
            *tensors,
            m,
            rows,
            features,
            rows * features,
            scale.stride(0),
            bias is not None,
            epilogue,
            operand,
            bits,
            *blocks,
        )
    return out


# --- operator ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, bits: int, epilogue: str
) -> Tensor:
    """(..., N) in the dtype of ``x``.

    Args:
        x: (..., K), any floating dtype.
        packed: uint8, the N * K codes of the weight.
        values: (2**bits,) float32 codebook values.
        scale: (N,) float32.
        bias: (N,), any floating dtype, or None.
        bits: width of a code.
        epilogue: a key of `EPILOGUES`.
    """
    return _forward_cpu(x, packed, values, scale, bias, bits, epilogue)


packed_linear.register_kernel("cuda")(_launch)


@packed_linear.register_fake
def _(x, packed, values, scale, bias, bits, epilogue):
    return x.new_empty(*x.shape[:-1], scale.shape[0])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.epilogue = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, packed, values, scale, bias = ctx.saved_tensors
    if ctx.epilogue != "none":
        before = packed_linear(x, packed, values, scale, bias, ctx.bits, "none")
        grad = _EPILOGUE_GRADS[ctx.epilogue](grad, before)
    weight = values[unpack(packed, ctx.bits, (scale.shape[0], x.shape[-1])).int()]
    dx = ((grad.to(values.dtype) * scale) @ weight).to(x.dtype)
    dbias = None if bias is None else grad.to(values.dtype).sum(tuple(range(grad.dim() - 1))).to(bias.dtype)
    return dx, None, None, None, dbias, None, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)
