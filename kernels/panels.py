"""The layout of packed weights for native CPU kernels: panels, a SIMD lane for each row.

Layout.  The rows may be G equal groups, such as the gates of an LSTM.  Each is padded to whole blocks of 16 rows; block
u of all groups stand together, [u][group], as they concern the same units.  Columns are padded to a multiple of 32.  A
block is one tile after the other, a tile 16 rows by 32 columns in 64 bytes for each bit of a code.  Of a tile, group j
of columns, 0 <= j < 8, is columns 4 j to 4 j + 3, and place l = 4 row + column mod 4 is one of 64: a register holds a
byte for each place, that is four columns in a row for each of 16 rows.

Codes are cut into fields of 4, 2 and 1 bits as in `gq_triton.kernels.packing`, widest first.  The fields of a tile that
are w bits wide form w registers, one after the other,

    w = 4    byte l of register i is field (2 i, l) + 16 field (2 i + 1, l)
    w = 2    byte l of register i has field (4 i + j, l) in bits 2 j and 2 j + 1
    w = 1    bit j of byte l is field (j, l)

where (j, l) is place l of column group j.  Codes of 8 bits are not cut: byte l of register j is code (j, l).  If their
codebook is int8 it is the entry itself, plus 128, and no kernel has to look it up.  Padding is 0 (as an entry, 128).

Why.  Lanes are rows, so that sums never cross lanes: inputs are broadcast four at a time, and an instruction multiplies
them by four columns of 16 rows.  A block is one stream of bytes for the memory's prefetcher.

Only `packing` is written to files; a weight is converted where it moves to or from a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.backend import cdiv
from gq_triton.kernels.packing import PLANES, pack, packed_bytes
from gq_triton.kernels.tiles import row_blocks

__all__ = ["panel", "panel_bytes", "unpanel"]


def panel_bytes(rows: int, columns: int, bits: int, groups: int = 1) -> int:
    """Bytes that a weight in panels takes: those of `native.panel_bytes`, without the library and in compiled graphs.

    Raises:
        ValueError: if ``rows`` are not ``groups`` equal groups.
    """
    return row_blocks(rows, groups) * cdiv(columns, 32) * 64 * bits


@torch.library.custom_op("gq_triton::panel", mutates_args=())
def panel(planes: Tensor, codebook: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The panels (1-D uint8, same device) of a weight's packed codes, in huge pages where there are any.

    Args:
        planes: 1-D uint8, the rows * columns codes as `packing.pack` has them.
        codebook: (2**bits,), float32, int8 or float8_e4m3fn.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight.
        groups: into how many equal groups the rows fall.

    Raises:
        ValueError: if ``planes`` or ``codebook`` is not of that size, or ``groups`` does not divide ``rows``.
        RuntimeError: if there is no native library.
    """
    out = torch.empty(panel_bytes(rows, columns, bits, groups), dtype=torch.uint8)
    native.advise_huge(out)  # before a page of it is written
    native.to_panels(_on_cpu(planes), _on_cpu(codebook), out, bits, rows, columns, groups)
    return out.to(planes.device)


@panel.register_fake
def _(planes, codebook, bits, rows, columns, groups=1):
    return planes.new_empty(panel_bytes(rows, columns, bits, groups))


@torch.library.custom_op("gq_triton::unpanel", mutates_args=())
def unpanel(panels: Tensor, codebook: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The packed codes (1-D uint8, same device) of a weight in panels: the inverse of `panel`, and its arguments.

    Of several codes with equal entries in an int8 codebook of 8 bits it is the first.
    """
    if not native.available():  # as where a program is run that was exported with the library
        return pack(_codes(panels, codebook, bits, rows, columns, groups), bits)
    out = torch.empty(packed_bytes(rows * columns, bits), dtype=torch.uint8)
    native.to_planes(_on_cpu(panels), _on_cpu(codebook), out, bits, rows, columns, groups)
    return out.to(panels.device)


@unpanel.register_fake
def _(panels, codebook, bits, rows, columns, groups=1):
    return panels.new_empty(packed_bytes(rows * columns, bits))


def _codes(panels: Tensor, codebook: Tensor, bits: int, rows: int, columns: int, groups: int) -> Tensor:
    """The codes (rows, columns), uint8, of panels, by torch alone."""
    if panels.numel() != panel_bytes(rows, columns, bits, groups):
        raise ValueError(f"panels must have {panel_bytes(rows, columns, bits, groups)} bytes, got {panels.numel()}")
    blocks, tiles = row_blocks(rows // groups), cdiv(columns, 32)
    registers = panels.view(blocks, groups, tiles, bits, 64)
    if bits == 8:
        codes = _first_codes(codebook)[registers.int()] if codebook.dtype == torch.int8 else registers
    else:
        codes = torch.zeros(blocks, groups, tiles, 8, 64, dtype=torch.uint8, device=panels.device)
        for width, plane in zip(PLANES[bits], registers.split(PLANES[bits], 3), strict=True):
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=panels.device).view(-1, 1)
            codes = codes << width | (plane.unsqueeze(4) >> shifts & (1 << width) - 1).view_as(codes)
    codes = codes.view(blocks, groups, tiles, 8, 16, 4).permute(1, 0, 4, 2, 3, 5)
    return codes.reshape(groups, blocks * 16, tiles * 32)[:, : rows // groups, :columns].reshape(rows, columns)


def _first_codes(codebook: Tensor) -> Tensor:
    """(256,) uint8: the first code of each entry, plus 128, of an int8 codebook."""
    codes = torch.arange(256, device=codebook.device)
    return codes.scatter_reduce(0, codebook.long() + 128, codes, "amin", include_self=False).to(torch.uint8)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous()
