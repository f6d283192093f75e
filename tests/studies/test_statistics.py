import numpy as np
import pytest

from gq_triton.studies import difference, interval, rate

SPEAKERS = 40


def counts(errors, words=50):
    """Of speakers with these numbers of word errors."""
    return {f"s{index}": [int(count), words, 2 * int(count), 5 * words] for index, count in enumerate(errors)}


def test_rates_are_of_all_units_together():
    both = {"a": [1, 2, 3, 40], "b": [0, 18, 0, 60]}
    assert rate(both) == 1 / 20
    assert rate(both, characters=True) == 3 / 100


def test_an_interval_holds_the_rate_and_narrows_with_speakers():
    draws = np.random.default_rng(0)
    few, many = (counts(draws.binomial(50, 0.1, size)) for size in (10, 1000))
    for found in (few, many):
        low, high = interval(found)
        assert low < rate(found) < high
    assert np.diff(interval(many)) < np.diff(interval(few)) / 4


def test_pairing_takes_out_what_speakers_have_in_common():
    errors = np.random.default_rng(1).integers(0, 30, SPEAKERS)
    first, second = counts(errors), counts(errors + 1)  # one word in fifty more, for every speaker
    found = difference(first, second)
    assert found.value == pytest.approx(0.02)
    assert found.interval == pytest.approx((0.02, 0.02))
    assert np.diff(interval(second)) > 0.05


@pytest.mark.parametrize(
    "more, equivalent, no_worse",
    [(0.0, True, True), (0.03, False, False), (-0.03, False, True)],
    ids=["the same", "worse", "better"],
)
def test_verdicts(more, equivalent, no_worse):
    draws = np.random.default_rng(2)
    errors = draws.integers(10, 20, SPEAKERS)
    noise = draws.integers(-1, 2, SPEAKERS) + round(50 * more)
    found = difference(counts(errors), counts(errors + noise))
    assert (found.equivalent(0.01), found.no_worse(0.01)) == (equivalent, no_worse)
    assert found.interval[0] <= found.tested[0] <= found.value <= found.tested[1] <= found.interval[1]


def found_equivalent(more: float, spread: float, times: int) -> int:
    """How often 60 speakers with 50 words each, and this many more errors in the mean, pass for equivalent."""
    draws = np.random.default_rng(3)
    count = 0
    for _ in range(times):
        shared = draws.integers(5, 15, 60)
        after = shared + draws.normal(more, spread, 60).round().astype(int)
        count += difference(counts(shared), counts(np.maximum(after, 0))).equivalent(0.01)
    return count


def test_equivalence_is_wrong_at_its_stated_rate():
    """With a true difference at the margin, half a word of fifty, the test says "equivalent" one time in twenty."""
    wrong = found_equivalent(0.5, spread=1.5, times=200)
    assert 2 <= wrong <= 20  # of a binomial with 200 draws at 5 %, less than 0.2 % lies outside


def test_equivalence_is_found_where_it_holds():
    assert found_equivalent(0.0, spread=0.5, times=50) == 50  # the margin is seven standard errors away


def test_other_speakers_cannot_be_compared():
    with pytest.raises(ValueError, match="same speakers and words"):
        difference(counts([1, 2]), counts([1, 2, 3]))
    with pytest.raises(ValueError, match="same speakers and words"):
        difference(counts([1, 2]), counts([1, 2], words=51))
