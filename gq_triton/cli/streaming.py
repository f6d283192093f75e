"""Streaming transcription of files and of the microphone, printed as it goes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

import click
import torch
from torch import Tensor

from gq_triton.speech.audio import load_audio
from gq_triton.speech.extras import require
from gq_triton.speech.segments import Result
from gq_triton.speech.streaming import StreamingRecognizer

__all__ = ["transcribe_files", "transcribe_microphone"]

BLOCK_SECONDS = 0.02  # of audio that the microphone hands over at a time
ERASE = "\r\x1b[K"  # back to the line's start, and clear it


def transcribe_files(streaming: StreamingRecognizer, files: Sequence[Path], as_json: bool) -> None:
    """Streams each file as fast as it is decoded; what cannot be read is named at the end."""
    failures = []
    for file in files:
        display = _Display(as_json, {"file": str(file)})
        try:
            audio = load_audio(file, streaming.recognizer.front_end.sample_rate)
        except (OSError, ValueError) as error:
            failures.append(str(error))
            continue
        if len(files) > 1 and not as_json:
            click.echo(f"{file}:")
        for samples in audio.split(streaming.recognizer.front_end.sample_rate * streaming.chunk_ms // 1000):
            display(streaming.push(samples))
        display(streaming.finish())
        streaming.reset()
    if failures:
        raise click.ClickException("\n".join(failures))


def transcribe_microphone(streaming: StreamingRecognizer, as_json: bool) -> None:
    """Streams what is said until Ctrl-C, after which the final text is printed.

    Raises:
        ModuleNotFoundError: sounddevice is not installed.
        OSError: it finds no PortAudio library.
        ValueError: there is no microphone that it can record from.
    """
    display = _Display(as_json, {})
    try:
        for samples in _microphone(streaming.recognizer.front_end.sample_rate):
            display(streaming.push(samples))
    except KeyboardInterrupt:
        display(streaming.finish())


def _microphone(sample_rate: int) -> Iterator[Tensor]:
    """Blocks of samples ``(n,)`` as they are recorded. A queue keeps what comes while others are decoded."""
    sounddevice = require("sounddevice", "microphone")
    blocks: SimpleQueue[Tensor] = SimpleQueue()

    def record(samples, *_) -> None:  # samples: (n, 1), in a buffer that is used again
        blocks.put(torch.from_numpy(samples[:, 0].copy()))

    settings = {"samplerate": sample_rate, "blocksize": int(BLOCK_SECONDS * sample_rate), "dtype": "float32"}
    try:
        stream = sounddevice.InputStream(channels=1, callback=record, **settings)
    except sounddevice.PortAudioError as error:
        raise ValueError(f"no microphone that records at {sample_rate} Hz: {error}") from error
    with stream:
        while True:
            yield blocks.get()


class _Display:
    """Prints a result where its text has changed: in one line of a terminal until it is final, else in a line of its
    own, as text, which ends in dots until it is final, or as JSON, with ``source`` beside it."""

    def __init__(self, as_json: bool, source: dict[str, str]) -> None:
        self.as_json, self.source, self.shown = as_json, source, ""

    def __call__(self, result: Result) -> None:
        for part in (*result.ended, result):
            if part.is_final or part.text != self.shown:
                self._show(part)
            self.shown = "" if part.is_final else part.text

    def _show(self, result: Result) -> None:
        if self.as_json:
            event = asdict(result)
            del event["ended"]
            click.echo(json.dumps(self.source | event))
        elif sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1
            text = result.text if result.is_final else result.text[-columns:]
            click.echo(ERASE + text, nl=result.is_final and bool(text))
        elif result.text:
            click.echo(f"{result.end:.2f} s: {result.text}{'' if result.is_final else ' ...'}")
