"""Accuracy studies on recorded speech: what quantization costs in words, with intervals, against float and rivals."""

from .design import FLOAT, LONGER, Cell, Study, Variant, speaker_folds
from .run import Runner
from .statistics import Difference, difference, interval, rate
from .summary import Line, summarize

__all__ = [
    "FLOAT",
    "LONGER",
    "Cell",
    "Difference",
    "Line",
    "Runner",
    "Study",
    "Variant",
    "difference",
    "interval",
    "rate",
    "speaker_folds",
    "summarize",
]
