"""Which bit planes codes are cut into, see `gq_triton.kernels.packing`; no torch here."""

__all__ = ["PLANES", "plane_bytes"]

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (4, 4)}  # widths, by bits


def plane_bytes(count: int, bits: int) -> list[int]:
    """Bytes of each plane of ``count`` codes of ``bits`` bits."""
    return [-(-count * width // 8) for width in PLANES[bits]]
