"""Every kernel compiled for parts that need not be here, in a process of its own: in ours the interpreter is on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gq_triton.kernels import aot

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TENSOR_CORES = {"fake_quantize_backward", "packed_linear_m1", "packed_linear_m64"}


def compile_all(*options):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gq_triton.kernels.aot", "--json", *options]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_budgets(rows):
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["shared"] <= aot.SHARED_LIMITS[row["part"]], row
        exact = row["dtype"] == "fp32" and row["name"].startswith("packed_linear")  # float32 products are not rounded
        assert exact or row["tensor_cores"] == (row["name"] in TENSOR_CORES), row


@pytest.mark.parametrize("part", aot.PARTS)
def test_budgets(part):
    rows = compile_all("--parts", part, "--bits", "4", "8", "--dtypes", "bf16")
    assert len(rows) == 2 * 7
    check_budgets(rows)


@pytest.mark.full
@pytest.mark.parametrize("part", aot.PARTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_budgets_of_every_variant(part, bits):
    check_budgets(compile_all("--parts", part, "--bits", str(bits), "--dtypes", "fp32", "bf16", "fp16"))


def test_interpreted_kernels_are_not_compiled(monkeypatch):
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_variant(next(aot.variants(4)), "sm_90")


def test_table_lists_every_row():
    rows = [{"name": "kernel", "registers": 32}, {"name": "other", "registers": 8}]
    assert aot._table(rows).splitlines() == ["name    registers", "kernel  32       ", "other   8        "]
