"""LSTM and GRU layers on packed low-bit weights: one layer, one direction, a whole sequence or one step of it.

Mathematics.  With W = s[row] c[code[row, column]] (as in `gq_triton.kernels.packed_linear`), bias vectors b and b',
and gates in the order that torch keeps them,

    LSTM    [i f g o] = W_ih x + b + W_hh h + b'                     c' = sigmoid(f) c + sigmoid(i) tanh(g)
            h' = W_hr m  or, without a projection,  h' = m           m  = sigmoid(o) tanh(c')

    GRU     [r z n]  = W_ih x + b      [r' z' n'] = W_hh h + b'      h' = (1 - Z) N + Z h
            R = sigmoid(r + r')        Z = sigmoid(z + z')           N  = tanh(n + R n')

Sequences of different lengths are given as torch's PackedSequence has them: sorted by length, the rows of a time step
together, `batch_sizes` of them.  Between the steps of a call c is kept in float32, and h too but on a GPU, where it has
the dtype of x.

8-bit activations are a choice for each weight: what it multiplies, which is x, h or m, is quantized per token first
(`gq_triton.kernels.activations`), h and m anew at every step.  Z h stands for the h that was not.  Gradients pass
straight through the rounding.

CPU: native kernels run, on integers where codebook and activations are int8 (`gq_triton.kernels.packed_linear`).
Without them the weights are decoded once per call and torch's own kernel runs or, where something is quantized that it
would hide, a loop over the steps.  Gradients, on any device, come from there too.

GPU: the products with W_ih of all steps are one packed linear layer; what is left of a step is one launch, in which a
program computes all gates of 16 units, and the state with them, for some tokens; a projection is a second launch, and
the quantization of what either multiplies another one before it.  A step that is a whole call, as in streaming, does
the product with W_ih in that launch as well.  No launch depends on anything but shapes and `batch_sizes`, so CUDA
graphs may capture a call.  Bytes per step: the codes of W_hh and W_hr.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import _VF, Tensor
from torch.nn.functional import pad

from gq_triton.kernels import native
from gq_triton.kernels import packed_linear_triton as linear
from gq_triton.kernels.activations import quantize_activations
from gq_triton.kernels.backend import cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.decode import multiply
from gq_triton.kernels.layouts import codes_of, convert, native_weight
from gq_triton.kernels.packed_linear_triton import sigmoid, tanh
from gq_triton.kernels.tables import as_stored, stored_values
from gq_triton.kernels.tiles import ROW_BLOCK, as_words, step_columns

__all__ = ["decode_weights", "packed_recurrent", "recurrent", "reference", "weight_shapes"]


def weight_shapes(input_size: int, states: list[Tensor]) -> list[tuple[int, int, int]]:
    """(rows, columns, groups of rows) of weight_ih, weight_hh and weight_hr, whether or not there is the latter."""
    size, hidden = states[0].shape[-1], states[-1].shape[-1]
    gates = 4 if len(states) == 2 else 3
    return [(gates * hidden, input_size, gates), (gates * hidden, size, gates), (size, hidden, 1)]


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    reverse: bool,
    activations: list[str],
) -> list[Tensor]:
    """The definition, in float64, on float weights; arguments and result as of `recurrent`."""
    states, weights, biases = ([tensor.double() for tensor in part] for part in (states, weights, biases))
    return _stepwise(x.double(), batch_sizes, states, weights, biases, reverse, activations)


def _stepwise(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    reverse: bool,
    activations: list[str],
) -> list[Tensor]:
    """The definition, in the one dtype of its arguments, differentiable."""
    steps = x.unbind() if batch_sizes is None else x.split(batch_sizes.tolist())
    outputs = []
    for step in steps[::-1] if reverse else steps:
        new = _step([state[: len(step)] for state in states], step, weights, biases, activations)
        states = [torch.cat([state, old[len(step) :]]) for state, old in zip(new, states, strict=True)]
        outputs.append(new[0])
    outputs = outputs[::-1] if reverse else outputs
    return [torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), *states]


def _step(
    states: list[Tensor], x: Tensor, weights: list[Tensor], biases: list[Tensor], activations: list[str]
) -> list[Tensor]:
    bias_ih, bias_hh = biases or (0, 0)
    inputs = _quantized(x, activations[0]) @ weights[0].T + bias_ih
    hidden = _quantized(states[0], activations[1]) @ weights[1].T + bias_hh
    if len(states) == 1:
        (r, z, n), (r_hidden, z_hidden, n_hidden) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        r, z = torch.sigmoid(r + r_hidden), torch.sigmoid(z + z_hidden)
        return [(1 - z) * torch.tanh(n + r * n_hidden) + z * states[0]]
    i, f, g, o = (inputs + hidden).chunk(4, -1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    m = torch.sigmoid(o) * torch.tanh(c)
    return [_quantized(m, activations[2]) @ weights[2].T if len(weights) == 3 else m, c]


def _quantized(x: Tensor, kind: str) -> Tensor:
    """What products see of ``x``: float64, too, is quantized as the float32 numbers that kernels have."""
    if kind == "none":
        return x
    return quantize_activations(x.float() if x.dtype == torch.float64 else x, kind).to(x.dtype)


# --- decoded weights and torch's kernel -------------------------------------------------------------------------------


def decode_weights(
    x: Tensor, states: list[Tensor], weights: list[Tensor], bits: list[int], layout: str
) -> list[Tensor]:
    """The float32 weights; arguments as of `packed_recurrent`, differentiable in scales and float codebooks."""
    packed = zip(weights[::3], weights[1::3], weights[2::3], bits, weight_shapes(x.shape[-1], states), strict=False)
    return [_decode(*arguments, layout) for arguments in packed]


def _decode(
    codes: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: tuple[int, int, int], layout: str
) -> Tensor:
    codes = codes_of(codes, codebook, layout, bits, *shape)
    return scale.unsqueeze(1) * stored_values(codebook)[codes.int()]


def recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    reverse: bool,
    activations: list[str],
) -> list[Tensor]:
    """One layer in one direction on float weights, differentiable: `packed_recurrent` by torch's own kernel or, where
    something is quantized, a step at a time.

    ``weights`` are weight_ih, weight_hh and, with a projection, weight_hr; the rest is as there.
    """
    if any(kind != "none" for kind in activations):
        wide = torch.promote_types(x.dtype, torch.float32)
        states, weights, biases = ([tensor.to(wide) for tensor in part] for part in (states, weights, biases))
        results = _stepwise(x.to(wide), batch_sizes, states, weights, biases, reverse, activations)
        return [result.to(x.dtype) for result in results]
    kernel = _VF.lstm if len(states) == 2 else _VF.gru
    states, (ih, hh, *hr), biases = ([t.to(x.dtype) for t in part] for part in (states, weights, biases))
    first = [state.unsqueeze(0) for state in states]
    options = bool(biases), 1, 0.0, torch.is_grad_enabled(), False  # cuDNN keeps what gradients need if in training
    shared = first if len(states) == 2 else first[0], [ih, hh, *biases, *hr], *options
    if batch_sizes is None:
        output, *last = kernel(x.flip(0) if reverse else x, *shared, False)
        output = output.flip(0) if reverse else output
    else:
        order = _mirror(batch_sizes).to(x.device) if reverse else None
        output, *last = kernel(x if order is None else x[order], batch_sizes, *shared)
        output = output if order is None else output[order]
    return [output, *(state.reshape(start.shape) for state, start in zip(last, states, strict=True))]


def _mirror(batch_sizes: Tensor) -> Tensor:
    """(N,) int64: for each row of a packed sequence, the one that takes its place when time runs backwards."""
    steps, top = len(batch_sizes), int(batch_sizes[0])
    start = batch_sizes.cumsum(0) - batch_sizes
    time = torch.repeat_interleave(torch.arange(steps), batch_sizes)
    token = torch.arange(len(time)) - start[time]
    lengths = (batch_sizes > torch.arange(top).unsqueeze(1)).sum(1)
    return start[lengths[token] - 1 - time] + token


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    bits: list[int],
    activations: list[str],
    biases: list[Tensor],
    reverse: bool,
    layout: str,
) -> list[Tensor]:
    if native.available():
        return _forward_native(x, batch_sizes, states, weights, bits, activations, biases, reverse, layout)
    decoded = decode_weights(x, states, weights, bits, layout)
    with torch.autocast("cpu", enabled=False):
        return recurrent(x, batch_sizes, states, decoded, biases, reverse, activations)


def _forward_native(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    bits: list[int],
    activations: list[str],
    biases: list[Tensor],
    reverse: bool,
    layout: str,
) -> list[Tensor]:
    found = []
    for index, (width, shape) in enumerate(zip(bits, weight_shapes(x.shape[-1], states), strict=False)):
        codes, codebook, scale = weights[3 * index : 3 * index + 3]
        found.append(native_weight(codes, codebook, scale, layout, width, *shape))
    (steps, *states), biases = ([t.float().contiguous() for t in part] for part in ((x, *states), biases))
    out = torch.empty(*x.shape[:-1], states[0].shape[1], dtype=torch.float32)
    last = [torch.empty_like(state) for state in states]
    segments = native.Segments(_segments(_step_sizes(x, batch_sizes), reverse))
    layer = native.Recurrent(found, biases, activations, torch.get_num_threads())
    layer(steps.view(-1, x.shape[-1]), segments, states, out, last)
    return [result.to(x.dtype) for result in (out, *last)]


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _product(
    x,
    first,
    tokens,
    columns,
    tiles,
    block,
    blocks,
    codebook,
    scale,
    row,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    WAY: tl.constexpr,
    UNIT: tl.constexpr,
    OPERAND: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    WN: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
):
    """Products (16 WN, 8 MB) of a weight's row blocks ``block`` (WN,) with tokens from ``first`` on, by WK warps to a
    block; ``row`` (16 WN,) are the places of their scales, negative for padding."""
    y = multiply(
        x,
        first,
        tokens,
        columns,
        tiles,
        block,
        blocks,
        codebook,
        BITS,
        FORM,
        OPERAND,
        WAY,
        ASM,
        PRECISION,
        EXACT,
        1,
        WN,
        WK,
        MB,
    )
    return tl.reshape(y, (16 * WN, 8 * MB)) * (tl.load(scale + row, mask=row >= 0, other=0.0) * UNIT)[:, None]


@jit
def _by_gate(y, MB: tl.constexpr):
    """(64, 8 MB) as four of (16, 8 MB)."""
    even, odd = tl.split(tl.permute(tl.reshape(y, (2, 2, 16, 8 * MB)), (2, 3, 0, 1)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@jit(do_not_specialize=["x_row", "h_row", "carry_row", "out_row", "token", "batch"])
def _step_kernel(
    x,  # (N, columns), contiguous, if FUSED; else their products with weight_ih, (N, GATES * 16 * row blocks of a gate)
    h,  # (..., size), as the product sees it
    carry,  # (..., hidden): h as it is, of a GRU
    c,  # (B, hidden), of an LSTM
    out,  # (..., hidden): h', or what is to be projected to it
    last,  # (B, hidden): h' again, if not PROJECTED
    next_c,  # (B, hidden), may be c
    bias_ih,
    bias_hh,
    tiles_ih,
    codebook_ih,
    scale_ih,
    tiles_hh,
    codebook_hh,
    scale_hh,
    x_row,  # the rows of the first token
    h_row,
    carry_row,
    out_row,
    token,  # its number: the row of c and of last
    batch,  # number of tokens
    columns,
    size,
    hidden,
    scale_ih_stride,
    scale_hh_stride,
    GATES: tl.constexpr,
    FUSED: tl.constexpr,
    PROJECTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS_IH: tl.constexpr,
    FORM_IH: tl.constexpr,
    WAY_IH: tl.constexpr,
    UNIT_IH: tl.constexpr,
    BITS_HH: tl.constexpr,
    FORM_HH: tl.constexpr,
    WAY_HH: tl.constexpr,
    UNIT_HH: tl.constexpr,
    OPERAND: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
):
    """One step for 16 units and 8 MB tokens, by WK warps for each of four gates; the fourth of a GRU is padding."""
    across = tl.cdiv(hidden, 16)
    begin, first = tl.program_id(0) * 16, tl.program_id(1) * (8 * MB)
    block = tl.arange(0, 4) * across + tl.program_id(0)
    unit, gate = begin + tl.arange(0, 64) % 16, tl.arange(0, 64) // 16
    row = tl.where((unit < hidden) & (gate < GATES), gate * hidden + unit, -1)
    own = first + tl.arange(0, 8 * MB)
    h += h_row.to(tl.int64) * size
    y_h = _product(
        h,
        first,
        batch,
        size,
        tiles_hh,
        block,
        GATES * across,
        codebook_hh,
        scale_hh,
        tl.where(row < 0, -1, row * scale_hh_stride),
        BITS_HH,
        FORM_HH,
        WAY_HH,
        UNIT_HH,
        OPERAND,
        ASM,
        PRECISION,
        EXACT,
        4,
        WK,
        MB,
    )
    if FUSED:
        y_x = _product(
            x,
            first,
            batch,
            columns,
            tiles_ih,
            block,
            GATES * across,
            codebook_ih,
            scale_ih,
            tl.where(row < 0, -1, row * scale_ih_stride),
            BITS_IH,
            FORM_IH,
            WAY_IH,
            UNIT_IH,
            OPERAND,
            ASM,
            PRECISION,
            EXACT,
            4,
            WK,
            MB,
        )
    else:
        at = (x_row + own).to(tl.int64)[None, :] * (GATES * 16 * across) + (gate * 16 * across + unit)[:, None]
        y_x = tl.load(x + at, mask=(row >= 0)[:, None] & (own < batch)[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        y_x += tl.load(bias_ih + row, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        y_h += tl.load(bias_hh + row, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
    unit = begin + tl.arange(0, 16)
    at = own.to(tl.int64)[None, :] * hidden + unit[:, None]
    mask = (unit < hidden)[:, None] & (own < batch)[None, :]
    state = token.to(tl.int64) * hidden + at
    if GATES == 4:
        i, f, g, o = _by_gate(y_x + y_h, MB)
        cell = tl.load(c + state, mask=mask, other=0.0).to(tl.float32)
        cell = sigmoid(f) * cell + sigmoid(i) * tanh(g)
        tl.debug_barrier()  # next_c may be c, of which several lanes load the same number
        tl.store(next_c + state, cell.to(next_c.dtype.element_ty), mask=mask)
        y = sigmoid(o) * tanh(cell)
    else:
        r, z, n, _ = _by_gate(y_x, MB)
        r_h, z_h, n_h, _ = _by_gate(y_h, MB)
        z = sigmoid(z + z_h)
        old = tl.load(carry + carry_row.to(tl.int64) * hidden + at, mask=mask, other=0.0).to(tl.float32)
        y = (1.0 - z) * tanh(n + sigmoid(r + r_h) * n_h) + z * old
    y = y.to(out.dtype.element_ty)
    tl.store(out + out_row.to(tl.int64) * hidden + at, y, mask=mask)
    if not PROJECTED:
        tl.store(last + state, y, mask=mask)


@jit(do_not_specialize=["m_row", "out_row", "token", "batch"])
def _project_kernel(
    m,  # (..., hidden), contiguous
    out,  # (N, size)
    last,  # (B, size)
    tiles,
    codebook,
    scale,
    m_row,  # the rows of the first token
    out_row,
    token,  # its number: the row of last
    batch,
    hidden,
    size,
    scale_stride,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    WAY: tl.constexpr,
    UNIT: tl.constexpr,
    OPERAND: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
):
    """16 outputs of the projection for 8 MB tokens, by WK warps."""
    first = tl.program_id(1) * (8 * MB)
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    y = _product(
        m + m_row.to(tl.int64) * hidden,
        first,
        batch,
        hidden,
        tiles,
        tl.program_id(0) + tl.arange(0, 1),
        tl.cdiv(size, 16),
        codebook,
        scale,
        tl.where(row < size, row * scale_stride, -1),
        BITS,
        FORM,
        WAY,
        UNIT,
        OPERAND,
        ASM,
        PRECISION,
        EXACT,
        1,
        WK,
        MB,
    ).to(out.dtype.element_ty)
    own = first + tl.arange(0, 8 * MB)
    at = own.to(tl.int64)[None, :] * size + row[:, None]
    mask = (row < size)[:, None] & (own < batch)[None, :]
    tl.store(out + out_row.to(tl.int64) * size + at, y, mask=mask)
    tl.store(last + token.to(tl.int64) * size + at, y, mask=mask)


# --- launcher ---------------------------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """A tiled weight as kernels take it, and the compile-time arguments that are its own."""

    tiles: Tensor
    codebook: Tensor
    scale: Tensor
    bits: int
    options: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return as_words(self.tiles), as_stored(self.codebook), self.scale

    def named(self, suffix: str = "") -> dict[str, Any]:
        return {f"{name}{suffix}": self.options[name] for name in ("BITS", "FORM", "WAY", "UNIT")}


def _launch(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    bits: list[int],
    activations: list[str],
    biases: list[Tensor],
    reverse: bool,
    layout: str,
) -> list[Tensor]:
    sizes = _step_sizes(x, batch_sizes)
    states = [state.to(x.dtype).contiguous() for state in states]
    size, hidden, columns = states[0].shape[-1], states[-1].shape[-1], x.shape[-1]
    out, last = x.new_empty(*x.shape[:-1], size), torch.empty_like(states[0])
    fused, projected = len(sizes) == 1, len(bits) == 3
    cell = torch.empty_like(states[-1], dtype=x.dtype if fused else torch.float32)
    if not out.numel():
        return [out, last, cell.to(x.dtype)][: 1 + len(states)]
    ih, hh, *hr = _tiled_weights(x, states, weights, bits, layout)
    x, outputs = x.reshape(-1, columns), out.view(-1, size)
    inputs = _quantized(x, activations[0]).contiguous() if fused else _input_product(x, ih, hidden, activations[0])
    target = torch.empty_like(states[-1]) if projected else outputs
    first_bias, second_bias = [bias.contiguous() for bias in biases] or (inputs, inputs)
    shared = {name: hh.options[name] for name in ("OPERAND", "ASM", "PRECISION", "EXACT")}
    options = shared | ih.named("_IH") | hh.named("_HH")
    options |= {"GATES": 2 + len(states), "FUSED": fused, "PROJECTED": projected, "HAS_BIAS": bool(biases)}
    with launching(x):
        for row, token, count, before in _segments(sizes, reverse):
            carry, carry_row, c = (states[0], token, states[-1]) if before is None else (outputs, before, cell)
            h, h_row = _operand(carry, carry_row, count, activations[1])
            m_row = token if projected else row
            grid, shape = _plan(x, count, hidden, size, bits[1], gates=4)
            _step_kernel[grid](
                *(inputs, h, carry, c, target, last, cell, first_bias, second_bias, *ih.tensors, *hh.tensors),
                *(row, h_row, carry_row, m_row, token, count, columns, size, hidden),
                *(ih.scale.stride(0), hh.scale.stride(0)),
                **options,
                **shape,
            )
            if projected:
                m, m_row = _operand(target, m_row, count, activations[2])
                grid, shape = _plan(x, count, size, hidden, bits[2], gates=1)
                _project_kernel[grid](
                    *(m, out, last, *hr[0].tensors, m_row, row, token, count, hidden, size, hr[0].scale.stride(0)),
                    **shared,
                    **hr[0].named(),
                    **shape,
                )
    return [out, last, cell.to(x.dtype)][: 1 + len(states)]


def _operand(rows: Tensor, first: int, count: int, kind: str) -> tuple[Tensor, int]:
    """What a product sees of ``count`` rows from ``first`` on, and where they begin in it."""
    return (rows, first) if kind == "none" else (quantize_activations(rows[first : first + count], kind), 0)


def _tiled_weights(
    x: Tensor, states: list[Tensor], weights: list[Tensor], bits: list[int], layout: str
) -> list[_Weight]:
    found = []
    for index, (width, shape) in enumerate(zip(bits, weight_shapes(x.shape[-1], states), strict=False)):
        codes, codebook, scale = weights[3 * index : 3 * index + 3]
        options = linear.specialization(width, linear.FORMS[codebook.dtype], linear.OPERANDS[x.dtype])
        tiles = convert(codes, codebook, layout, "tiles", width, *shape)
        found.append(_Weight(tiles, codebook, scale.expand(shape[0]), width, options))
    return found


def _input_product(x: Tensor, ih: _Weight, hidden: int, activations: str) -> Tensor:
    """Products of all steps with weight_ih, each gate padded as its row blocks are."""
    gates = len(ih.scale) // hidden
    scale = pad(ih.scale.view(gates, hidden), (0, -hidden % ROW_BLOCK)).view(-1) if hidden % ROW_BLOCK else ih.scale
    return linear.launch(x, ih.tiles, ih.codebook, scale, None, ih.bits, "none", activations)


def _step_sizes(x: Tensor, batch_sizes: Tensor | None) -> list[int]:
    """How many sequences each step has."""
    return [x.shape[1]] * len(x) if batch_sizes is None else batch_sizes.tolist()


def _segments(sizes: list[int], reverse: bool) -> Iterator[tuple[int, int, int, int | None]]:
    """What launches of a sequence do, in order: from which row of it on, from which token on, how many tokens, and in
    which row the tokens' last state begins, or None where they start."""
    starts = list(accumulate(sizes, initial=0))
    before, known = None, 0
    for step in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        row, count = starts[step], min(known, sizes[step])
        if count:
            yield row, 0, count, before
        if count < sizes[step]:
            yield row + count, count, sizes[step] - count, None
        before, known = row, sizes[step]


def _plan(
    x: Tensor, tokens: int, outputs: int, columns: int, bits: int, gates: int
) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and shape of a launch for so many tokens, outputs and gates.

    As few tokens to a program as leaves none waiting for a multiprocessor; a warp for each step of columns, up to what
    registers there are for what they hold.
    """
    across, mb, wide = cdiv(outputs, ROW_BLOCK), 1, x.dtype == torch.float32
    while not wide and mb < 2 and 8 * mb < tokens and across * cdiv(tokens, 8 * mb) > linear.processors(x.device):
        mb *= 2
    most = 8 if wide else 16
    steps = max(1, cdiv(columns, step_columns(bits)))
    wk = min(most // gates, next_power_of_2(steps))
    return (across, cdiv(tokens, 8 * mb)), {"WK": wk, "MB": mb, "num_warps": gates * wk, "num_stages": 1}


# --- operator ---------------------------------------------------------------------------------------------------------


_SCHEMA = (  # torch infers none with a list of texts
    "(Tensor x, Tensor? batch_sizes, Tensor[] states, Tensor[] weights, int[] bits, str[] activations, "
    "Tensor[] biases, bool reverse, str layout) -> Tensor[]"
)


@torch.library.custom_op("gq_triton::packed_recurrent", mutates_args=(), device_types="cpu", schema=_SCHEMA)
def packed_recurrent(
    x: Tensor,
    batch_sizes: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    bits: list[int],
    activations: list[str],
    biases: list[Tensor],
    reverse: bool,
    layout: str,
) -> list[Tensor]:
    """[output, h, c] of an LSTM, [output, h] of a GRU, in the dtype of ``x``: all hidden states, and the last states.

    Args:
        x: (T, B, K), or (N, K) with ``batch_sizes``, any floating dtype; T > 0.
        batch_sizes: (T,) int64 on the CPU, falling, of sum N; or None.
        states: at first, [h, c] of an LSTM, [h] of a GRU: (B, P) and (B, H), where P = H but for a projection.
        weights: codes (uint8), codebook and scale of weight_ih (G H, K), of weight_hh (G H, P) and, of an LSTM with a
            projection, of weight_hr (P, H), one after the other. G is 4 for an LSTM and 3 for a GRU; a codebook is
            in its deployed dtype (`tables.CODEBOOK_SCALES`), a scale (rows,) or (1,) float32.
        bits: width of a code, of each weight.
        activations: "none", "int8" or "fp8", for each weight: how what it multiplies, x, h or m, is quantized first.
        biases: bias_ih and bias_hh, (G H,), any floating dtype; or none.
        reverse: whether time runs backwards; the output stays in the order of ``x``.
        layout: of the codes, one of `layouts.LAYOUTS`; the gates are groups of it.
    """
    return _forward_cpu(x, batch_sizes, states, weights, bits, activations, biases, reverse, layout)


packed_recurrent.register_kernel("cuda")(_launch)


@packed_recurrent.register_fake
def _(x, batch_sizes, states, weights, bits, activations, biases, reverse, layout):
    return [x.new_empty(*x.shape[:-1], states[0].shape[-1]), *(x.new_empty(state.shape) for state in states)]


def _setup_context(ctx, inputs, output) -> None:
    x, batch_sizes, states, weights, bits, activations, biases, reverse, layout = inputs
    ctx.counts = len(states), len(weights), len(biases)
    ctx.options = bits, activations, reverse, layout
    ctx.save_for_backward(x, batch_sizes, *states, *weights, *biases)


def _backward(ctx, grads):
    x, batch_sizes, *saved = ctx.saved_tensors
    bits, activations, reverse, layout = ctx.options
    needed = [ctx.needs_input_grad[0], *(need for part in (2, 3, 6) for need in ctx.needs_input_grad[part])]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((x, *saved), needed, strict=True)]
        states, weights, biases = _split(leaves[1:], ctx.counts)
        decoded = decode_weights(leaves[0], states, weights, bits, layout)
        outputs = recurrent(leaves[0], batch_sizes, states, decoded, biases, reverse, activations)
        found = iter(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], grads))
    dx, *rest = [next(found) if need else None for need in needed]
    dstates, dweights, dbiases = _split(rest, ctx.counts)
    return dx, None, dstates, dweights, None, None, dbiases, None, None


def _split(flat: list, counts: tuple[int, int, int]) -> tuple[list, list, list]:
    first, second = counts[0], counts[0] + counts[1]
    return flat[:first], flat[first:second], flat[second:]


packed_recurrent.register_autograd(_backward, setup_context=_setup_context)
