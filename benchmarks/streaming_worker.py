"""Plays utterances to one recognizer, in a process of its own; streaming.py starts one for each contender.

Requests come as lines of JSON on standard input, and one answer to each goes to standard output: `{"load": variant}`,
`{"play": file of samples}`, `{"memory": null}`. What fails is answered by `{"absent": why}`. torch is imported only for
a recognizer that runs on it, and nothing else that the recognizer does not need: the process is what is measured.

Memory is what Linux says in /proc. What loading left behind is given back to the system before it is looked at, for all
alike: some recognizers are made from a float model here, which a device would not do.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from streaming_schedule import first_label_spoken, frames_within

from gq_triton.kernels import native
from gq_triton.speech.mel import SAMPLE_RATE

BLOCK = SAMPLE_RATE // 50  # samples that a microphone hands over at a time: 20 ms
LEAD = 0.05  # seconds from a request to the first sample
MEMORY = {"rss": ("Rss",), "pss": ("Pss",), "private": ("Private_Clean", "Private_Dirty"), "anonymous": ("Anonymous",)}


# --- playing ----------------------------------------------------------------------------------------------------------


def play(recognizer: Streaming, samples: np.ndarray, variant: dict) -> dict:
    """Hands over blocks as a microphone does, each when its last sample has been spoken; returns what was seen.

    Returns:
        ``upl_ms``, from the last sample to the final result; ``first_partial_ms``, from the end of the first label's
        frame to the first result that has it; ``chunks_ms``, of each call that had the encoder advance before the end;
        ``compute_s``, of all calls; ``audio_s``; ``left_calls``, how many calls of the encoder were left when the last
        block came; ``labels``, how many came, and ``wanted_labels``; ``late_ms``, how late after a block's last sample
        the process woke up, in the middle; ``logits``, those of the last label.
    """
    recognizer.restart()
    start = time.perf_counter() + LEAD
    chunk_frames, heard, before = variant["chunk_frames"], 0, 0
    chunks, late, compute, first = [], [], 0.0, None
    for block in np.split(samples, range(BLOCK, len(samples), BLOCK)):
        before, heard = frames_within(heard) // chunk_frames, heard + len(block)
        arrival = start + heard / SAMPLE_RATE
        slept = sleep_until(arrival)
        began = time.perf_counter()
        labels = recognizer.push(block)
        ended = time.perf_counter()
        compute += ended - began
        if slept:
            late.append(began - arrival)
        if frames_within(heard) // chunk_frames > before:
            chunks.append(ended - began)
        if labels and first is None:
            first = ended
    began = time.perf_counter()
    labels = recognizer.finish()
    ended = time.perf_counter()
    encoder_frames = frames_within(heard + variant["tail_samples"]) // variant["subsampling"]
    done = frames_within(heard) // chunk_frames
    return {
        "audio_s": heard / SAMPLE_RATE,
        "upl_ms": 1e3 * (ended - start - heard / SAMPLE_RATE),
        "first_partial_ms": 1e3 * ((first or ended) - start - first_label_spoken(variant)),
        "chunks_ms": [1e3 * chunk for chunk in chunks],
        "compute_s": compute + ended - began,
        "left_calls": done - before + (encoder_frames * variant["subsampling"] > done * chunk_frames),
        "labels": labels,
        "wanted_labels": encoder_frames // variant["label_frames"],
        "late_ms": 1e3 * float(np.median(late or [0.0])),
        "logits": recognizer.logits.tolist(),
    }


def sleep_until(moment: float) -> bool:
    """Whether there was time to sleep."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
    return left > 0


# --- memory -----------------------------------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    """Bytes of this process: resident, its share of them, its own alone, those of no file; and the most resident."""
    rollup, status = (fields(Path("/proc/self") / name) for name in ("smaps_rollup", "status"))
    return {name: sum(rollup[each] for each in parts) for name, parts in MEMORY.items()} | {"peak": status["VmHWM"]}


def fields(path: Path) -> dict[str, int]:
    """Bytes, of lines such as `Rss:  1234 kB`."""
    found = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in found if words[2:] == ["kB"]}


def trim() -> None:
    """Gives freed memory back to the system, where the C library can."""
    gc.collect()
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)


# --- recognizers ------------------------------------------------------------------------------------------------------


class Streaming(Protocol):
    """A recognizer that emits what it is forced to.

    Attributes:
        logits: of the last label, (vocab_size,).
        weight_bytes: of its weights, in memory.
    """

    logits: np.ndarray
    weight_bytes: int

    def restart(self) -> None:
        """Before an utterance."""

    def push(self, samples: np.ndarray) -> int:
        """Takes a block; the number of labels so far."""

    def finish(self) -> int:
        """Ends an utterance; the number of its labels."""


def on_torch() -> Callable[[dict], Streaming]:
    """Imports what recognizers on torch need, and returns what loads one."""
    import streaming_on_torch

    return streaming_on_torch.OnTorch


def on_runner() -> Callable[[dict], Streaming]:
    """The same without torch."""
    import streaming_on_runner

    return streaming_on_runner.OnRunner


RUNTIMES = {"torch": on_torch, "runner": on_runner}


class Session:
    """Answers requests."""

    def load(self, variant: dict) -> dict:
        """Memory before and after; the recognizer's weights; the instruction set of the native kernels."""
        make = RUNTIMES[variant["runtime"]]()
        trim()
        idle = memory()
        self.variant, self.recognizer = variant, make(variant)
        trim()
        gc.freeze()
        return {
            "idle": idle,
            "loaded": memory(),
            "weight_bytes": self.recognizer.weight_bytes,
            "isa": native.isa(),
        }

    def play(self, path: str) -> dict:
        samples = np.load(path)
        gc.collect()
        return play(self.recognizer, samples, self.variant)

    def memory(self, _: None) -> dict:
        trim()
        return memory()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not come between them
    session = Session()
    for line in sys.stdin:
        ((request, argument),) = json.loads(line).items()
        try:
            answer = getattr(session, request)(argument)
        except Exception as error:
            traceback.print_exc()
            answer = {"absent": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
