"""Annealing of the soft assignment, the steps that train centroids, and optimizer groups for prepared models."""

import math
from typing import Any

from torch import nn

from gq_triton.quantizer import INITIAL_HARDNESS, WeightQuantizer, warn_of_bypassed


class Annealer:
    """Raises the hardness of every quantizer of a prepared model geometrically, from ``start`` to ``end``.

    The paper (arXiv 2210.09188) anneals its softmax until it is hard; it does not give the schedule: this one is ours.
    Hardness is a softmax's sharpness in units of the mean centroid spacing: half way between two centroids the
    assignment turns from one to the other within about 2 / hardness spacings.

    It also says which steps give centroids and mu a gradient: every n-th, by ``GQConfig.centroid_interval``.

    Args:
        model: a prepared model. Its hardness is set to ``start`` at once.
        total_steps: steps until ``end`` is reached, at least 1; it stays there afterwards.
        start: hardness at first, above 0. Default 2.
        end: hardness at last, above 0. Default 16.

    Raises:
        ValueError: if an argument is out of range, or the model has no quantizer.
    """

    def __init__(self, model: nn.Module, total_steps: int, start: float = INITIAL_HARDNESS, end: float = 16.0) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be an integer of at least 1; got {total_steps!r}")
        for name, value in (("start", start), ("end", end)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0; got {value!r}")
        self._model = model
        self._quantizers = [module for module in model.modules() if isinstance(module, WeightQuantizer)]
        if not self._quantizers:
            raise ValueError("model has no quantizer to anneal: call quantize_(model, config, step='prepare') first")
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
            UserWarning: at the first step, naming layers that were not called in training while others were.
        """
        self.steps += 1
        self._apply()
        if self.steps == 1:
            warn_of_bypassed(self._model)

    def _apply(self) -> None:
        for quantizer in self._quantizers:
            quantizer.hardness.fill_(self.hardness)
            quantizer.learn_tables = self.steps % quantizer.config.centroid_interval == 0

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


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, quantizer_lr: float | None = None
) -> list[dict[str, Any]]:
    """Splits a model's trainable parameters for an optimizer: scales, centroids and mu are never decayed.

    Args:
        model: a prepared model, or a float one, which has one group only.
        lr: learning rate.
        weight_decay: of all parameters but the quantizers'.
        quantizer_lr: learning rate of the quantizers' parameters. Default: ``lr``.

    Returns:
        Groups for any torch optimizer, each parameter in exactly one.
    """
    own = {id(p) for module in model.modules() if isinstance(module, WeightQuantizer) for p in module.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in own], "lr": lr, "weight_decay": weight_decay},
        {
            "params": [p for p in trainable if id(p) in own],
            "lr": lr if quantizer_lr is None else quantizer_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
