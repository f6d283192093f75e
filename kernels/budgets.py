"""Every kernel of the package, as it is compiled for parts that need not be present, and what it may cost there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from gq_triton.kernels import activations, joint_loss, packed_conv, packed_embedding, packed_recurrent
from gq_triton.kernels import fake_quantize_triton as kernels
from gq_triton.kernels import packed_linear_triton as linear
from gq_triton.kernels import tables as table_kernels
from gq_triton.kernels.aot import Variant, broken_budgets, require_compiler, roofline
from gq_triton.kernels.backend import next_power_of_2, tl
from gq_triton.kernels.parts import PARTS
from gq_triton.kernels.tiles import step_columns

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
            found += [*_fake_quantize(width, dtype), *_packed_linear(width, dtype), *_packed_recurrent(width, dtype)]
            found.append(_packed_conv(width, dtype))
        found += [*_joint_loss(dtype), *_activations(dtype)]
    for width in bits:
        found += [*_tables(width), _packed_embedding(width), *_packed_linear_of_bytes(width)]
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
    allowed = dict(zip(PARTS, ALLOWED[row], strict=True)) if row in ALLOWED else {}
    sizes = {"warps": tile.warps, "elements": tile.rows * tile.columns}
    return _variant(name, kernel, arguments, allowed=allowed, **sizes, **options)


# --- packed weights ---------------------------------------------------------------------------------------------------

# Lane-instructions per weight on NVIDIA's parts, by bits from 1 to 8, a little above the most of any dtype of 16 bits,
# part and Triton 3.6 to 3.9.  For small M, 6.5 a byte are 3.2, 1.6 and 0.8 at 4, 2 and 1 bits.
#
# - 1 bit misses that: a register of two operands takes a shift and a logic operation, 1 per weight, and as much time on
#   tensor cores goes to sums of x alone as to products. Of bytes, four of which share a register, it misses by a fifth.
# - 2 bits and 4 bits keep it; there, byte permutations take most.
# - From 5 bits on, a code is a load, an address and a conversion of its own.
PACKED = {
    "gemv": (1.5, 1.65, 2.0, 3.2, 6.7, 6.7, 7.1, 6.0),
    "gemv_small": (2.2, 2.1, 2.5, 3.8, 7.2, 7.3, 7.6, 6.6),
    "gemv_tokens": (2.9, 2.5, 2.8, 4.1, 7.4, 7.5, 7.9, 7.0),
    "gemv_small_tokens": (4.6, 3.4, 3.7, 5.0, 9.0, 8.4, 8.8, 7.8),
    "gemv_int8": (1.0, 0.8, 1.15, 1.9, 8.6, 8.6, 8.6, 8.0),
    "lstm_step": (2.2, 2.1, 2.5, 3.8, 6.9, 6.9, 7.3, 6.5),
    "lstm_step_tokens": (3.0, 2.6, 3.0, 4.3, 7.5, 7.7, 8.0, 7.2),
    "gru_step": (2.95, 2.9, 3.4, 5.1, 9.1, 9.2, 9.7, 8.9),  # a fourth block of rows is padding
}
WIDE_PARTS = ("sm_90", "sm_100")  # whose tensor cores take operands from shared memory, those of e4m3 among them
MMA = {**dict.fromkeys(NVIDIA_PARTS, "tensor mma"), "gfx942": "tensor mfma"}
GEMM_MMA = MMA | {"sm_90": "tensor wgmma", "sm_100": "tensor tcgen05"}  # the latter not of int8 before Triton 3.9
LARGE, SMALL = 8192, 512  # rows and columns, for which plans are compiled


def _packed_linear(bits: int, dtype: str) -> Iterator[Variant]:
    yield from _linear("gemv", bits, "float", dtype, 1, LARGE)
    yield from _linear("gemv_tokens", bits, "float", dtype, 32, LARGE)
    yield from _linear("gemv_small", bits, "float", dtype, 1, SMALL)
    yield from _linear("gemv_small_tokens", bits, "float", dtype, 32, SMALL)
    yield from _linear("gemm", bits, "float", dtype, 4096, LARGE)
    yield from _linear("gemm_small", bits, "float", dtype, 256, SMALL)


def _packed_linear_of_bytes(bits: int) -> Iterator[Variant]:
    """8-bit activations with the codebook of their kind."""
    yield from _linear("gemv_int8", bits, "int8", "byte", 1, LARGE)
    yield from _linear("gemm_int8", bits, "int8", "byte", 4096, LARGE)
    yield from _linear("gemm_fp8", bits, "fp8", "byte", 4096, LARGE)


def _linear(name: str, bits: int, form: str, operand: str, tokens: int, size: int) -> Iterator[Variant]:
    """What runs for ``tokens`` and a weight (size, size), a variant for each part: plans are made for one."""
    tensors = {"x": _OPERANDS.get((operand, form), f"*{operand}"), "tiles": "*i32", "codebook": _CODEBOOKS[form]}
    tensors |= dict.fromkeys(("token_scale", "scale", "bias", "parts"), "*fp32")
    tensors["out"] = "*bf16" if operand == "byte" else f"*{operand}"
    numbers = dict.fromkeys(("tokens", "rows", "columns"), "i32") | {"scale_stride": 1}
    for part in WIDE_PARTS if form == "fp8" else PARTS:
        kind = "fp8" if form == "fp8" else operand
        machine = PARTS[part]
        plan = linear.plan(tokens, size, size, bits, machine.processors, kind, wide=part in WIDE_PARTS)
        options = _specialization(bits, form, operand, part)
        options |= {"HAS_BIAS": True, "EPILOGUE": "gelu", "PARTS": plan.parts}
        labels = {"bits": bits, "dtype": None if operand == "byte" else operand, "parts": (part,)}
        make = _gemv if plan.kernel == "gemv" else _gemm
        variant = make(name, {**tensors, **numbers, **options}, plan, **labels)
        stages = plan.fitting_stages(bits, operand, machine.shared_limit - 2048)
        yield dataclasses.replace(variant, warps=plan.warps, stages=stages, tensor_cores=None)
        if plan.parts > 1:
            tile = dict(zip(("R", "T"), linear.SUM_TILE, strict=True))
            yield _variant(f"{name}_sums", linear._sum_kernel, {**tensors, **numbers, **options, **tile}, **labels)


def _gemv(name: str, arguments: dict[str, Any], plan: linear.Plan, **labels: Any) -> Variant:
    bits, operand, way = arguments["BITS"], arguments["OPERAND"], arguments["WAY"]
    across = plan.warps // plan.row_warps
    tile = {"RB": plan.rows // 16 // plan.row_warps, "MB": plan.tokens // 8, "WN": plan.row_warps, "WK": across}
    # A pipeline of loads goes through shared memory, and so do fragments of float32, whose order is another.
    absent = ["shuffle"] + (["shared.*"] if plan.stages == 1 and operand != "fp32" else [])
    if way != "gather":
        absent.append("load (8|16|32)" if operand == "byte" else "load (8|16|32|64)")
    return _variant(
        name,
        linear._gemv_kernel,
        arguments | tile,
        elements=plan.rows * across * step_columns(bits) * _unrolled(way),
        read=bits / 8,
        allowed=_allowed(name, bits, operand),
        wide=NVIDIA_PARTS,
        present=MMA if plan.tokens > 8 else dict.fromkeys(NVIDIA_PARTS, "tensor mma"),
        spills=_spilled(bits, operand, plan.tokens),
        absent=dict.fromkeys(NVIDIA_PARTS, "|".join(absent)),
        **labels,
    )


def _gemm(name: str, arguments: dict[str, Any], plan: linear.Plan, **labels: Any) -> Variant:
    way = arguments["WAY"].replace("sign", "permute" if arguments["ASM"] else "gather")
    tile = {"BM": plan.tokens, "BN": plan.rows, "WAY": way}
    return _variant(
        name,
        linear._gemm_kernel,
        arguments | tile,
        elements=plan.rows * step_columns(arguments["BITS"]),
        present=GEMM_MMA if arguments["FORM"] != "int8" else {k: v for k, v in GEMM_MMA.items() if k != "sm_100"},
        absent=dict.fromkeys(PARTS, "local.*"),
        spills=dict.fromkeys(NVIDIA_PARTS, 320),  # of GELU, once; the main loop is held to none
        **labels,
    )


def _allowed(name: str, bits: int, operand: str) -> dict[str, float]:
    limits = PACKED.get(name) if operand != "fp32" else None
    return dict.fromkeys(NVIDIA_PARTS, limits[bits - 1]) if limits else {}


def _spilled(bits: int, operand: str, tokens: int) -> dict[str, int]:
    """What is known to spill: float32, which is three products in one; a little at odd widths, more with many tokens;
    and on MI300X, whose tensor cores take no fewer than 16 tokens, so that lanes multiply and hold all sums."""
    little = 160 if tokens > 8 else 16
    known = 1 << 12 if operand == "fp32" else 0 if bits in (2, 4) else little
    return dict.fromkeys(NVIDIA_PARTS, known) | {"gfx942": 1 << 14}


def _unrolled(way: str) -> int:
    """Steps in a pass of `multiply`'s loop."""
    return 1 if way == "gather" else 2


_OPERANDS = {("byte", "int8"): "*i8", ("byte", "fp8"): "*fp8e4nv"}
_CODEBOOKS = {"float": "*fp32", "int8": "*i8", "fp8": "*u8"}


def _specialization(bits: int, form: str, operand: str, part: str) -> dict[str, Any]:
    nvidia = part in NVIDIA_PARTS
    return linear.specialization(bits, form, operand, permutes=nvidia, asm=nvidia)


def _packed_recurrent(bits: int, dtype: str) -> Iterator[Variant]:
    """Steps of layers whose weights are all of this width."""
    tensors = dict.fromkeys(("x", "h", "carry", "c", "out", "last", "next_c", "bias_ih", "bias_hh", "m"), f"*{dtype}")
    numbers = ("x_row", "h_row", "carry_row", "m_row", "out_row", "token", "batch", "columns", "size", "hidden")
    shared, amd = (_specialization(bits, "float", dtype, part) for part in ("sm_90", "gfx942"))
    amd |= {"WAY_IH": amd["WAY"], "WAY_HH": amd["WAY"]}
    weight = {"tiles": "*i32", "codebook": "*fp32", "scale": "*fp32"}
    weight |= {name: shared[name] for name in ("BITS", "FORM", "WAY", "UNIT")}
    weights = {name + suffix: value for name, value in weight.items() for suffix in ("_ih", "_hh", "_IH", "_HH")}
    strides = dict.fromkeys(("scale_stride", "scale_ih_stride", "scale_hh_stride"), 1)
    arguments = {**tensors, **dict.fromkeys(numbers, "i32"), **shared, **weight, **weights, **strides}
    arguments |= {"PROJECTED": False, "HAS_BIAS": True}
    for name, gates, fused, across, mb in _STEPS:
        across //= 2 if dtype == "fp32" else 1
        kernel = packed_recurrent._step_kernel if gates > 1 else packed_recurrent._project_kernel
        arguments |= {"GATES": gates, "FUSED": fused, "WK": across, "MB": mb}
        yield _variant(
            name,
            kernel,
            arguments,
            bits=bits,
            dtype=dtype,
            warps=across * (4 if gates > 1 else 1),
            stages=1,
            elements=16 * gates * across * step_columns(bits) * _unrolled(shared["WAY"]),
            read=bits / 8,
            allowed=_allowed(name, bits, dtype),
            tensor_cores=None,
            present=MMA if mb > 1 else dict.fromkeys(NVIDIA_PARTS, "tensor mma"),
            spills=_spilled(bits, dtype, 8 * mb),
            absent=dict.fromkeys(NVIDIA_PARTS, "shuffle" if dtype == "fp32" else "shuffle|shared.*"),
            overrides={"gfx942": {key: value for key, value in amd.items() if key in kernel.arg_names}},
        )


_STEPS = (  # gates, whether the product with W_ih is part of it, warps that share columns, blocks of tokens
    ("lstm_step", 4, True, 4, 1),
    ("lstm_step_tokens", 4, False, 4, 2),
    ("gru_step", 3, False, 4, 1),
    ("lstm_projection", 1, False, 16, 1),
)


def _packed_conv(bits: int, dtype: str) -> Variant:
    tensors = {"x": f"*{dtype}", "tiles": "*u8", "codebook": "*fp32", "scale": "*fp32", "bias": "*fp32"}
    numbers = dict.fromkeys(packed_conv._kernel.arg_names, "i32")
    strides = {"x_channel_stride": 1, "out_channel_stride": 1, "stride": 1, "dilation": 1, "scale_stride": 1}
    channels, times = packed_conv.choose_tile(512, 1000, channels_last=True)
    options = {"HAS_BIAS": True, "BITS": bits, "CHANNELS": channels, "TIMES": times}
    arguments = {**numbers, **tensors, "out": f"*{dtype}", **strides, **options}
    return _variant("depthwise_conv", packed_conv._kernel, arguments, bits=bits, dtype=dtype)


def _activations(dtype: str) -> Iterator[Variant]:
    tokens, block, warps = activations.choose_tile(512, transposed=False)
    numbers = dict.fromkeys(("inner", "features", "outer_stride", "inner_stride"), "i32") | {"feature_stride": 1}
    for name, out, fake in (("quantize_tokens", "*i8", False), ("fake_quantize_tokens", f"*{dtype}", True)):
        tensors = {"x": f"*{dtype}", "out": out, "scales": "*fp32"}
        options = {"FP8": True, "FAKE": fake, "TOKENS": tokens, "BLOCK": block}
        yield _variant(name, activations._kernel, {**tensors, **numbers, **options}, dtype=dtype, warps=warps)


def _packed_embedding(bits: int) -> Variant:
    tensors = {"indices": "*i64", "tiles": "*u8", "codebook": "*fp32", "scale": "*fp32", "out": "*fp32"}
    numbers = dict.fromkeys(("rows", "embedding_dim", "blocks", "group_rows", "group_span"), "i32")
    numbers["scale_stride"] = 1
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
