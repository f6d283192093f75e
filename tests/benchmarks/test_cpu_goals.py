"""Goals of the CPU's kernels against records made up for the purpose."""

import json

import cpu_goals
import pytest
from click.testing import CliRunner
from cpu_goals import GOALS, outcomes, summary

FIGURES = ("over_own_8bit", "over_torch_int8", "over_torch_fp32")


def entry(place, bits, *values, kind="gq int8", **changes):
    """A case with one contender, which is ``values`` times as fast as own 8-bit layers, torch's, and float32."""
    case = {"op": "linear", "place": place, "n": 4096, "k": 2048, "m": 1, "threads": 1} | changes
    return {"case": case, "results": {f"{kind}/{bits}": dict(zip(FIGURES, values, strict=False))}}


def outcomes_of(*cases):
    return {outcome.what: outcome for outcome in outcomes({"cases": cases}) if outcome.measured is not None}


def test_nothing_measured_is_neither_met_nor_missed():
    found = outcomes({"cases": []})
    assert len(found) == len(GOALS)
    assert all(outcome.met is None for outcome in found)
    assert summary({"cases": []}).count("unknown") == len(GOALS)


@pytest.mark.parametrize(
    "bits, wanted",
    [(4, (1.75, 3.5, 12)), (2, (3, 6.5)), (5, (0.9 * 8 / 5,)), (1, (0.9 * 8,))],
)
def test_out_of_memory(bits, wanted):
    values = (*wanted, 0, 0)[:3]
    found = outcomes_of(entry("memory", bits, *values))
    assert [outcome.wanted for outcome in found.values()] == list(wanted)
    assert all(outcome.met for outcome in found.values())
    found = outcomes_of(entry("memory", bits, *(value - 0.01 for value in values)))
    assert len(found) == len(wanted)
    assert not any(outcome.met for outcome in found.values())


@pytest.mark.parametrize("bits", [5, 1])
def test_in_a_cache_the_slowest_matrix_counts(bits):
    cases = [entry("cache", bits, 1.2), entry("cache", bits, 0.8, n=640), entry("cache", bits, 0.9, n=3072)]
    (found,) = outcomes_of(*cases).values()
    assert (found.met, found.measured, found.cells) == (False, 0.8, 3)
    assert found.missed == ["0.8  640 x 2048, gq int8", "0.9  3072 x 2048, gq int8"]
    (found,) = outcomes_of(entry("cache", bits, 0.98)).values()
    assert found.met


@pytest.mark.parametrize(
    "other",
    [
        entry("L2", 4, 0.1, 0.1, 0.1),
        entry("memory", 4, 0.1, 0.1, 0.1, threads=2),
        entry("memory", 4, 0.1, 0.1, 0.1, m=4),
        entry("memory", 4, 0.1, 0.1, 0.1, op="lstm"),
        entry("memory", 4, 0.1, 0.1, 0.1, kind="gq"),
        entry("memory", 3, 0.1, 0.1, 0.1),
    ],
)
def test_of_no_concern(other):
    assert outcomes_of(other) == {}


def test_operator_and_kernel_both_count():
    operator, kernel = entry("memory", 1, 7.1), entry("memory", 1, 7.9, kind="native int8")
    operator["results"] |= kernel["results"]
    (found,) = outcomes_of(operator).values()
    assert (found.met, found.cells, found.missed) == (False, 2, ["7.1  4096 x 2048, gq int8"])


def test_contenders_without_a_time_are_left_out():
    failed = {"case": entry("memory", 4)["case"], "results": {"gq int8/4": {"absent": "why"}}}
    assert outcomes_of(failed) == {}


def test_the_command_prints_the_summary(tmp_path):
    record = {"cases": [entry("memory", 4, 1.5, 4.0, 12.5)]}
    path = tmp_path / "cpu_kernels.json"
    path.write_text(json.dumps(record))
    lines = CliRunner().invoke(cpu_goals.main, [str(path)]).output.splitlines()
    assert lines == summary(record).splitlines()
    assert lines[0] == "missed   4-bit GEMV, out of memory: times as fast as own 8-bit: 1.5 of 1.75 wanted, 1 cells"
    assert lines[1].strip() == "1.5  4096 x 2048, gq int8"
    assert lines[2].startswith("met ")
