"""Speech datasets in their own directory layouts, as lists of utterances."""

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from .audio import audio_duration, load_audio, resample

__all__ = ["Utterance", "an4", "librispeech", "manifest", "speaker_split"]

AUDIO_SUFFIXES = (".flac", ".wav", ".sph")
SAMPLE_RATE = 16000


@dataclass(frozen=True, eq=False)
class Utterance:
    """One recording and what was said in it.

    Attributes:
        id: unique within its dataset.
        audio: a file, or the waveform itself, float32 (samples,) at 16 kHz.
        text: the transcript.
        speaker: who spoke; "" where unknown.
        duration: seconds.
    """

    id: str
    audio: Path | Tensor
    text: str
    speaker: str
    duration: float

    def load(self, sample_rate: int = SAMPLE_RATE) -> Tensor:
        """The waveform, float32 (samples,)."""
        if isinstance(self.audio, Tensor):
            return resample(self.audio, SAMPLE_RATE, sample_rate)
        return load_audio(self.audio, sample_rate)


def an4(root: str | PathLike[str], split: str = "train") -> list[Utterance]:
    """CMU AN4 (census data: names, numbers, spelled words).

    Args:
        root: the folder with ``etc/an4_train.fileids``, ``etc/an4_train.transcription`` and ``wav/``. Audio may be
            .sph as published, .wav or .flac.
        split: "train" (948 utterances, 74 speakers) or "test" (130 utterances, 10 speakers).

    Raises:
        FileNotFoundError: a list or an audio file is missing.
        ValueError: an unknown split, a malformed transcript, or an utterance without one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = Path(root)
    texts = dict(_an4_transcripts(_file(root / "etc" / f"an4_{split}.transcription")))
    utterances = []
    for line in _lines(_file(root / "etc" / f"an4_{split}.fileids")):
        stem = root / "wav" / line
        audio = _audio_file(stem)
        utterances.append(_utterance(stem.name, audio, _transcript(texts, stem.name), stem.parent.name))
    return utterances


def librispeech(root: str | PathLike[str], split: str, *, progress: bool = False) -> list[Utterance]:
    """LibriSpeech (Panayotov et al. 2015): ``split/speaker/chapter/speaker-chapter-number.flac``.

    Args:
        root: the folder that holds the split's folder, or one level above (holding ``LibriSpeech/``).
        split: "train-clean-100", "dev-clean", "test-other", ...
        progress: show a progress bar: every file is opened to read its duration, a fraction of a millisecond each from
            memory and more from a disk, minutes for the largest parts.

    Raises:
        FileNotFoundError: no such split, no transcripts in it, or an audio file is missing.
        ValueError: a malformed transcript line.
    """
    folder = _librispeech_folder(Path(root), split)
    utterances = []
    chapters = sorted(folder.glob("*/*/*.trans.txt"))
    for transcripts in tqdm(chapters, desc=split, unit="chapter", leave=False, disable=not progress):
        for line in _lines(transcripts):
            name, _, text = line.partition(" ")
            if not text.strip():
                raise ValueError(f"{transcripts}: expected 'ID TRANSCRIPT', got {line!r}")
            audio = _audio_file(transcripts.parent / name)
            utterances.append(_utterance(name, audio, text, transcripts.parent.parent.name))
    if not utterances:
        raise FileNotFoundError(f"root: no transcripts (SPEAKER/CHAPTER/*.trans.txt) under {folder}")
    return utterances


def manifest(path: str | PathLike[str]) -> list[Utterance]:
    """A list of one's own recordings.

    Args:
        path: a ``.tsv`` file with a header line, or a ``.jsonl`` file with one object a line. Columns or keys:
            ``audio`` (a path, relative to the manifest's folder or absolute) and ``text``; optionally ``speaker``
            (default "") and ``id`` (default: the audio path as written).

    Raises:
        FileNotFoundError: the manifest or an audio file is missing.
        ValueError: another extension, a malformed line, a missing column, an id used twice, or audio without samples.
    """
    path = _file(Path(path))
    rows = list(_manifest_rows(path))
    utterances: dict[str, Utterance] = {}
    for number, row in rows:
        utterance = _manifest_utterance(path, number, row)
        if utterance.id in utterances:
            raise ValueError(f"{path}, line {number}: id {utterance.id!r} is used twice")
        utterances[utterance.id] = utterance
    if not utterances:
        raise ValueError(f"{path} lists no recordings")
    return list(utterances.values())


def speaker_split(
    utterances: Sequence[Utterance], fraction: float, seed: int = 0
) -> tuple[list[Utterance], list[Utterance]]:
    """Hold out a share of the speakers.

    Args:
        utterances: what to divide; at least two speakers.
        fraction: share of the *speakers* to hold out, in (0, 1); at least one is held out and one kept.
        seed: chooses which.

    Returns:
        (kept, held out), each in the given order, without a common speaker.

    Raises:
        ValueError: a fraction out of range or fewer than two speakers.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    speakers = sorted({utterance.speaker for utterance in utterances})
    if len(speakers) < 2:
        raise ValueError(f"utterances must have at least 2 speakers, got {len(speakers)}")
    random.Random(seed).shuffle(speakers)
    count = min(max(round(len(speakers) * fraction), 1), len(speakers) - 1)
    held = set(speakers[:count])
    kept = [utterance for utterance in utterances if utterance.speaker not in held]
    return kept, [utterance for utterance in utterances if utterance.speaker in held]


def _utterance(name: str, audio: Path, text: str, speaker: str) -> Utterance:
    return Utterance(name, audio, " ".join(text.split()), speaker, audio_duration(audio))


def _an4_transcripts(path: Path) -> Iterator[tuple[str, str]]:
    for line in _lines(path):
        match = re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\(([^()\s]+)\)", line)
        if match is None:
            raise ValueError(f"{path}: expected '<s> TRANSCRIPT </s> (ID)', got {line!r}")
        yield match[2], match[1]


def _transcript(texts: dict[str, str], name: str) -> str:
    if name not in texts:
        raise ValueError(f"utterance {name!r} has no transcript")
    return texts[name]


def _librispeech_folder(root: Path, split: str) -> Path:
    for folder in (root / split, root / "LibriSpeech" / split):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"root: no folder {split!r} or 'LibriSpeech/{split}' in {root}")


def _manifest_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if path.suffix == ".jsonl":
        return _jsonl_rows(path)
    if path.suffix == ".tsv":
        return _tsv_rows(path)
    raise ValueError(f"path must end in .tsv or .jsonl, got {path.name!r}")


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {line!r}")
        yield number, row


def _tsv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    header, *lines = (line.split("\t") for line in _read(path).split("\n"))
    for number, values in enumerate(lines, start=2):
        if any(values):
            yield number, dict(zip(header, values, strict=False))


def _manifest_utterance(path: Path, number: int, row: dict[str, str]) -> Utterance:
    for column in ("audio", "text"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            raise ValueError(f"{path}, line {number}: {column!r} is missing or empty")
    audio = path.parent / row["audio"]
    if not audio.is_file():
        raise FileNotFoundError(f"{path}, line {number}: no audio file at {audio}")
    utterance = _utterance(_optional(row, "id", row["audio"]), audio, row["text"], _optional(row, "speaker", ""))
    if not utterance.duration:
        raise ValueError(f"{path}, line {number}: {audio} holds no sound")
    return utterance


def _optional(row: dict[str, str], column: str, default: str) -> str:
    value = row.get(column)
    return default if value is None or value == "" else str(value)  # the number 0 is a value


def _audio_file(stem: Path) -> Path:
    for suffix in AUDIO_SUFFIXES:
        # Not with_suffix: a name may itself hold a dot.
        path = stem.parent / (stem.name + suffix)
        if path.is_file():
            return path
    raise FileNotFoundError(f"no audio file {stem} with any of the extensions {', '.join(AUDIO_SUFFIXES)}")


def _file(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    return path


def _lines(path: Path) -> Iterable[str]:
    lines = (line.strip() for line in _read(path).split("\n"))
    return [line for line in lines if line]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
