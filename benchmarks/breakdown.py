"""Where the time of a training step goes: kinds of work, from torch's profiler.

An operator's own time (of its kernels on a GPU, of itself on a CPU) belongs to the kind that the outermost operator or
label around it names; in the backward pass, to the kind of the forward operator whose gradient it computes, which
autograd's sequence numbers tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import torch
from harness import quiet_profiler
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

KINDS = {  # what the names of its operators and labels look like; the first kind that matches counts
    "quantizer": r"^quantizer$",
    "loss": r"rnnt_?loss|ctc_?loss",
    "optimizer": r"^optimizer",
    "recurrent": r"lstm|rnn|gru",
    "convolution": r"conv",
    "attention": r"attention",
    "GEMM": r"::linear|mm|matmul",
}
BACKWARD = "autograd::engine::evaluate_function"


def breakdown(step: Callable[[], object], device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds a step spends in operators of each kind, and in ``other`` ones: the mean over ``steps``."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with quiet_profiler(), profile(activities=activities) as run:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    totals = dict.fromkeys([*KINDS, "other"], 0.0)
    for event, kind in kinds_of(run.events()):
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        totals[kind] += microseconds / 1e3 / steps
    return totals


def kinds_of(events: list[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """The kind of each host event."""
    host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    makers = {}  # of backward nodes, by their number; the last operator that began with it is the one that counted on
    for event in sorted(host, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not any(outer.name.startswith(BACKWARD) for outer in _outermost_first(event)):
            makers[event.sequence_nr] = event
    for event in host:
        yield event, _kind(event, makers)


def _kind(event: FunctionEvent, makers: dict[int, FunctionEvent]) -> str:
    for outer in _outermost_first(event):
        if outer.name.startswith(BACKWARD) and outer.sequence_nr in makers:
            kind = _kind(makers[outer.sequence_nr], {})
        else:
            kind = kind_of_name(outer.name)
        if kind != "other":
            return kind
    return "other"


def kind_of_name(name: str) -> str:
    """The kind of work that an operator's or label's name tells of."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _outermost_first(event: FunctionEvent) -> list[FunctionEvent]:
    path = [event]
    while path[-1].cpu_parent is not None:
        path.append(path[-1].cpu_parent)
    return path[::-1]


@contextmanager
def labelled(label: str, *functions: tuple[object, str]) -> Iterator[None]:
    """Has the profiler see calls of functions, given as (owner, name), under a label meanwhile."""
    with ExitStack() as stack:
        for owner, name in functions:
            stack.enter_context(mock.patch.object(owner, name, _with_label(label, getattr(owner, name))))
        yield


def _with_label(label: str, function: Callable) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with record_function(label):
            return function(*args, **kwargs)

    return call
