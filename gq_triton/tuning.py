"""Plans of the packed linear layer, measured on a GPU, kept in a file, and used instead of those of the built-in rule.

A file is JSON: ``{"format", "version", "device", "versions", "plans": [{fields of Case, "plan": {fields of Plan}, "ms",
"rule_ms"}]}``, where ``plan`` was the fastest, at ``ms``, and the rule's own took ``rule_ms``. It serves the GPUs named
in ``device``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.files import save_json
from gq_triton.kernels import packed_linear_triton as kernels
from gq_triton.kernels.packed_linear_triton import Plan

__all__ = ["DTYPES", "Case", "Tuned", "load_tuned", "tune"]

FORMAT, VERSION = "gq_triton tuned plans", 1
DTYPES = {name: dtype for dtype, name in kernels.OPERANDS.items()} | {"byte": torch.bfloat16}  # by operand
TOLERANCE = 0.02  # of the largest output, between two plans: orders of summation differ by far less
RESIDENT = 0.25  # of the L2 cache: smaller weights are taken to stay in it from one call to the next


class Case(NamedTuple):
    """A product to find a plan for.

    Attributes:
        tokens: M, a power of two; its plan serves smaller M too, down to the next power of two.
        rows, columns: of the weight.
        bits: width of a code, 1 to 8.
        operand: a key of `DTYPES`: dtype of the activations, or "byte" where they are quantized to 8 bits.
    """

    tokens: int
    rows: int
    columns: int
    bits: int
    operand: str


class Tuned(NamedTuple):
    """The fastest plan of a case; milliseconds."""

    case: Case
    plan: Plan
    ms: float
    rule_ms: float


def load_tuned(path: str | Path) -> None:
    """Makes packed linear layers use the plans in ``path``, which `gq-triton tune` wrote, wherever they fit.

    Replaces what an earlier call loaded. Results may differ by rounding: plans sum in different orders.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, damaged, or was measured on another GPU than this machine's.
    """
    path, gpu = Path(path), _present_gpu()
    measured_on, entries = _read(path)
    if measured_on["device"] != gpu.name:
        raise ValueError(f"{path} was measured on {measured_on['device']}, and this machine has {gpu.name}")
    found = _parse(path, entries, gpu.multi_processor_count)
    kernels.use_tuned({kernels.tuned_key(torch.device("cuda"), *tuned.case): tuned.plan for tuned in found})


def tune(
    cases: Sequence[Case], path: str | Path, timer: Callable[[Case, Plan], float] | None = None
) -> Iterator[Tuned]:
    """Finds the fastest plan of each case, and writes ``path`` after each; cases that it holds already are not timed.

    Args:
        cases: what to time.
        path: of the file; one that exists is gone on with.
        timer: milliseconds of a case under a plan, infinity where it cannot run. Default: `time_plan`.

    Yields:
        The plans, in the order of ``cases``.

    Raises:
        ValueError: there is no GPU, or ``path`` is no such file, or of another GPU or other versions.
        RuntimeError: the rule's own plan does not run a case.
    """
    path, gpu = Path(path), _present_gpu()
    measured_on, known = {"device": gpu.name, "versions": _versions()}, {}
    if path.is_file():
        there, entries = _read(path)
        if there != measured_on:
            raise ValueError(f"{path} was measured on {_told(there)}, and this is {_told(measured_on)}: choose another")
        known = {tuned.case: tuned for tuned in _parse(path, entries, gpu.multi_processor_count)}
    for case in cases:
        if case not in known:
            known[case] = _fastest(case, gpu.multi_processor_count, timer or time_plan)
            _write(path, measured_on, list(known.values()))
        yield known[case]


def _fastest(case: Case, processors: int, timer: Callable[[Case, Plan], float]) -> Tuned:
    times = {plan: timer(case, plan) for plan in _plans(case, processors)}
    best, rule = min(times, key=times.__getitem__), next(iter(times))
    if times[rule] == math.inf:
        raise RuntimeError(f"the rule's {rule} does not run {case}")
    return Tuned(case, best, times[best], times[rule])


def _plans(case: Case, processors: int) -> list[Plan]:
    """The rule's, and the others that are worth measuring."""
    return list(dict.fromkeys([kernels.plan(*case[:4], processors, case.operand), *kernels.candidates(*case[:4])]))


# --- timing -----------------------------------------------------------------------------------------------------------


def time_plan(case: Case, plan: Plan) -> float:
    """Median milliseconds on the GPU, infinity where the plan cannot run, or does not compute the product.

    A weight that may stay in the L2 cache from one call to the next is timed so, as a CUDA graph; a larger one after a
    flush of the cache.
    """
    from triton.testing import do_bench, do_bench_cudagraph

    arguments, expected = _product(case)

    def call() -> Tensor:
        return kernels.launch(*arguments, chosen=plan)

    try:
        error = (call() - expected).abs().max()
    except Exception:  # it wants more registers or shared memory than there are, or the compiler fails in its own way
        return math.inf
    if not error <= TOLERANCE * expected.abs().max():
        return math.inf
    if arguments[1].numel() > RESIDENT * _present_gpu().L2_cache_size:
        return do_bench(call, warmup=2, rep=10, return_mode="median")
    return do_bench_cudagraph(call, rep=5, return_mode="median")


@lru_cache(maxsize=1)
def _product(case: Case) -> tuple[tuple, Tensor]:
    """Arguments of `kernels.launch`, and what comes out under the rule's plan."""
    tokens, rows, columns, bits, operand = case
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, columns, generator=draw, device="cuda").to(DTYPES[operand])
    codes = torch.randint(2**bits, (rows, columns), generator=draw, device="cuda", dtype=torch.uint8)
    tiles = F.tile(F.pack(codes, bits), bits, rows, columns)
    codebook, activations = torch.linspace(-1, 1, 2**bits, device="cuda"), "none"
    if operand == "byte":
        codebook, activations = (127 * codebook).round().to(torch.int8), "int8"
    arguments = x, tiles, codebook, torch.ones(rows, device="cuda"), None, bits, "none", activations
    rule = kernels.plan(*case[:4], _present_gpu().multi_processor_count, operand)
    return arguments, kernels.launch(*arguments, chosen=rule)


def _present_gpu() -> Any:
    """torch's properties of the present GPU."""
    if not torch.cuda.is_available():
        raise ValueError("tuned plans are measured and used on a CUDA GPU, and torch finds none on this machine")
    return torch.cuda.get_device_properties(torch.cuda.current_device())


# --- files ------------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in ("torch", "triton")}


def _told(measured_on: dict[str, Any]) -> str:
    return ", ".join([measured_on["device"], *(f"{name} {it}" for name, it in measured_on["versions"].items())])


def _write(path: Path, measured_on: dict[str, Any], found: list[Tuned]) -> None:
    plans = [
        {**tuned.case._asdict(), "plan": asdict(tuned.plan), "ms": tuned.ms, "rule_ms": tuned.rule_ms}
        for tuned in found
    ]
    save_json(path, {"format": FORMAT, "version": VERSION, **measured_on, "plans": plans})


def _read(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """What the file was measured on, and its entries as they are."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    with _damage_told(path):
        content = json.loads(path.read_text())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it says {content['format']!r}, version {content['version']!r}")
        measured_on = {"device": str(content["device"]), "versions": dict(content["versions"])}
        return measured_on, list(content["plans"])


def _parse(path: Path, entries: list[Any], processors: int) -> list[Tuned]:
    """The entries of ``path``."""
    with _damage_told(path):
        return [_tuned(entry, processors) for entry in entries]


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of `gq-triton tune`, or it is damaged: {error!r}") from error


def _tuned(entry: dict[str, Any], processors: int) -> Tuned:
    case, plan = Case(*(entry[name] for name in Case._fields)), Plan(**entry["plan"])
    if not all(type(size) is int and size > 0 for size in case[:4]) or case.bits > 8 or case.operand not in DTYPES:
        raise ValueError(f"there is no {case}")
    if plan not in _plans(case, processors):
        raise ValueError(f"{plan} is none for {case}")
    return Tuned(case, plan, float(entry["ms"]), float(entry["rule_ms"]))
