import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.speech.datasets import an4
from gq_triton.speech.features import FFT_SIZE, HOP, WINDOW, LogMel, LogMelState


def reference(wave, n_mels=80, f_min=20.0, f_max=8000.0):
    """The definition, frame by frame and filter by filter, in float64, with a plain Fourier sum."""
    wave = wave.double()
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * torch.arange(WINDOW, dtype=torch.float64) / WINDOW)
    angles = -2 * torch.pi * torch.outer(torch.arange(257), torch.arange(WINDOW)).double() / FFT_SIZE
    mel = lambda f: 2595 * torch.log10(1 + torch.as_tensor(f, dtype=torch.float64) / 700)  # noqa: E731
    step = (mel(f_max) - mel(f_min)) / (n_mels + 1)
    distance = (mel(torch.arange(257) * 31.25)[None] - (mel(f_min) + step * torch.arange(1, n_mels + 1)[:, None])).abs()
    filters = (1 - distance / step).clamp(min=0)
    rows = []
    for start in range(0, len(wave) - WINDOW + 1, HOP):
        frame = wave[start : start + WINDOW] * window
        power = (angles.cos() @ frame) ** 2 + (angles.sin() @ frame) ** 2
        rows.append(torch.log(filters @ power + 1e-6))
    return torch.stack(rows)


def test_features_match_the_definition():
    wave = 0.1 * torch.randn(4000)
    features, lengths = LogMel()(wave[None], torch.tensor([4000]))
    assert features.dtype == torch.float32
    assert lengths.tolist() == [23]
    torch.testing.assert_close(features[0].double(), reference(wave), rtol=0, atol=2e-5)


def test_a_batch_equals_its_recordings_alone_and_padding_is_zero():
    front_end = LogMel(adapt_frames=20)
    waves = torch.randn(3, 3000)
    lengths = torch.tensor([3000, 1111, 399])
    features, frames = front_end(waves, lengths)
    assert frames.tolist() == [17, 5, 0]
    for row, n, t in zip(range(3), lengths.tolist(), frames.tolist(), strict=True):
        alone, _ = front_end(waves[row : row + 1, :n], lengths[row : row + 1])
        torch.testing.assert_close(features[row, :t], alone[0], rtol=0, atol=1e-5)
        assert not features[row, t:].any()


def test_a_recording_shorter_than_a_window_has_no_frame():
    features, lengths = LogMel()(torch.rand(2, 100), torch.tensor([100, 0]))
    assert features.shape == (2, 0, 80)
    assert lengths.tolist() == [0, 0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=12),
    st.integers(1, 3),
    st.sampled_from([None, 1, 30]),
    st.integers(0, 2**31),
)
def test_streamed_chunks_join_to_the_offline_features(chunks, batch, adapt_frames, seed):
    """Each chunk, of so many frames, begins a hop after the start of the previous one's last frame."""
    torch.manual_seed(seed)
    front_end = LogMel(adapt_frames=adapt_frames).fit([torch.randn(2000)])
    wave = torch.randn(batch, sum(chunks) * HOP + WINDOW - HOP)
    offline, _ = front_end(wave, torch.full((batch,), wave.shape[1]))
    state, start, parts = front_end.initial_state(batch), 0, [offline[:, :0]]
    for frames in chunks:
        features, state = front_end.stream(wave[:, start : start + frames * HOP + WINDOW - HOP], state)
        parts.append(features)
        start += frames * HOP
    torch.testing.assert_close(torch.cat(parts, dim=1), offline, rtol=0, atol=1e-5)


def test_states_of_streams_are_joined_and_split():
    front_end = LogMel(adapt_frames=5)
    waves = torch.randn(3, 2000)
    states = [
        front_end.stream(waves[row : row + 1, : 500 * (row + 1)], front_end.initial_state())[1] for row in range(3)
    ]
    joined = LogMelState.join(states)
    assert joined.seen.tolist() == [[1], [4], [7]]
    features, after = front_end.stream(waves, joined)
    for row, (state, found) in enumerate(zip(states, after.split(), strict=True)):
        expected, expected_state = front_end.stream(waves[row : row + 1], state)
        torch.testing.assert_close(features[row : row + 1], expected)
        torch.testing.assert_close(found, expected_state)


@pytest.mark.parametrize("adapt_frames", [None, 50])
def test_no_feature_depends_on_the_future(adapt_frames):
    front_end = LogMel(adapt_frames=adapt_frames)
    wave = torch.randn(1, 4000)
    changed = wave.clone()
    changed[:, 2000:] = 0
    before, after = (front_end(w, torch.tensor([4000]))[0] for w in (wave, changed))
    known = (2000 - WINDOW) // HOP + 1
    assert torch.equal(before[:, :known], after[:, :known])
    assert not torch.equal(before[:, known], after[:, known])


def test_fit_gives_zero_mean_and_unit_deviation():
    waves = [0.1 * torch.randn(n) * torch.rand(1) for n in (5000, 300, 9000)]
    front_end = LogMel().fit(waves)
    frames = torch.cat([front_end(w[None], torch.tensor([len(w)]))[0][0] for w in waves])
    torch.testing.assert_close(frames.mean(0), torch.zeros(80), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames.std(0, correction=0), torch.ones(80), rtol=0, atol=1e-4)


def test_adaptation_removes_a_constant_gain():
    front_end = LogMel(adapt_frames=10)
    wave = 0.1 * torch.randn(1, 160000)
    quiet, loud = (front_end(gain * wave, torch.tensor([160000]))[0] for gain in (0.3, 1.0))
    torch.testing.assert_close(quiet[:, -100:], loud[:, -100:], rtol=0, atol=0.05)


def test_digital_silence_is_finite():
    features, _ = LogMel()(torch.zeros(1, 1000), torch.tensor([1000]))
    assert torch.isfinite(features).all()


def test_autocast_leaves_features_alone():
    wave = torch.randn(1, 2000)
    front_end = LogMel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, _ = front_end(wave, torch.tensor([2000]))
    assert torch.equal(features, front_end(wave, torch.tensor([2000]))[0])


def test_settings_and_statistics_are_restored():
    front_end = LogMel(n_mels=40, f_min=60.0, adapt_frames=7).fit([torch.randn(3000)])
    restored = LogMel.from_dict(json.loads(json.dumps(front_end.to_dict())))
    restored.load_state_dict(front_end.state_dict())
    wave = torch.randn(1, 3000)
    assert torch.equal(front_end(wave, torch.tensor([3000]))[0], restored(wave, torch.tensor([3000]))[0])


def test_features_on_every_device(device):
    wave, lengths = torch.randn(2, 3000), torch.tensor([3000, 1000])
    expected, _ = LogMel()(wave, lengths)
    features, frames = LogMel().to(device)(wave.to(device), lengths)
    assert features.device.type == frames.device.type == device.type
    torch.testing.assert_close(features.cpu(), expected, rtol=0, atol=1e-3)


def test_recorded_speech_is_neither_silent_nor_flat(an4_root):
    utterances = an4(an4_root, "test")[:5]
    front_end = LogMel().fit(u.load() for u in utterances)
    assert (front_end.std > 0.5).all()
    assert (front_end.mean > torch.log(torch.tensor(1e-6)) + 1).all()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"n_mels": 0}, "n_mels"),
        ({"n_mels": 258}, "n_mels"),
        ({"f_max": 9000.0}, "f_max"),
        ({"adapt_frames": 0}, "adapt"),
    ],
)
def test_bad_settings(arguments, name):
    with pytest.raises(ValueError, match=name):
        LogMel(**arguments)


@pytest.mark.parametrize(
    ("wave", "lengths", "name"),
    [
        (torch.rand(500), torch.tensor([500]), "waveforms"),
        (torch.ones(1, 500, dtype=torch.int16), torch.tensor([500]), "waveforms"),
        (torch.rand(2, 500), torch.tensor([500]), "lengths"),
        (torch.rand(1, 500), torch.tensor([500.0]), "lengths"),
        (torch.rand(1, 500), torch.tensor([501]), "lengths"),
        (torch.rand(1, 500), torch.tensor([-1]), "lengths"),
    ],
)
def test_bad_batches(wave, lengths, name):
    with pytest.raises(ValueError, match=name):
        LogMel()(wave, lengths)


def test_bad_statistics():
    with pytest.raises(ValueError, match="0 frames"):
        LogMel().fit([torch.rand(399)])


@pytest.mark.parametrize("adapt_frames", [None, 20])
def test_the_tail_is_appended_silence(adapt_frames):
    waveform = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0)) / 10
    plain, padded = (LogMel(adapt_frames=adapt_frames, tail_ms=tail) for tail in (0, 300))
    silent = torch.cat([waveform, torch.zeros(2, 4800)], 1)
    expected, lengths = plain(silent, torch.tensor([13800, 13800]))
    features, found = padded(waveform, torch.tensor([9000, 9000]))
    assert torch.equal(features, expected) and torch.equal(found, lengths)


def test_the_tail_is_silent_where_the_padding_is_not():
    front_end = LogMel(tail_ms=100)
    waveforms = torch.randn(2, 8000, generator=torch.Generator().manual_seed(1))
    features, lengths = front_end(waveforms, torch.tensor([8000, 5000]))
    alone, _ = front_end(waveforms[1:, :5000], torch.tensor([5000]))
    torch.testing.assert_close(features[1, : lengths[1]], alone[0])


def test_a_negative_tail_is_refused():
    with pytest.raises(ValueError, match="tail_ms must be an integer and lie in 0..60000, got -1"):
        LogMel(tail_ms=-1)
