"""Reading, writing and resampling audio. A waveform is a float32 tensor (samples,) in [-1, 1], one channel."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import gcd
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .extras import require

if TYPE_CHECKING:
    from soundfile import SoundFile

__all__ = ["audio_duration", "load_audio", "resample", "save_audio", "to_int16"]


def load_audio(path: str | PathLike[str], sample_rate: int = 16000) -> Tensor:
    """Read an audio file as one channel at ``sample_rate``.

    Args:
        path: any format libsndfile reads: WAV, FLAC, OGG, MP3, NIST SPHERE (.sph), ...
        sample_rate: wanted rate in Hz; files at another rate are resampled. Channels are averaged.

    Returns:
        float32 (samples,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not audio that can be read, or holds NaN or infinite samples.
    """
    with _opened(Path(path)) as file:
        waveform = torch.from_numpy(file.read(dtype="float32", always_2d=True)).mean(dim=1)
        rate = file.samplerate
    if not torch.isfinite(waveform).all():
        raise ValueError(f"path: {path} holds samples that are NaN or infinite")
    return resample(waveform, rate, sample_rate)


def save_audio(path: str | PathLike[str], waveform: Tensor, sample_rate: int = 16000) -> None:
    """Write a waveform (samples,) as 16-bit audio, clipped; the extension chooses the format (.wav, .flac, ...)."""
    _check_waveform(waveform)
    samples = to_int16(waveform.detach().cpu()).numpy()
    require("soundfile").write(str(path), samples, sample_rate, subtype="PCM_16")


def to_int16(waveform: Tensor) -> Tensor:
    """Samples in [-1, 1] as 16-bit integers, steps of 1 / 32768, rounded and clipped."""
    return (waveform * 32768).round().clamp(-32768, 32767).to(torch.int16)


def audio_duration(path: str | PathLike[str]) -> float:
    """Duration in seconds, from the file's header alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not audio that can be read.
    """
    with _opened(Path(path)) as file:
        return file.frames / file.samplerate


def resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample a waveform (samples,) with a polyphase low-pass filter.

    Returns:
        float32 (ceil(samples * to_rate / from_rate),); the input itself where both rates are equal.

    Raises:
        ValueError: the waveform is not one-dimensional or a rate is not positive.
    """
    _check_waveform(waveform)
    for name, rate in (("from_rate", from_rate), ("to_rate", to_rate)):
        if rate <= 0:
            raise ValueError(f"{name} must be a positive number of Hz, got {rate}")
    if from_rate == to_rate or waveform.numel() == 0:
        return waveform
    common = gcd(from_rate, to_rate)
    up, down = to_rate // common, from_rate // common
    samples = waveform.detach().to("cpu", torch.float32).numpy()
    resampled = require("scipy.signal").resample_poly(samples, up, down, window=_low_pass(max(up, down)))
    return torch.from_numpy(resampled).to(waveform.device)


@cache
def _low_pass(ratio: int) -> np.ndarray:
    """Kaiser-windowed sinc that passes 1 / ratio of the band; kept, since its design costs more than its use."""
    taps = require("scipy.signal").firwin(20 * ratio + 1, 1 / ratio, window=("kaiser", 5.0))
    return taps.astype(np.float32)


@contextmanager
def _opened(path: Path) -> "Iterator[SoundFile]":
    soundfile = require("soundfile")
    if not path.is_file():
        raise FileNotFoundError(f"path: no audio file at {path}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            yield file
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a .raw file, which names no rate
        raise ValueError(f"path: {path} is not readable audio ({error})") from error


def _check_waveform(waveform: Tensor) -> None:
    if waveform.dim() != 1 or not waveform.is_floating_point():
        raise ValueError(
            f"waveform must be a floating-point tensor (samples,), got {waveform.dtype} {tuple(waveform.shape)}"
        )
