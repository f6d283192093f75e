"""Draws how long one waits for streaming recognizers, and their memory, from a record of benchmarks/streaming.py.

python plots/streaming.py benchmarks/results/<device>/streaming.json   # -> plots/<device>/streaming.png
"""

from __future__ import annotations

from pathlib import Path

import style
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

RUNTIMES = {  # by the beginning of a contender's name: label, colour, place within a precision's row
    "torch ": ("torch's own layers", style.GREY, 0.0),
    "gq": ("GQ on torch", style.BLUE, -0.18),
    "runner ": ("GQ without torch", style.VERMILION, 0.18),
}
PRECISIONS = {"torch fp32": "float32", "torch bf16": "bfloat16", "torch int8": "dynamic int8"}
MODELS = {"rnnt": "RNN transducer", "bifocal": "bifocal RNN transducer"}
WIDTH = 0.3  # of a bar, in rows
MIB = 2**20


def draw(record: dict, path: Path) -> None:
    """A row of two axes for each case: waits, and memory."""
    cases = [entry | {"results": measured(entry["results"])} for entry in record["cases"]]
    heights = [1.0 + 0.42 * len(rows(entry["results"])) for entry in cases]
    figure, grid = style.figure(len(cases), 2, (10, 1.2 + sum(heights)), gridspec_kw={"height_ratios": heights})
    for (waits, memory), entry in zip(grid, cases, strict=True):
        draw_waits(waits, entry["results"])
        draw_memory(memory, entry["results"])
        waits.set_title(title(entry["case"]), fontsize=9, loc="left")
        for axes in (waits, memory):
            label_rows(axes, rows(entry["results"]))
    grid[-1][0].set_xlabel("end of speech to final result (ms, logarithmic)", fontsize=9)
    grid[-1][1].set_xlabel("memory (MiB)", fontsize=9)
    style.legend(figure, grid[0][0], 6)
    seconds = record["settings"]["played"].values()
    about = f"{len(seconds)} utterances of {min(seconds):.1f} to {max(seconds):.1f} s, played as they were spoken"
    style.caption(figure, record, f"Streaming recognizers of 60 million weights: {about}")
    style.save(figure, path)


def measured(results: dict) -> dict:
    return {name: result for name, result in results.items() if "upl_ms" in result}


def rows(results: dict) -> list[str]:
    """The precisions of a case, from top to bottom."""
    return list(dict.fromkeys(name.removeprefix("runner ") for name in results))


def draw_waits(axes: Axes, results: dict) -> None:
    """A dot for each utterance, bars at P50 and P90, and the floor of P90."""
    for name, result in results.items():
        color, place = look(results, name)
        waits = result["samples"]["upl_ms"]
        p50, p90, floor = result["upl_ms"]["p50"], result["upl_ms"]["p90"], result["floor_ms"]["p90"]
        axes.plot(waits, [place] * len(waits), "o", color=color, markersize=3, alpha=0.35, linewidth=0)
        axes.plot([p50, p50], [place - WIDTH / 2, place + WIDTH / 2], color=color, linewidth=1.5)
        axes.plot([p90, p90], [place - WIDTH / 2, place + WIDTH / 2], color=color, linewidth=3.5)
        axes.plot([floor], [place], marker="|", color=style.BLACK, markersize=6, linewidth=0)
        axes.annotate(
            f"{p90:.3g}", (max(waits), place), (5, 0), textcoords="offset points", va="center", fontsize=7, color=color
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(right=1.3 * max(max(result["samples"]["upl_ms"]) for result in results.values()))
    for prefix, (label, color, _) in RUNTIMES.items():
        if any(name.startswith(prefix) for name in results):
            axes.plot([], [], "s", color=color, label=label)
    axes.plot([], [], color=style.BLACK, linewidth=1.5, label="P50")
    axes.plot([], [], color=style.BLACK, linewidth=3.5, label="P90")
    axes.plot([], [], "|", color=style.BLACK, label="reading weights alone")


def draw_memory(axes: Axes, results: dict) -> None:
    """The model's memory in the process, its weights', and the whole process's where there is no torch."""
    for name, result in results.items():
        color, place = look(results, name)
        size = result["model_bytes"] / MIB
        axes.barh(place, size, WIDTH, color=color)
        axes.plot([result["weight_bytes"] / MIB], [place], marker="|", color=style.BLACK, markersize=6)
        whole = f" ({result['process_bytes'] / MIB:.0f} with all else)" if name.startswith("runner ") else ""
        axes.text(size, place, f" {size:.0f}{whole}", va="center", fontsize=7, color=color)
    axes.set_xlim(0, 1.15 * max(result["model_bytes"] for result in results.values()) / MIB)
    axes.set_title("model in the process; black: its weights", fontsize=9, loc="left")


def look(results: dict, name: str) -> tuple[str, float]:
    """Colour and place of a contender."""
    _, color, offset = next(runtime for prefix, runtime in RUNTIMES.items() if name.startswith(prefix))
    return color, rows(results).index(name.removeprefix("runner ")) + offset


def label_rows(axes: Axes, precisions: list[str]) -> None:
    axes.set_yticks(range(len(precisions)), [precision_label(name) for name in precisions], fontsize=8)
    axes.set_ylim(len(precisions) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color="#e5e5e5", linewidth=0.7)


def precision_label(name: str) -> str:
    """`gq int8/5` in words."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    kind, bits = name.split("/")
    width = "1 and 5 bits" if bits == "mixed" else f"{bits} bits"
    return width + (", integers" if kind == "gq int8" else ", floats")


def title(case: dict) -> str:
    threads = f"{case['threads']} thread" + ("s" if case["threads"] > 1 else "")
    return f"{MODELS.get(case['model'], case['model'])}, {threads}, chunks of {case['chunk_ms']} ms"


if __name__ == "__main__":
    style.command(draw)()
