"""Draws where the time of training steps goes from a record of benchmarks/training_step.py.

python plots/training_step.py benchmarks/results/<device>/training_step.json   # -> plots/<device>/training_step.png
"""

from __future__ import annotations

from pathlib import Path

import style
from matplotlib.axes import Axes

KINDS = {
    "quantizer": style.VERMILION,
    "GEMM": style.BLUE,
    "recurrent": style.SKY,
    "convolution": style.GREEN,
    "attention": style.PURPLE,
    "loss": style.ORANGE,
    "optimizer": style.YELLOW,
    "other": style.GREY,
    "outside": style.PALE,
}
NAMES = {"float": "float", "gq": "GQ", "torchao": "torchao", "plain": "plain form"}


def draw(record: dict, path: Path) -> None:
    """A bar for each contender, a row of them for each model."""
    cases, bits = record["cases"], record["settings"]["bits"]
    figure, rows = style.figure(len(cases), 1, (9, 1.1 + 1.5 * len(cases)))
    for (axes,), entry in zip(rows, cases, strict=True):
        draw_model(axes, entry["results"])
        axes.set_title(_title(entry["case"]["model"], record["settings"]), fontsize=9, loc="left")
    rows[-1][0].set_xlabel("milliseconds a step", fontsize=9)
    style.legend(figure, rows[0][0], len(KINDS))
    style.caption(figure, record, f"Training steps, all weights at {bits} bits; `outside` is time in no operator")
    style.save(figure, path)


def draw_model(axes: Axes, results: dict) -> None:
    """Bars; the plain form's runs out of the axes where it would make the others too small to read."""
    timed = {name: result for name, result in results.items() if "ms" in result}
    totals = {name: sum(result["kinds_ms"].values()) for name, result in timed.items()}
    limit = 1.3 * max(total for name, total in totals.items() if name != "plain")
    for place, name in enumerate(timed):
        left = 0.0
        for kind, color in KINDS.items():
            width = timed[name]["kinds_ms"][kind]
            axes.barh(place, width, left=left, color=color, label=kind if place == 0 else None)
            left += width
        step = timed[name]["ms"]["median"]
        text = f" {step:,.0f} ms" if step >= 100 else f" {step:.3g} ms"
        if totals[name] <= limit:
            axes.text(totals[name], place, text, va="center", fontsize=8)
        else:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(0.98 * limit, place, f"{text} →", va="center", ha="right", fontsize=8, bbox=box)
    axes.set_xlim(0, limit)
    axes.set_yticks(range(len(timed)), [_label(name, result) for name, result in timed.items()], fontsize=8)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _label(name: str, result: dict) -> str:
    share = result["quantized_weights"] / result["weights"]
    return NAMES[name] + (f", {share:.0%} of weights" if 0 < share < 0.995 else "")


def _title(model: str, settings: dict) -> str:
    workload = next(each for each in settings["workloads"] if each["model"] == model)
    name = f"{'Conformer' if model.startswith('conformer') else 'RNN'} transducer `{model}`"
    seconds = workload["frames"] / 100
    return f"{name}, {workload['batch']} x {seconds:g} s of speech"


if __name__ == "__main__":
    style.command(draw)()
