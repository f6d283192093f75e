import fnmatch
import warnings

import pytest
import tones

from gq_triton.models import model_of, preset
from gq_triton.quantize import select
from gq_triton.studies.an4 import STUDIES


@pytest.mark.parametrize("name", list(STUDIES))
def test_rows_have_names_of_their_own(name):
    study = STUDIES[name]
    paths = [cell.path for cell in study.cells()]
    assert len(set(paths)) == len(paths)
    assert set(study.measured) <= set(range(study.folds))


def test_settings_are_chosen_on_a_fold_that_is_not_reported():
    chosen = set(STUDIES["an4-ablation"].measured)
    assert all(chosen.isdisjoint(STUDIES[name].measured) for name in ("an4-rnnt", "an4-conformer"))


@pytest.mark.parametrize("name", list(STUDIES))
def test_every_row_quantizes_the_model_of_its_study(name):
    """No pattern matches nothing, and but for torchao, which knows linear layers only, no weight stays float."""
    study = STUDIES[name]
    recipe = study.recipe
    model = model_of(preset(recipe.preset, 20, features=recipe.front_end["n_mels"], **recipe.sizes))
    for variant in study.variants:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            selected = select(model, variant.allocation)
        assert len(selected) == expected(model, variant), variant.name
        recipe.qat.changed(dict(variant.settings))


def expected(model, variant):
    """Matrices of weights that a variant means."""
    names = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    names = [name for name in names if not name.endswith(("key_bias", "distance_bias"))]  # of attention's scores
    if variant.group != "torchao":
        return len(names)
    layers = [name.rpartition(".")[0] for name in names]
    return sum(any(fnmatch.fnmatch(layer, pattern) for pattern in variant.allocation) for layer in layers)


def test_the_models_are_of_the_size_that_is_said():
    for name, low, high in (("an4-rnnt", 2.5e6, 3.2e6), ("an4-conformer", 1.0e6, 1.5e6)):
        recipe = STUDIES[name].recipe
        made = recipe.untrained(tones.utterances(6), 0).model
        assert low < sum(parameter.numel() for parameter in made.parameters()) < high
