import fnmatch
from dataclasses import replace

import pytest
import tones
import torch

from gq_triton.models import CTC, RNNT
from gq_triton.models.rnnt import RNNT_PRESETS
from gq_triton.speech.features import LogMel
from gq_triton.training import recipes
from gq_triton.training.recipes import ALLOCATIONS, RECIPES, recipe_of


@pytest.fixture(scope="module")
def spoken():
    return tones.utterances(10)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.preset != "base"])
def test_every_recipe_builds_a_recognizer_of_its_preset(name, spoken):
    recipe = RECIPES[name]
    recognizer = recipe.untrained(spoken, seed=0)
    assert recognizer.stage == "float"
    assert recognizer.tokenizer.kind == recipe.tokenizer
    assert recognizer.model.config.encoder_hidden == RNNT_PRESETS[recipe.preset]["encoder_hidden"]
    assert recognizer.model.config.vocab_size == recognizer.tokenizer.vocab_size


def test_a_conformer_is_a_transducer_unless_it_is_asked_for_without_a_predictor(spoken):
    recipe = recipe_of("an4", "conformer")
    assert isinstance(recipe.untrained(spoken, 0).model, RNNT)
    assert isinstance(replace(recipe, sizes={"predictor_layers": 0}).untrained(spoken, 0).model, CTC)


def test_the_seed_draws_the_weights(spoken):
    first, again, other = (RECIPES["synthetic"].untrained(spoken, seed).model.joint.output.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_features_are_normalised_on_a_sample_of_a_large_set(spoken, monkeypatch):
    whole = RECIPES["synthetic"].untrained(spoken, 0).front_end.mean
    monkeypatch.setattr(recipes, "STATISTICS_UTTERANCES", 3)
    assert torch.equal(RECIPES["synthetic"].untrained(spoken, 0).front_end.mean, sampled_mean(spoken[::4]))
    assert not torch.equal(whole, sampled_mean(spoken[::4]))


def sampled_mean(spoken):
    front_end = LogMel(**RECIPES["synthetic"].front_end)
    return front_end.fit(utterance.load() for utterance in spoken).mean


@pytest.mark.parametrize("name", list(ALLOCATIONS))
def test_every_pattern_of_an_allocation_names_a_layer(name, spoken):
    names = [name for name, _ in RECIPES["synthetic"].untrained(spoken, 0).model.named_modules()]
    assert all(fnmatch.filter(names, pattern) for pattern in ALLOCATIONS[name])


def test_the_quickstart_takes_the_widths_of_its_promise():
    allocations = [ALLOCATIONS[name] for name in RECIPES["synthetic"].allocations]
    widths = [{config.bits for config in allocation.values()} for allocation in allocations]
    assert widths[:4] == [{8}, {5}, {4}, {2}]
    assert 1 in widths[4]
    assert len(widths[4]) > 1
