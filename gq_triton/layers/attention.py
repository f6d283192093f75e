"""Quantized twins of ``nn.MultiheadAttention``, with its whole surface but nested tensors.

torch's module reads its weights, ``out_proj.weight`` among them, without calling anything, and in ``eval`` may hand
the float weights to a fused kernel. The twins therefore project on their own and *call* ``out_proj``, an ordinary
linear layer with a configuration of its own, then attend as torch does.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad, scaled_dot_product_attention

from gq_triton.layers.base import PackedLayer, QATLayer, QuantizableLayer, ReadWeight

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class _Attention(QuantizableLayer):
    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        return ("in_proj_weight",) if layer._qkv_same_embed_dim else _SEPARATE

    @staticmethod
    def split(name: str, rows: int) -> dict[str, slice]:
        # Query, key and value are projected apart where they differ, so they are packed apart.
        if name != "in_proj_weight":
            return {name: slice(0, rows)}
        third = rows // 3
        return {part: slice(i * third, (i + 1) * third) for i, part in enumerate(_SEPARATE)}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns what ``nn.MultiheadAttention`` does.

        Raises:
            ValueError: for nested tensors, for dimensions other than 2 or 3, for ``is_causal`` without
                ``attn_mask``, or for a mask of a wrong shape or dtype.
        """
        _check(query, key, value, attn_mask, is_causal)
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

        q, k, v = self._projections(query, key, value)
        k, v, appended = self._append(k, v)
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[1] - appended, appended)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        heads, weights = self._attend(q, k, v, mask, need_weights)
        heads = heads.transpose(1, 2) if self.batch_first or not batched else heads.permute(2, 0, 1, 3)
        output = self.out_proj(heads.flatten(2))

        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Appends the learned and the zero position to keys and values, (B, S, E); also returns how many."""
        batch, length, width = k.shape
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, width)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, width)], 1)
        if self.add_zero_attn:
            k, v = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1))
        return k, v, k.shape[1] - length

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int, appended: int
    ) -> Tensor | None:
        """Returns both masks as one additive mask that broadcasts to (B, heads, L, S), or None."""
        batch, queries, _ = q.shape
        masks = []
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, (queries, keys), (batch * self.num_heads, queries, keys))
            mask = _additive(attn_mask, q.dtype)
            masks.append(mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (batch, keys))
            masks.append(_additive(key_padding_mask, q.dtype)[:, None, None, :])
        return pad(sum(masks), (0, appended)) if masks else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        rate = self.dropout if self.training else 0.0
        if not need_weights:
            return scaled_dot_product_attention(q, k, v, mask, rate), None
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = dropout((scores if mask is None else scores + mask).softmax(-1), rate)
        return weights @ v, weights

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)


class QATMultiheadAttention(_Attention, QATLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that computes with quantized projections."""

    autocasts = True
    in_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight = (ReadWeight() for _ in range(4))

    def _projections(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = self.weight_names(self)
        weights = [self.quantized(name) for name in names]
        weights = list(weights[0].chunk(3)) if len(weights) == 1 else weights
        inputs = tuple(self.quantized_input(x, names[min(i, len(names) - 1)]) for i, x in enumerate(inputs))
        return tuple(linear(*each) for each in zip(inputs, weights, self._biases(), strict=True))


class PackedMultiheadAttention(_Attention, PackedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that projects from packed codes; ``in_proj_weight`` is packed in three parts."""

    def _projections(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._project(*each) for each in zip(_SEPARATE, inputs, self._biases(), strict=True))

    def _project(self, name: str, input: Tensor, bias: Tensor | None) -> Tensor:
        if hasattr(self, f"{name}_packed"):
            return self.linear(input, name, bias)
        return linear(input, self._float_weight(name), bias)

    def _float_weight(self, name: str) -> Tensor:
        if not self._qkv_same_embed_dim:
            return getattr(self, name)
        return self.in_proj_weight.chunk(3)[_SEPARATE.index(name)]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a mask as values to be added to the scores; True means "do not attend"."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _check_mask(name: str, mask: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} must be boolean or floating; got {mask.dtype}")


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise ValueError(f"{name} must not be a nested tensor: pad it and pass key_padding_mask")
        if x.dim() not in (2, 3) or x.dim() != query.dim():
            raise ValueError(f"query, key and value must all have 2 or all 3 dimensions; {name} has {x.dim()}")
    if is_causal and attn_mask is None:
        raise ValueError("attn_mask must be given where is_causal is True: is_causal is only a hint about it")
