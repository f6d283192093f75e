"""Compiling C++ programs around the library's own sources, with the flags that setup.py has."""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
NATIVE = ROOT / "kernels" / "native"
C_INTERFACE = HERE / "c_interface.cpp"
STANDARD = ("-std=c++17", "-ffp-contract=off", "-pthread", "-I", str(NATIVE))


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler, what its programs run under, and the flags of each instruction set that it is asked for."""

    command: str
    isas: dict[str, list[str]]
    folder: Path
    link: tuple[str, ...] = ("-pthread",)
    runner: tuple[str, ...] = ()

    def compile(self, source: Path, flags: list[str]) -> Path:
        """The object file of a source."""
        target = self.folder / f"{source.stem}.o"
        self._call(*STANDARD, *flags, "-c", str(source), "-o", str(target))
        return target

    def program(self, name: str, sources: list[tuple[Path, list[str]]], *link: str) -> Path:
        """The program made of (source, its flags), linked with more flags."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self.compile(*source), sources))
        self._call(*map(str, objects), *link, *self.link, "-o", str(self.folder / name))
        return self.folder / name

    def c_interface(self, flags: list[str]) -> Path:
        """c_interface.cpp with the whole library."""
        plain = [NATIVE / "isa_portable.cpp", C_INTERFACE]
        plain += [source for source in NATIVE.glob("*.cpp") if not source.name.startswith("isa")]
        sources = [(NATIVE / f"isa_{name}.cpp", [*flags, *own]) for name, own in self.isas.items()]
        sources += [(source, flags) for source in sorted(plain)]
        sources += [(NATIVE / "isa.cpp", [*flags, *(f"-DGQ_HAS_{name.upper()}" for name in self.isas)])]
        return self.program("c_interface", sources, *flags)

    def c_interface_on(self, library: Path) -> Path:
        """c_interface.cpp on a library that there is."""
        return self.program("c_interface", [(C_INTERFACE, ["-O0"])], str(library), f"-Wl,-rpath,{library.parent}")

    def simd(self, isa: str) -> Path:
        """simd.cpp for an instruction set."""
        header = "simd_avx2.h" if isa == "avxvnni" else f"simd_{isa}.h"
        flags = ["-O0", *self.isas[isa], f'-DSIMD_HEADER="{header}"']
        return self.program(f"simd_{isa}", [(HERE / "simd.cpp", flags)])

    def run(self, program: Path, *arguments: object) -> str:
        """What the program prints; it must succeed."""
        command = [*self.runner, str(program), *map(str, arguments)]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-8000:]}"
        return run.stdout

    def knows(self, *flags: str) -> bool:
        """Whether a program compiles and runs with the flags."""
        source = self.folder / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [self.command, *flags, str(source), "-o", str(self.folder / "empty")]
        built = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return built and subprocess.run([*self.runner, str(self.folder / "empty")], check=False).returncode == 0

    def _call(self, *arguments: str) -> None:
        run = subprocess.run([self.command, *arguments], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-8000:]


@pytest.fixture(scope="session")
def isa_flags() -> dict[str, dict[str, list[str]]]:
    """Flags of each instruction set, by machine."""
    pytest.importorskip("setuptools.modified", reason="setup.py needs a newer setuptools")
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))["ISAS"]


@pytest.fixture(scope="session")
def make_compiler(isa_flags, tmp_path_factory):
    """A compiler for this machine, each with a folder of its own."""
    command = next(filter(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")), None)
    if command is None:
        pytest.skip("no C++ compiler")

    def make(name: str) -> Compiler:
        compiler = Compiler(command, {}, tmp_path_factory.mktemp(name))
        isas = isa_flags.get(platform.machine().lower(), {})
        compiler.isas.update({isa: flags for isa, flags in isas.items() if compiler.knows(*flags)})
        return compiler

    return make


@pytest.fixture(scope="session")
def cross_compiler(isa_flags, tmp_path_factory) -> Compiler:
    """A compiler for 64-bit ARM, whose programs an emulator runs."""
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: NEON kernels cannot be run here")
    folder = tmp_path_factory.mktemp("aarch64")
    return Compiler(
        "aarch64-linux-gnu-g++", isa_flags["aarch64"], folder, link=("-pthread", "-static"), runner=("qemu-aarch64",)
    )
