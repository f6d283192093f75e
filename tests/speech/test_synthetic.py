import json
import subprocess
import sys

import pytest
import torch

from gq_triton.speech import synthetic
from gq_triton.speech.synthetic import (
    COUNTS,
    VARIANTS,
    Request,
    command_requests,
    speak,
    spoken_commands,
    spoken_transcripts,
    synthesize,
)

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")


def same(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_sentence_is_spoken():
    wave = synthesize("turn on the kitchen light")
    assert wave.dtype == torch.float32
    assert 0.8 < len(wave) / 16000 < 2.5
    assert 0.1 < wave.abs().max() <= 1


def test_a_text_without_a_word_is_silent():
    waves = speak([Request("..."), Request("yes")])
    assert len(waves[0]) < len(waves[1])
    assert not waves[0].any()


def test_rate_pitch_and_voice_matter():
    slow, fast = (synthesize("hello there", rate=rate) for rate in (120, 240))
    assert len(slow) > 1.3 * len(fast)
    plain = synthesize("hello there")
    for other in (synthesize("hello there", pitch=80), synthesize("hello there", "en-gb-scotland+f4")):
        assert not same([plain], [other])


def test_the_same_requests_give_the_same_samples():
    # Breathy voices draw noise; others carry state from one sentence to the next.
    requests = [Request("turn off the fan", f"en-us+{variant}") for variant in ("f3", "victor", "m3", "sandro") * 2]
    assert same(speak(requests), speak(requests))


def test_every_voice_speaks():
    requests = [Request("four", accent) for accent in synthetic.ACCENTS]
    requests += [Request("four", f"en-us+{variant}") for variants in VARIANTS.values() for variant in variants]
    waves = speak(requests)
    assert all(0.15 < len(wave) / 16000 < 1.5 and wave.square().mean() > 1e-4 for wave in waves)
    assert len({tuple(wave[:4000].tolist()) for wave in waves}) == len(waves), "two voices sound the same"


def test_splits_share_no_voice():
    seen = {split: {request.voice for request in command_requests(split, 200)} for split in VARIANTS}
    variants = {split: {voice.partition("+")[2] for voice in voices} for split, voices in seen.items()}
    assert all(variants[split] <= set(VARIANTS[split]) for split in VARIANTS)
    assert not set(VARIANTS["train"]) & set(VARIANTS["valid"])
    assert not set(VARIANTS["train"] + VARIANTS["valid"]) & set(VARIANTS["test"])


def test_sentences_vary_and_words_are_few():
    train = {request.text for request in command_requests("train", COUNTS["train"])}
    test = [request.text for request in command_requests("test", COUNTS["test"])]
    assert len(train) > 900
    assert sum(text not in train for text in test) > 0.25 * len(test)
    words = {word for text in train for word in text.split()}
    assert len(words) == 27
    assert {word for text in test for word in text.split()} <= words


def test_commands_are_reproducible_cached_and_seeded(tmp_path, monkeypatch):
    first = spoken_commands("test", 12, seed=5, cache_dir=tmp_path / "a")
    again = spoken_commands("test", 12, seed=5, cache_dir=tmp_path / "b")
    assert same([u.audio for u in first], [u.audio for u in again])
    assert [(u.id, u.text, u.speaker, u.duration) for u in first] == [
        (u.id, u.text, u.speaker, u.duration) for u in again
    ]
    fewer = spoken_commands("test", 4, seed=5, cache_dir=tmp_path / "a")
    assert same([u.audio for u in fewer], [u.audio for u in first[:4]])
    other = spoken_commands("test", 12, seed=6, cache_dir=tmp_path / "a")
    assert [u.text for u in other] != [u.text for u in first]

    monkeypatch.setattr(synthetic, "speak", lambda requests: pytest.fail("the cache was not used"))
    cached = spoken_commands("test", 12, seed=5, cache_dir=tmp_path / "a")
    assert same([u.audio for u in first], [u.audio for u in cached])
    assert not [path for path in (tmp_path / "a").iterdir() if path.suffix != ".safetensors"]


def test_a_damaged_cache_is_made_again(tmp_path):
    first = spoken_commands("valid", 3, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    assert same([u.audio for u in first], [u.audio for u in spoken_commands("valid", 3, cache_dir=tmp_path)])


def test_recordings_are_short_audible_and_in_16_bit_steps(tmp_path):
    for utterance in spoken_commands("train", 20, cache_dir=tmp_path):
        assert 0.5 < utterance.duration < 4
        assert utterance.duration == len(utterance.audio) / 16000
        assert 0.03 < utterance.audio.abs().max() < 1
        assert torch.equal(utterance.audio * 32768, (utterance.audio * 32768).round())


def test_transcripts_are_spoken_whole_and_in_pieces_by_many_voices():
    transcripts = ["A B C", "ENTER SIX TWO", "GO"]
    spoken = spoken_transcripts(transcripts, 60, seed=2)
    whole = [utterance.text in transcripts for utterance in spoken]
    assert 0.3 < sum(whole) / len(whole) < 0.8
    words = {word for text in transcripts for word in text.split()}
    assert {word for utterance in spoken for word in utterance.text.split()} == words
    assert len({utterance.speaker for utterance in spoken}) > 40
    assert all(len(utterance.audio) == utterance.duration * 16000 > 3000 for utterance in spoken)
    again = spoken_transcripts(transcripts, 60, seed=2)
    assert same([u.audio for u in spoken[:8]], [u.audio for u in again[:8]])
    assert [u.text for u in spoken_transcripts(transcripts, 60, seed=3)] != [u.text for u in spoken]


def test_a_letter_is_spoken_by_its_name():
    request = synthetic._pronounced("A TWO B")
    assert request == "a. two b."


@pytest.mark.parametrize("transcripts, count", [([], 3), ([" "], 3), (["GO"], 0)])
def test_nothing_to_speak_is_an_error(transcripts, count):
    with pytest.raises(ValueError, match=f"count is {count}; at least one of each is needed"):
        spoken_transcripts(transcripts, count)


def test_the_default_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoken_commands("valid", 1)
    assert list((tmp_path / "gq_triton").glob("spoken-commands-valid-*.safetensors"))


def test_the_program_needs_no_package():
    from gq_triton.speech import espeak

    loader = synthetic.require("espeakng_loader")
    done = subprocess.run(
        [sys.executable, "-I", "-S", espeak.__file__, loader.get_library_path(), loader.get_data_path()],
        input=json.dumps([{"text": "one", "voice": "en-us", "rate": 175, "pitch": 50}]).encode(),
        capture_output=True,
        check=True,
    )
    assert int.from_bytes(done.stdout[:4], "little") == 22050
    assert int.from_bytes(done.stdout[4:8], "little") * 2 == len(done.stdout) - 8


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"text": " "}, "text"),
        ({"rate": 20}, "rate"),
        ({"pitch": 100}, "pitch"),
        ({"voice": "en-us+nobody"}, "no variant 'nobody'"),
    ],
)
def test_bad_requests(arguments, name):
    with pytest.raises(ValueError, match=name):
        synthesize(**{"text": "hi", **arguments})


def test_an_unknown_voice_is_an_error():
    with pytest.raises(ValueError, match="no voice 'xx-none'"):
        synthesize("hi", "xx-none")


def test_bad_splits():
    with pytest.raises(ValueError, match="split"):
        spoken_commands("dev")
    with pytest.raises(ValueError, match="count"):
        spoken_commands("test", 0)
