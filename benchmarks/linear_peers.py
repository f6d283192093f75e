"""Other linear layers on quantized weights, as peers in time and error; none has a bias.

Each function quantizes a float32 weight (N, K) and returns a :class:`Layer`, or raises Unavailable. Weights are rounded
as each peer's own users round them: to the nearest of its levels, in groups of its usual size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from harness import Unavailable, tensor_bytes
from torch import Tensor

INT4_GROUP = 128  # columns that share a scale and a zero point in torch's and gemlite's 4-bit layers
INT4_GROUP_CPU = 64
NF4_BLOCK = 64
LEAST_INT8_TOKENS = 17  # of torch._int_mm on a GPU
GEMLITE_SHAPES = ((2048, 2048), (4096, 4096))  # gemlite ships its configurations for them; any other it tunes for long


class Layer(NamedTuple):
    """A layer on a quantized weight.

    Attributes:
        forward: maps (M, K) to (M, N).
        weight_bytes: what it reads of the weight, scales included.
        prepare: makes the argument of ``forward``, beforehand, of float activations.
    """

    forward: Callable[[Tensor], Tensor]
    weight_bytes: int
    prepare: Callable[[Tensor], Tensor] = lambda x: x


# --- torch, 8 bits ----------------------------------------------------------------------------------------------------


def torch_int8(weight: Tensor, dtype: torch.dtype) -> Layer:
    """8-bit weights, one scale per output, and 8-bit activations, one scale per token (on a CPU: one for all tokens).

    On a CPU torch's dynamically quantized layer; on a GPU, where torch has the product alone, plain torch around it.
    """
    if weight.device.type == "cpu":
        return _dynamic_int8(weight, dtype)
    units, scale = _int8(weight)
    scale = scale.squeeze(1)

    def forward(x: Tensor) -> Tensor:
        tokens, token_scale = _int8(x)
        return (_int8_product(tokens, units) * token_scale * scale).to(x.dtype)

    return Layer(forward, tensor_bytes(units) + tensor_bytes(scale))


def torch_int8_product(weight: Tensor, dtype: torch.dtype) -> Layer:
    """The product alone of :func:`torch_int8`, on a GPU: tokens are quantized beforehand, scales left out."""
    if weight.device.type == "cpu":
        raise Unavailable("torch's dynamically quantized layer is one operation")
    units, _ = _int8(weight)
    return Layer(lambda tokens: _int8_product(tokens, units), tensor_bytes(units), lambda x: _int8(x)[0])


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 8 bits, and a scale for each row (rows, 1)."""
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return (x / scale).round().to(torch.int8), scale


def _int8_product(tokens: Tensor, units: Tensor) -> Tensor:
    """(M, N) int32, padded for the sake of torch._int_mm where there are too few tokens."""
    missing = LEAST_INT8_TOKENS - len(tokens)
    if missing <= 0:
        return torch._int_mm(tokens, units.t())
    return torch._int_mm(torch.nn.functional.pad(tokens, (0, 0, 0, missing)), units.t())[: len(tokens)]


def _dynamic_int8(weight: Tensor, dtype: torch.dtype) -> Layer:
    if dtype != torch.float32:
        raise Unavailable("torch's dynamically quantized layer takes float32")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but what torch has
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        model = quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear: per_channel_dynamic_qconfig})
    return Layer(model[0], weight.numel() + 4 * len(weight))


# --- 4 bits -----------------------------------------------------------------------------------------------------------


def torch_int4(weight: Tensor, dtype: torch.dtype) -> Layer:
    """torch's own 4-bit product, on which torchao's weight-only int4 layers run: integers, a scale and a zero point for
    each group of columns."""
    if dtype != torch.bfloat16:
        raise Unavailable("torch's 4-bit product is made for bfloat16")
    on_cpu = weight.device.type == "cpu"
    group = INT4_GROUP_CPU if on_cpu else INT4_GROUP
    codes, scale, zero = _int4(weight, group)
    middle = zero + 8 * scale
    grids = torch.stack([scale, middle], 2).transpose(0, 1).contiguous().to(torch.bfloat16)  # (groups, N, 2)
    ops = torch.ops.aten
    if on_cpu:
        packed = ops._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        product = ops._weight_int4pack_mm_for_cpu
    else:
        packed = ops._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        product = ops._weight_int4pack_mm
    forward = partial(product, mat2=packed, qGroupSize=group, qScaleAndZeros=grids)
    return Layer(forward, codes.numel() // 2 + tensor_bytes(grids))


def gemlite_int4(weight: Tensor, dtype: torch.dtype) -> Layer:
    """gemlite's Triton kernels on the same integers, in the configurations that it ships."""
    if weight.device.type == "cpu":
        raise Unavailable("gemlite runs on a GPU")
    if tuple(weight.shape) not in GEMLITE_SHAPES:
        raise Unavailable("gemlite ships no configuration for this shape, and would tune itself for minutes")
    try:
        from gemlite.helper import A16W4_HQQ_INT
    except ImportError as error:
        raise Unavailable(f"gemlite does not import: {error}") from error
    codes, scale, zero = _int4(weight, INT4_GROUP)
    layer = A16W4_HQQ_INT(device=weight.device, dtype=dtype).from_weights(codes, scale, -zero / scale)
    return Layer(layer, codes.numel() // 2 + 2 * 2 * scale.numel())


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 (N, K) uint8, scale and least value (N, groups) of every group of columns."""
    rows, columns = weight.shape
    if columns % group:
        raise Unavailable(f"it needs columns in whole groups of {group}, and there are {columns}")
    groups = weight.view(rows, -1, group)
    low, high = groups.amin(2), groups.amax(2)
    scale = (high - low) / 15
    codes = ((groups - low.unsqueeze(2)) / scale.unsqueeze(2)).round().clamp(0, 15)
    return codes.to(torch.uint8).view(rows, columns), scale, low


def nf4(weight: Tensor, dtype: torch.dtype) -> Layer:
    """bitsandbytes' NormalFloat: the 16 levels of its codebook, a scale for every block of weights."""
    try:
        import bitsandbytes
        from bitsandbytes.functional import quantize_4bit
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"bitsandbytes does not import: {error}") from error
    if weight.shape[1] % NF4_BLOCK:
        raise Unavailable(f"its product errs where blocks of {NF4_BLOCK} weights straddle two rows")
    codes, state = quantize_4bit(weight.to(dtype), blocksize=NF4_BLOCK, quant_type="nf4")

    def forward(x: Tensor) -> Tensor:
        return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

    return Layer(forward, tensor_bytes(codes) + tensor_bytes(state.absmax))
