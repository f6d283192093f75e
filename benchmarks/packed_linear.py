"""How fast are linear layers on packed weights, beside dense ones, other low-bit ones, and what the machine can do?

    python benchmarks/packed_linear.py            # the full record, benchmarks/results/<device>/packed_linear.json
    python benchmarks/packed_linear.py --quick

A case is a weight (N, K), M tokens, and a way of timing. Its contenders, from the same Gaussian weight:

    torch                 the dense layer in the activations' dtype
    gq/BITS               packed weights, activations as they are
    gq int8/BITS          an int8 codebook, and activations that the call quantizes to int8; gq fp8/BITS alike
    torch int8/8, ...     the layers of linear_peers.py

Ways of timing on a GPU: `cold` (L2 cache flushed), `warm` (one call after another: launching them counts), and each as
a CUDA graph. On a CPU there is one, `turns`: caches are as the other contenders' turns leave them.

Beside each time stand the bytes that must move, counted on paper; `floor_share`, which share of the time an operation
on one number takes and then those bytes at the speed of a copy (not for warm caches: they need not move); `peak_share`,
the share of what a large product of the same operands reaches; the time over torch's in the same turns; and the error,
as RMS over RMS of a sample of the outputs: `error` from the float64 product with the Gaussian weight, and
`numerical_error` from that with the weight (and the activations) as quantized. On a GPU the goals that were set are
printed at last (packed_goals.py). plots/packed_linear.py draws the figure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import harness
import linear_peers
import packed_goals
import torch
from harness import Contender, Mode, Timing, Wrong
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from gq_triton import functional as F
from gq_triton.config import GQConfig
from gq_triton.kernels import packed_linear_triton as kernels
from gq_triton.layers.packed_weight import PackedWeight
from gq_triton.quantizer import WeightQuantizer
from gq_triton.training.distributed import training_device

MODES = {
    "cold": Mode(),
    "cold graph": Mode(graph=True),
    "warm": Mode(flush=False, calls=20),
    "warm graph": Mode(flush=False, calls=20, graph=True),
    "turns": Mode(),
}
FLUSHED = ("cold", "cold graph", "turns")
PEERS = {
    "torch int8/8": linear_peers.torch_int8,
    "torch int8 product/8": linear_peers.torch_int8_product,
    "torch int4/4": linear_peers.torch_int4,
    "gemlite int4/4": linear_peers.gemlite_int4,
    "bitsandbytes nf4/4": linear_peers.nf4,
}
STORED = {None: torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # codebooks, by activations
SAMPLED = (16, 256)  # tokens and outputs whose errors are looked at
NUMERICAL_ERROR = 1e-2  # what is wrong errs by far more, and tests/kernels checks to rounding
PEER_ERROR = 0.2  # of 4 bits in groups: about 0.09
PROCESSES = 16  # that compile, at most: each has a context on the GPU, of about half a GiB


@dataclass(frozen=True)
class Suite:
    """Cases of one kind.

    Attributes:
        shapes: (N, K) of the weights.
        tokens: M.
        wide: those M at which ``bits`` are measured, not the plan's main width alone.
        bits: widths.
        dtype: of the activations.
        modes: names of `MODES`.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    wide: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: str
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        suites: the cases.
        main: the width that is measured everywhere.
        eight_bit: the 8-bit activations.
        eight_bit_bits: widths with them.
        shown: the shapes that figure and table show.
        not_measured: what this machine cannot show.
        timing: of each contender.
    """

    suites: tuple[Suite, ...]
    main: int
    eight_bit: tuple[str, ...]
    eight_bit_bits: tuple[int, ...]
    shown: tuple[tuple[int, int], ...]
    not_measured: tuple[str, ...]
    timing: Timing

    @classmethod
    def full(cls, device: torch.device) -> Plan:
        return cls._of_gpu(device, quick=False) if device.type == "cuda" else cls._of_cpu(quick=False)

    @classmethod
    def quick(cls, device: torch.device) -> Plan:
        return cls._of_gpu(device, quick=True) if device.type == "cuda" else cls._of_cpu(quick=True)

    @classmethod
    def _of_gpu(cls, device: torch.device, quick: bool) -> Plan:
        all_bits, bf16 = tuple(range(1, 9)), "bfloat16"
        asr = ((512, 512), (2048, 512), (512, 2048), (1024, 1024), (2048, 2048))
        others = ((144, 144), (576, 144), (1024, 256), (2560, 640), (4096, 1024))
        many = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
        suites = (
            Suite(asr, many, (1, 4, 16), all_bits, bf16, ("warm graph",)),
            Suite(others, (1, 16, 256, 1024), (1,), all_bits, bf16, ("warm graph",)),
            Suite((*asr, *others), (1, 16, 1024), (1,), all_bits, bf16, ("cold",)),
            Suite(((2048, 512), (4096, 1024)), (1, 16), (), (), bf16, ("warm", "cold graph")),
            Suite(((4096, 4096), (8192, 8192)), (1, 4, *many[4:]), (1, 16, 1024), all_bits, bf16, ("cold",)),
            Suite(((16384, 16384),), (1, 16, 1024), (1,), (1, 2, 4, 8), bf16, ("cold",)),
        )
        if quick:
            suites = (
                Suite(((2048, 512),), (1, 16, 1024), (1,), (1, 2, 4, 8), bf16, ("warm graph",)),
                Suite(((8192, 8192),), (1, 16, 1024), (1,), (1, 2, 4, 8), bf16, ("cold",)),
            )
        fp8 = torch.cuda.get_device_capability(device) >= (8, 9)
        return cls(
            suites=suites,
            main=4,
            eight_bit=("int8", "fp8") if fp8 else ("int8",),
            eight_bit_bits=(1, 2, 4, 8),
            shown=((2048, 512), (8192, 8192)),
            not_measured=() if fp8 else ("fp8 activations: this part has no fp8 products",),
            timing=Timing(seconds=0.005, least=5, most=20),
        )

    @classmethod
    def _of_cpu(cls, quick: bool) -> Plan:
        all_bits, shown = tuple(range(1, 9)), ((512, 512), (2048, 512), (4096, 1024))
        others = ((144, 144), (1024, 256), (512, 2048), (2560, 640))
        suites = (
            Suite(shown, (1, 4, 16, 64, 256), (1, 16, 256), all_bits, "float32", ("turns",)),
            Suite(others, (1, 16, 256), (1,), all_bits, "float32", ("turns",)),
            Suite(shown, (1, 16, 256), (), (), "bfloat16", ("turns",)),
        )
        if quick:
            suites = (Suite(shown[:2], (1, 16), (1,), (1, 2, 4, 8), "float32", ("turns",)),)
        return cls(
            suites=suites,
            main=4,
            eight_bit=("int8",),
            eight_bit_bits=(1, 2, 4, 8),
            shown=suites[0].shapes,
            not_measured=(
                "cold caches, CUDA graphs and fp8 activations: they need a GPU",
                "weights beyond 4096 x 1024: they would take a CPU too long",
                "the goals that were set: they are a GPU's",
            ),
            timing=Timing(seconds=0.2, least=3, most=50),
        )

    def cases(self) -> list[dict]:
        """By shape, so that a weight is quantized once for all its cases."""
        found = [
            {"n": n, "k": k, "m": m, "dtype": suite.dtype, "mode": mode, "bits": self._widths(suite, m)}
            for suite in self.suites
            for n, k in suite.shapes
            for m in suite.tokens
            for mode in suite.modes
        ]
        return sorted(found, key=lambda case: (case["n"] * case["k"], case["n"]))

    def packed(self, case: dict) -> Iterator[tuple[str | None, int]]:
        """Activations and widths of a case's packed contenders."""
        for activations in (None, *self.eight_bit):
            for bits in case["bits"]:
                if activations is None or bits in self.eight_bit_bits:
                    yield activations, bits

    def _widths(self, suite: Suite, tokens: int) -> list[int]:
        return list(suite.bits) if tokens in suite.wide else [self.main]


def run(plan: Plan, folder: Path, device: torch.device) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    for line in plan.not_measured:
        click.echo(f"not measured: {line}", err=True)
    record = harness.Record("packed_linear", asdict(plan), folder)
    if device.type == "cuda":
        compile_ahead(plan, torch.cuda.get_device_properties(device).multi_processor_count)
    record.measure_ceilings(device, harness.matmul_ceilings)
    for case in record.missing(plan.cases()):
        problem = Problem(case, device)
        results = harness.measure(problem.makers(plan), plan.timing, device, MODES[case["mode"]])
        problem.add_figures(results, record.content["ceilings"])
        record.add(case, results)
    if device.type == "cuda":
        click.echo(packed_goals.summary(record.content))
    return record.finish()


# --- compiling --------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A kernel to compile: a plan, and sizes that are not the case's, but alike in what the compiler knows of them."""

    chosen: kernels.Plan
    bits: int
    activations: str | None
    tokens: int
    rows: int
    columns: int


def compile_ahead(plan: Plan, processors: int) -> None:
    """Compiles what the cases run, into Triton's cache, in many processes: in one it takes longer than to measure."""
    jobs = compile_jobs(plan, processors)
    processes = min(os.cpu_count() or 1, PROCESSES)
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        list(tqdm(pool.map(run_job, jobs), total=len(jobs), desc="compiling", unit="kernel"))


def compile_jobs(plan: Plan, processors: int) -> list[Job]:
    """One for each different kernel."""
    jobs = {}
    for case in plan.cases():
        sizes = case["m"], case["n"], case["k"]
        for activations, bits in plan.packed(case):
            chosen = kernels.plan(*sizes, bits, processors, "fp8" if activations == "fp8" else "bf16")
            tokens, rows, columns = map(_alike, sizes)
            tokens += kernels.FEW if case["m"] > kernels.FEW else 0  # on which hangs whether fp8 is multiplied as such
            jobs[Job(chosen, bits, activations, tokens, rows, columns)] = None
    return list(jobs)


def _alike(size: int) -> int:
    """A small size that Triton specializes a kernel to just as it does to ``size``."""
    return 1 if size == 1 else 16 if size % 16 == 0 else 8


def run_job(job: Job) -> None:
    """Launches once; what does not compile is told when its contender's turn comes."""
    with suppress(Exception):
        launch_job(job)


def launch_job(job: Job) -> Tensor:
    device = training_device()
    codes = torch.zeros(job.rows, job.columns, dtype=torch.uint8, device=device)
    tiles = F.tile(F.pack(codes, job.bits), job.bits, job.rows, job.columns)
    codebook = torch.zeros(2**job.bits, dtype=STORED[job.activations], device=device)
    x = torch.zeros(job.tokens, job.columns, dtype=torch.bfloat16, device=device)
    scale, activations = torch.ones(job.rows, device=device), job.activations or "none"
    return kernels.launch(x, tiles, codebook, scale, None, job.bits, "none", activations, job.chosen)


# --- contenders -------------------------------------------------------------------------------------------------------


class Weight:
    """A Gaussian weight (N, K), and what is made of it when first asked for: it serves all cases of a shape."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.float = torch.randn(rows, columns, generator=draw, device=device) / math.sqrt(columns)
        self.rows = torch.linspace(0, rows - 1, min(rows, SAMPLED[1]), device=device).long()
        self.exact = self.float[self.rows].double()
        self.made: dict[object, Any] = {}

    def once(self, make: Callable[..., Any], *arguments: object) -> Any:
        """``make(float weight, *arguments)``, made once."""
        key = make, *arguments
        if key not in self.made:
            self.made[key] = make(self.float, *arguments)
        return self.made[key]


def pack(weight: Tensor, bits: int, codebook: str) -> PackedWeight:
    """As quantized after training, without any."""
    quantizer = WeightQuantizer(GQConfig(bits=bits, codebook=codebook), len(weight), weight.device)
    quantizer.fit(weight)
    return PackedWeight.from_quantizer(quantizer, weight)


shared_weight = lru_cache(maxsize=1)(Weight)


class Problem:
    """One case: a weight, activations, and what each contender was found to err by and to move."""

    def __init__(self, case: dict, device: torch.device) -> None:
        self.case, self.dtype = case, getattr(torch, case["dtype"])
        self.weight = shared_weight(case["n"], case["k"], device)
        draw = torch.Generator(device).manual_seed(1)
        self.x = torch.randn(case["m"], case["k"], generator=draw, device=device).to(self.dtype)
        self.tokens = torch.linspace(0, case["m"] - 1, min(case["m"], SAMPLED[0]), device=device).long()
        self.figures: dict[str, dict] = {}

    def makers(self, plan: Plan) -> dict[str, Callable[[], Contender]]:
        """Makers of the contenders, by name."""
        made = {"torch": self.dense}
        for activations, bits in plan.packed(self.case):
            name = f"gq {activations}/{bits}" if activations else f"gq/{bits}"
            made[name] = partial(self.packed, name, bits, activations)
        return made | {name: partial(self.peer, name) for name in PEERS}

    def dense(self) -> Contender:
        weight = self.weight.once(Tensor.to, self.dtype)
        call = partial(linear, self.x, weight)
        return self._contender("torch", call, harness.tensor_bytes(weight), self.dtype, NUMERICAL_ERROR)

    def packed(self, name: str, bits: int, activations: str | None) -> Contender:
        packed = self.weight.once(pack, bits, activations or "float")
        call = partial(
            F.packed_linear,
            self.x,
            packed.codes,
            packed.codebook,
            packed.scale,
            bits=bits,
            in_features=self.case["k"],
            activations=activations,
            layout=packed.layout,
        )
        moved = math.ceil(bits * self.weight.float.numel() / 8) + harness.tensor_bytes(packed.scale)
        operands = STORED[activations] if activations else self.dtype

        def check() -> None:
            tokens = self.x[self.tokens].float()
            tokens = F.quantize_activations(tokens, activations) if activations else tokens
            decoded = packed.decode()[self.weight.rows].double()
            error = _error(self._sample(call()), tokens.double() @ decoded.t())
            if not error < NUMERICAL_ERROR:
                raise Wrong(f"the product is off by {error:.2g} from that with the weight as decoded")
            self.figures[name]["numerical_error"] = error

        return self._contender(name, call, moved, operands, math.inf, check)

    def peer(self, name: str) -> Contender:
        layer = self.weight.once(PEERS[name], self.dtype)
        operands = torch.int8 if name.endswith("/8") else self.dtype
        call = partial(layer.forward, layer.prepare(self.x))
        return self._contender(name, call, layer.weight_bytes, operands, PEER_ERROR)

    def _contender(
        self,
        name: str,
        call: Callable[[], Tensor],
        weight_bytes: int,
        operands: torch.dtype,
        limit: float,
        check_further: harness.Call = lambda: None,
    ) -> Contender:
        """Of any layer, whose error from the exact product is noted, and must be below ``limit``."""
        moved = weight_bytes + self.x.element_size() * self.case["m"] * (self.case["k"] + self.case["n"])
        self.figures[name] = {"bytes": moved, "weight_bytes": weight_bytes, "operands": str(operands)[len("torch.") :]}

        def check() -> None:
            out = call()
            if not out.is_floating_point():
                return  # a product of integers alone, which are not scaled yet
            error = _error(self._sample(out), self.x[self.tokens].double() @ self.weight.exact.t())
            if not error < limit:
                raise Wrong(f"the product is off by {error:.2g}")
            self.figures[name]["error"] = error
            check_further()

        return Contender(lambda: call, check)

    def _sample(self, out: Tensor) -> Tensor:
        return out[self.tokens][:, self.weight.rows].double()

    def add_figures(self, results: dict[str, dict], ceilings: dict) -> None:
        """Adds to each contender that was timed what the module's docstring lists."""
        operations = 2 * self.case["n"] * self.case["k"] * self.case["m"]
        for name, result in results.items():
            if "ms" not in result:
                continue
            result |= self.figures[name]
            time, peak = result["ms"]["median"], ceilings["matmul_tops"].get(result["operands"])
            if self.case["mode"] in FLUSHED:
                floor = ceilings["operation_ms"] + result["bytes"] / ceilings["copy_gb_per_s"] / 1e6
                result["floor_share"] = floor / time
            if peak:
                result["peak_share"] = operations / time / 1e9 / peak
            if "ms" in results["torch"]:
                result["speedup"] = results["torch"]["ms"]["median"] / time


def _error(out: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of what is expected."""
    return ((out - expected).square().mean() / expected.square().mean()).sqrt().item()


if __name__ == "__main__":
    harness.command(Plan, run, "Measure linear layers on packed weights.")()
