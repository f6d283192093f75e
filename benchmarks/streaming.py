"""How long does one wait for a recognizer on a device, and how much memory does it take, at each width of its weights?

    python benchmarks/streaming.py                   # the full record, benchmarks/results/<device>/streaming.json
    python benchmarks/streaming.py --quick
    python benchmarks/streaming.py --audio FOLDER    # other speech than AN4's test set

Recorded speech is played at the pace it was spoken, in blocks of 20 ms, to recognizers of about 60 million random
weights. Which labels they emit is fixed beforehand, one in 300 ms of speech: every precision does the same work. The
contenders, on a CPU:

    torch fp32, torch bf16    the float model, by torch's layers (without oneDNN, with which they take far longer)
    torch int8                torch's dynamic quantization of its LSTM and linear layers
    gq/BITS                   packed weights on torch (gq_triton.speech.streaming); BITS may be `mixed`: the encoder's
                              LSTMs at 1 bit, all else at 5
    gq int8/BITS              an int8 codebook and int8 activations: products of integers
    runner gq/BITS, ...       the same files without torch (gq_triton.runtime)

Of the model `bifocal`, the small encoder takes the first 0.8 s of an utterance, as a wake word would last, and the
large one all after it.

Each has a process of its own (streaming_worker.py). All of them are there from the start, asleep but for the one whose
turn it is; they take turns by utterance, after one that does not count, so that a drift of the machine meets all alike.

- `upl_ms`, the user-perceived latency: from the last sample to the final result. The recipes' 300 ms of silence, which
  a recognizer appends to let the last word out, is worked through in that time.
- `first_partial_ms`: from the end of the frame that has the first label to the first result that shows it.
- `chunk_ms`: the time of each call that had the encoder advance while speech went on.
- `rtf`, the real-time factor: the seconds of all calls over those of speech.
- `memory`: of the process, in bytes: idle with all imports, with the model loaded, and after the last utterance.
  `model_bytes` is what the latter has more than the former, but for the parts of libraries that it has run by then:
  memory of no file. (No contender maps its weights.) `process_bytes` is all that is resident.
- `floor_ms`: a bound from below of `upl_ms`, the weights that the encoder and the joint network read at least once in
  each call left at the end, at the speed that memory of their size is read with (`read_gb_per_s`). What is left when
  the last block has been taken is one call; recurrent weights are read once a step, from whatever cache holds them.

At the end, the goals are held against the record (streaming_goals.py). plots/streaming.py draws the figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

import click
import harness
import numpy as np
import streaming_goals
import torch
from harness import Unavailable, Wrong
from streaming_models import SWITCH_SECONDS, model_file
from tqdm import tqdm

from gq_triton.speech.audio import audio_duration, load_audio
from gq_triton.speech.mel import HOP, SAMPLE_RATE

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("runs") / "streaming"
WORKER = Path(__file__).with_name("streaming_worker.py")
AUDIO = Path(os.environ.get("GQ_DATA", ROOT.parent / "shared" / "data")) / "an4" / "wav" / "an4test_clstk"
AUDIO_SUFFIXES = (".flac", ".wav", ".sph")
PEERS = {"torch fp32": 4, "torch bf16": 2, "torch int8": 1}  # bytes a weight
CONVERTED = ("torch bf16", "torch int8")  # from the float model's file: they have none of their own
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
READ_SECONDS = 0.2
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
ALIKE = 0.05  # the logits of two runtimes: one int8 activation that rounding tips over tips others, frame after frame
CLOSE = 0.2  # those at 8 bits and more and those of float32


@dataclass(frozen=True)
class Suite:
    """Contenders that take turns.

    Attributes:
        model: of `streaming_models.MODELS`.
        threads: of each.
        chunk_ms: of the encoder.
        utterances: that are played to each.
        contenders: by name.
    """

    model: str
    threads: int
    chunk_ms: int
    utterances: int
    contenders: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        suites: the cases.
        seconds: from the shortest to the longest utterance.
        label_ms: of speech for each label.
        slowest: real-time factor from which on a contender is left out: it would take too long to measure.
    """

    suites: tuple[Suite, ...]
    seconds: tuple[float, float] = (1.5, 3.0)
    label_ms: int = 300
    slowest: float = 3.0

    @classmethod
    def full(cls) -> Plan:
        own = tuple(f"gq int8/{bits}" for bits in (8, 5, 4, 3, 2, "mixed"))
        few = ("torch int8", *on_runner(("gq int8/8", "gq int8/5", "gq int8/mixed")))
        return cls(
            (
                Suite("rnnt", 1, 60, 16, (*PEERS, *own, *on_runner(own))),
                Suite("rnnt", 1, 240, 12, few),
                Suite("rnnt", 2, 60, 12, few),
                Suite("bifocal", 1, 60, 12, few),
            )
        )

    @classmethod
    def quick(cls) -> Plan:
        few = ("gq int8/8", "gq int8/5")
        return cls((Suite("rnnt", 1, 60, 4, ("torch fp32", "torch int8", *few, *on_runner(few))),))

    def cases(self) -> list[dict]:
        return [{"model": suite.model, "threads": suite.threads, "chunk_ms": suite.chunk_ms} for suite in self.suites]


def on_runner(contenders: Sequence[str]) -> tuple[str, ...]:
    """The same without torch."""
    return tuple(f"runner {name}" for name in contenders)


def run(plan: Plan, folder: Path, audio: Path) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    require_linux()
    found = utterances(audio, plan)
    record = harness.Record("streaming", asdict(plan) | {"played": seconds_of(found)}, folder)
    record.measure_ceilings(torch.device("cpu"))
    for case in record.missing(plan.cases()):
        suite = plan.suites[plan.cases().index(case)]
        record.add(case, measure(plan, suite, found[: suite.utterances]))
    click.echo(streaming_goals.summary(record.content))
    return record.finish()


def require_linux() -> None:
    if not Path("/proc/self/smaps_rollup").is_file():
        raise click.ClickException("memory is read from /proc/PID/smaps_rollup, which this system lacks")


# --- speech -----------------------------------------------------------------------------------------------------------


def utterances(folder: Path, plan: Plan) -> list[Path]:
    """Files of speech below ``folder``, of the lengths that the plan wants, from all over it.

    Raises:
        ClickException: there are too few.
    """
    wanted = max(suite.utterances for suite in plan.suites)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    low, high = plan.seconds
    found = [path for path in files if low <= audio_duration(path) <= high]
    if len(found) < wanted:
        raise click.ClickException(
            f"{folder} has {len(found)} recordings ({', '.join(AUDIO_SUFFIXES)}) of {low:g} to {high:g} seconds, and "
            f"{wanted} are needed; --audio names another folder, and `gq-triton data download` fetches AN4"
        )
    return [found[place * len(found) // wanted] for place in range(wanted)]


def seconds_of(paths: Sequence[Path]) -> dict[str, float]:
    return {path.stem: round(audio_duration(path), 3) for path in paths}


def as_samples(path: Path) -> Path:
    """A recording as a file of samples that numpy reads."""
    target = WORK / "speech" / f"{path.stem}.npy"
    target.parent.mkdir(parents=True, exist_ok=True)
    np.save(target, load_audio(path).numpy())
    return target


# --- processes --------------------------------------------------------------------------------------------------------


class Worker:
    """The process of one contender; a context manager that ends it."""

    def __init__(self, variant: dict) -> None:
        self.log = WORK / "logs" / f"{variant['name'].replace(' ', '-').replace('/', '-')}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        threads = {name: str(variant["threads"]) for name in THREAD_VARIABLES}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | threads | {"PYTHONPATH": paths},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        if kind is not None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, request: str, argument: object = None) -> dict:
        """The answer to a request.

        Raises:
            Unavailable: it failed, or the process ended.
        """
        with suppress(BrokenPipeError):  # that it has ended shows in what it answers
            self.process.stdin.write(json.dumps({request: argument}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"its process ended with status {self.process.wait()}; see {self.log}")
        answer = json.loads(line)
        if "absent" in answer:
            raise Unavailable(answer["absent"])
        return answer


# --- contenders -------------------------------------------------------------------------------------------------------


class Player:
    """A contender: its process, and what was seen of it."""

    def __init__(self, plan: Plan, suite: Suite, name: str, stack: ExitStack) -> None:
        self.name, self.threads = name, suite.threads
        self.file = model_file(suite.model, precision_of(name), WORK / "models")
        label_frames = max(1, round(plan.label_ms * SAMPLE_RATE / 1000 / HOP / self.file.sizes["subsampling"]))
        self.variant = {
            "name": name,
            "runtime": "runner" if name.startswith("runner ") else "torch",
            "file": str(self.file.path),
            "threads": suite.threads,
            "chunk_ms": suite.chunk_ms,
            "chunk_frames": suite.chunk_ms * SAMPLE_RATE // 1000 // HOP,
            "label_frames": label_frames,
            "switch_seconds": SWITCH_SECONDS.get(suite.model),
            **self.file.sizes,
        }
        self.worker = stack.enter_context(Worker(self.variant))
        self.loaded = self.worker.ask("load", self.variant)
        self.plays: list[dict] = []

    def warm_up(self, samples: Path, slowest: float) -> None:
        """Plays what does not count.

        Raises:
            Unavailable: it takes too long.
        """
        played = self.play(samples)
        rate = played["compute_s"] / played["audio_s"]
        if rate > slowest:
            raise Unavailable(f"a second of speech takes it {rate:.2g} s, which is too slow to measure")
        self.logits = np.array(played["logits"])
        self.plays.clear()

    def play(self, samples: Path) -> dict:
        """Plays an utterance.

        Raises:
            Wrong: other labels come than must.
        """
        played = self.worker.ask("play", str(samples))
        if played["labels"] != played["wanted_labels"]:
            raise Wrong(f"{played['labels']} labels came where {played['wanted_labels']} were to be emitted")
        self.plays.append(played)
        return played

    def result(self) -> dict:
        """What the record says of it."""
        played, idle = self.worker.ask("memory"), self.loaded["idle"]
        rate = read_gb_per_s(self.loaded["weight_bytes"], self.threads)
        floors = [1e-6 * play["left_calls"] * self.chunk_bytes() / rate for play in self.plays]
        compute, audio = (sum(play[key] for play in self.plays) for key in ("compute_s", "audio_s"))
        return {
            "upl_ms": quantiles(play["upl_ms"] for play in self.plays),
            "floor_ms": quantiles(floors),
            "first_partial_ms": quantiles(play["first_partial_ms"] for play in self.plays),
            "chunk_ms": quantiles(chunk for play in self.plays for chunk in play["chunks_ms"]),
            "rtf": compute / audio,
            "late_ms": float(np.median([play["late_ms"] for play in self.plays])),
            "samples": {key: [round(play[key], 4) for play in self.plays] for key in ("upl_ms", "first_partial_ms")},
            "file_bytes": None if self.name in CONVERTED else self.file.path.stat().st_size,
            "weight_bytes": self.loaded["weight_bytes"],
            "chunk_bytes": self.chunk_bytes(),
            "read_gb_per_s": rate,
            "model_bytes": played["anonymous"] - idle["anonymous"],
            "process_bytes": played["rss"],
            "memory": {"idle": idle, "loaded": self.loaded["loaded"], "played": played},
            "isa": self.loaded["isa"],
        }

    def chunk_bytes(self) -> int:
        return self.file.chunk_bytes * PEERS.get(self.name, 4) // 4


def precision_of(name: str) -> str | None:
    """The precision of a contender's file; peers are made from the float model."""
    return None if name in PEERS else name.removeprefix("runner ")


def measure(plan: Plan, suite: Suite, speech: list[Path]) -> dict[str, dict]:
    """Results of a suite by contender."""
    samples = [as_samples(path) for path in speech]
    results: dict[str, dict] = {name: {} for name in suite.contenders}
    with ExitStack() as stack:
        players = {}
        for name in tqdm(suite.contenders, desc="loading", unit="contender", leave=False):
            with harness.failure_recorded(results, name):
                player = Player(plan, suite, name, stack)
                player.warm_up(samples[0], plan.slowest)
                players[name] = player
        for name in list(players):
            with harness.failure_recorded(results, name):
                results[name]["error"] = check(players, name)
        turns = [(name, path) for path in samples for name in players]
        for name, path in tqdm(turns, desc="playing", unit="utterance", leave=False):
            if not {"absent", "wrong"} & results[name].keys():
                with harness.failure_recorded(results, name):
                    players[name].play(path)
        for name, player in players.items():
            if not {"absent", "wrong"} & results[name].keys():
                with harness.failure_recorded(results, name):
                    results[name] |= player.result()
    return results


def check(players: Mapping[str, Player], name: str) -> float | None:
    """The error of the last label's logits from those of float32, RMS over RMS; None without these.

    Raises:
        Wrong: it is too large for the contender's precision, or one file gives other logits with and without torch.
    """
    alike = players.get(name.removeprefix("runner "))
    if alike is not None and not (found := rms_error(players[name].logits, alike.logits)) < ALIKE:
        raise Wrong(f"its logits are off by {found:.2g} from those of the same file on torch")
    if "torch fp32" not in players:
        return None
    error = rms_error(players[name].logits, players["torch fp32"].logits)
    if (name in PEERS or name.endswith("/8")) and not error < CLOSE:
        raise Wrong(f"its logits are off by {error:.2g} from those of float32")
    return error


def rms_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """P50, P90 and P99."""
    found = np.quantile(list(values), list(QUANTILES.values()))
    return dict(zip(QUANTILES, map(float, found), strict=True))


@cache
def read_gb_per_s(count: int, threads: int) -> float:
    """1e9 bytes a second, of reading ``count`` bytes of memory over and over again: the most there was."""
    numbers, before = torch.ones(max(count // 4, 1)), torch.get_num_threads()
    torch.set_num_threads(threads)
    times, end = [], time.perf_counter() + READ_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return harness.tensor_bytes(numbers) / min(times) / 1e9


@click.command()
@click.option("--quick", is_flag=True, help="a couple of minutes instead of the full record")
@click.option(
    "--audio",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="folder of recorded speech  [default: AN4's test set, where $GQ_DATA or ../shared/data has it]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="folder of the record  [default: benchmarks/results/DEVICE; runs/benchmarks/DEVICE with --quick]",
)
def main(quick: bool, audio: Path | None, output: Path | None) -> None:
    """Measure streaming recognizers."""
    run(Plan.quick() if quick else Plan.full(), harness.folder(output, quick), audio or AUDIO)


if __name__ == "__main__":
    main()
