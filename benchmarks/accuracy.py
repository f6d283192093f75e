"""What does quantization cost in word errors, beside float and beside rival methods, on speakers never heard?

    python benchmarks/accuracy.py an4-rnnt --root data/an4            # hours; a killed run goes on where it stopped
    python benchmarks/accuracy.py an4-rnnt --root data/an4 --found    # the record of what was run so far

Runs `gq-triton reproduce` and keeps what it found as benchmarks/results/<device>/accuracy_<study>.json, from which
plots/accuracy.py draws its figure (plots/ablation.py that of an4-ablation), and every run, with its configuration and
the errors of each speaker, as a line of the .jsonl file beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from harness import RESULTS, slug

from gq_triton.cli.reproduce import reproduce
from gq_triton.files import write_atomically
from gq_triton.studies.an4 import STUDIES


@click.command()
@click.argument("study", type=click.Choice(list(STUDIES)))
@click.option("--root", type=click.Path(path_type=Path), required=True, help="folder of AN4")
@click.option("--output", type=click.Path(path_type=Path), default="runs/studies", show_default=True)
@click.option("--found", is_flag=True, help="run nothing: keep what the folder holds")
@click.pass_context
def main(context: click.Context, study: str, root: Path, output: Path, found: bool) -> None:
    """Run STUDY, and keep the record."""
    context.invoke(reproduce, study=study, root=root, output=output, found=found)
    device = json.loads((output / f"{study}.json").read_text())["environment"]["device"]
    for suffix in ("json", "jsonl"):
        record = RESULTS / slug(device) / f"accuracy_{study}.{suffix}"
        content = (output / f"{study}.{suffix}").read_text()
        write_atomically(record, lambda temporary, content=content: temporary.write_text(content))
        click.echo(f"record: {record}", err=True)


if __name__ == "__main__":
    main()
