"""What does quantization cost in word errors? A float recognizer against GQ with and without training, at any width.

    python benchmarks/recognition.py --data an4 --root data/an4
    python benchmarks/recognition.py                              # spoken commands, as in the quickstart

Runs `gq-triton quickstart` (a killed run goes on where it stopped) and keeps its summary as
benchmarks/results/<device>/recognition_<data>.json, from which plots/recognition.py draws its figure. Its `seconds` are
those of the last call: runs that were found finished do not count.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from harness import RESULTS, slug

from gq_triton.cli.quickstart import quickstart
from gq_triton.files import save_json


@click.command()
@click.option("--data", type=click.Choice(["synthetic", "an4"]), default="synthetic", show_default=True)
@click.option("--root", type=click.Path(path_type=Path), help="folder of AN4")
@click.option("--output", type=click.Path(path_type=Path), help="folder of the runs  [default: runs/recognition_DATA]")
@click.pass_context
def main(context: click.Context, data: str, root: Path | None, output: Path | None) -> None:
    """Measure, and keep the record."""
    output = output or Path("runs") / f"recognition_{data}"
    context.invoke(quickstart, output=output, data=data, root=root)
    summary = json.loads((output / "summary.json").read_text())
    record = RESULTS / slug(summary["device"]) / f"recognition_{data}.json"
    save_json(record, summary)
    click.echo(f"record: {record}", err=True)


if __name__ == "__main__":
    main()
