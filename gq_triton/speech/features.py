"""Log-mel filterbank features, offline and streamed.

Frame t covers samples [t * HOP, t * HOP + WINDOW) and nothing else: no centre padding, so a frame is known as soon
as its last sample arrives and streaming gives the same features as reading a whole file.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .mel import FFT_SIZE, HOP, LOG_FLOOR, SAMPLE_RATE, WINDOW, LogMelSettings, mel_filters

__all__ = ["LogMel", "LogMelState"]


class LogMelState(NamedTuple):
    """What normalisation carries from chunk to chunk, for a batch of streams.

    Attributes:
        total: ``(B, n_mels)`` float64, the sum of all frames' energies, less the global mean.
        seen: ``(B, 1)`` int64, how many frames there were.
    """

    total: Tensor
    seen: Tensor

    @staticmethod
    def join(states: Sequence["LogMelState"]) -> "LogMelState":
        """One state of several streams side by side."""
        return LogMelState(*map(torch.cat, zip(*states, strict=True)))

    def split(self) -> list["LogMelState"]:
        """The states of the streams, each a batch of one; the inverse of :meth:`join`."""
        return [LogMelState(*parts) for parts in zip(self.total.split(1), self.seen.split(1), strict=True)]


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
        tail_ms: silence appended to every recording, in milliseconds, at most 60000, default 0: room for a transducer
            to emit a word that the recording ends with.

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
        self.settings = LogMelSettings(n_mels, f_min, f_max, adapt_frames, tail_ms)
        self.n_mels, self.adapt_frames, self.tail_samples = n_mels, adapt_frames, self.settings.tail_samples
        self.register_buffer("mel_filters", torch.tensor(mel_filters(n_mels, f_min, f_max)), persistent=False)
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
        if self.tail_samples:
            used = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
            waveforms = nn.functional.pad(waveforms * used, (0, self.tail_samples))
            lengths = lengths + self.tail_samples
        feature_lengths = self.num_frames(lengths)
        features, _ = self.stream(waveforms, self.initial_state(waveforms.shape[0]))
        frames = torch.arange(features.shape[1], device=features.device)
        valid = frames < feature_lengths[:, None]
        return features * valid[:, :, None], feature_lengths

    def initial_state(self, batch: int = 1) -> LogMelState:
        """The state of ``batch`` streams before their first chunk."""
        total = self.mean.new_zeros(batch, self.n_mels, dtype=torch.float64)
        return LogMelState(total, self.mean.new_zeros(batch, 1, dtype=torch.int64))

    def stream(self, samples: Tensor, state: LogMelState) -> tuple[Tensor, LogMelState]:
        """Features of one chunk; of all chunks together they are those of :meth:`forward`, but for the tail of silence.

        Args:
            samples: (B, n) floating point, whose first frame follows the previous chunk's last: each chunk begins
                ``hop`` samples after the start of the frame that the one before ended with.
            state: what the previous chunk returned, at first :meth:`initial_state`.

        Returns:
            features float32 (B, T, n_mels) of the whole frames in ``samples``, and the state for the next chunk.
        """
        energies = self.log_energies(samples)
        centred = energies - self.mean
        if self.adapt_frames is None or not energies.shape[1]:
            return centred / self.std, state
        totals = state.total[:, None] + centred.double().cumsum(1)
        counts = state.seen + torch.arange(1, energies.shape[1] + 1, device=energies.device)
        means = totals / (counts + self.adapt_frames)[:, :, None]
        return (centred - means.float()) / self.std, LogMelState(totals[:, -1], counts[:, -1:])

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
        return asdict(self.settings)

    @classmethod
    def from_dict(cls, arguments: dict[str, Any]) -> "LogMel":
        """Inverse of :meth:`to_dict`."""
        return cls(**arguments)

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
