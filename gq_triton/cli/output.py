"""What commands print: results for people, or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import click

__all__ = ["emit", "json_option", "table"]


def json_option(command: Callable) -> Callable:
    """Adds `--json`, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="print the result as JSON")(command)


def emit(result: object, text: str, as_json: bool) -> None:
    """Prints ``result`` as JSON or ``text``, to standard output; progress goes to standard error."""
    click.echo(json.dumps(result, indent=2) if as_json else text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    return "\n".join(_line(cells, widths) for cells in [header, ["-" * width for width in widths], *rows])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()
