"""How a command quantizes: `--bits`, `--layer PATTERN=BITS` and what holds for all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import click
from click.core import ParameterSource

from gq_triton import GQConfig

__all__ = ["allocation", "given_options", "quantization_options"]

NAMES = ("bits", "layers", "codebook", "activations", "granularity")


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
    bits: int | None, layers: Sequence[str], codebook: str, activations: str, granularity: str
) -> dict[str, GQConfig | None]:
    """A configuration by name pattern.

    Raises:
        click.UsageError: no width at all, or a --layer that is not PATTERN=BITS.
    """
    widths: dict[str, int | None] = {}
    for pattern, width in [*map(_parse_layer, layers), *([] if bits is None else [("*", bits)])]:
        widths.setdefault(pattern, width)
    if not widths:
        raise click.UsageError("say how many bits: --bits N, or --layer PATTERN=BITS for some layers")
    chosen = {
        "codebook": codebook,
        "activations": None if activations == "none" else activations,
        "granularity": granularity,
    }
    return {pattern: width and GQConfig(bits=width, **chosen) for pattern, width in widths.items()}


def _parse_layer(text: str) -> tuple[str, int | None]:
    pattern, separator, width = text.rpartition("=")
    if not pattern or not separator or width not in ("float", *"12345678"):
        raise click.UsageError(f"--layer {text!r}: PATTERN=BITS is needed, with 1 to 8 bits, or PATTERN=float")
    return pattern, None if width == "float" else int(width)
