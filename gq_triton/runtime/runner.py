"""A packed recognizer without torch: whole recordings and streams."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from gq_triton.kernels import native
from gq_triton.models.config import RNNTConfig
from gq_triton.packed_header import RECOGNIZER_FORMAT
from gq_triton.speech.mel import HOP, HOP_MS, WINDOW, LogMelSettings, chunk_samples, frame_at
from gq_triton.speech.segments import MAX_SYMBOLS, WINDOW_FRAMES
from gq_triton.speech.tokens import BLANK, Tokenizer, tokenizer_from_dict

from .audio import read_wav
from .features import LogMel
from .model import RNNT, BifocalEncoder
from .tensor_file import TensorFile
from .weights import Weights

__all__ = ["Runner", "Stream"]

MALFORMED = (AttributeError, TypeError, ValueError)  # what a wrong description leads to


class Runner:
    """A packed recognizer, ready to run.

    Args:
        front_end: waveforms to features.
        tokenizer: token ids to text.
        model: the transducer.
        config: its sizes.
    """

    def __init__(self, front_end: LogMel, tokenizer: Tokenizer, model: RNNT, config: RNNTConfig) -> None:
        self.front_end, self.tokenizer, self.model, self.config = front_end, tokenizer, model, config

    @classmethod
    def load(cls, path: str | os.PathLike[str], threads: int = 1) -> Runner:
        """Reads a packed recognizer: what :meth:`gq_triton.speech.recognizer.Recognizer.save` wrote, or ``gq-triton
        convert``.

        Args:
            path: of the file.
            threads: that the kernels may use at most; default 1. Results do not depend on it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no packed recognizer, or it is damaged; or ``threads`` is below 1.
            ModuleNotFoundError: its tokenizer needs sentencepiece, which is not installed.
            RuntimeError: the native kernels are not there.
        """
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if not native.available():
            raise RuntimeError(f"the native kernels are not available: {native.reason()}")
        with TensorFile(Path(path)) as file:
            try:
                return cls._from_file(file, threads)
            except MALFORMED as error:
                raise ValueError(f"{path} cannot be loaded: {error}") from error

    @classmethod
    def _from_file(cls, file: TensorFile, threads: int) -> Runner:
        description = _description(file.metadata)
        config = RNNTConfig.from_dict(_part(description, "model"))
        if not config.predictor_layers:
            raise ValueError("it is a CTC model, and only transducers run here")
        settings = LogMelSettings(**_part(description, "front_end"))
        tokenizer = tokenizer_from_dict(_part(description, "tokenizer"))
        if settings.n_mels != config.features:
            raise ValueError(f"its front end gives {settings.n_mels} values a frame, its model takes {config.features}")
        if tokenizer.vocab_size != config.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} ids, its model emits {config.vocab_size}")
        weights = Weights(file, threads)
        mean, std = (weights.vector(f"front_end.{name}", settings.n_mels) for name in ("mean", "std"))
        if not (std > 0).all():
            raise ValueError("front_end.std has values that are not above 0")
        model = RNNT.load(config, weights)
        weights.require_all_used()
        return cls(LogMel(settings, mean, std), tokenizer, model, config)

    @property
    def frame_ms(self) -> int:
        """Milliseconds of an encoder frame."""
        return HOP_MS * self.config.subsampling

    def stream(self, chunk_ms: int = 240) -> Stream:
        """A stream of audio; see :class:`Stream`."""
        return Stream(self, chunk_ms)

    def transcribe(self, audio: str | os.PathLike[str] | np.ndarray) -> str:
        """The text of one recording.

        Args:
            audio: a WAV file of 16 kHz (see :func:`gq_triton.runtime.audio.read_wav`), or samples as
                :meth:`Stream.push` takes them.

        Returns:
            the text; empty for a recording shorter than one frame of the encoder.

        Raises:
            FileNotFoundError, ValueError: the audio cannot be read.
        """
        stream = self.stream(max(1, 1000 // self.frame_ms) * self.frame_ms)
        stream.push(audio if isinstance(audio, np.ndarray) else read_wav(audio))
        return stream.finish()


class Stream:
    """One stream of audio, in pieces of any size, decoded greedily.

    The audio is decoded in whole chunks, which begin at multiples of ``chunk_ms`` however it was cut: what is found
    does not depend on that.

    Args:
        runner: the recognizer, which several streams may share.
        chunk_ms: milliseconds decoded at a time, a multiple of the runner's ``frame_ms``. A word appears up to this
            much, and the 25 ms of a window, after it was spoken; longer chunks cost less in all.

    Raises:
        ValueError: ``chunk_ms`` is no such number.

    Attributes:
        labels: ids of the labels found so far.
    """

    labels: list[int]

    def __init__(self, runner: Runner, chunk_ms: int = 240) -> None:
        self._runner = runner
        self._step = chunk_samples(chunk_ms, runner.frame_ms)
        self._window = self._step + WINDOW - HOP
        self.reset()

    def reset(self) -> None:
        """Forgets all that was heard: the next audio is a new recording's."""
        model = self._runner.model
        self.labels = []
        self._audio = np.zeros(0, np.float32)
        self._front_end, self._encoder = self._runner.front_end.start(), model.encoder.start()
        self._frames, self._finished = 0, False
        self._text, self._shown = "", 0  # of so many labels
        self._predict(BLANK, model.predictor.start())

    def switch_at(self, seconds: float) -> None:
        """Says when the wake word that the audio begins with ends: the small encoder of a bifocal model takes what was
        spoken before, the large one what comes after. Without this call, the large one takes all.

        While the small encoder is at work, the time may be set anew: to infinity at first, where the end is not known
        yet.

        Args:
            seconds: from the stream's start, rounded to 10 ms and then down to an encoder frame. If it is past, the
                large encoder takes over with the next chunk.

        Raises:
            ValueError: a model without a small encoder; ``seconds`` that are no number from 0 on; or the stream has
                finished, or switched already.
        """
        encoder = self._runner.model.encoder
        if not isinstance(encoder, BifocalEncoder):
            raise ValueError("switch_at is for models with a small encoder; this one's small_encoder_layers is 0")
        self._require_open()
        switch = frame_at(seconds) // encoder.subsampling
        if self._frames and not self._encoder.left:
            raise ValueError("the stream has switched already: reset() makes it anew")
        left = max(0, switch - self._frames)
        self._encoder = self._encoder._replace(left=left) if self._frames and left else encoder.start(left)

    @property
    def text(self) -> str:
        """What was found so far."""
        if self._shown != len(self.labels):  # a long text takes longer than a short push lasts
            self._text, self._shown = self._runner.tokenizer.decode(self.labels), len(self.labels)
        return self._text

    def push(self, samples: np.ndarray) -> str:
        """Takes further audio and returns the text so far.

        Args:
            samples: floating point (n,) in [-1, 1], n >= 0, at 16 kHz.

        Raises:
            ValueError: samples of another shape or dtype or that are not finite; or the stream has finished.
        """
        self._require_open()
        self._audio = np.concatenate([self._audio, _checked(samples)])
        place = 0
        while len(self._audio) - place >= self._window:
            self._decode(self._audio[place : place + self._window])
            place += self._step
        self._audio = self._audio[place:].copy() if place else self._audio
        return self.text

    def finish(self) -> str:
        """Ends the stream, with the silence that the front end appends, and returns its text.

        Raises:
            ValueError: it has finished already.
        """
        self._require_open()
        # All that is left at once: each weight that does not depend on the step before is read but once.
        silence = np.zeros(self._runner.front_end.settings.tail_samples, np.float32)
        self._decode(np.concatenate([self._audio, silence]))
        self._audio, self._finished = self._audio[:0], True
        return self.text

    def choose(self, logits: np.ndarray, frame: int) -> list[int]:
        """Which labels to take, by default the most probable ones. A subclass may choose otherwise, for instance to
        emit given labels at given frames.

        Args:
            logits: float32 (W, vocab_size) of W neighbouring encoder frames.
            frame: the number of the first of them, counted from the recording's first.

        Returns:
            the label, or the blank (0), of each frame. What comes after a label, which changes the logits, does not
            count. ``labels`` holds those taken before.
        """
        return logits.argmax(-1).tolist()

    def _require_open(self) -> None:
        if self._finished:
            raise ValueError("the stream has finished: reset() makes it anew")

    def _decode(self, samples: np.ndarray) -> None:
        """Takes a chunk, with the window's overlap, through the recognizer."""
        model = self._runner.model
        features, self._front_end = self._runner.front_end.stream(samples, self._front_end)
        encoded, self._encoder = model.encoder.stream(features, self._encoder)
        if len(encoded):
            self._search(model.joint.encoder(encoded))

    def _search(self, frames: np.ndarray) -> None:
        """Greedy search through further frames, the joint's projections (T, joint) of the encoder's."""
        joint, place, symbols = self._runner.model.joint, 0, 0
        while place < len(frames):
            window = frames[place : place + WINDOW_FRAMES]
            found = self.choose(joint.combine(window, self._predicted), self._frames + place)
            blanks = next((index for index, label in enumerate(found) if label != BLANK), len(found))
            place, symbols = place + blanks, 0 if blanks else symbols
            if blanks == len(found):
                continue
            self.labels.append(found[blanks])
            self._predict(found[blanks], self._states)
            symbols += 1
            if symbols == MAX_SYMBOLS:
                place, symbols = place + 1, 0
        self._frames += len(frames)

    def _predict(self, label: int, states: list) -> None:
        """The predictor's step: the joint's projection (1, joint) of its output after ``label``, and its states."""
        model = self._runner.model
        output, self._states = model.predictor(label, states)
        self._predicted = model.joint.predictor(output)


def _checked(samples: np.ndarray) -> np.ndarray:
    """The samples as float32."""
    if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
        found = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
        raise ValueError(f"samples must be a floating-point array (n,), got {found}")
    with np.errstate(over="ignore"):
        samples = samples.astype(np.float32, copy=False)
    if not np.isfinite(samples).all():
        raise ValueError("samples holds numbers that are NaN or infinite")
    return samples


def _description(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        description = json.loads(metadata["state"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"it is no recognizer: its metadata has no description ({error})") from error
    if not isinstance(description, dict) or description.get("format") != RECOGNIZER_FORMAT:
        raise ValueError("it is no recognizer that this version reads")
    if description.get("stage") != "packed":
        raise ValueError(
            f"it is a recognizer of stage {description.get('stage')!r} and only packed ones run here: "
            "pack it with `gq-triton convert`"
        )
    return description


def _part(description: dict[str, Any], name: str) -> dict[str, Any]:
    part = description.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"its description must have {name!r}, an object")
    return part
