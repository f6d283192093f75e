"""Weight normalization, w = g v / |v| (Salimans and Kingma, arXiv 1602.07868), folded into the weight.

A quantizer learns a scale for each channel of its own, so a quantized weight has no use for g. torch keeps g and v as a
parametrization (``torch.nn.utils.parametrizations.weight_norm``) or beside a forward pre-hook (the older
``torch.nn.utils.weight_norm``); layers of both kinds can be told from others here, read, and folded.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm


def parts(layer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns g and v of weight ``name`` by their names in ``layer``; nothing if it is not weight-normed."""
    if _is_parametrized(layer, name):
        names = [f"parametrizations.{name}.original{i}" for i in range(2)]
    else:
        names = [f"{name}_g", f"{name}_v"] if _hooks(layer, name) else []
    return {part: layer.get_parameter(part) for part in names}


def is_parametrized_otherwise(layer: nn.Module, names: Iterable[str]) -> bool:
    """Whether anything in ``layer`` is parametrized but by weight normalization of one of the weights ``names``."""
    found = layer.parametrizations if parametrize.is_parametrized(layer) else ()
    return any(name not in names or not _is_parametrized(layer, name) for name in found)


def value(layer: nn.Module, name: str) -> Tensor | None:
    """Returns the weight ``name`` that g and v stand for; None if it is not weight-normed."""
    with torch.enable_grad():  # it requires a gradient if they do
        if _is_parametrized(layer, name):
            return getattr(layer, name)
        hooks = _hooks(layer, name)  # the attribute dates from the last forward pass
        return next(iter(hooks.values())).compute_weight(layer) if hooks else None


def assign(norm: Tensor, direction: Tensor, weight: Tensor) -> None:
    """Has g and v, in place, stand for ``weight``, up to rounding."""
    dims = [dim for dim in range(weight.dim()) if norm.dim() == 0 or norm.shape[dim] == 1]
    norm.copy_(torch.linalg.vector_norm(weight, dim=dims, keepdim=True).view(norm.shape))
    direction.copy_(weight)


def fold(layer: nn.Module, names: Iterable[str]) -> None:
    """Makes those of the weights ``names`` that are weight-normed ordinary parameters, in place.

    Nothing else in ``layer`` may be parametrized. (Not by torch's ``remove_parametrizations``, which takes the weight
    away from copies of the layer, too: they share its class.)
    """
    weights = {name: weight for name in names if (weight := value(layer, name)) is not None}
    for name in weights:
        for key, hook in _hooks(layer, name).items():
            hook.remove(layer)
            del layer._forward_pre_hooks[key]
            delattr(layer, name)
    if parametrize.is_parametrized(layer):
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
    for name, weight in weights.items():
        setattr(layer, name, nn.Parameter(weight.detach(), requires_grad=weight.requires_grad))


def _is_parametrized(layer: nn.Module, name: str) -> bool:
    """Whether weight normalization, and nothing else, parametrizes the weight."""
    steps = layer.parametrizations[name] if parametrize.is_parametrized(layer, name) else ()
    return [type(step) for step in steps] == [_WeightNorm]


def _hooks(layer: nn.Module, name: str) -> dict[int, WeightNorm]:
    hooks = layer._forward_pre_hooks.items()
    return {key: hook for key, hook in hooks if isinstance(hook, WeightNorm) and hook.name == name}
