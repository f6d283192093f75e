"""What does fake-quantizing a weight cost, at any size and width, beside its peers and a copy of the same bytes?

    python benchmarks/quantizer.py            # the full record, benchmarks/results/<device>/quantizer.json
    python benchmarks/quantizer.py --quick

One weight (C, n) with a scale per channel, every contender from the same numbers. Passes: `forward`; `backward` of
weight and scale; `backward with centroids`; and `tables`, the small program that turns centroids into the kernels'
tables, by itself (for one quantizer, and for a group in one go). Times of `gq` include it, those of `gq kernel` do not.
Bytes are counted on paper: forward reads and writes the weight once, backward reads weight and gradient and writes a
gradient. plots/quantizer.py draws the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import harness
import peers
import torch
from harness import Contender, Timing, Wrong
from torch import Tensor

from gq_triton import functional as F
from gq_triton.kernels import native
from gq_triton.kernels.fake_quantize import fake_quantize, reference
from gq_triton.kernels.tables import build_tables, codebook

MU, HARDNESS = 8.0, 4.0
PLAIN_TENSORS = 8  # of one number for every weight and centroid, that the plain form holds at a time: 7.4 measured
TOLERANCE = 1e-2  # RMS error over RMS: what is wrong errs by far more, and tests/kernels checks to rounding
CHECKED = 1 << 14  # weights
BACKWARDS = ("backward", "backward with centroids")


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        sizes: binary logarithms of the number of weights.
        main: the size at which every contender is measured at every width.
        bits: the widths.
        peer_bits: widths of the peers at other sizes.
        dtypes: of the weight; all but the first one at the main size only, without the plain form.
        compiled: whether to measure what torch.compile makes of the peers, which takes long to compile.
        group: quantizers in a group of tables.
        instructions: the instruction set of the native kernels, which the operators run on a CPU; None without them.
        timing: of each contender.
    """

    sizes: tuple[int, ...]
    main: int
    bits: tuple[int, ...]
    peer_bits: tuple[int, ...]
    dtypes: tuple[str, ...]
    compiled: bool
    group: int
    instructions: str | None
    timing: Timing

    @classmethod
    def full(cls, device: torch.device) -> Plan:
        if device.type == "cuda":
            sizes, main, dtypes = (16, 18, 20, 22, 24, 26, 27), 26, ("float32", "bfloat16")
        else:
            sizes, main, dtypes = (16, 18, 20, 22, 24), 20, ("float32",)
        return cls(sizes, main, tuple(range(1, 9)), (4,), dtypes, True, 192, native.isa(), Timing(seconds=0.5))

    @classmethod
    def quick(cls, device: torch.device) -> Plan:
        sizes, main = ((20, 26), 26) if device.type == "cuda" else ((16, 18), 18)
        return cls(sizes, main, (1, 4, 8), (4,), ("float32",), False, 192, native.isa(), Timing(seconds=0.1))

    def cases(self) -> list[dict]:
        """Tables first, then every size, dtype and pass."""
        tables = [{"pass": passed, "group": group} for group in (1, self.group) for passed in ("forward", "backward")]
        weights = [
            {"size": 2**size, "dtype": dtype, "pass": passed}
            for size in self.sizes
            for dtype in self.dtypes
            if size == self.main or dtype == self.dtypes[0]
            for passed in ("forward", *BACKWARDS)
        ]
        return [{"of": "tables", **case} for case in tables] + [{"of": "weight", **case} for case in weights]


def run(plan: Plan, folder: Path, device: torch.device) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    record = harness.Record("quantizer", asdict(plan), folder)
    record.measure_ceilings(device)
    for case in record.missing(plan.cases()):
        makers = table_makers(plan, case, device) if case["of"] == "tables" else weight_makers(plan, case, device)
        results = harness.measure(makers, plan.timing, device)
        if case["of"] == "weight":
            add_bandwidth(results, case)
        record.add(case, results)
        torch.compiler.reset()  # what was compiled for this case is of no use to the next
    return record.finish()


def add_bandwidth(results: dict[str, dict], case: dict) -> None:
    """Adds the bytes that must move, GB/s, and the share of what a copy of the weight reached in the same turns."""
    weight = case["size"] * getattr(torch, case["dtype"]).itemsize
    for name, result in results.items():
        result["bytes"] = weight * (2 if name == "copy" or case["pass"] == "forward" else 3)
    timed = [result for result in results.values() if "ms" in result]
    for result in timed:
        result["gb_per_s"] = harness.gb_per_s(result["bytes"], result)
        result["copy_share"] = result["gb_per_s"] / results["copy"]["gb_per_s"]


# --- contenders -------------------------------------------------------------------------------------------------------


def weight_makers(plan: Plan, case: dict, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Makers of the contenders of a case, by `NAME/BITS`; and of a copy."""
    problem = Problem(case["size"], getattr(torch, case["dtype"]), case["pass"], device)
    peer_bits = plan.bits if case["size"] == 2**plan.main else plan.peer_bits
    makers = {"copy": problem.copy}
    widths: dict[Callable[[int], Contender], tuple[int, ...]] = {problem.gq: plan.bits, problem.gq_kernel: plan.bits}
    widths[problem.gq_soft] = peer_bits
    if case["dtype"] == plan.dtypes[0]:
        widths[problem.plain] = peer_bits
        widths[problem.plain_compiled] = peer_bits if plan.compiled else ()
    if case["pass"] != "backward with centroids":
        widths |= dict.fromkeys([problem.lsq, problem.uniform, problem.torchao], peer_bits)
        compiled = [problem.lsq_compiled, problem.torchao_compiled]
        widths |= dict.fromkeys(compiled, plan.peer_bits if plan.compiled else ())
    for maker, chosen in widths.items():
        name = maker.__name__.replace("_", " ")
        makers |= {f"{name}/{bits}": partial(maker, bits) for bits in chosen}
    return makers


class Problem:
    """One weight, and everything that is asked of it in one pass."""

    def __init__(self, size: int, dtype: torch.dtype, passed: str, device: torch.device) -> None:
        rows = 1 << (size.bit_length() - 1) // 2
        draw = torch.Generator(device).manual_seed(0)
        self.passed, self.device, self.size = passed, device, size
        self.weight = torch.randn(rows, size // rows, generator=draw, device=device).to(dtype).requires_grad_()
        self.grad = torch.randn(self.weight.shape, generator=draw, device=device).to(dtype)
        # Just above the largest weight: where weights are clamped, the reference has no gradient and the kernels have.
        self.scale = (1.01 * self.weight.detach().float().abs().amax(1)).requires_grad_()
        count = min(rows, max(4, CHECKED * rows // size))
        self.rows = torch.linspace(0, rows - 1, count, device=device).long()
        self.mu = torch.full((), MU, device=device)
        self.hardness = torch.full((), HARDNESS, device=device)

    def centroids(self, bits: int) -> Tensor:
        """(2**bits,), as if trained: not quite uniform. They have a gradient but in the pass that leaves it out."""
        index = torch.arange(2**bits, device=self.device)
        uniform = torch.linspace(-1, 1, 2**bits, device=self.device)
        inner = (index > 0) & (index < 2**bits - 1)
        shift = torch.where(inner, 0.4 / 2**bits * torch.sin(index.float()), 0.0)
        return (uniform + shift).requires_grad_(self.passed != "backward")

    # Each of these methods makes a contender of that name.

    def copy(self) -> Contender:
        target, source = torch.empty_like(self.grad), self.grad
        return Contender(lambda: partial(target.copy_, source))

    def gq(self, bits: int, forward: str = "hard") -> Contender:
        quantize = partial(F.fake_quantize, mu=self.mu, hardness=self.hardness, forward=forward)
        return self._general(quantize, bits, forward)

    def gq_soft(self, bits: int) -> Contender:
        return self.gq(bits, "soft")

    def gq_kernel(self, bits: int) -> Contender:
        """The operator alone, on tables that were built before."""
        centroids = self.centroids(bits)
        built = build_tables(centroids.detach()[None], self.mu[None], self.hardness[None], None, torch.float32)
        learned = centroids.requires_grad

        def quantize(weight: Tensor, scale: Tensor, tables: Tensor) -> Tensor:
            return fake_quantize([weight], scale, tables, True, False, 0.0, learned, weight.dtype)[0]

        inputs = [self.weight, self.scale, built.requires_grad_(learned)]
        return self._contender(quantize, inputs, partial(self._check_general, bits, "hard"))

    def plain(self, bits: int, compiled: bool = False) -> Contender:
        quantize = partial(peers.plain, mu=self.mu, hardness=self.hardness)
        if not compiled:
            count = PLAIN_TENSORS * 4 * self.size * 2**bits
            harness.require_memory(count, f"the plain form at {bits} bits", self.device)
        return self._general(compile_alone(quantize) if compiled else quantize, bits, "soft")

    def plain_compiled(self, bits: int) -> Contender:
        return self.plain(bits, compiled=True)

    def lsq(self, bits: int, compiled: bool = False) -> Contender:
        quantize = partial(peers.lsq, bits=bits)
        return self._stepwise(compile_alone(quantize) if compiled else quantize, bits)

    def lsq_compiled(self, bits: int) -> Contender:
        return self.lsq(bits, compiled=True)

    def uniform(self, bits: int) -> Contender:
        return self._stepwise(partial(peers.uniform, bits=bits), bits, learned=False)

    def torchao(self, bits: int, compiled: bool = False) -> Contender:
        quantize = peers.torchao(bits)
        quantize = compile_alone(quantize) if compiled else quantize
        return self._contender(quantize, [self.weight], partial(self._check_rounding, bits))

    def torchao_compiled(self, bits: int) -> Contender:
        return self.torchao(bits, compiled=True)

    def _general(self, quantize: Callable[..., Tensor], bits: int, forward: str) -> Contender:
        inputs = [self.weight, self.scale, self.centroids(bits)]
        return self._contender(quantize, inputs, partial(self._check_general, bits, forward))

    def _stepwise(self, quantize: Callable[..., Tensor], bits: int, learned: bool = True) -> Contender:
        step = (2 / 2**bits * self.scale.detach()).to(self.weight.dtype).requires_grad_(learned)
        return self._contender(quantize, [self.weight, step], partial(self._check_rounding, bits))

    def _contender(
        self, quantize: Callable[..., Tensor], inputs: list[Tensor], check: Callable[[Tensor, list], None]
    ) -> Contender:
        forward = partial(quantize, *inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]

        def backward() -> harness.Call:
            out = forward()
            return lambda: torch.autograd.grad(out, wanted, self.grad)

        def checked() -> None:
            out = forward()
            grads = [] if self.passed == "forward" else torch.autograd.grad(out, wanted, self.sampled_grad)
            check(out.detach()[self.rows], list(grads))

        return Contender((lambda: forward) if self.passed == "forward" else backward, checked)

    # Checks look at some rows only: the incoming gradient is zero in all others.

    @cached_property
    def sampled_grad(self) -> Tensor:
        grad = torch.zeros_like(self.grad)
        grad[self.rows] = self.grad[self.rows]
        return grad

    def _check_general(self, bits: int, forward: str, out: Tensor, grads: list[Tensor]) -> None:
        weight = self.weight.detach()[self.rows].double().requires_grad_()
        scale = self.scale.detach()[self.rows].double().requires_grad_()
        centroids = self.centroids(bits).detach().double().requires_grad_()
        mu, hardness = self.mu.double(), self.hardness.double()
        values = codebook(centroids, mu, None)
        soft = reference(weight, scale, centroids, values, mu=mu, hardness=hardness)
        hard = reference(weight, scale, centroids, values, mu=mu, hardness=hardness, forward="hard")
        require_close("the quantized weight", out, soft if forward == "soft" else hard)
        expected = torch.autograd.grad(soft, [weight, scale, centroids], self.grad[self.rows].double())
        got = [grad[self.rows] for grad in grads[:2]] + [grad for grad in grads[2:] if grad.shape == centroids.shape]
        for name, one, other in zip(("weight", "scale", "centroids"), got, expected, strict=False):
            require_close(f"the gradient of the {name}", one, other)

    def _check_rounding(self, bits: int, out: Tensor, grads: list[Tensor]) -> None:
        """What holds for every straight-through rounding: few levels, near the weight, the gradient passed on."""
        weight = self.weight.detach()[self.rows].float()
        levels = max(len(row.unique()) for row in out)
        if levels > 2**bits:
            raise Wrong(f"a channel has {levels} levels at {bits} bits")
        error = _rms(out.float() - weight) / _rms(weight)
        if not error < 4 / 2**bits:
            raise Wrong(f"the quantized weight is off by {error:.2g} of its size")
        if grads:
            passed = torch.isclose(grads[0][self.rows], self.grad[self.rows], rtol=TOLERANCE).float().mean()
            if passed < 0.9:
                raise Wrong(f"only {passed:.0%} of the weights get the gradient passed straight through")


def compile_alone(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for the very shapes. Contenders of one case share code: past the limit it would stay eager."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=False)


def table_makers(plan: Plan, case: dict, device: torch.device) -> dict[str, Callable[[], Contender]]:
    """Makers of the table program's contenders, by `gq tables/BITS`."""
    maker = partial(tables_contender, case["group"], case["pass"], device)
    return {f"gq tables/{bits}": partial(maker, bits) for bits in plan.bits}


def tables_contender(group: int, passed: str, device: torch.device, bits: int) -> Contender:
    centroids = torch.linspace(-1, 1, 2**bits, device=device).repeat(group, 1).requires_grad_()
    mu, hardness = (torch.full((group,), value, device=device) for value in (MU, HARDNESS))
    grad = torch.randn(group, 6 * 2**bits, device=device)

    def forward() -> Tensor:
        return build_tables(centroids, mu, hardness, None, torch.float32)

    def backward() -> harness.Call:
        out = forward()
        return lambda: torch.autograd.grad(out, [centroids], grad)

    check = partial(check_tables, centroids, mu, hardness)
    return Contender((lambda: forward) if passed == "forward" else backward, check)


def check_tables(centroids: Tensor, mu: Tensor, hardness: Tensor) -> None:
    """The codebook stands in the tables, and their gradient is that of finite differences."""
    z, levels = centroids.detach().double(), centroids.shape[1]

    def build(z: Tensor) -> Tensor:
        return build_tables(z, mu, hardness, None, torch.float64)

    values = build(z)[:, levels - 1 : 2 * levels - 1]
    require_close("the codebook", values, torch.stack([codebook(row, m, None) for row, m in zip(z, mu, strict=True)]))
    grad = torch.ones(len(z), 6 * levels, dtype=z.dtype, device=z.device)
    grad[:, : -(3 * levels + 1)] = 0  # thresholds, values, edges and bounds have no gradient
    direction = 1e-6 * torch.linspace(1, 2, levels, dtype=z.dtype, device=z.device)
    expected = ((build(z + direction) - build(z - direction)) * grad).sum(1) / 2
    leaf = z.clone().requires_grad_()
    (got,) = torch.autograd.grad(build(leaf), [leaf], grad)
    require_close("the gradient of the centroids", got @ direction, expected)


def require_close(what: str, got: Tensor, expected: Tensor) -> None:
    """Raises Wrong where the root mean square of the error is beyond TOLERANCE of what is expected."""
    error = (_rms(got.double() - expected) / _rms(expected)).item()
    if not error < TOLERANCE:
        raise Wrong(f"{what} is off by {error:.2g} of its size")


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


if __name__ == "__main__":
    harness.command(Plan, run, "Measure the quantizer's operations.")()
