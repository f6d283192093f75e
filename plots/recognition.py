"""Draws word error rates from a record of benchmarks/recognition.py.

python plots/recognition.py benchmarks/results/<device>/recognition_an4.json   # -> plots/<device>/
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from gq_triton.cli.figures import plot_error_rates


@click.command()
@click.argument("record", type=click.Path(path_type=Path, exists=True))
def main(record: Path) -> None:
    """Draw the figure of RECORD."""
    summary = json.loads(record.read_text())
    figure = Path(__file__).parent / record.parent.name / f"{record.stem}.png"
    plot_error_rates(figure, summary)
    click.echo(figure)


if __name__ == "__main__":
    main()
