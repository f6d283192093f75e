import numpy as np
import pytest
import soundfile
import torch

from gq_triton.speech.audio import audio_duration, load_audio, resample, save_audio


def tone(frequency, rate, seconds=0.5):
    return torch.sin(2 * torch.pi * frequency * torch.arange(int(rate * seconds), dtype=torch.float64) / rate).float()


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_saved_audio_loads_within_half_a_16_bit_step(tmp_path, suffix):
    wave = 0.9 * tone(440, 16000)
    save_audio(tmp_path / f"a{suffix}", wave)
    loaded = load_audio(tmp_path / f"a{suffix}")
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, wave, rtol=0, atol=0.51 / 32768)
    assert audio_duration(tmp_path / f"a{suffix}") == 0.5


def test_nist_sphere_is_read(tmp_path):
    samples = (1000 * tone(300, 16000, 0.1)).round()
    header = b"NIST_1A\n   1024\n"
    fields = {
        "channel_count -i": 1,
        "sample_count -i": len(samples),
        "sample_rate -i": 16000,
        "sample_n_bytes -i": 2,
        "sample_byte_format -s2": "01",
        "sample_sig_bits -i": 16,
        "sample_coding -s3": "pcm",
    }
    header += "".join(f"{name} {value}\n" for name, value in fields.items()).encode() + b"end_head\n"
    (tmp_path / "a.sph").write_bytes(header.ljust(1024) + samples.numpy().astype("<i2").tobytes())
    torch.testing.assert_close(load_audio(tmp_path / "a.sph"), samples / 32768, rtol=0, atol=0)


def test_channels_are_averaged_and_the_rate_converted(tmp_path):
    left, right = tone(500, 22050), tone(900, 22050)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 22050, subtype="FLOAT")
    loaded = load_audio(tmp_path / "a.wav")
    assert loaded.shape == (8000,)
    expected = (tone(500, 16000) + tone(900, 16000)) / 2
    torch.testing.assert_close(loaded[200:-200], expected[200:-200], rtol=0, atol=5e-3)


@pytest.mark.parametrize(("source", "target"), [(8000, 16000), (48000, 16000), (44100, 16000), (11, 10)])
def test_resampled_length(source, target):
    for samples in (1, 7, 1000, 4411):
        assert resample(torch.rand(samples), source, target).shape == (-(-samples * target // source),)


def test_resampling_removes_what_the_lower_rate_cannot_hold():
    assert resample(tone(11000, 32000), 32000, 16000)[200:-200].abs().max() < 1e-2


def test_equal_rates_and_nothing_at_all_are_left_alone():
    wave = torch.rand(10)
    assert resample(wave, 16000, 16000) is wave
    assert resample(torch.zeros(0), 8000, 16000).shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_no_numbers_are_refused(tmp_path, value):
    wave = np.zeros(1000, np.float32)
    wave[500] = value
    soundfile.write(tmp_path / "a.wav", wave, 8000, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"a\.wav holds samples that are NaN or infinite"):
        load_audio(tmp_path / "a.wav")


def test_errors(tmp_path):
    for name in ("text.wav", "text.raw"):
        (tmp_path / name).write_text("not audio")
    for reader in (load_audio, audio_duration):
        with pytest.raises(ValueError, match=r"text\.raw is not readable audio"):
            reader(tmp_path / "text.raw")
        with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
            reader(tmp_path / "missing.wav")
        with pytest.raises(ValueError, match=r"text\.wav is not readable audio"):
            reader(tmp_path / "text.wav")
    with pytest.raises(ValueError, match="from_rate"):
        resample(torch.rand(5), 0, 16000)
    with pytest.raises(ValueError, match="waveform"):
        resample(torch.rand(2, 5), 8000, 16000)
    with pytest.raises(ValueError, match="waveform"):
        save_audio(tmp_path / "a.wav", torch.zeros(5, dtype=torch.int16))
