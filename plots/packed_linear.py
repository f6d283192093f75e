"""Draws how fast packed linear layers are from a record of benchmarks/packed_linear.py.

python plots/packed_linear.py benchmarks/results/<device>/packed_linear.json   # -> plots/<device>/packed_linear.png
"""

from __future__ import annotations

from pathlib import Path

import style
from matplotlib.axes import Axes

SERIES = {  # contender: label, colour, marker
    "gq/8": ("GQ, 8 bits", "#00456b", "o"),
    "gq/4": ("GQ, 4 bits", style.BLUE, "s"),
    "gq/2": ("GQ, 2 bits", style.SKY, "^"),
    "gq/1": ("GQ, 1 bit", "#a9d6f5", "v"),
    "gq int8/4": ("GQ, 4 bits, int8 activations", style.VERMILION, "D"),
    "gq fp8/4": ("GQ, 4 bits, fp8 activations", style.ORANGE, "d"),
    "torch int8/8": ("torch int8", style.GREEN, "P"),
    "torch int4/4": ("torch int4", style.PURPLE, "X"),
    "gemlite int4/4": ("gemlite int4", style.GREY, "<"),
    "bitsandbytes nf4/4": ("bitsandbytes NF4", style.YELLOW, ">"),
}
TOKENS = {1: (style.BLUE, "o"), 4: (style.SKY, "s"), 16: (style.GREEN, "^")}
SPEED_MODES = {
    "warm graph": "warm L2 cache, CUDA graph",
    "turns": "",
    "cold": "cold L2 cache",
}  # the first one measured
FLOOR_MODES = {"turns": "", "cold": "cold L2 cache"}


def draw(record: dict, path: Path) -> None:
    """Speed over dense against tokens, and share of the floor against bits; a column for each shape."""
    shapes = record["settings"]["shown"]
    dtype = record["settings"]["suites"][0]["dtype"]
    figure, (speeds, floors) = style.figure(2, len(shapes), (3.4 * len(shapes), 6.8), sharey="row")
    for (n, k), above, below in zip(shapes, speeds, floors, strict=True):
        cases = [entry for entry in record["cases"] if entry["case"].items() >= dict(n=n, k=k, dtype=dtype).items()]
        how = draw_speed(above, cases)
        above.set_title(_title(f"{n} x {k}", how), fontsize=9)
        how = draw_floor(below, cases)
        below.set_title(_title(f"{n} x {k}", how), fontsize=9)
    speeds[0].set_ylabel("times as fast as dense (logarithmic)", fontsize=9)
    floors[0].set_ylabel("share of the floor (%)", fontsize=9)
    floors[0].set_ylim(bottom=0)
    _fullest(floors).legend(fontsize=8, frameon=False)
    style.legend(figure, _fullest(speeds), 3)
    style.caption(figure, record, f"Linear layers on packed weights beside torch's dense ones in {dtype}")
    style.save(figure, path)


def draw_speed(axes: Axes, cases: list[dict]) -> str:
    """Times over torch's dense layer; returns how they were taken."""
    mode, cases = _in_first_mode(cases, SPEED_MODES)
    for name, (label, color, marker) in SERIES.items():
        points = [
            (entry["case"]["m"], entry["results"][name]["speedup"])
            for entry in cases
            if "speedup" in entry["results"].get(name, {})
        ]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=5, linewidth=1.4)
    axes.axhline(1, color=style.BLACK, linestyle="--", linewidth=1, label="dense")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens (logarithmic)", fontsize=9)
    return SPEED_MODES[mode]


def draw_floor(axes: Axes, cases: list[dict]) -> str:
    """Percent of the speed that the bytes allow, at few tokens; returns how times were taken."""
    mode, cases = _in_first_mode(cases, FLOOR_MODES)
    for entry in cases:
        tokens = entry["case"]["m"]
        if tokens in TOKENS and len(entry["case"]["bits"]) > 1:
            color, marker = TOKENS[tokens]
            label = "1 token" if tokens == 1 else f"{tokens} tokens"
            shares = {bits: entry["results"][f"gq/{bits}"].get("floor_share") for bits in entry["case"]["bits"]}
            points = [(bits, 100 * share) for bits, share in shares.items() if share is not None]
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=5, linewidth=1.4)
    axes.set_xticks(range(1, 9))
    axes.set_xlabel("bits", fontsize=9)
    return FLOOR_MODES[mode]


def _fullest(row: list[Axes]) -> Axes:
    return max(row, key=lambda axes: len(axes.lines))


def _in_first_mode(cases: list[dict], modes: dict[str, str]) -> tuple[str, list[dict]]:
    """The first of ``modes`` in which there are cases, and those cases by tokens."""
    mode = next(mode for mode in modes if any(entry["case"]["mode"] == mode for entry in cases))
    found = [entry for entry in cases if entry["case"]["mode"] == mode]
    return mode, sorted(found, key=lambda entry: entry["case"]["m"])


def _title(shape: str, how: str) -> str:
    return f"{shape}, {how}" if how else shape


if __name__ == "__main__":
    style.command(draw)()
