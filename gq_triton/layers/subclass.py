"""Quantized twins of subclasses of torch layers, made when they are needed.

``class Scaled(nn.Embedding)`` becomes ``class QATScaled(Scaled, QATEmbedding)``. Where its own forward calls that of
``nn.Embedding``, it now finds the twin's; where it reads ``self.weight``, it finds the weight as the twin computes with
it. What it does to the weight in place is lost.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from gq_triton.layers.base import PackedLayer, QATLayer

_EXTENDED = {"forward", "weight", "_load_from_state_dict"}  # members that twins and subclasses may have in common


class _Made:
    """Copied and pickled by what its class was made from, as no module holds the class."""

    made_from: tuple[type, type]
    may_read = True

    def __reduce__(self) -> tuple[Callable[[type, type], nn.Module], tuple[type, type], dict[str, Any]]:
        return _blank, self.made_from, vars(self)


@functools.cache
def twin_of_subclass(kind: type[nn.Module], twin: type[QATLayer | PackedLayer]) -> type[Any]:
    """Returns the form that ``kind``, a subclass of a torch layer, has where that layer has the form ``twin``."""
    prefix = "QAT" if issubclass(twin, QATLayer) else "Packed"
    return type(f"{prefix}{kind.__name__}", (_Made, kind, twin), {"made_from": (kind, twin)})


def original(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass that ``kind`` was made from; ``kind`` itself if it was not made here."""
    return kind.made_from[0] if issubclass(kind, _Made) else kind


def clashes(layer: nn.Module, base: type[nn.Module], twins: tuple[type, ...]) -> set[str]:
    """Returns the members of ``layer``, of a subclass of ``base``, that the twins of ``base`` have for other uses."""
    added = {name for twin in twins for name in _members(twin, base)} - _EXTENDED
    kind = original(type_before_parametrizations(layer))
    own = {*_members(kind, base), *vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    return {name for name in added & own if not name.startswith("__")}


def _members(kind: type, base: type) -> set[str]:
    return {name for cls in kind.__mro__ if not issubclass(base, cls) for name in vars(cls)}


def _blank(kind: type, twin: type) -> nn.Module:
    made = twin_of_subclass(kind, twin)
    return made.__new__(made)
