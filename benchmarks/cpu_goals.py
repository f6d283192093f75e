"""The goals that were set for one token through low-bit weights on a CPU, one thread, held against a record of
benchmarks/cpu_kernels.py.

    python benchmarks/cpu_goals.py benchmarks/results/<device>/cpu_kernels.json

They are for the native integer kernels on x86 with AVX-512 VNNI, out of memory and, for every matrix of the recognizer
that is measured there, in a cache. All of them are ratios of times in the same turns, against own 8-bit layers, torch's
dynamically quantized ones, and float32. A goal is told by the worst of its cells.
"""

from __future__ import annotations

from typing import NamedTuple

from goals import Outcome, command, told

KINDS = ("gq int8", "native int8")  # as an operator of torch, and the kernel alone
NOISE = 0.97  # of two times, from one run to the next: what is within it is no slower


class Goal(NamedTuple):
    """That layers of ``bits`` are ``least`` times as fast, by a ``figure`` of the results, in a ``place``."""

    what: str
    least: float
    figure: str
    bits: int
    place: str


def _in_proportion(bits: int) -> Goal:
    """Within 10 %: a layer has scales and a start, too."""
    what = f"{bits}-bit GEMV, out of memory: times as fast as own 8-bit, 0.9 of the ratio of bytes"
    return Goal(what, 0.9 * 8 / bits, "over_own_8bit", bits, "memory")


def _no_slower(bits: int) -> Goal:
    return Goal(f"{bits}-bit GEMV, in a cache: times as fast as own 8-bit", NOISE, "over_own_8bit", bits, "cache")


GOALS = (
    Goal("4-bit GEMV, out of memory: times as fast as own 8-bit", 1.75, "over_own_8bit", 4, "memory"),
    Goal("4-bit GEMV, out of memory: times as fast as torch dynamic int8", 3.5, "over_torch_int8", 4, "memory"),
    Goal("4-bit GEMV, out of memory: times as fast as torch float32", 12, "over_torch_fp32", 4, "memory"),
    Goal("2-bit GEMV, out of memory: times as fast as own 8-bit", 3, "over_own_8bit", 2, "memory"),
    Goal("2-bit GEMV, out of memory: times as fast as torch dynamic int8", 6.5, "over_torch_int8", 2, "memory"),
    _in_proportion(5),
    _in_proportion(1),
    _no_slower(5),
    _no_slower(1),
)


def outcomes(record: dict) -> list[Outcome]:
    """How the record stands to every goal."""
    return [_outcome(goal, record) for goal in GOALS]


def _outcome(goal: Goal, record: dict) -> Outcome:
    cells = []
    for entry in record["cases"]:
        for kind in KINDS:
            result = entry["results"].get(f"{kind}/{goal.bits}", {})
            if _counts(entry["case"], goal) and goal.figure in result:
                cells.append((result[goal.figure], f"{entry['case']['n']} x {entry['case']['k']}, {kind}"))
    cells.sort()
    missed = [f"{value:.3g}  {where}" for value, where in cells if value < goal.least]
    return Outcome(goal.what, goal.least, cells[0][0] if cells else None, len(cells), missed)


def _counts(case: dict, goal: Goal) -> bool:
    return (case["op"], case["m"], case["threads"], case["place"]) == ("linear", 1, 1, goal.place)


def summary(record: dict) -> str:
    """The outcomes as text, every cell that misses its goal on a line of its own."""
    return told(outcomes(record))


main = command(summary)


if __name__ == "__main__":
    main()
