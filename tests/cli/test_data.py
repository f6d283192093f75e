import tones

from gq_triton.cli import data as commands
from gq_triton.speech.datasets import manifest as read_manifest


def test_a_set_is_described(gq_triton, manifest):
    result = gq_triton.json("data", "show", "--data", "manifest", "--root", manifest)
    spoken = tones.utterances(12)
    assert (result["utterances"], result["speakers"], result["vocabulary"]) == (12, 4, 4)
    assert result["words"] == sum(len(utterance.text.split()) for utterance in spoken)
    assert "12 utterances of 4 speakers" in gq_triton.succeeds("data", "show", "--data", "manifest", "--root", manifest)


def test_recorded_sets_are_described(gq_triton, an4_root, librispeech_root):
    an4 = gq_triton.json("data", "show", "--data", "an4", "--root", an4_root, "--split", "test")
    assert (an4["utterances"], an4["speakers"], an4["words"]) == (130, 10, 773)
    both = gq_triton.json("data", "show", "--data", "an4", "--root", an4_root, "--split", "train", "--split", "test")
    assert (both["utterances"], both["speakers"]) == (1078, 84)
    libri = gq_triton.json("data", "show", "--data", "librispeech", "--root", librispeech_root)
    assert (libri["utterances"], libri["speakers"]) == (250, 250)


def test_commands_are_spoken_to_files(gq_triton, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = gq_triton.json("data", "synthesize", "--root", tmp_path, "--split", "test", "--count", 3)
    spoken = read_manifest(result["manifest"])
    assert len(spoken) == result["utterances"] == 3
    assert all(utterance.duration > 0.5 and utterance.text for utterance in spoken)


def test_only_published_sets_are_fetched(gq_triton, tmp_path):
    assert "'timit'" in gq_triton.fails("data", "download", "timit", "--root", tmp_path)


def test_a_set_that_is_there_is_not_fetched_again(gq_triton, tmp_path):
    (tmp_path / "an4").mkdir()
    assert gq_triton.json("data", "download", "an4", "--root", tmp_path) == {"folder": str(tmp_path / "an4")}


def test_all_parts_of_librispeech_are_fetched(gq_triton, tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(commands, "download", lambda part, root: fetched.append((part, root)))
    result = gq_triton.json("data", "download", "librispeech", "--root", tmp_path)
    assert result == {"folder": str(tmp_path / "LibriSpeech")}
    assert {root for _, root in fetched} == {tmp_path}
    parts = [part for part, _ in fetched]
    assert len(parts) == 7
    assert {"train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "test-other"} <= set(parts)
