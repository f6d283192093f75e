"""Word and character error rates, with bootstrap intervals."""

from collections.abc import Hashable, Sequence

import numpy as np

from .extras import require

__all__ = ["bootstrap_interval", "cer", "error_counts", "resampled_interval", "wer"]


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word error rate: (substitutions + deletions + insertions) / reference words, over all utterances together.

    An empty reference is allowed; its hypothesis counts as insertions.

    Raises:
        ValueError: lists of different lengths, or no reference word at all.
    """
    errors, words = error_counts(references, hypotheses)
    return _ratio(errors, words)


def cer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Character error rate, spaces included; otherwise as :func:`wer`."""
    errors, characters = error_counts(references, hypotheses, unit="char")
    return _ratio(errors, characters)


def error_counts(
    references: Sequence[str], hypotheses: Sequence[str], unit: str = "word"
) -> tuple[np.ndarray, np.ndarray]:
    """Errors and reference units of each utterance.

    Args:
        references: what was said, one text per utterance.
        hypotheses: what was recognised, as many.
        unit: "word" (default) or "char".

    Returns:
        two int64 arrays (utterances,): errors, and reference words or characters.

    Raises:
        ValueError: lists of different lengths, or another unit.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"references and hypotheses differ in length: {len(references)} and {len(hypotheses)}")
    if unit not in ("word", "char"):
        raise ValueError(f"unit must be 'word' or 'char', got {unit!r}")
    pairs = [(_normalise(ref), _normalise(hyp)) for ref, hyp in zip(references, hypotheses, strict=True)]
    units = np.array([_length(ref, unit) for ref, _ in pairs], dtype=np.int64)
    errors = np.array([_length(hyp, unit) for _, hyp in pairs], dtype=np.int64)
    # jiwer refuses empty references; there every unit of the hypothesis is an insertion, as counted above.
    spoken = np.flatnonzero(units)
    if spoken.size:
        errors[spoken] = _align([pairs[i] for i in spoken], unit)
    return errors, units


def bootstrap_interval(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the word error rate (Bisani and Ney, ICASSP 2004).

    Args:
        references, hypotheses: as in :func:`wer`.
        confidence: in (0, 1), default 0.95.
        samples: number of resamples, default 1000.
        seed: the same seed gives the same interval.
        groups: one label per utterance, such as its speaker; whole groups are resampled, since a speaker's errors go
            together. Default: every utterance for itself.

    Returns:
        (low, high).

    Raises:
        ValueError: as :func:`wer`, and for numbers out of range or groups of another length.
    """
    errors, words = error_counts(references, hypotheses)
    _ratio(errors, words)
    if groups is not None:
        errors, words = _sum_groups(errors, words, groups)
    return resampled_interval(errors, words, confidence=confidence, samples=samples, seed=seed)


def resampled_interval(
    errors: np.ndarray, units: np.ndarray, *, confidence: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(errors) / sum(units), resampling pairs of them with replacement.

    Args:
        errors, units: (n,) integers, of each utterance or group; errors may be differences of errors.
        confidence, samples, seed: as in :func:`bootstrap_interval`.

    Raises:
        ValueError: for numbers out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    draws = np.random.default_rng(seed).integers(len(errors), size=(samples, len(errors)))
    resampled = errors[draws].sum(1) / np.maximum(units[draws].sum(1), 1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def _align(pairs: Sequence[tuple[str, str]], unit: str) -> np.ndarray:
    jiwer = require("jiwer")
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    output = process([ref for ref, _ in pairs], [hyp for _, hyp in pairs])
    return np.array([sum(_chunk_errors(chunk) for chunk in chunks) for chunks in output.alignments], dtype=np.int64)


def _chunk_errors(chunk) -> int:
    if chunk.type == "equal":
        return 0
    return max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)


def _sum_groups(errors: np.ndarray, words: np.ndarray, groups: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    if len(groups) != len(errors):
        raise ValueError(f"groups must have one label per utterance ({len(errors)}), got {len(groups)}")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    return _sum_by(index, errors), _sum_by(index, words)


def _sum_by(index: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.bincount(index, weights=counts).astype(np.int64)


def _ratio(errors: np.ndarray, units: np.ndarray) -> float:
    total = int(units.sum())
    if total == 0:
        raise ValueError("references must hold at least one word")
    return int(errors.sum()) / total


def _normalise(text: str) -> str:
    return " ".join(text.split())


def _length(text: str, unit: str) -> int:
    return len(text.split()) if unit == "word" else len(text)
