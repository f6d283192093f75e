"""Draws what low-bit layers take on a CPU from a record of benchmarks/cpu_kernels.py.

python plots/cpu_kernels.py benchmarks/results/<device>/cpu_kernels.json   # -> plots/<device>/cpu_kernels.png
"""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path

import style
from matplotlib.axes import Axes

WIDTHS = (1, 2, 3, 4, 5, 8, 16, 32)
SERIES = {  # contender: label, colour, marker
    "gq int8": ("GQ, int8 activations", style.BLUE, "o"),
    "native int8": ("GQ, int8 activations, the kernel alone", "#00456b", "."),
    "gq": ("GQ, float activations", style.SKY, "s"),
    "torch fp32": ("torch float32", style.BLACK, "*"),
    "torch bf16": ("torch bfloat16", style.GREY, "*"),
    "torch int8": ("torch dynamic int8", style.GREEN, "P"),
    "torch int4": ("torch int4", style.PURPLE, "X"),
    "onnxruntime int8": ("onnxruntime int8", style.VERMILION, "<"),
    "onnxruntime nbits": ("onnxruntime MatMulNBits", style.ORANGE, ">"),
}
PLACES = {"L2": "one, in the L2 cache", "cache": "{} in turn, in a cache", "memory": "out of memory"}


def draw(record: dict, path: Path) -> None:
    """Time against bits, one token and one thread: linear layers in each place above, LSTM steps below."""
    cases = [entry for entry in record["cases"] if (entry["case"]["m"], entry["case"]["threads"]) == (1, 1)]
    linear = _first_of_each([entry for entry in cases if entry["case"]["op"] == "linear"], "place")
    lstm = _first_of_each([entry for entry in cases if entry["case"]["op"] == "lstm"], "k")
    columns = max(len(linear), len(lstm))
    figure, rows = style.figure(2, columns, (3.6 * columns, 7.2))
    for row, entries in zip(rows, (linear, lstm), strict=True):
        row[0].set_ylabel("microseconds (logarithmic)", fontsize=9)
        for axes, entry in zip_longest(row, entries):
            if entry:
                draw_times(axes, entry["case"], entry["results"])
            else:
                axes.set_visible(False)
    style.legend(figure, rows[0][0], 3)
    style.caption(figure, record, "One token through a linear layer (above) and an LSTM layer (below), one thread")
    style.save(figure, path)


def _first_of_each(entries: list[dict], key: str) -> list[dict]:
    found: dict[object, dict] = {}
    for entry in entries:
        found.setdefault(entry["case"][key], entry)
    return list(found.values())


def draw_times(axes: Axes, case: dict, results: dict[str, dict]) -> None:
    """Microseconds of each contender at its widths, and those of a plain read of as many bytes."""
    timed = {name: result for name, result in results.items() if "ms" in result}
    for kind, (label, color, marker) in SERIES.items():
        names = {bits: f"{kind}/{bits}" for bits in WIDTHS}
        times = {bits: 1e3 * timed[name]["ms"]["median"] for bits, name in names.items() if name in timed}
        axes.plot(list(times), list(times.values()), label=label, color=color, marker=marker, linewidth=1.4)
    read = min(timed[name]["ms"]["median"] for name in ("read sum", "read dot"))
    floor = [1e3 * read * bits / 8 for bits in WIDTHS]
    axes.plot(WIDTHS, floor, label="plain read of the codes", color=style.BLACK, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xscale("log", base=2)
    axes.set_xticks(WIDTHS, map(str, WIDTHS))
    axes.set_xlabel("bits a weight (logarithmic)", fontsize=9)
    axes.set_title(_title(case, timed), fontsize=9)


def _title(case: dict, timed: dict[str, dict]) -> str:
    layers = timed["read sum"]["layers"]
    where = PLACES[case["place"]].format(layers)
    if case["op"] == "lstm":
        return f"LSTM, {case['k']} to {case['n']}, {where}"
    return f"{case['n']} x {case['k']}, {where}"


if __name__ == "__main__":
    style.command(draw)()
