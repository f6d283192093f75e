"""Draws word error rates against bits from a record of benchmarks/accuracy.py.

python plots/accuracy.py benchmarks/results/<device>/accuracy_<study>.json   # -> plots/<device>/accuracy_<study>.png
"""

from __future__ import annotations

from pathlib import Path

import style
from matplotlib.axes import Axes

SERIES = {  # group: colour, marker, line
    "GQ": (style.BLUE, "o", "-"),
    "LSQ": (style.GREEN, "^", "-"),
    "straight-through": (style.SKY, "<", "-"),
    "S8BQAT": (style.PURPLE, "P", "-"),
    "GQ, mixed": (style.BLUE, "*", ""),
    "torchao": (style.ORANGE, "X", "-"),
    "GQ post-training": (style.BLUE, "o", ":"),
    "k-means post-training": (style.VERMILION, "D", ":"),
    "uniform post-training": (style.GREY, "s", ":"),
}
CEILING = 40.0  # percent; what is worse is drawn at the edge


def draw(record: dict, path: Path) -> None:
    """Rates against bits, and differences from float with the margin."""
    figure, ((rates, differences),) = style.figure(1, 2, (10, 4.6))
    unquantized = next(line for line in record["lines"] if line["difference"] is None)
    rates.axhline(100 * unquantized["wer"], color=style.BLACK, linestyle="--", linewidth=1, label="float32")
    rates.axhspan(*(100 * end for end in unquantized["interval"]), color=style.PALE, alpha=0.5, linewidth=0)
    margin = 100 * record["margin"]
    differences.axhspan(-margin, margin, color=style.PALE, alpha=0.5, linewidth=0, label="margin")
    differences.axhline(0, color=style.BLACK, linestyle="--", linewidth=1)
    for index, group in enumerate(SERIES):
        lines = [line for line in record["lines"] if line["group"] == group]
        draw_group(rates, differences, lines, group, 0.06 * (index - len(SERIES) / 2))
    for axes, text in ((rates, "word error rate (%)"), (differences, "points more than float (90 % interval)")):
        axes.set_xlabel("bits per weight (mean)", fontsize=9)
        axes.set_ylabel(text, fontsize=9)
        axes.set_xticks([1, 2, 3, 4, 5, 8])
        axes.invert_xaxis()
    rates.set_ylim(0, CEILING)
    differences.set_ylim(-3, 10)
    style.legend(figure, rates, 5)
    style.caption(figure, record, f"{record['question']}\nSpeakers held out, {unquantized['folds']} folds")
    style.save(figure, path)


def draw_group(rates: Axes, differences: Axes, lines: list[dict], group: str, shift: float) -> None:
    """One method at all its widths, moved aside by ``shift`` so that intervals do not cover one another."""
    if not lines:
        return
    color, marker, dashes = SERIES[group]
    lines = sorted(lines, key=lambda line: line["bits"])
    bits = [line["bits"] + shift for line in lines]
    look = dict(color=color, marker=marker, markersize=5, linewidth=1.2, linestyle=dashes)
    rates.plot(bits, [min(100 * line["wer"], CEILING) for line in lines], label=group, **look)
    values = [100 * line["difference"]["value"] for line in lines]
    ends = [[100 * end for end in line["difference"]["tested"]] for line in lines]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    differences.errorbar(bits, values, yerr=[below, above], capsize=2, elinewidth=0.8, **look)


if __name__ == "__main__":
    style.command(draw)()
