"""`gq-triton allocate`: which width for which weight, by what each costs in loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import gq_triton as gq
from gq_triton.allocation import WIDTHS, Unit
from gq_triton.speech.datasets import speaker_split
from gq_triton.training.data import SpeechSet
from gq_triton.training.evaluation import loss_per_token

from .datasets import data_options, load_utterances
from .figures import plot_sensitivity
from .output import emit, json_option, table
from .quantization import settings_options, weight_config
from .use import load_float_recognizer

__all__ = ["allocate"]


def _widths(_context: click.Context, _option: click.Option, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part in tuple("12345678") for part in parts):
        raise click.BadParameter(f"{text!r}: widths from 1 to 8 are needed, separated by commas")
    return [int(part) for part in parts]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="file of the widths, for --config"
)
@click.option("--bytes", "max_bytes", type=click.IntRange(min=1), help="budget: bytes of weights, as `report` has them")
@click.option(
    "--bits-per-weight", "mean_bits", type=click.FloatRange(1, 8), help="budget: what this width everywhere would take"
)
@click.option(
    "--widths", default=",".join(map(str, WIDTHS)), callback=_widths, show_default=True, help="to choose among"
)
@click.option("--float", "kept", multiple=True, metavar="PATTERN", help="leave these weights float; repeatable")
@settings_options
@data_options
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="measure on the speakers that `train` with the same --hold-out left out; 0 for all",
)
@click.option(
    "--utterances", "count", type=click.IntRange(min=1), default=64, show_default=True, help="at most, to measure on"
)
@click.option(
    "--measurements",
    type=click.Path(path_type=Path, dir_okay=False),
    help="file of what was measured, gone on with where it exists  [default: beside --output]",
)
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="draw what was measured, as PNG")
@json_option
def allocate(
    model: Path,
    output: Path,
    max_bytes: int | None,
    mean_bits: float | None,
    widths: list[int],
    kept: Sequence[str],
    data: str,
    root: Path | None,
    splits: Sequence[str],
    hold_out: float,
    count: int,
    measurements: Path | None,
    figure: Path | None,
    as_json: bool,
    **settings: str,
) -> None:
    """Choose the width of each weight of MODEL, a float recognizer: the least loss in a budget of bytes.

    By how much the loss per token changes is measured for each weight and width alone, without training, on the
    training part of the data set by default. It is the transducer's or CTC model's own loss, without the blank_bonus
    and the auxiliary CTC loss of training. A killed command goes on where it was, and another budget needs no new
    measurements. `qat` and `convert` take the widths by --config.
    """
    if (max_bytes is None) == (mean_bits is None):
        raise click.UsageError("one budget is needed: --bytes N or --bits-per-weight X")
    recognizer = load_float_recognizer(model)
    utterances = load_utterances(data, root, splits, training=True)
    if hold_out:
        _, utterances = speaker_split(utterances, hold_out)
    spaced = utterances[:: -(-len(utterances) // count)]
    speech = SpeechSet(spaced, recognizer.front_end, recognizer.tokenizer)

    def loss(_model: object) -> float:
        return loss_per_token(recognizer, speech)

    patterns: dict[str, gq.WeightConfig | None] = dict.fromkeys(kept)
    patterns.setdefault("*", weight_config(**settings))
    file = measurements or output.with_suffix(".sensitivity.json")
    measured = gq.sensitivity(recognizer.model, loss, patterns, widths=widths, file=file)
    chosen = gq.allocate(measured, max_bytes or measured.bytes_at(mean_bits))
    gq.save_config(output, chosen.config)
    joint = gq.quantized_loss(recognizer.model, loss, chosen.config) - measured.loss
    if figure:
        plot_sensitivity(figure, measured, chosen)
    rows = [_row(unit, measured.loss, chosen.bits[unit.names[0]]) for unit in measured.units]
    result = {
        "config": str(output),
        "bytes": chosen.bytes,
        "loss": measured.loss,
        "predicted_change": chosen.change,
        "measured_change": joint,
        "weights": rows,
    }
    emit(result, f"{_table(rows, widths)}\n\n{_summary(result)}", as_json)


def _row(unit: Unit, loss: float, bits: int) -> dict[str, Any]:
    changes = {str(width): measured - loss for width, measured in unit.losses.items()}
    return {"name": unit.names[0], "bits": bits, "bytes": unit.bytes[bits - 1], "changes": changes}


def _table(rows: list[dict[str, Any]], widths: Sequence[int]) -> str:
    header = ["weight", "bits", "bytes", *(f"loss at {width}" for width in sorted(set(widths)))]
    cells = [[f"{change:+.4f}" for change in row["changes"].values()] for row in rows]
    heads = [[row["name"], str(row["bits"]), f"{row['bytes']:,}"] for row in rows]
    return table(header, [[*head, *changes] for head, changes in zip(heads, cells, strict=True)])


def _summary(result: dict[str, Any]) -> str:
    return (
        f"loss per token: {result['loss']:.4f}; with these widths, untrained, predicted "
        f"{result['predicted_change']:+.4f}, measured {result['measured_change']:+.4f}\n"
        f"{result['config']}: {result['bytes']:,} bytes of weights"
    )
