"""Streaming transducers in plain torch layers (Graves, arXiv 1211.3711; He et al., arXiv 1811.06621), and their
recurrent encoders; conformer.py has another.

Nothing here knows of quantization: ``gq_triton.quantize_`` works on this model as on anybody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .checks import require_features
from .config import RNNT_PRESETS, ConformerConfig, RNNTConfig, TransducerConfig
from .conformer import ConformerEncoder

__all__ = [
    "RNNT",
    "RNNT_PRESETS",
    "BifocalEncoder",
    "BifocalState",
    "Encoder",
    "EncoderState",
    "Joint",
    "Lattice",
    "Predictor",
    "RNNTConfig",
    "encode",
    "encoder_of",
]


LSTMState = tuple[Tensor, Tensor]


class EncoderState(NamedTuple):
    """What the encoder carries between chunks, for a batch of streams.

    Attributes:
        pending: ``(B, fewer than stack, features)``, input frames that await others to be joined with.
        reduced_pending: ``(B, at most 1, output_size)``, the same before the second time reduction.
        layers: each LSTM's state, ``(1, B, output_size)`` and ``(1, B, encoder_hidden)``.
    """

    pending: Tensor
    reduced_pending: Tensor
    layers: list[LSTMState]

    @staticmethod
    def join(states: Sequence[EncoderState]) -> EncoderState:
        """One state of several streams side by side. Equally many frames must await in each, as whole chunks (multiples
        of the encoder's subsampling) leave none."""
        pending, reduced, layers = zip(*states, strict=True)
        joined = [
            (torch.cat([h for h, _ in layer], 1), torch.cat([c for _, c in layer], 1))
            for layer in zip(*layers, strict=True)
        ]
        return EncoderState(torch.cat(pending), torch.cat(reduced), joined)

    def split(self) -> list[EncoderState]:
        """The states of the streams, each a batch of one; the inverse of :meth:`join`."""
        layers = zip(*(zip(h.split(1, 1), c.split(1, 1), strict=True) for h, c in self.layers), strict=True)
        parts = zip(self.pending.split(1), self.reduced_pending.split(1), layers, strict=True)
        return [EncoderState(pending, reduced, list(layer)) for pending, reduced, layer in parts]


class Encoder(nn.Module):
    """Stacked unidirectional LSTMs, each followed by LayerNorm, over joined frames.

    ``(B, T, features)`` -> ``(B, T // subsampling, output_size)``.

    Attributes:
        chunk: input frames that streams are cut at best: those of an encoder frame.
    """

    def __init__(self, config: RNNTConfig) -> None:
        super().__init__()
        self.features, self.stack = config.features, config.stack
        self.reduce_after, self.subsampling = config.reduce_after, config.subsampling
        self.chunk = self.subsampling
        self.output_size = config.encoder_projection or config.encoder_hidden
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for index in range(config.encoder_layers):
            inputs = config.features * config.stack if index == 0 else self.output_size
            if index and index == config.reduce_after:
                inputs *= 2
            lstm = nn.LSTM(inputs, config.encoder_hidden, batch_first=True, proj_size=config.encoder_projection)
            self.layers.append(lstm)
            self.norms.append(nn.LayerNorm(self.output_size))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances; frames beyond a length never influence those before it.

        Args:
            features: ``(B, T, features)``, T at least ``subsampling``.
            lengths: ``(B,)`` valid frames; of fewer than ``subsampling`` comes no output frame.

        Raises:
            ValueError: on a wrong shape or a batch too short for one output frame.
        """
        require_features(features, self.features, self.subsampling)
        encoded, _ = self.stream(features, self.initial_state(features))
        return encoded, lengths // self.subsampling

    def initial_state(self, features: Tensor) -> EncoderState:
        """The state before the first chunk, for the batch size, dtype and device of ``features``."""
        batch = features.shape[0]
        layers = [
            (features.new_zeros(1, batch, self.output_size), features.new_zeros(1, batch, lstm.hidden_size))
            for lstm in self.layers
        ]
        pending, reduced = features.new_zeros(batch, 0, self.features), features.new_zeros(batch, 0, self.output_size)
        return EncoderState(pending, reduced, layers)

    def stream(self, features: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """Encodes one chunk of any length; equals :meth:`forward` on the concatenation of all chunks so far."""
        x, pending = _join_frames(torch.cat([state.pending, features], 1), self.stack)
        reduced_pending, layers = state.reduced_pending, list(state.layers)
        for index, lstm in enumerate(self.layers):
            if index and index == self.reduce_after:
                x, reduced_pending = _join_frames(torch.cat([reduced_pending, x], 1), 2)
            if x.shape[1] == 0:
                x = x.new_zeros(x.shape[0], 0, self.output_size)
                continue
            x, layers[index] = lstm(x, layers[index])
            x = self.dropout(self.norms[index](x))
        return x, EncoderState(pending, reduced_pending, layers)


def _join_frames(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Joins each ``factor`` neighbouring frames; returns the joined frames and the remainder."""
    batch, frames, size = x.shape
    whole = frames - frames % factor
    return x[:, :whole].reshape(batch, whole // factor, size * factor), x[:, whole:]


class BifocalState(NamedTuple):
    """What a bifocal encoder carries between chunks, for a batch of streams.

    Attributes:
        pending: ``(B, fewer than subsampling, features)``, input frames that await others to make an encoder frame.
        left: how many further encoder frames of each stream are to be the small encoder's.
        encoders: of each stream the state, a batch of one, of the encoder that makes its next frame.
    """

    pending: Tensor
    left: list[int]
    encoders: list[EncoderState]

    @staticmethod
    def join(states: Sequence[BifocalState]) -> BifocalState:
        """One state of several streams side by side, before and after their switches. Equally many frames must await in
        each."""
        pending, left, encoders = zip(*states, strict=True)
        return BifocalState(torch.cat(pending), list(chain(*left)), list(chain(*encoders)))

    def split(self) -> list[BifocalState]:
        """The states of the streams, each a batch of one; the inverse of :meth:`join`."""
        rows = zip(self.pending.split(1), self.left, self.encoders, strict=True)
        return [BifocalState(pending, [left], [encoder]) for pending, left, encoder in rows]


class StreamingEncoder(Protocol):
    """What :meth:`BifocalEncoder.stream` asks of its encoders."""

    def stream(self, features: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """As :meth:`Encoder.stream`."""


class BifocalEncoder(nn.Module):
    """A small encoder up to a switch frame, the end of a wake word, and a large one after it.

    After the Bifocal RNN-T of Macoskey, Strimel and Rastrow, "Bifocal Neural ASR: Exploiting Keyword Spotting for
    Inference Optimization", ICASSP 2021 (arXiv 2108.01704). Where theirs is made of Bifocal LSTM cells, this one has
    two whole encoders: the large one begins with its initial state at the switch.

    Frames join alike in both, so an encoder frame lasts as long before the switch as after it. The switch takes effect
    at a whole encoder frame: ``switch // subsampling`` of them come from the small encoder, brought to the large one's
    width by a linear layer.

    ``(B, T, features)`` -> ``(B, T // subsampling, output_size)``.
    """

    def __init__(self, config: RNNTConfig) -> None:
        super().__init__()
        self.small, self.large = Encoder(config.of_small_encoder()), Encoder(config)
        self.widen = nn.Linear(self.small.output_size, self.large.output_size)
        self.features, self.subsampling = self.large.features, self.large.subsampling
        self.output_size, self.chunk = self.large.output_size, self.large.chunk

    def forward(self, features: Tensor, lengths: Tensor, switch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances; frames beyond a length never influence those before it.

        Args:
            features: ``(B, T, features)``, T at least ``subsampling``.
            lengths: ``(B,)`` valid frames; of fewer than ``subsampling`` comes no output frame.
            switch: ``(B,)`` integers, input frames before the switch, 0 and more, also beyond the end. None, the
                default, is 0 everywhere: there is no wake word, and the small encoder gets no gradient.

        Raises:
            ValueError: on a wrong shape, a negative switch or a batch too short for one output frame.
        """
        if switch is None:
            return self.large(features, lengths)
        require_features(features, self.features, self.subsampling)
        encoded, _ = self.stream(features, self.initial_state(features, switch))
        return encoded, lengths // self.subsampling

    def initial_state(self, features: Tensor, switch: Tensor | None = None) -> BifocalState:
        """The state before the first chunk, for the batch size, dtype and device of ``features``; ``switch`` as in
        :meth:`forward`."""
        batch = features.shape[0]
        if switch is None:
            switch = torch.zeros(batch, dtype=torch.int64)
        if switch.shape != (batch,) or switch.is_floating_point():
            raise ValueError(f"switch is {switch.dtype} {tuple(switch.shape)}; ({batch},) integers are needed")
        if (switch < 0).any():
            raise ValueError(f"switch is {switch.tolist()}; frames are counted from 0")
        left = (switch // self.subsampling).tolist()
        encoders = [(self.small if frames else self.large).initial_state(features[:1]) for frames in left]
        return BifocalState(features.new_zeros(batch, 0, self.features), left, encoders)

    def stream(self, features: Tensor, state: BifocalState) -> tuple[Tensor, BifocalState]:
        """Encodes one chunk of any length; equals :meth:`forward` on the concatenation of all chunks so far."""
        return self.stream_through(self.small, self.large, features, state)

    def stream_through(
        self, small: StreamingEncoder, large: StreamingEncoder, features: Tensor, state: BifocalState
    ) -> tuple[Tensor, BifocalState]:
        """:meth:`stream`, by stand-ins for the two encoders that compute the same."""
        features = torch.cat([state.pending, features], 1)
        frames = features.shape[1] // self.subsampling
        cuts = sorted({0, frames, *(left for left in state.left if left < frames)})
        encoded = [features.new_zeros(len(features), 0, self.output_size)]
        for start, end in pairwise(cut * self.subsampling for cut in cuts):
            part, state = self._between_switches(small, large, features[:, start:end], state)
            encoded.append(part)
        pending = features[:, frames * self.subsampling :]
        return torch.cat(encoded, 1), BifocalState(pending, state.left, state.encoders)

    def _between_switches(
        self, small: StreamingEncoder, large: StreamingEncoder, features: Tensor, state: BifocalState
    ) -> tuple[Tensor, BifocalState]:
        """Whole encoder frames, before the end of which no stream switches: each encoder takes its streams' at once."""
        frames = features.shape[1] // self.subsampling
        left = [max(0, count - frames) for count in state.left]
        outputs: dict[int, Tensor] = {}
        encoders: dict[int, EncoderState] = {}
        if before := [row for row, count in enumerate(state.left) if count]:
            encoded, states = _stream_rows(small, before, features, state.encoders)
            outputs |= zip(before, self.widen(encoded).split(1), strict=True)
            encoders |= zip(before, states, strict=True)
            encoders |= {row: self.large.initial_state(features[:1]) for row in before if not left[row]}
        if after := [row for row, count in enumerate(state.left) if not count]:
            encoded, states = _stream_rows(large, after, features, state.encoders)
            outputs |= zip(after, encoded.split(1), strict=True)
            encoders |= zip(after, states, strict=True)
        rows = range(len(left))
        encoded = torch.cat([outputs[row] for row in rows])
        return encoded, BifocalState(state.pending, left, [encoders[row] for row in rows])


def _stream_rows(
    encoder: StreamingEncoder, rows: list[int], features: Tensor, states: list[EncoderState]
) -> tuple[Tensor, list[EncoderState]]:
    """Some rows of a batch through an encoder: their outputs side by side, and their states."""
    chunk = features if len(rows) == len(features) else features[rows]
    if len(rows) == 1:  # as ever on a device: its state need not be copied
        encoded, state = encoder.stream(chunk, states[rows[0]])
        return encoded, [state]
    encoded, state = encoder.stream(chunk, EncoderState.join([states[row] for row in rows]))
    return encoded, state.split()


class Predictor(nn.Module):
    """The label language model of the transducer: embedding and LSTM. The blank stands for "no label yet"."""

    def __init__(self, config: TransducerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.predictor_embedding)
        self.lstm = nn.LSTM(
            config.predictor_embedding,
            config.predictor_hidden,
            num_layers=config.predictor_layers,
            batch_first=True,
            dropout=config.dropout if config.predictor_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, labels: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """``(B, U)`` labels -> ``(B, U, hidden)`` and the LSTM's state after the last label."""
        output, state = self.lstm(self.dropout(self.embedding(labels)), state)
        return self.dropout(output), state


class Joint(nn.Module):
    """Combines encoder and predictor outputs: ``output(tanh(encoder + predictor))``, broadcasting."""

    def __init__(self, config: TransducerConfig, encoder_size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(encoder_size, config.joint)
        self.predictor = nn.Linear(config.predictor_hidden, config.joint, bias=False)
        self.output = nn.Linear(config.joint, config.vocab_size)

    def forward(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """``(..., encoder_size)`` and ``(..., predictor_hidden)``, broadcastable -> ``(..., vocab_size)`` logits."""
        return self.combine(self.encoder(encoded), self.predictor(predicted))

    def combine(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """Two projections ``(..., joint)``, broadcastable -> ``(..., vocab_size)`` logits."""
        return self.output(torch.tanh(encoded + predicted))


class Lattice(NamedTuple):
    """What training needs of a transducer. The logits of frame t and position u are
    ``joint.combine(frames[:, t], positions[:, u])``; of all frames and positions together, they are huge.

    Attributes:
        frames: ``(B, T', joint)``, the joint's projection of the encoder's outputs.
        positions: ``(B, U + 1, joint)``, its projection of the predictor's outputs, before and after each label.
        lengths: ``(B,)`` valid frames.
        encoded: ``(B, T', E)``, the encoder's outputs.
    """

    frames: Tensor
    positions: Tensor
    lengths: Tensor
    encoded: Tensor


class RNNT(nn.Module):
    """A transducer: encoder, predictor and joint network.

    Args:
        config: sizes. A :class:`ConformerConfig` makes the encoder a :class:`ConformerEncoder`, an :class:`RNNTConfig`
            an :class:`Encoder` or, where it has a small encoder as well, a :class:`BifocalEncoder`.

    Raises:
        ValueError: ``config`` has no predictor.
    """

    blank = 0

    def __init__(self, config: RNNTConfig | ConformerConfig) -> None:
        super().__init__()
        self.config = config
        if not config.predictor_layers:
            raise ValueError("predictor_layers is 0; a transducer has a predictor, gq_triton.models.CTC has none")
        self.encoder = encoder_of(config)
        self.predictor = Predictor(config)
        self.joint = Joint(config, self.encoder.output_size)

    def forward(
        self, features: Tensor, feature_lengths: Tensor, targets: Tensor, switch: Tensor | None = None
    ) -> Lattice:
        """What the transducer loss is computed from.

        Args:
            features: ``(B, T, features)``.
            feature_lengths: ``(B,)`` valid frames.
            targets: ``(B, U)`` labels, padded with any valid id.
            switch: ``(B,)`` frames at which wake words end; for a :class:`BifocalEncoder` only.

        Raises:
            ValueError: a switch for another encoder, or what the encoder refuses.
        """
        encoded, lengths = encode(self.encoder, features, feature_lengths, switch)
        start = targets.new_full((targets.shape[0], 1), self.blank)
        predicted, _ = self.predictor(torch.cat([start, targets], 1))
        return Lattice(self.joint.encoder(encoded), self.joint.predictor(predicted), lengths, encoded)


def encoder_of(config: RNNTConfig | ConformerConfig) -> Encoder | BifocalEncoder | ConformerEncoder:
    """The encoder that ``config`` describes."""
    if isinstance(config, ConformerConfig):
        return ConformerEncoder(config)
    return BifocalEncoder(config) if config.small_encoder_layers else Encoder(config)


def encode(encoder: nn.Module, features: Tensor, lengths: Tensor, switch: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an encoder of any kind makes of whole utterances; ``switch`` as in :meth:`BifocalEncoder.forward`.

    Raises:
        ValueError: a switch for another encoder.
    """
    if switch is None:
        return encoder(features, lengths)
    if not isinstance(encoder, BifocalEncoder):
        raise ValueError(f"switch is for a BifocalEncoder; this model's is of type {type(encoder).__name__}")
    return encoder(features, lengths, switch)
