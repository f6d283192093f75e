"""The benchmark of what training costs, on a model that takes seconds."""

import json
from dataclasses import replace

import pytest
import torch
from scripts import load_script

from gq_triton.training import TrainConfig
from gq_triton.training.recipes import RECIPES

training_cost = load_script("benchmarks/training_cost.py")
PLAN = training_cost.Plan(("tiny",), bits=4, batch_seconds=24.0, steps=2, audio_seconds=1.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return training_cost.run(PLAN, tmp_path_factory.mktemp("record"), torch.device("cpu"))


def test_the_hours_follow_from_the_rate(path):
    record = json.loads(path.read_text())
    assert record["ceilings"]["features_seconds_per_s"] > 1
    (entry,) = record["cases"]
    for name, config in (("float", RECIPES["librispeech"].train), ("gq", RECIPES["librispeech"].qat)):
        result = entry["results"][name]
        assert result["ms"]["samples"] == 2
        assert 0.3 * 24 < result["batch_seconds"] <= 24
        median = result["batch_seconds"] / result["ms"]["median"] * 1e3
        assert result["seconds_per_s"] == pytest.approx(median, rel=0.5)
        seconds = config.epochs * 960.9 * 3600 * (1 / 0.9 + 1 + 1 / 1.1) / 3
        assert result["hours"] == pytest.approx(seconds / result["seconds_per_s"] / 3600)
        assert result["epochs"] == config.epochs
    assert entry["results"]["gq"]["seconds_per_s"] < entry["results"]["float"]["seconds_per_s"]
    lines = training_cost.summary(record)
    assert [line.split(":")[0] for line in lines] == ["tiny, float", "tiny, gq"]
    assert f"60 epochs of 960.9 hours in {entry['results']['float']['hours']:,.0f} h" in lines[0]


def test_speech_is_as_long_as_librispeechs(path):
    config = TrainConfig(speeds=(0.9, 1.0))
    data = training_cost.RandomSpeech(config, features=80, vocab_size=512)
    assert sum(data.durations) / len(data.durations) == pytest.approx(12.5, abs=0.3)
    features, targets = data[((0, 0.9),)]
    assert features.shape == (round(100 * data.durations[0] / 0.9), 80)
    assert len(targets) == pytest.approx(5.5 * data.durations[0] / 0.9, abs=1)
    assert targets.min() >= 1 and targets.max() < 512


def test_a_batch_that_does_not_fit_is_divided(monkeypatch):
    tried, enough = [], 4

    def timed(recipe, config, bits, steps):
        tried.append(config.accumulate)
        if config.accumulate < enough:
            raise torch.OutOfMemoryError("too much")
        return {"accumulate": config.accumulate}

    monkeypatch.setattr(training_cost, "timed", timed)
    recipe = RECIPES["librispeech"]
    assert training_cost.fitting(recipe, recipe.train, None, 2) == {"accumulate": 4}
    assert tried == [1, 2, 4]
    enough = 99
    with pytest.raises(torch.OutOfMemoryError):
        training_cost.fitting(recipe, replace(recipe.train, accumulate=32), None, 2)


def test_plans_are_the_recipes_on_a_gpu():
    full, quick = (make(torch.device("cuda")) for make in (training_cost.Plan.full, training_cost.Plan.quick))
    assert full.batch_seconds == quick.batch_seconds == 0
    assert set(quick.models) < set(full.models)
