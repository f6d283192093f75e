"""The goals that were set for streaming recognition on one core with AVX-512 VNNI, held against a record of
benchmarks/streaming.py.

    python benchmarks/streaming_goals.py benchmarks/results/<device>/streaming.json

Each wants one contender to have so many percent less of something than another. Beside a wait stands its floor: how
much less there could be at best, if nothing but the reading of weights were left to be done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from goals import Outcome, command, told


class Goal(NamedTuple):
    """That ``own`` has at least ``least`` percent less than ``other`` of ``what``: "memory" or "wait"."""

    what: str
    least: float
    own: str
    other: str


FIGURES: dict[str, tuple[str, Callable[[dict], float]]] = {
    "memory": ("memory of the model in the process", lambda result: result["model_bytes"]),
    "wait": ("P90 user-perceived latency", lambda result: result["upl_ms"]["p90"]),
}
KINDS = ("gq int8", "gq", "runner gq int8", "runner gq")
GOALS = [
    goal
    for kind in KINDS
    for goal in (
        Goal("memory", 30.73, f"{kind}/5", f"{kind}/8"),
        Goal("wait", 31.75, f"{kind}/5", f"{kind}/8"),
        Goal("wait", 60.0, f"{kind}/5", "torch int8"),
    )
]


def outcomes(record: dict) -> list[Outcome]:
    """How the record stands to every goal."""
    return [_outcome(goal, record) for goal in GOALS]


def _outcome(goal: Goal, record: dict) -> Outcome:
    name, figure = FIGURES[goal.what]
    cells = [
        (_less(figure(results[goal.own]), figure(results[goal.other])), entry["case"], results)
        for entry in record["cases"]
        for results in [entry["results"]]
        if entry["case"]["threads"] == 1 and _measured(results, goal.own, goal.other)
    ]
    cells.sort(key=lambda cell: cell[0])
    missed = [f"{value:.3g}  {', '.join(map(str, case.values()))}" for value, case, _ in cells if value < goal.least]
    what = f"{goal.own} beside {goal.other}, {name}: percent less"
    notes = _floor(goal, cells[0][2]) if cells and goal.what == "wait" else ""
    return Outcome(what, goal.least, cells[0][0] if cells else None, len(cells), missed, notes)


def _measured(results: dict, *names: str) -> bool:
    return all("upl_ms" in results.get(name, {}) for name in names)


def _floor(goal: Goal, results: dict) -> str:
    least = _less(results[goal.own]["floor_ms"]["p90"], results[goal.other]["upl_ms"]["p90"])
    return f"{least:.3g} if weights were but read"


def _less(own: float, other: float) -> float:
    return 100 * (1 - own / other)


def summary(record: dict) -> str:
    """The outcomes as text, every cell that misses its goal on a line of its own."""
    return told(outcomes(record))


main = command(summary)


if __name__ == "__main__":
    main()
