import math

import pytest

from gq_triton.speech.mel import LogMelSettings, mel_filters


@pytest.mark.parametrize("n_mels", [1, 23, 80])
def test_every_filter_hears_something(n_mels):
    filters = mel_filters(n_mels, 20.0, 8000.0)
    assert filters.shape == (257, n_mels)
    assert (filters.sum(0) > 0.1).all()


def test_filters_overlap_to_one_between_the_first_and_the_last_peak():
    filters = mel_filters(23, 20.0, 8000.0)
    inner = slice(filters[:, 0].argmax() + 1, filters[:, -1].argmax())
    assert abs(filters[inner].sum(1) - 1).max() < 1e-6


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(n_mels=0), "n_mels must be an integer and lie in 1..257, got 0"),
        (dict(n_mels=80.0), "n_mels"),
        (dict(n_mels=True), "n_mels"),
        (dict(f_min=-1.0), "f_min and f_max"),
        (dict(f_min=math.nan), "f_min and f_max"),
        (dict(f_min=None), "f_min and f_max .* got None"),
        (dict(f_max=8001.0), "f_min and f_max"),
        (dict(adapt_frames=0), "adapt_frames must be None or an integer of at least 1, got 0"),
        (dict(adapt_frames=2.5), "adapt_frames"),
        (dict(tail_ms=-1), "tail_ms must be an integer and lie in 0..60000, got -1"),
        (dict(tail_ms=10**12), "tail_ms"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        LogMelSettings(**changes)
