"""Embedding look-up in a packed low-bit table.

Mathematics.  out[i, d] = s[index[i]] * c[code[index[i], d]], one float32 product, with the codes of a row unpacked from
bit planes (layout in `gq_triton.kernels.packing`).  Only the rows asked for are decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels.backend import cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.packing import load_codes, unpack, unpack_at

__all__ = ["packed_embedding", "reference"]


# --- reference --------------------------------------------------------------------------------------------------------


def reference(indices: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bits: int, embedding_dim: int) -> Tensor:
    """The definition; ``scale`` (rows,), ``values`` (K,) as numbers."""
    codes = unpack(packed, bits, (scale.numel(), embedding_dim))
    return (scale.unsqueeze(1) * values[codes.long()])[indices]


# --- CPU --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    indices: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bits: int, embedding_dim: int
) -> Tensor:
    if indices.numel() and not 0 <= indices.min() <= indices.max() < scale.numel():
        low, high = indices.min().item(), indices.max().item()
        raise IndexError(f"indices must lie in [0, {scale.numel()}), got values from {low} to {high}")
    position = indices.unsqueeze(-1).long() * embedding_dim + torch.arange(embedding_dim)
    codes = unpack_at(packed, bits, scale.numel() * embedding_dim, position)
    units = values.index_select(0, codes.view(-1).int()).view(position.shape)
    return scale.index_select(0, indices.reshape(-1)).view(*indices.shape, 1) * units


# --- Triton -----------------------------------------------------------------------------------------------------------


@jit
def _kernel(
    indices,
    packed,
    values,
    scale,
    out,  # (count, embedding_dim)
    rows,
    embedding_dim,
    count,  # rows * embedding_dim
    scale_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of one output row; NaN for an index out of range."""
    across = tl.cdiv(embedding_dim, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    position = program // across
    column = (program % across) * BLOCK + tl.arange(0, BLOCK)
    mask = column < embedding_dim
    index = tl.load(indices + position).to(tl.int64)
    valid = (index >= 0) & (index < rows)
    index = tl.where(valid, index, 0)
    codes = load_codes(packed, index * embedding_dim + column, count, mask, BITS)
    row = tl.load(values + codes) * tl.load(scale + index * scale_stride)
    tl.store(out + position * embedding_dim + column, tl.where(valid, row, float("nan")), mask=mask)


# --- launcher ---------------------------------------------------------------------------------------------------------


def _launch(indices: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bits: int, embedding_dim: int) -> Tensor:
    out = torch.empty(*indices.shape, embedding_dim, device=indices.device)
    if not out.numel():
        return out
    block = min(1024, next_power_of_2(embedding_dim))
    grid = (indices.numel() * cdiv(embedding_dim, block),)
    tensors = indices.contiguous(), packed.contiguous(), values.contiguous(), scale, out
    with launching(indices):
        sizes = scale.numel(), embedding_dim, scale.numel() * embedding_dim, scale.stride(0)
        _kernel[grid](*tensors, *sizes, bits, block)
    return out


# --- operator ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::packed_embedding", mutates_args=(), device_types="cpu")
def packed_embedding(
    indices: Tensor, packed: Tensor, values: Tensor, scale: Tensor, bits: int, embedding_dim: int
) -> Tensor:
    """(..., embedding_dim) float32.

    Args:
        indices: (...) int32 or int64; one outside [0, rows) raises on the CPU and gives NaN on a GPU.
        packed: uint8, the rows * embedding_dim codes of the table.
        values: (2**bits,) float32 codebook values.
        scale: (rows,) float32.
        bits: width of a code.
        embedding_dim: codes per row.
    """
    return _forward_cpu(indices, packed, values, scale, bits, embedding_dim)


packed_embedding.register_kernel("cuda")(_launch)


@packed_embedding.register_fake
def _(indices, packed, values, scale, bits, embedding_dim):
    return values.new_empty(*indices.shape, embedding_dim)
