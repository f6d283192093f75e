"""Greedy and beam decoding of a transducer, and greedy decoding of a CTC model, offline and chunk by chunk.

All searches work on encoder frames and carry an explicit state, so streaming is the same code called more often:

    state = decoder.start(batch)
    state = decoder.advance(state, encoded, lengths)     # any number of times
    decoder.results(state)

States are not changed in place; ``join`` and ``split`` take them from one batch of utterances to another. The model
needs ``encoder``, ``predictor``, ``joint`` and ``blank`` as in :class:`gq_triton.models.RNNT`, or is a
:class:`gq_triton.models.CTC`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gq_triton.models import CTC

from .segments import MAX_SYMBOLS, WINDOW_FRAMES

__all__ = [
    "BeamDecoder",
    "BeamState",
    "CTCDecoder",
    "CTCState",
    "Decoded",
    "GreedyDecoder",
    "GreedyState",
    "Hypothesis",
    "beam",
    "greedy",
    "greedy_decoder",
]


def greedy(model: nn.Module, features: Tensor, lengths: Tensor, *, max_symbols: int = MAX_SYMBOLS) -> list[list[int]]:
    """Greedy label ids of whole utterances; ``features`` ``(B, T, F)``, ``lengths`` ``(B,)``."""
    return _decode(greedy_decoder(model, max_symbols=max_symbols), features, lengths)


def beam(
    model: nn.Module, features: Tensor, lengths: Tensor, *, width: int = 4, max_symbols: int = MAX_SYMBOLS
) -> list[list[int]]:
    """Beam-search label ids of whole utterances by a transducer; ``features`` ``(B, T, F)``, ``lengths`` ``(B,)``."""
    return _decode(BeamDecoder(model, width=width, max_symbols=max_symbols), features, lengths)


@torch.inference_mode()
def _decode(decoder: GreedyDecoder | BeamDecoder | CTCDecoder, features: Tensor, lengths: Tensor) -> list[list[int]]:
    training = decoder.model.training
    decoder.model.eval()
    try:
        encoded, encoded_lengths = decoder.model.encoder(features, lengths)
        state = decoder.advance(decoder.start(features.shape[0]), encoded, encoded_lengths)
    finally:
        decoder.model.train(training)
    return [decoded.labels for decoded in decoder.results(state)]


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; at least 1 is needed")
    return value


class Decoded(NamedTuple):
    """What was found in an utterance so far.

    Attributes:
        labels: ids of the labels.
        times: the encoder frame, counted from the utterance's first, that each label was emitted at.
        stable: how many of the labels, from the first on, no further frame can change.
    """

    labels: list[int]
    times: list[int]
    stable: int


@dataclass(frozen=True)
class GreedyState:
    """Greedy search of a batch of utterances.

    Attributes:
        labels, times: label ids of each utterance so far, and the encoder frames that they were emitted at.
        frames: how many frames of each utterance were decoded.
        predicted: ``(B, joint)``, the joint's projection of the predictor's output for the labels so far.
        predictor_state: the predictor's LSTM state, ``(layers, B, hidden)`` each.
    """

    labels: list[list[int]]
    times: list[list[int]]
    frames: list[int]
    predicted: Tensor = field(repr=False)
    predictor_state: tuple[Tensor, ...] = field(repr=False)

    @staticmethod
    def join(states: Sequence[GreedyState]) -> GreedyState:
        """The state of several batches in one."""
        return GreedyState(
            [row for state in states for row in state.labels],
            [row for state in states for row in state.times],
            [count for state in states for count in state.frames],
            torch.cat([state.predicted for state in states]),
            _join_columns([state.predictor_state for state in states]),
        )

    def split(self) -> list[GreedyState]:
        """The states of the utterances, each a batch of one; the inverse of :meth:`join`."""
        columns = zip(*(part.split(1, 1) for part in self.predictor_state), strict=True)
        rows = zip(self.labels, self.times, self.frames, self.predicted.split(1), columns, strict=True)
        return [GreedyState([row], [at], [count], predicted, state) for row, at, count, predicted, state in rows]


class GreedyDecoder:
    """Takes the most probable label at every step, at most ``max_symbols`` per frame, vectorised over the batch.

    Between two labels the predictor's output stays what it is, so the joint network looks several frames ahead at once.
    Every utterance moves through its own frames at its own pace.
    """

    def __init__(self, model: nn.Module, *, max_symbols: int = MAX_SYMBOLS) -> None:
        self.model, self.max_symbols = model, _positive("max_symbols", max_symbols)

    def start(self, batch: int) -> GreedyState:
        """The state before the first frame of ``batch`` utterances."""
        device = next(chain(self.model.joint.parameters(), self.model.joint.buffers())).device
        blanks = torch.full((batch, 1), self.model.blank, device=device)
        predicted, predictor_state = self._predict(blanks, None)
        return GreedyState(
            [[] for _ in range(batch)], [[] for _ in range(batch)], [0] * batch, predicted, predictor_state
        )

    def choose(self, logits: Tensor, frames: list[int], counts: list[int]) -> list[list[int]]:
        """Which labels to take, by default the most probable ones. A subclass may choose otherwise, for instance to
        emit given labels at given frames.

        Args:
            logits: ``(n, W, vocab_size)`` of W neighbouring frames of n utterances. Frames beyond an utterance's end
                may be among them; their labels do not count.
            frames: each utterance's first frame among them, counted from the utterance's first.
            counts: how many labels each utterance has so far.

        Returns:
            the label, or the blank, of each frame. What comes after a label, which changes the logits, does not count.
        """
        return logits.argmax(-1).tolist()

    def advance(self, state: GreedyState, encoded: Tensor, lengths: Tensor) -> GreedyState:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        frames, predicted, predictor_state = self.model.joint.encoder(encoded), state.predicted, state.predictor_state
        given = zip(state.labels, state.times, state.frames, lengths.tolist(), strict=True)
        rows = [_Row(index, *row) for index, row in enumerate(given)]
        while going := [row for row in rows if row.place < row.end]:
            indices = [row.index for row in going]
            windows = _windows(frames, indices, [row.place for row in going])
            logits = self.model.joint.combine(windows, _select(predicted, indices)[:, None])
            chosen = self.choose(logits, [row.decoded + row.place for row in going], [len(row.labels) for row in going])
            pairs = zip(going, chosen, strict=True)
            emitting = [row for row, window in pairs if row.take(window, self.model.blank, self.max_symbols)]
            if emitting:
                predicted, predictor_state = self._emit(emitting, predicted, predictor_state)
        labels, times = [row.labels for row in rows], [row.times for row in rows]
        return GreedyState(labels, times, [row.decoded + row.end for row in rows], predicted, predictor_state)

    def results(self, state: GreedyState) -> list[Decoded]:
        """What was found so far, for each utterance. Labels taken are never taken back."""
        return _taken(state)

    def _predict(self, labels: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The joint's projection ``(n, joint)`` of the predictor's output for ``labels`` ``(n, 1)``, and its state."""
        output, state = self.model.predictor(labels, state)
        return self.model.joint.predictor(output[:, 0]), state

    def _emit(
        self, rows: list[_Row], predicted: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The predictor's step of ``rows`` by their last labels, beside the outputs of the others, which stay."""
        labels = torch.tensor([row.labels[-1:] for row in rows], device=predicted.device)
        if len(rows) == len(predicted):
            return self._predict(labels, state)
        index = torch.tensor([row.index for row in rows], device=predicted.device)
        new_predicted, new_state = self._predict(labels, tuple(part[:, index] for part in state))
        parts = zip(state, new_state, strict=True)
        return predicted.index_copy(0, index, new_predicted), tuple(old.index_copy(1, index, new) for old, new in parts)


@dataclass(frozen=True)
class CTCState:
    """Greedy search of a batch of utterances by a CTC model.

    Attributes:
        labels, times: label ids of each utterance so far, and the encoder frames that they began at.
        frames: how many frames of each utterance were decoded.
        last: the label, or the blank, of each utterance's last frame.
    """

    labels: list[list[int]]
    times: list[list[int]]
    frames: list[int]
    last: list[int]

    @staticmethod
    def join(states: Sequence[CTCState]) -> CTCState:
        """The state of several batches in one."""
        parts = ([state.labels, state.times, state.frames, state.last] for state in states)
        return CTCState(*(list(chain(*part)) for part in zip(*parts, strict=True)))

    def split(self) -> list[CTCState]:
        """The states of the utterances, each a batch of one; the inverse of :meth:`join`."""
        rows = zip(self.labels, self.times, self.frames, self.last, strict=True)
        return [CTCState([labels], [times], [frames], [last]) for labels, times, frames, last in rows]


class CTCDecoder:
    """Takes the most probable label of every frame; a label that goes on for several frames is one."""

    def __init__(self, model: CTC) -> None:
        self.model = model

    def start(self, batch: int) -> CTCState:
        """The state before the first frame of ``batch`` utterances."""
        return CTCState([[] for _ in range(batch)], [[] for _ in range(batch)], [0] * batch, [self.model.blank] * batch)

    def advance(self, state: CTCState, encoded: Tensor, lengths: Tensor) -> CTCState:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        chosen = self.model.output(encoded).argmax(-1).tolist()
        rows = zip(state.split(), chosen, lengths.tolist(), strict=True)
        return CTCState.join([self._advance_row(row, frames[:count]) for row, frames, count in rows])

    def _advance_row(self, state: CTCState, frames: list[int]) -> CTCState:
        (decoded,), before = state.frames, [*state.last, *frames]
        new = [
            (label, decoded + place)
            for place, (label, last) in enumerate(zip(frames, before, strict=False))
            if label not in (last, self.model.blank)
        ]
        labels, times = state.labels[0] + [label for label, _ in new], state.times[0] + [time for _, time in new]
        return CTCState([labels], [times], [decoded + len(frames)], before[-1:])

    def results(self, state: CTCState) -> list[Decoded]:
        """What was found so far, for each utterance. Labels taken are never taken back."""
        return _taken(state)


def greedy_decoder(model: nn.Module, *, max_symbols: int = MAX_SYMBOLS) -> GreedyDecoder | CTCDecoder:
    """Greedy search by a model of either kind."""
    return CTCDecoder(model) if isinstance(model, CTC) else GreedyDecoder(model, max_symbols=max_symbols)


def _taken(state: GreedyState | CTCState) -> list[Decoded]:
    rows = zip(state.labels, state.times, strict=True)
    return [Decoded(list(labels), list(times), len(labels)) for labels, times in rows]


class _Row:
    """A batch's ``index``-th utterance on its way through the frames of one call: at ``place`` of ``end``, with
    ``symbols`` labels there so far, after ``decoded`` frames of earlier calls."""

    def __init__(self, index: int, labels: list[int], times: list[int], decoded: int, end: int) -> None:
        self.index, self.labels, self.times = index, list(labels), list(times)
        self.decoded, self.end = decoded, end
        self.place = self.symbols = 0

    def take(self, window: list[int], blank: int, max_symbols: int) -> bool:
        """Moves on to the first label among what was chosen for the frames from ``place`` on; returns whether there is
        one."""
        window = window[: self.end - self.place]
        blanks = next((place for place, label in enumerate(window) if label != blank), len(window))
        self.place, self.symbols = self.place + blanks, 0 if blanks else self.symbols
        if blanks == len(window):
            return False
        self.labels.append(window[blanks])
        self.times.append(self.decoded + self.place)
        self.symbols += 1
        if self.symbols == max_symbols:
            self.place, self.symbols = self.place + 1, 0
        return True


def _select(x: Tensor, rows: list[int]) -> Tensor:
    return x if len(rows) == len(x) else x[rows]


def _windows(frames: Tensor, rows: list[int], places: list[int]) -> Tensor:
    """Frames ``(n, W, J)`` of ``(B, T, J)``: W neighbouring ones of each of n rows, from its place on."""
    width = min(max(1, WINDOW_FRAMES // len(rows)), frames.shape[1] - min(places))
    if len(frames) == 1:
        return frames[:, places[0] : places[0] + width]
    starts = torch.tensor(list(zip(rows, places, strict=True)), device=frames.device)
    index = starts[:, 1:] + torch.arange(width, device=frames.device)
    return frames[starts[:, :1], index.clamp_max(frames.shape[1] - 1)]


def _join_columns(states: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))


@dataclass(frozen=True)
class Hypothesis:
    """One label sequence of a beam.

    Attributes:
        labels, times: label ids, and the encoder frames that the most probable alignment emits them at.
        score: log-probability of the labels.
        predicted: ``(joint,)``, the joint's projection of the predictor's output for the labels.
        predictor_state: the predictor's LSTM state, ``(layers, 1, hidden)`` each.
    """

    labels: tuple[int, ...]
    times: tuple[int, ...]
    score: float
    predicted: Tensor = field(repr=False)
    predictor_state: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class BeamState:
    """Beam search of a batch of utterances.

    Attributes:
        beams: the hypotheses of each utterance, the most probable first.
        frames: how many frames of each utterance were decoded.
    """

    beams: list[list[Hypothesis]]
    frames: list[int]

    @staticmethod
    def join(states: Sequence[BeamState]) -> BeamState:
        """The state of several batches in one."""
        beams = [hypotheses for state in states for hypotheses in state.beams]
        return BeamState(beams, [count for state in states for count in state.frames])

    def split(self) -> list[BeamState]:
        """The states of the utterances, each a batch of one; the inverse of :meth:`join`."""
        return [BeamState([beam], [count]) for beam, count in zip(self.beams, self.frames, strict=True)]


class BeamDecoder:
    """Frame-synchronous beam search: alignments of the same labels are summed, up to ``max_symbols`` labels a frame.

    Follows the search of Graves (arXiv 1211.3711, algorithm 1) with a bound on the labels per frame; the hypotheses of
    one utterance share each joint and predictor call.
    """

    def __init__(self, model: nn.Module, *, width: int = 4, max_symbols: int = MAX_SYMBOLS) -> None:
        if isinstance(model, CTC):
            raise ValueError("beam search is for transducers: a CTC model's beam_width must be 1")
        self.model = model
        self.width, self.max_symbols = _positive("width", width), _positive("max_symbols", max_symbols)

    def start(self, batch: int) -> BeamState:
        """The state before the first frame of ``batch`` utterances: one beam each."""
        first = GreedyDecoder(self.model).start(1)
        return BeamState([[Hypothesis((), (), 0.0, first.predicted[0], first.predictor_state)]] * batch, [0] * batch)

    def advance(self, state: BeamState, encoded: Tensor, lengths: Tensor) -> BeamState:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        beams, ends = [], lengths.tolist()
        rows = zip(state.beams, state.frames, self.model.joint.encoder(encoded), ends, strict=True)
        for hypotheses, decoded, frames, end in rows:
            for time, frame in enumerate(frames[:end], decoded):
                hypotheses = self._advance_frame(hypotheses, frame, time)
            beams.append(hypotheses)
        return BeamState(beams, [decoded + end for decoded, end in zip(state.frames, ends, strict=True)])

    def results(self, state: BeamState) -> list[Decoded]:
        """The best labels so far, for each utterance. Those that all of its hypotheses begin with are stable."""
        return [_best(hypotheses) for hypotheses in state.beams]

    def _advance_frame(self, hypotheses: list[Hypothesis], frame: Tensor, time: int) -> list[Hypothesis]:
        finished: dict[tuple[int, ...], Hypothesis] = {}
        for step in range(self.max_symbols + 1):
            predicted = torch.stack([h.predicted for h in hypotheses])
            scores = self.model.joint.combine(frame, predicted).float().log_softmax(-1)
            scores = scores + scores.new_tensor([h.score for h in hypotheses])[:, None]
            for hypothesis, score in zip(hypotheses, scores[:, self.model.blank].tolist(), strict=True):
                _merge(finished, replace(hypothesis, score=score))
            if step == self.max_symbols:
                break
            hypotheses = self._extend(hypotheses, scores, self._threshold(finished), time)
            if not hypotheses:
                break
        return sorted(finished.values(), key=lambda h: -h.score)[: self.width]

    def _threshold(self, finished: dict[tuple[int, ...], Hypothesis]) -> float:
        """A hypothesis below the beam's last finished one can no longer enter the beam by itself."""
        scores = sorted((h.score for h in finished.values()), reverse=True)
        return scores[self.width - 1] if len(scores) >= self.width else float("-inf")

    def _extend(self, hypotheses: list[Hypothesis], scores: Tensor, threshold: float, time: int) -> list[Hypothesis]:
        """The best ``width`` one-label extensions above the threshold, with their predictor steps taken in one call."""
        scores = scores.clone()
        scores[:, self.model.blank] = float("-inf")
        best, index = scores.flatten().topk(min(self.width, scores.numel()))
        kept = [
            (s, *divmod(i, scores.shape[1]))
            for s, i in zip(best.tolist(), index.tolist(), strict=True)
            if s > threshold
        ]
        if not kept:
            return []
        labels = torch.tensor([[label] for _, _, label in kept], device=scores.device)
        parents = [hypotheses[parent] for _, parent, _ in kept]
        output, states = self.model.predictor(labels, _join_columns([p.predictor_state for p in parents]))
        predicted = self.model.joint.predictor(output[:, 0])
        columns = zip(*(part.split(1, 1) for part in states), strict=True)
        return [
            Hypothesis((*parent.labels, label), (*parent.times, time), score, row, column)
            for parent, (score, _, label), row, column in zip(parents, kept, predicted, columns, strict=True)
        ]


def _merge(finished: dict[tuple[int, ...], Hypothesis], hypothesis: Hypothesis) -> None:
    """Adds the probability of another alignment; the more probable one stands for both."""
    known = finished.get(hypothesis.labels, hypothesis)
    if known is hypothesis:
        finished[hypothesis.labels] = hypothesis
        return
    low, high = sorted((known, hypothesis), key=lambda h: h.score)
    finished[hypothesis.labels] = replace(high, score=high.score + math.log1p(math.exp(low.score - high.score)))


def _best(hypotheses: list[Hypothesis]) -> Decoded:
    best = max(hypotheses, key=lambda h: h.score)
    columns = zip(*(h.labels for h in hypotheses), strict=False)
    shared = takewhile(lambda labels: len(set(labels)) == 1, columns)
    return Decoded(list(best.labels), list(best.times), sum(1 for _ in shared))
