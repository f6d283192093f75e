"""Linear layer on packed low-bit weights.

Mathematics.  With codes (N, K) of b bits, a codebook c of 2^b values, scales s (N,) and a bias b (N,),

    p[m, n] = s[n] * sum_k x[m, k] c[code[n, k]] + b[n]          y = epilogue(p)

where the epilogue is none, relu, silu, gelu (the exact one), tanh, sigmoid, or glu, which halves the output: the first
half of p's columns times the sigmoid of the second.  The codebook is given as it is deployed: float32, int8 or float8,
whose entry q stands for the value q / 127 or q / 256.  With 8-bit activations, x is quantized per token first
(`gq_triton.kernels.activations`).

The scale leaves the sum, so that the inner product runs on codebook values alone.  The float weight never exists as a
whole: native kernels and GPUs decode into registers, torch on the CPU a few rows at a time into its cache.  NaN in x
gives NaN in its row of y, infinity there infinities or NaN; K = 0 leaves the bias.

Integers.  Where codebook and activations are int8, native kernels sum products of integers, and with t the token's
scale

    p = float(sum_k q[m, k] c[code[n, k]]) * (t[m] * (s[n] / 127)) + b[n]

each operation rounded to float32 by itself: every instruction set gives the same bits.

Gradients.  With d = dL/dp, the epilogue's share done,

    dx = (d * s) @ c[code]     db[n] = sum_m d[m, n]     G = d^T x     ds[n] = sum_k G[n, k] c[code[n, k]]
    dc[i] = sum over (n, k) with code i of s[n] G[n, k]

and the rounding of activations counts as the identity (straight-through).  Rows are decoded a block at a time here too.
Sums run in a fixed order: dc is a product with one-hot codes, not a scatter.

Codes come in any of `gq_triton.kernels.layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.kernels import activations as token_quantizer
from gq_triton.kernels import native
from gq_triton.kernels.backend import cdiv
from gq_triton.kernels.layouts import convert, native_weight
from gq_triton.kernels.packed_linear_triton import launch
from gq_triton.kernels.packing import unpack, unpack_range
from gq_triton.kernels.tables import stored_values

__all__ = ["EPILOGUES", "packed_linear", "prefers_dense", "reference"]


class Epilogue(NamedTuple):
    """A function of the last dimension, and its gradient from (gradient of the result, argument)."""

    apply: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


_aten = torch.ops.aten
EPILOGUES = {
    "none": Epilogue(lambda p: p, lambda grad, p: grad),
    "relu": Epilogue(torch.relu, lambda grad, p: _aten.threshold_backward(grad, p, 0)),
    "silu": Epilogue(torch.nn.functional.silu, _aten.silu_backward),
    "gelu": Epilogue(torch.nn.functional.gelu, _aten.gelu_backward),
    "tanh": Epilogue(torch.tanh, lambda grad, p: _aten.tanh_backward(grad, p.tanh())),
    "sigmoid": Epilogue(torch.sigmoid, lambda grad, p: _aten.sigmoid_backward(grad, p.sigmoid())),
    "glu": Epilogue(torch.nn.functional.glu, lambda grad, p: _aten.glu_backward(grad, p, -1)),
}
CHUNK = {"cpu": 1 << 16, "cuda": 1 << 20}  # weights decoded at a time: what a cache holds, what keeps a GPU busy
# From here on a GPU's 16-bit product waits for arithmetic and no longer for the weight's bytes. On a CPU (AVX-512, one
# thread, weights of 1 and 4 million) a float product is as fast as torch's with the dense copy at 128 to 256 tokens,
# twice as fast at 8 and a tenth slower at 1024; with int8 activations it was two to seven times as fast at any number.
DENSE_TOKENS = 256


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    epilogue: str = "none",
    activations: str = "none",
) -> Tensor:
    """The definition, in float64, differentiable by autograd; arguments as in `packed_linear`."""
    if activations != "none":
        x = x + (token_quantizer.reference(x.float(), activations) - x).detach()
    codes = unpack(packed, bits, (scale.numel(), x.shape[-1]))
    weight = scale.double().unsqueeze(1) * stored_values(codebook).double()[codes.long()]
    bias = None if bias is None else bias.double()
    return EPILOGUES[epilogue].apply(torch.nn.functional.linear(x.double(), weight, bias))


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    epilogue: str,
    activations: str,
    layout: str,
) -> Tensor:
    product = _native_product if native.available() else _torch_product
    out = product(x, packed, codebook, scale, bias, bits, activations, layout)
    return EPILOGUES[epilogue].apply(out).to(x.dtype)


def _native_product(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    activations: str,
    layout: str,
) -> Tensor:
    rows, columns = len(scale), x.shape[-1]
    weight = native_weight(packed, codebook, scale, layout, bits, rows, columns)
    out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    native.linear(x.float().contiguous(), weight, bias, out, activations, torch.get_num_threads())
    return out


def _torch_product(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    activations: str,
    layout: str,
) -> Tensor:
    tokens, values = _tokens(x, activations).float(), stored_values(codebook)
    rows, columns = len(scale), tokens.shape[1]
    planes, out = convert(packed, codebook, layout, "planes", bits, rows, columns), tokens.new_zeros(len(tokens), rows)
    for part, codes in _blocks(planes, bits, rows, columns) if len(tokens) else ():
        torch.mm(tokens, _look_up(values, codes).t(), out=out[:, part])
    result = tokens.new_empty(*x.shape[:-1], rows)  # no view, as users may change an operator's output in place
    matrix = result.view(len(tokens), rows)
    torch.mul(out, scale, out=matrix) if bias is None else torch.addcmul(bias.float(), out, scale, out=matrix)
    return result


def _tokens(x: Tensor, activations: str) -> Tensor:
    """``x`` as a matrix, as the product sees it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if activations == "none" else token_quantizer.quantize_activations(x, activations)


def _blocks(planes: Tensor, bits: int, rows: int, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the weight, some at a time: which, and their codes (n, columns)."""
    step = max(1, CHUNK[planes.device.type] // max(1, columns))
    for top in range(0, rows if columns else 0, step):
        bottom = min(top + step, rows)
        codes = unpack_range(planes, bits, rows * columns, top * columns, bottom * columns)
        yield slice(top, bottom), codes.view(-1, columns)


def _look_up(values: Tensor, codes: Tensor) -> Tensor:
    return values.index_select(0, codes.view(-1).int()).view(codes.shape)


# --- operator ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_linear", mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    epilogue: str,
    activations: str,
    layout: str,
) -> Tensor:
    """(..., N), or (..., N / 2) after glu, in the dtype of ``x``.

    Args:
        x: (..., K), float32, bfloat16 or float16; sums are taken in float32.
        packed: uint8, the N * K codes of the weight, in ``layout``.
        codebook: (2**bits,), float32, int8 or float8_e4m3fn; tensor cores take its entries in the dtype of ``x``.
        scale: (N,) float32.
        bias: (N,), any floating dtype, or None.
        bits: width of a code.
        epilogue: a key of `EPILOGUES`.
        activations: "none", "int8" or "fp8".
        layout: one of `layouts.LAYOUTS`.
    """
    return _forward_cpu(x, packed, codebook, scale, bias, bits, epilogue, activations, layout)


@packed_linear.register_kernel("cuda")
def _(x, packed, codebook, scale, bias, bits, epilogue, activations, layout):
    tiles = convert(packed, codebook, layout, "tiles", bits, scale.numel(), x.shape[-1])
    return launch(x, tiles, codebook, scale, bias, bits, epilogue, activations)


@packed_linear.register_fake
def _(x, packed, codebook, scale, bias, bits, epilogue, activations, layout):
    rows = scale.shape[0]
    return x.new_empty(*x.shape[:-1], rows // 2 if epilogue == "glu" else rows)


def prefers_dense(tokens: int, activations: str, device: torch.device) -> bool:
    """Whether a product with a dense copy of the weight is taken to be faster than one with the packed weight.

    It is where arithmetic and not memory is the limit, unless that is done on bytes.  Torch on the CPU computes with
    floats in either case, and a copy always saves it the decoding.
    """
    torch_only = device.type == "cpu" and not native.available()
    return torch_only or (activations == "none" and tokens >= DENSE_TOKENS)


# --- gradients --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_linear_backward", mutates_args=())
def packed_linear_backward(
    grad: Tensor,
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    epilogue: str,
    activations: str,
    layout: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, codebook, scale and bias, those that are ``wanted``, given that of the output.

    The other arguments are those of `packed_linear`. An operator of its own, so that a compiled graph has one node in
    place of a loop over the weight's rows; it has no derivative.
    """
    if epilogue != "none":
        before = packed_linear(x, packed, codebook, scale, bias, bits, "none", activations, layout)
        grad = EPILOGUES[epilogue].gradient(grad.float(), before.float())
    grad = _operand(grad.reshape(math.prod(x.shape[:-1]), len(scale)), x)
    tokens = _operand(_tokens(x, activations), x)
    planes = convert(packed, codebook, layout, "planes", bits, len(scale), x.shape[-1])
    weight = planes, stored_values(codebook), scale, bits
    gradients = (
        lambda: _input_gradient(grad, tokens, *weight).view(x.shape).to(x.dtype, copy=True),
        lambda: _codebook_gradient(grad, tokens, *weight),
        lambda: _scale_gradient(grad, tokens, *weight),
        lambda: grad.sum(0, dtype=torch.float32).to(bias.dtype),
    )
    return [gradient() for gradient, want in zip(gradients, wanted, strict=True) if want]


@packed_linear_backward.register_fake
def _(grad, x, packed, codebook, scale, bias, bits, epilogue, activations, layout, wanted):
    tensors = x, codebook, scale, bias
    return [tensor.new_empty(tensor.shape) for tensor, want in zip(tensors, wanted, strict=True) if want]


def _operand(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix in the dtype that products with ``x`` are taken in: its own on a GPU, float32 on the CPU."""
    return matrix.to(x.dtype if x.is_cuda else torch.float32)


def _input_gradient(grad: Tensor, tokens: Tensor, planes: Tensor, values: Tensor, scale: Tensor, bits: int) -> Tensor:
    total = tokens.new_zeros(tokens.shape, dtype=torch.float32)  # contiguous, unlike `tokens` perhaps
    for part, codes in _blocks(planes, bits, grad.shape[1], tokens.shape[1]):
        weight = scale[part, None] * _look_up(values, codes)
        total += grad[:, part] @ weight.to(grad.dtype)
    return total


def _codebook_gradient(
    grad: Tensor, tokens: Tensor, planes: Tensor, values: Tensor, scale: Tensor, bits: int
) -> Tensor:
    total = torch.zeros_like(values)
    for part, codes in _blocks(planes, bits, grad.shape[1], tokens.shape[1]):
        product = (grad[:, part].t() @ tokens).float()
        total += _sums_by_code(product * scale[part, None], codes, len(values))
    return total


def _scale_gradient(grad: Tensor, tokens: Tensor, planes: Tensor, values: Tensor, scale: Tensor, bits: int) -> Tensor:
    total = torch.zeros(len(scale), dtype=torch.float32, device=scale.device)
    for part, codes in _blocks(planes, bits, grad.shape[1], tokens.shape[1]):
        product = (grad[:, part].t() @ tokens).float()
        total[part] = (product * _look_up(values, codes)).sum(1)
    return total


def _sums_by_code(terms: Tensor, codes: Tensor, levels: int) -> Tensor:
    """The sum of ``terms`` for each code: a product of one-hot digits to base 16, whose order of summation is fixed."""
    codes, digit = codes.view(-1, 1), torch.arange(16, device=codes.device)
    low = (codes % 16 == digit[:levels]) * terms.view(-1, 1)
    high = (codes // 16 == digit[: cdiv(levels, 16)]).to(terms.dtype)
    return (high.t() @ low).view(levels)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.epilogue, ctx.activations, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    needs_x, _, *needs_weight = ctx.needs_input_grad[:5]
    wanted = [needs_x, *needs_weight]
    options = ctx.bits, ctx.epilogue, ctx.activations, ctx.layout
    found = iter(packed_linear_backward(grad, *ctx.saved_tensors, *options, wanted))
    dx, dcodebook, dscale, dbias = (next(found) if want else None for want in wanted)
    return dx, None, dcodebook, dscale, dbias, None, None, None, None


packed_linear.register_autograd(_backward, setup_context=_setup_context)
