"""The layout of packed weights for native CPU kernels: panels, a SIMD lane for each row.

Layout.  The rows may be G equal groups, such as the gates of an LSTM.  Each is padded to whole blocks of 16 rows; block
u of all groups stand together, [u][group], as they concern the same units.  Columns are padded to a multiple of 32.  A
block is one tile after the other, a tile 16 rows by 32 columns in 64 bytes for each bit of a code.  Of a tile, group j
of columns, 0 <= j < 8, is columns 4 j to 4 j + 3, and place l = 4 row + column mod 4 is one of 64: a register holds a
byte for each place, that is four columns in a row for each of 16 rows.

A tile of codes of b bits is b registers, one after the other.  Let (j, l) be the code of place l of column group j.  A
byte has room for n = floor(8 / b) whole codes, and 8 - n b bits are left over:

    j < n b    (j, l) is bits b (j mod n) to b (j mod n) + b - 1 of byte l of register floor(j / n)
    else       its bits are cut: the bits left over of byte l, register after register and from the lowest to the
               highest, are the bits of the last codes, likewise group after group

    of 5 bits, for example:    register  0  1  2  3  4
                               bits 0-4  codes of groups 0, 1, 2, 3, 4
                               bits 5-7  5 5 5 | 5 5 6 | 6 6 6 | 6 7 7 | 7 7 7

If the codebook of codes of 8 bits is int8, byte l is the entry itself, plus 128, and no kernel has to look it up.
Padding is 0 (as an entry, 128).

Why.  Lanes are rows, so that sums never cross lanes: inputs are broadcast four at a time, and an instruction multiplies
them by four columns of 16 rows.  A block is one stream of bytes for the memory's prefetcher.  Whole codes in the lowest
bits are looked up as they are: permutations of bytes ignore what is above.

Only `packing` is written to files; a weight is converted where it moves to or from a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.backend import cdiv
from gq_triton.kernels.packing import pack, packed_bytes
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
        each_bit = torch.arange(8, dtype=torch.uint8, device=panels.device).view(-1, 1)
        found = registers.unsqueeze(4) >> each_bit & 1  # (..., register, bit, place)
        whole = 8 // bits * bits
        in_order = torch.cat([part.flatten(3, 4) for part in (found[..., :whole, :], found[..., whole:, :])], 3)
        codes = (in_order.unflatten(3, (8, bits)) << each_bit[:bits]).sum(4, dtype=torch.uint8)
    codes = codes.view(blocks, groups, tiles, 8, 16, 4).permute(1, 0, 4, 2, 3, 5)
    return codes.reshape(groups, blocks * 16, tiles * 32)[:, : rows // groups, :columns].reshape(rows, columns)


def _first_codes(codebook: Tensor) -> Tensor:
    """(256,) uint8: the first code of each entry, plus 128, of an int8 codebook."""
    codes = torch.arange(256, device=codebook.device)
    return codes.scatter_reduce(0, codebook.long() + 128, codes, "amin", include_self=False).to(torch.uint8)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous()
