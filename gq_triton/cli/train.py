"""`gq-triton train` and `gq-triton qat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import torch
from torch import Tensor

from gq_triton.models import PRESETS
from gq_triton.speech.datasets import Utterance, speaker_split
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import UNKNOWN, UNKNOWN_TEXT
from gq_triton.training.config import TrainConfig
from gq_triton.training.data import SpeechSet
from gq_triton.training.distributed import is_main, process_group
from gq_triton.training.recipes import RECIPES
from gq_triton.training.study import train_quantized, train_recognizer

from .datasets import data_options, load_utterances
from .output import emit, json_option
from .quantization import allocation, quantization_options
from .use import load_recognizer, recognizer_file

__all__ = ["qat", "train"]


def training_options(command: Callable) -> Callable:
    """Adds what `train` and `qat` share."""
    options = [
        data_options,
        click.option(
            "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="folder of the run"
        ),
        click.option(
            "--hold-out",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.0,
            show_default=True,
            help="fraction of the speakers not trained on; their word error rate is shown meanwhile",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="change a training setting: " + ", ".join(TrainConfig().to_dict()),
        ),
        click.option("--overwrite", is_flag=True, help="begin anew where the folder holds another run"),
        click.option("--tensorboard", is_flag=True, help="write TensorBoard events beside metrics.csv"),
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@training_options
@click.option("--preset", type=click.Choice(PRESETS), help="size of the model [default: of the data set]")
@click.option("--ctc", is_flag=True, help="a CTC model: the encoder alone, no predictor and no joint network")
@click.option(
    "--tokenizer", type=click.Choice(["word", "char", "subword"]), help="units it emits [default: of the data set]"
)
@click.option("--vocab-size", type=click.IntRange(min=2), help="number of subwords [default: of the data set]")
def train(
    data: str,
    root: Path | None,
    splits: Sequence[str],
    output: Path,
    hold_out: float,
    settings: Sequence[str],
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
    ctc: bool,
    **changes,
) -> None:
    """Train a float recognizer. Goes on where an interrupted run in the same folder stopped.

    Under torchrun, all processes train together: torchrun --nproc-per-node 2 -m gq_triton.cli train ...
    """
    recipe = replace(RECIPES[data], **{name: value for name, value in changes.items() if value is not None})
    if changes["vocab_size"] and recipe.tokenizer != "subword":
        raise click.UsageError(f"--vocab-size counts subwords; the tokenizer is {recipe.tokenizer!r}")
    config = recipe.train.changed(parse_settings(settings))
    with process_group():
        kept, held_out = divide(load_utterances(data, root, splits, training=True), hold_out)
        recognizer = recipe.untrained(kept, config.seed, ctc=ctc)
        run(train_recognizer, recognizer, kept, held_out, config, output, overwrite, tensorboard, as_json)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@quantization_options
@training_options
def qat(
    model: Path,
    bits: int | None,
    layers: Sequence[str],
    codebook: str,
    activations: str,
    granularity: str,
    data: str,
    root: Path | None,
    splits: Sequence[str],
    output: Path,
    hold_out: float,
    settings: Sequence[str],
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
) -> None:
    """Quantization-aware training from a float recognizer MODEL, a file or the folder of a run."""
    patterns = allocation(bits, layers, codebook, activations, granularity)
    config = RECIPES[data].qat.changed(parse_settings(settings))
    if recognizer_file(model).resolve() == recognizer_file(output).resolve():
        raise click.UsageError(f"{output} holds the float recognizer itself; choose another folder for --output")
    recognizer = load_recognizer(model)
    if recognizer.stage != "float":
        raise click.UsageError(f"{model} is {recognizer.stage} already; a float recognizer is needed")

    def learn(recognizer: Recognizer, *arguments, **options) -> Recognizer:
        return train_quantized(recognizer, patterns, *arguments, **options)

    with process_group():
        kept, held_out = divide(load_utterances(data, root, splits, training=True), hold_out)
        run(learn, recognizer, kept, held_out, config, output, overwrite, tensorboard, as_json)


def run(
    learn: Callable[..., Recognizer],
    recognizer: Recognizer,
    kept: list[Utterance],
    held_out: list[Utterance],
    config: TrainConfig,
    output: Path,
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
) -> None:
    """Trains, and says what came of it."""

    def speech_set(utterances: list[Utterance], speeds: Sequence[float]) -> SpeechSet | None:
        if not utterances:
            return None
        return SpeechSet(utterances, recognizer.front_end, recognizer.tokenizer, speeds=speeds, progress=is_main())

    data = speech_set(kept, config.speeds)
    if is_main():
        warn_of_unknown(data.targets)
    trained = learn(
        recognizer,
        data,
        config,
        output,
        held_out=speech_set(held_out, (1.0,)),
        overwrite=overwrite,
        tensorboard=tensorboard,
    )
    if is_main():
        path = str(output / "recognizer.safetensors")
        result = {"recognizer": path, "stage": trained.stage, "parameters": parameters(trained)}
        emit(result, f"trained {result['parameters']:,} parameters ({trained.stage}): {path}", as_json)


def warn_of_unknown(targets: Sequence[Tensor]) -> None:
    """A recognizer keeps its tokenizer, which other words, or another case, teach nothing but the unknown token."""
    tokens = torch.cat(list(targets))
    unknown = int((tokens == UNKNOWN).sum())
    if unknown:
        text = f"{unknown} of {len(tokens)} tokens of the transcripts are unknown to the recognizer: {UNKNOWN_TEXT}"
        click.echo(f"Warning: {text}", err=True)


def parameters(recognizer: Recognizer) -> int:
    return sum(parameter.numel() for parameter in recognizer.model.parameters())


def divide(utterances: list[Utterance], fraction: float) -> tuple[list[Utterance], list[Utterance]]:
    """What is trained on, and what is held out."""
    return speaker_split(utterances, fraction) if fraction else (utterances, [])


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    parsed = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator:
            raise click.UsageError(f"--set {text!r}: NAME=VALUE is needed")
        parsed[name.strip()] = value.strip()
    return parsed
