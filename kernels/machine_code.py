"""Machine code read back: what one pass of a kernel's main loop, or of a whole kernel without one, executes.

`NVIDIA.parse` reads the text of ``nvdisasm -c``, `PTX.parse` and `AMD.parse` the assembly that Triton keeps, and
`main_pass` finds the instructions of a pass: the longest path through the blocks of the loop.  Of two branches the
longer one counts, a loop within the loop counts as often as the caller knows it to be taken, and a called function
counts where it is called; so a pass is an upper bound for a warp that does not diverge.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator

__all__ = ["AMD", "NVIDIA", "PTX", "Instruction", "InstructionSet", "Pass", "main_pass"]


@dataclasses.dataclass
class Instruction:
    """One machine instruction and where control may go after it."""

    opcode: str
    target: str = ""  # label that it branches to, or calls
    falls_through: bool = True  # the next instruction may follow
    calls: bool = False
    successors: tuple[int, ...] = ()  # indices of what may follow within the function
    callee: int | None = None


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one warp executes in a pass, and outside it."""

    opcodes: list[str]
    outside: int  # instructions of the longest path through the kernel that are not in the pass
    loop: bool  # whether the pass is one of a main loop; otherwise it is the whole kernel


@dataclasses.dataclass(frozen=True)
class InstructionSet:
    """How to read one vendor's machine code."""

    pattern: re.Pattern[str]  # of a line with an instruction
    read: Callable[[re.Match[str]], Instruction]
    classify: Callable[[str], str]  # opcode -> class that is reported, or "" for plain arithmetic
    work: Callable[[str], dict[str, float]]  # opcode -> lane-slots that each lane takes of a unit

    def parse(self, text: str) -> list[Instruction]:
        """The instructions of all functions in ``text``, the kernel's entry first."""
        label = re.compile(r"^\s*([.$\w]+):(?=\s|$)", re.MULTILINE)
        found = [*self.pattern.finditer(text), *label.finditer(text)]
        code: list[Instruction] = []
        labels: dict[str, int] = {}
        for match in sorted(found, key=re.Match.start):
            if match.re is label:
                labels[match.group(1)] = len(code)
            else:
                code.append(self.read(match))
        for index, instruction in enumerate(code):
            _link(instruction, index, labels, len(code))
        return code

    def moved(self, opcode: str) -> int:
        """Bytes of device memory that a lane loads or stores."""
        access = re.fullmatch(r"(load|store) (\d+)", self.classify(opcode))
        return int(access.group(2)) // 8 if access else 0

    def stored(self, opcode: str) -> int:
        """Bytes of device memory that a lane stores."""
        return self.moved(opcode) if self.classify(opcode).startswith("store") else 0


def _link(instruction: Instruction, index: int, labels: dict[str, int], size: int) -> None:
    target = labels.get(instruction.target)
    if instruction.calls:
        instruction.callee, target = target, None
    following = index + 1 if instruction.falls_through and index + 1 < size else None
    instruction.successors = tuple(i for i in (following, target) if i is not None and i < size)


# --- control flow -----------------------------------------------------------------------------------------------------


def main_pass(code: list[Instruction], instructions: InstructionSet, trips: int = 1) -> Pass:
    """The pass of the main loop, with ``trips`` of every loop within it.

    The main loop is the innermost that stores half of what the loop around it stores to device memory, or loads half of
    what that loads where no loop stores anything.
    """
    whole = _execute(code, _reachable(code, 0), 0, 1)
    loop = _main_loop(code, instructions.stored) or _main_loop(code, instructions.moved)
    if not loop:
        return Pass(whole, 0, loop=False)
    entry = _entry(code, loop, range(len(code)))
    outside = len(whole) - len(_execute(code, loop, entry, 1))
    return Pass(_execute(code, loop, entry, trips), max(0, outside), loop=True)


def _main_loop(code: list[Instruction], traffic: Callable[[str], int]) -> set[int]:
    """Its instructions; empty where no loop has any ``traffic(opcode)``."""

    def total(part: set[int]) -> int:
        return sum(traffic(code[i].opcode) for i in part)

    found: set[int] = set()
    nodes, cut = _reachable(code, 0), None
    while True:
        loops = [part for part in _components(code, nodes, cut) if len(part) > 1]
        busiest = max(loops, key=total, default=set())
        if total(busiest) == 0 or 2 * total(busiest) < total(found):
            return found
        found = nodes = busiest
        cut = _entry(code, found, range(len(code)))


def _execute(code: list[Instruction], nodes: set[int], entry: int, trips: int) -> list[str]:
    """Opcodes along the longest path from ``entry`` within ``nodes``, with those of the functions it calls."""
    opcodes = []
    for index in _longest_path(code, nodes, entry, trips):
        opcodes.append(code[index].opcode)
        callee = code[index].callee
        if callee is not None:
            opcodes += _execute(code, _reachable(code, callee), callee, trips)
    return opcodes


def _longest_path(code: list[Instruction], nodes: set[int], entry: int, trips: int) -> list[int]:
    """Indices along the longest path from ``entry``, edges back to it cut and loops within taken ``trips`` times."""
    steps: dict[int, tuple[int, list[int], int | None]] = {}  # entry of a part -> length to the end, path, next entry
    entries: dict[int, int] = {}  # instruction -> entry of its part
    for part in _components(code, nodes, entry):
        if len(part) == 1:
            (first,) = path = list(part)
        else:
            first = entry if entry in part else _entry(code, part, nodes)
            path = _longest_path(code, part, first, trips) * trips
        onward = {entries[s] for i in part for s in code[i].successors if s in entries and s not in part}
        following = max(onward, key=lambda index: steps[index][0], default=None)
        length = len(path) + (0 if following is None else steps[following][0])
        steps[first] = length, path, following
        entries.update(dict.fromkeys(part, first))
    indices: list[int] = []
    at: int | None = entry
    while at is not None:
        _, path, at = steps[at]
        indices += path
    return indices


def _reachable(code: list[Instruction], entry: int) -> set[int]:
    seen, pending = {entry}, [entry]
    while pending:
        new = set(code[pending.pop()].successors) - seen
        seen |= new
        pending += new
    return seen


def _entry(code: list[Instruction], part: set[int], around: set[int] | range) -> int:
    """The first instruction of ``part`` that is reached from elsewhere ``around`` it."""
    return min((s for i in around if i not in part for s in code[i].successors if s in part), default=min(part))


def _components(code: list[Instruction], nodes: set[int], cut: int | None) -> Iterator[set[int]]:
    """Strongly connected parts of ``nodes`` without edges into ``cut``, each after those it leads to (Tarjan)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    closed: set[int] = set()
    for root in sorted(nodes):
        work = [] if root in order else [root]
        while work:
            index = work[-1]
            if index not in order:
                order[index] = low[index] = len(order)
                stack.append(index)
            inside = [s for s in code[index].successors if s in nodes and s != cut and s not in closed]
            new = [s for s in inside if s not in order]
            if new:
                work.append(new[0])
                continue
            work.pop()
            low[index] = min([low[index], *(low[s] for s in inside)])
            if low[index] == order[index]:
                part: set[int] = set()
                while index not in part:
                    part.add(stack.pop())
                closed |= part
                yield part


# --- NVIDIA -----------------------------------------------------------------------------------------------------------

_SASS_MEMORY = {
    "LDG": "load",
    "LDGSTS": "load",  # to shared memory
    "STG": "store",
    "LDS": "shared load",
    "LDSM": "shared load",
    "STS": "shared store",
    "STSM": "shared store",
    "LDL": "local load",
    "STL": "local store",
    "ATOM": "atomic",
    "ATOMG": "atomic",
    "RED": "atomic",
    "REDG": "atomic",
}
_SASS_CONVERSIONS = ("F2F", "F2I", "I2F", "FRND")
_SASS_FMA = re.compile(r"F(ADD|MUL|FMA)2?|H(ADD|MUL|FMA)2|IMAD|IDP")
_SASS_OTHER = re.compile(  # what goes neither to the arithmetic unit, nor is counted apart
    r"U.*|B(RA|RX|SSY|SYNC|REAK|AR)|CALL|RET|EXIT|NOP|S2R|S2UR|CS2R|LDC|LDCU|R2UR|SHFL|REDUX|DEPBAR|LDGDEPBAR|"
    r"WARPSYNC|WARPGROUP|SYNCS|MEMBAR|ERRBAR|CCTL|FENCE|\w*MMA|D(ADD|MUL|FMA|SETP|MNMX)|VOTEU?|ELECT|YIELD|NANOSLEEP"
)


def _read_sass(match: re.Match[str]) -> Instruction:
    predicate, opcode, operands = match.groups()
    label = re.search(r"`\(([^)]+)\)", operands)
    target = label.group(1) if label else ""
    kind = opcode.split(".")[0]
    if kind == "CALL" and target.startswith("$"):
        return Instruction(opcode, target, calls=True)
    if kind in ("EXIT", "RET"):
        return Instruction(opcode, falls_through=predicate is not None)
    # A call of a local label leaves a loop; BRA.DIV leaves for a slow path where a warp has diverged.
    if kind in ("BRA", "CALL") and ".DIV" not in opcode:
        conditional = predicate is not None or re.search(r"\bU?P\d", operands) is not None
        return Instruction(opcode, target, falls_through=conditional)
    return Instruction(opcode)


def _classify_sass(opcode: str) -> str:
    kind, _, suffix = opcode.partition(".")
    if kind == "MUFU":
        return "special " + suffix.split(".")[0].lower()
    if kind in _SASS_MEMORY:
        return f"{_SASS_MEMORY[kind]} {_sass_bits(opcode)}"
    if kind.endswith("MMA"):
        return "tensor tcgen05" if kind.startswith("UTC") else f"tensor {'wgmma' if kind.endswith('GMMA') else 'mma'}"
    if kind in ("BAR", "SYNCS"):
        return "barrier"
    if kind in ("SHFL", "REDUX"):
        return "shuffle"
    if re.fullmatch("D(ADD|MUL|FMA|SETP|MNMX)", kind) or "F64" in suffix:
        return "fp64"
    if kind in _SASS_CONVERSIONS:
        return "conversion"
    if re.search(r"\b(X|EX|WIDE|64|U64|S64)\b", suffix) and not kind.startswith(("LDC", "ULDC", "CS2R", "S2")):
        return "int64"  # either half of it
    return ""


def _sass_bits(opcode: str) -> int:
    """Bits that a memory instruction moves per lane."""
    width = re.search(r"\.[US]?(8|16|64|128|256)\b", opcode)
    return int(width.group(1)) if width else 32


def _work_of_sass(opcode: str) -> dict[str, float]:
    kind = opcode.split(".")[0]
    if kind == "MUFU" or kind in _SASS_CONVERSIONS or kind in ("POPC", "FLO", "BREV"):
        return {"issue": 1, "special": 1}
    if kind in _SASS_MEMORY:
        return {"issue": 1, "memory": max(1, _sass_bits(opcode) // 32)}
    if _SASS_FMA.fullmatch(kind):
        return {"issue": 1, "multiply": 1}
    return {"issue": 1} if _SASS_OTHER.fullmatch(kind) else {"issue": 1, "integer": 1}


NVIDIA = InstructionSet(
    re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P[\dT]+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE),
    _read_sass,
    _classify_sass,
    _work_of_sass,
)


# --- PTX --------------------------------------------------------------------------------------------------------------
# What the assembler was given: only compared with what it made, to see whether it has unrolled a loop.


def _read_ptx(match: re.Match[str]) -> Instruction:
    predicate, opcode, operands = match.groups()
    if opcode.startswith("bra"):
        return Instruction(opcode, operands.strip(), falls_through=predicate is not None)
    if opcode.startswith("cp.async") and (size := re.search(r", 0x([0-9a-f]+),", operands)):
        return Instruction(f"{opcode}.{int(size.group(1), 16)}")
    return Instruction(opcode, falls_through=opcode != "ret")


def _classify_ptx(opcode: str) -> str:
    access = re.match(r"(ld|st)\.global\.(?:\w+::\w+\.|\w+\.)*?(?:v(\d)\.)?[bfsu](\d+)$", opcode)
    if access:
        return f"{'load' if access[1] == 'ld' else 'store'} {int(access[2] or 1) * int(access[3])}"
    copied = re.match(r"cp\.async\..*\.(\d+)$", opcode)
    return f"load {8 * int(copied[1])}" if copied else ""


PTX = InstructionSet(
    re.compile(r"(?:^|(?<=;))[ \t]*(@!?%p\d+\s+)?([a-z][\w.:]*)([^;\n]*);", re.MULTILINE),
    _read_ptx,
    _classify_ptx,
    lambda opcode: {},
)


# --- AMD --------------------------------------------------------------------------------------------------------------
# Scalar instructions (s_...) issue beside the vector ones and take none of their time.

_GCN_SPECIAL = re.compile(r"v_(log|exp|rcp|rsq|sqrt|sin|cos)_")
_GCN_MEMORY = re.compile(r"(global|buffer|flat|scratch|ds)_(load|store|read|write|atomic)")
_GCN_SHUFFLE = re.compile(r"ds_(bpermute|permute|swizzle)|v_readlane|v_permlane")


def _read_gcn(match: re.Match[str]) -> Instruction:
    opcode, operands = match.groups()
    if opcode.startswith(("s_cbranch", "s_branch")):
        return Instruction(opcode, operands.strip(), falls_through=opcode != "s_branch")
    return Instruction(opcode, falls_through=opcode != "s_endpgm")


def _classify_gcn(opcode: str) -> str:
    special, memory = _GCN_SPECIAL.match(opcode), _GCN_MEMORY.match(opcode)
    if special:
        return f"special {special.group(1)}"
    if memory:
        place = {"ds": "shared ", "scratch": "local "}.get(memory.group(1), "")
        verb = {"read": "load", "write": "store"}.get(memory.group(2), memory.group(2))
        return f"{place}{verb} {_gcn_bits(opcode)}"
    if opcode.startswith(("v_mfma", "v_smfma")):
        return "tensor mfma"
    if opcode == "s_barrier":
        return "barrier"
    if _GCN_SHUFFLE.match(opcode) or opcode.endswith("_dpp"):
        return "shuffle"
    if opcode.startswith("v_") and "f64" in opcode:
        return "fp64"
    if opcode.startswith("v_") and re.search(r"[iub]64|addc_co|subb_co", opcode):
        return "int64"
    return "scalar" if opcode.startswith("s_") else ""


def _gcn_bits(opcode: str) -> int:
    """Bits that a memory instruction moves per lane."""
    words = re.search(r"dwordx(\d)", opcode)
    width = re.search(r"_[bu](8|16|32|64|96|128)\b", opcode)
    if words:
        return 32 * int(words.group(1))
    if width:
        return int(width.group(1))
    return 8 if "byte" in opcode else 16 if "short" in opcode else 32


def _work_of_gcn(opcode: str) -> dict[str, float]:
    if opcode.startswith("s_") or "mfma" in opcode:
        return {}
    if not opcode.startswith("v_"):
        unit = "shared" if opcode.startswith("ds_") else "memory"
        return {unit: max(1, _gcn_bits(opcode) // 32)}
    slow = _GCN_SPECIAL.match(opcode) or re.match("v_(mul_lo|mul_hi|mad_[iu]64)", opcode)
    return {"issue": 4 if slow else 1}


AMD = InstructionSet(
    re.compile(r"^\s+((?:s|v|ds|global|buffer|flat|scratch)_\w+)[ \t]*([^;\n]*)", re.MULTILINE),
    _read_gcn,
    _classify_gcn,
    _work_of_gcn,
)
