import json

import pytest
import torch

from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import Utterance, an4, librispeech, manifest, speaker_split


def write_audio(path, seconds=0.1):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_audio(path, torch.zeros(int(16000 * seconds)))


def small_an4(root, transcription="<s> YES </s> (an1-fa-b)\n<s> GO NOW </s> (cen2-mb-b)\n"):
    (root / "etc").mkdir(parents=True)
    (root / "etc/an4_train.fileids").write_text("an4_clstk/fa/an1-fa-b\nan4_clstk/mb/cen2-mb-b\n")
    (root / "etc/an4_train.transcription").write_text(transcription)
    write_audio(root / "wav/an4_clstk/fa/an1-fa-b.wav", 0.5)
    write_audio(root / "wav/an4_clstk/mb/cen2-mb-b.flac")
    return root


def small_librispeech(root, line="12-34-0000 HELLO  WORLD\n"):
    chapter = root / "dev-clean/12/34"
    write_audio(chapter / "12-34-0000.flac", 0.2)
    (chapter / "12-34.trans.txt").write_text(line)
    return root


def test_an4_layout(tmp_path):
    first, second = an4(small_an4(tmp_path))
    assert (first.id, first.text, first.speaker, first.duration) == ("an1-fa-b", "YES", "fa", 0.5)
    assert (second.id, second.text, second.speaker) == ("cen2-mb-b", "GO NOW", "mb")
    assert first.load().shape == (8000,)
    assert first.load(8000).shape == (4000,)


def test_an4_transcripts_without_sentence_marks(tmp_path):
    root = small_an4(tmp_path, "YES (an1-fa-b)\nGO NOW (cen2-mb-b)\n")
    assert [u.text for u in an4(root)] == ["YES", "GO NOW"]


def test_an4_errors(tmp_path):
    root = small_an4(tmp_path / "a")
    with pytest.raises(ValueError, match="split"):
        an4(root, "dev")
    with pytest.raises(FileNotFoundError, match=r"an4_test\.transcription"):
        an4(root, "test")
    (root / "wav/an4_clstk/fa/an1-fa-b.wav").unlink()
    with pytest.raises(FileNotFoundError, match="an1-fa-b"):
        an4(root)
    with pytest.raises(ValueError, match=r"'cen2-mb-b' has no transcript"):
        an4(small_an4(tmp_path / "b", "<s> YES </s> (an1-fa-b)\n"))
    with pytest.raises(ValueError, match="got 'YES'"):
        an4(small_an4(tmp_path / "c", "YES\n"))


def test_librispeech_layout(tmp_path):
    small_librispeech(tmp_path / "LibriSpeech")
    for root in (tmp_path, tmp_path / "LibriSpeech"):
        (utterance,) = librispeech(root, "dev-clean")
        assert (utterance.id, utterance.text, utterance.speaker) == ("12-34-0000", "HELLO WORLD", "12")
        assert utterance.duration == pytest.approx(0.2)


def test_librispeech_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="dev-clean"):
        librispeech(tmp_path, "dev-clean")
    (tmp_path / "test-clean").mkdir()
    with pytest.raises(FileNotFoundError, match="no transcripts"):
        librispeech(tmp_path, "test-clean")
    with pytest.raises(ValueError, match="ID TRANSCRIPT"):
        librispeech(small_librispeech(tmp_path / "a", "12-34-0000\n"), "dev-clean")
    with pytest.raises(FileNotFoundError, match="12-34-0001"):
        librispeech(small_librispeech(tmp_path / "b", "12-34-0001 HI\n"), "dev-clean")


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_manifest(tmp_path, suffix):
    write_audio(tmp_path / "audio/a.wav")
    write_audio(tmp_path / "b.flac")
    rows = [
        {"audio": "audio/a.wav", "text": 'say "hi" ', "speaker": "s1", "id": "one"},
        {"audio": str(tmp_path / "b.flac"), "text": "bye", "speaker": "", "id": ""},
    ]
    path = tmp_path / f"list{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        path.write_text("\n".join("\t".join(values) for values in [rows[0].keys(), *(r.values() for r in rows)]))
    first, second = manifest(path)
    assert (first.id, first.text, first.speaker) == ("one", 'say "hi"', "s1")
    assert (second.id, second.text, second.speaker) == (str(tmp_path / "b.flac"), "bye", "")
    assert second.load().shape == (1600,)


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("m.csv", "", ValueError, "tsv or .jsonl"),
        ("m.tsv", "audio\ttext\n", ValueError, "no recordings"),
        ("m.tsv", "audio\twords\na.wav\thi\n", ValueError, "line 2: 'text'"),
        ("m.tsv", "audio\ttext\na.wav\n", ValueError, "line 2: 'text'"),
        ("m.tsv", "audio\ttext\nno.wav\thi\n", FileNotFoundError, "line 2: no audio file"),
        ("m.tsv", "audio\ttext\na.wav\thi\na.wav\thi\n", ValueError, "line 3: id 'a.wav' is used twice"),
        ("m.jsonl", '{"audio": "a.wav"\n', ValueError, "line 1: not JSON"),
        ("m.jsonl", "[1]\n", ValueError, "line 1: expected a JSON object"),
        ("m.jsonl", '\n{"audio": "a.wav", "text": 3}\n', ValueError, "line 2: 'text'"),
        ("m.tsv", "audio\ttext\n" + "x" * 200_000 + "\n", ValueError, "line 2: 'text'"),
        ("m.tsv", "\naudio\ttext\n", ValueError, "line 2: 'audio'"),
        ("m.tsv", "audio\ttext\n\nempty.wav\thi\n", ValueError, r"line 3: .*empty\.wav holds no sound"),
        ("m.tsv", b"audio\ttext\na.wav\tgr\xfcn\n", ValueError, r"m\.tsv is not UTF-8 text"),
        ("m.jsonl", b"\xff", ValueError, r"m\.jsonl is not UTF-8 text"),
    ],
)
def test_bad_manifests(tmp_path, name, content, error, text):
    write_audio(tmp_path / "a.wav")
    write_audio(tmp_path / "empty.wav", 0)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=text):
        manifest(tmp_path / name)


@pytest.mark.parametrize("content", ["audio\ttext\r\na.wav\thi\r\n", '{"audio": "a.wav", "text": "hi"}\r\n'])
def test_manifests_of_other_systems(tmp_path, content):
    write_audio(tmp_path / "a.wav")
    path = tmp_path / ("m.jsonl" if content.startswith("{") else "m.tsv")
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [u.text for u in manifest(path)] == ["hi"]


def test_what_json_allows_in_a_line_does_not_end_it(tmp_path):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "one\u2028two"}\n', encoding="utf-8")
    assert [u.text for u in manifest(tmp_path / "m.jsonl")] == ["one two"]


def test_speakers_and_ids_may_be_numbers(tmp_path):
    write_audio(tmp_path / "a.wav")
    (tmp_path / "m.jsonl").write_text('{"audio": "a.wav", "text": "hi", "speaker": 0, "id": 0}\n')
    (utterance,) = manifest(tmp_path / "m.jsonl")
    assert (utterance.speaker, utterance.id) == ("0", "0")


def test_missing_manifest(tmp_path):
    with pytest.raises(FileNotFoundError):
        manifest(tmp_path / "m.tsv")


def utterances(speakers):
    return [Utterance(str(i), torch.zeros(160), "hi", speaker, 0.01) for i, speaker in enumerate(speakers)]


@pytest.mark.parametrize("fraction", [0.001, 0.25, 0.999])
def test_speaker_split_is_disjoint_complete_and_seeded(fraction):
    everything = utterances("abcdefgh" * 3)
    kept, held = speaker_split(everything, fraction, seed=1)
    assert not {u.speaker for u in kept} & {u.speaker for u in held}
    assert sorted(kept + held, key=lambda u: int(u.id)) == everything
    assert len({u.speaker for u in held}) == {0.001: 1, 0.25: 2, 0.999: 7}[fraction]
    assert speaker_split(everything, fraction, seed=1) == (kept, held)
    assert len({frozenset(u.speaker for u in speaker_split(everything, fraction, s)[1]) for s in range(9)}) > 1


def test_bad_speaker_splits():
    with pytest.raises(ValueError, match="fraction"):
        speaker_split(utterances("ab"), 1.0)
    with pytest.raises(ValueError, match="2 speakers"):
        speaker_split(utterances("aa"), 0.5)


def test_a_waveform_may_stand_for_a_file():
    utterance = Utterance("x", torch.rand(1600), "hi", "s", 0.1)
    assert torch.equal(utterance.load(), utterance.audio)
    assert utterance.load(8000).shape == (800,)


def test_recorded_an4(an4_root):
    train, test = an4(an4_root, "train"), an4(an4_root, "test")
    assert (len(train), len({u.speaker for u in train})) == (948, 74)
    assert (len(test), len({u.speaker for u in test})) == (130, 10)
    assert sum(len(u.text.split()) for u in test) == 773
    assert not {u.speaker for u in train} & {u.speaker for u in test}
    assert len(test[0].load()) == round(16000 * test[0].duration)


def test_recorded_librispeech(librispeech_root):
    recordings = librispeech(librispeech_root, "train-clean-100")
    assert (len(recordings), len({u.speaker for u in recordings})) == (250, 250)
    assert recordings[0].load().abs().max() > 0.01
