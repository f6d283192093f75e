"""Every function of a SIMD header gives what simd_portable.h gives."""

import platform

import pytest

from gq_triton.kernels import native

MACHINE = platform.machine().lower()


@pytest.mark.parametrize("isa", ["avx512", "avxvnni", "avx2"])
@pytest.mark.skipif(MACHINE not in ("x86_64", "amd64"), reason="not an x86 processor")
def test_x86(isa, make_compiler):
    compiler = make_compiler("simd")
    if isa not in compiler.isas or isa not in native.isas():
        pytest.skip(f"the compiler or the processor has no {isa}")
    assert compiler.run(compiler.simd(isa)) == "0 differences\n"


def test_neon_emulated(cross_compiler):
    assert cross_compiler.run(cross_compiler.simd("neon")) == "0 differences\n"


@pytest.mark.skipif(MACHINE not in ("aarch64", "arm64"), reason="not an ARM processor")
def test_neon(make_compiler):
    compiler = make_compiler("simd")
    if "neon" not in native.isas():
        pytest.skip("the processor has no dot products")
    assert compiler.run(compiler.simd("neon")) == "0 differences\n"
