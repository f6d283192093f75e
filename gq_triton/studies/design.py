"""What a study runs: models, folds of a training set, and ways to quantize.

AN4's standard test set has 773 words, so a point of word error rate is eight words, within the noise of one run. A
study therefore divides the *training* speakers into disjoint folds, trains a float recognizer without each fold, with a
seed of its own, and measures on the fold that was left out: every training utterance is heard once by a model that
never heard its speaker. Each way to quantize starts from these same float recognizers and is compared with them
speaker by speaker: what was trained, with float recognizers that were trained on for as long. The standard test set is
measured with all of them as well, and told apart. Settings are chosen on a fold whose results are not reported.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gq_triton.speech.datasets import Utterance
from gq_triton.training.recipes import Recipe
from gq_triton.training.study import Allocation

__all__ = ["FLOAT", "LONGER", "Cell", "Study", "Variant", "speaker_folds"]


@dataclass(frozen=True)
class Variant:
    """One way to hold a recognizer's weights.

    Attributes:
        name: in tables.
        allocation: configurations by name pattern; None leaves the model float.
        trained: whether training goes on from the float recognizer, or weights are quantized as they are.
        settings: what this variant changes in the recipe's training, as :meth:`TrainConfig.changed` reads it.
        group: which variants are drawn as one line.
    """

    name: str
    allocation: Allocation | None = None
    trained: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)
    group: str = ""

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return re.sub(r"\W+", "-", self.name).strip("-").lower()

    @property
    def reference(self) -> str | None:
        """Name of the float row that it is compared with, trained on for as long; None for the first of all."""
        if self == FLOAT:
            return None
        return LONGER.name if self.trained and self != LONGER else FLOAT.name


FLOAT = Variant("float32", trained=False)
LONGER = Variant("float32, trained on")


@dataclass(frozen=True)
class Cell:
    """One recognizer to train and to measure: without a fold's speakers, its weights held as a variant says."""

    fold: int
    variant: Variant

    @property
    def path(self) -> str:
        """Folder of its run, within the model's."""
        return f"fold-{self.fold}/{self.variant.slug}"


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it.

    Attributes:
        question: in a sentence.
        model: a name; studies of the same model share its float recognizers.
        recipe: how the model is trained.
        variants: what is compared with the float recognizer.
        folds: into how many the speakers are divided.
        measured: which of the folds are run. Settings are chosen on fold 0.
        margin: difference of word error rates, a fraction, that counts as none.
    """

    question: str
    model: str
    recipe: Recipe
    variants: Sequence[Variant]
    folds: int = 4
    measured: Sequence[int] = (1, 2, 3)
    margin: float = 0.01

    @property
    def rows(self) -> list[Variant]:
        """All variants, with the float ones that they are compared with first."""
        trained = any(variant.trained for variant in self.variants)
        return [FLOAT, *([LONGER] if trained else []), *self.variants]

    def cells(self) -> Iterator[Cell]:
        """All runs, row by row."""
        for variant in self.rows:
            for fold in self.measured:
                yield Cell(fold, variant)


def speaker_folds(utterances: Sequence[Utterance], folds: int, seed: int = 0) -> list[set[str]]:
    """Divides the speakers into ``folds`` sets with about equally many words each; the same for the same arguments.

    Raises:
        ValueError: fewer speakers than folds.
    """
    words: dict[str, int] = {}
    for utterance in utterances:
        words[utterance.speaker] = words.get(utterance.speaker, 0) + len(utterance.text.split())
    if not 2 <= folds <= len(words):
        raise ValueError(f"folds is {folds}; allowed: 2 to {len(words)}, the number of speakers")
    speakers = sorted(words)
    random.Random(seed).shuffle(speakers)
    sets: list[set[str]] = [set() for _ in range(folds)]
    sizes = [0] * folds
    for speaker in sorted(speakers, key=lambda speaker: -words[speaker]):
        smallest = sizes.index(min(sizes))
        sets[smallest].add(speaker)
        sizes[smallest] += words[speaker]
    return sets
