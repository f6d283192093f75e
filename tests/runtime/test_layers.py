"""Layers on numpy arrays beside torch's."""

import numpy as np
import pytest
import torch
from torch import nn

from gq_triton.kernels import native
from gq_triton.runtime.layers import Embedding, FloatMatrix, LayerNorm, Linear, LSTMLayer, PackedMatrix


def floats(tensor):
    return None if tensor is None else tensor.detach().numpy()


def close(found, expected, atol=2e-6):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=atol)


def test_layer_norm():
    norm = nn.LayerNorm(37)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 * torch.randn(5, 37) + 1
    close(LayerNorm(floats(norm.weight), floats(norm.bias))(x.numpy()), norm(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_float_linear_layer(bias):
    layer, x = nn.Linear(7, 5, bias), torch.randn(3, 7)
    close(Linear(FloatMatrix(floats(layer.weight)), floats(layer.bias))(x.numpy()), layer(x))


def test_a_float_embedding():
    layer = nn.Embedding(6, 4)
    close(Embedding(FloatMatrix(floats(layer.weight)))(3), layer(torch.tensor([3])))


def lstm_layer(lstm, pack=lambda weight, groups: FloatMatrix(floats(weight))):
    return LSTMLayer(
        pack(lstm.weight_ih_l0, 4),
        pack(lstm.weight_hh_l0, 4),
        pack(lstm.weight_hr_l0, 1) if lstm.proj_size else None,
        floats(lstm.bias_ih_l0),
        floats(lstm.bias_hh_l0),
        lstm.proj_size or lstm.hidden_size,
        lstm.hidden_size,
    )


@pytest.mark.parametrize("projection", [0, 5])
def test_a_float_lstm(projection):
    lstm, x = nn.LSTM(6, 9, proj_size=projection), 4 * torch.randn(11, 6)
    layer = lstm_layer(lstm)
    expected, (h, c) = lstm(x)
    first, state = layer(x[:4].numpy(), layer.start())
    second, state = layer(x[4:].numpy(), state)
    close(np.concatenate([first, second]), expected)
    close(state[0], h)
    close(state[1], c)


def test_gates_far_from_zero_neither_warn_nor_break():
    lstm = nn.LSTM(2, 3)
    layer = lstm_layer(lstm)
    x = 1e4 * torch.randn(4, 2)
    with np.errstate(all="raise"):
        found, _ = layer(x.numpy(), layer.start())
    close(found, lstm(x)[0])


def packed(weight, groups, activations="none"):
    """A weight of 4 bits and an int8 codebook, and the float weight that it is."""
    rows, columns = weight.shape
    codebook = np.linspace(-127, 127, 16).round().astype(np.int8)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scale = (0.1 + torch.rand(rows)).numpy()
    planes = (codes.flatten()[::2] | codes.flatten()[1::2] << 4).numpy()
    panels = np.empty(native.panel_bytes(4, rows, columns, groups), np.uint8)
    native.to_panels(planes, codebook, panels, 4, rows, columns, groups)
    description = native.Weight(panels, codebook, scale, 4, rows, columns, groups)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(codebook[codes] / np.float32(127) * scale[:, None]))
    return PackedMatrix(description, activations, 1)


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("kept_float", [(), ("weight_ih_l0",), ("weight_hh_l0",), ("weight_hr_l0",)])
def test_a_packed_lstm_with_or_without_float_weights(kept_float):
    lstm, x = nn.LSTM(6, 20, proj_size=8), torch.randn(7, 6)
    kept = [getattr(lstm, name) for name in kept_float]

    def choose(weight, groups):
        return FloatMatrix(floats(weight)) if any(weight is one for one in kept) else packed(weight, groups)

    layer = lstm_layer(lstm, choose)
    found, (h, c) = layer(x.numpy(), layer.start())
    expected, last = lstm(x)
    close(found, expected, 1e-5)
    close(h, last[0], 1e-5)
    close(c, last[1], 1e-5)


@pytest.mark.usefixtures("needs_native")
def test_recurrent_steps_are_the_same_by_themselves():
    """The native layer and products step by step, on integers, but for the gates' last digits."""
    lstm = nn.LSTM(6, 20, proj_size=8)
    layer = lstm_layer(lstm, lambda weight, groups: packed(weight, groups, "int8"))
    x = torch.randn(5, 6).numpy()
    found, _ = layer(x, layer.start())
    expected, _ = layer._step_by_step(x, layer.start())
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)  # where one activation rounds the other way
    assert np.median(np.abs(found - expected)) < 1e-6


@pytest.mark.usefixtures("needs_native")
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_packed_linear_layer(tokens):
    layer, x = nn.Linear(34, 18), torch.randn(tokens, 34)
    found = Linear(packed(layer.weight, 1), floats(layer.bias))(x.numpy())
    close(found, layer(x), 1e-5)


@pytest.mark.usefixtures("needs_native")
def test_a_packed_embedding():
    layer = nn.Embedding(6, 34)
    close(Embedding(packed(layer.weight, 1))(3), layer(torch.tensor([3])))
