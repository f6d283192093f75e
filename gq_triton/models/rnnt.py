"""A streaming RNN transducer in plain torch layers (Graves, arXiv 1211.3711; He et al., arXiv 1811.06621).

Nothing here knows of quantization: ``gq_triton.quantize_`` works on this model as on anybody's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["RNNT", "RNNT_PRESETS", "Encoder", "EncoderState", "Joint", "Lattice", "Predictor", "RNNTConfig"]


@dataclass(frozen=True)
class RNNTConfig:
    """Sizes of an :class:`RNNT`.

    Attributes:
        vocab_size: labels including the blank, which is id 0.
        features: values per input frame.
        stack: input frames joined into one encoder frame; the first time reduction.
        encoder_layers, encoder_hidden: unidirectional LSTM layers and their width.
        encoder_projection: width of each LSTM's output projection; 0 for none.
        reduce_after: layers after which pairs of frames are joined, the second time reduction; 0 for none.
        predictor_embedding, predictor_hidden, predictor_layers: the label LSTM.
        joint: width of the joint network.
        dropout: probability, after the encoder's layers and the predictor's.
    """

    vocab_size: int
    features: int = 80
    stack: int = 4
    encoder_layers: int = 3
    encoder_hidden: int = 320
    encoder_projection: int = 0
    reduce_after: int = 1
    predictor_embedding: int = 64
    predictor_hidden: int = 128
    predictor_layers: int = 1
    joint: int = 256
    dropout: float = 0.2

    def __post_init__(self) -> None:
        may_be_zero = {"encoder_projection", "reduce_after", "dropout"}
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and field.name not in may_be_zero):
                raise ValueError(f"{field.name} is {value}; a positive number is needed")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; the blank and at least one label are needed")
        if self.reduce_after >= self.encoder_layers:
            raise ValueError(f"reduce_after is {self.reduce_after}; allowed: 0..{self.encoder_layers - 1}")
        if self.dropout >= 1:
            raise ValueError(f"dropout is {self.dropout}; allowed: 0 <= dropout < 1")

    @classmethod
    def preset(cls, name: str, vocab_size: int, **changes) -> RNNTConfig:
        """One of :data:`RNNT_PRESETS` for a vocabulary, with fields changed by keyword."""
        if name not in RNNT_PRESETS:
            raise ValueError(f"preset is {name!r}; allowed: {', '.join(RNNT_PRESETS)}")
        return replace(cls(vocab_size=vocab_size, **RNNT_PRESETS[name]), **changes)

    @property
    def subsampling(self) -> int:
        """Input frames per encoder output frame."""
        return self.stack * (2 if self.reduce_after else 1)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> RNNTConfig:
        """The inverse of :meth:`to_dict`; raises ValueError on unknown fields."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"RNNTConfig has no field {', '.join(sorted(unknown))}")
        return cls(**values)


#: ``tiny`` for the quickstart, ``small`` for AN4 (about 2.8 M parameters), ``base`` the size class of on-device
#: recognizers (about 60 M).
RNNT_PRESETS: dict[str, dict] = {
    "tiny": dict(
        encoder_layers=2,
        encoder_hidden=128,
        predictor_embedding=32,
        predictor_hidden=64,
        joint=96,
        dropout=0.1,
    ),
    "small": dict(
        stack=3,
        encoder_layers=3,
        encoder_hidden=320,
        predictor_embedding=64,
        predictor_hidden=128,
        joint=256,
        dropout=0.25,
    ),
    "base": dict(
        stack=3,
        encoder_layers=6,
        encoder_hidden=1024,
        reduce_after=2,
        predictor_embedding=256,
        predictor_hidden=768,
        predictor_layers=2,
        joint=640,
        dropout=0.1,
    ),
}

LSTMState = tuple[Tensor, Tensor]


class EncoderState(NamedTuple):
    """What the encoder carries between chunks: frames not yet consumed and the layers' states."""

    pending: Tensor
    reduced_pending: Tensor
    layers: list[LSTMState | None]


class Encoder(nn.Module):
    """Stacked unidirectional LSTMs, each followed by LayerNorm, over joined frames.

    ``(B, T, features)`` -> ``(B, T // subsampling, output_size)``.
    """

    def __init__(self, config: RNNTConfig) -> None:
        super().__init__()
        self.features, self.stack = config.features, config.stack
        self.reduce_after, self.subsampling = config.reduce_after, config.subsampling
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
        if features.ndim != 3 or features.shape[-1] != self.features:
            raise ValueError(f"features is {tuple(features.shape)}; (B, T, {self.features}) is needed")
        if features.shape[1] < self.subsampling:
            raise ValueError(f"features has {features.shape[1]} frames; at least {self.subsampling} are needed")
        encoded, _ = self.stream(features, self.initial_state(features))
        return encoded, lengths // self.subsampling

    def initial_state(self, features: Tensor) -> EncoderState:
        """The state before the first chunk, for the batch size, dtype and device of ``features``."""
        pending = features.new_zeros(features.shape[0], 0, self.features)
        reduced = features.new_zeros(features.shape[0], 0, self.output_size)
        return EncoderState(pending, reduced, [None] * len(self.layers))

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


class Predictor(nn.Module):
    """The label language model of the transducer: embedding and LSTM. The blank stands for "no label yet"."""

    def __init__(self, config: RNNTConfig) -> None:
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

    def __init__(self, config: RNNTConfig, encoder_size: int) -> None:
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
    """The recurrent transducer: encoder, predictor and joint network."""

    blank = 0

    def __init__(self, config: RNNTConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.predictor = Predictor(config)
        self.joint = Joint(config, self.encoder.output_size)

    def forward(self, features: Tensor, feature_lengths: Tensor, targets: Tensor) -> Lattice:
        """What the transducer loss is computed from.

        Args:
            features: ``(B, T, features)``.
            feature_lengths: ``(B,)`` valid frames.
            targets: ``(B, U)`` labels, padded with any valid id.
        """
        encoded, lengths = self.encoder(features, feature_lengths)
        start = targets.new_full((targets.shape[0], 1), self.blank)
        predicted, _ = self.predictor(torch.cat([start, targets], 1))
        return Lattice(self.joint.encoder(encoded), self.joint.predictor(predicted), lengths, encoded)
