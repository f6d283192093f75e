"""Every kernel compiled for parts that need not be here, in a process of its own: in ours the interpreter is on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gq_triton.kernels.parts import PARTS

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    "fake_quantize_hard",
    "fake_quantize_soft",
    "fake_quantize_backward",
    "fake_quantize_backward_table",
    "fake_quantize_backward_table_unaligned",
    "encode",
    "packed_linear_m1",
    "packed_linear_m64",
    "packed_embedding",
    "joint_hidden",
    "joint_edges",
    "joint_logit_grad",
    "joint_lattice_64",
    "joint_lattice_1024",
    "tables",
    "tables_backward",
    "tables_lookup",
    "partial_sums",
}


def measure(*options):
    """What `gq-triton info --kernels` finds."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gq_triton.cli", "info", "--kernels", "--json", *options]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def broken(rows):
    return [(row["name"], row["bits"], row["dtype"], row["part"], row["broken"]) for row in rows if row["broken"]]


@pytest.mark.parametrize("part", PARTS)
def test_budgets(part):
    rows = measure("--parts", part, "--bits", "5")
    assert {row["name"] for row in rows} == KERNELS and len(rows) == len(KERNELS)
    assert broken(rows) == []


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_budgets_of_every_width_and_dtype(part, bits):
    rows = measure("--parts", part, "--bits", str(bits), "--dtypes", "fp32", "--dtypes", "bf16", "--dtypes", "fp16")
    assert broken(rows) == []
