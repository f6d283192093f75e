"""How a command quantizes: `--bits` and `--layer PATTERN=BITS`, or `--config`, and what holds for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import click
from click.core import ParameterSource

from gq_triton import WeightConfig, load_config
from gq_triton.baselines.config import BASELINES
from gq_triton.config import config_class

__all__ = ["allocation", "given_options", "quantization_options", "settings_options", "weight_config"]

NAMES = ("bits", "layers", "config_file", "method", "codebook", "activations", "granularity")


def quantization_options(command: Callable) -> Callable:
    """Adds the options that :func:`allocation` takes to a command."""
    options = [
        click.option("--bits", type=click.IntRange(1, 8), help="width of all weights that no --layer names"),
        click.option(
            "--layer",
            "layers",
            multiple=True,
            metavar="PATTERN=BITS",
            help="width of layers by name, such as 'encoder.*=1' or 'joint.output=float'; the first match wins",
        ),
        click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="file that says all of this, such as `gq-triton allocate` writes",
        ),
        settings_options,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def settings_options(command: Callable) -> Callable:
    """Adds the options that :func:`weight_config` takes to a command."""
    options = [
        click.option(
            "--method",
            type=click.Choice(["gq", *BASELINES]),
            default="gq",
            show_default=True,
            help="General Quantizer or, to compare with it, a rival",
        ),
        click.option(
            "--codebook",
            type=click.Choice(["float", "int8", "fp8"]),
            default="float",
            show_default=True,
            help="type of the values that the codes stand for",
        ),
        click.option(
            "--activations",
            type=click.Choice(["none", "int8", "fp8"]),
            default="none",
            show_default=True,
            help="type that layers' inputs are quantized to, token by token",
        ),
        click.option(
            "--granularity",
            type=click.Choice(["channel", "tensor"]),
            default="channel",
            show_default=True,
            help="what shares a scale",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def given_options() -> list[str]:
    """Those options of :func:`quantization_options` that the user gave to the running command."""
    context = click.get_current_context()
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    return [options[name] for name in NAMES if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def allocation(
    bits: int | None, layers: Sequence[str], config_file: Path | None = None, **settings: str
) -> dict[str, WeightConfig | None]:
    """A configuration by name pattern.

    Raises:
        click.UsageError: no width at all, a --layer that is not PATTERN=BITS, or other options beside --config.
        FileNotFoundError, ValueError: the file of --config cannot be read.
    """
    if config_file is not None:
        others = [option for option in given_options() if option != "--config"]
        if others:
            raise click.UsageError(f"--config says how to quantize: {', '.join(others)} does not go with it")
        return load_config(config_file)
    widths: dict[str, int | None] = {}
    for pattern, width in [*map(_parse_layer, layers), *([] if bits is None else [("*", bits)])]:
        widths.setdefault(pattern, width)
    if not widths:
        raise click.UsageError("say how many bits: --bits N, --layer PATTERN=BITS for some layers, or --config FILE")
    common = weight_config(**settings)
    return {pattern: width and replace(common, bits=width) for pattern, width in widths.items()}


def weight_config(method: str, **settings: str | None) -> WeightConfig:
    """What holds for all weights but the width.

    Raises:
        click.UsageError: a setting that the method does not have.
    """
    kind = config_class(method)
    settings["activations"] = None if settings["activations"] == "none" else settings["activations"]
    own = {field.name for field in fields(kind)}
    for name in settings.keys() - own:
        if settings[name] != getattr(kind, name):
            raise click.UsageError(f"--{name} {settings[name]} does not go with --method {method}")
    return kind(**{name: value for name, value in settings.items() if name in own})


def _parse_layer(text: str) -> tuple[str, int | None]:
    pattern, separator, width = text.rpartition("=")
    if not pattern or not separator or width not in ("float", *"12345678"):
        raise click.UsageError(f"--layer {text!r}: PATTERN=BITS is needed, with 1 to 8 bits, or PATTERN=float")
    return pattern, None if width == "float" else int(width)
