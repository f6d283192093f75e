"""Quantized twins of torch layers: for training (``QAT...``) and for inference (``Packed...``)."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from gq_triton.layers.attention import PackedMultiheadAttention, QATMultiheadAttention
from gq_triton.layers.base import PackedLayer, QATLayer
from gq_triton.layers.conv import PackedConv1d, PackedConv2d, QATConv1d, QATConv2d
from gq_triton.layers.embedding import PackedEmbedding, QATEmbedding
from gq_triton.layers.linear import PackedLinear, QATLinear
from gq_triton.layers.packed_weight import PackedWeight
from gq_triton.layers.recurrent import QATGRU, QATLSTM, PackedGRU, PackedLSTM
from gq_triton.layers.subclass import clashes, original, twin_of_subclass


class Twins(NamedTuple):
    """The two quantized forms of a torch layer."""

    qat: type[QATLayer]
    packed: type[PackedLayer]


_TWINS = {
    nn.Linear: Twins(QATLinear, PackedLinear),
    nn.Embedding: Twins(QATEmbedding, PackedEmbedding),
    nn.Conv1d: Twins(QATConv1d, PackedConv1d),
    nn.Conv2d: Twins(QATConv2d, PackedConv2d),
    nn.MultiheadAttention: Twins(QATMultiheadAttention, PackedMultiheadAttention),
    nn.LSTM: Twins(QATLSTM, PackedLSTM),
    nn.GRU: Twins(QATGRU, PackedGRU),
}
_BY_TYPE = {
    **_TWINS,
    NonDynamicallyQuantizableLinear: _TWINS[nn.Linear],  # nn.MultiheadAttention's out_proj
    **{twin: twins for twins in _TWINS.values() for twin in twins},
}
_EXTENSIBLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)  # whose subclasses have twins, too


def twins_of(layer: nn.Module) -> Twins | None:
    """Returns the quantized forms of a layer, which may be one of them already; None for any other type."""
    kind = original(type_before_parametrizations(layer))
    if kind in _BY_TYPE or objection_to_class(layer) is not None:
        return _BY_TYPE.get(kind)
    return Twins(*(twin_of_subclass(kind, twin) for twin in _TWINS[_base(layer)]))


def family_of(layer: nn.Module) -> Twins | None:
    """Returns the quantized forms of the supported torch layer that ``layer`` is, was or derives from, or None."""
    return _BY_TYPE.get(type(layer)) or _TWINS.get(_base(layer))


def objection_to_class(layer: nn.Module) -> str | None:
    """Returns why layers of ``layer``'s class, which is none of torch's, have no quantized forms, or None."""
    kind, base = original(type_before_parametrizations(layer)), _base(layer)
    if isinstance(layer, LazyModuleMixin):
        return f"its layer is a {kind.__name__}, which has no weight before its first call"
    if base not in _EXTENSIBLE:
        return f"its layer is a {kind.__name__}; of such layers, only torch's own classes can be quantized"
    if taken := clashes(layer, base, _TWINS[base]):
        return f"its layer, a {kind.__name__}, has members that the quantized layer needs itself: {sorted(taken)}"
    return None


def _base(layer: nn.Module) -> type[nn.Module]:
    """Returns the supported torch layer that ``layer`` derives from; ``nn.Module`` if there is none."""
    return next((base for base in _TWINS if isinstance(layer, base)), nn.Module)


__all__ = [
    "QATGRU",
    "QATLSTM",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedGRU",
    "PackedLSTM",
    "PackedLayer",
    "PackedLinear",
    "PackedMultiheadAttention",
    "PackedWeight",
    "QATConv1d",
    "QATConv2d",
    "QATEmbedding",
    "QATLayer",
    "QATLinear",
    "QATMultiheadAttention",
    "Twins",
    "family_of",
    "objection_to_class",
    "twins_of",
]
