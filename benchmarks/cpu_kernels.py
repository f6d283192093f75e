"""What do low-bit layers take on a CPU, where one token at a time goes through weights in a cache or out of memory?

    python benchmarks/cpu_kernels.py            # the full record, benchmarks/results/<device>/cpu_kernels.json
    python benchmarks/cpu_kernels.py --quick

A case is a layer (linear N x K, or an LSTM with states of N and inputs of K), M tokens or steps of one sequence, a
number of threads and a place. In each place, a pass goes through a set of equal layers, each in memory of its own, and
its time is divided by their number:

    L2        one small weight; a sample is many passes
    cache     as many as have the weights of a recognizer, which a large last-level cache holds at 8 bits
    memory    as many as take four times the last-level cache, for each contender at its own width, so that all of them
              read the same bytes of memory and none has its set half in the cache

Caches are warm but in the last place: three passes run, untimed, before each sample, since a large last-level cache
does not keep what was read but once. Contenders:

    gq int8/BITS          own layers: an int8 codebook, and activations that the call quantizes to int8
    gq/BITS               own layers: a float32 codebook, and activations as they are
    native int8/BITS      the native kernel itself, without torch's dispatch and the operator's checks
    torch fp32, torch bf16
    torch int8/8          torch's dynamically quantized layer; torch int4/4 its product of 4-bit weights (bfloat16)
    onnxruntime int8/8    its dynamically quantized operators; onnxruntime nbits/BITS its MatMulNBits
    read sum, read dot    no layer, but what reading as many bytes as an 8-bit set takes: torch.sum of int64, and
                          torch.dot of the one half with the other, which are two streams. A kernel that prefetches
                          may be faster

Own weights and torch's plain tensors lie in huge pages where the system gives them on request; what others allocate is
left as they do. Own codes are random: times do not depend on them. Beside each time stand the bytes of a layer, of its
codes and of its set; for one token, `gb_per_s` of codes, and `read_share`, that over the faster of the two reads; and,
as times as fast in the same turns, `over_own_8bit` (gq int8/8, but of a native kernel, the native one),
`over_torch_int8` and `over_torch_fp32`. The goals that were set are printed at last (cpu_goals.py).
plots/cpu_kernels.py draws the figure.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import cpu_goals
import harness
import linear_peers
import onnx_peers
import torch
from harness import Contender, Mode, Timing, Unavailable, Wrong
from torch import Tensor, nn
from torch.nn.functional import linear

from gq_triton import functional as F
from gq_triton.config import GQConfig
from gq_triton.kernels import native
from gq_triton.kernels.packing import packed_bytes
from gq_triton.layers.packed_weight import PackedWeight
from gq_triton.models import RNNT, RNNTConfig

CPU = torch.device("cpu")
LABELS = 2500  # of the recognizer whose layers are measured
CACHED_WEIGHTS = 14 * 4096 * 1024  # about what it has
GATES = 4  # of an LSTM
WARM_PASSES = 3  # before each sample
CACHES = 4  # how many last-level caches a set in memory fills
MODES = {"L2": Mode(calls=20), "cache": Mode(), "memory": Mode()}
OWN_ERROR = 1e-3  # of float32 sums, and, in an LSTM, of a hidden state that was rounded the other way
PEER_ERROR = {8: 0.05, 4: 0.2, 2: 0.6, 16: 0.02, 32: 1e-4}  # by width
REFERENCES = {"over_torch_int8": "torch int8/8", "over_torch_fp32": "torch fp32/32"}

Layer = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Suite:
    """Cases of one kind.

    Attributes:
        op: "linear" or "lstm".
        place: of the weights; a key of `MODES`.
        shapes: (N, K).
        tokens: M.
        integer: widths of own layers with int8 activations.
        weight_only: widths of own layers without.
        native: widths at which the kernel is called directly.
        nbits: widths of onnxruntime's MatMulNBits.
        most_threads: of the plan's numbers of threads, the largest.
    """

    op: str
    place: str
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...] = (1,)
    integer: tuple[int, ...] = (8, 5, 4, 3, 2, 1)
    weight_only: tuple[int, ...] = (8, 4)
    native: tuple[int, ...] = ()
    nbits: tuple[int, ...] = (4,)
    most_threads: int = 2


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        suites: the cases.
        threads: numbers of threads.
        instructions: the instruction set of the native kernels; None without them.
        last_level_cache: its bytes, as the system says.
        memory_bytes: of a set that is to lie in memory.
        not_measured: what this machine cannot show.
        timing: of each contender.
    """

    suites: tuple[Suite, ...]
    threads: tuple[int, ...]
    instructions: str | None
    last_level_cache: int
    memory_bytes: int
    not_measured: tuple[str, ...]
    timing: Timing

    @classmethod
    def full(cls, device: torch.device) -> Plan:
        every = (8, 5, 4, 3, 2, 1)
        suites = (
            Suite("linear", "L2", ((1024, 1024),), native=every, nbits=(4, 2)),
            Suite("linear", "cache", ((4096, 1024),), native=every, nbits=(4, 2)),
            Suite("lstm", "cache", ((1024, 1024), (1024, 2048), (768, 256)), (1, 8), native=every, nbits=()),
            Suite("linear", "cache", recognizer_shapes((4096, 1024)), (1,), (8, 5, 4, 2, 1), (4,)),
            Suite("linear", "cache", recognizer_shapes(), (4, 16), (8, 5, 4, 2, 1), (4,), most_threads=1),
            Suite("linear", "memory", ((4096, 2048),), weight_only=(), native=every),
        )
        return cls._that_fits(suites, device, Timing(seconds=0.07, least=5, most=40))

    @classmethod
    def quick(cls, device: torch.device) -> Plan:
        suites = (
            Suite("linear", "L2", ((1024, 1024),), native=(8, 4)),
            Suite("linear", "cache", ((4096, 1024),), native=(8, 4)),
            Suite("lstm", "cache", ((1024, 1024),), native=(8, 4), nbits=()),
        )
        return cls._that_fits(suites, device, Timing(seconds=0.05, least=3, most=20))

    @classmethod
    def _that_fits(cls, suites: tuple[Suite, ...], device: torch.device, timing: Timing) -> Plan:
        if device.type != "cpu":
            raise click.UsageError(f"this benchmark is a CPU's, not a {device.type} device's: hide that one from torch")
        cache = last_level_cache()
        plan = cls(suites, thread_counts(), native.isa(), cache, CACHES * cache, (), timing)
        sets = max((plan.sets(suite) for suite in suites if suite.place == "memory"), default=0)
        free = harness.free_memory(device)
        if sets * plan.memory_bytes <= 0.8 * free:
            return plan
        reason = f"weights out of memory: {sets} sets of {plan.memory_bytes:,} bytes do not fit in the {free:,} free"
        cached = tuple(suite for suite in suites if suite.place != "memory")
        return replace(plan, suites=cached, not_measured=(reason,))

    @staticmethod
    def sets(suite: Suite) -> int:
        """How many sets a case has at a time: own ones, four of torch, onnxruntime's, and what is only read."""
        return len(suite.integer) + len(suite.weight_only) + 4 + 1 + len(suite.nbits) + 1

    def cases(self) -> list[dict]:
        """By shape, so that sets are made once for all numbers of tokens and threads."""
        return [case for case, _ in self.suites_of_cases()]

    def suites_of_cases(self) -> Iterator[tuple[dict, Suite]]:
        """Each case with its suite."""
        for suite in self.suites:
            for n, k in suite.shapes:
                for threads, m in product(self.threads, suite.tokens):
                    if threads <= suite.most_threads:
                        yield dict(op=suite.op, place=suite.place, n=n, k=k, m=m, threads=threads), suite


def recognizer_shapes(*others: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(N, K) of all matrices of the recognizer `base` but ``others``, its embedding's, which is not multiplied, too."""
    with torch.device("meta"):
        model = RNNT(RNNTConfig.preset("base", LABELS))
    shapes = {tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2}
    return tuple(sorted(shapes - {tuple(model.predictor.embedding.weight.shape), *others}))


def thread_counts() -> tuple[int, ...]:
    """One, and two where this process may use as many processors."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (1, 2) if allowed > 1 else (1,)


def last_level_cache() -> int:
    """Bytes of the largest cache that this processor has, as the system says; 32 MiB where it does not."""
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in found]
    return max(sizes, default=32 << 20)


def run(plan: Plan, folder: Path, device: torch.device) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    for line in plan.not_measured:
        click.echo(f"not measured: {line}", err=True)
    record = harness.Record("cpu_kernels", asdict(plan), folder)
    record.measure_ceilings(device)
    suites = dict(zip(map(str, plan.cases()), (suite for _, suite in plan.suites_of_cases()), strict=True))
    threads = torch.get_num_threads()
    try:
        for case in record.missing(plan.cases()):
            record.add(case, measured(case, suites[str(case)], plan))
    finally:
        torch.set_num_threads(threads)
    click.echo(cpu_goals.summary(record.content))
    return record.finish()


@torch.inference_mode()
def measured(case: dict, suite: Suite, plan: Plan) -> dict[str, dict]:
    torch.set_num_threads(case["threads"])
    problem = Problem(case, plan.memory_bytes)
    results = harness.measure(problem.makers(suite), plan.timing, CPU, MODES[case["place"]])
    problem.add_figures(results)
    return results


# --- layers -----------------------------------------------------------------------------------------------------------


def in_memory_of_its_own(value: Any) -> Any:
    """A copy of a layer: tensors of a ``partial`` in huge pages where there are any, other objects as they copy."""
    if isinstance(value, partial):
        return partial(value.func, **{name: in_memory_of_its_own(part) for name, part in value.keywords.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(map(in_memory_of_its_own, value))
    if isinstance(value, Tensor):
        return resident(torch.empty_like(value)).copy_(value)
    return copy.deepcopy(value)


def resident(tensor: Tensor) -> Tensor:
    """The tensor, which nothing has been written to, with huge pages asked for."""
    if native.available():
        native.advise_huge(tensor)
    return tensor


def random_weight(rows: int, columns: int, groups: int, bits: int, codebook: str) -> PackedWeight:
    """Any codes, and codebook entries at equal distances."""
    config = GQConfig(bits=bits, codebook=codebook)
    packed = PackedWeight(config, torch.Size([rows, columns]), torch.float32, CPU, groups)
    entries = torch.linspace(-1, 1, 2**bits)
    buffers = {
        "codes": torch.randint(0, 256, (packed_bytes(rows * columns, bits),), dtype=torch.uint8),
        "codebook": (127 * entries).round() if codebook == "int8" else entries,
        "scale": (torch.rand(rows) + 0.5) / math.sqrt(columns),
    }
    packed.load_state_dict(buffers)
    return packed


def own_linear(packed: PackedWeight, activations: str | None) -> partial:
    return partial(
        F.packed_linear,
        packed=packed.codes,
        codebook=packed.codebook,
        scale=packed.scale,
        bits=packed.config.bits,
        in_features=packed.shape[1],
        activations=activations,
        layout=packed.layout,
    )


def own_lstm(packed: list[PackedWeight], biases: list[Tensor], activations: str | None) -> partial:
    return partial(
        F.packed_recurrent,
        states=[torch.zeros(1, packed[1].shape[1])] * 2,
        weights=[(weight.codes, weight.codebook, weight.scale) for weight in packed],
        biases=biases,
        bits=[weight.config.bits for weight in packed],
        activations=[activations] * 2,
        layout=packed[0].layout,
    )


def native_linear(layer: partial, x: Tensor, threads: int) -> Layer:
    """The kernel that a layer of :func:`own_linear` comes to, with all its arguments but x made beforehand."""
    own = layer.keywords
    rows = len(own["scale"])
    weight = native.Weight(own["packed"], own["codebook"], own["scale"], own["bits"], rows, x.shape[-1])
    out = torch.empty(len(x), rows)

    def forward(x: Tensor) -> Tensor:
        native.linear(x, weight, None, out, own["activations"], threads)
        return out

    return forward


def native_lstm(layer: partial, x: Tensor, threads: int) -> Layer:
    """The kernel that a layer of :func:`own_lstm` comes to, likewise."""
    own = layer.keywords
    states, last = own["states"], [torch.empty_like(state) for state in own["states"]]
    sizes = x.shape[-1], states[0].shape[-1]
    weights = [
        native.Weight(*tensors, bits, len(tensors[2]), columns, GATES)
        for tensors, bits, columns in zip(own["weights"], own["bits"], sizes, strict=True)
    ]
    layer, segments = native.Recurrent(weights, own["biases"], own["activations"], threads), native.Segments
    out = torch.empty(len(x), sizes[1])

    def forward(x: Tensor) -> list[Tensor]:
        layer(x.view(len(x), -1), segments.of_one_sequence(len(x)), states, out, last)
        return [out, *last]

    return forward


def exact_lstm(x: Tensor, weights: list[Tensor], biases: list[Tensor], activations: str | None) -> Tensor:
    """The hidden states (T, 1, H) of one sequence, in float64; ``activations`` says how inputs and h are rounded."""
    weights, bias = [weight.double().t() for weight in weights], sum(biases).double()
    h = c = torch.zeros(1, len(weights[1]), dtype=torch.float64)
    outputs = []
    for token in x:
        gates = rounded(token, activations) @ weights[0] + rounded(h, activations) @ weights[1] + bias
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


def rounded(tokens: Tensor, activations: str | None) -> Tensor:
    """Activations as the layer rounds them, in float64."""
    return (F.quantize_activations(tokens.float(), activations) if activations else tokens).double()


def dynamic_int8_lstm(lstm: nn.LSTM) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but what torch has
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(nn.Sequential(lstm), {nn.LSTM})[0]


class Set(NamedTuple):
    """Equal layers, each in memory of its own.

    Attributes:
        calls: each computes a layer, or several at once.
        layer_bytes: that one layer reads of its weights, scales included.
        count: of layers.
        outputs: the layers' outputs of what a call returns.
    """

    calls: list[Layer]
    layer_bytes: int
    count: int
    outputs: Callable[[Any], list[Tensor]] = lambda result: [result]


class Weights:
    """A float layer, and sets made of it when first asked for: they serve all cases of a shape in a place.

    Args:
        set_bytes: of each set; None for as many layers as have `CACHED_WEIGHTS`, 0 for one.
    """

    def __init__(self, op: str, rows: int, columns: int, set_bytes: int | None) -> None:
        torch.manual_seed(0)
        self.lstm, self.set_bytes = op == "lstm", set_bytes
        self.layer = nn.LSTM(columns, rows) if self.lstm else nn.Linear(columns, rows, bias=False)
        self.matrices = [weight for weight in self.layer.parameters() if weight.dim() == 2]
        self.biases = [bias for bias in self.layer.parameters() if bias.dim() == 1]
        self.size = sum(matrix.numel() for matrix in self.matrices)
        self.made: dict[object, Any] = {}

    def once(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """``make(*arguments)``, made once."""
        key = make, *arguments
        if key not in self.made:
            self.made[key] = make(*arguments)
        return self.made[key]

    def count(self, layer_bytes: int) -> int:
        """How many layers of so many bytes make a set."""
        if self.set_bytes is None:
            return max(1, round(CACHED_WEIGHTS / self.size))
        return max(1, math.ceil(self.set_bytes / layer_bytes))

    def copies(self, layer: Layer, layer_bytes: int) -> Set:
        count = self.count(layer_bytes)
        first = (lambda result: [result[0]]) if self.lstm else (lambda result: [result])
        return Set([in_memory_of_its_own(layer) for _ in range(count)], layer_bytes, count, first)

    def packed(self, bits: int, codebook: str) -> list[PackedWeight]:
        groups = GATES if self.lstm else 1
        return [random_weight(*matrix.shape, groups, bits, codebook) for matrix in self.matrices]

    def own(self, bits: int, activations: str | None) -> Set:
        packed = self.once(self.packed, bits, activations or "float")
        read = sum(weight.codes.numel() + harness.tensor_bytes(weight.scale) for weight in packed)
        layer = own_lstm(packed, self.biases, activations) if self.lstm else own_linear(packed[0], activations)
        return self.copies(layer, read)

    def torch_float(self, dtype: torch.dtype) -> Set:
        read = self.size * dtype.itemsize
        if self.lstm:
            return self.copies(copy.deepcopy(self.layer).to(dtype), read)
        return self.copies(partial(linear, weight=self.matrices[0].to(dtype)), read)

    def torch_int8(self) -> Set:
        if self.lstm:
            return self.copies(dynamic_int8_lstm(self.layer), self.size)
        layer = linear_peers.torch_int8(self.matrices[0].detach(), torch.float32)
        return self.copies(layer.forward, layer.weight_bytes)

    def torch_int4(self) -> Set:
        layer = linear_peers.torch_int4(self.matrices[0].detach(), torch.bfloat16)
        return self.copies(layer.forward, layer.weight_bytes)

    def onnx_int8(self, threads: int) -> Set:
        make = onnx_peers.lstm_int8(self.layer) if self.lstm else onnx_peers.int8(self.matrices[0].detach())
        return self._onnx(make, threads)

    def onnx_nbits(self, bits: int, threads: int) -> Set:
        return self._onnx(onnx_peers.nbits(self.matrices[0].detach(), bits), threads)

    def _onnx(self, layer: onnx_peers.OnnxLayer, threads: int) -> Set:
        count = self.count(layer.weight_bytes)
        return Set(layer.copies(count, threads), layer.weight_bytes, count, list)

    def to_read(self) -> Tensor:
        """As many bytes as a set of 8-bit layers has, float32."""
        return resident(torch.empty(self.count(self.size) * self.size // 4)).fill_(1.0)


shared_weights = lru_cache(maxsize=1)(Weights)


# --- contenders -------------------------------------------------------------------------------------------------------


class Problem:
    """One case: activations, and what each contender reads."""

    def __init__(self, case: dict, memory_bytes: int) -> None:
        set_bytes = {"L2": 0, "cache": None, "memory": memory_bytes}[case["place"]]
        self.case, self.weights = case, shared_weights(case["op"], case["n"], case["k"], set_bytes)
        self.x = torch.randn(case["m"], *[1] * self.weights.lstm, case["k"])
        self.figures: dict[str, dict] = {}

    def makers(self, suite: Suite) -> dict[str, Callable[[], Contender]]:
        """Makers of the contenders, by name. Two that share a set are far from each other: what the first leaves of it
        in a cache must not be the second's gain."""
        made = {f"gq int8/{bits}": partial(self.own, bits, "int8") for bits in suite.integer}
        made |= {f"gq/{bits}": partial(self.own, bits, None) for bits in suite.weight_only}
        peers = ["torch fp32/32", "torch bf16/16", "torch int8/8", "onnxruntime int8/8"]
        if not self.weights.lstm:
            peers += ["torch int4/4", *(f"onnxruntime nbits/{bits}" for bits in suite.nbits)]
        made |= {name: partial(self.peer, name) for name in peers}
        made |= {f"native int8/{bits}": partial(self.native, bits) for bits in suite.native}
        if self.case["m"] == 1:
            made |= {f"read {way}": partial(self.read, way) for way in ("sum", "dot")}
        return made

    def own(self, bits: int, activations: str | None) -> Contender:
        name = f"gq {activations}/{bits}" if activations else f"gq/{bits}"
        layers = self.weights.once(self.weights.own, bits, activations)
        return self._contender(name, layers, self.x, lambda: self._expected(bits, activations), OWN_ERROR)

    def native(self, bits: int) -> Contender:
        if not native.available():
            raise Unavailable(native.reason() or "there is no native library")
        layers = self.weights.once(self.weights.own, bits, "int8")
        make = native_lstm if self.weights.lstm else native_linear
        calls = [make(layer, self.x, self.case["threads"]) for layer in layers.calls]
        layers = layers._replace(calls=calls)
        return self._contender(f"native int8/{bits}", layers, self.x, lambda: self._expected(bits, "int8"), OWN_ERROR)

    def _expected(self, bits: int, activations: str | None) -> Tensor:
        """What own layers should compute."""
        matrices = [weight.decode() for weight in self.weights.once(self.weights.packed, bits, activations or "float")]
        return self._exact(matrices, activations)

    def _exact(self, matrices: list[Tensor], activations: str | None = None) -> Tensor:
        if self.weights.lstm:
            return exact_lstm(self.x, matrices, self.weights.biases, activations)
        return rounded(self.x, activations) @ matrices[0].double().t()

    def peer(self, name: str) -> Contender:
        kind, bits = name.split("/")
        weights, threads = self.weights, self.case["threads"]
        made = {
            "torch fp32": (weights.torch_float, torch.float32),
            "torch bf16": (weights.torch_float, torch.bfloat16),
            "torch int8": (weights.torch_int8,),
            "torch int4": (weights.torch_int4,),
            "onnxruntime int8": (weights.onnx_int8, threads),
            "onnxruntime nbits": (weights.onnx_nbits, int(bits), threads),
        }
        x = self.x.bfloat16() if kind in ("torch bf16", "torch int4") else self.x
        limit = PEER_ERROR[int(bits)]
        return self._contender(name, weights.once(*made[kind]), x, lambda: self._exact(weights.matrices), limit)

    def read(self, way: str) -> Contender:
        """Reads as many bytes as a set of 8-bit layers has."""
        data = self.weights.once(self.weights.to_read)
        calls = {"sum": partial(torch.sum, data.view(torch.int64)), "dot": partial(torch.dot, *data.view(2, -1))}
        layers = Set([lambda x: calls[way]()], self.weights.size, self.weights.count(self.weights.size))
        return self._contender(f"read {way}", layers, self.x)

    def _contender(
        self,
        name: str,
        layers: Set,
        x: Tensor,
        expected: Callable[[], Tensor] | None = None,
        limit: float = math.inf,
    ) -> Contender:
        codes = self.weights.size * int(name.split("/")[1]) // 8 if "/" in name else layers.layer_bytes
        set_bytes = layers.count * layers.layer_bytes
        self.figures[name] = {
            "layer_bytes": layers.layer_bytes,
            "code_bytes": codes,
            "layers": layers.count,
            "set_bytes": set_bytes,
        }

        def call() -> None:
            for layer in layers.calls:
                layer(x)

        def prepare() -> harness.Call:
            for _ in range(0 if self.case["place"] == "memory" else WARM_PASSES):
                call()
            return call

        def check() -> None:
            wanted = expected()
            for layer in layers.calls[:1] + layers.calls[-1:]:
                for out in layers.outputs(layer(x)):
                    error = _error(out.double().reshape(wanted.shape), wanted)
                    if not error < limit:
                        raise Wrong(f"the output is off by {error:.2g}")
            self.figures[name]["error"] = error

        return Contender(prepare, check if expected else lambda: None)

    def add_figures(self, results: dict[str, dict]) -> None:
        """Turns times into those of one layer, and adds what the module's docstring lists."""
        timed = {name: result for name, result in results.items() if "ms" in result}
        for name, result in timed.items():
            result |= self.figures[name]
            times = {key: value / result["layers"] for key, value in result["ms"].items() if key != "samples"}
            result["ms"] |= times
        if self.case["m"] == 1:
            for result in timed.values():
                result["gb_per_s"] = harness.gb_per_s(result["code_bytes"], result)
            ceiling = max(timed[f"read {way}"]["gb_per_s"] for way in ("sum", "dot"))
            for result in timed.values():
                result["read_share"] = result["gb_per_s"] / ceiling
        for name, result in timed.items():
            own = "native int8/8" if name.startswith("native") else "gq int8/8"
            for figure, reference in (REFERENCES | {"over_own_8bit": own}).items():
                if reference in timed:
                    result[figure] = timed[reference]["ms"]["median"] / result["ms"]["median"]


def _error(out: Tensor, expected: Tensor) -> float:
    """RMS of the error over RMS of what is expected."""
    return ((out - expected).square().mean() / expected.square().mean()).sqrt().item()


if __name__ == "__main__":
    harness.command(Plan, run, "Measure low-bit layers on a CPU, in caches and out of memory.")()
