"""How figures look: one colour for each name in all of them, told apart by the colour-blind too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gq_triton.files import write_atomically

# Okabe and Ito, "Color universal design" (2008)
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
YELLOW, BLUE, VERMILION, PURPLE = "#f0e442", "#0072b2", "#d55e00", "#cc79a7"
GREY, PALE = "#8c8c8c", "#d9d9d9"


def figure(rows: int, columns: int, size: tuple[float, float], **options: object) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` by ``columns`` axes, ``size`` in inches."""
    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e5e5e5", linewidth=0.7)
        each.set_axisbelow(True)
        each.tick_params(labelsize=8)
    return made, axes.tolist()


def caption(made: Figure, record: dict, text: str) -> None:
    """A title, with what the record was measured on."""
    where = f"{record['environment']['device']}, torch {record['environment']['versions']['torch']}, {record['date']}"
    made.suptitle(f"{text}\n{where}", fontsize=9)


def legend(made: Figure, axes: Axes, columns: int) -> None:
    """The legend of ``axes`` below the figure."""
    made.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def save(made: Figure, path: Path) -> None:
    write_atomically(path, lambda temporary: made.savefig(temporary, format="png", dpi=150))
    plt.close(made)


def command(draw: Callable[[dict, Path], None]) -> click.Command:
    """The command line of a figure that ``draw`` draws from a record."""

    @click.command(help="Draw the figure of RECORD.")
    @click.argument("record", type=click.Path(path_type=Path, exists=True, dir_okay=False))
    @click.option("--output", type=click.Path(path_type=Path), help="of the figure  [default: plots/DEVICE/RECORD.png]")
    def main(record: Path, output: Path | None) -> None:
        path = output or Path(__file__).parent / record.parent.name / f"{record.stem}.png"
        draw(json.loads(record.read_text()), path)
        click.echo(path)

    return main
