"""Speech as training batches: features computed once per utterance and speed, in an order fixed by (seed, epoch)."""

from __future__ import annotations

import hashlib
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

__all__ = ["Batch", "SpeechSet", "epoch_batches", "load_batches"]

CACHE_HOURS = 20  # of speech, about 2.3 GB of features
LOADER_WORKERS = 2  # processes that compute features for sets too large to keep

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
        progress: whether to show a progress bar meanwhile.

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
        self.targets = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in self.texts]
        self.durations = [utterance.duration for utterance in self.utterances]
        self.speakers = [utterance.speaker for utterance in self.utterances]
        hours = sum(self.durations) * len(self.speeds) / 3600
        self.cached = hours <= CACHE_HOURS if cached is None else cached
        self._features = self._compute_all(progress) if self.cached else {}

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]:
        features = [self._features[key] if self.cached else self._compute(key) for key in item]
        return torch.cat(features), torch.cat([self.targets[index] for index, _ in item])

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """All utterances at their own speed, longest first, as (indices, batch)."""
        order = sorted(range(len(self)), key=lambda index: -self.durations[index])
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            yield indices, collate([self[((index, 1.0),)] for index in indices])

    def digest(self) -> str:
        """A short hash of ids, transcripts and speeds: tells one training set from another."""
        lines = [f"{utterance.id}\t{utterance.text}" for utterance in self.utterances]
        return hashlib.sha256("\n".join([*lines, repr(self.speeds)]).encode()).hexdigest()[:16]

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


def collate(items: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    """Pads (features, targets) pairs to a :class:`Batch`."""
    features, targets = zip(*items, strict=True)
    return Batch(
        pad_sequence(list(features), batch_first=True),
        torch.tensor([len(item) for item in features]),
        pad_sequence(list(targets), batch_first=True),
        torch.tensor([len(item) for item in targets]),
    )


def epoch_batches(data: TrainingSet, batch_size: int, *, seed: int, epoch: int, join: float = 0.0) -> list[list[Item]]:
    """Every utterance once, each at a drawn speed, in batches of similar length and in random order.

    With probability ``join`` an utterance is followed by another one of its speaker, so that a small set has more
    sequences of words than it has sentences. The batches depend on nothing but the arguments. Their number is
    ``ceil(len / batch_size)`` for every epoch, and their sizes differ by one at most, so that no process of several is
    left without an utterance.
    """
    draw = np.random.default_rng([seed, epoch])
    durations = np.asarray(data.durations, dtype=np.float64)
    speeds = draw.choice(np.asarray(data.speeds, dtype=np.float64), len(durations))
    items: list[Item] = [((index, float(speed)),) for index, speed in enumerate(speeds)]
    if join:
        items = _join(items, data.speakers, join, draw)
    lengths = np.array([item_duration(data, item) for item in items])
    jittered = lengths * draw.uniform(0.9, 1.1, len(items))  # else the same neighbours meet every epoch
    order = np.argsort(jittered, kind="stable")
    buckets = np.array_split(order, -(-len(order) // batch_size))
    return [[items[index] for index in buckets[bucket]] for bucket in draw.permutation(len(buckets))]


def item_duration(data: TrainingSet, item: Item) -> float:
    """Seconds of one item at its speed."""
    return sum(data.durations[index] / speed for index, speed in item)


def _join(items: list[Item], speakers: Sequence[str | None], share: float, draw: np.random.Generator) -> list[Item]:
    """Lets about ``share`` of the items be followed by one of the same speaker, at the same speed."""
    by_speaker: dict[str | None, list[int]] = {}
    for index, speaker in enumerate(speakers):
        by_speaker.setdefault(speaker, []).append(index)
    chosen = draw.random(len(items)) < share
    followers = [int(draw.choice(by_speaker[speaker])) for speaker in speakers]
    return [
        (*item, (follower, item[0][1])) if joined else item
        for item, follower, joined in zip(items, followers, chosen, strict=True)
    ]


def load_batches(data: TrainingSet, batches: Sequence[Sequence[Item]]) -> Iterator[Batch]:
    """Loads the batches in turn; worker processes compute the features where the set does not hold them."""
    workers = 0 if data.cached else LOADER_WORKERS
    return iter(DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers))
