"""What prepared models need while they train: annealing of the soft assignment, what else methods do after each step,
their part of the loss, and optimizer groups."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.layers import QATLayer
from gq_triton.quantizer import INITIAL_HARDNESS, Quantizer, warn_of_bypassed


class Annealer:
    """Raises the hardness of every quantizer of a prepared model geometrically, from ``start`` to ``end``.

    The paper (arXiv 2210.09188) anneals its softmax until it is hard; it does not give the schedule: this one is ours.
    Hardness is a softmax's sharpness in units of the mean centroid spacing: half way between two centroids the
    assignment turns from one to the other within about 2 / hardness spacings.

    It also says which steps give centroids and mu a gradient: every n-th, by ``GQConfig.centroid_interval``. Other
    methods (:mod:`gq_triton.baselines`) have no hardness; what they do after a step, they do when this one is told.

    Args:
        model: a prepared model. Its hardness is set to ``start`` at once.
        total_steps: steps until ``end`` is reached, at least 1; it stays there afterwards.
        start: hardness at first, above 0. Default 2.
        end: hardness at last, above 0. Default 16.

    Raises:
        ValueError: if an argument is out of range, the model has no quantizer, or one of a method that works on whole
            weights has a weight that FSDP has sharded.
    """

    def __init__(self, model: nn.Module, total_steps: int, start: float = INITIAL_HARDNESS, end: float = 16.0) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an integer of at least 1; got {total_steps!r}")
        for name, value in (("start", start), ("end", end)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
        self._model = model
        self._quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        if not self._quantizers:
            raise ValueError("model has no quantizer to anneal: call quantize_(model, config, step='prepare') first")
        for quantizer, weight in quantized_weights(model):
            if quantizer.whole_weights and hasattr(weight, "full_tensor"):
                method = quantizer.config.method
                raise ValueError(f"model must not be sharded: {method!r} works on whole weights; use DDP, not FSDP")
        self.total_steps = total_steps
        self.start = start
        self.end = end
        self.steps = 0
        self._apply()

    @property
    def hardness(self) -> float:
        """The hardness now in force."""
        progress = min(self.steps / self.total_steps, 1.0)
        return self.start * (self.end / self.start) ** progress

    def step(self) -> None:
        """Moves on by one step; call it after each optimizer step.

        Warns:
            UserWarning: at the first step, naming layers that were not called in training while others were, and whose
                weights yet have a gradient.
        """
        self.steps += 1
        self._apply()
        for quantizer, weight in quantized_weights(self._model):
            quantizer.update(weight, self.steps)
        if self.steps == 1:
            warn_of_bypassed(self._model, learning=True)

    def _apply(self) -> None:
        for quantizer in self._quantizers:
            quantizer.schedule(self.steps, self.hardness)

    def state_dict(self) -> dict[str, Any]:
        """Returns the schedule and the position in it, JSON-able."""
        return {"steps": self.steps, "total_steps": self.total_steps, "start": self.start, "end": self.end}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`'s result: its schedule, its position, and the model's hardness.

        Raises:
            KeyError: if an entry is missing.
        """
        self.steps, self.total_steps = state["steps"], state["total_steps"]
        self.start, self.end = state["start"], state["end"]
        self._apply()


def penalty(model: nn.Module) -> Tensor:
    """Returns what the methods of a prepared model add to its loss, (), float32: 0 for all but S8BQAT.

    In several processes that average their gradients, add it to the loss of each.
    """
    terms = [quantizer.penalty(weight) for quantizer, weight in quantized_weights(model)]
    return sum((term for term in terms if term is not None), torch.zeros(()))


def quantized_weights(model: nn.Module) -> Iterator[tuple[Quantizer, Tensor]]:
    """The quantizers in the layers of a prepared model, each once, with their weights."""
    seen: set[Quantizer] = set()
    for layer in model.modules():
        for name, quantizer in layer.quantizers().items() if isinstance(layer, QATLayer) else ():
            if quantizer not in seen:
                seen.add(quantizer)
                own = layer._parameters.get(name)  # as an attribute, a compiled graph would read it quantized
                yield quantizer, getattr(layer, name) if own is None else own


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    quantizer_lr: float | None = None,
    one_bit_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters for an optimizer: scales, centroids and mu are never decayed.

    Args:
        model: a prepared model, or a float one, which has one group only.
        lr: learning rate.
        weight_decay: of all parameters but the quantizers'.
        quantizer_lr: learning rate of the quantizers' parameters. Default: ``lr``.
        one_bit_lr: learning rate of weights of one bit, which change where they cross zero only, and so want a higher
            one. Default: ``lr``.

    Returns:
        Groups for any torch optimizer, each parameter in exactly one.
    """
    own = {id(p) for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    signs = {id(weight) for quantizer, weight in quantized_weights(model) if quantizer.config.bits == 1}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [p for p in trainable if id(p) not in own | signs],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p in trainable if id(p) in signs],
            "lr": lr if one_bit_lr is None else one_bit_lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [p for p in trainable if id(p) in own],
            "lr": lr if quantizer_lr is None else quantizer_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
