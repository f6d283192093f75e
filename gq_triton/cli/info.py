"""`gq-triton info`: what this installation is and finds, and what its kernels cost on GPUs that need not be here."""

from __future__ import annotations

import fnmatch
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

import gq_triton
from gq_triton.kernels import budgets, native
from gq_triton.kernels.parts import LATENCY, PARTS
from gq_triton.training.distributed import training_device

from .output import emit, json_option, table

__all__ = ["commit", "cpu_kernels", "device_name", "info", "versions"]

PACKAGES = (
    "triton",
    "numpy",
    "safetensors",
    "scipy",
    "soundfile",
    "sentencepiece",
    "jiwer",
    "espeakng-loader",
    "matplotlib",
    "tensorboard",
    "torchao",
)
HEADER = ["kernel", "bits", "dtype", "part", "registers", "shared", "warps"]
HEADER += ["bytes", "instructions", "unit", "share", "flight", "budget"]
LEGEND = f"""\
registers     of a lane; where the budget is kept, none is spilled
shared        bytes of shared memory of a block
warps         resident on a multiprocessor (NVIDIA) or compute unit (AMD) at once
bytes         of device memory per weight, as counted on paper
instructions  of a lane per weight
unit, share   the busiest unit: its time for a weight over that of the weight's bytes at full bandwidth; below 1, memory
              is the limit
flight        bytes that resident programs ask for at once, over bandwidth x {LATENCY * 1e6:g} us of latency
budget        whether it is kept, or what breaks it
Read off the machine code; nothing here was measured on a GPU. The columns from bytes to flight are for kernels whose
work goes by weights. --json has the instructions by kind and the share of every unit."""


@click.command()
@click.option("--kernels", is_flag=True, help="compile every kernel ahead of time and print what it costs on each part")
@click.option("--bits", type=click.IntRange(1, 8), multiple=True, help="with --kernels; repeatable  [default: 4]")
@click.option(
    "--dtypes",
    type=click.Choice(list(budgets.DTYPES)),
    multiple=True,
    help="with --kernels; repeatable  [default: bf16]",
)
@click.option(
    "--parts", type=click.Choice(list(PARTS)), multiple=True, help="with --kernels; repeatable  [default: all]"
)
@click.option("--names", multiple=True, help="with --kernels: patterns such as 'gemv*'; repeatable  [default: all]")
@json_option
def info(
    kernels: bool,
    bits: tuple[int, ...],
    dtypes: tuple[str, ...],
    parts: tuple[str, ...],
    names: tuple[str, ...],
    as_json: bool,
) -> None:
    """Versions, the device that commands use, CPU kernels and optional packages; or GPU kernels and what they cost."""
    if kernels:
        rows = _measure_kernels(bits or (4,), dtypes or ("bf16",), parts or tuple(PARTS), names or ("*",))
        emit(rows, f"{table(HEADER, [_kernel_cells(row) for row in rows])}\n\n{LEGEND}", as_json)
        return
    if bits or dtypes or parts or names:
        raise click.UsageError("--bits, --dtypes, --parts and --names go with --kernels")
    result = {"device": device_name(), "cpu_kernels": cpu_kernels(), "versions": versions(), "commit": commit()}
    lines = [
        f"device       {result['device']}",
        f"CPU kernels  {_describe(result['cpu_kernels'])}",
        f"commit       {result['commit'] or 'not a checkout'}",
    ]
    lines += [f"{name:<16} {version or 'not installed'}" for name, version in result["versions"].items()]
    emit(result, "\n".join(lines), as_json)


def _measure_kernels(
    bits: tuple[int, ...], dtypes: tuple[str, ...], parts: tuple[str, ...], names: tuple[str, ...]
) -> list[dict[str, Any]]:
    found = [v for v in budgets.variants(bits, dtypes) if any(fnmatch.fnmatch(v.name, name) for name in names)]
    jobs = [(variant, part) for variant in found for part in parts if part in variant.parts]
    return [budgets.measure(*job) for job in tqdm(jobs, desc="compiling", unit="kernel", leave=False)]


def _kernel_cells(row: dict[str, Any]) -> list[str]:
    """The row of `budgets.measure` under `HEADER`."""
    shares = row["shares"]
    unit = max(shares, key=shares.get, default="")
    numbers = [row["bytes"], row["instructions"], unit, shares.get(unit), row["in_flight"]] if shares else [None] * 5
    cells = [row[key] for key in ("name", "bits", "dtype", "part", "registers", "shared", "resident")]
    return [_cell(cell) for cell in [*cells, *numbers, "; ".join(row["broken"]) or "kept"]]


def _cell(value: str | float | None) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of what it builds on; None for what is not installed."""
    found = {"gq_triton": gq_triton.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {package: _version(package) for package in PACKAGES}


def cpu_kernels() -> dict[str, Any]:
    """The instruction set that native kernels use, those they could, and why there are no such kernels."""
    return {"isa": native.isa(), "isas": list(native.isas()), "reason": native.reason()}


def _describe(kernels: dict[str, Any]) -> str:
    if kernels["isa"] is None:
        return f"none: {kernels['reason']}"
    others = [name for name in kernels["isas"] if name != kernels["isa"]]
    return f"{kernels['isa']}, could be {', '.join(others)} (GQ_TRITON_CPU)" if others else kernels["isa"]


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads that torch uses."""
    device = training_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+changes` where files differ; None outside one."""
    folder = Path(gq_triton.__file__).parent
    # An environment within the checkout of another project is no checkout of this one.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    return revision and revision + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
