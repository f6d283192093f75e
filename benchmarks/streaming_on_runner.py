"""Streaming recognizers without torch, for streaming_worker.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from streaming_schedule import BLANK, forced_labels

from gq_triton.kernels import native
from gq_triton.runtime import Runner, Stream


class OnRunner:
    """The recognizer of a variant; see ``streaming_worker.Streaming``."""

    def __init__(self, variant: dict) -> None:
        runner = Runner.load(variant["file"], variant["threads"])
        self.weight_bytes = sum({id(array): array.nbytes for array in arrays(runner.model)}.values())
        self.switch_seconds = variant.get("switch_seconds")
        self.stream = ForcedStream(runner, variant)

    @property
    def logits(self) -> np.ndarray:
        return self.stream.logits

    def restart(self) -> None:
        self.stream.reset()
        if self.switch_seconds is not None:
            self.stream.switch_at(self.switch_seconds)

    def push(self, samples: np.ndarray) -> int:
        self.stream.push(samples)
        return len(self.stream.labels)

    def finish(self) -> int:
        self.stream.finish()
        return len(self.stream.labels)


class ForcedStream(Stream):
    """Evaluates all that a stream does, and takes the labels of the schedule."""

    logits: np.ndarray

    def __init__(self, runner: Runner, variant: dict) -> None:
        super().__init__(runner, variant["chunk_ms"])
        self.variant = variant

    def choose(self, logits: np.ndarray, frame: int) -> list[int]:
        super().choose(logits, frame)
        labels = forced_labels(frame, len(logits), len(self.labels), self.variant)
        emitted = [place for place, label in enumerate(labels) if label != BLANK]
        if emitted:
            self.logits = logits[emitted[0]]
        return labels


def arrays(value: object) -> Iterator[np.ndarray]:
    """The arrays that a model is made of."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from arrays(part)
    elif isinstance(value, native.Weight):
        yield from arrays(value.arrays)
    elif hasattr(value, "__dict__"):
        yield from arrays(list(vars(value).values()))
