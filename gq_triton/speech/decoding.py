"""Greedy and beam decoding of a transducer, offline and chunk by chunk.

Both searches work on encoder frames and carry an explicit state, so streaming is the same code called more often:

    state = decoder.start(batch)
    state = decoder.advance(state, encoded, lengths)     # any number of times
    decoder.results(state)

The model needs ``encoder``, ``predictor``, ``joint`` and ``blank`` as in :class:`gq_triton.models.RNNT`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = ["BeamDecoder", "GreedyDecoder", "beam", "greedy"]


def greedy(model: nn.Module, features: Tensor, lengths: Tensor, *, max_symbols: int = 5) -> list[list[int]]:
    """Greedy label ids of whole utterances; ``features`` ``(B, T, F)``, ``lengths`` ``(B,)``."""
    return _decode(GreedyDecoder(model, max_symbols=max_symbols), features, lengths)


def beam(
    model: nn.Module, features: Tensor, lengths: Tensor, *, width: int = 4, max_symbols: int = 5
) -> list[list[int]]:
    """Beam-search label ids of whole utterances; ``features`` ``(B, T, F)``, ``lengths`` ``(B,)``."""
    return _decode(BeamDecoder(model, width=width, max_symbols=max_symbols), features, lengths)


@torch.inference_mode()
def _decode(decoder, features: Tensor, lengths: Tensor) -> list[list[int]]:
    training = decoder.model.training
    decoder.model.eval()
    try:
        encoded, encoded_lengths = decoder.model.encoder(features, lengths)
        state = decoder.advance(decoder.start(features.shape[0]), encoded, encoded_lengths)
    finally:
        decoder.model.train(training)
    return decoder.results(state)


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; at least 1 is needed")
    return value


@dataclass
class GreedyState:
    """Labels so far, the predictor's output for them, and its LSTM state, for a batch."""

    labels: list[list[int]]
    predicted: Tensor
    predictor_state: tuple[Tensor, ...]


class GreedyDecoder:
    """Takes the most probable label at every step, at most ``max_symbols`` per frame, vectorised over the batch.

    Every utterance moves through its own frames at its own pace, so a batch takes max(T + U) joint evaluations.
    """

    def __init__(self, model: nn.Module, *, max_symbols: int = 5) -> None:
        self.model, self.max_symbols = model, _positive("max_symbols", max_symbols)

    def start(self, batch: int) -> GreedyState:
        """The state before the first frame of ``batch`` utterances."""
        device = next(self.model.joint.buffers(), next(self.model.joint.parameters(), None)).device
        blanks = torch.full((batch, 1), self.model.blank, dtype=torch.long, device=device)
        predicted, predictor_state = self.model.predictor(blanks)
        return GreedyState([[] for _ in range(batch)], predicted[:, 0], predictor_state)

    def advance(self, state: GreedyState, encoded: Tensor, lengths: Tensor) -> GreedyState:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        if encoded.shape[1] == 0:
            return state
        labels = [list(row) for row in state.labels]
        predicted, predictor_state = state.predicted, state.predictor_state
        rows = torch.arange(encoded.shape[0], device=encoded.device)
        lengths = lengths.to(encoded.device)
        frame, symbols = torch.zeros_like(lengths), torch.zeros_like(lengths)
        while bool((frame < lengths).any()):
            current = encoded[rows, frame.clamp_max(encoded.shape[1] - 1)]
            best = self.model.joint(current, predicted).argmax(-1)
            emits = (best != self.model.blank) & (frame < lengths) & (symbols < self.max_symbols)
            frame = frame + (~emits)
            symbols = torch.where(emits, symbols + 1, 0)
            if not bool(emits.any()):
                continue
            for row in emits.nonzero()[:, 0].tolist():
                labels[row].append(int(best[row]))
            new_predicted, new_state = self.model.predictor(best[:, None], predictor_state)
            predicted = torch.where(emits[:, None], new_predicted[:, 0], predicted)
            predictor_state = tuple(
                torch.where(emits[None, :, None], new, old) for new, old in zip(new_state, predictor_state, strict=True)
            )
        return GreedyState(labels, predicted, predictor_state)

    def results(self, state: GreedyState) -> list[list[int]]:
        """Label ids so far, one list per utterance."""
        return [list(row) for row in state.labels]


@dataclass
class Hypothesis:
    """One label sequence of a beam with its log-probability, predictor output ``(P,)`` and state."""

    labels: tuple[int, ...]
    score: float
    predicted: Tensor
    predictor_state: tuple[Tensor, ...] = field(repr=False)


class BeamDecoder:
    """Frame-synchronous beam search: alignments of the same labels are summed, up to ``max_symbols`` labels a frame.

    Follows the search of Graves (arXiv 1211.3711, algorithm 1) with a bound on the labels per frame; the hypotheses of
    one utterance share each joint and predictor call.
    """

    def __init__(self, model: nn.Module, *, width: int = 4, max_symbols: int = 5) -> None:
        self.model = model
        self.width, self.max_symbols = _positive("width", width), _positive("max_symbols", max_symbols)

    def start(self, batch: int) -> list[list[Hypothesis]]:
        """The state before the first frame of ``batch`` utterances: one beam each."""
        state = GreedyDecoder(self.model).start(1)
        return [[Hypothesis((), 0.0, state.predicted[0], state.predictor_state)] for _ in range(batch)]

    def advance(self, beams: list[list[Hypothesis]], encoded: Tensor, lengths: Tensor) -> list[list[Hypothesis]]:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        advanced = []
        for hypotheses, frames, length in zip(beams, encoded, lengths.tolist(), strict=True):
            for frame in frames[:length]:
                hypotheses = self._advance_frame(hypotheses, frame)
            advanced.append(hypotheses)
        return advanced

    def results(self, beams: list[list[Hypothesis]]) -> list[list[int]]:
        """The best label ids so far, one list per utterance."""
        return [list(max(hypotheses, key=lambda h: h.score).labels) for hypotheses in beams]

    def _advance_frame(self, hypotheses: list[Hypothesis], frame: Tensor) -> list[Hypothesis]:
        finished: dict[tuple[int, ...], Hypothesis] = {}
        for step in range(self.max_symbols + 1):
            predicted = torch.stack([h.predicted for h in hypotheses])
            scores = self.model.joint(frame, predicted).float().log_softmax(-1)
            scores = scores + scores.new_tensor([h.score for h in hypotheses])[:, None]
            for hypothesis, score in zip(hypotheses, scores[:, self.model.blank].tolist(), strict=True):
                _merge(finished, hypothesis, score)
            if step == self.max_symbols:
                break
            hypotheses = self._extend(hypotheses, scores, self._threshold(finished))
            if not hypotheses:
                break
        return sorted(finished.values(), key=lambda h: -h.score)[: self.width]

    def _threshold(self, finished: dict[tuple[int, ...], Hypothesis]) -> float:
        """A hypothesis below the beam's last finished one can no longer enter the beam by itself."""
        scores = sorted((h.score for h in finished.values()), reverse=True)
        return scores[self.width - 1] if len(scores) >= self.width else float("-inf")

    def _extend(self, hypotheses: list[Hypothesis], scores: Tensor, threshold: float) -> list[Hypothesis]:
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
        states = tuple(torch.cat(parts, 1) for parts in zip(*(p.predictor_state for p in parents), strict=True))
        predicted, states = self.model.predictor(labels, states)
        return [
            Hypothesis((*parent.labels, label), score, predicted[n, 0], tuple(part[:, n : n + 1] for part in states))
            for n, (parent, (score, _, label)) in enumerate(zip(parents, kept, strict=True))
        ]


def _merge(finished: dict[tuple[int, ...], Hypothesis], hypothesis: Hypothesis, score: float) -> None:
    known = finished.get(hypothesis.labels)
    if known is not None:
        score = float(torch.logaddexp(torch.tensor(score), torch.tensor(known.score)))
    finished[hypothesis.labels] = Hypothesis(hypothesis.labels, score, hypothesis.predicted, hypothesis.predictor_state)
