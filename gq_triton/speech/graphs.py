"""The encoder's step and the greedy search over buffers that stay in place, as CUDA graphs need.

A chunk of a stream is hundreds of small kernels, whose launches take longer than they do. Captured once, they are
replayed at the cost of one launch: the encoder's step in whole, the search label by label. All of it runs on the CPU as
well, where nothing is captured: so it is tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.models.rnnt import BifocalEncoder, BifocalState

from .decoding import GreedyDecoder, GreedyState
from .segments import MAX_SYMBOLS

__all__ = ["GraphedBifocalEncoder", "GraphedEncoder", "GraphedGreedyDecoder", "graphed"]

WARM_UP = 2  # calls before capture, in which libraries allocate what they keep and kernels are compiled


class _Replayed:
    """A function whose tensors, in and out, stay in place: captured here, and replayed at each call, on a GPU; called
    as it is on the CPU. It must bear being run on what is in its buffers now."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._run = function
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._run = self._capture(function)

    def __call__(self) -> None:
        self._run()

    @staticmethod
    def _capture(function: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


class GraphedEncoder:
    """An encoder's ``stream``, with a graph for each number of streams that bring a whole chunk each.

    A state must keep its shapes from one whole chunk to the next. What is less than a whole chunk is encoded without a
    graph.

    Args:
        encoder: what is captured; not to be changed any more.
        chunk: feature frames of a whole chunk.
    """

    def __init__(self, encoder: nn.Module, chunk: int) -> None:
        self.encoder, self.chunk = encoder, chunk
        self._steps: dict[int, _EncoderStep] = {}

    def stream(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Encodes ``(B, T, F)``, chunk by chunk; see :meth:`gq_triton.models.rnnt.Encoder.stream`."""
        parts = []
        for chunk in features.split(self.chunk, 1):
            encoded, state = self._step(chunk, state)(chunk, state)
            parts.append(encoded)
        return torch.cat(parts, 1), state

    def _step(self, chunk: Tensor, state: Any) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
        batch, frames, _ = chunk.shape
        if frames < self.chunk:
            return self.encoder.stream
        if batch not in self._steps:
            self._steps[batch] = _EncoderStep(self.encoder, chunk, state)
        return self._steps[batch]


class GraphedBifocalEncoder:
    """The same of a bifocal encoder, with graphs of its small and its large encoder. A chunk in the middle of which a
    stream switches is encoded without one.

    Args:
        encoder: what is captured; not to be changed any more.
        chunk: feature frames of a whole chunk.
    """

    def __init__(self, encoder: BifocalEncoder, chunk: int) -> None:
        self.encoder = encoder
        self.small, self.large = GraphedEncoder(encoder.small, chunk), GraphedEncoder(encoder.large, chunk)

    def stream(self, features: Tensor, state: BifocalState) -> tuple[Tensor, BifocalState]:
        """Encodes one chunk; see :meth:`gq_triton.models.rnnt.BifocalEncoder.stream`."""
        return self.encoder.stream_through(self.small, self.large, features, state)


def graphed(encoder: nn.Module, chunk: int) -> GraphedEncoder | GraphedBifocalEncoder:
    """An encoder of either kind with graphs."""
    kind = GraphedBifocalEncoder if isinstance(encoder, BifocalEncoder) else GraphedEncoder
    return kind(encoder, chunk)


class _EncoderStep:
    def __init__(self, encoder: nn.Module, features: Tensor, state: Any) -> None:
        self.encoder = encoder
        self.inputs = _each(torch.zeros_like, (features, state))
        self.run = _Replayed(self._step, features.device)

    def __call__(self, features: Tensor, state: Any) -> tuple[Tensor, Any]:
        _copy(self.inputs, (features, state))
        self.run()
        return _each(torch.clone, self.outputs)  # which the next call writes to

    def _step(self) -> None:
        self.outputs = self.encoder.stream(*self.inputs)


class GraphedGreedyDecoder(GreedyDecoder):
    """Greedy search with a graph for each number of streams. A replay takes each stream to its next label or, where
    none is left, to its chunk's end; :meth:`choose` is not asked.

    Args:
        model: what is captured; not to be changed any more.
        frames: of the encoder, that a graph is made for.
    """

    def __init__(self, model: nn.Module, frames: int, *, max_symbols: int = MAX_SYMBOLS) -> None:
        super().__init__(model, max_symbols=max_symbols)
        self.frames = frames
        self._loops: dict[int, _LabelLoop] = {}

    def advance(self, state: GreedyState, encoded: Tensor, lengths: Tensor) -> GreedyState:
        """Decodes ``(B, T, E)`` further encoder frames, ``lengths`` of them valid."""
        batch = len(lengths)
        if batch not in self._loops:
            self._loops[batch] = _LabelLoop(self, state)
        for index, part in enumerate(encoded.split(self.frames, 1)):
            projected = self.model.joint.encoder(nn.functional.pad(part, (0, 0, 0, self.frames - part.shape[1])))
            valid = (lengths - index * self.frames).clamp(0, self.frames)
            state = self._loops[batch](state, projected, valid)
        return state


class _LabelLoop:
    """Buffers of a batch, and the step that takes each row to its next label.

    Place, end and symbols are ``(B,)``: the frame that a row has come to, the number of its frames, and its labels at
    that frame. Row b's labels and their frames are the first ``count[b]`` columns; the last column is written by rows
    without a further label, and read by none.
    """

    def __init__(self, decoder: GreedyDecoder, state: GreedyState) -> None:
        model, frames = decoder.model, decoder.frames
        self.model, self.max_symbols = model, decoder.max_symbols
        batch, device = len(state.frames), state.predicted.device
        self.predicted, self.predictor_state = _each(torch.zeros_like, (state.predicted, state.predictor_state))
        self.projected = self.predicted.new_zeros(batch, frames, self.predicted.shape[-1])
        self.at = torch.arange(frames, device=device)
        self.place, self.end, self.symbols, self.count = torch.zeros(4, batch, dtype=torch.int64, device=device)
        self.labels, self.times = self.place.new_zeros(2, batch, frames * decoder.max_symbols + 1)
        self.going = torch.zeros((), dtype=torch.bool, device=device)
        self.run = _Replayed(self._step, device)

    def __call__(self, state: GreedyState, projected: Tensor, lengths: Tensor) -> GreedyState:
        for counter in (self.place, self.symbols, self.count):
            counter.zero_()
        _copy((self.projected, self.end), (projected, lengths))
        _copy((self.predicted, self.predictor_state), (state.predicted, state.predictor_state))
        self.run()
        while bool(self.going):
            self.run()
        rows = zip(self.count.tolist(), self.labels.tolist(), self.times.tolist(), state.frames, strict=True)
        found = [(labels[:count], [decoded + time for time in times[:count]]) for count, labels, times, decoded in rows]
        predicted, predictor_state = _each(torch.clone, (self.predicted, self.predictor_state))
        return GreedyState(
            [old + new for old, (new, _) in zip(state.labels, found, strict=True)],
            [old + new for old, (_, new) in zip(state.times, found, strict=True)],
            [decoded + end for decoded, end in zip(state.frames, lengths.tolist(), strict=True)],
            predicted,
            predictor_state,
        )

    def _step(self) -> None:
        chosen = self.model.joint.combine(self.projected, self.predicted[:, None]).argmax(-1)
        ahead = (self.at >= self.place[:, None]) & (self.at < self.end[:, None]) & (chosen != self.model.blank)
        emits, first = ahead.any(1), ahead.int().argmax(1)
        label = chosen.gather(1, first[:, None])
        self._record(emits, label, first)
        symbols = torch.where(first == self.place, self.symbols, 0) + 1
        full = symbols == self.max_symbols
        self.symbols.copy_(torch.where(full, 0, symbols))
        self.place.copy_(torch.where(emits, first + full, self.end))
        self.going.copy_((self.place < self.end).any())
        self._predict(emits, label)

    def _record(self, emits: Tensor, label: Tensor, frame: Tensor) -> None:
        column = torch.where(emits, self.count, self.labels.shape[1] - 1)[:, None]
        self.labels.scatter_(1, column, label)
        self.times.scatter_(1, column, frame[:, None])
        self.count.add_(emits)

    def _predict(self, emits: Tensor, label: Tensor) -> None:
        output, state = self.model.predictor(label, self.predictor_state)
        predicted = self.model.joint.predictor(output[:, 0])
        self.predicted.copy_(torch.where(emits[:, None], predicted, self.predicted))
        for buffer, new in zip(self.predictor_state, state, strict=True):
            buffer.copy_(torch.where(emits[:, None], new, buffer))


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value``, of tensors in lists and tuples, named or not, with the function's results for its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    parts = [_each(function, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def _copy(buffers: Any, value: Any) -> None:
    """Copies the tensors of ``value`` into those of ``buffers``, which is built alike."""
    if isinstance(buffers, Tensor):
        buffers.copy_(value)
        return
    for buffer, part in zip(buffers, value, strict=True):
        _copy(buffer, part)
