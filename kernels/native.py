"""The native CPU kernels: ctypes bindings of kernels/native/gq_native.h, for torch tensors and numpy arrays alike.

Nothing of this module needs torch or numpy. Arrays are given as whole, contiguous, on the CPU, and of the dtype that
each function says; results are written to arrays that the caller provides. The library checks every size itself; what
it refuses, and arrays that are not as they should be, are ValueErrors. Without the library (`available`) all functions
that compute raise RuntimeError.

The environment variable GQ_TRITON_CPU chooses the instruction set: avx512, avxvnni, avx2, neon, portable, or torch,
which leaves the library alone. The default is the best that the processor has.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

__all__ = [
    "Recurrent",
    "Segments",
    "Weight",
    "advise_huge",
    "available",
    "decode_rows",
    "depthwise_conv1d",
    "encode",
    "fake_quantize",
    "fake_quantize_backward",
    "isa",
    "isas",
    "layer_norm",
    "linear",
    "panel_bytes",
    "quantize_tokens",
    "reason",
    "to_panels",
    "to_planes",
    "use",
]

ABI = 4  # GQ_ABI of gq_native.h
ISAS = ("avx512", "avxvnni", "avx2", "neon", "portable")
ACTIVATIONS = {"none": 0, "int8": 1, "fp8": 2}
CODEBOOKS = {"float32": 0, "int8": 1, "float8_e4m3fn": 2}

Array = Any  # a torch tensor or a numpy array


# --- the library ------------------------------------------------------------------------------------------------------


_ARRAY, _WEIGHT = (c_void_p, c_int64), (c_void_p,)  # where it is, how many elements it has
_FUNCTIONS = {
    "gq_isas": (ctypes.c_char_p, ()),
    "gq_isa": (ctypes.c_char_p, ()),
    "gq_error": (ctypes.c_char_p, ()),
    "gq_use_isa": (c_int32, (ctypes.c_char_p,)),
    "gq_panel_bytes": (c_int64, (c_int32, c_int64, c_int64, c_int32)),
    "gq_to_panels": (c_int32, (*_ARRAY, *_WEIGHT)),
    "gq_to_planes": (c_int32, (*_WEIGHT, *_ARRAY)),
    "gq_quantize_tokens": (c_int32, (c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "gq_linear": (c_int32, (*_WEIGHT, c_int32, *_ARRAY, *_ARRAY, *_ARRAY, c_int64, c_int32)),
    "gq_decode_rows": (c_int32, (*_WEIGHT, *_ARRAY, *_ARRAY)),
    "gq_layer_norm": (c_int32, (*_ARRAY, *_ARRAY, *_ARRAY, c_float, *_ARRAY)),
    "gq_recurrent": (c_int32, (c_void_p,)),
    "gq_depthwise_conv1d": (c_int32, (*_WEIGHT, *_ARRAY, *_ARRAY, *_ARRAY, *[c_int64] * 5, c_int32)),
    "gq_fake_quantize": (c_int32, (*_ARRAY * 3, c_int32, *_ARRAY, c_int32)),
    "gq_fake_quantize_backward": (c_int32, (*_ARRAY * 4, c_float, *_ARRAY * 3, c_int32)),
    "gq_encode": (c_int32, (*_ARRAY * 4, c_int32)),
    "gq_advise_huge": (None, (c_void_p, c_int64)),
}


class _Missing:
    """What stands in for the library where there is none."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"the native CPU kernels are not available: {self.reason}")


def _load() -> Any:
    wanted = os.environ.get("GQ_TRITON_CPU", "")
    if wanted not in ("", "torch", *ISAS):
        raise ValueError(f"GQ_TRITON_CPU must be one of {', '.join(ISAS)} or torch, got {wanted}")
    if wanted == "torch":
        return _Missing("GQ_TRITON_CPU is torch")
    path = Path(__file__).with_name("_native.dll" if sys.platform == "win32" else "_native.so")
    if not path.exists():
        return _Missing(f"{path} was not built; installing the package builds it where there is GCC or Clang")
    try:
        library = ctypes.CDLL(str(path))
        library.gq_abi.argtypes = ()
        if library.gq_abi() != ABI:
            return _Missing(f"{path} is of another version of the package; install the package again")
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return _Missing(f"{path} cannot be loaded: {error}")
    if wanted and library.gq_use_isa(wanted.encode()):
        names = library.gq_isas().decode().replace(",", ", ")
        raise ValueError(f"GQ_TRITON_CPU must be one of {names} (what this processor has) or torch, got {wanted}")
    return library


_library = _load()


def available() -> bool:
    """Whether there is the library."""
    return reason() is None


def reason() -> str | None:
    """Why there is no library, or None where there is."""
    return _library.reason if isinstance(_library, _Missing) else None


def isa() -> str | None:
    """The instruction set in use, or None without the library."""
    return _library.gq_isa().decode() if available() else None


def isas() -> tuple[str, ...]:
    """The instruction sets that the library and this processor have, best first."""
    return tuple(_library.gq_isas().decode().split(",")) if available() else ()


def use(isa: str) -> None:
    """Chooses an instruction set for all that follows, in all threads: one of `isas`, or ValueError."""
    _check(_library.gq_use_isa(isa.encode()))


def _check(status: int) -> None:
    if status < 0:
        raise ValueError(_library.gq_error().decode())


# --- arrays -----------------------------------------------------------------------------------------------------------


_dtype_names: dict[Any, str] = {}  # torch.float32 and numpy.dtype("float32") are both "float32"
_Nothing = ctypes.c_char * 0


def _dtype_name(dtype: Any) -> str:
    name = _dtype_names.get(dtype)
    if name is None:
        name = _dtype_names[dtype] = str(dtype).removeprefix("torch.")
    return name


def _array(name: str, array: Array, dtype: str) -> tuple[int, int]:
    """Where an array's elements begin, and how many there are."""
    if _dtype_names.get(array.dtype) != dtype and _dtype_name(array.dtype) != dtype:
        raise ValueError(f"{name} must be {dtype}, got {_dtype_name(array.dtype)}")
    if hasattr(array, "data_ptr"):
        if not array.is_cpu or not array.is_contiguous():
            strides = tuple(array.stride())
            raise ValueError(f"{name} must be contiguous and on the CPU, got strides {strides} on {array.device}")
        return array.data_ptr(), array.numel()
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be contiguous, got strides {array.strides}")
    if array.flags.writeable:  # three times as fast as asking numpy
        return ctypes.addressof(_Nothing.from_buffer(array)), array.size
    return array.__array_interface__["data"][0], array.size


def _output(name: str, array: Array, dtype: str = "float32") -> tuple[int, int]:
    if not hasattr(array, "data_ptr") and not array.flags.writeable:
        raise ValueError(f"{name} must be writeable")
    return _array(name, array, dtype)


def _optional(name: str, array: Array | None) -> tuple[int | None, int]:
    return (None, 0) if array is None else _array(name, array, "float32")


def _activations(name: str, value: str) -> int:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value}")
    return ACTIVATIONS[value]


def advise_huge(array: Array) -> None:
    """Asks for huge pages for the whole 2 MB pages in an array, best before anything is written to it."""
    size = array.element_size() if hasattr(array, "data_ptr") else array.itemsize
    address, count = _array("array", array, _dtype_name(array.dtype))
    _library.gq_advise_huge(address, count * size)


# --- weights ----------------------------------------------------------------------------------------------------------


class Weight(ctypes.Structure):
    """A weight (rows, columns) in panels, with references to its arrays.

    Args:
        panels: uint8, `panel_bytes` of them.
        codebook: (2**bits,), float32, int8, float8_e4m3fn, or the last as uint8.
        scale: (rows,) or (1,), float32.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight.
        groups: into how many equal groups the rows fall: 4 gates of an LSTM, 3 of a GRU, else 1.
        e4m3: whether a uint8 codebook is e4m3.
    """

    _fields_ = [
        ("panels", c_void_p),
        ("panel_bytes", c_int64),
        ("codebook", c_void_p),
        ("codebook_bytes", c_int64),
        ("scale", c_void_p),
        ("scales", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bits", c_int32),
        ("groups", c_int32),
        ("codebook_kind", c_int32),
    ]

    def __init__(
        self,
        panels: Array,
        codebook: Array,
        scale: Array | None,
        bits: int,
        rows: int,
        columns: int,
        groups: int = 1,
        *,
        e4m3: bool = False,
    ) -> None:
        kind = "float8_e4m3fn" if e4m3 else _dtype_name(codebook.dtype)
        if kind not in CODEBOOKS:
            raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {kind}")
        entries, count = _array("codebook", codebook, _dtype_name(codebook.dtype))
        codebook_bytes = count * (4 if kind == "float32" else 1)
        sizes = rows, columns, bits, groups, CODEBOOKS[kind]
        arrays = *_array("panels", panels, "uint8"), entries, codebook_bytes, *_optional("scale", scale)
        super().__init__(*arrays, *sizes)
        self.arrays = panels, codebook, scale
        self.address = ctypes.addressof(self)

    def __deepcopy__(self, memo: dict) -> Weight:
        return self  # nothing of it ever changes


def panel_bytes(bits: int, rows: int, columns: int, groups: int = 1) -> int:
    """Bytes of a weight in panels, or ValueError."""
    found = _library.gq_panel_bytes(bits, rows, columns, groups)
    _check(found)
    return found


def to_panels(
    planes: Array,
    codebook: Array,
    out: Array,
    bits: int,
    rows: int,
    columns: int,
    groups: int = 1,
    *,
    e4m3: bool = False,
) -> None:
    """Writes the panels of bit planes (`gq_triton.kernels.packing`) to ``out``; other arguments as of `Weight`."""
    _output("out", out, "uint8")
    weight = Weight(out, codebook, None, bits, rows, columns, groups, e4m3=e4m3)
    _check(_library.gq_to_panels(*_array("planes", planes, "uint8"), weight.address))


def to_planes(
    panels: Array,
    codebook: Array,
    out: Array,
    bits: int,
    rows: int,
    columns: int,
    groups: int = 1,
    *,
    e4m3: bool = False,
) -> None:
    """The inverse of `to_panels`. Of several codes with equal entries in an int8 codebook of 8 bits it is the first."""
    weight = Weight(panels, codebook, None, bits, rows, columns, groups, e4m3=e4m3)
    _check(_library.gq_to_planes(weight.address, *_output("out", out, "uint8")))


# --- kernels ----------------------------------------------------------------------------------------------------------


def quantize_tokens(x: Array, q: Array, scale: Array) -> None:
    """Quantizes x (..., features), float32, to q, int8 of that shape, and scale (...), float32, as
    `gq_triton.kernels.activations.quantize_tokens` does with ``dtype="int8"``."""
    address, count = _array("x", x, "float32")
    q_address, q_count = _output("q", q, "int8")
    scale_address, tokens = _output("scale", scale)
    features = x.shape[-1]
    if q_count != count or tokens * features != count:
        raise ValueError(f"q must have {count} elements and scale one for each {features}, got {q_count} and {tokens}")
    _check(_library.gq_quantize_tokens(address, tokens, features, q_address, scale_address))


def linear(
    x: Array, weight: Weight, bias: Array | None, out: Array, activations: str = "none", threads: int = 1
) -> None:
    """out (..., rows) = x (..., columns) W^T + bias, float32.

    Args:
        x, out: float32; may not overlap.
        weight: codes with their scale.
        bias: (rows,) float32, or None.
        activations: "none", "int8" or "fp8": what x is quantized to first, per token. Where codebook and activations
            are int8 the product runs on integers, and is the same on every instruction set; else on float32.
        threads: at most so many; they change nothing in the result.
    """
    address, count = _array("x", x, "float32")
    out_address, out_count = _output("out", out)
    tokens = count // weight.columns if weight.columns else out_count // max(1, weight.rows)
    status = _library.gq_linear(
        weight.address,
        _activations("activations", activations),
        address,
        count,
        *_optional("bias", bias),
        out_address,
        out_count,
        tokens,
        threads,
    )
    if status:
        _check(status)


def layer_norm(x: Array, weight: Array, bias: Array, out: Array, epsilon: float = 1e-5) -> None:
    """out = the normalization of x over its last dimension, the elements of weight and bias; all float32. ``out`` may
    be ``x``."""
    if x.shape[-1] != weight.shape[0]:
        raise ValueError(f"x must have weight's {weight.shape[0]} elements in its last dimension, got {x.shape[-1]}")
    arrays = (*_array("x", x, "float32"), *_array("weight", weight, "float32"), *_array("bias", bias, "float32"))
    _check(_library.gq_layer_norm(*arrays, epsilon, *_output("out", out)))


def decode_rows(indices: Array, weight: Weight, out: Array) -> None:
    """out (..., columns), float32 = the rows of the weight that ``indices``, int64, name."""
    _check(_library.gq_decode_rows(weight.address, *_array("indices", indices, "int64"), *_output("out", out)))


def depthwise_conv1d(
    x: Array,
    weight: Weight,
    bias: Array | None,
    out: Array,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    threads: int = 1,
) -> None:
    """Depthwise convolution over time: x (batch, length, rows), out (batch, out_length, rows), float32; the weight is
    (rows, taps), and x counts as 0 beyond its ends."""
    batch, length = x.shape[0], x.shape[1]
    arrays = *_array("x", x, "float32"), *_optional("bias", bias), *_output("out", out)
    options = batch, length, stride, padding, dilation, threads
    _check(_library.gq_depthwise_conv1d(weight.address, *arrays, *options))


def fake_quantize(weight: Array, scale: Array, table: Array, soft: bool, out: Array, threads: int = 1) -> None:
    """out = the quantized weight, by `gq_triton.kernels.fake_quantize`; all arrays float32.

    Args:
        weight: (C, ...).
        scale: (C,), or (1,) for all channels.
        table: (6 K,), flat (`gq_triton.kernels.tables`); its centroids are sorted.
        soft: the soft instead of the hard value.
        out: (C, ...).
        threads: at most so many; they change nothing in the result.
    """
    inputs = {"weight": weight, "scale": scale, "table": table}
    arrays = [number for name, array in inputs.items() for number in _array(name, array, "float32")]
    _check(_library.gq_fake_quantize(*arrays, soft, *_output("out", out), threads))


def fake_quantize_backward(
    grad: Array,
    weight: Array,
    scale: Array,
    table: Array,
    straight_through: float,
    dweight: Array,
    dscale: Array,
    dtable: Array | None,
    threads: int = 1,
) -> None:
    """dweight, dscale and, unless it is None, dtable = the gradients for ``grad``, that of the result; arrays and
    ``threads`` as in `fake_quantize`, and ``straight_through`` is the share of the identity."""
    inputs = {"grad": grad, "weight": weight, "scale": scale, "table": table}
    arrays = [number for name, array in inputs.items() for number in _array(name, array, "float32")]
    table_output = (None, 0) if dtable is None else _output("dtable", dtable)
    outputs = *_output("dweight", dweight), *_output("dscale", dscale), *table_output
    _check(_library.gq_fake_quantize_backward(*arrays, straight_through, *outputs, threads))


def encode(weight: Array, scale: Array, borders: Array, codes: Array, threads: int = 1) -> None:
    """codes, uint8 = how many of the sorted ``borders``, float32, at most 255, satisfy ``scale * border < weight``;
    weight, scale and ``threads`` as in `fake_quantize`."""
    arrays = (*_array("weight", weight, "float32"), *_array("scale", scale, "float32"))
    borders = _array("borders", borders, "float32")
    _check(_library.gq_encode(*arrays, *borders, *_output("codes", codes, "uint8"), threads))


class _RecurrentArguments(ctypes.Structure):
    _fields_ = [
        ("ih", c_void_p),
        ("hh", c_void_p),
        ("hr", c_void_p),
        ("ih_activations", c_int32),
        ("hh_activations", c_int32),
        ("hr_activations", c_int32),
        ("x", c_void_p),
        ("x_count", c_int64),
        ("steps", c_int64),
        ("h0", c_void_p),
        ("c0", c_void_p),
        ("h0_count", c_int64),
        ("c0_count", c_int64),
        ("sequences", c_int64),
        ("bias_ih", c_void_p),
        ("bias_hh", c_void_p),
        ("bias_ih_count", c_int64),
        ("bias_hh_count", c_int64),
        ("segments", c_void_p),
        ("segment_count", c_int64),
        ("out", c_void_p),
        ("h", c_void_p),
        ("c", c_void_p),
        ("out_count", c_int64),
        ("h_count", c_int64),
        ("c_count", c_int64),
        ("threads", c_int32),
    ]


class Segments:
    """How a recurrent layer goes through the rows of its sequences.

    Args:
        segments: of time, in order: the first row of x and out, the first sequence, how many sequences (neighbouring
            rows), and the row of out where the last states of these sequences begin, or None at the beginning.
    """

    def __init__(self, segments: Iterable[tuple[int, int, int, int | None]]) -> None:
        numbers = [-1 if number is None else number for segment in segments for number in segment]
        self.memory = (c_int64 * len(numbers))(*numbers)
        self.address, self.count = ctypes.addressof(self.memory), len(numbers) // 4

    @staticmethod
    @lru_cache(maxsize=64)
    def of_one_sequence(steps: int) -> Segments:
        """Those of a single sequence."""
        return Segments((step, 0, 1, step - 1 if step else None) for step in range(steps))


class Recurrent:
    """One layer and direction of an LSTM or GRU, as `gq_triton.kernels.packed_recurrent` defines it.

    Args:
        weights: weight_ih, weight_hh and, of an LSTM with projection, weight_hr, in groups of gates.
        biases: of the first two weights, float32, or nothing.
        activations: "none", "int8" or "fp8" for each of the weights: what its input is quantized to.
        threads: at most so many; they change nothing in the result.
    """

    def __init__(
        self, weights: Sequence[Weight], biases: Sequence[Array], activations: Sequence[str], threads: int = 1
    ) -> None:
        ih, hh, *hr = (weight.address for weight in weights)
        modes = [_activations("activations", value) for value in activations]
        bias_ih, bias_hh = [_array("biases", bias, "float32") for bias in biases] or [(None, 0)] * 2
        self.arrays = weights, biases
        self._arguments = _RecurrentArguments(ih=ih, hh=hh, hr=hr[0] if hr else None, threads=threads)
        self._arguments.ih_activations, self._arguments.hh_activations, *_ = modes
        self._arguments.hr_activations = modes[2] if hr else 0
        self._arguments.bias_ih, self._arguments.bias_ih_count = bias_ih
        self._arguments.bias_hh, self._arguments.bias_hh_count = bias_hh

    def __deepcopy__(self, memo: dict) -> Recurrent:
        return self  # nothing of it ever changes

    def __call__(
        self, x: Array, segments: Segments, states: Sequence[Array], out: Array, last: Sequence[Array]
    ) -> None:
        """Runs it.

        Args:
            x: (steps, inputs) float32: the steps of all sequences.
            segments: of them.
            states: h (sequences, size), and of an LSTM c (sequences, hidden), float32, before the first step.
            out: (steps, size) float32.
            last: the states after the last step, as ``states``.
        """
        arguments = _RecurrentArguments.from_buffer_copy(self._arguments)  # of this call: there may be others
        arguments.x, arguments.x_count = _array("x", x, "float32")
        arguments.steps, arguments.sequences = x.shape[0], states[0].shape[0]
        (arguments.h0, arguments.h0_count), (arguments.c0, arguments.c0_count) = _states("states", states, _array)
        arguments.segments, arguments.segment_count = segments.address, segments.count
        arguments.out, arguments.out_count = _output("out", out)
        (arguments.h, arguments.h_count), (arguments.c, arguments.c_count) = _states("last", last, _output)
        _check(_library.gq_recurrent(ctypes.addressof(arguments)))


def _states(name: str, arrays: Sequence[Array], address: Any) -> list[tuple[int | None, int]]:
    """Addresses and counts of h and c, the latter of a GRU missing."""
    return [*(address(name, array, "float32") for array in arrays), (None, 0)][:2]
