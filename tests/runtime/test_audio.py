import struct
import wave

import numpy as np
import pytest
from malformed import may_be_refused

from gq_triton.runtime.audio import read_wav


def write(path, data, width=2, channels=1, rate=16000):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_the_range_of_every_width_is_minus_one_to_one(width, tmp_path):
    full = 1 << (8 * width - 1)
    values = [-full, -full // 2, 0, full // 2, full - 1]
    data = b"".join(
        (value + 128).to_bytes(1, "little") if width == 1 else value.to_bytes(width, "little", signed=True)
        for value in values
    )
    samples = read_wav(write(tmp_path / "a.wav", data, width))
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, [-1, -0.5, 0, 0.5, 1 - 1 / full], rtol=0, atol=1e-7)


def test_it_reads_what_soundfile_reads(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    noise = np.random.default_rng(0).uniform(-1, 1, (777, 2))
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32"):
        soundfile.write(tmp_path / "a.wav", noise, 16000, subtype=subtype, format="WAV")
        expected = soundfile.read(tmp_path / "a.wav", dtype="float32")[0].mean(1)
        np.testing.assert_allclose(read_wav(tmp_path / "a.wav"), expected, rtol=0, atol=1e-7)


def test_channels_are_averaged(tmp_path):
    data = struct.pack("<4h", 16384, -16384, 16384, 0)
    np.testing.assert_array_equal(read_wav(write(tmp_path / "a.wav", data, channels=2)), [0.0, 0.25])


def test_no_samples_are_an_empty_array(tmp_path):
    assert read_wav(write(tmp_path / "a.wav", b"")).shape == (0,)


def test_another_rate_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"a\.wav has 8000 samples a second and 16000 are needed: resample .*ffmpeg"):
        read_wav(write(tmp_path / "a.wav", b"\0\0", rate=8000))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_wav(tmp_path / "nowhere.wav")
    for content in (b"", b"RIFF", b"fLaC" + bytes(100)):
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.wav is not a WAV file of PCM samples"):
            read_wav(tmp_path / "a.wav")


def test_floating_point_files_are_refused(tmp_path):
    content = bytearray(write(tmp_path / "a.wav", bytes(64), width=4).read_bytes())
    content[20:22] = struct.pack("<H", 3)
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(ValueError, match="not a WAV file of PCM samples"):
        read_wav(tmp_path / "a.wav")


def test_damaged_headers_neither_crash_nor_take_memory(tmp_path):
    content = write(tmp_path / "a.wav", struct.pack("<8h", *range(8))).read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(content)
        for place in draw.integers(0, 44, draw.integers(1, 4)):
            damaged[place] = draw.choice([0, 1, 2, 127, 255])
        (tmp_path / "a.wav").write_bytes(damaged)
        with may_be_refused(tmp_path / "a.wav"):
            assert len(read_wav(tmp_path / "a.wav")) <= len(content)


def test_a_recording_cut_short_gives_what_is_there(tmp_path):
    content = write(tmp_path / "a.wav", struct.pack("<8h", *range(8))).read_bytes()
    (tmp_path / "a.wav").write_bytes(content[:-3])
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav") * 32768, range(6))
