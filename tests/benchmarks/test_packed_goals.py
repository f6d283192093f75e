"""Goals against records made up for the purpose."""

import json

import packed_goals
import pytest
from click.testing import CliRunner
from packed_goals import GOALS, PEERS, outcomes, summary


def entry(n, k, m, mode, **results):
    """A case; results by contender, underscores for blanks and `b` before the width: gq_int8_b4."""
    named = {name.replace("_b", "/").replace("_", " "): result for name, result in results.items()}
    return {"case": {"n": n, "k": k, "m": m, "dtype": "bfloat16", "mode": mode, "bits": [4]}, "results": named}


def timed(ms=1.0, **figures):
    return {"ms": {"median": ms}, "error": 0.1, **figures}


def outcome_of(record, what):
    (found,) = [outcome for outcome in outcomes({"cases": record}) if outcome.what.startswith(what)]
    return found


def test_nothing_measured_is_neither_met_nor_missed():
    found = outcomes({"cases": []})
    assert len(found) == len(GOALS) + len(PEERS)
    assert all(outcome.met is None and outcome.measured is None for outcome in found)
    assert summary({"cases": []}).count("unknown") == len(found)


@pytest.mark.parametrize("bits, least", [(4, 3.5), (2, 6.0), (1, 9.0)])
def test_large_weights_and_one_token(bits, least):
    what = f"M = 1, 8192 x 8192 and larger, cold, {bits} bit"
    cases = [
        entry(8192, 8192, 1, "cold", **{f"gq_b{bits}": timed(speedup=least + 0.1)}),
        entry(16384, 16384, 1, "cold", **{f"gq_b{bits}": timed(speedup=least)}),
        # of no concern: smaller, more tokens, a warm cache, another width, 8-bit activations
        entry(4096, 8192, 1, "cold", **{f"gq_b{bits}": timed(speedup=0.1)}),
        entry(8192, 8192, 2, "cold", **{f"gq_b{bits}": timed(speedup=0.1)}),
        entry(8192, 8192, 1, "warm graph", **{f"gq_b{bits}": timed(speedup=0.1)}),
        entry(8192, 8192, 1, "cold", gq_b7=timed(speedup=0.1), **{f"gq_int8_b{bits}": timed(speedup=0.1)}),
    ]
    found = outcome_of(cases, what)
    assert (found.met, found.measured, found.wanted, found.cells, found.missed) == (True, least, least, 2, [])
    cases[0]["results"][f"gq/{bits}"]["speedup"] = least - 0.1
    found = outcome_of(cases, what)
    assert (found.met, found.measured) == (False, least - 0.1)
    (missed,) = found.missed
    assert str(missed) == f"{least - 0.1:.3g}  8192 x 8192, M = 1, cold, gq/{bits}"


def test_share_of_the_floor_counts_every_size_and_width():
    cases = [
        entry(144, 144, 1, "cold", gq_b1=timed(floor_share=0.85), gq_b8=timed(floor_share=0.7)),
        entry(8192, 8192, 1, "cold", gq_b3=timed(floor_share=0.5), torch=timed(floor_share=0.1)),
        entry(8192, 8192, 4, "cold", gq_b3=timed(floor_share=0.2)),
    ]
    found = outcome_of(cases, "M = 1, every size")
    assert (found.met, found.measured, found.cells) == (False, 0.5, 3)
    assert [cell.value for cell in found.missed] == [0.5, 0.7]  # the worst first


@pytest.mark.parametrize("m, cells", [(8, 0), (16, 1), (32, 1), (64, 0)])
def test_a_few_tokens_on_large_weights(m, cells):
    found = outcome_of([entry(8192, 8192, m, "cold", gq_b4=timed(speedup=3.6))], "M = 16..32")
    assert found.cells == cells


def test_speech_shapes_are_those_from_512_to_2048():
    cases = [
        entry(512, 512, 1, "warm graph", gq_b8=timed(speedup=1.1), gq_b4=timed(speedup=1.0)),
        entry(2048, 512, 16, "warm graph", gq_b8=timed(speedup=1.2), gq_b4=timed(speedup=1.25)),
        entry(4096, 1024, 1, "warm graph", gq_b4=timed(speedup=0.1)),
        entry(1024, 256, 1, "warm graph", gq_b4=timed(speedup=0.1)),
        entry(512, 512, 32, "warm graph", gq_b4=timed(speedup=0.1)),
        entry(512, 512, 1, "warm", gq_b4=timed(speedup=0.1)),
    ]
    found = outcome_of(cases, "512..2048")
    assert (found.met, found.measured, found.cells) == (True, 1.0, 4)
    found = outcome_of(cases, "the same from 1024 x 1024")
    assert (found.met, found.measured, found.cells) == (False, 1.25, 1)


def test_many_tokens():
    cases = [
        entry(512, 512, 1024, "cold", gq_b4=timed(speedup=0.95), gq_int8_b4=timed(speedup=1.6)),
        entry(8192, 8192, 4096, "cold", gq_b4=timed(speedup=0.9), gq_fp8_b4=timed(speedup=1.4)),
        entry(8192, 8192, 256, "cold", gq_b4=timed(speedup=0.1), gq_int8_b4=timed(speedup=0.1)),
    ]
    weights, activations = (outcome_of(cases, f"M >= 1024, {what}") for what in ("weight-only", "8-bit"))
    assert (weights.met, weights.measured, weights.cells) == (True, 0.9, 2)
    assert (activations.met, activations.measured, activations.cells) == (False, 1.4, 2)


def test_peers_are_compared_by_the_geometric_mean():
    cases = [
        entry(512, 512, 1, "cold", gq_b4=timed(1.0), **{"bitsandbytes nf4/4": timed(8.0) | {"error": 0.08}}),
        entry(512, 512, 2, "cold", gq_b4=timed(2.0), **{"bitsandbytes nf4/4": timed(1.0) | {"error": 0.1}}),
        entry(512, 512, 4, "cold", gq_b4=timed(2.0), **{"bitsandbytes nf4/4": {"absent": "not here"}}),
        entry(512, 512, 8, "cold", gq_b4={"wrong": "off"}, **{"bitsandbytes nf4/4": timed(1.0)}),
    ]
    found = outcome_of(cases, "gq/4 beside bitsandbytes nf4/4")
    assert found.measured == pytest.approx(2.0)  # of 8 and 1/2
    assert (found.met, found.cells, [cell.value for cell in found.missed]) == (True, 2, [0.5])
    assert found.notes == "mean error 0.1 beside 0.09"


def test_summary(tmp_path):
    cases = [entry(8192, 8192, 1, "cold", gq_b4=timed(speedup=3.0, floor_share=0.9))]
    lines = summary({"cases": cases}).splitlines()
    assert lines[0] == (
        "missed   M = 1, 8192 x 8192 and larger, cold, 4 bits: times as fast as torch bf16: 3 of 3.5 wanted, 1 cells"
    )
    assert lines[1].strip() == "3  8192 x 8192, M = 1, cold, gq/4"
    assert "met      M = 1, every size, cold: share of the floor: 0.9 of 0.8 wanted, 1 cells" in lines
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"cases": cases}))
    assert CliRunner().invoke(packed_goals.main, [str(record)]).output.splitlines() == lines
