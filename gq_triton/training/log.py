"""Metrics by step, as a CSV file and optionally as TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path

__all__ = ["MetricLog"]

COLUMNS = ("step", "name", "value")


class MetricLog:
    """Appends rows ``step,name,value`` to ``folder/metrics.csv``.

    Args:
        folder: made where it is missing.
        step: the step that training goes on from; rows of later steps, left by a run that was killed, are dropped.
        tensorboard: whether to write the same values as events under ``folder/tensorboard``.

    Raises:
        ModuleNotFoundError: tensorboard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, step: int = 0, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.csv"
        kept = [row for row in read_metrics(path) if row[0] < step]
        self._file = open(path, "w", newline="")  # noqa: SIM115
        self._csv = csv.writer(self._file)
        self._csv.writerows([COLUMNS, *kept])
        self._events = _event_writer(folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._csv.writerows((step, name, value) for name, value in values.items())
        self._file.flush()
        for name, value in values.items() if self._events else ():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def read_metrics(path: Path) -> list[tuple[int, str, float]]:
    """The complete rows of a metrics file; none where it does not exist."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.reader(file) if len(row) == len(COLUMNS)]
    return [(int(step), name, float(value)) for step, name, value in rows[1:] if value]


def _event_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a TensorBoard log needs the package: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step)
