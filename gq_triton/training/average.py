"""A moving average of parameters (after Polyak and Juditsky, SIAM J. Control Optim. 1992; weights fall off
exponentially)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["ParameterAverage"]


class ParameterAverage:
    """The exponential moving average of all parameters, beginning with those after the first update.

    Args:
        model: float, prepared or sharded by FSDP.
        decay: weight of the average in the next one, 0..1.

    Attributes:
        values: by name, sharded as the parameters are; none before the first update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.values: dict[str, Tensor] = {}
        self._parameters = dict(model.named_parameters())
        self._blend = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the parameters as they are now; to be called after each optimizer step."""
        if not self.values:
            self.values = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            return
        names, parameters = zip(*self._parameters.items(), strict=True)
        self._blend([self.values[name] for name in names], list(parameters), None)
