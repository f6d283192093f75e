import json
from dataclasses import replace

import pytest

import gq_triton as gq
from gq_triton.cli import datasets
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.synthetic import spoken_commands
from gq_triton.training.recipes import RECIPES

ROW = {"name", "bits", "ptq_wer", "qat_wer", "bytes", "ratio"}


def check_summary(output) -> dict:
    summary = json.loads((output / "summary.json").read_text())
    assert {"device", "versions", "commit", "seconds", "float", "rows"} <= summary.keys()
    assert {"wer", "bytes"} <= summary["float"].keys()
    for row in summary["rows"]:
        assert row.keys() >= ROW
        packed = Recognizer.load(output / row["file"])
        assert packed.stage == "packed"
        assert gq.report(packed.model).packed_bytes == row["bytes"]
        assert row["ratio"] == pytest.approx(summary["float"]["bytes"] / row["bytes"])
    for figure in ("error_rates.png", "sizes.png"):
        assert (output / figure).read_bytes().startswith(b"\x89PNG")
    return summary


def test_a_short_quickstart(gq_triton, monkeypatch, tmp_path):
    """The whole of it, with a few utterances and steps: it measures and writes what it says, without learning much."""
    counts = {"train": 40, "test": 6}

    def speak(_root, part):
        return spoken_commands(part, counts[part], cache_dir=tmp_path)

    monkeypatch.setitem(datasets.READERS, "synthetic", speak)
    recipe = RECIPES["synthetic"]
    train, qat = (replace(config, epochs=1) for config in (recipe.train, recipe.qat))
    names = ("4 bits", recipe.allocations[-1])
    monkeypatch.setitem(RECIPES, "synthetic", replace(recipe, train=train, qat=qat, allocations=names))

    printed = gq_triton.succeeds("quickstart", "--output", tmp_path / "out")
    summary = check_summary(tmp_path / "out")
    assert tuple(row["name"] for row in summary["rows"]) == names
    assert summary["rows"][0]["bits"] == 4
    assert 1 < summary["rows"][1]["bits"] < 4
    for row in summary["rows"]:
        assert f"{row['bytes']:,}" in printed
    deployed = Recognizer.load(tmp_path / "out" / summary["transcript"]["model"])
    assert summary["transcript"]["heard"] == deployed.transcribe(tmp_path / "out" / "unheard.wav")

    again = gq_triton.json("quickstart", "--output", tmp_path / "out")  # finds its finished runs
    assert [row["qat_wer"] for row in again["rows"]] == [row["qat_wer"] for row in summary["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "train"), "--split does not go with it"),
        (("--data", "manifest", "--root", "a.tsv"), "a manifest has no parts"),
    ],
)
def test_what_cannot_be_compared_is_refused(gq_triton, tmp_path, arguments, message):
    assert message in gq_triton.fails("quickstart", *arguments, "--output", tmp_path)


@pytest.mark.full
def test_the_quickstart_keeps_its_promise(gq_triton, tmp_path):
    """Under five minutes on two idle cores; a float error rate below 10 %, and 4 bits within 2 points of it."""
    gq_triton.succeeds("quickstart", "--output", tmp_path)
    summary = check_summary(tmp_path)
    assert [row["name"] for row in summary["rows"]][:4] == ["8 bits", "5 bits", "4 bits", "2 bits"]
    assert len(summary["rows"]) == 5
    assert summary["seconds"] < 300
    assert summary["float"]["wer"] < 0.10
    assert summary["rows"][2]["qat_wer"] < summary["float"]["wer"] + 0.02
    assert summary["transcript"]["heard"] == summary["transcript"]["said"]
