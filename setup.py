"""Builds the native CPU kernels, a plain shared library with no Python in it; all else is in pyproject.toml.

The library is optional: where it cannot be built, packed layers and the quantizer run on torch. Each
kernels/native/isa_*.cpp is compiled for its own instruction set, and left out where the compiler does not know that.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi", "-mavx512vnni"]
X86 = {"avx512": AVX512, "avxvnni": [*AVX2, "-mavxvnni"], "avx2": AVX2}
ARM = {"neon": ["-march=armv8.2-a+dotprod"]}
ISAS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}  # flags of each instruction set, by machine
PORTABLE = ["-O2"]  # what -O3 adds is much code


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # no PyInit

    def build_extension(self, ext: Extension) -> None:
        path = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], path):
            return
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the native CPU kernels need GCC or Clang")
        isas = next((isas for machine, isas in ISAS.items() if self.plat_name.endswith(machine)), {})
        optional = {source_of(f"isa_{name}"): flags for name, flags in isas.items()}
        others = [source for source in ext.sources if not Path(source).name.startswith("isa")]
        with ThreadPoolExecutor() as pool:
            isa_objects = pool.map(self.compile_if_possible, optional, optional.values())
            portable = pool.submit(self.compile, source_of("isa_portable"), PORTABLE)
            objects = [*pool.map(self.compile, others), portable.result()]
            known = {name: built for name, built in zip(isas, isa_objects, strict=True) if built}
        # The table of instruction sets, isa.cpp, is told which there are.
        table = self.compile(source_of("isa"), [f"-DGQ_HAS_{name.upper()}" for name in known])
        objects += [*known.values(), table]
        self.compiler.link_shared_object(objects, path, extra_postargs=["-pthread"], target_lang="c++")

    def compile(self, source: str, flags: list[str] | tuple[()] = ()) -> str:
        """The object file of a source."""
        flags = [*FLAGS, "-pthread", *flags]
        return self.compiler.compile([source], output_dir=self.build_temp, extra_postargs=flags)[0]

    def compile_if_possible(self, source: str, flags: list[str]) -> str | None:
        try:
            return self.compile(source, flags)
        except CompileError as error:
            self.warn(f"{source} is left out: {error}")
            return None


class NativeWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """The library is loaded by name, so that one wheel serves every Python of a platform."""
        return "py3", "none", super().get_tag()[2]


def source_of(name: str) -> str:
    return f"kernels/native/{name}.cpp"


setup(
    ext_modules=[
        Extension(
            "gq_triton.kernels._native",
            sources=sorted(map(str, Path("kernels/native").glob("*.cpp"))),
            depends=sorted(map(str, Path("kernels/native").glob("*.h"))),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
