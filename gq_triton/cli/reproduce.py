"""`gq-triton reproduce`: runs the accuracy studies again, or any row of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import click
import torch
from tqdm import tqdm

from gq_triton.files import save_json, save_json_lines
from gq_triton.studies import FLOAT, Cell, Line, Runner, Study, summarize
from gq_triton.studies.an4 import STUDIES

from .datasets import load_utterances
from .info import commit, device_name, versions
from .output import emit, json_option, table

__all__ = ["reproduce"]

HEADER = ["weights", "bits", "bytes", "smaller", "folds", "WER %", "95 %", "CER %", "loss", "more"]
HEADER += ["95 %", "than", "verdict", "test WER %"]
LEGEND = """\
WER      on speakers whom the recognizer of their fold never heard, all folds together, decoded from packed weights
loss     of the transcripts, in nats per token
more     word errors than the float row that is named, which was trained on for as long, in points
verdict  equivalent: the 90 % interval of that difference lies within the margin; no worse: below it
         Intervals are of the bootstrap over speakers, in pairs; the luck of training is not in them."""


@click.command()
@click.argument("study", type=click.Choice(list(STUDIES)))
@click.option("--root", type=click.Path(path_type=Path), required=True, help="folder of AN4")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="runs/studies",
    show_default=True,
    help="folder of the runs; what ended there is not run again",
)
@click.option("--row", "rows", multiple=True, metavar="PATTERN", help="variants, such as '*2 bits'; repeatable")
@click.option("--fold", "folds", type=click.IntRange(min=0), multiple=True, help="repeatable  [default: all]")
@click.option("--found", is_flag=True, help="run nothing: tell what the folder holds")
@json_option
def reproduce(
    study: str,
    root: Path,
    output: Path,
    rows: Sequence[str],
    folds: Sequence[int],
    found: bool,
    as_json: bool,
) -> None:
    """Run STUDY, or some of its rows, and print all that the folder holds of it.

    Float recognizers are trained first, for they are what every row starts from. Several of these commands may share an
    output folder, each with folds of its own. An interrupted one goes on where it was.
    """
    torch.set_num_threads(1)  # results do not depend on it, the time hardly: layers are small
    design = STUDIES[study]
    cells = _selected(design, rows, folds)
    parts = [load_utterances("an4", root, (), training=training) for training in (True, False)]
    environment = {"device": device_name(), "versions": versions(), "commit": commit()}
    provenance = {"environment": environment, "date": date.today().isoformat()}
    runner = Runner(design, *parts, output, provenance=provenance)
    runner.found()  # what was run with other settings is told now, and not after hours
    for cell in tqdm([] if found else cells, desc=study, unit="run", disable=found):
        runner.run(cell)
    results = runner.found()
    if not results:
        raise click.ClickException(f"{output} holds no run of {study}")
    lines = summarize(results, design.margin)
    record = {
        "study": study,
        "question": design.question,
        "margin": design.margin,
        "measured": list(design.measured),
        **_provenance(results),
        "lines": [line.to_dict() for line in lines],
    }
    save_json_lines(output / f"{study}.jsonl", results)
    save_json(output / f"{study}.json", record)
    emit(record, f"{design.question}\n\n{table(HEADER, [_cells(line) for line in lines])}\n\n{LEGEND}", as_json)


def _provenance(results: Sequence[dict]) -> dict:
    """Of the last run, with the commits of all.

    Raises:
        click.ClickException: they are of several devices.
    """
    devices = sorted({result["environment"]["device"] for result in results})
    if len(devices) > 1:
        raise click.ClickException(f"the folder holds runs of several devices, to be told apart: {'; '.join(devices)}")
    last = max(results, key=lambda result: result["date"])
    commits = sorted({str(result["environment"]["commit"]) for result in results})
    return {"environment": {**last["environment"], "commit": ", ".join(commits)}, "date": last["date"]}


def _selected(study: Study, rows: Sequence[str], folds: Sequence[int]) -> list[Cell]:
    """The cells that the options name, and the float ones that they are compared with.

    Raises:
        click.UsageError: they name none.
    """
    for fold in folds:
        if fold not in study.measured:
            raise click.UsageError(f"--fold {fold}: the study runs {', '.join(map(str, study.measured))}")
    names = [variant.name for variant in study.rows]
    for row in rows:
        if not fnmatch.filter(names, row):
            raise click.UsageError(f"--row {row!r} names no variant; there are: {'; '.join(names)}")
    chosen = {name for row in rows or ["*"] for name in fnmatch.filter(names, row)}
    needed = chosen | {variant.reference for variant in study.rows if variant.name in chosen} | {FLOAT.name}
    return [cell for cell in study.cells() if cell.variant.name in needed and (not folds or cell.fold in folds)]


def _cells(line: Line) -> list[str]:
    change = line.difference
    return [
        line.variant,
        f"{line.bits:.3g}",
        f"{line.bytes:,}",
        f"{line.ratio:.1f}x",
        str(line.folds),
        f"{100 * line.wer:.2f}",
        _range(line.interval),
        f"{100 * line.cer:.2f}",
        f"{line.loss:.3f}",
        f"{100 * change.value:+.2f}" if change else "",
        _range(change.interval) if change else "",
        line.reference or "",
        _verdict(line),
        f"{100 * line.test_wer:.2f}",
    ]


def _range(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _verdict(line: Line) -> str:
    if line.difference is None:
        return ""
    return "equivalent" if line.equivalent else "no worse" if line.no_worse else "not shown"
