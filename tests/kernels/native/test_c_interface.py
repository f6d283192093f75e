"""The C interface under sanitizers, on malformed arguments, from several threads, and on NEON.

c_interface.cpp holds the checks; arrays there have exactly their size, so that the sanitizer sees every access beyond."""

import pytest

COMMON = ["-O0", "-fno-sanitize-recover=all", "-fno-sanitize=null,object-size,vptr"]  # of which the first sees more
BOUNDS = [*COMMON, "-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0"]  # calls compile fast
UNDEFINED = "-fsanitize=undefined"
FULL = pytest.mark.full


@pytest.fixture(scope="session", params=[[], pytest.param([UNDEFINED], marks=FULL)], ids=["", "all_kernels"])
def sanitized(request, make_compiler):
    """(compiler, program) under AddressSanitizer, and all but the kernels of instruction sets, which compile slowly,
    under UndefinedBehaviorSanitizer too."""
    compiler = make_compiler("sanitized")
    if not compiler.knows(*BOUNDS, UNDEFINED):
        pytest.skip("the compiler has no address and undefined-behaviour sanitizers, or they do not run here")
    return compiler, compiler.c_interface([*BOUNDS, UNDEFINED], [*BOUNDS, *request.param])


@pytest.mark.parametrize("rounds", [20, pytest.param(1000, marks=FULL)])
def test_agrees_with_the_definitions(sanitized, rounds):
    compiler, program = sanitized
    printed = compiler.run(program, "compare", rounds, rounds)
    assert printed.startswith("agree:") and "portable" in printed.split()


@pytest.mark.parametrize("seconds", [3, pytest.param(300, marks=FULL)])
def test_malformed_arguments(sanitized, seconds):
    compiler, program = sanitized
    assert compiler.run(program, "fuzz", seconds, seconds).endswith("rounds\n")


def test_several_callers(sanitized):
    compiler, program = sanitized
    assert compiler.run(program, "threads", 1, 5) == "agree\n"


def test_forked_processes(sanitized):
    compiler, program = sanitized
    assert compiler.run(program, "fork") == "agree\n"


def test_no_data_race(make_compiler):
    compiler = make_compiler("raced")
    flag = "-fsanitize=thread"
    if not compiler.knows(flag):
        pytest.skip("the compiler has no thread sanitizer, or it does not run here")
    compiler.isas.clear()  # the threads are the same for all
    program = compiler.c_interface(["-O0", flag], [])
    assert compiler.run(program, "threads", 1, 5) == "agree\n"


@pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=FULL)])
def test_neon_agrees_with_the_definitions(neon, rounds):
    compiler, program = neon
    assert compiler.run(program, "compare", rounds, rounds) == "agree: neon portable\n"


@pytest.fixture(scope="session")
def neon(cross_compiler):
    return cross_compiler, cross_compiler.c_interface(["-O1"], ["-O1"])
