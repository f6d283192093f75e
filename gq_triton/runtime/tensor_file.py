"""Reading safetensors files with numpy alone, trusting nothing in them.

Layout: the header's length (8 bytes, little-endian), the header (JSON: of each tensor its dtype, shape and place among
the data, and texts under ``__metadata__``), the data. A file is accepted only if the tensors fill the data exactly, one
after the other. Tensors are read, not mapped: a file that shrinks in the meantime is an error, not a signal.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Entry", "TensorFile"]

MAX_HEADER = 1 << 24
MAX_DIMENSIONS = 8
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F8_E4M3": np.dtype(np.uint8),  # as bytes
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # as bits
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
FLOATS = ("F16", "BF16", "F32", "F64")


class Entry(NamedTuple):
    """A tensor's dtype, by the format's name, its shape, and where its bytes begin and end among the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An open safetensors file; a context manager.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or it is damaged.

    Attributes:
        path: of the file.
        size: its bytes.
        metadata: the header's texts by name.
        entries: the tensors by name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} is not a file")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.entries, self._data = self._read_header()
        except ValueError as error:
            self._file.close()
            raise ValueError(f"{path} cannot be loaded: {error}") from error

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """The tensor ``name`` as it is stored; fp8 as bytes, bfloat16 as 16-bit integers.

        Raises:
            ValueError: the file has become shorter since it was opened.
        """
        entry = self.entries[name]
        array = np.empty(entry.shape, DTYPES[entry.dtype])
        self._file.seek(self._data + entry.start)
        self._fill(array.reshape(-1).view(np.uint8).data, f"the data of {name}")
        return array

    def read_floats(self, name: str) -> np.ndarray:
        """The floating-point tensor ``name`` as float32.

        Raises:
            ValueError: as :meth:`read`, or a value is not finite in float32.
        """
        stored = self.read(name)
        if self.entries[name].dtype == "BF16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(stored, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")
        return values

    def _read_header(self) -> tuple[dict[str, str], dict[str, Entry], int]:
        prefix = bytearray(8)
        self._fill(memoryview(prefix), "the header's length")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER, self.size - 8):
            raise ValueError(f"its header is said to have {length} bytes, of {self.size - 8} that follow")
        text = bytearray(length)
        self._fill(memoryview(text), "the header")
        header = _parse(text)
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata must map names to texts")
        entries = {name: _entry(name, value) for name, value in header.items()}
        _require_contiguous(entries, self.size - 8 - length)
        return metadata, entries, 8 + length

    def _fill(self, target: memoryview, what: str) -> None:
        done = 0
        while done < len(target):
            count = self._file.readinto(target[done:])
            if not count:
                raise ValueError(f"it ends within {what}")
            done += count


def _parse(text: bytearray) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header must be a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {name!r} occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {dtype!r}; allowed are {', '.join(DTYPES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} must have a shape of at most {MAX_DIMENSIONS} dimensions, each 0 to 2^62")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name} must have two data_offsets, the first not above the second")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes; its shape and dtype need {needed}")
    return Entry(dtype, tuple(shape), *offsets)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= 1 << 62 for value in values)


def _require_contiguous(entries: dict[str, Entry], data_bytes: int) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(f"the data of {name} begins at {entry.start}, where {end} is the end of what comes before")
        end = entry.stop
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes of data, of {data_bytes} that it has")
