"""Log-mel filterbank features, offline and streamed.

Frame t covers samples [t * HOP, t * HOP + WINDOW) and nothing else: no centre padding, so a frame is known as soon
as its last sample arrives and streaming gives the same features as reading a whole file.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LogMel", "StreamingLogMel", "mel_filters"]

SAMPLE_RATE = 16000
WINDOW = 400
HOP = 160
FFT_SIZE = 512
LOG_FLOOR = 1e-6


class LogMel(nn.Module):
    """Waveforms to normalised log-mel energies.

    25 ms Hann windows every 10 ms at 16 kHz, power spectrum, triangular filters equally spaced in mel
    (2595 log10(1 + f / 700)), natural logarithm of energy + 1e-6, then ``(x - mean) / std`` with global statistics
    from :meth:`fit` (0 and 1 before). All arithmetic is float32, also under autocast.

    Args:
        n_mels: number of filters, default 80; at most 257, the bins of the spectrum.
        f_min: lowest frequency in Hz, default 20.
        f_max: highest frequency in Hz, default 8000, the Nyquist frequency.
        adapt_frames: None (default) for global normalisation only. A number n > 0 also follows each recording's own
            mean, causally: the mean at frame t is that of frames 0..t and of n frames at the global mean.
        tail_ms: silence appended to every recording, in milliseconds, default 0: room for a transducer to emit a word
            that the recording ends with.

    Raises:
        ValueError: a number out of its range.
    """

    sample_rate = SAMPLE_RATE
    window = WINDOW
    hop = HOP

    mel_filters: Tensor
    hann: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        n_mels: int = 80,
        f_min: float = 20.0,
        f_max: float = 8000.0,
        adapt_frames: int | None = None,
        tail_ms: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= n_mels <= FFT_SIZE // 2 + 1:
            raise ValueError(f"n_mels must lie in 1..{FFT_SIZE // 2 + 1}, got {n_mels}")
        if not 0 <= f_min < f_max <= SAMPLE_RATE / 2:
            raise ValueError(f"f_min and f_max must satisfy 0 <= f_min < f_max <= 8000, got {f_min} and {f_max}")
        if adapt_frames is not None and adapt_frames < 1:
            raise ValueError(f"adapt_frames must be None or at least 1, got {adapt_frames}")
        if tail_ms < 0:
            raise ValueError(f"tail_ms must be at least 0, got {tail_ms}")
        self.n_mels, self.f_min, self.f_max, self.adapt_frames = n_mels, f_min, f_max, adapt_frames
        self.tail_ms = tail_ms
        self.register_buffer("mel_filters", mel_filters(n_mels, f_min, f_max), persistent=False)
        self.register_buffer("hann", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("mean", torch.zeros(n_mels))
        self.register_buffer("std", torch.ones(n_mels))

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a padded batch.

        Args:
            waveforms: (B, samples) floating point in [-1, 1].
            lengths: (B,) integers, samples in use per waveform.

        Returns:
            features float32 (B, T, n_mels), zero beyond each length, and their lengths (B,) int64. Recordings shorter
            than a window have no frame.

        Raises:
            ValueError: shapes or dtypes that do not match.
        """
        self._check(waveforms, lengths)
        lengths = lengths.to(waveforms.device, torch.int64)
        if self.tail_ms:
            used = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
            waveforms = nn.functional.pad(waveforms * used, (0, self.tail_samples))
            lengths = lengths + self.tail_samples
        feature_lengths = self.num_frames(lengths)
        features = self._normalise(self.log_energies(waveforms))
        frames = torch.arange(features.shape[1], device=features.device)
        valid = frames < feature_lengths[:, None]
        return features * valid[:, :, None], feature_lengths

    @property
    def tail_samples(self) -> int:
        """Samples of silence that ``tail_ms`` stands for."""
        return self.tail_ms * SAMPLE_RATE // 1000

    @staticmethod
    def num_frames(samples: Tensor) -> Tensor:
        """Whole frames in each number of samples."""
        return ((samples - WINDOW).div(HOP, rounding_mode="floor") + 1).clamp(min=0)

    def log_energies(self, waveforms: Tensor) -> Tensor:
        """Log-mel energies float32 (B, T, n_mels) of waveforms (B, samples), before normalisation."""
        if waveforms.shape[1] < WINDOW:
            return waveforms.new_zeros(waveforms.shape[0], 0, self.n_mels, dtype=torch.float32)
        with torch.autocast(waveforms.device.type, enabled=False):
            frames = waveforms.float().unfold(1, WINDOW, HOP) * self.hann
            spectrum = torch.view_as_real(torch.fft.rfft(frames, n=FFT_SIZE))
            energies = spectrum.square().sum(-1) @ self.mel_filters
            return torch.log(energies + LOG_FLOOR)

    @torch.no_grad()
    def fit(self, waveforms: Iterable[Tensor]) -> "LogMel":
        """Set ``mean`` and ``std`` from waveforms (samples,), accumulated in float64; returns self.

        Raises:
            ValueError: fewer than two frames in all.
        """
        count = 0
        total = torch.zeros(self.n_mels, dtype=torch.float64, device=self.mean.device)
        squares = torch.zeros_like(total)
        for waveform in waveforms:
            energies = self.log_energies(waveform.to(self.mean.device)[None])[0].double()
            count += energies.shape[0]
            total += energies.sum(0)
            squares += energies.square().sum(0)
        if count < 2:
            raise ValueError(f"waveforms hold {count} frames; at least 2 are needed for statistics")
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp(min=1e-6).sqrt())
        return self

    def to_dict(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able; the statistics are in ``state_dict``."""
        names = ("n_mels", "f_min", "f_max", "adapt_frames", "tail_ms")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, arguments: dict[str, Any]) -> "LogMel":
        """Inverse of :meth:`to_dict`."""
        return cls(**arguments)

    def _normalise(self, energies: Tensor) -> Tensor:
        if self.adapt_frames is None:
            return (energies - self.mean) / self.std
        start = energies.new_zeros(energies.shape[0], self.n_mels, dtype=torch.float64)
        return self._normalise_from(energies, start, 0)[0]

    def _normalise_from(self, energies: Tensor, total: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Causal normalisation after ``seen`` frames whose centred energies sum to ``total`` (float64)."""
        assert self.adapt_frames is not None
        centred = energies - self.mean
        totals = total[:, None] + centred.double().cumsum(1)
        counts = torch.arange(1, energies.shape[1] + 1, device=energies.device) + (seen + self.adapt_frames)
        features = (centred - (totals / counts[:, None]).float()) / self.std
        return features, totals[:, -1] if energies.shape[1] else total

    @staticmethod
    def _check(waveforms: Tensor, lengths: Tensor) -> None:
        if waveforms.dim() != 2 or not waveforms.is_floating_point():
            raise ValueError(
                f"waveforms must be floating point (B, samples), got {waveforms.dtype} {tuple(waveforms.shape)}"
            )
        if lengths.shape != waveforms.shape[:1] or lengths.is_floating_point():
            raise ValueError(f"lengths must be integers (B,), got {lengths.dtype} {tuple(lengths.shape)}")
        if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= waveforms.shape[1]:
            raise ValueError(f"lengths must lie in 0..{waveforms.shape[1]}, got {lengths.tolist()}")


class StreamingLogMel:
    """Features of B streams in step, chunk by chunk; the chunks' outputs joined equal the offline features.

    A frame comes out as soon as its last sample is in: the delay is one window. A remainder shorter than a window is
    dropped, as offline. :meth:`finish` gives the frames of the silence that the front end appends.

    Args:
        front_end: the offline features, whose settings and statistics are used.
        batch_size: number of streams, default 1.
    """

    def __init__(self, front_end: LogMel, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.front_end = front_end
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Forget everything heard."""
        mean = self.front_end.mean
        self._pending = mean.new_zeros(self.batch_size, 0, dtype=torch.float32)
        self._total = mean.new_zeros(self.batch_size, mean.numel(), dtype=torch.float64)
        self._seen = 0

    @torch.no_grad()
    def push(self, samples: Tensor) -> Tensor:
        """Take samples (B, n), n >= 0, and return the frames they complete, float32 (B, frames, n_mels).

        Raises:
            ValueError: samples of another shape or an integer dtype.
        """
        if samples.dim() != 2 or samples.shape[0] != self.batch_size or not samples.is_floating_point():
            raise ValueError(
                f"samples must be floating point ({self.batch_size}, n), got {samples.dtype} {tuple(samples.shape)}"
            )
        heard = torch.cat([self._pending, samples.to(self._pending)], dim=1)
        energies = self.front_end.log_energies(heard)
        self._pending = heard[:, energies.shape[1] * HOP :]
        return self._normalise(energies)

    def finish(self) -> Tensor:
        """The last frames of recordings that end here, float32 (B, frames, n_mels)."""
        return self.push(self._pending.new_zeros(self.batch_size, self.front_end.tail_samples))

    def _normalise(self, energies: Tensor) -> Tensor:
        if self.front_end.adapt_frames is None:
            return self.front_end._normalise(energies)
        features, self._total = self.front_end._normalise_from(energies, self._total, self._seen)
        self._seen += energies.shape[1]
        return features


def mel_filters(n_mels: int, f_min: float, f_max: float) -> Tensor:
    """Triangular filters float32 (FFT_SIZE // 2 + 1, n_mels), linear in mel, each peaking at 1."""
    edges = torch.linspace(_mel(f_min), _mel(f_max), n_mels + 2, dtype=torch.float64)
    bins = torch.arange(FFT_SIZE // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE / FFT_SIZE)
    position = (2595.0 * torch.log10(1.0 + bins / 700.0))[:, None]
    rising = (position - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float()


def _mel(frequency: float) -> float:
    return 2595.0 * math.log10(1.0 + frequency / 700.0)
