"""The transducer of :mod:`gq_triton.models.rnnt` on numpy arrays, for one stream."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gq_triton.models.config import RNNTConfig

from .layers import Embedding, LayerNorm, Linear, LSTMLayer, State
from .weights import Weights

__all__ = ["RNNT", "BifocalEncoder", "BifocalState", "Encoder", "EncoderState", "Joint", "Predictor"]


class EncoderState(NamedTuple):
    """What the encoder carries between chunks: frames that await others to be joined with, and its layers' states."""

    pending: np.ndarray
    reduced_pending: np.ndarray
    layers: list[State]


class Encoder:
    """LSTMs, each followed by LayerNorm, over joined frames: (T, features) -> (T // subsampling, output_size)."""

    def __init__(self, config: RNNTConfig, weights: Weights, name: str = "model.encoder") -> None:
        self.features, self.stack, self.reduce_after = config.features, config.stack, config.reduce_after
        self.output_size = config.encoder_projection or config.encoder_hidden
        self.layers: list[LSTMLayer] = []
        self.norms: list[LayerNorm] = []
        for index in range(config.encoder_layers):
            inputs = self.output_size if index else config.features * config.stack
            inputs *= 2 if index and index == config.reduce_after else 1
            layer = f"{name}.layers.{index}"
            self.layers.append(_lstm(weights, layer, 0, inputs, config.encoder_hidden, config.encoder_projection))
            self.norms.append(_layer_norm(weights, f"{name}.norms.{index}", self.output_size))

    def start(self) -> EncoderState:
        """The state before the first chunk."""
        pending, reduced = np.zeros((0, self.features), np.float32), np.zeros((0, self.output_size), np.float32)
        return EncoderState(pending, reduced, [layer.start() for layer in self.layers])

    def stream(self, features: np.ndarray, state: EncoderState) -> tuple[np.ndarray, EncoderState]:
        """Encodes one chunk of any length; of all chunks together this is the encoding of the whole."""
        x, pending = _join_frames(np.concatenate([state.pending, features]), self.stack)
        reduced_pending, layers = state.reduced_pending, list(state.layers)
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            if index and index == self.reduce_after:
                x, reduced_pending = _join_frames(np.concatenate([reduced_pending, x]), 2)
            if not len(x):
                x = np.zeros((0, self.output_size), np.float32)
                continue
            x, layers[index] = layer(x, layers[index])
            x = norm(x)
        return x, EncoderState(pending, reduced_pending, layers)


def _join_frames(x: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins each ``factor`` neighbouring frames; returns the joined frames and the remainder."""
    whole = len(x) - len(x) % factor
    return x[:whole].reshape(whole // factor, -1 if whole else x.shape[1] * factor), x[whole:]


class BifocalState(NamedTuple):
    """What a bifocal encoder carries between chunks: frames that await others to make an encoder frame, how many
    further encoder frames are the small encoder's, and the state of the encoder that makes the next one."""

    pending: np.ndarray
    left: int
    encoder: EncoderState


class BifocalEncoder:
    """A small encoder up to a switch, a large one after it; see :class:`gq_triton.models.rnnt.BifocalEncoder`."""

    def __init__(self, config: RNNTConfig, weights: Weights) -> None:
        self.small = Encoder(config.of_small_encoder(), weights, "model.encoder.small")
        self.large = Encoder(config, weights, "model.encoder.large")
        self.widen = _linear(weights, "model.encoder.widen", self.large.output_size, self.small.output_size)
        self.subsampling = config.subsampling

    def start(self, left: int = 0) -> BifocalState:
        """The state before the first chunk, of which the first ``left`` encoder frames are the small encoder's."""
        pending = np.zeros((0, self.large.features), np.float32)
        return BifocalState(pending, left, (self.small if left else self.large).start())

    def stream(self, features: np.ndarray, state: BifocalState) -> tuple[np.ndarray, BifocalState]:
        """Encodes one chunk of any length; of all chunks together this is the encoding of the whole."""
        features = np.concatenate([state.pending, features])
        frames = len(features) // self.subsampling
        count = min(state.left, frames)  # for the small encoder
        left, encoder, parts = state.left - count, state.encoder, []
        switch, end = count * self.subsampling, frames * self.subsampling
        if count:
            encoded, encoder = self.small.stream(features[:switch], encoder)
            parts.append(self.widen(encoded))
            encoder = encoder if left else self.large.start()
        if not left:
            encoded, encoder = self.large.stream(features[switch:end], encoder)
            parts.append(encoded)
        parts = parts or [np.zeros((0, self.large.output_size), np.float32)]
        return np.concatenate(parts), BifocalState(features[end:], left, encoder)


class Predictor:
    """The label language model: embedding and LSTM. The blank stands for "no label yet"."""

    def __init__(self, config: RNNTConfig, weights: Weights) -> None:
        size, hidden = config.predictor_embedding, config.predictor_hidden
        self.embedding = Embedding(weights.matrix("model.predictor.embedding.weight", config.vocab_size, size))
        self.layers = [
            _lstm(weights, "model.predictor.lstm", index, hidden if index else size, hidden, 0)
            for index in range(config.predictor_layers)
        ]

    def start(self) -> list[State]:
        """The state before the first label."""
        return [layer.start() for layer in self.layers]

    def __call__(self, label: int, states: list[State]) -> tuple[np.ndarray, list[State]]:
        """One step: (1, hidden), and the states after it."""
        x, after = self.embedding(label), []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state)
            after.append(state)
        return x, after


class Joint:
    """Combines encoder and predictor outputs: output(tanh(encoder + predictor))."""

    def __init__(self, config: RNNTConfig, weights: Weights) -> None:
        encoded, joint = config.encoder_projection or config.encoder_hidden, config.joint
        self.encoder = _linear(weights, "model.joint.encoder", joint, encoded)
        self.predictor = _linear(weights, "model.joint.predictor", joint, config.predictor_hidden, bias=False)
        self.output = _linear(weights, "model.joint.output", config.vocab_size, joint)

    def combine(self, encoded: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """Two projections (W, joint) and (1, joint) -> (W, vocab_size) logits."""
        return self.output(np.tanh(encoded + predicted))


class RNNT(NamedTuple):
    """The recurrent transducer."""

    encoder: Encoder | BifocalEncoder
    predictor: Predictor
    joint: Joint

    @classmethod
    def load(cls, config: RNNTConfig, weights: Weights) -> RNNT:
        """The transducer of a file.

        Raises:
            ValueError: the file's tensors are not those of such a model.
        """
        encoder = BifocalEncoder if config.small_encoder_layers else Encoder
        return cls(encoder(config, weights), Predictor(config, weights), Joint(config, weights))


def _lstm(weights: Weights, name: str, layer: int, inputs: int, hidden: int, projection: int) -> LSTMLayer:
    size, gates = projection or hidden, 4 * hidden
    return LSTMLayer(
        weights.matrix(f"{name}.weight_ih_l{layer}", gates, inputs, groups=4),
        weights.matrix(f"{name}.weight_hh_l{layer}", gates, size, groups=4),
        weights.matrix(f"{name}.weight_hr_l{layer}", size, hidden) if projection else None,
        weights.vector(f"{name}.bias_ih_l{layer}", gates),
        weights.vector(f"{name}.bias_hh_l{layer}", gates),
        size,
        hidden,
    )


def _layer_norm(weights: Weights, name: str, size: int) -> LayerNorm:
    return LayerNorm(weights.vector(f"{name}.weight", size), weights.vector(f"{name}.bias", size))


def _linear(weights: Weights, name: str, rows: int, columns: int, bias: bool = True) -> Linear:
    matrix = weights.matrix(f"{name}.weight", rows, columns)
    return Linear(matrix, weights.vector(f"{name}.bias", rows) if bias else None)
