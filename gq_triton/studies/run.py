"""Runs a study's cells, each at most once, and keeps what they gave."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gq_triton as gq
from gq_triton.files import save_json
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.metrics import error_counts
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training.config import TrainConfig
from gq_triton.training.data import SpeechSet, digest
from gq_triton.training.evaluation import evaluate, loss_per_token
from gq_triton.training.recipes import Recipe
from gq_triton.training.study import mean_bits, train_from_scratch, train_further

from .design import FLOAT, Cell, Study, speaker_folds

__all__ = ["Runner"]

Result = dict[str, Any]


class Fold(NamedTuple):
    """Speech of one fold."""

    untrained: Recognizer
    train: SpeechSet
    held_out: SpeechSet
    test: SpeechSet


class Runner:
    """Trains and measures recognizers of a study.

    Args:
        study: what is run.
        train: the utterances that are divided into folds.
        test: the standard test set.
        output: folder of the runs of all studies; one that was interrupted goes on where it was, one that ended is not
            run again.
        provenance: what goes into every result: device, versions, commit, date.
        progress: whether to show progress bars.
    """

    def __init__(
        self,
        study: Study,
        train: Sequence[Utterance],
        test: Sequence[Utterance],
        output: Path,
        *,
        provenance: Mapping[str, object],
        progress: bool = True,
    ) -> None:
        self.study, self.train, self.test = study, list(train), list(test)
        self.output = Path(output) / study.model
        self.provenance, self.progress = provenance, progress
        self.held_out = speaker_folds(train, study.folds)
        self._folds: dict[int, Fold] = {}

    def run(self, cell: Cell) -> Result:
        """What a cell gave: its result, JSON-able, which its folder keeps.

        Raises:
            ValueError: the folder holds the result of another configuration.
        """
        path, configuration = self._path(cell), self._configuration(cell)
        if path.is_file():
            return _checked(path, configuration)
        fold, started = self._fold(cell), time.perf_counter()
        recognizer = self._recognizer(cell)
        report, beam_width = gq.report(recognizer.model), self._recipe(cell).beam_width
        quantized = cell.variant.allocation is not None
        result = {
            "fold": cell.fold,
            "variant": cell.variant.name,
            "group": cell.variant.group,
            "reference": cell.variant.reference,
            "configuration": configuration,
            "bits": mean_bits(report) if quantized else 32.0,
            "bytes": report.packed_bytes if quantized else report.float32_bytes,
            "float32_bytes": report.float32_bytes,
            "seconds": round(time.perf_counter() - started, 1),
            "held_out": self._measure(recognizer, fold.held_out, beam_width),
            "test": self._measure(recognizer, fold.test, beam_width),
            **self.provenance,
        }
        save_json(path, result)
        return result

    def found(self) -> list[Result]:
        """What all cells gave that were run, row by row.

        Raises:
            ValueError: the folder holds the result of another configuration.
        """
        return [self.run(cell) for cell in self.study.cells() if self._path(cell).is_file()]

    def _path(self, cell: Cell) -> Path:
        return self.output / cell.path / "result.json"

    def _recognizer(self, cell: Cell) -> Recognizer:
        """Trained, and packed where it is quantized."""
        fold, recipe, run = self._fold(cell), self._recipe(cell), self.output / cell.path / "run"
        options = {"progress": self.progress}
        if cell.variant == FLOAT:
            return train_from_scratch(fold.untrained, recipe, fold.train, run, **options)
        parent, allocation = self._parent(cell), cell.variant.allocation
        if not cell.variant.trained:
            return parent.packed_copy(allocation)
        trained = train_further(parent, allocation, fold.train, self._training(cell), run, **options)
        return trained if allocation is None else trained.convert()

    def _parent(self, cell: Cell) -> Recognizer:
        """The float recognizer that a cell starts from."""
        parent = Cell(cell.fold, FLOAT)
        self.run(parent)
        return Recognizer.load(self.output / parent.path / "run" / "recognizer.safetensors")

    def _recipe(self, cell: Cell) -> Recipe:
        """The study's, with the fold for a seed."""
        recipe = self.study.recipe
        seeded = {name: replace(getattr(recipe, name), seed=cell.fold) for name in ("train", "qat")}
        return replace(recipe, **seeded)

    def _training(self, cell: Cell) -> TrainConfig | None:
        """None where nothing is trained."""
        recipe = self._recipe(cell)
        if cell.variant == FLOAT:
            return recipe.train
        return recipe.qat.changed(dict(cell.variant.settings)) if cell.variant.trained else None

    def _configuration(self, cell: Cell) -> dict:
        """All that decides a result but the code, JSON-able."""
        recipe, training, allocation = self._recipe(cell), self._training(cell), cell.variant.allocation
        return {
            "preset": recipe.preset,
            "sizes": dict(recipe.sizes),
            "tokenizer": recipe.tokenizer,
            "front_end": dict(recipe.front_end),
            "folds": self.study.folds,
            "data": [digest(self.train), digest(self.test)],
            "beam_width": recipe.beam_width,
            "pretraining": recipe.pretrain and recipe.pretrain.to_dict(),
            "spoken": recipe.spoken,
            "float_training": recipe.train.to_dict(),
            "training": training and training.to_dict(),
            "quantization": allocation
            and [[pattern, config and config.to_dict()] for pattern, config in allocation.items()],
        }

    def _fold(self, cell: Cell) -> Fold:
        if cell.fold not in self._folds:
            recipe, held_out = self._recipe(cell), self.held_out[cell.fold]
            kept = [utterance for utterance in self.train if utterance.speaker not in held_out]
            rest = [utterance for utterance in self.train if utterance.speaker in held_out]
            untrained = recipe.untrained(kept, recipe.train.seed)
            speeds = (recipe.train.speeds, (1.0,), (1.0,))
            sets = (
                SpeechSet(part, untrained.front_end, untrained.tokenizer, speeds=each, progress=self.progress)
                for part, each in zip((kept, rest, self.test), speeds, strict=True)
            )
            self._folds[cell.fold] = Fold(untrained, *sets)
        return self._folds[cell.fold]

    def _measure(self, recognizer: Recognizer, data: SpeechSet, beam_width: int) -> dict:
        """Counts of errors of every speaker, as in :data:`gq_triton.studies.statistics.Counts`, and the loss."""
        found = evaluate(recognizer, data, beam_width=beam_width, progress=self.progress)
        return {"speakers": _by_speaker(data, found.hypotheses), "loss_per_token": loss_per_token(recognizer, data)}


def _by_speaker(data: SpeechSet, hypotheses: Sequence[str]) -> dict[str, list[int]]:
    columns = [*error_counts(data.texts, hypotheses), *error_counts(data.texts, hypotheses, unit="char")]
    counts: dict[str, list[int]] = {}
    for utterance, *row in zip(data.utterances, *columns, strict=True):
        kept = counts.setdefault(utterance.speaker, [0, 0, 0, 0])
        counts[utterance.speaker] = [a + int(b) for a, b in zip(kept, row, strict=True)]
    return counts


def _checked(path: Path, configuration: dict) -> Result:
    result = json.loads(path.read_text())
    wanted = json.loads(json.dumps(configuration))
    differing = [name for name in wanted if result["configuration"].get(name) != wanted[name]]
    if differing:
        raise ValueError(
            f"{path} is of another configuration: {', '.join(differing)} differ. Choose another output folder, or "
            "remove that result"
        )
    return result
