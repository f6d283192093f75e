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
PACKED = {
    "gemv",
    "gemv_small",
    "gemv_tokens",
    "gemv_tokens_sums",
    "gemv_small_tokens",
    "gemv_int8",
    "gemm",
    "gemm_small",
    "gemm_int8",
    "gemm_fp8",
    "lstm_step",
    "lstm_step_tokens",
    "gru_step",
    "lstm_projection",
    "depthwise_conv",
    "quantize_tokens",
    "fake_quantize_tokens",
}


def measure(*options):
    """What `gq-triton info --kernels` finds."""
    return json.loads(run("-m", "gq_triton.cli", "info", "--kernels", "--json", *options))


def run(*command):
    """What Python prints, without the interpreter."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def broken(rows):
    return [(row["name"], row["bits"], row["dtype"], row["part"], row["broken"]) for row in rows if row["broken"]]


def options(name, values):
    return [option for value in values for option in (f"--{name}", str(value))]


@pytest.mark.parametrize("part", PARTS)
def test_budgets(part):
    rows = measure("--parts", part, "--bits", "5", *options("names", KERNELS))
    assert {row["name"] for row in rows} == KERNELS and len(rows) == len(KERNELS)
    assert broken(rows) == []


@pytest.mark.parametrize(
    "part, bits, names",
    [
        ("sm_90", 4, ["gemv", "gemv_int8", "gemm", "gru_step", "*quantize_tokens"]),
        ("sm_90", 2, ["gemv_int8", "gemv_small"]),
        ("sm_90", 8, ["gemv"]),
        ("sm_80", 4, ["gemv_int8"]),
        ("gfx942", 4, ["gemm_small"]),
    ],
)
def test_budgets_of_packed_weights(part, bits, names):
    rows = measure("--parts", part, "--bits", str(bits), *options("names", names))
    assert len(rows) >= len(names) and broken(rows) == []


def test_every_kernel_is_known():
    """Also those that a default run leaves out."""
    code = "from gq_triton.kernels import budgets; print(*{v.name for v in budgets.variants([4], ['bf16'])})"
    assert set(run("-c", code).split()) == KERNELS | PACKED


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_budgets_of_every_width_and_dtype(part, bits):
    rows = measure("--parts", part, "--bits", str(bits), *options("dtypes", ["fp32", "bf16", "fp16"]))
    assert broken(rows) == []
