"""What the benchmarks share: fair timing, peak memory, ceilings, and a record that a killed run goes on with.

A benchmark names its contenders and hands them to :func:`measure`, case by case; :class:`Record` keeps the results as
one JSON file::

    {"benchmark", "date", "environment", "settings", "seen", "ceilings", "cases": [{"case": {...}, "results": {...}}]}

A contender is first checked: one that computes something wrong is recorded as ``{"wrong": why}``, one that cannot run
here (not installed, not supported, out of memory) as ``{"absent": why}``, and neither is timed. The others take turns,
one sample each, so that a drift of clocks or load meets all of them alike. A sample is one call, timed by device events
on a GPU, whose L2 cache is flushed before it (a :class:`Mode` says otherwise), and by ``perf_counter`` on a CPU.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from gq_triton.cli.info import commit, device_name, versions
from gq_triton.files import save_json
from gq_triton.training.distributed import training_device

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs") / "benchmarks"
PEERS = ("torchao", "bitsandbytes", "gemlite", "onnxruntime", "onnx")
FLUSHED_BYTES = 1 << 30  # many times any L2 cache: writing it takes longer than the host takes to launch most calls
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}

Call = Callable[[], object]


class Unavailable(Exception):
    """A contender cannot run here; the message says why."""


class Wrong(Exception):
    """A contender computes something else than it should; the message says what."""


class Contender(NamedTuple):
    """Something to time.

    Attributes:
        prepare: makes the call that is timed; runs before every sample, untimed. What it holds counts as memory.
        check: raises Wrong unless the contender computes what it should.
    """

    prepare: Callable[[], Call]
    check: Call = lambda: None


@dataclass(frozen=True)
class Timing:
    """How long to measure each contender.

    Attributes:
        seconds: to spend on its samples.
        least, most: limits on their number.
    """

    seconds: float
    least: int = 3
    most: int = 100


class Mode(NamedTuple):
    """How a sample is taken.

    Attributes:
        flush: whether a GPU's L2 cache is flushed before; otherwise a call before has filled it.
        calls: how many calls a sample makes, one after another; its time is that of one of them.
        graph: whether they are one CUDA graph, so that the host's part in launching them costs nothing. Otherwise what
            a flush does not hide of it counts.
    """

    flush: bool = True
    calls: int = 1
    graph: bool = False


COLD = Mode()


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    makers: Mapping[str, Callable[[], Contender]], timing: Timing, device: torch.device, mode: Mode = COLD
) -> dict[str, dict]:
    """Checks and times contenders, which ``makers`` make by name, in ``mode``.

    Returns:
        By name, ``{"ms": {"median", "p10", "p90", "least", "samples"}, "peak_bytes"}``, or ``{"wrong"}`` or
        ``{"absent"}`` with the reason. ``peak_bytes`` is the most memory that tensors of one sample take at a time,
        those of ``prepare`` included and those that were there before it not.
    """
    results: dict[str, dict] = {name: {} for name in makers}
    clock, running, wanted = Clock(device, mode), {}, {}
    for name, make in makers.items():
        with failure_recorded(results, name):
            contender = make()
            contender.check()
            results[name]["peak_bytes"] = peak_bytes(lambda prepare=contender.prepare: prepare()(), device)
            prepare = _repeated(contender.prepare, mode)
            estimate = min(clock.sample(prepare)() for _ in range(2))
            wanted[name] = _sample_count(estimate * mode.calls, timing)
            running[name] = prepare
        if name not in running:
            _free_memory(device)
    samples = _take_turns(running, wanted, clock, results)
    for name, taken in samples.items():
        results[name] = {"ms": summary([sample() for sample in taken])} | results[name]
    return results


def _sample_count(milliseconds: float, timing: Timing) -> int:
    return int(np.clip(1e3 * timing.seconds / max(milliseconds, 1e-6), timing.least, timing.most))


def _take_turns(
    running: Mapping[str, Callable[[], Call]], wanted: Mapping[str, int], clock: Clock, results: dict[str, dict]
) -> dict[str, list[Callable[[], float]]]:
    """Samples of every contender; the slow ones, of which fewer are wanted, sit out turns evenly."""
    samples: dict[str, list] = {name: [] for name in running}
    rounds = max(wanted.values(), default=0)
    for turn in range(rounds):
        for name, count in wanted.items():
            if name in samples and (turn + 1) * count // rounds > turn * count // rounds:
                with failure_recorded(results, name):
                    samples[name].append(clock.sample(running[name]))
                if "absent" in results[name]:
                    del samples[name]
        clock.wait()
    return samples


@contextmanager
def failure_recorded(results: dict[str, dict], name: str) -> Iterator[None]:
    """Any failure of a contender, even a crash of a peer's code, is a result; it must not cost the others theirs."""
    try:
        yield
    except Wrong as error:
        results[name] = {"wrong": str(error)}
    except Unavailable as error:
        results[name] = {"absent": str(error)}
    except Exception as error:
        first_line = (str(error).strip() or "no message").splitlines()[0]
        results[name] = {"absent": f"{type(error).__name__}: {first_line}"}


def _repeated(prepare: Callable[[], Call], mode: Mode) -> Callable[[], Call]:
    """What makes the call of a whole sample."""
    if mode.graph:
        replay = _captured(prepare(), mode.calls)
        return lambda: replay
    if mode.calls == 1:
        return prepare

    def prepare_sample() -> Call:
        call = prepare()
        return lambda: _repeat(call, mode.calls)

    return prepare_sample


def _repeat(call: Call, calls: int) -> None:
    for _ in range(calls):
        call()


def _captured(call: Call, calls: int) -> Call:
    """The replay of a CUDA graph of ``calls`` calls, which ran before: whatever they compile or set up is there."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _repeat(call, calls)

    def replay(captured: Call = call) -> None:  # which owns tensors that the graph only has the addresses of
        graph.replay()

    return replay


class Clock:
    """Takes samples of calls on a device, all in one mode."""

    def __init__(self, device: torch.device, mode: Mode = COLD) -> None:
        self.device, self.mode = device, mode
        if device.type == "cuda" and mode.flush:
            self.cache = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def sample(self, prepare: Callable[[], Call]) -> Callable[[], float]:
        """Runs once; the result gives the milliseconds of a call, and waits for them."""
        call, calls = prepare(), self.mode.calls
        if self.device.type != "cuda":
            return self._host_sample(call, calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._fill_cache(call)
        start.record()
        call()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return start.elapsed_time(end) / calls

        return milliseconds

    def _fill_cache(self, call: Call) -> None:
        """Leaves in the L2 cache what the mode wants, and the device busy unless launching is to count."""
        if self.mode.flush:
            self.cache.zero_()  # takes the device long enough for the host to launch what comes next
            return
        call()
        if not self.mode.graph:
            torch.cuda.synchronize(self.device)

    @staticmethod
    def _host_sample(call: Call, calls: int) -> Callable[[], float]:
        start = time.perf_counter()
        result = call()
        milliseconds = 1e3 * (time.perf_counter() - start) / calls
        del result  # freed outside of the time
        return lambda: milliseconds

    def wait(self) -> None:
        """Until the device is done: the host must not run far ahead of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summary(samples: Iterable[float]) -> dict[str, float]:
    """Median, 10 % and 90 % quantiles, least, and number of samples."""
    values = np.asarray(list(samples))
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {
        "median": float(median),
        "p10": float(low),
        "p90": float(high),
        "least": float(values.min()),
        "samples": len(values),
    }


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that tensors made during ``call`` take at any one time."""
    if device.type == "cuda":
        return _peak_cuda_bytes(call, device)
    # The CPU allocator keeps no high-water mark, but the profiler sees every allocation, inside of operators too.
    with quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    return _highest(_allocations(run))


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """Keeps torch's profiler from writing a line to standard error when it starts and when it stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _peak_cuda_bytes(call: Call, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocations(run: profile) -> list[int]:
    """Bytes allocated, and minus those freed, in order."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        run.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]


def _highest(changes: list[int]) -> int:
    return int(max(np.cumsum([0, *changes])))


def _free_memory(device: torch.device) -> None:
    """Gives back what is left of a contender that failed, of one that ran out of memory above all."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def require_memory(count: int, what: str, device: torch.device) -> None:
    """Raises Unavailable where ``count`` bytes, counted on paper, do not fit: on a CPU the system would end the run."""
    free = free_memory(device)
    if count > 0.8 * free:
        raise Unavailable(f"{what} takes {count / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- the machine ------------------------------------------------------------------------------------------------------


def ceilings(device: torch.device) -> dict:
    """What the machine can do at best: copy bandwidth (bytes read and written), and the time of the least operation."""
    count = 1 << (28 if device.type == "cuda" else 24)
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    one = torch.zeros(1, device=device)
    contenders = {
        "copy": lambda: Contender(lambda: lambda: target.copy_(source)),
        "operation": lambda: Contender(lambda: one.zero_),
    }
    results = measure(contenders, Timing(seconds=0.3, least=5), device)
    moved = 2 * tensor_bytes(source)
    return {
        "copy_bytes": moved,
        "copy_gb_per_s": gb_per_s(moved, results["copy"]),
        "operation_ms": results["operation"]["ms"]["median"],
    }


def matmul_ceilings(device: torch.device) -> dict:
    """Peak rates (1e12 operations a second) of large square products, by the operands' dtype."""
    size = MATMUL_SIZE[device.type]
    products = {"float32": _matmul, "bfloat16": _matmul, "int8": _int8_matmul, "float8_e4m3fn": _fp8_matmul}
    contenders = {dtype: partial(product, size, getattr(torch, dtype), device) for dtype, product in products.items()}
    results = measure(contenders, Timing(seconds=0.3, least=5), device)
    rates = {dtype: 2 * size**3 / result["ms"]["median"] / 1e9 for dtype, result in results.items() if "ms" in result}
    return {"matmul_size": size, "matmul_tops": rates}


def _matmul(size: int, dtype: torch.dtype, device: torch.device) -> Contender:
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Contender(lambda: lambda: one @ other.t())


def _int8_matmul(size: int, dtype: torch.dtype, device: torch.device) -> Contender:
    one, other = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
    return Contender(lambda: lambda: torch._int_mm(one, other.t()))


def _fp8_matmul(size: int, dtype: torch.dtype, device: torch.device) -> Contender:
    if device.type != "cuda":
        raise Unavailable("fp8 products are a GPU's")
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    unit = torch.ones((), device=device)
    options = dict(scale_a=unit, scale_b=unit, out_dtype=torch.bfloat16, use_fast_accum=True)
    return Contender(lambda: lambda: torch._scaled_mm(one, other.t(), **options))


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gb_per_s(count: int, result: dict) -> float:
    """1e9 bytes a second, of ``count`` bytes in the median time of a result."""
    return count / result["ms"]["median"] / 1e6


def environment() -> dict:
    """All that must not change between the parts of one record."""
    packages = versions() | {name: _installed_version(name) for name in PEERS}
    return {"device": device_name(), "driver": _gpu("driver_version"), "versions": packages, "commit": commit()}


def _installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def seen() -> dict:
    """What changes while one looks: clocks in MHz, and how many processes waited for the CPU."""
    if torch.cuda.is_available():
        clocks = {"sm": _gpu("clocks.sm"), "memory": _gpu("clocks.mem"), "sm_limit": _gpu("clocks.max.sm")}
    else:
        clocks = {"cpu": _cpu_clock()}
    return {"clocks": clocks, "load": os.getloadavg()[0]}


def _gpu(field: str) -> str | None:
    """What nvidia-smi says of the GPU in use; None without one."""
    if not torch.cuda.is_available():
        return None
    identity = torch.cuda.get_device_properties(training_device()).uuid
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id=GPU-{identity}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _cpu_clock() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"cpu MHz\s*:\s*(\S+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{found[1]} MHz" if found else None


def slug(device: str) -> str:
    """A device's name as a folder's."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


# --- records ----------------------------------------------------------------------------------------------------------


class Record:
    """A benchmark's results, written case by case.

    Until :meth:`finish` they lie in a ``.partial`` file, from which a run of the same commit, settings and machine
    goes on; the record of an earlier run stays as it is so long. A checkout with changes has no name, so its runs start
    anew.
    """

    def __init__(self, benchmark: str, settings: dict, folder: Path) -> None:
        self.path = folder / f"{benchmark}.json"
        self.partial = self.path.with_suffix(".partial")
        known = {"benchmark": benchmark, "environment": environment(), "settings": settings}
        fresh = {**json.loads(json.dumps(known)), "date": date.today().isoformat(), "seen": seen()}
        fresh |= {"ceilings": {}, "cases": []}
        self.content = self._unfinished(fresh) or fresh

    def _unfinished(self, fresh: dict) -> dict | None:
        if not self.partial.is_file() or "+changes" in (fresh["environment"]["commit"] or "+changes"):
            return None
        found = json.loads(self.partial.read_text())
        same = all(found[part] == fresh[part] for part in ("benchmark", "environment", "settings"))
        return found if same else None

    def measure_ceilings(self, device: torch.device, *others: Callable[[torch.device], dict]) -> None:
        """Notes :func:`ceilings`, and what ``others`` find, unless an earlier part of the run has."""
        if not self.content["ceilings"]:
            for find in (ceilings, *others):
                self.content["ceilings"] |= find(device)

    def missing(self, cases: list[dict]) -> Iterator[dict]:
        """The cases not yet measured, under a progress bar."""
        done = [entry["case"] for entry in self.content["cases"]]
        with tqdm(cases, unit="case", desc=self.content["benchmark"]) as bar:
            for case in bar:
                bar.set_postfix_str(_values(case))
                if case not in done:
                    yield case

    def add(self, case: dict, results: dict) -> None:
        self.content["cases"].append({"case": case, "results": results})
        save_json(self.partial, self.content)

    def finish(self) -> Path:
        """Puts the record in its place, and tells of contenders that have no time.

        Raises:
            SystemExit: with status 1, once all is written, where a contender was wrong.
        """
        save_json(self.path, self.content)
        self.partial.unlink(missing_ok=True)
        untimed = self._untimed()
        for (kind, name, reason), cases in untimed.items():
            others = f"; and {len(cases) - 1} more" if len(cases) > 1 else ""
            click.echo(f"{kind}: {name} ({_values(cases[0])}{others}): {reason}")
        click.echo(f"record: {self.path}")
        if any(kind == "wrong" for kind, *_ in untimed):
            raise SystemExit(1)
        return self.path

    def _untimed(self) -> dict[tuple[str, str, str], list[dict]]:
        """The cases in which a contender has no time, by (kind, contender, reason)."""
        found: dict[tuple[str, str, str], list[dict]] = {}
        for entry in self.content["cases"]:
            for name, result in entry["results"].items():
                for kind in {"wrong", "absent"} & result.keys():
                    found.setdefault((kind, name, result[kind]), []).append(entry["case"])
        return found


def _values(case: dict) -> str:
    return ", ".join(map(str, case.values()))


def command(plans: Any, run: Callable[[Any, Path, torch.device], Path], about: str) -> click.Command:
    """The command line of a benchmark: ``run(plan, folder, device)`` with ``plans.full(device)`` or its ``quick``."""

    @click.command(help=about)
    @click.option("--quick", is_flag=True, help="a couple of minutes instead of the full record")
    @click.option(
        "--output",
        type=click.Path(path_type=Path, file_okay=False),
        help="folder of the record  [default: benchmarks/results/DEVICE; runs/benchmarks/DEVICE with --quick]",
    )
    def main(quick: bool, output: Path | None) -> None:
        gc.freeze()  # what is imported stays: collections, one for each contender that fails, need not look through it
        device = training_device()
        run(plans.quick(device) if quick else plans.full(device), folder(output, quick), device)

    return main


def folder(output: Path | None, quick: bool) -> Path:
    return output or (QUICK_RESULTS if quick else RESULTS) / slug(device_name())
