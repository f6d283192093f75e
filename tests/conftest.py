"""Shared fixtures. The default run is quick and needs no data, network or GPU; `-m full` adds the long matrix."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; test subprocesses inherit it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: kernels then run in its interpreter

from gq_triton.kernels import native
from gq_triton.kernels.layouts import LAYOUTS

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    config.addinivalue_line("markers", "full: the long matrix of a test, deselected unless `-m full` is given")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]
)
def device(request) -> torch.device:
    """Every device the machine has; the CPU always."""
    return torch.device(request.param)


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def cpu_kernels(request, monkeypatch) -> bool:
    """Whether the native library runs on the CPU; else it counts as missing, and torch does."""
    if not request.param:
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"no native library: {native.reason()}")
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request) -> str:
    """Every layout of packed codes that this machine knows."""
    if request.param == "panels" and not native.available():
        pytest.skip(f"no native library: {native.reason()}")
    return request.param


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder that holds `an4` and `LibriSpeech`: $GQ_DATA, else `../shared/data` beside the checkout."""
    root = Path(os.environ.get("GQ_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no recorded speech at {root}; point GQ_DATA at a folder that holds an4 and LibriSpeech")
    return root


@pytest.fixture(scope="session")
def an4_root(data_root) -> Path:
    root = data_root / "an4"
    if not root.is_dir():
        pytest.skip(f"{root} does not exist")
    return root


@pytest.fixture(scope="session")
def librispeech_root(data_root) -> Path:
    root = data_root / "LibriSpeech"
    if not root.is_dir():
        pytest.skip(f"{root} does not exist")
    return root
