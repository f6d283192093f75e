"""What a goal came to, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import click


class Outcome(NamedTuple):
    """How a record stands to a goal.

    Attributes:
        what: the goal.
        wanted: the number.
        measured: the worst cell's, or the geometric mean; None where nothing was measured.
        cells: how many there are.
        missed: those below ``wanted``, the worst first.
        notes: what else to know.
    """

    what: str
    wanted: float
    measured: float | None
    cells: int
    missed: list[Any]
    notes: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        return None if self.measured is None else self.measured >= self.wanted


def told(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as text, every cell that misses its goal on a line of its own."""
    lines = []
    for outcome in outcomes:
        lines.append(_line(outcome))
        lines += [f"            {cell}" for cell in outcome.missed]
    return "\n".join(lines)


def _line(outcome: Outcome) -> str:
    if outcome.measured is None:
        return f"unknown  {outcome.what}: not measured"
    notes = f", {outcome.notes}" if outcome.notes else ""
    numbers = f"{outcome.measured:.3g} of {outcome.wanted:.3g} wanted, {outcome.cells} cells{notes}"
    return f"{'met' if outcome.met else 'missed':<8} {outcome.what}: {numbers}"


def command(summary: Callable[[dict], str]) -> click.Command:
    """The command line that prints the ``summary`` of a record."""

    @click.command(help="Print how RECORD stands to the goals.")
    @click.argument("path", metavar="RECORD", type=click.Path(path_type=Path, exists=True, dir_okay=False))
    def main(path: Path) -> None:
        click.echo(summary(json.loads(path.read_text())))

    return main
