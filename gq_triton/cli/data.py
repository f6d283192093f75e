"""`gq-triton data`: fetch, make and look at data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from tqdm import tqdm

from gq_triton.files import write_atomically
from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.download import LIBRISPEECH, RECIPES, download
from gq_triton.speech.synthetic import VARIANTS, spoken_commands

from .datasets import data_options, load_utterances
from .output import emit, json_option

__all__ = ["data"]

COLUMNS = ("audio", "text", "speaker", "id")
DOWNLOADS = {name: (name,) for name in RECIPES} | {"librispeech": tuple(LIBRISPEECH)}
NOTES = [*(f"{name}: {recipe.note}." for name, recipe in RECIPES.items()), "librispeech: all its parts, 61 GB."]
FOLDER = click.option("--root", type=click.Path(path_type=Path), required=True, help="folder to write to")


@click.group()
def data() -> None:
    """Fetch, make and look at data sets."""


@data.command(name="download", epilog=" ".join(NOTES))
@click.argument("name", type=click.Choice(list(DOWNLOADS)))
@FOLDER
@json_option
def download_command(name: str, root: Path, as_json: bool) -> None:
    """Fetch AN4, LibriSpeech or a part of it from its public home, verify it and unpack it into --root."""
    for part in DOWNLOADS[name]:
        download(part, root)
    folder = root / (RECIPES[name].folder if name in RECIPES else "LibriSpeech")
    emit({"folder": str(folder)}, str(folder), as_json)


@data.command()
@FOLDER
@click.option("--split", type=click.Choice(list(VARIANTS)), default="train", show_default=True, help="which voices")
@click.option("--count", type=click.IntRange(min=1), help="utterances [default: 2000, 200 or 300]")
@click.option("--seed", type=int, default=0, show_default=True, help="the same seed gives the same samples")
@json_option
def synthesize(root: Path, split: str, count: int | None, seed: int, as_json: bool) -> None:
    """Write spoken commands as FLAC files and a manifest, SPLIT.tsv."""
    utterances = spoken_commands(split, count, seed=seed)
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    for utterance in tqdm(utterances, desc="writing", unit="utt", leave=False):
        save_audio(folder / f"{utterance.id}.flac", utterance.load())
    manifest = root / f"{split}.tsv"
    lines = ["\t".join(COLUMNS), *(_manifest_line(split, utterance) for utterance in utterances)]
    write_atomically(manifest, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    emit({"manifest": str(manifest), "utterances": len(utterances)}, str(manifest), as_json)


@data.command()
@data_options
@json_option
def show(data: str, root: Path | None, splits: Sequence[str], as_json: bool) -> None:
    """Utterances, speakers, hours and words of a data set; its audio files must be there."""
    utterances = load_utterances(data, root, splits, training=True)
    words = [word for utterance in utterances for word in utterance.text.split()]
    result = {
        "utterances": len(utterances),
        "speakers": len({utterance.speaker for utterance in utterances}),
        "hours": sum(utterance.duration for utterance in utterances) / 3600,
        "words": len(words),
        "vocabulary": len(set(words)),
        "examples": [utterance.text for utterance in utterances[:3]],
    }
    text = (
        f"{result['utterances']} utterances of {result['speakers']} speakers, {result['hours']:.2f} hours, "
        f"{result['words']} words, {result['vocabulary']} different"
    )
    emit(result, "\n".join([text, *(f"  {example}" for example in result["examples"])]), as_json)


def _manifest_line(split: str, utterance: Utterance) -> str:
    return "\t".join((f"{split}/{utterance.id}.flac", utterance.text, utterance.speaker, utterance.id))
