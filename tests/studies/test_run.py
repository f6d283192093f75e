import json
from dataclasses import replace

import pytest
import tones

import gq_triton as gq
from gq_triton.speech.recognizer import Recognizer
from gq_triton.studies import FLOAT, LONGER, Cell, Runner, Study, Variant, summarize
from gq_triton.training import TrainConfig
from gq_triton.training.recipes import RECIPES

SHORT = TrainConfig(epochs=1, batch_size=6, learning_rate=1e-2, evaluate_every=1)
UNTRAINED = Variant("post-training, 2 bits", {"*": gq.GQConfig(bits=2)}, trained=False)
TRAINED = Variant("GQ, 2 bits", {"*": gq.GQConfig(bits=2)}, settings={"epochs": "2"})
PROVENANCE = {"device": "a device", "date": "2026-01-01"}


def study(**changes):
    recipe = replace(RECIPES["synthetic"], preset="tiny", train=SHORT, qat=SHORT)
    return Study("Does it run?", "tones", recipe, [UNTRAINED, TRAINED], **{"folds": 2, "measured": (0,), **changes})


def runner(folder, design=None):
    spoken, test = tones.utterances(12), tones.utterances(4, seed=1)
    return Runner(design or study(), spoken, test, folder, provenance=PROVENANCE, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    made = runner(folder)
    return folder, [made.run(cell) for cell in study().cells()]


def test_every_cell_is_measured_on_speakers_it_never_heard(finished):
    _, results = finished
    held_out = runner("unused").held_out[0]
    for result in results:
        assert set(result["held_out"]["speakers"]) == held_out
        words = sum(row[1] for row in result["held_out"]["speakers"].values())
        assert words == sum(len(u.text.split()) for u in tones.utterances(12) if u.speaker in held_out)
        assert sum(row[1] for row in result["test"]["speakers"].values()) > 0
        assert result["held_out"]["loss_per_token"] > 0
        assert result["device"] == "a device"
    assert [result["variant"] for result in results] == [FLOAT.name, LONGER.name, UNTRAINED.name, TRAINED.name]
    assert [result["reference"] for result in results] == [None, FLOAT.name, FLOAT.name, LONGER.name]
    assert [result["bits"] for result in results] == [32.0, 32.0, 2.0, 2.0]
    assert results[0]["bytes"] == results[1]["bytes"] == results[2]["float32_bytes"] > 8 * results[2]["bytes"]
    training = [result["configuration"]["training"] for result in results]
    assert training[2] is None and [training[index]["epochs"] for index in (0, 1, 3)] == [1, 1, 2]


def test_no_fold_is_trained_on_the_speakers_it_is_measured_on(finished):
    folder, _ = finished
    made = runner(folder)
    fold = made._fold(Cell(0, FLOAT))
    assert set(fold.train.speakers).isdisjoint(made.held_out[0])
    assert set(fold.train.speakers) | made.held_out[0] == {utterance.speaker for utterance in tones.utterances(12)}
    for variant in (FLOAT, LONGER, TRAINED):
        run = folder / "tones" / Cell(0, variant).path / "run" / "config.json"
        assert json.loads(run.read_text())["data"] == fold.train.digest()


def test_a_result_is_not_run_again_and_an_interrupted_one_gives_the_same(finished):
    folder, results = finished
    again = runner(folder)
    cells = list(study().cells())
    paths = [folder / "tones" / cell.path / "result.json" for cell in cells]
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert [again.run(cell) for cell in cells] == results
    assert [path.stat().st_mtime_ns for path in paths] == stamps
    paths[3].unlink()
    assert again.found() == results[:3]
    repeated = again.run(cells[3])
    assert repeated["held_out"] == results[3]["held_out"]


def test_rows_start_from_their_folds_float_recognizer(finished):
    folder, results = finished
    recognizer = Recognizer.load(folder / "tones" / Cell(0, FLOAT).path / "run" / "recognizer.safetensors")
    assert recognizer.stage == "float"
    assert gq.report(recognizer.model).float32_bytes == results[0]["bytes"]


def test_a_result_of_another_configuration_is_refused(finished):
    folder, _ = finished
    other = replace(study(), recipe=replace(study().recipe, beam_width=2))
    with pytest.raises(ValueError, match=r"result\.json is of another configuration: beam_width differ"):
        runner(folder, other).run(Cell(0, FLOAT))


def test_a_summary_pools_and_compares(finished):
    _, results = finished
    lines = summarize(results, margin=0.01)
    assert [line.variant for line in lines] == [FLOAT.name, LONGER.name, UNTRAINED.name, TRAINED.name]
    errors = [sum(row[0] for row in result["held_out"]["speakers"].values()) for result in results]
    words = sum(row[1] for row in results[0]["held_out"]["speakers"].values())
    assert lines[0].difference is None and lines[0].equivalent is None
    for index, reference in ((1, 0), (2, 0), (3, 1)):
        assert lines[index].difference.value == pytest.approx((errors[index] - errors[reference]) / words)
    assert lines[2].wer == pytest.approx(errors[2] / words)
    assert lines[2].ratio == pytest.approx(results[2]["float32_bytes"] / results[2]["bytes"])
    json.dumps([line.to_dict() for line in lines])


def test_a_summary_leaves_open_what_has_no_float_recognizer(finished):
    _, results = finished
    (line,) = summarize(results[1:2], margin=0.01)
    assert line.difference is None and line.no_worse is None and line.folds == 1
