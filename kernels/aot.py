"""Ahead-of-time compilation of a kernel for a part that need not be present, and what its machine code costs.

Triton carries the assemblers of all supported parts, so this runs on a machine without a GPU.

The static roofline compares two times per element (a weight, say): that of its bytes of device memory at the part's
bandwidth, and that of its instructions, in each unit of the part at full rate.  Where every share (the second over the
first) is below 1, memory is the limit.  How instructions are counted: `gq_triton.kernels.machine_code`; the parts'
figures: `gq_triton.kernels.parts`; which kernels, and what they may cost: `gq_triton.kernels.budgets`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from gq_triton.kernels.backend import INTERPRETED, cdiv, triton
from gq_triton.kernels.machine_code import AMD, NVIDIA, PTX, Instruction, Pass, main_pass
from gq_triton.kernels.parts import LATENCY, PARTS, Part

__all__ = ["Roofline", "Variant", "broken_budgets", "compile_variant", "require_compiler", "roofline"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel with one choice of its compile-time arguments, and its budget."""

    name: str
    kernel: Any
    arguments: dict[str, Any]  # a type such as "*fp32" or "i64" for an argument, anything else for a compile-time value
    bits: int | None = None  # that the arguments stand for; None: the kernel knows none
    dtype: str | None = None  # likewise
    warps: int = 4
    stages: int | None = None  # of the pipeline of loads; None: Triton's choice
    fuse: bool = True  # products and sums into one rounding
    elements: int = 0  # of a program in a pass of its main loop, or in all without one; 0: nothing is per element
    trips: int = 1  # that a loop within a pass is taken, as far as known
    read: float = 0.0  # bytes of device memory per element
    written: float = 0.0  # bytes of device memory per element
    allowed: dict[str, float] = dataclasses.field(default_factory=dict)  # lane-instructions per element, by part
    overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # arguments that differ, by part
    spills: dict[str, int] = dataclasses.field(default_factory=dict)  # that are known, by part; elsewhere none
    tensor_cores: bool | None = False  # whether they are meant; None: where the part has any for the dtype
    wide: tuple[str, ...] = ()  # parts where all of an element's bytes are meant to move in accesses of 16
    present: dict[str, str] = dataclasses.field(default_factory=dict)  # class of instructions that is meant, by part
    absent: dict[str, str] = dataclasses.field(default_factory=dict)  # pattern of classes that are not meant, by part
    parts: tuple[str, ...] = tuple(PARTS)  # that can run it
    float64: bool = False  # whether float64 is meant


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What the machine code of one variant uses on one part, and what an element costs there."""

    name: str
    part: str
    registers: int  # per lane
    spilled: int  # bytes of local memory (NVIDIA) or registers (AMD), per lane
    shared: int  # bytes per block
    resident: int  # warps of a processor at once, by registers, shared memory and warps per block
    loop: bool  # a pass is one of the main loop; otherwise the whole kernel
    executed: int  # instructions of a warp in a pass
    outside: int  # instructions of a warp outside it
    classes: dict[str, float]  # lane-instructions per element (without elements: instructions per pass) by class
    logarithms: float  # per element, in the intermediate code: the libraries' are not one instruction
    exponentials: float  # per element, likewise
    instructions: float  # lane-instructions per element
    bytes: float  # of device memory per element, as counted on paper
    wide: float  # share of those bytes moved in accesses of 16 bytes
    shares: dict[str, float]  # time of the instructions in a unit over time of the bytes
    in_flight: float  # bytes that resident programs ask for in one pass, over bandwidth x `LATENCY`


def compile_variant(variant: Variant, part: str) -> Any:
    """The compiled kernel, a `triton.compiler.CompiledKernel`; pointers and sizes are taken as multiples of 16."""
    require_compiler()
    names, arguments = variant.kernel.arg_names, variant.arguments | variant.overrides.get(part, {})
    fixed = {parameter.name for parameter in variant.kernel.params if parameter.is_constexpr}
    runtime = {name: value for name, value in arguments.items() if name not in fixed and _is_type(value)}
    signature = {name: runtime.get(name, "constexpr") for name in names}
    constants = {name: arguments[name] for name in names if name not in runtime}
    aligned = [names.index(name) for name, kind in runtime.items() if not kind.startswith("fp")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, constants, attributes)
    options = {"num_warps": variant.warps, "enable_fp_fusion": variant.fuse}
    if variant.stages is not None:
        options["num_stages"] = variant.stages
    target = triton.backends.compiler.GPUTarget(*PARTS[part].target)
    return triton.compile(source, target=target, options=options)


def require_compiler() -> None:
    """Raise where kernels cannot be compiled."""
    if triton is None:
        raise ModuleNotFoundError("triton is needed to compile kernels: pip install 'gq-triton[triton]'")
    if INTERPRETED:
        raise ValueError("TRITON_INTERPRET is 1, which lets kernels run but not be compiled; unset it")


def _is_type(value: Any) -> bool:
    return (
        isinstance(value, str) and re.fullmatch(r"\*?([iu](8|16|32|64)|fp64|fp32|fp16|bf16|fp8e4nv)", value) is not None
    )


def roofline(variant: Variant, part: str) -> Roofline:
    """Compile ``variant`` for ``part`` (a key of `PARTS`) and count what an element costs."""
    compiled, machine = compile_variant(variant, part), PARTS[part]
    read = _read_nvidia if machine.instructions is NVIDIA else _read_amd
    registers, spilled, code = read(compiled.asm)
    done = main_pass(code, machine.instructions, variant.trips)
    blocks = _resident(machine, registers, compiled.metadata.shared, variant.warps)
    elements = variant.elements * _unrolled(variant, compiled.asm, machine, done)
    scale = machine.target[2] * variant.warps / elements if elements else 1.0
    traffic = variant.read + variant.written
    classes = collections.Counter(machine.instructions.classify(opcode) for opcode in done.opcodes)
    wide = sum(moved for opcode in done.opcodes if (moved := machine.instructions.moved(opcode)) >= 16)
    return Roofline(
        name=variant.name,
        part=part,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        resident=blocks * variant.warps,
        loop=done.loop,
        executed=len(done.opcodes),
        outside=done.outside,
        classes={name: count * scale for name, count in sorted(classes.items()) if name},
        logarithms=_calls(compiled.asm["ttir"], "log|lg", variant.elements),
        exponentials=_calls(compiled.asm["ttir"], "exp|ex", variant.elements),
        instructions=scale * (len(done.opcodes) - classes["scalar"]),
        bytes=traffic,
        wide=min(1.0, scale * wide / traffic) if traffic else 0.0,
        shares=_shares(machine, done, scale, traffic) if traffic else {},
        in_flight=blocks * elements * variant.read * machine.processors / (machine.bandwidth * LATENCY),
    )


def broken_budgets(variant: Variant, used: Roofline) -> list[str]:
    """What ``variant`` uses that it may not."""
    limit = PARTS[used.part].shared_limit
    allowed = variant.allowed.get(used.part, math.inf)
    tensor_cores = any(name.startswith("tensor") for name in used.classes)
    present, absent = variant.present.get(used.part), variant.absent.get(used.part, "-")
    strange = [name for name in used.classes if re.fullmatch(absent, name)]
    rules = {
        f"spills {used.spilled}": used.spilled > variant.spills.get(used.part, 0),
        f"{used.shared} > {limit} bytes of shared memory": used.shared > limit,
        f"{used.instructions:.1f} > {allowed:g} instructions": used.instructions > allowed,
        f"{used.logarithms:g} logarithms": variant.elements > 0 and used.logarithms > 1,
        f"{used.exponentials:g} exponentials": variant.elements > 0 and used.exponentials > 1,
        f"{used.wide:.0%} in 16 bytes": used.part in variant.wide and used.wide < 1,
        "tensor cores": tensor_cores and variant.tensor_cores is False,
        "no tensor cores": not tensor_cores and variant.tensor_cores is True,
        f"no {present}": present is not None and present not in used.classes,
        ", ".join(strange): strange != [],
        "float64": "fp64" in used.classes and not variant.float64,
    }
    return [name for name, broken in rules.items() if broken]


def _unrolled(variant: Variant, asm: dict[str, Any], machine: Part, done: Pass) -> int:
    """How many passes the assembler has made one of: how many times the traffic of the loop that it was given."""
    if not done.loop or "ptx" not in asm:
        return 1
    given = main_pass(PTX.parse(asm["ptx"]), PTX, variant.trips)
    before, after = sum(map(PTX.moved, given.opcodes)), sum(map(machine.instructions.moved, done.opcodes))
    return max(1, round(after / before)) if before else 1


def _shares(machine: Part, done: Pass, scale: float, traffic: float) -> dict[str, float]:
    """Time of the instructions in each unit over the time of ``traffic`` bytes per element."""
    work: collections.Counter[str] = collections.Counter()
    for opcode in done.opcodes:
        work.update(machine.instructions.work(opcode))
    clocks = traffic / machine.bandwidth * machine.clock * machine.processors  # of a processor, per element
    return {unit: scale * work[unit] / (lanes * clocks) for unit, lanes in machine.lanes.items()}


def _resident(machine: Part, registers: int, shared: int, warps: int) -> int:
    """Blocks on a processor at once."""
    allocated = cdiv(registers * machine.target[2], machine.granule) * machine.granule
    limits = [machine.registers // (allocated * warps), machine.warps // warps, machine.blocks]
    if shared:
        limits.append(machine.shared // (shared + machine.shared_reserved))
    return min(limits)


# --- what the compiler says -------------------------------------------------------------------------------------------


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, list[Instruction]]:
    """(registers per lane, bytes spilled, code)."""
    used = _cuda_tool("cuobjdump", asm["cubin"], "--dump-resource-usage")
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    code = NVIDIA.parse(_cuda_tool("nvdisasm", asm["cubin"], "--print-code"))
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], code


def _cuda_tool(name: str, cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, list[Instruction]]:
    """(registers per lane, registers spilled, code)."""
    text = asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return numbers["vgpr_count"], numbers["vgpr_spill_count"], AMD.parse(text)


def _calls(ttir: str, function: str, elements: int) -> float:
    """Calls of ``function``, of any base, per element; without elements, calls on tensors.

    It is counted here because a logarithm of a library is no single instruction of the machine.
    """
    call = rf'(?:math\.|symbol = "__\w*?|asm ".*?)(?:{function})[\w.]*.*?tensor<([\dx]+)x[bf]'
    sizes = [math.prod(map(int, shape.split("x"))) for shape in re.findall(call, ttir)]
    return sum(sizes) / elements if elements else float(len(sizes))
