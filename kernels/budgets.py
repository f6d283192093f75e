"""Every kernel of the package, as it is compiled for parts that need not be present, and what it may cost there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gq_triton.kernels import fake_quantize_triton as kernels
from gq_triton.kernels import joint_loss, packed_embedding, packed_linear
from gq_triton.kernels import tables as table_kernels
from gq_triton.kernels.aot import Variant, broken_budgets, require_compiler, roofline
from gq_triton.kernels.backend import next_power_of_2, tl
from gq_triton.kernels.parts import PARTS

__all__ = ["DTYPES", "measure", "variants"]

NVIDIA_PARTS = ("sm_80", "sm_90", "sm_100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# Lane-instructions per weight on (sm_80, sm_90, sm_100, gfx942), the most of any width, dtype and Triton 3.6 to 3.9.
# An H100 issues 8.9 in the time of a byte.  With 6.5 a byte as the goal, a forward pass may take 52 in float32 and 26
# in 16 bits, a backward pass 78 and 39; what is above it is what the kernels take today.
ALLOWED = {
    "fake_quantize_hard": (47, 47, 44, 71),
    "fake_quantize_soft": (87, 91, 90, 99),
    "fake_quantize_backward": (107, 109, 100, 108),
    "fake_quantize_backward_table": (219, 218, 195, 320),
    "fake_quantize_backward_table_wide": (516, 536, 416, 1186),  # above 5 bits: a product for each of three sums
    "encode": (78, 80, 80, 78),  # a bisection for every weight; runs once, at conversion
}


def measure(variant: Variant, part: str) -> dict[str, Any]:
    """The fields of `Roofline` with "bits", "dtype" and "broken", the budgets that it does not keep."""
    used = roofline(variant, part)
    row = {"bits": variant.bits, "dtype": variant.dtype, **dataclasses.asdict(used)}
    return row | {"broken": broken_budgets(variant, used)}


def variants(bits: Iterable[int], dtypes: Iterable[str]) -> list[Variant]:
    """Every kernel, for codes of every one of ``bits`` and weights or inputs of every one of ``dtypes``."""
    require_compiler()
    found = []
    for dtype in dtypes:
        for width in bits:
            found += [*_fake_quantize(width, dtype), *_packed_linear(width, dtype)]
        found += _joint_loss(dtype)
    for width in bits:
        found += [*_tables(width), _packed_embedding(width)]
    return [*found, *_lattice(), _sums()]


def _fake_quantize(bits: int, dtype: str) -> Iterator[Variant]:
    size = DTYPES[dtype].itemsize
    tensors = {"matrices": "*i64", "plan": "*i64", "lookups": "*u8", "identity": "*bf16"}
    tensors |= dict.fromkeys(("scale", "tables", "dscale", "dtables"), "*fp32")
    types = dict.fromkeys(("WEIGHT", "OUT", "GRAD"), _type(dtype))
    sizes = {"BITS": bits, "ALIGN": kernels.ALIGN, "SIZE": kernels.one_hot_size(bits), "HALVES": 8}
    common = {**tensors, **types, **sizes, "straight_through": "fp32"}
    labels = {"bits": bits, "dtype": dtype}
    # Tiles are cut for 16 bytes a lane of NVIDIA's warps; AMD's have twice the lanes.
    forward = {**labels, "read": size, "written": size, "wide": tuple(PARTS) if size == 4 else NVIDIA_PARTS}
    for name, soft in (("hard", False), ("soft", True)):
        arguments = {**common, "SOFT": soft}
        yield _tiled(f"fake_quantize_{name}", kernels._forward_kernel, arguments, kernels.FORWARD, **forward)
    backward = {**forward, "read": 2 * size, "spills": {"sm_90": 8}}  # in float32 under Triton 3.6
    arguments = {**common, "TABLE_GRAD": False}
    yield _tiled("fake_quantize_backward", kernels._backward_kernel, arguments, kernels.BACKWARD, **backward)
    backward |= {"tensor_cores": bits > 1, "spills": {}}  # the sums of a single cell are plain
    backward["overrides"] = {"gfx942": {"HALVES": 16}}
    if bits == 5:
        backward["spills"] = {"sm_80": 8, "sm_100": 8}
    name = "fake_quantize_backward_table"
    arguments, tile = {**common, "TABLE_GRAD": True}, kernels.table_grad_tile(bits)
    yield _tiled(name, kernels._backward_kernel, arguments, tile, **backward)
    unaligned = {**backward, "wide": ()}
    yield _tiled(f"{name}_unaligned", kernels._backward_kernel, {**arguments, "ALIGN": 1}, tile, **unaligned)
    tensors = {"weight": f"*{dtype}", "scale": "*fp32", "borders": "*fp32", "codes": "*u8"}
    arguments = {**tensors, "rows": "i32", "columns": "i32", "BITS": bits}
    yield _tiled("encode", kernels._encode_kernel, arguments, kernels.FORWARD, **labels, read=size, written=1)


def _tiled(name: str, kernel: Any, arguments: dict[str, Any], tile: kernels.Tile, **options: Any) -> Variant:
    """A kernel that goes over weights tile by tile."""
    arguments = {**arguments, "ROWS": tile.rows, "COLS": tile.columns}
    row = f"{name}_wide" if options["bits"] > 5 and f"{name}_wide" in ALLOWED else name
    allowed = dict(zip(PARTS, ALLOWED[row], strict=True)) if row in ALLOWED else None
    sizes = {"warps": tile.warps, "elements": tile.rows * tile.columns}
    return _variant(name, kernel, arguments, allowed=allowed, **sizes, **options)


def _packed_linear(bits: int, dtype: str) -> Iterator[Variant]:
    tensors = dict.fromkeys(("values", "scale", "bias"), "*fp32")
    tensors |= {"x": f"*{dtype}", "packed": "*u8", "out": f"*{dtype}"}
    numbers = {"m": "i32", "rows": "i32", "features": "i32", "count": "i32", "scale_stride": 1}
    options = {"HAS_BIAS": True, "EPILOGUE": "gelu", "OPERAND": _type(dtype), "BITS": bits}
    for m in (1, 64):
        blocks = dict(
            zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), packed_linear.choose_blocks(m, DTYPES[dtype]), strict=True)
        )
        arguments = {**tensors, **numbers, **options, **blocks}
        yield Variant(
            f"packed_linear_m{m}", packed_linear._kernel, arguments, bits, dtype, tensor_cores=_tensor_cores(dtype)
        )


def _packed_embedding(bits: int) -> Variant:
    tensors = {"indices": "*i64", "packed": "*u8", "values": "*fp32", "scale": "*fp32", "out": "*fp32"}
    numbers = {"rows": "i32", "embedding_dim": "i32", "count": "i32", "scale_stride": 1}
    options = {"BITS": bits, "BLOCK": next_power_of_2(512)}
    return Variant("packed_embedding", packed_embedding._kernel, {**tensors, **numbers, **options}, bits)


def _joint_loss(dtype: str) -> Iterator[Variant]:
    lengths = {"targets": "*i64", "logit_lengths": "*i64", "target_lengths": "*i64"}
    names = ("plane", "first_utterance", "first_frame", "frames", "all_frames", "rows", "width", "vocabulary", "blank")
    common = {**lengths, **dict.fromkeys(names, "i32")}
    inputs = dict.fromkeys(("encoded", "predicted", "hidden", "weight", "bias", "dlogits"), f"*{dtype}")
    tile = dict(zip(("FRAMES", "ROWS", "BLOCK_J"), joint_loss.HIDDEN_TILE, strict=True))
    yield _variant("joint_hidden", joint_loss._hidden_kernel, {**inputs, **common, **tile}, dtype=dtype)
    chosen = joint_loss.choose_tile(DTYPES[dtype])
    tile = {"FRAMES": chosen.frames, "ROWS": chosen.rows, "BLOCK_V": chosen.labels, "BLOCK_J": chosen.depth}
    options = {"HAS_BIAS": True, "OPERAND": _type(dtype), "PRECISION": "ieee", "LEAST": joint_loss.NEGLIGIBLE, **tile}
    sums = dict.fromkeys(("lattice", "losses", "grad"), "*fp32")
    arguments = {**inputs, **common, **sums, **options}
    products = {"dtype": dtype, "warps": chosen.warps, "tensor_cores": _tensor_cores(dtype)}
    yield _variant("joint_edges", joint_loss._edges_kernel, arguments, **products)
    yield _variant("joint_logit_grad", joint_loss._logit_grad_kernel, arguments, **products)


def _lattice() -> Iterator[Variant]:
    tensors = {"lattice": "*fp32", "losses": "*fp32", "logit_lengths": "*i64", "target_lengths": "*i64"}
    common = {**tensors, **dict.fromkeys(("plane", "all_frames", "rows"), "i32")}
    for block in (64, 1024):
        arguments = {**common, "BLOCK": block}
        warps = joint_loss.lattice_warps(block)
        yield _variant(f"joint_lattice_{block}", joint_loss._lattice_kernel, arguments, warps=warps)


def _tables(bits: int) -> Iterator[Variant]:
    names = ("centroids", "mu", "hardness", "out", "grad", "dcentroids", "dmu")
    arguments = {**dict.fromkeys(names, "*fp32"), "CODEBOOK": "int8", "BITS": bits}
    options = {"bits": bits, "warps": table_kernels.warps(1 << bits), "fuse": False, "float64": True}
    yield _variant("tables", table_kernels._forward_kernel, arguments, **options)
    yield _variant("tables_backward", table_kernels._backward_kernel, arguments, **options)
    arguments = {"tables": "*fp32", "lookups": "*u8", "BITS": bits}
    yield _variant("tables_lookup", kernels._lookup_kernel, arguments, bits=bits)


def _sums() -> Variant:
    arguments = {"partial": "*fp32", "segments": "*i64", "out": "*fp32"}
    return _variant(
        "partial_sums", kernels._sum_kernel, arguments | dict(zip(("COUNT", "WIDTH"), kernels.SUM, strict=True))
    )


def _variant(name: str, kernel: Any, arguments: dict[str, Any], **options: Any) -> Variant:
    """A variant that takes of ``arguments`` what its kernel has."""
    return Variant(name, kernel, {key: arguments[key] for key in kernel.arg_names}, **options)


def _type(dtype: str) -> Any:
    return getattr(tl, str(DTYPES[dtype]).removeprefix("torch."))


def _tensor_cores(dtype: str) -> bool | None:
    """Products of float32 are not rounded, for which only some parts have tensor cores."""
    return None if dtype == "fp32" else True
