"""Costs that are known: of small kernels, compiled in a process of their own (in ours the interpreter is on)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gq_triton.kernels import aot
from gq_triton.kernels.parts import LATENCY, PARTS

ROOT = Path(__file__).resolve().parents[2]
LANES = {"sm_90": 128, "gfx942": 256}  # of four warps


@pytest.fixture(scope="module", params=LANES)
def toys(request):
    """(part, rooflines of the toy kernels by name)."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, Path(__file__).with_name("toy_kernels.py"), request.param]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return request.param, {row["name"]: row for row in json.loads(result.stdout)}


def test_copy(toys):
    part, found = toys
    copy = found["copy"]
    assert (copy["spilled"], copy["shared"], copy["loop"], copy["wide"]) == (0, 0, False, 1.0)
    assert copy["bytes"] == 8
    assert copy["classes"]["load 128"] == copy["classes"]["store 128"] == 1 / 4  # of four float32 each
    assert 0.5 < copy["instructions"] < 5
    assert copy["instructions"] * 2048 / LANES[part] <= copy["executed"]
    machine = PARTS[part]
    time = copy["instructions"] / (machine.lanes["issue"] * machine.processors * machine.clock)
    if part == "sm_90":  # AMD's loads and stores take none of the vector unit's time
        assert copy["shares"]["issue"] == pytest.approx(time / (8 / machine.bandwidth))
    assert copy["shares"]["issue"] < 0.1 and copy["broken"] == []
    programs = copy["resident"] / 4
    assert copy["resident"] == machine.warps
    asked = programs * 2048 * 4 * machine.processors
    assert copy["in_flight"] == pytest.approx(asked / (machine.bandwidth * LATENCY))


def test_a_loop_is_counted_by_its_passes_however_it_is_unrolled(toys):
    _, found = toys
    loop = found["copy_in_a_loop"]
    assert loop["loop"] and loop["outside"] > 0
    assert loop["classes"]["load 128"] == loop["classes"]["store 128"] == 1 / 4
    assert loop["instructions"] < 2 * found["copy"]["instructions"]


def test_narrow_accesses_and_too_many_instructions(toys):
    _, found = toys
    strided = found["strided"]
    assert strided["wide"] == 0.5  # the stores
    assert strided["broken"] == [f"{strided['instructions']:.1f} > 0.5 instructions", "50% in 16 bytes"]


def test_logarithms_and_exponentials(toys):
    _, found = toys
    used = found["transcendental"]
    assert (used["logarithms"], used["exponentials"]) == (2, 1)  # that of the sum is one for all elements
    assert used["broken"] == ["2 logarithms"]


def test_float64(toys):
    _, found = toys
    assert found["double"]["classes"]["fp64"] >= 1
    assert found["double"]["broken"] == ["float64"]


def test_tensor_cores(toys):
    part, found = toys
    kind = {"sm_90": "tensor wgmma", "gfx942": "tensor mfma"}[part]
    assert found["product"]["classes"][kind] > 0 and found["product"]["broken"] == ["tensor cores"]
    wanted = {"no tensor tcgen05", "shared load 128"} if part == "sm_90" else {"no tensor tcgen05"}
    assert wanted <= set(", ".join(found["product_elsewhere"]["broken"]).split(", "))


def test_spills(toys):
    part, found = toys
    used = found["hungry"]
    if part == "sm_90":  # AMD has twice the registers
        assert used["spilled"] > 0 and used["broken"] == [f"spills {used['spilled']}"]
    else:
        assert used["broken"] == []


def test_kernels_are_not_compiled_under_the_interpreter(monkeypatch):
    monkeypatch.setattr(aot, "triton", object())
    monkeypatch.setattr(aot, "INTERPRETED", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET is 1"):
        aot.require_compiler()


def test_kernels_are_not_compiled_without_triton(monkeypatch):
    monkeypatch.setattr(aot, "triton", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        aot.require_compiler()


@pytest.mark.parametrize(
    "registers, shared, warps, blocks",
    [
        (32, 0, 4, 16),  # 64 warps
        (33, 0, 4, 12),  # 40 registers: 51 warps
        (255, 0, 8, 1),
        (32, 100 << 10, 4, 2),  # 101 of 228 KiB each
        (32, 0, 1, 32),
    ],
)
def test_resident_blocks(registers, shared, warps, blocks):
    assert aot._resident(PARTS["sm_90"], registers, shared, warps) == blocks


def test_issue_rate_of_an_h100():
    """The figure that budgets are made from: 8.9 lane-instructions a byte."""
    part = PARTS["sm_90"]
    rate = part.lanes["issue"] * part.processors * part.clock
    assert rate == pytest.approx(3.0e13, rel=0.02)
    assert rate / part.bandwidth == pytest.approx(8.9, rel=0.01)
