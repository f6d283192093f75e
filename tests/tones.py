"""A language of tones, which a tiny recognizer learns in seconds: every word is a pitch."""

import math
from pathlib import Path

import torch

from gq_triton.models.rnnt import RNNT, RNNTConfig
from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import SAMPLE_RATE, Utterance
from gq_triton.speech.features import LogMel
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import WordTokenizer

PITCHES = {"do": 300.0, "mi": 700.0, "so": 1500.0, "ti": 3200.0}
WORD_SECONDS = 0.24


def utterances(count: int, seed: int = 0) -> list[Utterance]:
    """Two to four words each, by four speakers who differ in loudness."""
    draw = torch.Generator().manual_seed(seed)
    return [_utterance(index, draw) for index in range(count)]


def _utterance(index: int, draw: torch.Generator) -> Utterance:
    length = int(torch.randint(2, 5, (), generator=draw))
    words = [list(PITCHES)[i] for i in torch.randint(len(PITCHES), (length,), generator=draw)]
    time = torch.arange(int(WORD_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    envelope = torch.sin(math.pi * time / WORD_SECONDS)
    tones = torch.cat([envelope * torch.sin(2 * math.pi * PITCHES[word] * time) for word in words])
    wave = 0.1 * (1 + index % 4) * tones + 0.003 * torch.randn(len(tones), generator=draw)
    return Utterance(f"tones-{index:03d}", wave, " ".join(words), f"speaker{index % 4}", len(wave) / SAMPLE_RATE)


def recognizer(spoken: list[Utterance], seed: int = 0, **changes) -> Recognizer:
    """An untrained recognizer of some thousand weights."""
    tokenizer = WordTokenizer(sorted(PITCHES))
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "encoder_layers": 2,
        "encoder_hidden": 24,
        "predictor_embedding": 8,
        "predictor_hidden": 12,
        "joint": 16,
        "dropout": 0.1,
    }
    torch.manual_seed(seed)
    model = RNNT(RNNTConfig(**{**sizes, **changes}))
    return Recognizer(LogMel().fit(utterance.load() for utterance in spoken), tokenizer, model).eval()


def write_manifest(folder: Path, spoken: list[Utterance]) -> Path:
    """Audio files and their manifest; returns the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["audio\ttext\tspeaker"]
    for utterance in spoken:
        save_audio(folder / f"{utterance.id}.flac", utterance.audio)
        lines.append(f"{utterance.id}.flac\t{utterance.text}\t{utterance.speaker}")
    manifest = folder / "manifest.tsv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def write_librispeech(folder: Path, splits: dict[str, list[Utterance]]) -> Path:
    """The same in LibriSpeech's layout, one chapter a speaker; returns the folder."""
    for split, spoken in splits.items():
        for utterance in spoken:
            speaker = utterance.speaker.removeprefix("speaker")
            chapter = folder / split / speaker / "1"
            chapter.mkdir(parents=True, exist_ok=True)
            name = f"{speaker}-1-{utterance.id.removeprefix('tones-')}"
            save_audio(chapter / f"{name}.flac", utterance.audio)
            with open(chapter / f"{speaker}-1.trans.txt", "a") as file:
                file.write(f"{name} {utterance.text.upper()}\n")
    return folder
