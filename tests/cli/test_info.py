"""`gq-triton info`; what it finds with `--kernels` is tested in `tests/kernels/test_budgets.py`."""

from types import SimpleNamespace

import pytest

from gq_triton.cli import info
from gq_triton.kernels import aot, budgets, native
from gq_triton.kernels.parts import PARTS

ROW = {
    "bits": 4,
    "dtype": "bf16",
    "name": "forward",
    "part": "sm_90",
    "registers": 32,
    "shared": 0,
    "resident": 64,
    "bytes": 4.0,
    "instructions": 34.5,
    "shares": {"issue": 0.97, "integer": 1.07},
    "in_flight": 1.29,
    "broken": [],
}
RESOURCES = {**ROW, "bits": None, "dtype": None, "name": "tables", "shares": {}, "broken": ["spills 8", "float64"]}


@pytest.fixture
def measured(monkeypatch):
    """The arguments of what is measured; nothing is compiled."""
    asked = []

    def variants(bits, dtypes):
        common = {"bits": bits, "dtypes": dtypes}
        everywhere = SimpleNamespace(name="forward", parts=tuple(PARTS), **common)
        return [everywhere, SimpleNamespace(name="forward_fp8", parts=("sm_90",), **common)]

    def measure(variant, part):
        asked.append((variant.name, variant.bits, variant.dtypes, part))
        return {**ROW, "name": variant.name, "part": part}

    monkeypatch.setattr(budgets, "variants", variants)
    monkeypatch.setattr(budgets, "measure", measure)
    return asked


def test_cells():
    assert len(info.HEADER) == len(info._kernel_cells(ROW)) == len(info._kernel_cells(RESOURCES))
    expected = "forward 4 bf16 sm_90 32 0 64 4.00 34.50 integer 1.07 1.29 kept"
    assert " ".join(info._kernel_cells(ROW)) == expected
    expected = ["tables", "", "", "sm_90", "32", "0", "64", "", "", "", "", "", "spills 8; float64"]
    assert info._kernel_cells(RESOURCES) == expected


def test_defaults(gq_triton, measured):
    text = gq_triton.succeeds("info", "--kernels")
    expected = [("forward", (4,), ("bf16",), part) for part in ("sm_80", "sm_90", "sm_100", "gfx942")]
    assert measured == [*expected, ("forward_fp8", (4,), ("bf16",), "sm_90")]
    lines = text.splitlines()
    assert lines[0].split() == info.HEADER
    assert lines[3].split() == info._kernel_cells(ROW)
    assert "nothing here was measured on a GPU" in text


def test_options(gq_triton, measured):
    options = ("--bits", 1, "--bits", 8, "--dtypes", "fp32", "--dtypes", "fp16", "--parts", "gfx942")
    rows = gq_triton.json("info", "--kernels", *options)
    assert measured == [("forward", (1, 8), ("fp32", "fp16"), "gfx942")]
    assert rows == [{**ROW, "part": "gfx942"}]


@pytest.mark.parametrize("pattern, count", [("forward", 4), ("*_fp8", 1), ("f*", 5), ("backward", 0)])
def test_names(gq_triton, measured, pattern, count):
    assert len(gq_triton.json("info", "--kernels", "--names", pattern)) == len(measured) == count


@pytest.mark.parametrize("option", [("--bits", 9), ("--dtypes", "fp64"), ("--parts", "sm_70")])
def test_what_there_is_not(gq_triton, option):
    assert f"Invalid value for '{option[0]}'" in gq_triton.fails("info", "--kernels", *option)


def test_options_of_the_kernels_alone(gq_triton):
    assert "go with --kernels" in gq_triton.fails("info", "--bits", 4)


def test_without_triton(gq_triton, monkeypatch):
    monkeypatch.setattr(aot, "triton", None)
    assert "pip install 'gq-triton[triton]'" in gq_triton.fails("info", "--kernels")


def line_of(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


@pytest.mark.parametrize(
    "isas, isa, expected",
    [
        (("avx2", "portable"), "avx2", "avx2, could be portable (GQ_TRITON_CPU)"),
        (("avx512", "avxvnni", "portable"), "avxvnni", "avxvnni, could be avx512, portable (GQ_TRITON_CPU)"),
        (("portable",), "portable", "portable"),
    ],
)
def test_native_kernels(gq_triton, monkeypatch, isas, isa, expected):
    monkeypatch.setattr(native, "isas", lambda: isas)
    monkeypatch.setattr(native, "isa", lambda: isa)
    monkeypatch.setattr(native, "reason", lambda: None)
    assert line_of(gq_triton.succeeds("info"), "CPU kernels") == expected
    assert gq_triton.json("info")["cpu_kernels"] == {"isa": isa, "isas": list(isas), "reason": None}


def test_no_native_kernels(gq_triton, monkeypatch):
    monkeypatch.setattr(native, "isas", lambda: ())
    monkeypatch.setattr(native, "isa", lambda: None)
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    assert line_of(gq_triton.succeeds("info"), "CPU kernels") == "none: no compiler was found"
    assert gq_triton.json("info")["cpu_kernels"] == {"isa": None, "isas": [], "reason": "no compiler was found"}
