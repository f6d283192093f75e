"""Goals against records made up for the purpose."""

import json

import pytest
from click.testing import CliRunner
from streaming_goals import GOALS, main, outcomes, summary


def result(wait, memory=100, floor=1.0):
    return {"upl_ms": {"p90": wait}, "floor_ms": {"p90": floor}, "model_bytes": memory}


def case(results, threads=1, chunk_ms=60):
    return {"case": {"model": "rnnt", "threads": threads, "chunk_ms": chunk_ms}, "results": results}


def outcome_of(cases, what):
    (found,) = [outcome for outcome in outcomes({"cases": cases}) if outcome.what.startswith(what)]
    return found


def test_nothing_measured_is_neither_met_nor_missed():
    found = outcomes({"cases": []})
    assert len(found) == len(GOALS) == 12
    assert all(outcome.met is None for outcome in found)


@pytest.mark.parametrize("kind", ["gq int8", "gq", "runner gq int8", "runner gq"])
def test_five_bits_beside_eight(kind):
    cases = [case({f"{kind}/8": result(100.0, 1000), f"{kind}/5": result(68.0, 692, floor=60.0)})]
    memory = outcome_of(cases, f"{kind}/5 beside {kind}/8, memory")
    assert (memory.met, memory.measured, memory.cells) == (True, pytest.approx(30.8), 1)
    wait = outcome_of(cases, f"{kind}/5 beside {kind}/8, P90")
    assert (wait.met, wait.measured) == (True, pytest.approx(32.0))
    assert wait.notes == "40 if weights were but read"
    cases[0]["results"][f"{kind}/5"] = result(68.3, 693)
    assert outcome_of(cases, f"{kind}/5 beside {kind}/8, memory").met is False
    assert outcome_of(cases, f"{kind}/5 beside {kind}/8, P90").met is False


def test_five_bits_beside_torch():
    cases = [case({"gq int8/5": result(4.0), "torch int8": result(10.0)})]
    found = outcome_of(cases, "gq int8/5 beside torch int8")
    assert (found.met, found.measured) == (True, pytest.approx(60.0))


def test_two_threads_and_who_is_absent_do_not_count():
    measured = {"gq/5": result(4.0), "torch int8": result(10.0)}
    cases = [case(measured, threads=2), case({"gq/5": {"absent": "why"}, "torch int8": result(10.0)})]
    assert outcome_of(cases, "gq/5 beside torch int8").met is None


def test_the_worst_case_counts():
    cases = [
        case({"gq/5": result(3.0), "torch int8": result(10.0)}),
        case({"gq/5": result(5.0), "torch int8": result(10.0)}, chunk_ms=240),
    ]
    found = outcome_of(cases, "gq/5 beside torch int8")
    assert (found.met, found.measured, found.cells) == (False, pytest.approx(50.0), 2)
    assert found.missed == ["50  rnnt, 1, 240"]


def test_summary(tmp_path):
    cases = [case({"gq/5": result(4.0), "torch int8": result(10.0)})]
    lines = summary({"cases": cases}).splitlines()
    assert (
        "met      gq/5 beside torch int8, P90 user-perceived latency: percent less: 60 of 60 wanted, 1 cells, "
        "90 if weights were but read"
    ) in lines
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"cases": cases}))
    assert CliRunner().invoke(main, [str(record)]).output.splitlines() == lines
