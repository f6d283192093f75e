"""Weights for tests of the native kernels."""

from contextlib import contextmanager

import torch

from gq_triton.kernels import native, packing
from gq_triton.kernels.tables import CODEBOOK_SCALES, stored_values

CODEBOOKS = [torch.float32, torch.int8, torch.float8_e4m3fn]


@contextmanager
def using(isa):
    """Runs native kernels of that instruction set."""
    before = native.isa()
    native.use(isa)
    try:
        yield isa
    finally:
        native.use(before)


class Panels:
    """A random weight: in panels, in bit planes, and decoded as a matrix of float32."""

    def __init__(self, rows, columns, bits, codebook=torch.float32, groups=1, one_scale=False):
        self.bits, self.groups = bits, groups
        codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
        entries = torch.linspace(-1, 1, 2**bits) * CODEBOOK_SCALES.get(codebook, 1.0)
        self.codebook = (entries.round() if codebook == torch.int8 else entries).to(codebook)
        self.scale = torch.rand(1 if one_scale else rows) / columns**0.5 + 0.05
        self.planes = packing.pack(codes, bits)
        self.matrix = self.scale.unsqueeze(1) * stored_values(self.codebook)[codes.int()]
        panels = torch.empty(native.panel_bytes(bits, rows, columns, groups), dtype=torch.uint8)
        native.to_panels(self.planes, self.codebook, panels, bits, rows, columns, groups)
        self.weight = native.Weight(panels, self.codebook, self.scale, bits, rows, columns, groups)
