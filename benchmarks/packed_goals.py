"""The goals that were set for packed linear layers on one H100, held against a record of benchmarks/packed_linear.py.

    python benchmarks/packed_goals.py benchmarks/results/<device>/packed_linear.json

A cell is one contender in one case. A goal wants every one of its cells to reach a number, and is told by the worst of
them; of peers, it is the geometric mean over cells that must be above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from goals import Outcome, command, told

PEERS = {  # the peer, and who stands against it
    "torch int8/8": "gq int8/8",
    "torch int4/4": "gq/4",
    "gemlite int4/4": "gq/4",
    "bitsandbytes nf4/4": "gq/4",
}


class Cell(NamedTuple):
    """One contender of this project in one case; ``value`` is what its goal looks at."""

    n: int
    k: int
    m: int
    mode: str
    kind: str  # gq, gq int8 or gq fp8
    bits: int
    value: float = 0.0

    def __str__(self) -> str:
        name = f"{self.kind}/{self.bits}"
        return f"{self.value:.3g}  {self.n} x {self.k}, M = {self.m}, {self.mode}, {name}"


class Goal(NamedTuple):
    """That ``figure`` of the results is at least ``least`` in every cell that ``counts``."""

    what: str
    least: float
    figure: str
    counts: Callable[[Cell], bool]


def _large(cell: Cell) -> bool:
    return min(cell.n, cell.k) >= 8192 and cell.mode == "cold" and cell.kind == "gq"


def _asr(cell: Cell) -> bool:
    within = min(cell.n, cell.k) >= 512 and max(cell.n, cell.k) <= 2048
    return within and cell.m <= 16 and cell.mode == "warm graph" and cell.kind == "gq"


GOALS = (
    Goal("M = 1, 8192 x 8192 and larger, cold, 4 bits: times as fast as torch bf16", 3.5, "speedup",
         lambda cell: _large(cell) and cell.m == 1 and cell.bits == 4),
    Goal("M = 1, 8192 x 8192 and larger, cold, 2 bits: times as fast as torch bf16", 6.0, "speedup",
         lambda cell: _large(cell) and cell.m == 1 and cell.bits == 2),
    Goal("M = 1, 8192 x 8192 and larger, cold, 1 bit: times as fast as torch bf16", 9.0, "speedup",
         lambda cell: _large(cell) and cell.m == 1 and cell.bits == 1),
    Goal("M = 1, every size, cold: share of the floor", 0.8, "floor_share",
         lambda cell: cell.m == 1 and cell.mode == "cold" and cell.kind == "gq"),
    Goal("M = 16..32, 8192 x 8192 and larger, cold, 4 bits: times as fast as torch bf16", 3.5, "speedup",
         lambda cell: _large(cell) and 16 <= cell.m <= 32 and cell.bits == 4),
    Goal("512..2048, M = 1..16, warm, CUDA graph: times as fast as torch bf16", 1.0, "speedup", _asr),
    Goal("the same from 1024 x 1024 weights up, 4 bits and below", 1.3, "speedup",
         lambda cell: _asr(cell) and cell.n * cell.k >= 1024**2 and cell.bits <= 4),
    Goal("M >= 1024, weight-only: times as fast as torch bf16", 0.9, "speedup",
         lambda cell: cell.m >= 1024 and cell.kind == "gq"),
    Goal("M >= 1024, 8-bit activations: times as fast as torch bf16", 1.5, "speedup",
         lambda cell: cell.m >= 1024 and cell.kind != "gq"),
)  # fmt: skip


def outcomes(record: dict) -> list[Outcome]:
    """How the record stands to every goal."""
    return [_outcome(goal, record) for goal in GOALS] + [_beside(peer, record) for peer in PEERS]


def _outcome(goal: Goal, record: dict) -> Outcome:
    cells = [cell for cell in _cells(record, goal.figure) if goal.counts(cell)]
    worst = min((cell.value for cell in cells), default=None)
    return Outcome(goal.what, goal.least, worst, len(cells), _below(cells, goal.least))


def _beside(peer: str, record: dict) -> Outcome:
    own = PEERS[peer]
    what = f"{own} beside {peer}: times as fast, geometric mean"
    pairs = [
        (entry["case"], entry["results"].get(own, {}), entry["results"].get(peer, {})) for entry in record["cases"]
    ]
    pairs = [(case, one, other) for case, one, other in pairs if "ms" in one and "ms" in other]
    if not pairs:
        return Outcome(what, 1.0, None, 0, [])
    cells = [_cell(case, own, other["ms"]["median"] / one["ms"]["median"]) for case, one, other in pairs]
    errors = [np.mean([result["error"] for result in column]) for column in list(zip(*pairs, strict=True))[1:]]
    notes = f"mean error {errors[0]:.3g} beside {errors[1]:.3g}"
    return Outcome(what, 1.0, _geometric_mean(cells), len(cells), _below(cells, 1.0), notes)


def _cells(record: dict, figure: str) -> Iterator[Cell]:
    for entry in record["cases"]:
        for name, result in entry["results"].items():
            if name.startswith("gq") and figure in result:
                yield _cell(entry["case"], name, result[figure])


def _cell(case: dict, name: str, value: float) -> Cell:
    kind, bits = name.split("/")
    return Cell(case["n"], case["k"], case["m"], case["mode"], kind, int(bits), value)


def _below(cells: list[Cell], least: float) -> list[Cell]:
    return sorted((cell for cell in cells if cell.value < least), key=lambda cell: cell.value)


def _geometric_mean(cells: list[Cell]) -> float:
    return float(np.exp(np.mean([np.log(cell.value) for cell in cells])))


def summary(record: dict) -> str:
    """The outcomes as text, every cell that misses its goal on a line of its own."""
    return told(outcomes(record))


main = command(summary)


if __name__ == "__main__":
    main()
