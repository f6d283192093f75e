"""What counts of errors say: pooled rates, and differences with their intervals.

Speakers are what is drawn at random, so they are what the bootstrap resamples, whole (Bisani and Ney, ICASSP 2004), and
a difference is resampled in pairs: both recognizers on the same speakers. Two recognizers are called equivalent where
the 90 % interval of the difference lies within the margin on both sides: two one-sided tests at 5 % (Schuirmann, 1987).

Intervals hold for the recognizers that were trained, and for other speakers: there is one run per fold and row, so the
luck of training is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gq_triton.speech.metrics import resampled_interval

__all__ = ["Counts", "Difference", "difference", "interval", "rate"]

SAMPLES = 10_000

#: Of each speaker: word errors, words, character errors, characters.
Counts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Difference:
    """Of two word error rates, as fractions.

    Attributes:
        value: the second less the first: above zero where the second makes more errors.
        interval: 95 %, of the paired bootstrap over speakers.
        tested: 90 %, what equivalence is decided by.
    """

    value: float
    interval: tuple[float, float]
    tested: tuple[float, float]

    def equivalent(self, margin: float) -> bool:
        return -margin < self.tested[0] and self.tested[1] < margin

    def no_worse(self, margin: float) -> bool:
        """Whether the second is at most ``margin`` worse (one-sided, at 5 %)."""
        return self.tested[1] < margin


def rate(counts: Counts, *, characters: bool = False) -> float:
    """Errors over units, all speakers together."""
    errors, units = _columns(counts, characters)
    return float(errors.sum() / units.sum())


def interval(counts: Counts) -> tuple[float, float]:
    """The word error rate's 95 % bootstrap interval over speakers."""
    errors, words = _columns(counts)
    return resampled_interval(errors, words, samples=SAMPLES)


def difference(first: Counts, second: Counts) -> Difference:
    """How the second recognizer's word error rate differs from the first's, on the same speakers.

    Raises:
        ValueError: other speakers, or other words of one.
    """
    if {name: row[1] for name, row in first.items()} != {name: row[1] for name, row in second.items()}:
        raise ValueError("first and second must be counted on the same speakers and words")
    second = {name: second[name] for name in first}
    (before, words), (after, _) = _columns(first), _columns(second)
    more = after - before
    both, tested = (resampled_interval(more, words, confidence=share, samples=SAMPLES) for share in (0.95, 0.9))
    return Difference(float(more.sum() / words.sum()), both, tested)


def _columns(counts: Counts, characters: bool = False) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(list(counts.values()), dtype=np.int64).reshape(-1, 4)
    return (table[:, 2], table[:, 3]) if characters else (table[:, 0], table[:, 1])
