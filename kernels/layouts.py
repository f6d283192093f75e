"""The layouts of packed codes, and which of them a device's kernels read.

    planes      bit planes, exactly `bits` bits per code      files, state dicts    `gq_triton.kernels.packing`
    tiles       what a lane of a tensor core wants at once    GPUs                  `gq_triton.kernels.tiles`
    panels      a SIMD lane for each row                      CPUs, native kernels  `gq_triton.kernels.panels`

Operators take any of them on any device; the one that the device does not read is converted in the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gq_triton.kernels import native
from gq_triton.kernels.packing import packed_bytes, unpack
from gq_triton.kernels.panels import panel, panel_bytes, unpanel
from gq_triton.kernels.tiles import tile, tiled_bytes, untile

__all__ = ["LAYOUTS", "codes_of", "convert", "layout_bytes", "layout_for", "native_weight"]

LAYOUTS = ("planes", "tiles", "panels")


def layout_for(device: torch.device) -> str:
    """The layout that the kernels of ``device`` read; torch's, on a CPU without the native library, read planes."""
    if device.type == "cpu" and native.available():
        return "panels"
    return "tiles" if device.type == "cuda" else "planes"


def layout_bytes(layout: str, bits: int, rows: int, columns: int, groups: int = 1) -> int:
    """Bytes that a weight takes.

    Raises:
        ValueError: if ``rows`` are not ``groups`` equal groups, which planes do not know.
    """
    if layout == "panels":
        return panel_bytes(rows, columns, bits, groups)
    return tiled_bytes(rows, columns, bits, groups) if layout == "tiles" else packed_bytes(rows * columns, bits)


def convert(
    packed: Tensor, codebook: Tensor, source: str, target: str, bits: int, rows: int, columns: int, groups: int = 1
) -> Tensor:
    """The codes of a weight in layout ``target``, 1-D uint8, on the same device: ``packed`` itself where it is that of
    ``source``.

    Args:
        packed: 1-D uint8, in layout ``source``.
        codebook: (2**bits,), as deployed; panels of 8 bits hold the entries of an int8 one.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight.
        groups: into how many equal groups the rows fall; tiles and panels pad each by itself.

    Raises:
        ValueError: if ``packed`` is not of that size, or ``groups`` does not divide ``rows``.
        RuntimeError: if ``target`` is panels, and there is no native library.
    """
    if source == target:
        return packed
    shape = bits, rows, columns, groups
    if source != "planes":
        packed = untile(packed, *shape) if source == "tiles" else unpanel(packed, codebook, *shape)
    if target != "planes":
        packed = tile(packed, *shape) if target == "tiles" else panel(packed, codebook, *shape)
    return packed


def codes_of(
    packed: Tensor, codebook: Tensor, layout: str, bits: int, rows: int, columns: int, groups: int = 1
) -> Tensor:
    """The codes (rows, columns), uint8, of a weight; arguments as of `convert`."""
    return unpack(convert(packed, codebook, layout, "planes", bits, rows, columns, groups), bits, (rows, columns))


def native_weight(
    packed: Tensor, codebook: Tensor, scale: Tensor, layout: str, bits: int, rows: int, columns: int, groups: int = 1
) -> native.Weight:
    """A weight as native kernels take it; ``scale`` is (rows,), which may be one number expanded, or (1,), the other
    arguments are as of `convert`."""
    panels = convert(packed, codebook, layout, "panels", bits, rows, columns, groups).contiguous()
    scales = scale[:1] if scale.stride(0) == 0 else scale.contiguous()
    return native.Weight(panels, codebook.contiguous(), scales, bits, rows, columns, groups)
