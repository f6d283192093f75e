"""Figures of the quickstart and of `allocate`."""

from __future__ import annotations

import itertools
from pathlib import Path

from gq_triton.allocation import Allocation, Sensitivity
from gq_triton.files import write_atomically
from gq_triton.speech.extras import require

__all__ = ["plot_error_rates", "plot_sensitivity", "plot_sizes"]

FLOAT, UNTRAINED, TRAINED = "#555555", "#d95f02", "#1b9e77"
NEGLIGIBLE_CHANGE = 1e-4  # of a loss, in nats per token; smaller ones get the same colour
SERIES = (  # offset of the bar, key in a row of the summary, label, colour
    (-0.2, "ptq", "post-training quantization", UNTRAINED),
    (0.2, "qat", "quantization-aware training", TRAINED),
)


def plot_error_rates(path: Path, summary: dict) -> None:
    """Bars of the word error rate after post-training quantization and after training, with 95 % intervals, and the
    float model's line."""
    rows, float_wer = summary["rows"], 100 * summary["float"]["wer"]
    figure, axes = _axes(summary)
    places = range(len(rows))
    for offset, key, label, color in SERIES:
        values = [100 * row[f"{key}_wer"] for row in rows]
        ends = [[100 * end for end in row[f"{key}_interval"]] for row in rows]
        errors = [
            [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)],
            [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)],
        ]
        left = [place + offset for place in places]
        bars = axes.bar(left, values, width=0.38, label=label, color=color, yerr=errors, ecolor=FLOAT, capsize=3)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, label_type="center", color="white")
    axes.axhline(float_wer, color=FLOAT, linestyle="--", label=f"float32 ({float_wer:.1f} %)")
    axes.set_xticks(list(places), [f"{_wrapped(row['name'])}\n{row['ratio']:.1f}x smaller" for row in rows])
    axes.legend()
    _save(figure, path)


def plot_sizes(path: Path, summary: dict) -> None:
    """Word error rate over size: what each byte buys."""
    rows, unquantized = summary["rows"], summary["float"]
    figure, axes = _axes(summary)
    axes.scatter([unquantized["bytes"] / 1e3], [100 * unquantized["wer"]], color=FLOAT, label="float32")
    for _, key, label, color in SERIES:
        sizes, errors = [row["bytes"] / 1e3 for row in rows], [100 * row[f"{key}_wer"] for row in rows]
        axes.scatter(sizes, errors, color=color, label=label)
    for row, below in zip(sorted(rows, key=lambda row: row["bytes"]), itertools.cycle((True, False))):
        place = (row["bytes"] / 1e3, 100 * row["qat_wer"])
        axes.annotate(row["name"], place, textcoords="offset points", xytext=(4, -12 if below else 5), fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "quickstart").LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("size of the weights (kB, logarithmic)")
    axes.legend()
    _save(figure, path)


def plot_sensitivity(path: Path, measured: Sensitivity, chosen: Allocation) -> None:
    """A table of weights and widths, coloured by the change of the loss; the chosen widths are framed."""
    plt = _pyplot()
    widths = list(measured.units[0].losses)
    changes = [[unit.losses[bits] - measured.loss for bits in widths] for unit in measured.units]
    largest = max(max(map(max, changes)), NEGLIGIBLE_CHANGE * 10)
    shown = [[min(max(change, NEGLIGIBLE_CHANGE), largest) for change in row] for row in changes]
    figure, axes = plt.subplots(figsize=(3 + 0.75 * len(widths), 1.4 + 0.27 * len(changes)), layout="constrained")
    image = axes.imshow(shown, cmap="YlOrRd", norm="log", vmin=NEGLIGIBLE_CHANGE, vmax=largest, aspect="auto")
    for row, unit in enumerate(measured.units):
        for column, bits in enumerate(widths):
            dark = shown[row][column] > (NEGLIGIBLE_CHANGE * largest**3) ** 0.25
            text = dict(ha="center", va="center", fontsize=7, color="white" if dark else "black")
            axes.text(column, row, f"{changes[row][column]:+.4f}", **text)
            if chosen.bits[unit.names[0]] == bits:
                axes.add_patch(plt.Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, fill=False, linewidth=1.6))
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.set_yticks(range(len(changes)), [unit.names[0] for unit in measured.units], fontsize=8)
    axes.set_xlabel(f"bits; framed: chosen for {chosen.bytes:,} bytes")
    axes.set_title(f"change of the loss ({measured.loss:.4f}) with one weight quantized, untrained", fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, extend="min", label="nats per token")
    _save(figure, path)


def _pyplot():
    require("matplotlib", "quickstart").use("Agg")
    return require("matplotlib.pyplot", "quickstart")


def _axes(summary: dict):
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    test, device = summary["test"], summary["device"]
    axes.set_title(
        f"{summary['data']}: {test['words']} words of unheard voices\n{device}, {summary['date']}", fontsize=9
    )
    axes.set_ylabel("word error rate (%)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    require("matplotlib.pyplot", "quickstart").close(figure)


def _wrapped(name: str) -> str:
    return name.replace(", ", ",\n")
