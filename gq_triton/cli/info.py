"""`gq-triton info`: what this installation is and what it finds."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import click
import torch

import gq_triton
from gq_triton.training.distributed import training_device

from .output import emit, json_option

__all__ = ["commit", "device_name", "info", "versions"]

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
)


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Versions, the device that commands use, and optional packages."""
    result = {"device": device_name(), "versions": versions(), "commit": commit()}
    lines = [f"device       {result['device']}", f"commit       {result['commit'] or 'not a checkout'}"]
    lines += [f"{name:<16} {version or 'not installed'}" for name, version in result["versions"].items()]
    emit(result, "\n".join(lines), as_json)


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python and of what it builds on; None for what is not installed."""
    found = {"gq_triton": gq_triton.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return found | {package: _version(package) for package in PACKAGES}


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
