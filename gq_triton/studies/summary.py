"""What a study found: results of its cells, pooled over folds and compared with the float recognizer of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .statistics import Counts, Difference, difference, interval, rate

__all__ = ["Line", "summarize"]


@dataclass(frozen=True)
class Line:
    """A variant, over all folds that were run. Rates are fractions.

    Attributes:
        variant, group: its name, and that of the line it is drawn in.
        folds: how many were run; the recognizers compared with are of the same ones.
        bits: mean over the quantized weights.
        bytes: of the packed model.
        ratio: how many times smaller than float32.
        wer, interval: on the speakers held out, all folds together, with the 95 % interval.
        cer, loss: character error rate, and loss per token in nats, mean of the folds.
        reference: name of the float row that it is compared with; None for the first of all.
        difference: from that, on the speakers held out; None where its folds were not all run.
        equivalent, no_worse: whether that lies within the study's margin, on both sides or on the upper one.
        test_wer, test_interval, test_difference: on the standard test set, all folds' recognizers together.
        seconds: of training and packing, mean of the folds.
    """

    variant: str
    group: str
    folds: int
    bits: float
    bytes: int
    ratio: float
    wer: float
    interval: tuple[float, float]
    cer: float
    loss: float
    reference: str | None
    difference: Difference | None
    equivalent: bool | None
    no_worse: bool | None
    test_wer: float
    test_interval: tuple[float, float]
    test_difference: Difference | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def summarize(results: Sequence[dict[str, Any]], margin: float) -> list[Line]:
    """A line for each variant, in the order in which they first appear.

    Args:
        results: of cells, as :class:`gq_triton.studies.Runner` gives them, float ones among them.
        margin: what difference of word error rates counts as none, a fraction.
    """
    groups: dict[str, dict[int, dict]] = {}
    for result in results:
        groups.setdefault(result["variant"], {})[result["fold"]] = result
    return [_line(by_fold, groups, margin) for by_fold in groups.values()]


def _line(by_fold: dict[int, dict], groups: dict[str, dict[int, dict]], margin: float) -> Line:
    results = [by_fold[fold] for fold in sorted(by_fold)]
    first, held_out, test = results[0], _pooled(results, "held_out"), _pooled(results, "test")
    references = groups.get(first["reference"], {})
    before = [references[fold] for fold in sorted(by_fold) if fold in references]
    compared = len(before) == len(results)
    change = difference(_pooled(before, "held_out"), held_out) if compared else None
    return Line(
        variant=first["variant"],
        group=first["group"],
        folds=len(results),
        bits=first["bits"],
        bytes=first["bytes"],
        ratio=first["float32_bytes"] / first["bytes"],
        wer=rate(held_out),
        interval=interval(held_out),
        cer=rate(held_out, characters=True),
        loss=_mean([result["held_out"]["loss_per_token"] for result in results]),
        reference=first["reference"],
        difference=change,
        equivalent=change and change.equivalent(margin),
        no_worse=change and change.no_worse(margin),
        test_wer=rate(test),
        test_interval=interval(test),
        test_difference=difference(_pooled(before, "test"), test) if compared else None,
        seconds=_mean([result["seconds"] for result in results]),
    )


def _pooled(results: Sequence[dict], part: str) -> Counts:
    """Counts of all folds: a speaker of the test set is heard by each fold's recognizer, which adds up."""
    total: dict[str, list[int]] = {}
    for result in results:
        for speaker, row in result[part]["speakers"].items():
            total[speaker] = [a + b for a, b in zip(total.get(speaker, [0] * 4), row, strict=True)]
    return total


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
