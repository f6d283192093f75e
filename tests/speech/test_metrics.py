import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.speech.metrics import bootstrap_interval, cer, error_counts, wer


def distance(reference, hypothesis):
    """Levenshtein's distance by the textbook recursion."""
    row = list(range(len(hypothesis) + 1))
    for i, a in enumerate(reference, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(hypothesis, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


texts = st.lists(st.sampled_from(["a", "b", "cd"]), max_size=6).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=6))
def test_counts_are_edit_distances(pairs):
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    errors, words = error_counts(references, hypotheses)
    assert errors.tolist() == [distance(r.split(), h.split()) for r, h in pairs]
    assert words.tolist() == [len(r.split()) for r in references]
    errors, characters = error_counts(references, hypotheses, unit="char")
    assert errors.tolist() == [distance(r, h) for r, h in pairs]
    assert characters.tolist() == [len(r) for r in references]


def test_rates_pool_all_utterances():
    assert wer(["a b c", "d"], ["a x c", "d e"]) == 2 / 4
    assert cer(["abc", "d"], ["abx", "d"]) == 1 / 4
    assert wer(["a b"], ["a b"]) == 0
    assert wer(["a"], ["b c d"]) == 3
    assert wer(["", "a"], ["x", "a"]) == 1
    assert wer(["a  b "], ["a b"]) == 0


def test_interval_covers_the_rate_and_narrows_with_data():
    references = ["a b c d e"] * 40
    hypotheses = ["a b c d e", "a b x d e"] * 20
    low, high = bootstrap_interval(references, hypotheses)
    assert 0 < low < wer(references, hypotheses) < high < 0.2
    longer = bootstrap_interval(references * 9, hypotheses * 9)
    assert longer[1] - longer[0] == pytest.approx((high - low) / 3, rel=0.25)
    assert bootstrap_interval(references, hypotheses, confidence=0.5)[1] < high


def test_interval_is_seeded():
    arguments = ["a b"] * 30, ["a b", "a c", "a"] * 10
    assert bootstrap_interval(*arguments, seed=3) == bootstrap_interval(*arguments, seed=3)
    assert bootstrap_interval(*arguments, samples=10, seed=3) != bootstrap_interval(*arguments, samples=10, seed=4)


def test_resampling_speakers_widens_the_interval():
    references, hypotheses = ["a b"] * 60, ["a b"] * 30 + ["x b"] * 30
    alone = bootstrap_interval(references, hypotheses)
    speakers = [f"s{i // 10}" for i in range(60)]
    grouped = bootstrap_interval(references, hypotheses, groups=speakers)
    assert grouped[1] - grouped[0] > 1.5 * (alone[1] - alone[0])
    assert bootstrap_interval(references, hypotheses, groups=list(range(60))) == alone


def test_no_errors_give_an_interval_at_zero():
    assert bootstrap_interval(["a"] * 5, ["a"] * 5) == (0.0, 0.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="differ in length"):
        wer(["a"], [])
    with pytest.raises(ValueError, match="at least one word"):
        wer(["", " "], ["a", "b"])
    with pytest.raises(ValueError, match="unit"):
        error_counts(["a"], ["a"], unit="phone")
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(["a"], ["a"], confidence=1.0)
    with pytest.raises(ValueError, match="samples"):
        bootstrap_interval(["a"], ["a"], samples=0)
    with pytest.raises(ValueError, match="groups"):
        bootstrap_interval(["a"], ["a"], groups=["x", "y"])
