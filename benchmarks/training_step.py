"""What does quantization-aware training add to a training step, and where does the rest of the step go?

    python benchmarks/training_step.py            # the full record, benchmarks/results/<device>/training_step.json
    python benchmarks/training_step.py --quick

Steps as gq_triton.training's trainer takes them (bfloat16 autocast on a GPU, float32 on a CPU, gradient clipping,
AdamW), on random features of realistic lengths: the RNN transducers `small` and `base`, and a transducer with a
Conformer of 30 million parameters. Contenders: float; GQ; torchao's QAT, which has linear layers only, so that LSTMs
and convolutions stay float; and GQ computed in the plain form, with a probability for every weight and centroid.

The quantizer's time is given twice: as the time of its operators in torch's profiler, forward and backward, and as what
the step takes longer than the float one. plots/training_step.py draws the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import harness
import peers
import torch
from breakdown import breakdown, labelled
from harness import Contender, Timing, Unavailable, Wrong
from torch import Tensor, nn
from torch.profiler import record_function

import gq_triton as gq
from gq_triton import grouping, quantizer
from gq_triton.models import RNNT, preset
from gq_triton.training.objective import TransducerObjective

PLAIN_TENSORS = 8  # as in quantizer.py
FRAMES_PER_LABEL = 25  # of 10 ms: four subwords a second


@dataclass(frozen=True)
class Workload:
    """A model and a batch.

    Attributes:
        model: one of `gq_triton.models.PRESETS`.
        batch: utterances.
        frames: of the longest utterance, 10 ms each; the shortest has half of them.
        vocab_size, features: labels, and values per frame.
    """

    model: str
    batch: int
    frames: int
    vocab_size: int
    features: int

    def build(self) -> RNNT:
        torch.manual_seed(0)
        return RNNT(preset(self.model, self.vocab_size, features=self.features))

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (B, T, F), their lengths, targets (B, U), their lengths."""
        draw = torch.Generator().manual_seed(0)
        lengths = torch.linspace(self.frames, self.frames // 2, self.batch).long()
        labels = (lengths // FRAMES_PER_LABEL).clamp(min=1)
        features = torch.randn(self.batch, self.frames, self.features, generator=draw)
        targets = torch.randint(1, self.vocab_size, (self.batch, int(labels.max())), generator=draw)
        return tuple(tensor.to(device) for tensor in (features, lengths, targets, labels))


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        workloads: models and batches.
        bits: width of all weights.
        plain_limit: numbers of one for each weight and centroid, beyond which the plain form is left out.
        profiled: steps under the profiler.
        timing: of each contender.
    """

    workloads: tuple[Workload, ...]
    bits: int
    plain_limit: float
    profiled: int
    timing: Timing

    @classmethod
    def full(cls, device: torch.device) -> Plan:
        if device.type == "cuda":
            sizes = (16, 800), (32, 1200), (32, 1200)
            return cls(_workloads(*sizes), 4, math.inf, 5, Timing(seconds=8.0, least=10))
        return cls(_workloads((4, 400), (1, 100), (1, 400)), 4, 1e8, 2, Timing(seconds=20.0, least=5))

    @classmethod
    def quick(cls, device: torch.device) -> Plan:
        if device.type == "cuda":
            return cls(_workloads((16, 400), (16, 400), (16, 400)), 4, 1e9, 2, Timing(seconds=2.0, least=5))
        return cls(_workloads((2, 200))[:1], 4, 1e8, 1, Timing(seconds=1.0))


def _workloads(*sizes: tuple[int, int]) -> tuple[Workload, ...]:
    kinds = ("small", 128, 40), ("base", 512, 80), ("conformer-M", 512, 80)
    pairs = zip(kinds, sizes, strict=False)
    return tuple(Workload(model, *size, vocabulary, features) for (model, vocabulary, features), size in pairs)


def run(plan: Plan, folder: Path, device: torch.device) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    record = harness.Record("training_step", asdict(plan), folder)
    record.measure_ceilings(device)
    workloads = {workload.model: workload for workload in plan.workloads}
    for case in record.missing([{"model": model} for model in workloads]):
        record.add(case, measure(plan, workloads[case["model"]], device))
    return record.finish()


def measure(plan: Plan, workload: Workload, device: torch.device) -> dict[str, dict]:
    """Times steps of all contenders, and adds what the times mean."""
    steps: dict[str, Step] = {}

    def maker(kind: type[Step]) -> Contender:
        step = steps[kind.name] = kind(workload, plan, device)
        return Contender(lambda: step, lambda: step.check(unquantized=steps[Step.name]))

    results = harness.measure({kind.name: partial(maker, kind) for kind in CONTENDERS}, plan.timing, device)
    for name, result in results.items():
        if "ms" in result:
            result |= steps[name].describe(result["ms"]["median"], results[Step.name]["ms"]["median"])
    return results


class Step:
    """A training step of the float model; its subclasses quantize the model first."""

    name = "float"
    labels: tuple[tuple[object, str], ...] = ()  # functions that quantize, for the profiler

    def __init__(self, workload: Workload, plan: Plan, device: torch.device) -> None:
        self.workload, self.plan, self.device = workload, plan, device
        model = workload.build().to(device)
        self.weights = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
        self.quantized_weights = self.quantize(model)
        self.objective = TransducerObjective(model, ctc_weight=0.0).to(device)
        self.optimizer = torch.optim.AdamW(gq.param_groups(self.objective, lr=1e-4, weight_decay=1e-2))
        self.annealer = self.make_annealer()
        self.batch = workload.draw(device)
        self.first_loss = math.nan

    def quantize(self, model: nn.Module) -> int:
        """Prepares the model; returns how many weights are quantized."""
        return 0

    def make_annealer(self) -> gq.Annealer | None:
        return None

    def running(self) -> AbstractContextManager:
        """What is in force during a step."""
        return nullcontext()

    def __call__(self) -> Tensor:
        with self.running():
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = self.objective(*self.batch) / self.workload.batch
            loss.backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(self.objective.parameters(), 5.0)
            self.optimizer.step()
            if self.annealer:
                self.annealer.step()
        return loss.detach()

    def check(self, unquantized: Step) -> None:
        """The first step's loss is near that of the float model, and every gradient is there."""
        self.first_loss = self().item()
        expected = unquantized.first_loss
        if not abs(self.first_loss - expected) <= 0.1 * expected:  # never so if it is not finite
            raise Wrong(f"the loss is {self.first_loss:.4g}, and {expected:.4g} in float")
        bad = [
            name
            for name, parameter in self.objective.named_parameters()
            if parameter.grad is None or not parameter.grad.isfinite().all()
        ]
        if bad:
            raise Wrong(f"no finite gradient reaches {', '.join(bad)}")

    def describe(self, milliseconds: float, float_milliseconds: float) -> dict:
        """What is known of a step besides its time; ``outside`` is time in no operator: gaps between kernels on a GPU,
        the interpreter on a CPU."""
        with labelled("quantizer", *self.labels):
            kinds = breakdown(self, self.device, self.plan.profiled)
        frames = int(self.batch[1].sum())
        return {
            "frames_per_s": 1e3 * frames / milliseconds,
            "weights": self.weights,
            "quantized_weights": self.quantized_weights,
            "quantizer_ms": kinds["quantizer"],
            "longer_than_float_ms": milliseconds - float_milliseconds,
            "kinds_ms": kinds | {"outside": max(0.0, milliseconds - sum(kinds.values()))},
        }


class GQStep(Step):
    """Quantization-aware training as users do it."""

    name = "gq"
    labels = ((grouping, "quantize_group"), (quantizer, "quantize_group"))

    def quantize(self, model: nn.Module) -> int:
        gq.quantize_(model, gq.GQConfig(bits=self.plan.bits), step="prepare")
        return sum(row.parameters for row in gq.report(model).rows if row.bits == self.plan.bits)

    def make_annealer(self) -> gq.Annealer:
        return gq.Annealer(self.objective, total_steps=10**6)


class PlainStep(GQStep):
    """The same layers, computing in the plain form."""

    name = "plain"

    def quantize(self, model: nn.Module) -> int:
        quantized = super().quantize(model)
        numbers = quantized * 2**self.plan.bits
        if numbers > self.plan.plain_limit:
            raise Unavailable(f"left out: {numbers:.1e} weights times centroids would take minutes a step here")
        harness.require_memory(4 * PLAIN_TENSORS * numbers, "the plain form", self.device)
        return quantized

    def running(self) -> AbstractContextManager:
        return mock.patch.object(gq.functional, "fake_quantize_group", plain_group)


class TorchaoStep(Step):
    """torchao's QAT of linear layers, all but the last: the loss takes in that one only where it is torch's or ours."""

    name = "torchao"

    def quantize(self, model: nn.Module) -> int:
        return peers.prepare_torchao(model, self.plan.bits, leave="joint.output")

    @property
    def labels(self) -> tuple[tuple[object, str], ...]:
        from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

        return ((IntxFakeQuantizer, "forward"),)


CONTENDERS = (Step, GQStep, TorchaoStep, PlainStep)


def plain_group(
    weights: Sequence[Tensor],
    scale: Tensor,
    centroids: Tensor,
    *,
    mu: Tensor,
    hardness: Tensor,
    per_channel: bool,
    straight_through: float,
    dtype: torch.dtype | None = None,
    **ignored: object,
) -> list[Tensor]:
    """Stands in for gq_triton.functional.fake_quantize_group: every weight's soft value, by the definition."""
    scales = scale.split([len(weight) if per_channel else 1 for weight in weights])
    one = scale.new_ones(1)
    quantized = []
    for weight, own_scale, *own in zip(weights, scales, centroids, mu, hardness, strict=True):
        column = own_scale.reshape(-1, *[1] * (weight.dim() - 1))
        x = weight / column
        constant = (straight_through * x).detach()
        soft = peers.plain((1 - straight_through) * x + constant, one, own[0], mu=own[1], hardness=own[2])
        units = soft + (straight_through * x - constant)
        quantized.append((column * units).to(dtype or weight.dtype))
    return quantized


if __name__ == "__main__":
    harness.command(Plan, run, "Measure training steps.")()
