"""`gq-triton train` and `gq-triton qat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
from torch import Tensor

from gq_triton.models import PRESETS
from gq_triton.models.config import architecture_of
from gq_triton.speech.datasets import Utterance, manifest, speaker_split
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import UNKNOWN, UNKNOWN_TEXT
from gq_triton.training.config import TrainConfig
from gq_triton.training.data import SpeechSet
from gq_triton.training.distributed import PARALLEL, is_main, process_group
from gq_triton.training.recipes import recipe_of
from gq_triton.training.study import train_from_scratch, train_further

from .datasets import data_options, load_utterances
from .output import emit, json_option
from .quantization import allocation, quantization_options
from .use import load_float_recognizer, recognizer_file

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
            "--evaluate-on",
            multiple=True,
            metavar="SPLIT",
            help="part of the data set, or another manifest, whose word error rate is shown meanwhile, repeatable",
        ),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            help="change a training setting: " + ", ".join(TrainConfig().to_dict()),
        ),
        click.option(
            "--parallel",
            type=click.Choice(PARALLEL),
            default=PARALLEL[0],
            show_default=True,
            help="under torchrun: every process has the whole model (ddp) or a share of it (fsdp)",
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
@click.option("--no-pretraining", is_flag=True, help="on recorded speech alone, where synthetic voices would be first")
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
    evaluate_on: Sequence[str],
    settings: Sequence[str],
    parallel: str,
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
    ctc: bool,
    no_pretraining: bool,
    **changes,
) -> None:
    """Train a float recognizer. Goes on where an interrupted run in the same folder stopped.

    Under torchrun, all processes train together: torchrun --nproc-per-node 2 -m gq_triton.cli train ...
    """
    preset = changes["preset"]
    recipe = recipe_of(data, preset and architecture_of(preset))
    recipe = replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    if no_pretraining:
        recipe = replace(recipe, pretrain=None)
    if ctc:
        recipe = replace(recipe, sizes={**recipe.sizes, "predictor_layers": 0})
    if changes["vocab_size"] and recipe.tokenizer != "subword":
        raise click.UsageError(f"--vocab-size counts subwords; the tokenizer is {recipe.tokenizer!r}")
    config = recipe.train.changed(parse_settings(settings))

    def learn(recognizer: Recognizer, data: SpeechSet, config: TrainConfig, output: Path, **options) -> Recognizer:
        return train_from_scratch(recognizer, replace(recipe, train=config), data, output, **options)

    with process_group():
        kept, held_out = divided(data, root, splits, hold_out, evaluate_on)
        recognizer = recipe.untrained(kept, config.seed)
        options = {"parallel": parallel, "overwrite": overwrite, "tensorboard": tensorboard}
        run(learn, recognizer, kept, held_out, config, output, as_json, **options)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@quantization_options
@training_options
def qat(
    model: Path,
    data: str,
    root: Path | None,
    splits: Sequence[str],
    output: Path,
    hold_out: float,
    evaluate_on: Sequence[str],
    settings: Sequence[str],
    parallel: str,
    overwrite: bool,
    tensorboard: bool,
    as_json: bool,
    **quantization,
) -> None:
    """Quantization-aware training from a float recognizer MODEL, a file or the folder of a run."""
    patterns = allocation(**quantization)
    if recognizer_file(model).resolve() == recognizer_file(output).resolve():
        raise click.UsageError(f"{output} holds the float recognizer itself; choose another folder for --output")
    recognizer = load_float_recognizer(model)
    config = recipe_of(data, recognizer.model.config.architecture).qat.changed(parse_settings(settings))

    def learn(recognizer: Recognizer, *arguments, **options) -> Recognizer:
        return train_further(recognizer, patterns, *arguments, **options)

    with process_group():
        kept, held_out = divided(data, root, splits, hold_out, evaluate_on)
        options = {"parallel": parallel, "overwrite": overwrite, "tensorboard": tensorboard}
        run(learn, recognizer, kept, held_out, config, output, as_json, **options)


def run(
    learn: Callable[..., Recognizer],
    recognizer: Recognizer,
    kept: list[Utterance],
    held_out: list[Utterance],
    config: TrainConfig,
    output: Path,
    as_json: bool,
    **options,
) -> None:
    """Trains, and says what came of it; the options go to the trainer."""
    parts = recognizer.front_end, recognizer.tokenizer
    data = SpeechSet(kept, *parts, speeds=config.speeds, progress=is_main())
    cached = None if is_main() else False  # the first process alone evaluates
    options["held_out"] = SpeechSet(held_out, *parts, cached=cached, progress=is_main()) if held_out else None
    if is_main():
        warn_of_unknown(data.tokens)
        warn_of_long(data, config.max_seconds)
    trained = learn(recognizer, data, config, output, **options)
    if is_main():
        path = str(output / "recognizer.safetensors")
        result = {"recognizer": path, "stage": trained.stage, "parameters": parameters(trained)}
        emit(result, f"trained {result['parameters']:,} parameters ({trained.stage}): {path}", as_json)


def warn_of_unknown(tokens: Tensor) -> None:
    """A recognizer keeps its tokenizer, which other words, or another case, teach nothing but the unknown token."""
    unknown = int((tokens == UNKNOWN).sum())
    if unknown:
        text = f"{unknown} of {len(tokens)} tokens of the transcripts are unknown to the recognizer: {UNKNOWN_TEXT}"
        click.echo(f"Warning: {text}", err=True)


def warn_of_long(data: SpeechSet, limit: float) -> None:
    """Says what ``TrainConfig.max_seconds`` leaves out."""
    longer = sum(duration > limit for duration in data.durations) if limit else 0
    if longer:
        click.echo(f"Warning: {longer} of {len(data)} utterances are left out: max_seconds is {limit}", err=True)


def parameters(recognizer: Recognizer) -> int:
    return sum(parameter.numel() for parameter in recognizer.model.parameters())


def divided(
    data: str, root: Path | None, splits: Sequence[str], hold_out: float, evaluate_on: Sequence[str]
) -> tuple[list[Utterance], list[Utterance]]:
    """What is trained on, and what is held out."""
    if hold_out and evaluate_on:
        raise click.UsageError("--hold-out and --evaluate-on both say what to evaluate on; give one of them")
    utterances = load_utterances(data, root, splits, training=True)
    if hold_out:
        return speaker_split(utterances, hold_out)
    if data == "manifest":
        return utterances, [utterance for path in evaluate_on for utterance in manifest(path)]
    return utterances, load_utterances(data, root, evaluate_on, training=False) if evaluate_on else []


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    parsed = {}
    for text in settings:
        name, separator, value = text.partition("=")
        if not separator:
            raise click.UsageError(f"--set {text!r}: NAME=VALUE is needed")
        parsed[name.strip()] = value.strip()
    return parsed
