import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.speech.augment import SpecAugment, add_noise, random_gain, random_spans, speed_perturb


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 4), st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=4))
def test_spans_stay_within_lengths_and_limits(count, rows):
    lengths = torch.tensor([max(row) for row in rows])
    limits = torch.tensor([min(row) for row in rows])
    mask = random_spans(count, limits, lengths, 60, seeded(count))
    assert mask.shape == (len(rows), 60)
    assert (mask.sum(1) <= count * limits).all()
    assert not (mask & (torch.arange(60) >= lengths[:, None])).any()


def test_span_widths_are_uniform():
    rows = 4000
    mask = random_spans(1, torch.full((rows,), 4), torch.full((rows,), 30), 30, seeded())
    shares = torch.bincount(mask.sum(1), minlength=5) / rows
    torch.testing.assert_close(shares, torch.full((5,), 0.2), rtol=0, atol=0.03)
    assert mask.any(0).all(), "every place can be masked"


def test_masks_are_whole_bands_and_the_rest_is_untouched():
    features = torch.rand(3, 40, 20) + 1
    lengths = torch.tensor([40, 30, 10])
    augmented = SpecAugment(2, 5, 2, 0.2)(features, lengths, seeded())
    masked = augmented == 0
    assert torch.equal(augmented[~masked], features[~masked])
    bins, frames = masked.all(dim=1), masked.all(dim=2)
    assert torch.equal(masked, bins[:, None, :] | frames[:, :, None])
    assert masked.any()
    assert (bins.sum(1) <= 10).all()
    assert (frames.sum(1) <= 2 * (0.2 * lengths).long()).all()


def test_a_seed_repeats_and_another_differs():
    features, lengths = torch.rand(4, 50, 80), torch.full((4,), 50)
    augment = SpecAugment()
    first = augment(features, lengths, seeded(1))
    assert torch.equal(first, augment(features, lengths, seeded(1)))
    assert not torch.equal(first, augment(features, lengths, seeded(2)))


def test_the_same_places_are_masked_on_every_device(device):
    features, lengths = torch.rand(4, 50, 80), torch.full((4,), 50)
    augmented = SpecAugment()(features.to(device), lengths.to(device), seeded(1))
    assert torch.equal(augmented.cpu(), SpecAugment()(features, lengths, seeded(1)))


def test_evaluation_and_empty_input_change_nothing():
    features, lengths = torch.rand(2, 30, 80), torch.tensor([30, 30])
    assert torch.equal(SpecAugment().eval()(features, lengths), features)
    assert SpecAugment()(torch.rand(2, 0, 80), torch.tensor([0, 0])).shape == (2, 0, 80)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_changes_length_and_frequency(factor):
    wave = torch.sin(2 * torch.pi * 400 * torch.arange(16000) / 16000)
    fast = speed_perturb(wave, factor)
    assert abs(len(fast) - 16000 / factor) <= 1
    peak = torch.fft.rfft(fast).abs().argmax() * 16000 / len(fast)
    assert abs(peak - 400 * factor) < 1


def test_gain_stays_in_its_range():
    waves = torch.ones(500, 8)
    decibels = 20 * random_gain(waves, -10.0, 5.0, seeded()).log10()
    assert torch.equal(decibels[:, 0], decibels[:, -1])
    assert -10.001 <= decibels.min() < -9
    assert 4 < decibels.max() <= 5.001


@pytest.mark.parametrize("snr", [0.0, 20.0])
def test_noise_has_the_wanted_ratio_within_each_length(snr):
    waves = torch.sin(torch.arange(40000.0)).repeat(2, 1)
    lengths = torch.tensor([40000, 20000])
    noise = add_noise(waves, lengths, snr, snr, seeded()) - waves
    for row, length in enumerate(lengths):
        ratio = waves[row, :length].square().mean() / noise[row, :length].square().mean()
        assert abs(10 * ratio.log10() - snr) < 0.2
    assert not noise[1, 20000:].any()


def test_bad_arguments():
    for arguments, name in (({"freq_masks": -1}, "freq_masks"), ({"time_fraction": 1.5}, "time_fraction")):
        with pytest.raises(ValueError, match=name):
            SpecAugment(**arguments)
    with pytest.raises(ValueError, match="features"):
        SpecAugment()(torch.rand(2, 30, 80), torch.tensor([30]))
    with pytest.raises(ValueError, match="factor"):
        speed_perturb(torch.rand(10), 3.0)
    with pytest.raises(ValueError, match="low_db"):
        random_gain(torch.rand(1, 10), 5.0, -5.0)
    with pytest.raises(ValueError, match="low_snr_db"):
        add_noise(torch.rand(1, 10), torch.tensor([10]), 5.0, -5.0)
    with pytest.raises(ValueError, match="lengths"):
        add_noise(torch.rand(2, 10), torch.tensor([10]), 0.0, 5.0)
