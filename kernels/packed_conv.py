"""Depthwise convolution over time on packed low-bit weights.

Mathematics.  With stride r, padding p (of zeros, on either side) and dilation d, C channels, N = m C outputs and
kernels of k taps, whose codes form a matrix (N, k),

    y[b, n, t] = s[n] * sum_j c[code[n, j]] x[b, n div m, r t + d j - p] + bias[n]      0 <= t < T'
    T' = (T + 2 p - d (k - 1) - 1) div r + 1

with sums in float32.  Native CPU kernels, which run where m = 1, and torch decode the weight whole, small as it is
beside the input; a GPU decodes a tap of its channels at a time into registers.  The output is laid out as the input:
where neighbours in memory are channels, as behind a pointwise convolution, they are in the output too; otherwise they
are moments in time.

Gradients are those of the convolution with the decoded weight: of x, bias, s and c.

Bytes that must move: x and y once; the codes are few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.backend import bound, cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.layouts import codes_of, convert, native_weight
from gq_triton.kernels.packing import unpack
from gq_triton.kernels.tables import as_stored, load_values, stored_values
from gq_triton.kernels.tiles import load_tiled

__all__ = ["output_length", "packed_depthwise_conv1d", "reference"]


def output_length(length: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """T', not positive where the input is shorter than the kernel."""
    return (length + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """The definition, in float64, on bit planes."""
    codes = unpack(packed, bits, (scale.numel(), kernel_size))
    weight = scale.double().unsqueeze(1) * stored_values(codebook).double()[codes.long()]
    x = torch.nn.functional.pad(x.double(), (padding, padding)).repeat_interleave(len(weight) // x.shape[1], 1)
    windows = x.unfold(2, dilation * (kernel_size - 1) + 1, stride)[..., ::dilation]
    y = torch.einsum("bntk,nk->bnt", windows, weight)
    return y if bias is None else y + bias.double().unsqueeze(1)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    layout: str,
) -> Tensor:
    convolve = _native if native.available() and x.shape[1] == len(scale) else _torch
    y = convolve(x, packed, codebook, scale, bias, bits, kernel_size, stride, padding, dilation, layout)
    out = _empty(x, y.shape[1], y.shape[2])
    alike = not y._is_view() and (y.dtype, y.stride()) == (out.dtype, out.stride())
    return y if alike else out.copy_(y)


def _torch(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    layout: str,
) -> Tensor:
    weight = scale.view(-1, 1, 1) * stored_values(codebook)[_codes(packed, codebook, scale, bits, kernel_size, layout)]
    bias = None if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False):
        return torch.nn.functional.conv1d(x.float(), weight, bias, stride, padding, dilation, x.shape[1])


def _codes(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, kernel_size: int, layout: str) -> Tensor:
    """The codes (N, 1, k), int32."""
    return codes_of(packed, codebook, layout, bits, len(scale), kernel_size).unsqueeze(1).int()


def _native(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    layout: str,
) -> Tensor:
    weight = native_weight(packed, codebook, scale, layout, bits, len(scale), kernel_size)
    steps = x.movedim(1, 2).float().contiguous()
    length = output_length(x.shape[2], kernel_size, stride, padding, dilation)
    out = _channels_last_empty(steps, len(scale), length)
    bias = None if bias is None else bias.float().contiguous()
    steps_out = out.movedim(1, 2)
    native.depthwise_conv1d(steps, weight, bias, steps_out, stride, padding, dilation, torch.get_num_threads())
    return out


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(2) != 1


def _empty(x: Tensor, rows: int, length: int) -> Tensor:
    """An output (B, rows, length) laid out as ``x``."""
    if _channels_last(x):
        return _channels_last_empty(x, rows, length)
    return x.new_empty(x.shape[0], rows, length)


def _channels_last_empty(x: Tensor, rows: int, length: int) -> Tensor:
    """An output in which channels are neighbours in memory; no view, as users may change it in place."""
    return x.new_empty_strided((x.shape[0], rows, length), (rows * length, 1, rows))


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _units(codebook, codes):
    """As `load_values`, but 127 times as much of an int8 codebook: one division at the end replaces one of each tap."""
    if codebook.dtype.element_ty == tl.int8:
        return tl.load(codebook + codes).to(tl.float32)
    return load_values(codebook, codes)


@jit
def _kernel(
    x,  # (batch, rows / multiplier, length), any stride
    tiles,
    codebook,
    scale,
    bias,
    out,  # (batch, rows, out_length), any stride
    rows,
    length,
    out_length,
    multiplier,
    kernel_size,
    stride,
    padding,
    dilation,
    x_batch_stride,
    x_channel_stride,
    x_time_stride,
    out_batch_stride,
    out_channel_stride,
    out_time_stride,
    scale_stride,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TIMES: tl.constexpr,
):
    """CHANNELS x TIMES outputs of one sequence."""
    across, down = tl.cdiv(out_length, TIMES), tl.cdiv(rows, CHANNELS)
    program = tl.program_id(0)
    time = program % across * TIMES + tl.arange(0, TIMES)
    row = (program // across % down * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    batch = (program // across // down).to(tl.int64)
    in_rows, in_times = (row < rows)[:, None], (time < out_length)[None, :]
    first = time * stride - padding
    source = x + batch * x_batch_stride + (row // multiplier * x_channel_stride)[:, None]
    source += (first.to(tl.int64) * x_time_stride)[None, :]
    blocks, column = tl.cdiv(rows, 16), tl.zeros((CHANNELS,), tl.int32)
    total = tl.zeros((CHANNELS, TIMES), tl.float32)
    for tap in tl.range(0, bound(kernel_size), loop_unroll_factor=4):  # whose loads overlap
        codes = load_tiled(tiles, row, column + tap, blocks, kernel_size, row < rows, BITS)
        moment = (first + tap * dilation)[None, :]
        mask = in_rows & in_times & (moment >= 0) & (moment < length)
        values = tl.load(source + tap * dilation * x_time_stride, mask=mask, other=0.0).to(tl.float32)
        total += _units(codebook, codes)[:, None] * values
    factor = tl.load(scale + row * scale_stride, mask=row < rows, other=0.0)
    if codebook.dtype.element_ty == tl.int8:
        factor /= 127.0
    y = total * factor[:, None]
    if HAS_BIAS:
        y += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    target = out + batch * out_batch_stride + (row * out_channel_stride)[:, None]
    target += (time.to(tl.int64) * out_time_stride)[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=in_rows & in_times)


# --- launcher ---------------------------------------------------------------------------------------------------------


def choose_tile(rows: int, length: int, channels_last: bool) -> tuple[int, int]:
    """(channels, moments) of a program: enough neighbours in memory for a warp or more, and several moments for each
    lane, which share its decoded taps."""
    times = min(32 if channels_last else 256, next_power_of_2(length))
    return min(64, 1024 // times, next_power_of_2(rows)), times


def _launch(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    layout: str,
) -> Tensor:
    rows, length = scale.numel(), output_length(x.shape[2], kernel_size, stride, padding, dilation)
    out = _empty(x, rows, length)
    if not out.numel():
        return out
    tiles = convert(packed, codebook, layout, "tiles", bits, rows, kernel_size)
    tensors = x, tiles.contiguous(), as_stored(codebook), scale, scale if bias is None else bias.contiguous(), out
    sizes = rows, x.shape[2], length, rows // x.shape[1], kernel_size, stride, padding, dilation
    channels, times = choose_tile(rows, length, _channels_last(x))
    grid = (x.shape[0] * cdiv(rows, channels) * cdiv(length, times),)
    strides = *x.stride(), *out.stride(), scale.stride(0)
    with launching(x):
        _kernel[grid](*tensors, *sizes, *strides, bias is not None, bits, channels, times)
    return out


# --- operator ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_depthwise_conv1d", mutates_args=(), device_types="cpu")
def packed_depthwise_conv1d(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    layout: str,
) -> Tensor:
    """(B, N, T') in the dtype and layout of ``x``.

    Args:
        x: (B, C, T), float32, bfloat16 or float16; N is a multiple of C.
        packed: uint8, the N * kernel_size codes of the weight, in ``layout``.
        codebook: (2**bits,), float32, int8 or float8_e4m3fn.
        scale: (N,) float32.
        bias: (N,), any floating dtype, or None.
        bits: width of a code.
        kernel_size, stride, padding, dilation: as of ``torch.nn.Conv1d``.
        layout: one of `layouts.LAYOUTS`.
    """
    return _forward_cpu(x, packed, codebook, scale, bias, bits, kernel_size, stride, padding, dilation, layout)


packed_depthwise_conv1d.register_kernel("cuda")(_launch)


@packed_depthwise_conv1d.register_fake
def _(x, packed, codebook, scale, bias, bits, kernel_size, stride, padding, dilation, layout):
    return _empty(x, scale.shape[0], output_length(x.shape[2], kernel_size, stride, padding, dilation))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.bits, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.layout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x, packed, codebook, scale, bias = ctx.saved_tensors
    needs_x, _, needs_codebook, needs_scale, needs_bias, *_ = ctx.needs_input_grad
    codes = _codes(packed, codebook, scale, ctx.bits, ctx.kernel_size, ctx.layout)
    values, column = stored_values(codebook), scale.view(-1, 1, 1)
    units = values[codes]
    work = grad.float(), x.float(), column * units, [len(scale)]
    options = [ctx.stride], [ctx.padding], [ctx.dilation], False, [0], x.shape[1]
    wanted = [needs_x, needs_codebook or needs_scale, needs_bias]
    dx, dweight, dbias = torch.ops.aten.convolution_backward(*work, *options, wanted)
    dx = dx.to(x.dtype) if needs_x else None
    dbias = dbias.to(bias.dtype) if needs_bias else None
    dscale = (dweight * units).sum((1, 2)) if needs_scale else None
    dcodebook = None
    if needs_codebook:
        dcodebook = torch.zeros_like(values).index_put((codes,), dweight * column, accumulate=True)
    return dx, None, dcodebook, dscale, dbias, *[None] * 6


packed_depthwise_conv1d.register_autograd(_backward, setup_context=_setup_context)
