"""Draws what changing one setting does to the loss from a record of benchmarks/accuracy.py an4-ablation.

python plots/ablation.py benchmarks/results/<device>/accuracy_<study>.json   # -> plots/<device>/accuracy_<study>.png
"""

from __future__ import annotations

from pathlib import Path

import studies
import style
from matplotlib.axes import Axes

DEFAULT = "as by default"
NOISE = 0.01  # nats: the scale is linear up to here, and logarithmic beyond, as some changes ruin everything


def draw(record: dict, path: Path) -> None:
    """Differences of the loss from that with default settings, a column for each width.

    Raises:
        ValueError: the record has no row with default settings of which all folds were run.
    """
    folds = next(line["folds"] for line in record["lines"] if line["variant"] == "float32")
    quantized = [line for line in record["lines"] if line["group"]]
    complete = studies.complete(quantized, folds)
    defaults = {width(line): line for line in complete if line["group"] == DEFAULT}
    if not defaults:
        raise ValueError(f"{record['study']} has no complete row {DEFAULT!r}; see plots/accuracy.py")
    shown = [line for line in complete if width(line) in defaults]
    changes = [group for group in dict.fromkeys(line["group"] for line in shown) if group != DEFAULT]
    size = (2 + 3 * len(defaults), 1.5 + 0.22 * len(changes))
    figure, (row,) = style.figure(1, len(defaults), size, sharex=True, sharey=True)
    for axes, (bits, default) in zip(row, defaults.items(), strict=True):
        lines = [line for line in shown if width(line) == bits and line != default]
        draw_width(axes, {changes.index(line["group"]): line["loss"] - default["loss"] for line in lines})
        axes.set_title(f"{bits}: loss {default['loss']:.3f} by default", fontsize=9)
    row[0].set_yticks(range(len(changes)), changes, fontsize=8)
    row[0].set_ylim(len(changes) - 0.5, -0.5)
    style.caption(figure, record, studies.heading(record, folds, len(quantized) - len(shown)))
    figure.supxlabel(f"nats per token more than by default (logarithmic beyond {NOISE:g})", fontsize=9)
    style.save(figure, path)


def width(line: dict) -> str:
    """Of a variant called "{bits}, {change}"."""
    return line["variant"].removesuffix(f", {line['group']}")


def draw_width(axes: Axes, differences: dict[int, float]) -> None:
    """A point for each change, by its place: a bar of no length would look like a change that was not tried."""
    axes.set_xscale("symlog", linthresh=NOISE)
    places, values = list(differences), list(differences.values())
    axes.hlines(places, 0, values, color=style.BLUE, linewidth=1.2)
    axes.plot(values, places, color=style.BLUE, marker="o", markersize=5, linestyle="")
    axes.axvline(0, color=style.BLACK, linewidth=1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#e5e5e5", linewidth=0.7)


if __name__ == "__main__":
    style.command(draw)()
