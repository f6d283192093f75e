"""What streaming.py has recognizers emit, so that all do the same work.

A variant is a dictionary with, among others, ``label_frames``, the frames of the encoder for each label;
``subsampling``, the feature frames for each of the encoder; and ``vocab_size``, the labels with the blank. It may have
``switch_seconds``, the end of the wake word, which a small encoder takes.
"""

from __future__ import annotations

from gq_triton.speech.mel import HOP, SAMPLE_RATE, WINDOW

BLANK = 0


def forced_labels(first: int, frames: int, count: int, variant: dict) -> list[int]:
    """The choice at each of ``frames`` neighbouring frames of the encoder, of an utterance that has ``count`` labels:
    one label every ``label_frames``, blanks between."""
    label = 1 + 37 * count % (variant["vocab_size"] - 1)  # from all over the embedding
    ends = ((first + place + 1) // variant["label_frames"] for place in range(frames))
    return [label if end > count else BLANK for end in ends]


def first_label_spoken(variant: dict) -> float:
    """Seconds of audio that end with the frame of the first label."""
    frames = variant["label_frames"] * variant["subsampling"]
    return (WINDOW + (frames - 1) * HOP) / SAMPLE_RATE


def frames_within(samples: int) -> int:
    """Feature frames in so many samples."""
    return max(0, (samples - WINDOW) // HOP + 1)
