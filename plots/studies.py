"""What figures of studies have in common: rows of a record of which all folds were run."""

from __future__ import annotations

from collections.abc import Sequence


def complete(lines: Sequence[dict], folds: int) -> list[dict]:
    """Those of as many folds: with fewer, they were measured on other speakers."""
    return [line for line in lines if line["folds"] == folds]


def heading(record: dict, folds: int, left_out: int) -> str:
    """What was asked, on whom it was measured, and how many rows are not shown as they are incomplete."""
    text = f"{record['question']}\nSpeakers held out, {folds} fold{'' if folds == 1 else 's'}"
    return f"{text}; left out as incomplete: {left_out} row{'' if left_out == 1 else 's'}" if left_out else text
