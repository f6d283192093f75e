"""Draws word error rates against bits from a record of benchmarks/accuracy.py.

python plots/accuracy.py benchmarks/results/<device>/accuracy_<study>.json   # -> plots/<device>/accuracy_<study>.png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import studies
import style
from matplotlib.axes import Axes

FLOATS = {"float32": "--", "float32, trained on": ":"}  # variant: line
# Without torchao, which quantizes linear layers only, 5 % of the transducer's weights: its widths are not the model's
SERIES = {  # group: colour, marker, line
    "GQ": (style.BLUE, "o", "-"),
    "LSQ": (style.GREEN, "^", "-"),
    "straight-through": (style.SKY, "<", "-"),
    "S8BQAT": (style.PURPLE, "P", "-"),
    "GQ, mixed": (style.BLUE, "*", ""),
    "GQ post-training": (style.BLUE, "o", ":"),
    "k-means post-training": (style.VERMILION, "D", ":"),
    "uniform post-training": (style.GREY, "s", ":"),
}
COMPARED = "points more than float\ntrained for as long (90 % interval)"
RATES = (0.0, 40.0)  # percent; what lies outside is an arrow at the edge
DIFFERENCES = (-3.0, 10.0)  # points


def draw(record: dict, path: Path) -> None:
    """Rates against bits, and differences from float with the margin."""
    drawn = drawn_lines(record)
    unquantized = next(line for line in drawn if line["variant"] == "float32")
    lines = studies.complete(drawn, unquantized["folds"])
    figure, ((rates, differences),) = style.figure(1, 2, (10, 4.6))
    draw_floats(rates, [line for line in lines if line["variant"] in FLOATS])
    rates.axhspan(*(100 * end for end in unquantized["interval"]), color=style.PALE, alpha=0.5, linewidth=0)
    margin = 100 * record["margin"]
    differences.axhspan(-margin, margin, color=style.PALE, alpha=0.5, linewidth=0, label="margin")
    differences.axhline(0, color=style.BLACK, linestyle="--", linewidth=1)
    rates.set_ylim(RATES)
    differences.set_ylim(DIFFERENCES)
    for index, group in enumerate(SERIES):
        members = [line for line in lines if line["group"] == group]
        draw_group(rates, differences, members, group, 0.06 * (index - len(SERIES) / 2))
    for axes, text in ((rates, "word error rate (%)"), (differences, COMPARED)):
        axes.set_xlabel("bits per weight (mean)", fontsize=9)
        axes.set_ylabel(text, fontsize=9)
        axes.set_xticks([1, 2, 3, 4, 5, 8])
        axes.invert_xaxis()
    style.legend(figure, rates, 5)
    left_out = len(drawn) - len(lines)
    style.caption(figure, record, studies.heading(record, unquantized["folds"], left_out))
    style.save(figure, path)


def drawn_lines(record: dict) -> list[dict]:
    """The rows that have a place in the figure.

    Raises:
        ValueError: the record compares no methods.
    """
    if not any(line["group"] in SERIES for line in record["lines"]):
        raise ValueError(f"{record['study']} has no row of {', '.join(SERIES)}; see plots/ablation.py")
    return [line for line in record["lines"] if line["variant"] in FLOATS or line["group"] in SERIES]


def draw_floats(axes: Axes, lines: Sequence[dict]) -> None:
    """The float recognizers: those that all others start from, and those trained on for as long as the others."""
    for line in lines:
        look = dict(color=style.BLACK, linestyle=FLOATS[line["variant"]], linewidth=1)
        axes.axhline(100 * line["wer"], label=line["variant"], **look)


def draw_group(rates: Axes, differences: Axes, lines: list[dict], group: str, shift: float) -> None:
    """One method at all its widths, moved aside by ``shift`` so that intervals do not cover one another."""
    if not lines:
        return
    color, marker, dashes = SERIES[group]
    look = dict(color=color, marker=marker, markersize=5, linewidth=1.2, linestyle=dashes)
    lines = sorted(lines, key=lambda line: line["bits"])
    bits = [line["bits"] + shift for line in lines]
    percents = [100 * line["wer"] for line in lines]
    rates.plot(bits, percents, label=group, **look)
    mark_outside(rates, bits, percents, color)
    compared = [line for line in lines if line["difference"]]  # not where its float row is yet to be run
    bits = [line["bits"] + shift for line in compared]
    values = [100 * line["difference"]["value"] for line in compared]
    ends = [[100 * end for end in line["difference"]["tested"]] for line in compared]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    differences.errorbar(bits, values, yerr=[below, above], capsize=2, elinewidth=0.8, **look)
    mark_outside(differences, bits, values, color)


def mark_outside(axes: Axes, places: Sequence[float], values: Sequence[float], color: str) -> None:
    """An arrow at the edge for every value that lies beyond it."""
    low, high = axes.get_ylim()
    for place, value in zip(places, values, strict=True):
        if not low <= value <= high:
            edge, arrow = (0.97, r"$\uparrow$") if value > high else (0.03, r"$\downarrow$")
            look = dict(color=color, marker=arrow, markersize=6, transform=axes.get_xaxis_transform())
            axes.plot(place, edge, **look)


if __name__ == "__main__":
    style.command(draw)()
