"""The project file and the tree agree, and the package imports where less is installed."""

import subprocess
import sys
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
