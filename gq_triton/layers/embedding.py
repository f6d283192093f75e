"""Quantized twins of ``nn.Embedding``.

An embedding has no input activations: that setting has no effect on it. The zero row of ``padding_idx`` stays exactly
zero with a scale per channel; with one per tensor it takes the smallest codebook value, as none of the 2**bits is zero.
"""

from torch import Tensor, nn
from torch.nn.functional import embedding

from gq_triton import functional as F
from gq_triton.layers.base import PackedLayer, QATLayer, QuantizableLayer, ReadWeight


class _Embedding(QuantizableLayer):
    @staticmethod
    def refuse(layer: nn.Module) -> str | None:
        if layer.max_norm is not None:
            return "max_norm rewrites the float weight in forward, behind the quantizer; use max_norm=None"
        if layer.sparse:
            return "the quantizer's gradient is dense; use sparse=False"
        return None


class QATEmbedding(_Embedding, QATLayer, nn.Embedding):
    """``nn.Embedding`` that looks up rows of the quantized weight, (num_embeddings, embedding_dim)."""

    weight = ReadWeight()

    def forward(self, input: Tensor) -> Tensor:
        """Maps integer indices (...) to (..., embedding_dim)."""
        weight = self.quantized("weight")
        return embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class PackedEmbedding(_Embedding, PackedLayer, nn.Embedding):
    """``nn.Embedding`` that decodes the rows it looks up; the float weight is never materialised."""

    uses_dense = False

    def forward(self, input: Tensor) -> Tensor:
        """Maps integer indices (...) to (..., embedding_dim)."""
        packed = self.weight_packed
        rows = F.packed_embedding(
            input,
            packed.codes,
            packed.codebook,
            packed.scale,
            bits=packed.config.bits,
            embedding_dim=self.embedding_dim,
            num_embeddings=self.num_embeddings,
            layout=packed.layout,
        )
        return rows.to(packed.dtype)
