"""Embedding look-up in a packed low-bit table.

Mathematics.  out[i, d] = s[index[i]] * c[code[index[i], d]], one float32 product; a subnormal s counts as 0.  Only the
rows asked for are decoded, out of the layout that the device reads (`gq_triton.kernels.layouts`).  Asked for every row,
this decodes a whole weight.

Bytes that must move: the indices and the codes asked for once, the output once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.backend import cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.layouts import convert, native_weight
from gq_triton.kernels.packing import unpack, unpack_at
from gq_triton.kernels.tables import as_stored, load_values, stored_values
from gq_triton.kernels.tiles import ROW_BLOCK, load_tiled, row_blocks

__all__ = ["packed_embedding", "reference"]


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    indices: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, embedding_dim: int
) -> Tensor:
    """The definition, on bit planes."""
    codes = unpack(packed, bits, (scale.numel(), embedding_dim))
    return (_flushed(scale).unsqueeze(1) * stored_values(codebook)[codes.long()])[indices]


def _flushed(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < torch.finfo(scale.dtype).tiny, 0.0, scale)


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    layout: str,
    groups: int,
) -> Tensor:
    rows = scale.numel()
    if indices.numel() and not 0 <= indices.min() <= indices.max() < rows:
        low, high = indices.min().item(), indices.max().item()
        raise IndexError(f"indices must lie in [0, {rows}), got values from {low} to {high}")
    look_up = _native_rows if native.available() else _torch_rows
    return look_up(indices, packed, codebook, scale, bits, embedding_dim, layout, groups)


def _native_rows(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    layout: str,
    groups: int,
) -> Tensor:
    weight = native_weight(packed, codebook, scale, layout, bits, len(scale), embedding_dim, groups)
    out = torch.empty(*indices.shape, embedding_dim, dtype=torch.float32)
    native.decode_rows(indices.long().contiguous(), weight, out)
    return out


def _torch_rows(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    layout: str,
    groups: int,
) -> Tensor:
    planes = convert(packed, codebook, layout, "planes", bits, len(scale), embedding_dim, groups)
    position = indices.unsqueeze(-1).long() * embedding_dim + torch.arange(embedding_dim)
    codes = unpack_at(planes, bits, len(scale) * embedding_dim, position)
    units = stored_values(codebook).index_select(0, codes.view(-1).int()).view(position.shape)
    return _flushed(scale.index_select(0, indices.reshape(-1))).view(*indices.shape, 1) * units


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _kernel(
    indices,
    tiles,
    codebook,
    scale,
    out,  # (count, embedding_dim)
    rows,
    embedding_dim,
    blocks,  # of rows, in the tiles
    group_rows,
    group_span,  # rows of a group with their padding
    scale_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of one output row; NaN for an index out of range."""
    across = tl.cdiv(embedding_dim, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    position = program // across
    column = (program % across).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    mask = column < embedding_dim
    index = tl.load(indices + position).to(tl.int64)
    valid = (index >= 0) & (index < rows)
    index = tl.where(valid, index, 0)
    row = index // group_rows * group_span + index % group_rows
    codes = load_tiled(tiles, row, column, blocks, embedding_dim, mask, BITS)
    factor = tl.load(scale + index * scale_stride)
    factor = tl.where(tl.abs(factor) < 1.1754943508222875e-38, 0.0, factor)
    result = tl.where(valid, factor * load_values(codebook, codes), float("nan"))
    tl.store(out + position * embedding_dim + column, result, mask=mask)


# --- launcher ---------------------------------------------------------------------------------------------------------


def _launch(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    layout: str,
    groups: int,
) -> Tensor:
    out = torch.empty(*indices.shape, embedding_dim, dtype=torch.float32, device=indices.device)
    if not out.numel():
        return out
    rows = scale.numel()
    tiles = convert(packed, codebook, layout, "tiles", bits, rows, embedding_dim, groups)
    blocks = row_blocks(rows, groups)
    sizes = rows, embedding_dim, blocks, rows // groups, blocks // groups * ROW_BLOCK, scale.stride(0)
    block = min(1024, next_power_of_2(embedding_dim))
    grid = (indices.numel() * cdiv(embedding_dim, block),)
    with launching(indices):
        _kernel[grid](indices.contiguous(), tiles.contiguous(), as_stored(codebook), scale, out, *sizes, bits, block)
    return out


# --- operator ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_embedding", mutates_args=(), device_types="cpu")
def packed_embedding(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bits: int,
    embedding_dim: int,
    layout: str,
    groups: int,
) -> Tensor:
    """(..., embedding_dim) float32.

    Args:
        indices: (...) int32 or int64; one outside [0, rows) raises on the CPU and gives NaN on a GPU.
        packed: uint8, the rows * embedding_dim codes of the table.
        codebook: (2**bits,) in its deployed dtype: float32, int8 or float8_e4m3fn.
        scale: (rows,) float32.
        bits: width of a code.
        embedding_dim: codes per row.
        layout: of ``packed``, one of `layouts.LAYOUTS`.
        groups: of rows, in tiles and panels.
    """
    return _forward_cpu(indices, packed, codebook, scale, bits, embedding_dim, layout, groups)


packed_embedding.register_kernel("cuda")(_launch)


@packed_embedding.register_fake
def _(indices, packed, codebook, scale, bits, embedding_dim, layout, groups):
    return scale.new_empty(*indices.shape, embedding_dim)
