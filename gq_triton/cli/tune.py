"""`gq-triton tune`: which plan of the packed linear layer is the fastest on this GPU."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from gq_triton import tuning

from .output import emit, json_option, table

__all__ = ["tune"]

SHAPES = ((512, 512), (2048, 512), (512, 2048), (1024, 1024), (4096, 1024))
TOKENS = (1, 16, 64, 256, 1024)
HEADER = [
    "shape",
    "tokens",
    "bits",
    "operand",
    "kernel",
    "rows",
    "tokens of it",
    "warps",
    "stages",
    "parts",
    "us",
    "rule's",
]


def _power_of_two(ctx: click.Context, option: click.Option, values: tuple[int, ...]) -> tuple[int, ...]:
    for value in values:
        if value & (value - 1):
            raise click.BadParameter(f"{value} is no power of two")
    return values


@click.command()
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="file of the plans")
@click.option(
    "--shape",
    "shapes",
    type=(click.IntRange(1), click.IntRange(1)),
    multiple=True,
    metavar="ROWS COLUMNS",
    help=f"of a weight; repeatable  [default: {', '.join(f'{n} {k}' for n, k in SHAPES)}]",
)
@click.option("--bits", type=click.IntRange(1, 8), multiple=True, help="repeatable  [default: 4]")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    multiple=True,
    callback=_power_of_two,
    help=f"a power of two; repeatable  [default: {', '.join(map(str, TOKENS))}]",
)
@click.option(
    "--operand",
    "operands",
    type=click.Choice(list(tuning.DTYPES)),
    multiple=True,
    help="dtype of the activations, `byte` for those quantized to 8 bits; repeatable  [default: bf16]",
)
@json_option  # fmt: skip
def tune(
    output: Path,
    shapes: tuple[tuple[int, int], ...],
    bits: tuple[int, ...],
    tokens: tuple[int, ...],
    operands: tuple[str, ...],
    as_json: bool,
) -> None:
    """Time packed linear layers on this GPU under every plan, and write the fastest to a file, for `gq.load_tuned`.

    Run again with the same --output, it goes on where it was stopped, or adds to what is there. Every plan is compiled
    once: expect minutes.
    """
    chosen = product(shapes or SHAPES, bits or (4,), operands or ("bf16",), tokens or TOKENS)
    cases = [tuning.Case(m, *shape, width, operand) for shape, width, operand, m in chosen]
    found = list(tqdm(tuning.tune(cases, output), total=len(cases), desc="timing", unit="case", leave=False))
    text = f"{table(HEADER, [_cells(tuned) for tuned in found])}\n\nplans: {output}"
    emit([_row(tuned) for tuned in found], text, as_json)


def _row(tuned: tuning.Tuned) -> dict[str, Any]:
    return tuned.case._asdict() | {"plan": vars(tuned.plan), "ms": tuned.ms, "rule_ms": tuned.rule_ms}


def _cells(tuned: tuning.Tuned) -> list[str]:
    """The row under `HEADER`."""
    case, plan = tuned.case, tuned.plan
    asked = [f"{case.rows} x {case.columns}", case.tokens, case.bits, case.operand]
    found = [plan.kernel, plan.rows, plan.tokens, plan.warps, plan.stages, plan.parts]
    return [str(cell) for cell in (*asked, *found, f"{1e3 * tuned.ms:.1f}", f"{1e3 * tuned.rule_ms:.1f}")]
