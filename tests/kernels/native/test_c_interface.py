"""The C interface on random and on malformed arguments, from several threads, under sanitizers, and on NEON.

c_interface.cpp holds the checks. Its arrays end where memory does, so that no access beyond them goes unseen."""

from pathlib import Path

import pytest

from gq_triton.kernels import native

SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# Quick to compile: without what the address sanitizer sees better, and without alignment.
SIMPLY = ["-O0", "-fno-sanitize=null,object-size,vptr,alignment", "--param=asan-instrumentation-with-call-threshold=0"]
FULL = pytest.mark.full


@pytest.fixture(scope="session", params=["installed", "sanitized", pytest.param("sanitized_all", marks=FULL)])
def built(request, make_compiler):
    """(compiler, program) with the library as it is installed, or under AddressSanitizer and
    UndefinedBehaviorSanitizer: by default with the portable kernels and those of the last instruction set alone, since
    kernels take long to compile."""
    compiler = make_compiler(request.param)
    if request.param == "installed":
        if not native.available():
            pytest.skip(f"no native library: {native.reason()}")
        return compiler, compiler.c_interface_on(Path(native.__file__).with_name("_native.so"))
    if not compiler.knows(*SANITIZED, *SIMPLY):
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers, or they do not run here")
    if request.param == "sanitized":
        for isa in list(compiler.isas)[:-1]:
            del compiler.isas[isa]
        return compiler, compiler.c_interface([*SANITIZED, *SIMPLY])
    return compiler, compiler.c_interface([*SANITIZED, "-O1"])


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=FULL)])
def test_agrees_with_the_definitions(built, rounds):
    compiler, program = built
    agree, *isas = compiler.run(program, "compare", rounds, rounds).split()
    assert agree == "agree:" and isas[-1] == "portable"


@pytest.mark.parametrize("seconds", [2, pytest.param(300, marks=FULL)])
def test_malformed_arguments(built, seconds):
    compiler, program = built
    assert compiler.run(program, "fuzz", seconds, seconds).endswith("rounds\n")


def test_several_callers(built):
    compiler, program = built
    assert compiler.run(program, "threads", 1, 5) == "agree\n"


def test_forked_processes(built):
    compiler, program = built
    assert compiler.run(program, "fork") == "agree\n"


def test_no_data_race(make_compiler):
    compiler = make_compiler("raced")
    flags = ["-O0", "-fsanitize=thread"]
    if not compiler.knows(*flags):
        pytest.skip("the compiler has no thread sanitizer, or it does not run here")
    compiler.isas.clear()  # the threads are the same for all
    assert compiler.run(compiler.c_interface(flags), "threads", 1, 1) == "agree\n"


@pytest.fixture(scope="session")
def neon(cross_compiler):
    return cross_compiler, cross_compiler.c_interface(["-O0"])


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=FULL)])
def test_neon_agrees_with_the_definitions(neon, rounds):
    compiler, program = neon
    assert compiler.run(program, "compare", rounds, rounds) == "agree: neon portable\n"
