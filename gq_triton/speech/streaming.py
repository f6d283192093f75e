"""Streaming recognition: audio in pieces of any size, text as it is spoken.

    streaming = StreamingRecognizer(Recognizer.load("model.safetensors"))
    for samples in microphone:
        print(streaming.push(samples).text)
    print(streaming.finish().text)

The recognizer always advances by whole chunks, which all begin at multiples of ``chunk_ms``, however the audio was cut.
A chunk that is complete goes through the front end, the encoder and the search at once, together with those of other
streams that are complete in the same call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gq_triton.models.rnnt import BifocalEncoder, BifocalState

from .decoding import BeamDecoder, BeamState, CTCState, GreedyDecoder, GreedyState, greedy_decoder
from .features import LogMelState
from .graphs import GraphedGreedyDecoder, graphed
from .mel import HOP_MS, chunk_samples, frame_at
from .recognizer import Recognizer
from .segments import Endpointing, Result

__all__ = ["Endpointing", "Result", "StreamingRecognizer"]


@dataclass
class _Stream:
    """One stream: samples not yet decoded, ``(n,)``, and what each part of the recognizer carries, a batch of one.

    ``start`` is how many encoder frames came before the segment in progress, ``ended`` the segments to be reported,
    ``latest`` the result of the segment in progress, if it was asked for since its last chunk.
    """

    audio: Tensor
    front_end: LogMelState
    encoder: Any
    decoder: GreedyState | BeamState
    start: int = 0
    finished: bool = False
    ended: list[Result] = field(default_factory=list)
    latest: Result | None = None


class StreamingRecognizer:
    """Recognizes independent streams of audio, each pushed in pieces of any size.

    What is found depends neither on how a stream was cut into pieces nor, but for the rounding of floating-point sums,
    on the streams beside it, and :meth:`finish` gives what :meth:`Recognizer.transcribe` does.

    On a GPU, whole chunks run under CUDA graphs: one for each number of streams that advance together.

    Args:
        recognizer: float, prepared or packed, in evaluation mode and on the device that it is to run on. It must not be
            changed while streams are open.
        streams: how many there are, numbered from 0; default 1.
        chunk_ms: milliseconds of audio that are decoded at a time, a multiple of an encoder frame's or, of a Conformer,
            of its own chunk's; default 240. What is spoken waits for its chunk's end, and 15 ms more for the last
            window's; longer chunks cost less in all.
        beam_width: hypotheses kept in beam search; 1, the default, is greedy decoding.
        endpointing: when a segment ends within a stream; None, the default, for only where the stream does. After an
            endpoint the encoder and the search start afresh with the next chunk; the front end goes on.

    Raises:
        ValueError: a number out of its range, or a recognizer in training mode.

    Attributes:
        frame_seconds: what an encoder frame lasts, and so the resolution of times.
        decoder: the search. Another :class:`GreedyDecoder` or :class:`BeamDecoder` of the same model may take its
            place, before audio is pushed and followed by :meth:`reset` of every stream.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        streams: int = 1,
        *,
        chunk_ms: int = 240,
        beam_width: int = 1,
        endpointing: Endpointing | None = None,
    ) -> None:
        model, front_end = recognizer.model, recognizer.front_end
        if recognizer.training:
            raise ValueError("recognizer is in training mode: call recognizer.eval() first")
        if streams < 1:
            raise ValueError(f"streams must be at least 1, got {streams}")
        frame_ms = HOP_MS * model.encoder.subsampling
        self._step = chunk_samples(chunk_ms, HOP_MS * model.encoder.chunk)
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {beam_width}")
        self.recognizer, self.streams, self.chunk_ms = recognizer, streams, chunk_ms
        self.beam_width, self.endpointing = beam_width, endpointing
        self.frame_seconds, self._frame_ms = frame_ms / 1000, frame_ms
        self._window = self._step + front_end.window - front_end.hop
        self._device = next(chain(model.parameters(), model.buffers())).device
        self.encoder, self.decoder = model.encoder, greedy_decoder(model)
        if self._device.type == "cuda":
            self.encoder = graphed(model.encoder, chunk_ms // HOP_MS)
            if isinstance(self.decoder, GreedyDecoder):
                self.decoder = GraphedGreedyDecoder(model, chunk_ms // frame_ms)
        if beam_width > 1:
            self.decoder = BeamDecoder(model, width=beam_width)
        self._streams: list[_Stream] = [self._fresh() for _ in range(streams)]

    def push(self, audio: Tensor, stream: int = 0) -> Result:
        """Takes further audio of one stream.

        Args:
            audio: floating point ``(n,)`` in [-1, 1], n >= 0, at the front end's ``sample_rate``, 16 kHz.
            stream: which one; default 0.

        Returns:
            the segment in progress. Or, final, the one that the last chunk ended; it is reported once, and what comes
            next is the segment after it.

        Raises:
            ValueError: audio of another shape or dtype or with samples that are not finite; a stream that there is not,
                or that has finished.
        """
        return self.push_many({stream: audio})[stream]

    @torch.inference_mode()
    def push_many(self, audio: Mapping[int, Tensor]) -> dict[int, Result]:
        """Takes further audio of several streams, by their numbers; their chunks are decoded side by side.

        Returns and raises what :meth:`push` does, for each stream. Where it raises, no audio was taken.
        """
        streams = {index: self._open(index) for index in audio}
        for samples in audio.values():
            _check(samples)
        for index, stream in streams.items():
            stream.audio = torch.cat([stream.audio, audio[index].to(stream.audio)])
        self._advance(list(streams.values()))
        return {index: self._report(stream) for index, stream in streams.items()}

    @torch.inference_mode()
    def finish(self, stream: int = 0) -> Result:
        """Ends a stream, with the silence that the front end appends, and returns its last segment, final. No segment
        ends within that silence.

        Raises:
            ValueError: a stream that there is not, or that has finished already.
        """
        last = self._open(stream)
        left = torch.cat([last.audio, last.audio.new_zeros(self.recognizer.front_end.tail_samples)])
        self._decode([last], left[None])  # all at once: most weights are read but once
        last.audio, last.finished = left[:0], True
        return replace(self._result(last, is_final=True), ended=tuple(_taken(last.ended)))

    @torch.inference_mode()
    def reset(self, stream: int = 0) -> None:
        """Makes a stream anew, whether it has finished or not: all that it heard is forgotten.

        Raises:
            ValueError: a stream that there is not.
        """
        self._known(stream)
        self._streams[stream] = self._fresh()

    @torch.inference_mode()
    def switch_at(self, seconds: float, stream: int = 0) -> None:
        """Says when the wake word that a stream begins with ends: the small encoder of a bifocal model takes what was
        spoken before, the large one what comes after. Without this call, the large one takes all.

        While the small encoder is at work, the time may be set anew: to infinity at first, where the end is not known
        yet. A time that has not come when a segment ends still holds in the next; before a segment's first chunk is
        decoded, a new one may be set, for another wake word.

        Args:
            seconds: from the stream's start, rounded to a frame of the front end and then down to one of the encoder.
                If it is past, the large encoder takes over with the next chunk.
            stream: which one; default 0.

        Raises:
            ValueError: a model without a small encoder; ``seconds`` that are no number from 0 on; a stream that there
                is not, that has finished, or whose segment has switched already.
        """
        known, encoder = self._open(stream), self.recognizer.model.encoder
        if not isinstance(encoder, BifocalEncoder):
            raise ValueError("switch_at is for models with a small encoder; this one's small_encoder_layers is 0")
        switch = frame_at(seconds) // encoder.subsampling
        begun = known.decoder.frames[0]
        if begun and not _left(known.encoder):
            raise ValueError(f"stream {stream} has switched already: reset({stream}) makes it anew")
        left = max(0, switch - known.start - begun)
        known.encoder = known.encoder._replace(left=[left]) if begun and left else self._initial(left)

    def state(self, stream: int = 0) -> dict[str, Any]:
        """All that a stream carries: a copy, of tensors, numbers, strings, lists, tuples and dictionaries only, which
        ``torch.save`` writes and ``torch.load`` reads with ``weights_only=True``.

        Raises:
            ValueError: a stream that there is not.
        """
        self._known(stream)
        return {"settings": self._settings(), "stream": _plain(replace(self._streams[stream], latest=None))}

    @torch.inference_mode()
    def restore(self, state: Mapping[str, Any], stream: int = 0) -> None:
        """Lets a stream go on from a :meth:`state`, be it of another stream, recognizer or device; what it heard so far
        is forgotten.

        Raises:
            ValueError: a stream that there is not; a state of another model or of other settings, or no state at all.
        """
        self._known(stream)
        settings = state.get("settings") if isinstance(state, Mapping) else None
        if settings != self._settings():
            raise ValueError(f"state was taken with {settings}; it is restored with {self._settings()}")
        self._streams[stream] = _like(self._fresh(), state.get("stream"), "state")

    def _settings(self) -> dict[str, Any]:
        recognizer = self.recognizer
        return {
            "chunk_ms": self.chunk_ms,
            "beam_width": self.beam_width,
            "front_end": recognizer.front_end.to_dict(),
            "model": recognizer.model.config.to_dict(),
        }

    @torch.inference_mode()
    def _fresh(self) -> _Stream:
        front_end = self.recognizer.front_end
        return _Stream(front_end.mean.new_zeros(0), front_end.initial_state(), *self._start())

    def _start(self, left: int = 0) -> tuple[Any, GreedyState | BeamState | CTCState]:
        """The states of the encoder and of the search before a segment; the first ``left`` encoder frames are to be the
        small encoder's."""
        return self._initial(left), self.decoder.start(1)

    def _initial(self, left: int) -> Any:
        encoder = self.recognizer.model.encoder
        features = torch.zeros(1, 0, self.recognizer.front_end.n_mels, device=self._device)
        switch = [torch.tensor([left * encoder.subsampling])] if left else []
        return encoder.initial_state(features, *switch)

    def _advance(self, streams: Sequence[_Stream]) -> None:
        """Decodes all complete chunks, one of each stream at a time."""
        while ready := [stream for stream in streams if len(stream.audio) >= self._window]:
            self._decode(ready, torch.stack([stream.audio[: self._window] for stream in ready]))
            for stream in ready:
                stream.audio = stream.audio[self._step :]
                if self._has_endpoint(stream):
                    stream.ended.append(self._result(stream, is_final=True))
                    stream.start += stream.decoder.frames[0]
                    stream.encoder, stream.decoder = self._start(_left(stream.encoder))
        for stream in streams:
            stream.audio = stream.audio.clone()  # the rest alone, not all that was pushed

    def _decode(self, streams: Sequence[_Stream], samples: Tensor) -> None:
        """Takes samples ``(B, n)``, a chunk of each stream with the window's overlap, through the recognizer."""
        front_end = _join([stream.front_end for stream in streams])
        encoder = _join([stream.encoder for stream in streams])
        decoder = _join([stream.decoder for stream in streams])
        features, front_end = self.recognizer.front_end.stream(samples, front_end)
        encoded, encoder = self.encoder.stream(features.to(self._device), encoder)
        decoder = self.decoder.advance(decoder, encoded, torch.full((len(streams),), encoded.shape[1]))
        states = [_split(state, len(streams)) for state in (front_end, encoder, decoder)]
        for stream, *parts in zip(streams, *states, strict=True):
            stream.front_end, stream.encoder, stream.decoder = parts
            stream.latest = None

    def _has_endpoint(self, stream: _Stream) -> bool:
        if self.endpointing is None:
            return False
        times, frames = self.decoder.results(stream.decoder)[0].times, stream.decoder.frames[0]
        silent = frames - times[-1] - 1 if times else frames
        return self.endpointing.ends(frames * self._frame_ms / 1000, silent * self._frame_ms / 1000, len(times))

    def _report(self, stream: _Stream) -> Result:
        ended = _taken(stream.ended)
        if ended and not stream.decoder.frames[0]:
            return replace(ended.pop(), ended=tuple(ended))
        stream.latest = stream.latest or self._result(stream, is_final=False)
        return replace(stream.latest, ended=tuple(ended)) if ended else stream.latest

    def _result(self, stream: _Stream, *, is_final: bool) -> Result:
        labels, times, stable = self.decoder.results(stream.decoder)[0]
        return Result(
            text=self.recognizer.tokenizer.decode(labels),
            is_final=is_final,
            ids=tuple(labels),
            times=tuple(self._seconds(stream.start + time) for time in times),
            stable=len(labels) if is_final else stable,
            start=self._seconds(stream.start),
            end=self._seconds(stream.start + stream.decoder.frames[0]),
        )

    def _seconds(self, frames: int) -> float:
        return frames * self._frame_ms / 1000

    def _known(self, stream: int) -> _Stream:
        if not isinstance(stream, int) or not 0 <= stream < self.streams:
            raise ValueError(f"stream must lie in 0..{self.streams - 1}, got {stream!r}")
        return self._streams[stream]

    def _open(self, stream: int) -> _Stream:
        known = self._known(stream)
        if known.finished:
            raise ValueError(f"stream {stream} has finished: reset({stream}) makes it anew")
        return known


def _check(audio: Tensor) -> None:
    if not isinstance(audio, Tensor) or audio.dim() != 1 or not audio.is_floating_point():
        found = f"{audio.dtype} {tuple(audio.shape)}" if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"audio must be a floating-point tensor (samples,), got {found}")
    if not audio.float().isfinite().all():
        raise ValueError("audio holds samples that are NaN or infinite")


def _left(encoder: Any) -> int:
    """How many further encoder frames are the small encoder's, by the state of a stream's encoder."""
    return encoder.left[0] if isinstance(encoder, BifocalState) else 0


def _taken(results: list[Result]) -> list[Result]:
    taken = results[:]
    results.clear()
    return taken


def _join(states: Sequence[Any]) -> Any:
    return states[0] if len(states) == 1 else states[0].join(states)


def _split(state: Any, count: int) -> list[Any]:
    return [state] if count == 1 else state.split()


def _parts(value: Any) -> Iterable[str] | None:
    """The names of the parts of a state, None for what has none."""
    return [part.name for part in fields(value)] if is_dataclass(value) else getattr(value, "_fields", None)


def _plain(value: Any) -> Any:
    """A copy in which states are dictionaries."""
    if isinstance(value, Tensor):
        return value.clone()
    if names := _parts(value):
        return {name: _plain(getattr(value, name)) for name in names}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _like(template: Any, value: Any, name: str) -> Any:
    """The inverse of :func:`_plain`, for a state that is built as ``template`` is, on its device.

    Lists and tuples may be of any length, all their items being like the template's first.
    """
    if isinstance(template, Tensor):
        if not isinstance(value, Tensor) or (value.dtype, value.dim()) != (template.dtype, template.dim()):
            raise ValueError(f"{name} must be a {template.dim()}-D tensor, {template.dtype}")
        return value.to(template.device, copy=True)
    if names := _parts(template):
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ValueError(f"{name} must hold {', '.join(names)}")
        return type(template)(**{part: _like(getattr(template, part), value[part], f"{name}.{part}") for part in names})
    if not isinstance(value, type(template)):
        raise ValueError(f"{name} must be of type {type(template).__name__}, got {type(value).__name__}")
    if isinstance(template, (list, tuple)):
        return type(template)(_like(template[0], item, name) if template else item for item in value)
    return value
