"""The training loop: float and quantization-aware training alike, in one process or several.

Every source of chance is a function of (seed, step, process): batches, augmentation and dropout of step n are the
same however the run came to step n. A run that was killed therefore ends, once resumed, with the weights of one that
was not, bit for bit; with ``requantize_every=n`` above 1 only if the checkpoint's step is a multiple of n, as what the
quantizers remember is not saved. Checkpoints hold whole tensors, however many processes shared them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gq_triton import Annealer, param_groups, penalty
from gq_triton.anneal import quantized_weights
from gq_triton.files import load_tensors, save_json, save_tensors
from gq_triton.models.rnnt import BifocalEncoder
from gq_triton.quantizer import Quantizer
from gq_triton.speech.augment import SpecAugment

from .average import ParameterAverage
from .config import TrainConfig
from .data import Batch, BatchPlan, TrainingSet, load_batches
from .distributed import (
    barrier,
    distribute,
    gathered,
    is_main,
    placed_like,
    rank,
    synchronizing,
    training_device,
    unwrapped,
    whole,
    world_size,
)
from .log import MetricLog
from .objective import objective_of

__all__ = ["Trainer"]


class Trainer:
    """Trains a model and leaves ``config.json``, ``metrics.csv`` and ``checkpoint.safetensors`` in a folder.

    Where the folder holds a checkpoint of the same configuration, training goes on from it. Under torchrun every
    process constructs its own trainer; the first one writes the files.

    Args:
        model: a transducer or a CTC model; prepared by ``gq.quantize_`` or not. Moved to this
            process's GPU where there is one, under FSDP not before it is evaluated or returned.
        data: the training set.
        config: the run.
        output: the folder.
        description: what else tells this run from others (model, quantization), JSON-able.
        evaluate: called every ``config.evaluate_every`` epochs, on the first process alone, but to be given to all;
            returns metrics of ``model``.
        parallel: how several processes share the work: "ddp", each with all weights, or "fsdp", each with a share.
        overwrite: begin anew, removing what an earlier run left in the folder.
        progress: whether to show a progress bar.
        tensorboard: whether to write TensorBoard events as well.

    Raises:
        ValueError: the folder holds a run of another configuration, or its checkpoint is damaged; batches that are too
            small for as many processes and micro-batches; utterances that do not go with the batches' limits; "fsdp"
            for a bifocal model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainingSet,
        config: TrainConfig,
        output: str | Path,
        *,
        description: dict | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        parallel: str = "ddp",
        overwrite: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.device = training_device()
        self.model, self.data, self.output, self.evaluate = model, data, Path(output), evaluate
        self.config = replace(config, precision=_precision(config, self.device))
        self.progress, self.tensorboard = progress and is_main(), tensorboard
        self.plan = BatchPlan(data, config)
        _require_parts(self.plan, config.accumulate)
        self.steps_per_epoch = len(self.plan)
        self.total_steps = config.epochs * self.steps_per_epoch
        torch.manual_seed(config.seed)
        objective = objective_of(model, config.ctc_weight, config.blank_bonus)
        bifocal = isinstance(model.encoder, BifocalEncoder)  # one of its encoders may have no part in a loss
        self.network = distribute(objective, self.device, parallel, partly_used=bifocal)
        self.objective = unwrapped(self.network)  # what is trained: its model is the one given or, under FSDP, a copy
        self.annealer = _annealer(self.objective.model, config, self.total_steps)
        self.optimizer = torch.optim.AdamW(
            param_groups(
                self.objective,
                config.learning_rate,
                config.weight_decay,
                config.quantizer_learning_rate,
                config.one_bit_learning_rate,
            )
        )
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.augment = SpecAugment(config.freq_masks, config.freq_width, config.time_masks, config.time_fraction)
        self.average = ParameterAverage(self.objective.model, config.average_decay) if config.average_decay else None
        self.step = 0
        self._claim_output({"train": self.config.to_dict(), **(description or {})}, overwrite)

    def run(self) -> nn.Module:
        """Trains to the end, from the checkpoint where there is one; returns the model, on the training device.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self._resume()
        log = MetricLog(self.output, step=self.step, tensorboard=self.tensorboard) if is_main() else None
        bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", disable=not self.progress)
        self.objective.train()
        for batches, divisor in self.batches():
            loss, norm = self.update(batches, divisor)
            self.step += 1
            bar.update()
            if log and self._is_due(self.config.log_every):
                log.write(self.step - 1, self._metrics(loss, norm))
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if self.evaluate and self._is_due(self.config.evaluate_every * self.steps_per_epoch):
                metrics = self._evaluate()
                if log:
                    log.write(self.step - 1, metrics)
            if self._is_due(self.config.checkpoint_every):
                self._save(loss)
        bar.close()
        if log:
            log.close()
        barrier()
        self._deploy()
        return self.model.to(self.device)

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def batches(self) -> Iterator[tuple[list[Batch], float]]:
        """This process's share of each remaining batch, as micro-batches, and what the whole batch's loss is divided
        by."""
        for epoch in range(self.step // self.steps_per_epoch, self.config.epochs):
            remaining = self.plan.epoch(epoch)[self.step - epoch * self.steps_per_epoch :]
            parts = world_size() * self.config.accumulate
            shares = [batch[part::parts] for batch in remaining for part in range(rank(), parts, world_size())]
            loaded = load_batches(self.data, shares)
            for batch in remaining:
                yield [next(loaded).to(self.device) for _ in range(self.config.accumulate)], self.plan.divisor(batch)

    def update(self, batches: list[Batch], divisor: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this process's share of the loss per utterance, and the gradient's norm."""
        self._set_learning_rates()
        draw = self._seed_step()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for index, batch in enumerate(batches, start=1):
            last = index == len(batches)
            with synchronizing(self.network, last):
                # Gradients are averaged over processes; shares of a batch may differ by one utterance.
                loss = self._loss(batch, draw) * (world_size() / divisor)
                if last:
                    loss = loss + penalty(self.objective.model)
                loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update()
        if self.annealer:
            self.annealer.step()
        return torch.stack(losses).sum(), whole(norm)

    def _loss(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """Summed over the utterances of a micro-batch."""
        features = self._augmented(batch, draw)
        labels = batch.targets, batch.target_lengths
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            return self.network(features, batch.feature_lengths, *labels, self._switch(batch, draw))

    def _augmented(self, batch: Batch, draw: torch.Generator) -> Tensor:
        """The batch's features, masked and with noise once the curriculum is over."""
        if self.step < self.config.curriculum_epochs * self.steps_per_epoch:
            return batch.features
        masked = self.augment(batch.features, batch.feature_lengths, draw)
        noise = torch.randn(masked.shape, generator=draw).to(masked)
        return torch.add(masked, noise, alpha=self.config.feature_noise)

    def _switch(self, batch: Batch, draw: torch.Generator) -> Tensor | None:
        """The frames at which wake words are taken to end, 0 where there is none; None without a small encoder."""
        if not isinstance(self.model.encoder, BifocalEncoder):
            return None
        wakes, share = torch.rand(2, len(batch.feature_lengths), generator=draw)
        ends = (share * batch.feature_lengths.cpu()).long()
        return torch.where(wakes < self.config.wake_share, ends, 0)

    def _seed_step(self) -> torch.Generator:
        """Seeds dropout, and returns the generator of augmentation, for this step and process alone."""
        dropout, augmentation = np.random.SeedSequence([self.config.seed, self.step, rank()]).generate_state(2)
        torch.manual_seed(int(dropout))
        return torch.Generator().manual_seed(int(augmentation))

    def _set_learning_rates(self) -> None:
        factor = self.config.rate(self.step, self.total_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor

    def _metrics(self, loss: Tensor, norm: Tensor) -> dict[str, float]:
        rate = self.optimizer.param_groups[0]["lr"]
        return {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate}

    def _evaluate(self) -> dict[str, float]:
        """What ``evaluate`` measures, in the first process."""
        metrics = {}
        with self._deployed():
            if is_main():
                self.model.to(self.device).eval()
                metrics = self.evaluate()
                self.model.train()
        epoch = self.step // self.steps_per_epoch
        if self.progress:
            text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"epoch {epoch}: {text}", file=sys.stderr)
        return metrics

    @contextmanager
    def _deployed(self) -> Iterator[None]:
        """The model has what it is evaluated with meanwhile."""
        averaged_in_place = self.average and self.objective.model is self.model
        tensors = _tensors(self.model) if averaged_in_place else {}
        own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._deploy()
        try:
            yield
        finally:
            _copy(own, _tensors(self.model))

    def _deploy(self) -> None:
        """Gives the model what it is evaluated and returned with: averaged parameters, if they are; its own buffers, as
        hardness follows its schedule, but for what quantizers derive from the weights; all of them whole."""
        averages = self.average.values if self.average else {}
        _copy({**_tensors(self.objective.model), **averages}, _tensors(self.model))
        if averages:
            for quantizer, weight in quantized_weights(self.model):
                quantizer.follow(weight)

    # Files

    def _claim_output(self, description: dict, overwrite: bool) -> None:
        """Makes the folder this run's own, or finds that it is."""
        path = self.output / "config.json"
        if is_main() and overwrite:
            _remove_run(self.output)
        barrier()
        description = json.loads(json.dumps(description))
        if path.is_file():
            _require_same(json.loads(path.read_text()), description, self.output)
        barrier()
        if is_main():
            save_json(path, description)

    @property
    def _checkpoint(self) -> Path:
        return self.output / "checkpoint.safetensors"

    def _save(self, loss: Tensor) -> None:
        """Writes a checkpoint; all processes have a part in it."""
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        if self.average:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.values.items()}
        tensors = gathered(tensors)
        if is_main():
            self._require_finite(loss, tensors)
            annealer = self.annealer.state_dict() if self.annealer else None
            save_tensors(self._checkpoint, tensors, {"step": self.step, "annealer": annealer})

    def _require_finite(self, loss: Tensor, tensors: dict[str, Tensor]) -> None:
        """Keeps a diverged run from replacing its last good checkpoint."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; try a lower learning_rate")
        if not all(torch.isfinite(tensor).all() for tensor in _under(tensors, "objective.").values()):
            raise FloatingPointError(f"a weight is not finite at step {self.step}; try a lower learning_rate")

    def _resume(self) -> None:
        if not self._checkpoint.is_file():
            return
        tensors, state = load_tensors(self._checkpoint)
        self.objective.load_state_dict(_placed_like(_under(tensors, "objective."), self.objective.state_dict()))
        if self.average:
            parameters = dict(self.objective.model.named_parameters())
            self.average.values = _placed_like(_under(tensors, "average."), parameters)
        groups = self.optimizer.state_dict()["param_groups"]
        moments = self._moments(_under(tensors, "optimizer."))
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.annealer:
            self.annealer.load_state_dict(state["annealer"])
        self.step = state["step"]
        if self.progress:
            tqdm.write(f"going on from step {self.step} of {self.total_steps}", file=sys.stderr)

    def _moments(self, tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """What the optimizer knew of each parameter."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = placed_like(tensor, parameters[int(index)])
        return moments


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        if tensor is not target[name]:
            target[name].copy_(whole(tensor))


def _placed_like(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: placed_like(tensor, others[name]) for name, tensor in tensors.items()}


def _precision(config: TrainConfig, device: torch.device) -> str:
    """The precision that "auto" stands for here."""
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    return automatic if config.precision == "auto" else config.precision


def _require_parts(plan: BatchPlan, accumulate: int) -> None:
    """Every process needs an utterance in each of its micro-batches."""
    parts = world_size() * accumulate
    if min(plan.sizes) < parts:
        raise ValueError(
            f"the smallest batch has {min(plan.sizes)} utterances, too few for {world_size()} processes with "
            f"{accumulate} micro-batches each: use larger batches, or a smaller accumulate"
        )


def _annealer(model: nn.Module, config: TrainConfig, total_steps: int) -> Annealer | None:
    """An annealer where the model has quantizers to anneal."""
    if not any(isinstance(module, Quantizer) for module in model.modules()):
        return None
    start, end = config.hardness
    return Annealer(model, total_steps, start=start, end=end)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _remove_run(output: Path) -> None:
    for name in ("config.json", "metrics.csv", "checkpoint.safetensors"):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "tensorboard", ignore_errors=True)


def _require_same(found: dict, wanted: dict, output: Path) -> None:
    differing = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if not differing:
        return
    details = "; ".join(f"{key} is {_difference(found.get(key), wanted.get(key))}" for key in differing)
    raise ValueError(
        f"{output} holds a run of another configuration: {details}. "
        "Choose another output folder, or begin anew with overwrite (--overwrite)"
    )


def _difference(found: object, wanted: object) -> str:
    """The parts in which two values differ, for people."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        return ", ".join(f"{key}={found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys)
    return f"{found!r} there, {wanted!r} here"
