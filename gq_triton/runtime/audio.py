"""WAV files by the standard library."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np

from gq_triton.speech.mel import SAMPLE_RATE

__all__ = ["read_wav"]

FULL_SCALE = {1: 128.0, 2: 32768.0, 3: 8388608.0, 4: 2147483648.0}  # by bytes of a sample

MALFORMED = (wave.Error, EOFError, RuntimeError, ZeroDivisionError)  # what the wave module makes of damaged files


def read_wav(path: str | os.PathLike[str]) -> np.ndarray:
    """The samples of a WAV file of 16 kHz: float32 (n,) in [-1, 1), the mean of its channels.

    Args:
        path: of PCM audio of 8, 16, 24 or 32 bits, any number of channels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such audio, or of another rate.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with wave.open(os.fspath(path), "rb") as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            # A damaged header may promise more than there is, and memory would be taken for it.
            frames = min(file.getnframes(), os.path.getsize(path) // (channels * width))
            data = file.readframes(frames)
    except MALFORMED as error:
        raise ValueError(f"{path} is not a WAV file of PCM samples, or it is damaged: {error!r}") from error
    if width not in FULL_SCALE:
        raise ValueError(f"{path} has samples of {8 * width} bits; allowed are 8, 16, 24 and 32")
    if rate != SAMPLE_RATE:
        raise ValueError(
            f"{path} has {rate} samples a second and {SAMPLE_RATE} are needed: resample it first, for example with "
            f"`ffmpeg -i {path} -ar {SAMPLE_RATE} resampled.wav`, or use `gq-triton transcribe`, which does"
        )
    whole = len(data) - len(data) % (channels * width)
    samples = _to_integers(np.frombuffer(data, np.uint8, whole), width).reshape(-1, channels)
    return (samples.astype(np.float32) / np.float32(FULL_SCALE[width])).mean(axis=1)


def _to_integers(data: np.ndarray, width: int) -> np.ndarray:
    if width == 1:
        return data.astype(np.int16) - 128
    if width == 3:  # the upper three bytes of four
        padded = np.zeros((len(data) // 3, 4), np.uint8)
        padded[:, 1:] = data.reshape(-1, 3)
        return padded.view("<i4")[:, 0] >> 8
    return data.view(f"<i{width}")
