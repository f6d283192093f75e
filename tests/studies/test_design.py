import pytest
import tones
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.speech.datasets import Utterance
from gq_triton.studies import FLOAT, LONGER, Study, Variant, speaker_folds
from gq_triton.training.recipes import RECIPES


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=20), folds=st.integers(2, 6), seed=st.integers(0, 3))
def test_folds_divide_the_speakers_into_about_equal_parts(sizes, folds, seed):
    spoken = [
        Utterance(f"{index}", "a.wav", "word " * size, f"speaker{index}", 1.0) for index, size in enumerate(sizes)
    ]
    if folds > len(sizes):
        with pytest.raises(ValueError, match=f"folds is {folds}; allowed: 2 to {len(sizes)}"):
            speaker_folds(spoken, folds, seed)
        return
    sets = speaker_folds(spoken, folds, seed)
    assert sorted(name for fold in sets for name in fold) == sorted({utterance.speaker for utterance in spoken})
    words = [sum(size for index, size in enumerate(sizes) if f"speaker{index}" in fold) for fold in sets]
    assert max(words) - min(words) <= max(sizes)  # as greedy filling of the smallest part guarantees
    assert sets == speaker_folds(list(reversed(spoken)), folds, seed)


def test_cells_are_float_first_and_every_variant_of_every_fold():
    variants = [Variant("GQ, 2 bits"), Variant("GQ, 1 bit")]
    study = Study("Which?", "tones", RECIPES["synthetic"], variants, folds=4, measured=(1, 3))
    cells = list(study.cells())
    assert [cell.variant for cell in cells[:4]] == [FLOAT, FLOAT, LONGER, LONGER]
    assert [(cell.variant.name, cell.fold) for cell in cells[4:]] == [
        ("GQ, 2 bits", 1),
        ("GQ, 2 bits", 3),
        ("GQ, 1 bit", 1),
        ("GQ, 1 bit", 3),
    ]
    assert len({cell.path for cell in cells}) == len(cells)
    assert cells[-1].path == "fold-3/gq-1-bit"


def test_what_was_trained_is_compared_with_what_was_trained_on():
    untrained = Variant("uniform, 2 bits", trained=False)
    study = Study("Which?", "tones", RECIPES["synthetic"], [untrained])
    assert study.rows == [FLOAT, untrained]
    rows = [FLOAT, LONGER, untrained, Variant("GQ, 2 bits")]
    assert [row.reference for row in rows] == [None, FLOAT.name, FLOAT.name, LONGER.name]


def test_tones_have_speakers_to_divide():
    assert len(speaker_folds(tones.utterances(12), 4)) == 4
