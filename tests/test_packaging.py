"""The project file and the tree agree, and the package imports where less is installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(folder.parent.relative_to(ROOT)).replace("/", ".") for folder in ROOT.glob("gq_triton/**/__init__.py")}
    assert sorted(listed) == sorted(found | {"gq_triton.kernels"})


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_a_checkout_imports_without_installation_and_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; sys.path.insert(0, '.');"
        "import gq_triton, gq_triton.kernels; print(gq_triton.__file__); print(gq_triton.kernels.__file__)"
    )
    run = run_python(code, ROOT)
    assert run.returncode == 0, run.stderr
    package, kernels = run.stdout.split()
    assert Path(package).resolve() == ROOT / "gq_triton" / "__init__.py"
    assert Path(kernels).resolve() == ROOT / "kernels" / "__init__.py"


def test_the_quantizer_needs_no_optional_package():
    missing = ("triton", "scipy", "soundfile", "sentencepiece", "jiwer", "matplotlib", "espeakng_loader")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import gq_triton; import gq_triton.cli.main"
    run = run_python(code, ROOT)
    assert run.returncode == 0, run.stderr


# --- the native library -----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of what a distribution is built from, with native kernels of no instruction set, which are slow to build:
    as if the compiler knew none of them."""
    pytest.importorskip("setuptools", minversion="77", reason="the project is built with setuptools 77 or later")
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.dll", "isa_avx*.cpp", "isa_neon.cpp")
    for name in ("gq_triton", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def build(tree: Path, kind: str, compiler: str) -> Path:
    """The one distribution that ``setup.py`` builds with that compiler."""
    command = [sys.executable, "setup.py", "--quiet", kind]
    environment = os.environ | {"CC": compiler, "CXX": compiler}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (found,) = (tree / "dist").iterdir()
    return found


def unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def quick_compiler(tmp_path) -> str:
    """The compiler, made to optimize nothing."""
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


LAYER = """
import torch, gq_triton as gq
from gq_triton.kernels import native
layer, x = torch.nn.Sequential(torch.nn.Linear(40, 24)), torch.randn(3, 40)
gq.quantize_(layer, gq.GQConfig(bits=4, codebook="int8", activations="int8"), step="prepare")
expected = layer(x)
gq.quantize_(layer, step="convert")
torch.testing.assert_close(layer(x), expected)
print(native.isas())
print(native.reason())
"""


def test_a_wheel_has_the_library(tree, quick_compiler, tmp_path):
    wheel = build(tree, "bdist_wheel", quick_compiler)
    _, _, *tag = wheel.stem.split("-")
    assert tag[:2] == ["py3", "none"] and tag[2] != "any", wheel.name
    installed = unpack(wheel, tmp_path / "installed")
    assert not list(installed.glob("**/*.cpp")), "sources belong to the source distribution"
    assert list(installed.glob("gq_triton/pretrained/*.safetensors"))
    run = run_python(LAYER, installed)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "('portable',)\nNone\n"


def test_without_a_compiler_there_is_no_library_and_all_else_works(tree, tmp_path):
    installed = unpack(build(tree, "bdist_wheel", "false"), tmp_path / "installed")
    assert not [file for file in installed.glob("**/_native*") if file.suffix != ".py"]
    run = run_python(LAYER, installed)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("()\n") and "was not built" in run.stdout


def test_a_source_distribution_has_the_sources_of_the_library(tree):
    with tarfile.open(build(tree, "sdist", "false")) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    native = {file.relative_to(tree) for file in (tree / "kernels" / "native").iterdir()}
    assert native | {Path("setup.py"), Path("kernels", "native.py")} <= packed
