"""`gq-triton quickstart`: from nothing to packed recognizers of 1 to 8 bits, in minutes, on a CPU, offline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import click
import torch

import gq_triton as gq
from gq_triton.files import save_json
from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training.data import SpeechSet
from gq_triton.training.evaluation import evaluate
from gq_triton.training.recipes import RECIPES
from gq_triton.training.study import Row, quantize_and_measure, train_from_scratch

from .datasets import data_options, load_utterances
from .figures import plot_error_rates, plot_sizes
from .info import commit, device_name, versions
from .output import emit, json_option, table

__all__ = ["quickstart"]

FILES = ("summary.json", "error_rates.png", "sizes.png")
DEPLOYED = "4 bits"  # the model that transcribes the unheard file


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="quickstart",
    show_default=True,
    help="folder of the results",
)
@click.option("--overwrite", is_flag=True, help="begin anew where the folder holds another run")
@data_options
@json_option
def quickstart(
    output: Path, overwrite: bool, data: str, root: Path | None, splits: Sequence[str], as_json: bool
) -> None:
    """Train a recognizer, quantize it at several widths, and compare.

    By default of spoken commands, in minutes; it speaks the training set itself, with no download. Or of recorded
    speech: --data an4 --root PATH. Interrupted, it goes on from where it was.
    """
    if splits:
        raise click.UsageError("quickstart trains and tests on the data set's own parts: --split does not go with it")
    if data == "manifest":
        raise click.UsageError("quickstart needs a part to train on and one to test on, and a manifest has no parts")
    torch.set_num_threads(1)  # the layers are so small that a second thread costs more than it computes
    started = time.perf_counter()
    recipe = RECIPES[data]
    _say(f"reading {data} speech" if root else "speaking the commands, each part with voices of its own")
    parts = [load_utterances(data, root, (), training=training) for training in (True, False)]
    recognizer = recipe.untrained(parts[0], recipe.train.seed)
    train, test = (
        SpeechSet(part, recognizer.front_end, recognizer.tokenizer, speeds=speeds)
        for part, speeds in zip(parts, (recipe.train.speeds, (1.0,)), strict=True)
    )
    _say(f"training a float recognizer on {len(train)} utterances, {sum(train.durations) / 60:.0f} minutes of speech")
    recognizer = train_from_scratch(recognizer, recipe, train, output / "float", overwrite=overwrite)
    unquantized = evaluate(recognizer, test, beam_width=recipe.beam_width)
    rows: list[Row] = []
    for name in recipe.allocations:
        _say(f"{name}: post-training quantization, then quantization-aware training")
        rows.append(quantize_and_measure(recognizer, name, recipe, train, test, output, overwrite=overwrite))
    float_bytes = gq.report(recognizer.model).float32_bytes
    summary = {
        "date": date.today().isoformat(),
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "seconds": round(time.perf_counter() - started, 1),
        "data": data,
        "decoding": "greedy" if recipe.beam_width == 1 else f"beam {recipe.beam_width}",
        "test": {"utterances": unquantized.utterances, "words": unquantized.words},
        "float": {"wer": unquantized.wer, "interval": list(unquantized.interval), "bytes": float_bytes},
        "rows": [row.to_dict() for row in rows],
        "transcript": _transcribe_unheard(output, rows, test.utterances[0]),
    }
    _write(output, summary)
    emit(summary, _text(summary, output), as_json)


def _transcribe_unheard(output: Path, rows: list[Row], utterance: Utterance) -> dict[str, str]:
    """Saves a recording of a voice that no training saw, and transcribes the file with a packed model."""
    file = next(row.file for row in rows if row.name == DEPLOYED)
    save_audio(output / "unheard.wav", utterance.load())
    heard = Recognizer.load(output / file).transcribe(output / "unheard.wav")
    return {"model": file, "audio": "unheard.wav", "said": utterance.text, "heard": heard}


def _write(output: Path, summary: dict) -> None:
    summary_file, error_rates, sizes = (output / name for name in FILES)
    save_json(summary_file, summary)
    plot_error_rates(error_rates, summary)
    plot_sizes(sizes, summary)


def _text(summary: dict, output: Path) -> str:
    header = ("model", "bits", "WER % untrained", "WER % trained", "bytes", "times smaller")
    rows = [("float", "32", "", f"{100 * summary['float']['wer']:.2f}", f"{summary['float']['bytes']:,}", "1.00")]
    for row in summary["rows"]:
        errors = (f"{100 * row['ptq_wer']:.2f}", f"{100 * row['qat_wer']:.2f}")
        rows.append((row["name"], f"{row['bits']:.3g}", *errors, f"{row['bytes']:,}", f"{row['ratio']:.2f}"))
    transcript = summary["transcript"]
    return "\n".join(
        [
            "",
            table(header, rows),
            "",
            "Untrained: post-training quantization. Trained: quantization-aware training. Both measured through",
            f"their packed weights on {summary['test']['utterances']} utterances of speakers that no training heard.",
            "",
            f"{output / transcript['model']} transcribes {output / transcript['audio']}:",
            f"  said:  {transcript['said']}",
            f"  heard: {transcript['heard']}",
            "",
            f"{summary['seconds']:.0f} seconds on {summary['device']}; {', '.join(FILES)} are in {output}.",
        ]
    )


def _say(text: str) -> None:
    click.echo(text, err=True)
