"""Packing of codes: exactly `bits` bits per code, as bit planes.

Layout.  A code of 1 to 8 bits is cut into fields of 4, 2 and 1 bits, most significant first:

    8 = 4 + 4    7 = 4 + 2 + 1    6 = 4 + 2    5 = 4 + 1    4 = 4    3 = 2 + 1    2 = 2    1 = 1

Each field of all codes forms a plane; the planes follow one another.  In a plane of width w, the field of code i (in
row-major order of the code tensor) occupies bits (i mod 8/w) w and upward, least significant first, of byte i div
(8/w); the plane is padded with zero bits to a whole byte.  Since every plane grows with the number of codes, the number
of bytes alone determines where each plane begins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gq_triton.kernels.planes import PLANES, plane_bytes

__all__ = [
    "PLANES",
    "pack",
    "pack_plane",
    "packed_bytes",
    "split_planes",
    "unpack",
    "unpack_at",
    "unpack_plane",
    "unpack_range",
]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` packed codes of ``bits`` bits take."""
    return sum(plane_bytes(count, bits))


def split_planes(packed: Tensor, count: int, bits: int) -> tuple[Tensor, ...]:
    """Views of the planes of ``count`` packed codes."""
    return packed.split(plane_bytes(count, bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, uint8, below 2**bits) as a packed 1-D uint8 tensor."""
    flat, planes, remaining = codes.reshape(-1), [], bits
    for width in PLANES[bits]:
        remaining -= width
        planes.append(pack_plane((flat >> remaining) & (2**width - 1), width))
    return torch.cat(planes)


def pack_plane(fields: Tensor, width: int) -> Tensor:
    """Fields (1-D uint8, below 2**width) as the bytes of a plane."""
    per_byte = 8 // width
    padded = torch.nn.functional.pad(fields, (0, -fields.numel() % per_byte)).view(-1, per_byte)
    packed = padded[:, 0].clone()
    for place in range(1, per_byte):
        packed |= padded[:, place] << (place * width)
    return packed


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes (uint8, ``shape``) of a packed tensor."""
    return unpack_range(packed, bits, math.prod(shape), 0, math.prod(shape)).view(shape)


def unpack_range(packed: Tensor, bits: int, count: int, start: int, stop: int) -> Tensor:
    """Codes ``start`` to ``stop`` (1-D uint8) out of ``count`` packed ones; no other code is touched."""
    codes = torch.zeros(stop - start, dtype=torch.uint8, device=packed.device)
    for width, plane in zip(PLANES[bits], split_planes(packed, count, bits), strict=True):
        codes = (codes << width) | unpack_plane(plane, width, start, stop)
    return codes


def unpack_plane(plane: Tensor, width: int, start: int, stop: int) -> Tensor:
    """Fields ``start`` to ``stop`` (1-D uint8) of a plane."""
    per_byte = 8 // width
    first, last = start // per_byte, -(-stop // per_byte)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    fields = (plane[first:last, None] >> shifts) & (2**width - 1)
    skipped = start - first * per_byte
    return fields.view(-1)[skipped : skipped + stop - start]


def unpack_at(packed: Tensor, bits: int, count: int, index: Tensor) -> Tensor:
    """Codes (uint8, shape of ``index``) at the given flat positions (int64) out of ``count`` packed ones."""
    codes = torch.zeros(index.shape, dtype=torch.uint8, device=packed.device)
    for width, plane in zip(PLANES[bits], split_planes(packed, count, bits), strict=True):
        per_byte = 8 // width
        shift = (index % per_byte * width).to(torch.uint8)
        fields = (plane[index // per_byte] >> shift) & (2**width - 1)
        codes = (codes << width) | fields
    return codes
