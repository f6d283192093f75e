"""Draws the quantizer's time against bits from a record of benchmarks/quantizer.py.

python plots/quantizer.py benchmarks/results/<device>/quantizer.json   # -> plots/<device>/quantizer.png
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import style
from matplotlib.axes import Axes

SERIES = {  # contender: label, colour, marker
    "gq": ("GQ", style.BLUE, "o"),
    "plain": ("plain form", style.VERMILION, "s"),
    "plain compiled": ("plain form, torch.compile", style.ORANGE, "D"),
    "lsq": ("LSQ", style.GREEN, "^"),
    "lsq compiled": ("LSQ, torch.compile", style.GREEN, "v"),
    "torchao": ("torchao", style.PURPLE, "P"),
    "torchao compiled": ("torchao, torch.compile", style.PURPLE, "X"),
    "uniform": ("uniform, straight through", style.SKY, "<"),
}
PASSES = {
    "forward": "forward",
    "backward": "backward of weight and scale",
    "backward with centroids": "backward with centroids",
}


def draw(record: dict, path: Path) -> None:
    """Time, and share of the copy's bandwidth, against bits, a column for each pass."""
    size, dtype = 2 ** record["settings"]["main"], record["settings"]["dtypes"][0]
    figure, (times, shares) = style.figure(2, len(PASSES), (10, 6.4), sharex=True, sharey="row")
    for (key, title), above, below in zip(PASSES.items(), times, shares, strict=True):
        case = {"of": "weight", "size": size, "dtype": dtype, "pass": key}
        results = next(entry["results"] for entry in record["cases"] if entry["case"] == case)
        draw_times(above, results)
        draw_shares(below, results)
        above.set_title(title, fontsize=9)
        below.set_xlabel("bits", fontsize=9)
        below.set_xticks(record["settings"]["bits"])
    times[0].set_ylabel("time (ms, logarithmic)", fontsize=9)
    shares[0].set_ylabel("share of copy bandwidth (%, logarithmic)", fontsize=9)
    style.legend(figure, times[0], 5)
    style.caption(figure, record, f"Fake-quantizing a weight of {size:,} entries in {dtype}")
    style.save(figure, path)


def draw_times(axes: Axes, results: dict) -> None:
    """Milliseconds, and those that the bytes alone take."""
    for name, (label, color, marker) in SERIES.items():
        points = series(results, name, lambda result: result["ms"]["median"])
        if points[0]:
            axes.plot(*points, label=label, color=color, marker=marker, markersize=5, linewidth=1.4)
    moved = next(result for name, result in results.items() if name.startswith("gq/"))["bytes"]
    floor = moved / results["copy"]["gb_per_s"] / 1e6
    axes.axhline(floor, color=style.BLACK, linestyle="--", linewidth=1, label="a copy of as many bytes")
    axes.set_yscale("log")


def draw_shares(axes: Axes, results: dict) -> None:
    """Percent of what a copy reaches."""
    for name, (_, color, marker) in SERIES.items():
        points = series(results, name, lambda result: 100 * result["copy_share"])
        axes.plot(*points, color=color, marker=marker, markersize=5, linewidth=1.4)
    axes.axhline(100, color=style.BLACK, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def series(results: dict, name: str, value: Callable[[dict], float]) -> tuple[list[int], list[float]]:
    """Widths at which a contender was timed, and values of its results."""
    timed = {int(key.split("/")[1]): result for key, result in results.items() if key.split("/")[0] == name}
    points = [(bits, value(result)) for bits, result in sorted(timed.items()) if "ms" in result]
    return [bits for bits, _ in points], [number for _, number in points]


if __name__ == "__main__":
    style.command(draw)()
