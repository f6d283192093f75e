"""Ahead-of-time compilation of every kernel for parts that need not be present, and what the machine code uses.

    python -m gq_triton.kernels.aot                    a table: kernel, part, registers, spills, shared memory
    python -m gq_triton.kernels.aot --json --bits 4    the same for a program to read

Triton carries the assemblers of all supported parts, so this runs on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from gq_triton.kernels import fake_quantize, packed_embedding, packed_linear
from gq_triton.kernels.backend import INTERPRETED, next_power_of_2, triton

__all__ = ["PARTS", "SHARED_LIMITS", "Usage", "compile_variant", "report", "usage", "variants"]

PARTS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes per block
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with one choice of its compile-time arguments."""

    name: str
    kernel: Any
    arguments: dict[str, Any]  # a type such as "*fp32" or "i64" for an argument, anything else for a compile-time value
    warps: int = 4


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the machine code of one variant uses on one part."""

    name: str
    part: str
    registers: int
    spilled: int  # bytes of local memory (NVIDIA) or spilled registers (AMD)
    shared: int  # bytes per block
    tensor_cores: bool


def variants(bits: int, dtype: str = "fp32") -> Iterator[Variant]:
    """Every kernel for codes of ``bits`` bits and weights or inputs of ``dtype`` ("fp32", "bf16" or "fp16")."""
    weight = {"weight": f"*{dtype}", "scale": "*fp32"}
    sizes = {"rows": "i32", "columns": "i32"}
    tile = {"BITS": bits, "ROWS": 1, "COLS": fake_quantize.TILE}
    narrow = {**tile, "COLS": fake_quantize.backward_tile(bits)}
    for soft in (False, True):
        name = f"fake_quantize_{'soft' if soft else 'hard'}"
        arguments = {**weight, "table": "*fp32", "out": f"*{dtype}", **sizes, "SOFT": soft, **tile}
        yield Variant(name, fake_quantize._forward_kernel, arguments)
    outputs = {"dweight": f"*{dtype}", "dscale": "*fp32", "dtable": "*fp32"}
    inputs = {"grad": f"*{dtype}", **weight, "table": "*fp32"}
    options = {"straight_through": "fp32", "TABLE_GRAD": True, "ONE_HOT": triton.language.bfloat16}
    arguments = {**inputs, **outputs, **sizes, **options, **narrow}
    yield Variant("fake_quantize_backward", fake_quantize._backward_kernel, arguments, warps=1)
    arguments = {**weight, "borders": "*fp32", "codes": "*u8", **sizes, **tile}
    yield Variant("encode", fake_quantize._encode_kernel, arguments)
    codes = {"packed": "*u8", "values": "*fp32", "scale": "*fp32"}
    operand = getattr(triton.language, DTYPES[dtype])
    for m in (1, 64):
        chosen = packed_linear.choose_blocks(m, getattr(torch, DTYPES[dtype]))
        blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), chosen, strict=True))
        tensors = {"x": f"*{dtype}", **codes, "bias": "*fp32", "out": f"*{dtype}"}
        numbers = {"m": "i32", "rows": "i32", "features": "i32", "count": "i32", "scale_stride": 1}
        options = {"HAS_BIAS": True, "EPILOGUE": "gelu", "OPERAND": operand, "BITS": bits}
        yield Variant(f"packed_linear_m{m}", packed_linear._kernel, {**tensors, **numbers, **options, **blocks})
    numbers = {"rows": "i32", "embedding_dim": "i32", "count": "i32", "scale_stride": 1}
    arguments = {"indices": "*i64", **codes, "out": "*fp32", **numbers, "BITS": bits, "BLOCK": next_power_of_2(512)}
    yield Variant("packed_embedding", packed_embedding._kernel, arguments)


def compile_variant(variant: Variant, part: str) -> Any:
    """The compiled kernel, a `triton.compiler.CompiledKernel`; pointers and sizes are taken as multiples of 16."""
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1")
    names = variant.kernel.arg_names
    runtime = {name: value for name, value in variant.arguments.items() if _is_type(value)}
    signature = {name: runtime.get(name, "constexpr") for name in names}
    constants = {name: variant.arguments[name] for name in names if name not in runtime}
    aligned = [names.index(name) for name, kind in runtime.items() if kind != "fp32"]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, constants, attributes)
    return triton.compile(
        source, target=triton.backends.compiler.GPUTarget(*PARTS[part]), options={"num_warps": variant.warps}
    )


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\*?([iu](8|16|32|64)|fp32|fp16|bf16)", value) is not None


def usage(variant: Variant, part: str) -> Usage:
    """Compile ``variant`` for ``part`` and read off what it uses."""
    compiled = compile_variant(variant, part)
    read = _read_amd if part.startswith("gfx") else _read_nvidia
    registers, spilled, tensor_cores = read(compiled.asm)
    return Usage(variant.name, part, registers, spilled, compiled.metadata.shared, tensor_cores)


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, bool]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    tensor_cores = re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma)", asm["ptx"]) is not None
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], tensor_cores


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, bool]:
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", asm["amdgcn"])}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"], "v_mfma" in asm["amdgcn"]


def report(bits: Iterable[int], dtypes: Iterable[str], parts: Iterable[str]) -> list[dict[str, Any]]:
    """One row per kernel, width, dtype and part: "bits", "dtype" and the fields of `Usage`."""
    if triton is None:
        raise RuntimeError("triton is needed to compile kernels: pip install 'gq-triton[triton]'")
    rows = []
    for width, dtype in itertools.product(bits, dtypes):
        for variant, part in itertools.product(variants(width, dtype), parts):
            rows.append({"bits": width, "dtype": dtype, **dataclasses.asdict(usage(variant, part))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time and report what they use.")
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=range(1, 9))
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    options = parser.parse_args()
    rows = report(options.bits, options.dtypes, options.parts)
    print(json.dumps(rows) if options.json else _table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    head = list(rows[0])
    cells = [head] + [[str(row[key]) for key in head] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


if __name__ == "__main__":
    main()
