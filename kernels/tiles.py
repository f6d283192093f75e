"""The layout of packed weights on a GPU: tiles in the order in which tensor cores want them.

Layout.  A weight of N rows and K columns has its codes cut into fields of 4, 2 and 1 bits as in
`gq_triton.kernels.packing`, and the fields of one width form a plane; the planes follow one another, widest first.
Rows are taken in blocks of 16.  A plane of width w takes columns in blocks of 256 / w, and all planes of a weight pad
the columns to the same number, a multiple of 256 / (the narrowest width).  A plane is an array of 32-bit words, least
significant byte first,

    plane[row block][column block][g: 8][t: 4][r: 2][u: 2]

so that one row block times one column block is 512 bytes whatever the width.  In word (g, t, r, u) of row block b and
column block k,

    bits 4 j + w i and the w - 1 above hold the field of row 16 b + 8 r + g, column (256 / w) k + 64 i + 32 u + 8 t + j

for 0 <= j < 8, 0 <= i < 4 / w: a word of the 4-bit plane is 8 consecutive codes of a row.  Padding is zero bits.  The
rows may be G equal groups, such as the gates of an LSTM; each is then padded to whole row blocks by itself, so that
block b of every group stands for the same units.

Why.  Lane 4 g + t of a warp owns 16 contiguous bytes of each 512: it loads them at once, the warp loads all 512 at
once, and the lane then holds what the matrix instructions (`mma`, `wgmma`) expect of lane (g, t), namely rows g and
g + 8 at columns of its own, up to an order of the columns that the activations can follow: nothing is shuffled between
lanes.  Fields of one value of i sit in the same bits of every 4-bit nibble, so one mask extracts 8 of them.

Only `packing` is written to files; a weight is converted where it moves to or from a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gq_triton.kernels.backend import cdiv, jit, tl
from gq_triton.kernels.packing import PLANES, pack_plane, packed_bytes, split_planes, unpack_plane

__all__ = [
    "ROW_BLOCK",
    "as_words",
    "load_tiled",
    "padded_columns",
    "row_blocks",
    "step_columns",
    "tile",
    "tiled_bytes",
    "untile",
]

ROW_BLOCK = 16
_CHUNK = 1 << 20  # codes converted at a time, to bound temporaries


def row_blocks(rows: int, groups: int = 1) -> int:
    """Row blocks of a weight, those of all groups together.

    Raises:
        ValueError: if ``rows`` are not ``groups`` equal groups.
    """
    if groups < 1 or rows % groups:
        raise ValueError(f"groups must divide the rows: got {rows} rows in {groups} groups")
    return groups * cdiv(rows // groups, ROW_BLOCK)


def step_columns(bits: int) -> int:
    """Columns of a column block of the narrowest plane: fewer cannot be decoded at a time."""
    return 256 // PLANES[bits][-1]


def padded_columns(columns: int, bits: int) -> int:
    """Columns that every plane of a weight of ``columns`` columns has room for."""
    return cdiv(columns, step_columns(bits)) * step_columns(bits)


def tiled_bytes(rows: int, columns: int, bits: int, groups: int = 1) -> int:
    """Bytes that a tiled weight takes."""
    return row_blocks(rows, groups) * ROW_BLOCK * padded_columns(columns, bits) * bits // 8


def tile(packed: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The tiled form (1-D uint8, same device) of a weight's packed codes.

    Args:
        packed: 1-D uint8, the rows * columns codes as `packing.pack` has them.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight.
        groups: into how many equal groups the rows fall.

    Raises:
        ValueError: if ``packed`` is not of that size, or ``groups`` does not divide ``rows``.
    """
    tiles = torch.zeros(tiled_bytes(rows, columns, bits, groups), dtype=torch.uint8, device=packed.device)
    _check_size("packed", packed, packed_bytes(rows * columns, bits))
    padding = padded_columns(columns, bits) - columns
    planes = split_planes(packed, rows * columns, bits), _tiled_planes(tiles, bits, rows, columns, groups)
    for width, source, target in zip(PLANES[bits], *planes, strict=True):
        for top, bottom in _chunks(rows, columns):
            fields = unpack_plane(source, width, top * columns, bottom * columns).view(-1, columns)
            words = _to_words(torch.nn.functional.pad(fields, (0, padding)), width)
            target[_place(top, bottom, rows, groups, tiles.device)] = words
    return tiles


def untile(tiles: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The packed codes (1-D uint8, same device) of a tiled weight: the inverse of `tile`, and its arguments.

    Raises:
        ValueError: if ``tiles`` is not of that size, or ``groups`` does not divide ``rows``.
    """
    _check_size("tiles", tiles, tiled_bytes(rows, columns, bits, groups))
    packed = torch.empty(packed_bytes(rows * columns, bits), dtype=torch.uint8, device=tiles.device)
    planes = split_planes(packed, rows * columns, bits), _tiled_planes(tiles, bits, rows, columns, groups)
    for width, target, source in zip(PLANES[bits], *planes, strict=True):
        for top, bottom in _chunks(rows, columns):
            words = source[_place(top, bottom, rows, groups, tiles.device)]
            part = pack_plane(_from_words(words, width)[:, :columns].reshape(-1), width)
            start = top * columns * width // 8
            target[start : start + len(part)] = part
    return packed


def as_words(tiles: Tensor) -> Tensor:
    """The words (1-D int32) of a tiled weight: a view, but of bytes that lie in memory as no word may, a copy."""
    in_place = tiles.is_contiguous() and tiles.storage_offset() % 4 == 0
    return (tiles if in_place else tiles.clone(memory_format=torch.contiguous_format)).view(torch.int32)


def _check_size(name: str, tensor: Tensor, size: int) -> None:
    if tensor.dtype != torch.uint8 or tensor.shape != (size,):
        raise ValueError(f"{name} must be uint8 of shape ({size},); got {tensor.dtype} of {tuple(tensor.shape)}")


def _chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each beginning at a whole byte of the packed planes."""
    step = max(1, _CHUNK // max(1, columns * ROW_BLOCK)) * ROW_BLOCK
    return ((top, min(top + step, rows)) for top in range(0, rows if columns else 0, step))


def _tiled_planes(tiles: Tensor, bits: int, rows: int, columns: int, groups: int) -> list[Tensor]:
    """Views (row block, r, g, column block, u, t) of the words of each plane."""
    blocks, across = row_blocks(rows, groups), padded_columns(columns, bits)
    planes = as_words(tiles).split([blocks * across * width // 2 for width in PLANES[bits]])
    shapes = [(blocks, across * width // 256, 8, 4, 2, 2) for width in PLANES[bits]]
    return [plane.view(shape).permute(0, 4, 2, 1, 5, 3) for plane, shape in zip(planes, shapes, strict=True)]


def _place(top: int, bottom: int, rows: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(row block, r, g) of each row."""
    row = torch.arange(top, bottom, device=device)
    size = rows // groups
    row = row // size * cdiv(size, ROW_BLOCK) * ROW_BLOCK + row % size
    return row // 16, row // 8 % 2, row % 8


def _to_words(fields: Tensor, width: int) -> Tensor:
    """Fields (n, columns) -> words (n, column block, u, t), int32."""
    parts = fields.view(len(fields), -1, 4 // width, 2, 4, 4, 2)  # column = (block, i, u, t, j // 2, j % 2)
    words = parts[:, :, 0, ..., 0] | parts[:, :, 0, ..., 1] << 4
    for i in range(1, 4 // width):
        words |= parts[:, :, i, ..., 0] << (width * i)
        words |= parts[:, :, i, ..., 1] << (width * i + 4)
    return words.view(torch.int32).squeeze(-1)


def _from_words(words: Tensor, width: int) -> Tensor:
    """The inverse of `_to_words`."""
    parts = words.contiguous().unsqueeze(-1).view(torch.uint8)[:, :, None, ..., None]
    shift = torch.arange(0, 4, width, dtype=torch.uint8, device=words.device).view(-1, 1, 1, 1, 1)
    high = torch.arange(0, 8, 4, dtype=torch.uint8, device=words.device)
    return ((parts >> (shift + high)) & (2**width - 1)).flatten(1)


@jit
def load_tiled(tiles, row, column, blocks, columns, mask, BITS: tl.constexpr):
    """Codes (int32) at (``row``, ``column``) of a tiled weight, in a kernel; 0 where masked.

    ``row`` is int64; where rows are groups, it counts their padding.  ``blocks`` is `row_blocks`, ``columns`` those of
    the weight.
    """
    UNIT: tl.constexpr = 256 if BITS % 2 == 1 else 128 if BITS % 4 == 2 else 64
    across = (columns + UNIT - 1) // UNIT * UNIT
    plane_bytes = (tl.zeros((), tl.int64) + across) * blocks * 2  # of one bit
    code = tl.zeros((row + column).shape, tl.int32)
    plane = tiles
    if BITS >= 4:
        code = _load_field(plane, row, column, across, mask, 4)
        plane += 4 * plane_bytes
    if BITS == 8:
        code = code * 16 + _load_field(plane, row, column, across, mask, 4)
    if BITS % 4 >= 2:
        code = code * 4 + _load_field(plane, row, column, across, mask, 2)
        plane += 2 * plane_bytes
    if BITS % 2 == 1:
        code = code * 2 + _load_field(plane, row, column, across, mask, 1)
    return code


@jit
def _load_field(plane, row, column, across, mask, WIDTH: tl.constexpr):
    """Shifts and masks, not divisions: indices are signed, and the compiler does not know that none is negative."""
    SHIFT: tl.constexpr = 6 if WIDTH == 4 else 7 if WIDTH == 2 else 8  # 2^SHIFT = 256 / WIDTH columns in a block
    block = (row >> 4) * (across >> SHIFT) + (column >> SHIFT)
    word = (row & 7) * 16 + ((column >> 3) & 3) * 4 + ((row >> 3) & 1) * 2 + ((column >> 5) & 1)  # g, t, r, u
    byte = tl.load(plane + block * 512 + word * 4 + ((column & 7) >> 1), mask=mask, other=0).to(tl.int32)
    i = (column >> 6) & (4 // WIDTH - 1)
    return (byte >> ((column & 1) * 4 + i * WIDTH).to(tl.int32)) & ((1 << WIDTH) - 1)
