"""Speech as training batches, in an order fixed by (seed, epoch).

Features of small sets are computed once per utterance and speed, and kept. Those of large sets are computed when they
are needed, by worker processes, from files of which only the headers were read before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from gq_triton.speech.augment import speed_perturb
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.features import LogMel
from gq_triton.speech.tokens import Tokenizer

from .config import TrainConfig

__all__ = ["Batch", "BatchPlan", "SpeechSet", "digest", "load_batches"]

CACHE_HOURS = 20  # of speech, about 2.3 GB of features
MOST_WORKERS = 8  # processes that compute features for a training process, where its set is too large to keep
JITTER = 0.1  # relative, of lengths before they are sorted: else the same neighbours would meet in every epoch
NARROW_JITTER = 0.03  # the same where the seconds of a batch are limited, which must allow for it
SHORTEST = 0.01  # seconds that an utterance takes of a batch at least: a frame

Key = tuple[int, float]  # index of an utterance, speed factor
Item = tuple[Key, ...]  # one utterance, or several of one speaker that are joined


@dataclass(frozen=True)
class Batch:
    """Padded utterances.

    Attributes:
        features: ``(B, T, n_mels)`` float32, zeros beyond a length.
        feature_lengths: ``(B,)`` int64, frames.
        targets: ``(B, U)`` int64 token ids, zeros beyond a length.
        target_lengths: ``(B,)`` int64.
    """

    features: Tensor
    feature_lengths: Tensor
    targets: Tensor
    target_lengths: Tensor

    def to(self, device: torch.device | str) -> Batch:
        tensors = (self.features, self.feature_lengths, self.targets, self.target_lengths)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


class TrainingSet(Protocol):
    """What the trainer needs of a data set."""

    durations: Sequence[float]
    speakers: Sequence[str | None]
    speeds: Sequence[float]
    cached: bool

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]: ...


class SpeechSet(Dataset):
    """Utterances as ``(T, n_mels)`` features and ``(U,)`` token ids, indexed by tuples of (index, speed).

    Args:
        utterances: what to hold; not empty.
        front_end: computes the features; used on the CPU.
        tokenizer: encodes the transcripts; what it does not know becomes its unknown token.
        speeds: factors of speed perturbation that batches draw from.
        cached: whether to compute all features now and keep them; by default where they amount to 20 hours or less.
        progress: whether to show progress bars meanwhile.

    Raises:
        ValueError: no utterances, or a speed of zero or less.
    """

    def __init__(
        self,
        utterances: Sequence[Utterance],
        front_end: LogMel,
        tokenizer: Tokenizer,
        *,
        speeds: Sequence[float] = (1.0,),
        cached: bool | None = None,
        progress: bool = True,
    ) -> None:
        if not utterances:
            raise ValueError("utterances is empty; at least one is needed")
        if not speeds or min(speeds) <= 0:
            raise ValueError(f"speeds is {tuple(speeds)}; positive factors are needed")
        self.utterances = list(utterances)
        self.front_end = front_end
        self.speeds = tuple(speeds)
        self.texts = [utterance.text for utterance in self.utterances]
        bar = tqdm(self.texts, desc="transcripts", unit="utt", leave=False, disable=not progress)
        encoded = [torch.tensor(tokenizer.encode(text), dtype=torch.int32) for text in bar]
        self.tokens = torch.cat(encoded)  # not a tensor for each: large sets have hundreds of thousands
        self._token_ends = np.cumsum([len(tokens) for tokens in encoded])
        self.durations = [utterance.duration for utterance in self.utterances]
        self.speakers = [utterance.speaker for utterance in self.utterances]
        hours = sum(self.durations) * len(self.speeds) / 3600
        self.cached = hours <= CACHE_HOURS if cached is None else cached
        self._features = self._compute_all(progress) if self.cached else {}

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]:
        features = [self._features[key] if self.cached else self._compute(key) for key in item]
        return torch.cat(features), torch.cat([self.target(index) for index, _ in item])

    def target(self, index: int) -> Tensor:
        """Token ids of one transcript, ``(U,)`` int64."""
        start = self._token_ends[index - 1] if index else 0
        return self.tokens[start : self._token_ends[index]].long()

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """All utterances at their own speed, longest first, as (indices, batch)."""
        order = sorted(range(len(self)), key=lambda index: -self.durations[index])
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, collate([self[((index, 1.0),)] for index in indices])

    def digest(self) -> str:
        """A short hash of ids, transcripts and speeds: tells one training set from another."""
        return digest(self.utterances, repr(self.speeds))

    def _compute_all(self, progress: bool) -> dict[Key, Tensor]:
        keys = [(index, speed) for index in range(len(self)) for speed in sorted({1.0, *self.speeds})]
        bar = tqdm(keys, desc="features", unit="utt", leave=False, disable=not progress)
        return {key: self._compute(key) for key in bar}

    @torch.no_grad()
    def _compute(self, key: Key) -> Tensor:
        index, speed = key
        waveform = self.utterances[index].load()
        if speed != 1.0:
            waveform = speed_perturb(waveform, speed)
        features, _ = self.front_end(waveform[None], torch.tensor([len(waveform)]))
        return features[0]


def digest(utterances: Sequence[Utterance], *more: str) -> str:
    """A short hash of ids and transcripts, and of what else is told."""
    lines = [f"{utterance.id}\t{utterance.text}" for utterance in utterances]
    return hashlib.sha256("\n".join([*lines, *more]).encode()).hexdigest()[:16]


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pads (features, targets) pairs to a :class:`Batch`."""
    features, targets = zip(*items, strict=True)
    return Batch(
        pad_sequence(list(features), batch_first=True),
        torch.tensor([len(item) for item in features]),
        pad_sequence(list(targets), batch_first=True),
        torch.tensor([len(item) for item in targets]),
    )


class BatchPlan:
    """Which utterances make up each batch of a run.

    An epoch has every utterance once, each at a drawn speed, in batches of similar length and in random order, shortest
    first in the epochs of a curriculum. With probability ``config.join`` an utterance is followed by one drawn from all
    of its speaker, itself included, so that a small set has more sequences of words than it has sentences; not in a
    curriculum. All of it depends on nothing but (data, config, epoch).

    Every epoch has as many batches, of the same sizes by order of length: of ``config.batch_size`` utterances or one
    fewer, or else as many as ``config.batch_seconds`` allows were all played at the slowest speed.

    Args:
        data: the training set.
        config: the run.

    Attributes:
        kept: indices of the utterances that are no longer than ``config.max_seconds``.
        sizes: utterances of each batch of an epoch, by order of length.

    Raises:
        ValueError: no utterance is kept, or the longest one exceeds ``config.batch_seconds`` alone.
    """

    def __init__(self, data: TrainingSet, config: TrainConfig) -> None:
        self.data, self.config = data, config
        durations = np.asarray(data.durations, dtype=np.float64)
        self.kept = np.flatnonzero(durations <= (config.max_seconds or np.inf))
        if not len(self.kept):
            raise ValueError(f"max_seconds is {config.max_seconds}; the shortest utterance has {durations.min():.1f} s")
        self._jitter = NARROW_JITTER if config.batch_seconds else JITTER
        if config.batch_seconds:
            self.sizes = self._sizes_by_seconds(durations[self.kept] / min(data.speeds))
        else:
            self.sizes = _sizes_by_count(len(self.kept), config.batch_size)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sizes)

    def epoch(self, epoch: int) -> list[list[Item]]:
        """The batches of epoch 0, 1, ..."""
        easy = epoch < self.config.curriculum_epochs
        draw = np.random.default_rng([self.config.seed, epoch])
        speeds = draw.choice(np.asarray(self.data.speeds, dtype=np.float64), len(self.kept))
        items: list[Item] = [((int(index), float(speed)),) for index, speed in zip(self.kept, speeds, strict=True)]
        if self.config.join and not easy:
            items = _join(items, self.data.speakers, self.config.join, draw)
        lengths = np.array([item_duration(self.data, item) for item in items])
        jittered = lengths * draw.uniform(1 - self._jitter, 1 + self._jitter, len(items))
        order = np.argsort(jittered, kind="stable")
        buckets = np.split(order, np.cumsum(self.sizes)[:-1])
        batches = [[items[index] for index in buckets[bucket]] for bucket in draw.permutation(len(buckets))]
        if easy:
            batches.sort(key=lambda batch: max(item_duration(self.data, item) for item in batch))
        return batches

    def divisor(self, batch: Sequence[Item]) -> float:
        """What the summed loss of a batch is divided by: its utterances or, where sizes differ widely, those of an
        average batch, so that an utterance counts alike in all company."""
        return len(self.kept) / len(self.sizes) if self.config.batch_seconds else len(batch)

    def _sizes_by_seconds(self, slowest: np.ndarray) -> list[int]:
        """Sizes that hold in every epoch, from the seconds of all utterances at the slowest speed.

        An utterance of rank k by jittered length is, in no epoch, longer than the one of rank k among the slowest times
        (1 + jitter) / (1 - jitter), nor than the longest of all.
        """
        limit, slowest = self.config.batch_seconds, np.sort(slowest)
        if slowest[-1] > limit:
            raise ValueError(
                f"batch_seconds is {limit}; the longest utterance alone has {slowest[-1]:.1f} s at the slowest speed. "
                "Allow more, or leave out long ones by max_seconds"
            )
        sizes, end = [], len(slowest)
        while end:
            longest = max(slowest[end - 1], SHORTEST) * (1 + self._jitter) / (1 - self._jitter)
            sizes.append(min(end, max(1, int(limit / longest))))
            end -= sizes[-1]
        if len(sizes) > 1 and sizes[-1] < sizes[-2]:  # the shortest utterances are what was left over: share alike
            sizes[-2:] = _sizes_by_count(sizes[-2] + sizes[-1], sizes[-2])
        return sizes[::-1]


def _sizes_by_count(count: int, most: int) -> list[int]:
    """``count`` in the fewest parts of at most ``most``, which differ by one at most, the larger ones first."""
    parts = -(-count // most)
    return [count // parts + (part < count % parts) for part in range(parts)]


def item_duration(data: TrainingSet, item: Item) -> float:
    """Seconds of one item at its speed."""
    return sum(data.durations[index] / speed for index, speed in item)


def _join(items: list[Item], speakers: Sequence[str | None], share: float, draw: np.random.Generator) -> list[Item]:
    """Lets about ``share`` of the items be followed by one of the same speaker, at the same speed."""
    by_speaker: dict[str | None, list[int]] = {}
    for ((index, _),) in items:
        by_speaker.setdefault(speakers[index], []).append(index)
    chosen = draw.random(len(items)) < share
    followers = [int(draw.choice(by_speaker[speakers[index]])) for ((index, _),) in items]
    return [
        (*item, (follower, item[0][1])) if joined else item
        for item, follower, joined in zip(items, followers, chosen, strict=True)
    ]


def load_batches(data: TrainingSet, batches: Sequence[Sequence[Item]]) -> Iterator[Batch]:
    """Loads the batches in turn; worker processes compute the features where the set does not hold them."""
    workers = 0 if data.cached else _loader_workers()
    return iter(DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers))


def _loader_workers() -> int:
    """This process's share of the machine's processors, within reason."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that torchrun started here
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // processes))
