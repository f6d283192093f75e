"""Which utterances a command works on: the options `--data`, `--root` and `--split`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import click

from gq_triton.speech.datasets import Utterance, an4, librispeech, manifest
from gq_triton.speech.synthetic import spoken_commands
from gq_triton.training.distributed import is_main

__all__ = ["data_options", "load_utterances"]

READERS: dict[str, Callable[[Path | None, str], list[Utterance]]] = {
    "synthetic": lambda _root, split: spoken_commands(split),
    "an4": an4,
    "librispeech": lambda root, split: librispeech(root, split, progress=is_main()),
    "manifest": lambda path, _split: manifest(path),
}
DEFAULT_SPLITS = {  # of training and of testing
    "synthetic": ("train", "test"),
    "an4": ("train", "test"),
    "librispeech": ("train-clean-100", "test-clean"),
    "manifest": ("all", "all"),
}


def data_options(command: Callable) -> Callable:
    """Adds `--data`, `--root` and `--split` to a command."""
    command = click.option(
        "--split",
        "splits",
        multiple=True,
        help="part of the data set, repeatable [default: its training or its test part]",
    )(command)
    command = click.option(
        "--root", type=click.Path(path_type=Path), help="folder of AN4 or LibriSpeech, or the manifest file"
    )(command)
    return click.option(
        "--data", type=click.Choice(list(READERS)), default="synthetic", show_default=True, help="data set"
    )(command)


def load_utterances(data: str, root: Path | None, splits: Sequence[str], *, training: bool) -> list[Utterance]:
    """The utterances that the options name.

    Raises:
        click.UsageError: options that do not go together.
        FileNotFoundError, ValueError: the data set is not as it should be.
    """
    if data != "synthetic" and root is None:
        raise click.UsageError(f"--data {data} needs --root PATH")
    if data == "synthetic" and root is not None:
        raise click.UsageError("--root needs --data: synthetic speech is read from no folder")
    if data == "manifest" and splits:
        raise click.UsageError("--data manifest has no parts: --split does not go with it")
    splits = splits or (DEFAULT_SPLITS[data][0 if training else 1],)
    return [utterance for split in splits for utterance in READERS[data](root, split)]
