"""`gq-triton tune`; finding and keeping plans is tested in `tests/test_tuning.py`."""

import pytest
import torch

from gq_triton import tuning
from gq_triton.cli import tune
from gq_triton.kernels.packed_linear_triton import Plan
from gq_triton.tuning import Case, Tuned

PLAN = Plan("gemv", rows=16, tokens=8, warps=4, stages=1, parts=2)


@pytest.fixture
def asked(monkeypatch):
    """The cases that are timed; nothing is."""
    found = []

    def fake(cases, path):
        for case in cases:
            found.append(case)
            yield Tuned(case, PLAN, 0.0123, 0.02)

    monkeypatch.setattr(tuning, "tune", fake)
    return found


def test_defaults(gq_triton, asked, tmp_path):
    text = gq_triton.succeeds("tune", "--output", tmp_path / "plans.json")
    assert asked == [Case(m, *shape, 4, "bf16") for shape in tune.SHAPES for m in tune.TOKENS]
    lines = text.splitlines()
    assert lines[2].split() == ["512", "x", "512", "1", "4", "bf16", "gemv", "16", "8", "4", "1", "2", "12.3", "20.0"]
    assert lines[-1] == f"plans: {tmp_path / 'plans.json'}"


def test_options(gq_triton, asked, tmp_path):
    sizes = ("--shape", 64, 32, "--shape", 8, 8, "--bits", 1, "--tokens", 2, "--tokens", 32)
    rows = gq_triton.json("tune", "--output", tmp_path / "plans.json", *sizes, "--operand", "byte")
    assert asked == [Case(m, *shape, 1, "byte") for shape in ((64, 32), (8, 8)) for m in (2, 32)]
    assert rows[0] == {
        "tokens": 2,
        "rows": 64,
        "columns": 32,
        "bits": 1,
        "operand": "byte",
        "plan": vars(PLAN),
        "ms": 0.0123,
        "rule_ms": 0.02,
    }


@pytest.mark.parametrize(
    "option, message",
    [
        (("--bits", 9), "'--bits'"),
        (("--shape", 0, 4), "'--shape'"),
        (("--tokens", 3), "3 is no power of two"),
        (("--operand", "int4"), "'--operand'"),
    ],
)
def test_what_there_is_not(gq_triton, asked, tmp_path, option, message):
    assert message in gq_triton.fails("tune", "--output", tmp_path / "plans.json", *option)
    assert asked == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(gq_triton, tmp_path):
    said = gq_triton.fails("tune", "--output", tmp_path / "plans.json")
    assert "measured and used on a CUDA GPU, and torch finds none on this machine" in said
    assert not list(tmp_path.iterdir())
