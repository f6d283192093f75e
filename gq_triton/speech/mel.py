"""The frames, settings and mel filters of the front end.

No torch here: programs that run a packed model without it read this too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = [
    "FFT_SIZE",
    "HOP",
    "HOP_MS",
    "LOG_FLOOR",
    "SAMPLE_RATE",
    "WINDOW",
    "LogMelSettings",
    "chunk_samples",
    "frame_at",
    "mel_filters",
]

SAMPLE_RATE = 16000
WINDOW = 400
HOP = 160
HOP_MS = 1000 * HOP // SAMPLE_RATE
FFT_SIZE = 512
LOG_FLOOR = 1e-6
MAX_TAIL_MS = 60_000
NEVER = 10**18  # a frame that no audio reaches


def frame_at(seconds: float) -> int:
    """The frame whose start is nearest to a time, which may be infinite.

    Raises:
        ValueError: ``seconds`` is no number from 0 on.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
        raise ValueError(f"seconds must be a number from 0 on, got {seconds!r}")
    return round(min(seconds * SAMPLE_RATE / HOP, NEVER))


def chunk_samples(chunk_ms: int, least_ms: int) -> int:
    """Samples from one chunk of ``chunk_ms`` milliseconds to the next, for an encoder whose own chunk has ``least_ms``.

    Raises:
        ValueError: ``chunk_ms`` is no positive multiple of ``least_ms``.
    """
    if not isinstance(chunk_ms, int) or chunk_ms < 1 or chunk_ms % least_ms:
        raise ValueError(f"chunk_ms must be a positive multiple of {least_ms}, the encoder's chunk, got {chunk_ms!r}")
    return chunk_ms // HOP_MS * HOP


@dataclass(frozen=True)
class LogMelSettings:
    """Settings of the front end; :class:`gq_triton.speech.features.LogMel` says what they mean.

    Raises:
        ValueError: one is out of its range.
    """

    n_mels: int = 80
    f_min: float = 20.0
    f_max: float = 8000.0
    adapt_frames: int | None = None
    tail_ms: int = 0

    def __post_init__(self) -> None:
        if not _is_whole(self.n_mels) or not 1 <= self.n_mels <= FFT_SIZE // 2 + 1:
            raise ValueError(f"n_mels must be an integer and lie in 1..{FFT_SIZE // 2 + 1}, got {self.n_mels!r}")
        numbers = isinstance(self.f_min, (int, float)) and isinstance(self.f_max, (int, float))
        if not numbers or not 0 <= self.f_min < self.f_max <= SAMPLE_RATE / 2:
            raise ValueError(
                f"f_min and f_max must satisfy 0 <= f_min < f_max <= 8000, got {self.f_min!r} and {self.f_max!r}"
            )
        if self.adapt_frames is not None and (not _is_whole(self.adapt_frames) or self.adapt_frames < 1):
            raise ValueError(f"adapt_frames must be None or an integer of at least 1, got {self.adapt_frames!r}")
        if not _is_whole(self.tail_ms) or not 0 <= self.tail_ms <= MAX_TAIL_MS:
            raise ValueError(f"tail_ms must be an integer and lie in 0..{MAX_TAIL_MS}, got {self.tail_ms!r}")

    @property
    def tail_samples(self) -> int:
        """Samples of silence that ``tail_ms`` stands for."""
        return self.tail_ms * SAMPLE_RATE // 1000


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def mel_filters(n_mels: int, f_min: float, f_max: float) -> np.ndarray:
    """Triangular filters float32 (FFT_SIZE // 2 + 1, n_mels), linear in mel, each peaking at 1."""
    edges = np.linspace(_mel(f_min), _mel(f_max), n_mels + 2)
    bins = np.arange(FFT_SIZE // 2 + 1) * (SAMPLE_RATE / FFT_SIZE)
    position = (2595.0 * np.log10(1.0 + bins / 700.0))[:, None]
    rising = (position - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position) / (edges[2:] - edges[1:-1])
    return np.minimum(rising, falling).clip(min=0.0).astype(np.float32)


def _mel(frequency: float) -> float:
    return 2595.0 * math.log10(1.0 + frequency / 700.0)
