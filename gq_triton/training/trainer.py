"""The training loop: float and quantization-aware training alike, in one process or several.

Every source of chance is a function of (seed, step, process): batches, augmentation and dropout of step n are the
same however the run came to step n. A run that was killed therefore ends, once resumed, with the weights of one that
was not.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from gq_triton import Annealer, param_groups
from gq_triton.files import load_tensors, save_json, save_tensors
from gq_triton.models.rnnt import BifocalEncoder
from gq_triton.speech.augment import SpecAugment

from .config import TrainConfig
from .data import Batch, Item, TrainingSet, epoch_batches, item_duration, load_batches
from .distributed import barrier, is_main, rank, training_device, world_size
from .log import MetricLog
from .objective import objective_of

__all__ = ["Trainer"]


class Trainer:
    """Trains a model and leaves ``config.json``, ``metrics.csv`` and ``checkpoint.safetensors`` in a folder.

    Where the folder holds a checkpoint of the same configuration, training goes on from it. Under torchrun every
    process constructs its own trainer; the first one writes the files.

    Args:
        model: a transducer or a CTC model; prepared by ``gq.quantize_`` or not. Moved to this
            process's GPU where there is one.
        data: the training set.
        config: the run.
        output: the folder.
        description: what else tells this run from others (model, quantization), JSON-able.
        evaluate: called every ``config.evaluate_every`` epochs, on the first process; returns metrics.
        overwrite: begin anew, removing what an earlier run left in the folder.
        progress: whether to show a progress bar.
        tensorboard: whether to write TensorBoard events as well.

    Raises:
        ValueError: the folder holds a run of another configuration, or its checkpoint is damaged.
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
        overwrite: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
    ) -> None:
        self.data, self.config, self.output, self.evaluate = data, config, Path(output), evaluate
        self.progress, self.tensorboard = progress and is_main(), tensorboard
        self.device = training_device()
        torch.manual_seed(config.seed)
        self.objective = objective_of(model, config.ctc_weight).to(self.device)
        self.model = self.objective.model
        self.steps_per_epoch = config.steps_per_epoch(len(data.durations))
        self.total_steps = config.total_steps(len(data.durations))
        self.annealer = _annealer(model, config, self.total_steps)
        self.optimizer = torch.optim.AdamW(
            param_groups(self.objective, config.learning_rate, config.weight_decay, config.quantizer_learning_rate)
        )
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.augment = SpecAugment(config.freq_masks, config.freq_width, config.time_masks, config.time_fraction)
        self.network = _distribute(self.objective, self.device)
        decay = get_ema_multi_avg_fn(config.average_decay)
        self.average = AveragedModel(self.model, multi_avg_fn=decay) if config.average_decay else None
        self.step = 0
        self._claim_output({"train": config.to_dict(), **(description or {})}, overwrite)

    def run(self) -> nn.Module:
        """Trains to the end, from the checkpoint where there is one; returns the model, on the training device.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self._resume()
        log = MetricLog(self.output, step=self.step, tensorboard=self.tensorboard) if is_main() else None
        bar = tqdm(total=self.total_steps, initial=self.step, desc="training", unit="step", disable=not self.progress)
        self.objective.train()
        for batch, utterances in self._batches():
            self._set_learning_rates()
            loss, norm = self._update(batch, utterances)
            self.step += 1
            bar.update()
            if log and self._is_due(self.config.log_every):
                log.write(self.step - 1, self._metrics(loss, norm))
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if log and self._is_due(self.config.evaluate_every * self.steps_per_epoch) and self.evaluate:
                log.write(self.step - 1, self._evaluate())
            if log and self._is_due(self.config.checkpoint_every):
                self._require_finite(loss)
                self._save()
        bar.close()
        if log:
            log.close()
        barrier()
        if self.average:
            _copy_parameters(self.average.module, self.model)
        return self.model

    def _is_due(self, interval: int) -> bool:
        return self.step % interval == 0 or self.step == self.total_steps

    def _batches(self) -> Iterator[tuple[Batch, int]]:
        """This process's share of each remaining batch, and the size of the whole batch."""
        for epoch in range(self.step // self.steps_per_epoch, self.config.epochs):
            batches = self._epoch_batches(epoch)
            remaining = batches[self.step - epoch * self.steps_per_epoch :]
            shares = [batch[rank() :: world_size()] for batch in remaining]
            for batch, loaded in zip(remaining, load_batches(self.data, shares), strict=True):
                yield loaded.to(self.device), len(batch)

    def _epoch_batches(self, epoch: int) -> list[list[Item]]:
        easy = epoch < self.config.curriculum_epochs
        join = 0.0 if easy else self.config.join
        batches = epoch_batches(self.data, self.config.batch_size, seed=self.config.seed, epoch=epoch, join=join)
        if easy:
            batches.sort(key=lambda batch: max(item_duration(self.data, item) for item in batch))
        return batches

    def _update(self, batch: Batch, utterances: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns this process's share of the loss per utterance, and the gradient's norm."""
        draw = self._seed_step()
        features = self._augmented(batch, draw)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            labels = batch.targets, batch.target_lengths
            total = self.network(features, batch.feature_lengths, *labels, self._switch(batch, draw))
        # DDP averages gradients over processes; shares of a batch may differ by one utterance.
        loss = total * (world_size() / utterances)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        if self.annealer:
            self.annealer.step()
        return loss.detach(), norm

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

    def _require_finite(self, loss: Tensor) -> None:
        """Keeps a diverged run from replacing its last good checkpoint."""
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; try a lower learning_rate")
        if not all(torch.isfinite(parameter).all() for parameter in self.objective.parameters()):
            raise FloatingPointError(f"a weight is not finite at step {self.step}; try a lower learning_rate")

    def _evaluate(self) -> dict[str, float]:
        self.model.eval()
        with self._averaged():
            metrics = self.evaluate()
        self.model.train()
        epoch = self.step // self.steps_per_epoch
        if self.progress:
            text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            tqdm.write(f"epoch {epoch}: {text}", file=sys.stderr)
        return metrics

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has its averaged parameters meanwhile."""
        if not self.average:
            yield
            return
        own = copy.deepcopy(self.model)
        _copy_parameters(self.average.module, self.model)
        try:
            yield
        finally:
            _copy_parameters(own, self.model)

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

    def _save(self) -> None:
        tensors = {f"objective.{name}": tensor for name, tensor in self.objective.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        if self.average:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        annealer = self.annealer.state_dict() if self.annealer else None
        save_tensors(self._checkpoint, tensors, {"step": self.step, "annealer": annealer})

    def _resume(self) -> None:
        if not self._checkpoint.is_file():
            return
        tensors, state = load_tensors(self._checkpoint)
        self.objective.load_state_dict(_under(tensors, "objective."))
        if self.average:
            self.average.load_state_dict(_under(tensors, "average."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _under(tensors, "optimizer.").items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.annealer:
            self.annealer.load_state_dict(state["annealer"])
        self.step = state["step"]
        if self.progress:
            tqdm.write(f"going on from step {self.step} of {self.total_steps}", file=sys.stderr)


@torch.no_grad()
def _copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and leaves buffers: hardness follows its schedule, not an average."""
    for parameter, value in zip(target.parameters(), source.parameters(), strict=True):
        parameter.copy_(value)


def _annealer(model: nn.Module, config: TrainConfig, total_steps: int) -> Annealer | None:
    """An annealer where the model has quantizers to anneal."""
    if not any(name.endswith("hardness") for name, _ in model.named_buffers()):
        return None
    start, end = config.hardness
    return Annealer(model, total_steps, start=start, end=end)


def _distribute(model: nn.Module, device: torch.device) -> nn.Module:
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    bifocal = isinstance(model.model.encoder, BifocalEncoder)  # one of its encoders may have no part in a loss
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=bifocal)


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
