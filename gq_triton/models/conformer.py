"""A streaming Conformer encoder in plain torch layers (Gulati et al., arXiv 2005.08100).

Each frame attends to those of its own chunk, also the later ones, and to a limited number before it (as the chunked
attention of Chen et al., arXiv 2010.11395); convolutions are causal, and LayerNorm takes the place of BatchNorm. So an
output depends on nothing behind its chunk's end, and a stream that is cut at chunks is encoded as the whole would be.

Nothing here knows of quantization: ``gq_triton.quantize_`` works on this model as on anybody's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import glu, pad, scaled_dot_product_attention, silu

from .checks import require_features
from .config import ConformerConfig

__all__ = ["ConformerEncoder", "ConformerState"]

PIECE = 32  # chunks that are encoded at a time


class LayerState(NamedTuple):
    """What a layer keeps of earlier frames.

    Attributes:
        keys, values: ``(B, left, size)``, what later frames attend to.
        convolved: ``(B, size, kernel - 1)``, inputs of the depthwise convolution.
    """

    keys: Tensor
    values: Tensor
    convolved: Tensor


class ConformerState(NamedTuple):
    """What the encoder carries between chunks, for a batch of streams.

    Attributes:
        pending: ``(B, fewer than subsampling, features)``, input frames that await others to make an encoder frame.
        frame: ``(B, 1, 1, features)``, the last input frame that was taken.
        halved: ``(B, channels, 1, ceil(features / 2))``, the last frame between the two time reductions.
        seen: ``(B,)`` int64, how many of the frames that layers keep were there, at most ``left``.
        layers: what each layer keeps.
    """

    pending: Tensor
    frame: Tensor
    halved: Tensor
    seen: Tensor
    layers: list[LayerState]

    @staticmethod
    def join(states: Sequence[ConformerState]) -> ConformerState:
        """One state of several streams side by side. Equally many frames must await in each, as whole chunks leave
        none."""
        *parts, layers = zip(*states, strict=True)
        joined = [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*layers, strict=True)]
        return ConformerState(*map(torch.cat, parts), joined)

    def split(self) -> list[ConformerState]:
        """The states of the streams, each a batch of one; the inverse of :meth:`join`."""
        *parts, layers = self
        rows = zip(*(zip(*(part.split(1) for part in layer), strict=True) for layer in layers), strict=True)
        kept = [[LayerState(*layer) for layer in row] for row in rows]
        return [ConformerState(*row) for row in zip(*(part.split(1) for part in parts), kept, strict=True)]


class ConformerEncoder(nn.Module):
    """Two strided convolutions, which join four input frames, and Conformer blocks.

    ``(B, T, features)`` -> ``(B, T // 4, size)``.

    Attributes:
        chunk: input frames of a chunk.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.features, self.output_size, self.subsampling = config.features, config.encoder_size, config.subsampling
        self.chunk = config.chunk * config.subsampling
        halved = math.ceil(config.features / 2)
        self.first = nn.Conv2d(1, config.channels, 3, stride=2, padding=(0, 1))
        self.second = nn.Conv2d(config.channels, config.channels, 3, stride=2, padding=(0, 1))
        self.input = nn.Linear(config.channels * math.ceil(halved / 2), config.encoder_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.context = Context(config)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances; frames beyond a length never influence those before it.

        Args:
            features: ``(B, T, features)``, T at least 4.
            lengths: ``(B,)`` valid frames; of fewer than 4 comes no output frame.

        Raises:
            ValueError: on a wrong shape or a batch too short for one output frame.
        """
        require_features(features, self.features, self.subsampling)
        lengths = lengths // self.subsampling
        return self._encode(features, self.initial_state(features), lengths)[0], lengths

    def initial_state(self, features: Tensor) -> ConformerState:
        """The state before the first chunk, for the batch size, dtype and device of ``features``."""
        batch = features.shape[0]
        halved = features.new_zeros(batch, self.first.out_channels, 1, math.ceil(self.features / 2))
        return ConformerState(
            features.new_zeros(batch, 0, self.features),
            features.new_zeros(batch, 1, 1, self.features),
            halved,
            torch.zeros(batch, dtype=torch.int64, device=features.device),
            [block.initial_state(features) for block in self.blocks],
        )

    def stream(self, features: Tensor, state: ConformerState) -> tuple[Tensor, ConformerState]:
        """Encodes one or more whole chunks, ``(B, n * chunk, features)``, or what is left at a stream's end, of any
        length; equals :meth:`forward` on the concatenation of all of them so far."""
        return self._encode(features, state, None)

    def _encode(self, features: Tensor, state: ConformerState, lengths: Tensor | None) -> tuple[Tensor, ConformerState]:
        """All at once in training; else in pieces, since what attention takes grows with the square of their length."""
        parts, size = [], features.shape[1] if self.training else PIECE * self.chunk
        for index, piece in enumerate(features.split(max(1, size), 1)):
            left = None if lengths is None else lengths - index * PIECE * self.context.chunk
            encoded, state = self._encode_piece(piece, state, left)
            parts.append(encoded)
        return torch.cat(parts, 1), state

    def _encode_piece(
        self, features: Tensor, state: ConformerState, lengths: Tensor | None
    ) -> tuple[Tensor, ConformerState]:
        features = torch.cat([state.pending, features], 1)
        whole = features.shape[1] - features.shape[1] % self.subsampling
        pending, x = features[:, whole:], features[:, None, :whole]
        if not whole:
            return features.new_zeros(len(features), 0, self.output_size), state._replace(pending=pending)
        frame, halved = x[:, :, -1:], torch.relu(self.first(torch.cat([state.frame, x], 2)))
        x = torch.relu(self.second(torch.cat([state.halved, halved], 2)))
        x = self.dropout(self.input(x.transpose(1, 2).flatten(2)))
        visible, distances = self.context(x.shape[1], state.seen, lengths), self.context.distances(x)
        layers = []
        for block, kept in zip(self.blocks, state.layers, strict=True):
            x, kept = block(x, kept, distances, visible)
            layers.append(kept)
        seen = (state.seen + x.shape[1]).clamp(max=self.context.left)
        return x, ConformerState(pending, frame, halved[:, :, -1:], seen, layers)


class Context(nn.Module):
    """Which frames each frame attends to, and how far they are."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.left, self.chunk, self.size = config.left, config.chunk, config.encoder_size

    def distances(self, x: Tensor) -> Tensor:
        """``(left + 2 chunk - 1, size)``, in the dtype and on the device of ``x``: sinusoids of every distance to a
        frame within reach, from the earliest one's, ``left + chunk - 1``, down to the latest one's, ``1 - chunk``."""
        distance = torch.arange(self.left + self.chunk - 1, -self.chunk, -1, device=x.device)[:, None]
        rates = torch.exp(torch.arange(0, self.size, 2, device=x.device) * (-math.log(10000) / self.size))
        return torch.stack([torch.sin(distance * rates), torch.cos(distance * rates)], 2).flatten(1).to(x)

    def forward(self, frames: int, seen: Tensor, lengths: Tensor | None) -> Tensor:
        """Whether each new frame attends to each that layers keep and each new one, ``(B, 1, T, left + T)`` bool.

        Args:
            frames: T, the number of new frames, from the beginning of a chunk on.
            seen: ``(B,)``, how many of the ``left`` frames kept were there.
            lengths: ``(B,)``, valid ones of the new frames, or None if all are.
        """
        query = torch.arange(frames, device=seen.device)[:, None]
        key = torch.arange(-self.left, frames, device=seen.device)
        start = query // self.chunk * self.chunk
        near = (key >= start - self.left) & (key < start + self.chunk)
        there = key >= -seen[:, None]
        if lengths is not None:
            there = there & (key < lengths[:, None])
        visible = near & there[:, None] | (key == query)  # itself too, where nothing else is: a softmax needs a term
        return visible[:, None]


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward: each normalized first and added."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.before, self.after = FeedForward(config), FeedForward(config)
        self.attention, self.convolution = Attention(config), Convolution(config)
        self.norm = nn.LayerNorm(config.encoder_size)
        self.dropout = nn.Dropout(config.dropout)

    def initial_state(self, features: Tensor) -> LayerState:
        """The state before the first frame."""
        batch, size = features.shape[0], self.norm.normalized_shape[0]
        kept = features.new_zeros(batch, self.attention.left, size)
        return LayerState(kept, kept, features.new_zeros(batch, size, self.convolution.depthwise.kernel_size[0] - 1))

    def forward(self, x: Tensor, state: LayerState, distances: Tensor, visible: Tensor) -> tuple[Tensor, LayerState]:
        """Frames ``(B, T, size)`` after those of the state; what :class:`Context` says of them."""
        x = x + 0.5 * self.dropout(self.before(x))
        attended, keys, values = self.attention(x, state, distances, visible)
        x = x + self.dropout(attended)
        convolved, inputs = self.convolution(x, state.convolved)
        x = x + self.dropout(convolved)
        return self.norm(x + 0.5 * self.dropout(self.after(x))), LayerState(keys, values, inputs)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.encoder_size)
        self.widen = nn.Linear(config.encoder_size, 4 * config.encoder_size)
        self.narrow = nn.Linear(4 * config.encoder_size, config.encoder_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(silu(self.widen(self.norm(x)))))


class Attention(nn.Module):
    """Self-attention with relative positions (Dai et al., arXiv 1901.02860): queries meet keys and, apart, the
    projections of their distances, each with a bias of its own for every head."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.encoder_size
        self.heads, self.left, self.chunk = config.heads, config.left, config.chunk
        self.norm = nn.LayerNorm(size)
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.distance, self.output = nn.Linear(size, size, bias=False), nn.Linear(size, size)
        self.key_bias = nn.Parameter(torch.zeros(self.heads, 1, size // self.heads))
        self.distance_bias = nn.Parameter(torch.zeros(self.heads, 1, size // self.heads))

    def forward(
        self, x: Tensor, state: LayerState, distances: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output ``(B, T, size)``, and the last ``left`` keys and values."""
        x = self.norm(x)
        keys = torch.cat([state.keys, self.key(x)], 1)
        values = torch.cat([state.values, self.value(x)], 1)
        query, key, value = (self._by_head(part) for part in (self.query(x), keys, values))
        by_distance = (query + self.distance_bias) @ self._by_head(self.distance(distances)[None]).transpose(-1, -2)
        scores = self._by_key(by_distance) / math.sqrt(query.shape[-1])
        mask = scores.masked_fill(~visible, -math.inf)
        attended = scaled_dot_product_attention(query + self.key_bias, key, value, attn_mask=mask)
        last = keys.shape[1] - self.left
        return self.output(attended.transpose(1, 2).flatten(2)), keys[:, last:], values[:, last:]

    def _by_key(self, by_distance: Tensor) -> Tensor:
        """``(B, heads, T, distances)`` -> ``(B, heads, T, left + T)``, zeros beyond reach: a frame later, each key is
        one distance farther, so every row moves by one, which rows that are one number too long do by themselves."""
        frames = by_distance.shape[2]
        moved = pad(by_distance, (0, frames)).flatten(2)[:, :, :-frames].unflatten(2, (frames, -1))
        return moved[..., self.chunk - 1 : self.chunk - 1 + self.left + frames]

    def _by_head(self, x: Tensor) -> Tensor:
        """``(B, T, size)`` -> ``(B, heads, T, size / heads)``."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Convolution(nn.Module):
    """A gated linear layer, a causal depthwise convolution, and another linear layer."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        size = config.encoder_size
        self.norm, self.input = nn.LayerNorm(size), nn.Linear(size, 2 * size)
        self.depthwise = nn.Conv1d(size, size, config.kernel, groups=size)
        self.depthwise_norm, self.output = nn.LayerNorm(size), nn.Linear(size, size)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Output ``(B, T, size)``, and the last inputs of the depthwise convolution, which continue ``before``."""
        inputs = torch.cat([before, glu(self.input(self.norm(x))).transpose(1, 2)], 2)
        convolved = self.depthwise_norm(self.depthwise(inputs).transpose(1, 2))
        return self.output(silu(convolved)), inputs[:, :, inputs.shape[2] - before.shape[2] :]
