import dataclasses

import numpy as np
import pytest
import torch

from gq_triton.runtime.features import LogMel
from gq_triton.speech import features
from gq_triton.speech.mel import HOP, WINDOW


def twins(**settings):
    """The front end in torch and in numpy, with the same statistics."""
    torch.manual_seed(0)
    front_end = features.LogMel(**settings).fit([0.1 * torch.randn(16000)])
    return front_end, LogMel(front_end.settings, front_end.mean.numpy(), front_end.std.numpy())


def speech(seconds=2.0):
    """Noise whose spectrum and loudness change."""
    draw = np.random.default_rng(0)
    time = np.arange(int(16000 * seconds)) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * harmonic * time) / harmonic for harmonic in range(1, 20))
    return (0.05 * voice * np.sin(3 * time) ** 2 + 0.01 * draw.standard_normal(len(time))).astype(np.float32)


@pytest.mark.parametrize("settings", [{}, dict(n_mels=23, f_min=100.0, f_max=7000.0), dict(adapt_frames=30)])
def test_features_are_those_of_torch(settings):
    front_end, runtime = twins(**settings)
    samples = speech()
    expected, _ = front_end(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
    found, _ = runtime.stream(samples, runtime.start())
    assert found.dtype == np.float32
    error = np.abs(found - expected[0].numpy())
    # Where a filter hears far less than its frame holds, float32 spectra are uncertain, torch's as much as these.
    assert np.quantile(error, 0.999) < 1e-5
    assert error.max() < 1e-4


def test_chunks_join_to_the_features_of_the_whole():
    _, runtime = twins(adapt_frames=30)
    samples = speech()
    whole, _ = runtime.stream(samples, runtime.start())
    state, parts, place = runtime.start(), [], 0
    for frames in (1, 7, 24, 24, 24, 24, 24, 24, 24, 100):
        part, state = runtime.stream(samples[place : place + frames * HOP + WINDOW - HOP], state)
        parts.append(part)
        place += frames * HOP
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=2e-6)
    assert state.seen == len(whole)


@pytest.mark.parametrize("samples, frames", [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2)])
def test_less_than_a_window_is_no_frame(samples, frames):
    _, runtime = twins(adapt_frames=5)
    found, state = runtime.stream(np.zeros(samples, np.float32), runtime.start())
    assert found.shape == (frames, 80)
    assert state.seen == frames
    assert np.isfinite(found).all()


def test_settings_are_those_of_the_torch_front_end():
    front_end, runtime = twins(adapt_frames=30, tail_ms=100)
    assert dataclasses.asdict(runtime.settings) == front_end.to_dict()
    assert runtime.settings.tail_samples == front_end.tail_samples == 1600
