import json
from dataclasses import replace

import pytest
import tones

import gq_triton as gq
from gq_triton.cli import reproduce
from gq_triton.studies import FLOAT, Study, Variant
from gq_triton.training import TrainConfig
from gq_triton.training.recipes import RECIPES

SHORT = TrainConfig(epochs=1, batch_size=6, learning_rate=1e-2, evaluate_every=1)
VARIANTS = [
    Variant("post-training, 2 bits", {"*": gq.GQConfig(bits=2)}, trained=False, group="post-training"),
    Variant("post-training, 1 bit", {"*": gq.GQConfig(bits=1)}, trained=False, group="post-training"),
]
RECIPE = replace(RECIPES["synthetic"], preset="tiny", train=SHORT, qat=SHORT)


@pytest.fixture(autouse=True)
def tones_for_an4(monkeypatch):
    def load(data, root, splits, *, training):
        return tones.utterances(12) if training else tones.utterances(4, seed=1)

    monkeypatch.setattr(reproduce, "load_utterances", load)
    monkeypatch.setitem(
        reproduce.STUDIES, "tones", Study("Which?", "tones", RECIPE, VARIANTS, folds=2, measured=(0, 1))
    )
    command = reproduce.reproduce.params[0]
    monkeypatch.setattr(command.type, "choices", (*command.type.choices, "tones"))


def test_a_row_is_run_with_its_float_recognizer_and_recorded(gq_triton, tmp_path):
    command = ("reproduce", "tones", "--root", tmp_path, "--output", tmp_path / "runs", "--fold", 1)
    record = gq_triton.json(*command, "--row", "*1 bit")
    assert [line["variant"] for line in record["lines"]] == [FLOAT.name, "post-training, 1 bit"]
    assert record["lines"][1]["folds"] == 1
    assert record["environment"]["device"] and record["environment"]["versions"]["torch"]
    assert json.loads((tmp_path / "runs" / "tones.json").read_text()) == record
    rows = [json.loads(line) for line in (tmp_path / "runs" / "tones.jsonl").read_text().splitlines()]
    assert [(row["variant"], row["fold"]) for row in rows] == [(FLOAT.name, 1), ("post-training, 1 bit", 1)]

    found = ("reproduce", "tones", "--root", tmp_path, "--output", tmp_path / "runs", "--found")
    text = gq_triton.succeeds(*found)
    assert "Which?" in text and "post-training, 1 bit" in text and "post-training, 2 bits" not in text

    gq_triton.succeeds(*command, "--row", "*2 bits")
    assert [line["variant"] for line in gq_triton.json(*found)["lines"]] == [
        FLOAT.name,
        *(variant.name for variant in VARIANTS),
    ]


def test_a_record_is_of_one_device_and_names_all_commits(gq_triton, tmp_path):
    folder = tmp_path / "runs"
    command = ("reproduce", "tones", "--root", tmp_path, "--output", folder)
    assert f"{folder} holds no run of tones" in gq_triton.fails(*command, "--found")
    for fold in (0, 1):
        gq_triton.succeeds(*command, "--fold", fold, "--row", FLOAT.name)
    path = folder / "tones" / "fold-1" / "float32" / "result.json"
    result = json.loads(path.read_text())
    result["environment"]["commit"] = "another"
    path.write_text(json.dumps(result))
    assert gq_triton.json(*command, "--found")["environment"]["commit"].endswith(", another")
    result["environment"]["device"] = "another device"
    path.write_text(json.dumps(result))
    assert "several devices, to be told apart: " in gq_triton.fails(*command, "--found")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--row", "3 bits"), "--row '3 bits' names no variant; there are: float32; post-training, 2 bits"),
        (("--fold", 2), "--fold 2: the study runs 0, 1"),
    ],
)
def test_what_a_study_does_not_have_is_refused(gq_triton, tmp_path, options, message):
    assert message in gq_triton.fails("reproduce", "tones", "--root", tmp_path, "--output", tmp_path, *options)
    assert list(tmp_path.iterdir()) == []
