"""The front end of :mod:`gq_triton.speech.features` in numpy, for one stream."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gq_triton.speech.mel import FFT_SIZE, HOP, LOG_FLOOR, WINDOW, LogMelSettings, mel_filters

__all__ = ["LogMel", "LogMelState"]


class LogMelState(NamedTuple):
    """What normalisation carries from chunk to chunk: the sum of all frames' energies less the global mean, float64
    (n_mels,), and how many frames there were."""

    total: np.ndarray
    seen: int


class LogMel:
    """Waveforms to normalised log-mel energies, by the arithmetic of :class:`gq_triton.speech.features.LogMel`.

    Args:
        settings: that class says what they mean.
        mean, std: its statistics, float32 (n_mels,).
    """

    def __init__(self, settings: LogMelSettings, mean: np.ndarray, std: np.ndarray) -> None:
        self.settings, self.mean, self.std = settings, mean, std
        self.mel_filters = mel_filters(settings.n_mels, settings.f_min, settings.f_max)
        self.hann = (0.5 - 0.5 * np.cos(2 * np.pi / WINDOW * np.arange(WINDOW))).astype(np.float32)

    def start(self) -> LogMelState:
        """The state before the first chunk."""
        return LogMelState(np.zeros(self.settings.n_mels), 0)

    def stream(self, samples: np.ndarray, state: LogMelState) -> tuple[np.ndarray, LogMelState]:
        """Features of one chunk.

        Args:
            samples: float32 (n,), whose first frame follows the previous chunk's last: each chunk begins ``HOP``
                samples after the start of the frame that the one before ended with.
            state: what the previous chunk returned, at first :meth:`start`.

        Returns:
            features float32 (T, n_mels) of the whole frames in ``samples``, and the state for the next chunk.
        """
        centred = self.log_energies(samples) - self.mean
        if self.settings.adapt_frames is None or not len(centred):
            return centred / self.std, state
        totals = state.total + centred.cumsum(0, dtype=np.float64)
        counts = state.seen + np.arange(1, len(centred) + 1)
        means = totals / (counts + self.settings.adapt_frames)[:, None]
        return (centred - means.astype(np.float32)) / self.std, LogMelState(totals[-1], int(counts[-1]))

    def log_energies(self, samples: np.ndarray) -> np.ndarray:
        """Log-mel energies float32 (T, n_mels) of samples float32 (n,), before normalisation."""
        if len(samples) < WINDOW:
            return np.zeros((0, self.settings.n_mels), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP] * self.hann
        spectrum = np.fft.rfft(frames, FFT_SIZE).astype(np.complex64, copy=False).view(np.float32)
        squares = np.square(spectrum, out=spectrum)
        energies = (squares[:, ::2] + squares[:, 1::2]) @ self.mel_filters
        return np.log(energies + np.float32(LOG_FLOOR))
