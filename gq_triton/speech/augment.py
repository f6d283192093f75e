"""Data augmentation, random only through a ``torch.Generator``.

Random numbers are drawn on the CPU whatever the device of the data, so a seed gives the same augmentation everywhere.
"""

from fractions import Fraction

import torch
from torch import Generator, Tensor, nn

from .audio import resample

__all__ = ["SpecAugment", "add_noise", "random_gain", "random_spans", "speed_perturb"]


class SpecAugment(nn.Module):
    """Mask bands of frequencies and spans of time (Park et al. 2019, arXiv 1904.08779; no time warping).

    Masked places are set to 0, the mean of normalised features. Acts in training mode only.

    Args:
        freq_masks: number of frequency masks, default 2.
        freq_width: widest frequency mask in bins, default 27; each width is uniform on 0..freq_width.
        time_masks: number of time masks, default 2.
        time_fraction: widest time mask as a fraction of the utterance, default 0.05 (the adaptive masks of
            arXiv 1912.05533); each width is uniform on 0..floor(time_fraction * length).

    Raises:
        ValueError: a negative count or width, or a fraction outside [0, 1].
    """

    def __init__(
        self, freq_masks: int = 2, freq_width: int = 27, time_masks: int = 2, time_fraction: float = 0.05
    ) -> None:
        super().__init__()
        for name, value in (("freq_masks", freq_masks), ("freq_width", freq_width), ("time_masks", time_masks)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= time_fraction <= 1:
            raise ValueError(f"time_fraction must lie in [0, 1], got {time_fraction}")
        self.freq_masks, self.freq_width = freq_masks, freq_width
        self.time_masks, self.time_fraction = time_masks, time_fraction

    def forward(self, features: Tensor, lengths: Tensor, generator: Generator | None = None) -> Tensor:
        """Masked copy of features.

        Args:
            features: (B, T, F) floating point.
            lengths: (B,) integers, frames in use.
            generator: CPU generator; default torch's global one.

        Raises:
            ValueError: shapes that do not match.
        """
        if features.dim() != 3 or lengths.shape != features.shape[:1]:
            raise ValueError(
                f"features must be (B, T, F) and lengths (B,), got {tuple(features.shape)} and {tuple(lengths.shape)}"
            )
        if not self.training:
            return features
        batch, frames, bins = features.shape
        lengths = lengths.cpu()
        bin_limit = torch.full((batch,), min(self.freq_width, bins))
        time_limit = (lengths * self.time_fraction).long()
        masked_bins = random_spans(self.freq_masks, bin_limit, torch.full((batch,), bins), bins, generator)
        masked_frames = random_spans(self.time_masks, time_limit, lengths, frames, generator)
        masked = masked_frames[:, :, None] | masked_bins[:, None, :]
        return features.masked_fill(masked.to(features.device), 0.0)


def random_spans(count: int, limits: Tensor, lengths: Tensor, size: int, generator: Generator | None = None) -> Tensor:
    """Union of ``count`` random spans per row.

    Args:
        count: spans per row.
        limits: (B,) int64, the widest span of each row; at most its length.
        lengths: (B,) int64, spans lie in 0..length - 1.
        size: width of the result, at least the longest length.
        generator: CPU generator.

    Returns:
        bool (B, size), True inside a span.
    """
    draws = torch.rand(2, lengths.shape[0], count, generator=generator)
    widths = (draws[0] * (limits[:, None] + 1)).long()
    starts = (draws[1] * (lengths[:, None] - widths + 1)).long()
    places = torch.arange(size)
    inside = (places >= starts[:, :, None]) & (places < (starts + widths)[:, :, None])
    return inside.any(dim=1)


def speed_perturb(waveform: Tensor, factor: float) -> Tensor:
    """Play a waveform (samples,) ``factor`` times as fast, by resampling: tempo and pitch change together (Ko et al.,
    Interspeech 2015). The usual factors are 0.9, 1.0 and 1.1; the result has about samples / factor samples.

    Raises:
        ValueError: a factor outside [0.5, 2].
    """
    if not 0.5 <= factor <= 2:
        raise ValueError(f"factor must lie in [0.5, 2], got {factor}")
    ratio = Fraction(factor).limit_denominator(100)
    return resample(waveform, ratio.numerator, ratio.denominator)


def random_gain(waveforms: Tensor, low_db: float, high_db: float, generator: Generator | None = None) -> Tensor:
    """Scale each waveform of (..., samples) by its own gain, uniform in decibels on [low_db, high_db].

    Raises:
        ValueError: low_db above high_db.
    """
    decibels = _uniform(waveforms.shape[:-1], low_db, high_db, "db", generator)
    gains = torch.pow(10.0, decibels / 20).to(waveforms)
    return waveforms * gains[..., None]


def add_noise(
    waveforms: Tensor, lengths: Tensor, low_snr_db: float, high_snr_db: float, generator: Generator | None = None
) -> Tensor:
    """Add white Gaussian noise at a signal-to-noise ratio uniform in decibels on [low_snr_db, high_snr_db].

    Args:
        waveforms: (B, samples) floating point.
        lengths: (B,) integers; signal power is measured, and noise added, within each length.
        low_snr_db, high_snr_db: range of the ratio.
        generator: CPU generator.

    Raises:
        ValueError: low_snr_db above high_snr_db, or shapes that do not match.
    """
    if waveforms.dim() != 2 or lengths.shape != waveforms.shape[:1]:
        raise ValueError(
            f"waveforms must be (B, samples) and lengths (B,), got {tuple(waveforms.shape)} and {tuple(lengths.shape)}"
        )
    snr = _uniform(waveforms.shape[:1], low_snr_db, high_snr_db, "snr_db", generator).to(waveforms)
    noise = torch.randn(waveforms.shape, generator=generator).to(waveforms)
    lengths = lengths.to(waveforms.device)
    valid = torch.arange(waveforms.shape[1], device=waveforms.device) < lengths[:, None]
    power = (waveforms * valid).square().sum(1) / lengths.clamp(min=1)
    deviation = (power * torch.pow(10.0, -snr / 10)).sqrt()
    return waveforms + noise * valid * deviation[:, None]


def _uniform(shape: torch.Size, low: float, high: float, name: str, generator: Generator | None) -> Tensor:
    if low > high:
        raise ValueError(f"low_{name} must not exceed high_{name}, got {low} and {high}")
    return low + (high - low) * torch.rand(shape, generator=generator)
