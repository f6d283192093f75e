"""The tensors of a packed recognizer as the runner's layers take them."""

from __future__ import annotations

import numpy as np

from gq_triton.config import WeightConfig
from gq_triton.kernels import native
from gq_triton.kernels.planes import plane_bytes
from gq_triton.packed_header import Header, some

from .layers import FloatMatrix, Matrix, PackedMatrix
from .tensor_file import FLOATS, TensorFile

__all__ = ["Weights"]

CODEBOOKS = {"float": "F32", "int8": "I8", "fp8": "F8_E4M3"}
ALIGNMENT = 64
SLAB = 32 << 20


class Weights:
    """Hands out the weights of a file, checked; the packed ones in the layout that native kernels read.

    Args:
        file: a packed recognizer, open.
        threads: that products with a weight may take.

    Raises:
        ValueError: it is not a packed file.
    """

    def __init__(self, file: TensorFile, threads: int) -> None:
        self._file, self._threads = file, threads
        self._header = Header.read(file.metadata, file.entries)
        self._arena = _Arena(file.size)
        self._packed: dict[tuple[str, int, int, int], PackedMatrix] = {}
        self._float: dict[str, np.ndarray] = {}
        self._weights: set[str] = set()  # that were asked for, as were
        self._tensors: set[str] = set()

    def matrix(self, name: str, rows: int, columns: int, groups: int = 1) -> Matrix:
        """The weight ``name`` (rows, columns), whose rows form so many equal groups, packed or float.

        Raises:
            ValueError: it is not there, has another shape or dtype, or values that it must not have.
        """
        if name not in self._header.configs:
            return FloatMatrix(self._floats(name, (rows, columns)))
        self._weights.add(name)
        self._check_packed(name, rows, columns)
        key = self._header.owner(name), rows, columns, groups
        if key not in self._packed:  # which another name may have read
            self._packed[key] = self._read_packed(*key)
        return self._packed[key]

    def vector(self, name: str, size: int) -> np.ndarray:
        """The float tensor ``name``, float32 (size,).

        Raises:
            ValueError: as :meth:`matrix`.
        """
        return self._floats(name, (size,))

    def require_all_used(self) -> None:
        """Refuses a file with tensors, or with settings of weights, that nobody asked for.

        Raises:
            ValueError: naming some.
        """
        if unknown := self._header.configs.keys() - self._weights:
            raise ValueError(f"it has packed weights that the model has not: {some(unknown)}")
        if unknown := {*self._file.entries, *self._header.aliases} - self._tensors:
            raise ValueError(f"it has tensors that the model has not: {some(unknown)}")

    def _floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        self._check(name, shape, FLOATS)
        stored = self._header.stored(name)
        if stored not in self._float:  # which another name may have read
            self._float[stored] = self._file.read_floats(stored)
        return self._float[stored]

    def _check_packed(self, name: str, rows: int, columns: int) -> None:
        config = self._header.configs[name]
        scales = rows if config.granularity == "channel" else 1
        self._check(f"{name}_packed.codes", (sum(plane_bytes(rows * columns, config.bits)),), ("U8",))
        self._check(f"{name}_packed.codebook", (2**config.bits,), (CODEBOOKS[config.codebook],))
        self._check(f"{name}_packed.scale", (scales,), ("F32",))

    def _check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        entry = self._file.entries.get(self._header.stored(name))
        if entry is None:
            raise ValueError(f"it lacks a tensor that the model has: {name}")
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {entry.shape} in it and {shape} in the model")
        if entry.dtype not in dtypes:
            raise ValueError(f"{name} has dtype {entry.dtype} in it and {' or '.join(dtypes)} in the model")
        self._tensors |= {name, self._header.stored(name)}

    def _read_packed(self, owner: str, rows: int, columns: int, groups: int) -> PackedMatrix:
        config = self._header.configs[owner]
        codebook = self._file.read(f"{owner}_packed.codebook")
        _check_codebook(owner, codebook, config)
        scale = self._file.read_floats(f"{owner}_packed.scale")
        if (scale < 0).any():
            raise ValueError(f"{owner} has scales that are negative")
        shape, e4m3 = (config.bits, rows, columns, groups), config.codebook == "fp8"
        panels = self._arena.take(native.panel_bytes(*shape))
        native.to_panels(self._file.read(f"{owner}_packed.codes"), codebook, panels, *shape, e4m3=e4m3)
        weight = native.Weight(panels, codebook, scale, *shape, e4m3=e4m3)
        return PackedMatrix(weight, config.activations or "none", self._threads)


class _Arena:
    """Aligned arrays of bytes, one after the other in slabs large enough for huge pages."""

    def __init__(self, expected: int) -> None:
        self._slab_bytes = min(SLAB, expected)
        self._free = np.empty(0, np.uint8)

    def take(self, count: int) -> np.ndarray:
        padded = -(-count // ALIGNMENT) * ALIGNMENT
        if padded > len(self._free):
            slab = np.empty(max(self._slab_bytes, padded) + ALIGNMENT, np.uint8)
            native.advise_huge(slab)
            self._free = slab[-slab.ctypes.data % ALIGNMENT :]
        taken, self._free = self._free[:count], self._free[padded:]
        return taken


def _check_codebook(name: str, codebook: np.ndarray, config: WeightConfig) -> None:
    if config.codebook == "fp8":
        largest = (codebook & 0x7F) <= 0x78  # the bytes of 256, which stands for 1; NaN is above
    else:
        largest = np.abs(codebook.astype(np.float64)) <= (127 if config.codebook == "int8" else 1)
    if not largest.all():
        raise ValueError(f"{name} has codebook values outside of [-1, 1]")
