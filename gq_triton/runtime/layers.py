"""Layers on numpy arrays: packed weights by the native kernels, weights that were left float by numpy.

Everything is float32 and of one stream: x is (T, features), a state of an LSTM (1, size).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gq_triton.kernels import native

__all__ = ["Embedding", "FloatMatrix", "LSTMLayer", "LayerNorm", "Linear", "Matrix", "PackedMatrix", "State"]

State = tuple[np.ndarray, np.ndarray]  # h (1, P), c (1, H)


class PackedMatrix(NamedTuple):
    """A packed weight (rows, columns).

    Attributes:
        weight: for the native kernels.
        activations: what x is quantized to, "none", "int8" or "fp8".
        threads: at most so many.
    """

    weight: native.Weight
    activations: str
    threads: int

    def product(self, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x W^T + bias: (T, columns) -> (T, rows)."""
        out = np.empty((len(x), self.weight.rows), np.float32)
        native.linear(x, self.weight, bias, out, self.activations, self.threads)
        return out

    def row(self, index: int) -> np.ndarray:
        """(1, columns): one row of the weight."""
        out = np.empty((1, self.weight.columns), np.float32)
        native.decode_rows(np.array([index], np.int64), self.weight, out)
        return out


class FloatMatrix(NamedTuple):
    """A weight (rows, columns) that was not packed."""

    values: np.ndarray

    def product(self, x: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x W^T + bias: (T, columns) -> (T, rows)."""
        y = x @ self.values.T
        return y if bias is None else y + bias

    def row(self, index: int) -> np.ndarray:
        """(1, columns): one row of the weight."""
        return self.values[index : index + 1]


Matrix = PackedMatrix | FloatMatrix


class Linear(NamedTuple):
    """``nn.Linear``."""

    weight: Matrix
    bias: np.ndarray | None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.weight.product(x, self.bias)


class Embedding(NamedTuple):
    """``nn.Embedding``, for one index at a time."""

    weight: Matrix

    def __call__(self, index: int) -> np.ndarray:
        return self.weight.row(index)


class LayerNorm(NamedTuple):
    """``nn.LayerNorm`` over the last dimension."""

    weight: np.ndarray
    bias: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        native.layer_norm(x, self.weight, self.bias, out)
        return out


class LSTMLayer:
    """One layer of an ``nn.LSTM``.

    Args:
        ih, hh: (4 H, K) and (4 H, P).
        hr: (P, H), or None where there is no projection: then P is H.
        bias_ih, bias_hh: (4 H,).
        size, hidden: P and H.
    """

    def __init__(
        self,
        ih: Matrix,
        hh: Matrix,
        hr: Matrix | None,
        bias_ih: np.ndarray,
        bias_hh: np.ndarray,
        size: int,
        hidden: int,
    ) -> None:
        self.ih, self.hh, self.hr, self.bias_ih, self.bias_hh = ih, hh, hr, bias_ih, bias_hh
        self.size, self.hidden = size, hidden
        matrices = [ih, hh] if hr is None else [ih, hh, hr]
        self._packed = None
        if all(isinstance(matrix, PackedMatrix) for matrix in matrices):
            weights, activations = [matrix.weight for matrix in matrices], [matrix.activations for matrix in matrices]
            self._packed = native.Recurrent(weights, (bias_ih, bias_hh), activations, ih.threads)

    def start(self) -> State:
        """The state before the first step."""
        return np.zeros((1, self.size), np.float32), np.zeros((1, self.hidden), np.float32)

    def __call__(self, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """(T, K) -> (T, P), and the state after it."""
        if self._packed is None:
            return self._step_by_step(x, state)
        out, last = np.empty((len(x), self.size), np.float32), (np.empty_like(state[0]), np.empty_like(state[1]))
        self._packed(x, native.Segments.of_one_sequence(len(x)), state, out, last)
        return out, last

    def _step_by_step(self, x: np.ndarray, state: State) -> tuple[np.ndarray, State]:
        h, c = state
        out = np.empty((len(x), self.size), np.float32)
        inputs = self.ih.product(x, self.bias_ih)
        for step in range(len(x)):
            i, f, g, o = np.split(inputs[step] + self.hh.product(h, self.bias_hh), 4, axis=1)
            c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
            m = _sigmoid(o) * np.tanh(c)
            h = m if self.hr is None else self.hr.product(m)
            out[step] = h
        return out, (h, c)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.5) * x)  # an exponential would overflow
