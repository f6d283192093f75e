"""Quantized twins of torch layers: for training (``QAT...``) and for inference (``Packed...``)."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gq_triton.layers.attention import PackedMultiheadAttention, QATMultiheadAttention
from gq_triton.layers.base import PackedLayer, QATLayer
from gq_triton.layers.conv import PackedConv1d, PackedConv2d, QATConv1d, QATConv2d
from gq_triton.layers.embedding import PackedEmbedding, QATEmbedding
from gq_triton.layers.linear import PackedLinear, QATLinear
from gq_triton.layers.packed_weight import PackedWeight
from gq_triton.layers.recurrent import QATGRU, QATLSTM, PackedGRU, PackedLSTM


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


def twins_of(layer: nn.Module) -> Twins | None:
    """Returns the quantized forms of a layer, which may be one of them already; None for any other type.

    A subclass of a supported torch layer is another type: its own forward would be lost.
    """
    return _BY_TYPE.get(type(layer))


def family_of(layer: nn.Module) -> Twins | None:
    """Returns the quantized forms of the supported torch layer that ``layer`` is, was or derives from, or None."""
    return twins_of(layer) or next((twins for base, twins in _TWINS.items() if isinstance(layer, base)), None)


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
    "twins_of",
]
