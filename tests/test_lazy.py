"""Names of the packages are found when they are asked for, and nothing is imported before."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gq_triton
from gq_triton import baselines, models
from gq_triton._lazy import lazy

ROOT = Path(__file__).resolve().parent.parent
TORCH_FREE = [
    "gq_triton",
    "gq_triton.baselines.config",
    "gq_triton.config",
    "gq_triton.kernels",
    "gq_triton.kernels.native",
    "gq_triton.kernels.planes",
    "gq_triton.models",
    "gq_triton.models.config",
    "gq_triton.packed_header",
    "gq_triton.runtime",
    "gq_triton.speech",
    "gq_triton.speech.mel",
    "gq_triton.speech.tokens",
]


@pytest.mark.parametrize("package", [gq_triton, baselines, models])
def test_every_public_name_is_there(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        module = getattr(getattr(package, name), "__module__", package.__name__)  # a constant and a module have none
        assert module.startswith(package.__name__)


def test_a_public_name_is_looked_up_once():
    assert gq_triton.GQConfig is importlib.import_module("gq_triton.config").GQConfig
    assert vars(gq_triton)["GQConfig"] is gq_triton.GQConfig


def test_names_that_are_modules_stay_functions_after_their_module_is_imported():
    """A submodule hides a lazy name that it shares: none may."""
    folder = Path(gq_triton.__file__).parent
    modules = {path.stem for path in folder.iterdir()} - {"baselines", "functional"}
    assert modules.isdisjoint(gq_triton.__all__)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'gq_triton' has no attribute 'quantise_'"):
        _ = gq_triton.quantise_
    with pytest.raises(ImportError, match="cannot import name 'quantise_'"):
        exec("from gq_triton import quantise_")
    assert not hasattr(gq_triton, "__wrapped__")


def test_a_name_lost_from_its_module_is_an_attribute_error():
    resolve, names = lazy("gq_triton", {"lost": "config"})
    assert "lost" in names()
    with pytest.raises(AttributeError, match="lost"):
        resolve("lost")


def test_what_devices_need_imports_without_torch():
    code = f"import sys; sys.modules['torch'] = None; import {', '.join(TORCH_FREE)}"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_operators_are_registered_by_importing_functional():
    code = "import torch, gq_triton.functional; print(torch.ops.gq_triton.packed_linear)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "gq_triton.packed_linear", run.stderr
