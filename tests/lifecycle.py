"""What every model of other people must come through: preparing, training, converting, saving, loading."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quantized import hard_weights, same
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gq_triton as gq

# A given mu saves the search for one, which takes most of the time with small weights.
THREE_BITS, FOUR_BITS, FIVE_BITS = (gq.GQConfig(bits=bits, mu=2.0) for bits in (3, 4, 5))
CONFIG = {"*s.0.*": THREE_BITS, "*s.1.*": FIVE_BITS, "*": FOUR_BITS}


def seeded(function: Callable, *args):
    """Calls a function whose random numbers, such as LayerDrop's, are to be the same each time."""
    torch.manual_seed(1)
    np.random.seed(1)
    return function(*args)


def check_lifecycle(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    output_of: Callable[[nn.Module], Tensor],
    folder: Path,
    smallest: float = 2.0,
) -> nn.Module:
    """Takes a model through all its stages and returns it packed, as loaded from a file.

    Args:
        build: makes the model, with the same weights at each call.
        loss_of, output_of: what it computes in training, and in ``eval``.
        folder: to write to.
        smallest: how many times smaller than float32 it must become, at least.
    """
    reference, model = build(), gq.quantize_(build(), CONFIG)
    _take_weights(reference, hard_weights(model))
    with torch.no_grad():
        same(*(seeded(output_of, each.eval()) for each in (model, reference)), atol=1e-5)

    losses = _train(model.train(), loss_of)
    assert losses[-1] < losses[0], losses
    assert _without_gradient(model) == _without_gradient(_trained_once(reference.train(), loss_of))

    with torch.no_grad():
        expected = seeded(output_of, model.eval())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*trained without its layer being called")  # unused, or dropped
            gq.quantize_(model, step="convert")
        packed = seeded(output_of, model)
        same(packed, expected, atol=2e-5, rtol=1e-4)
        assert gq.report(model).ratio > smallest
        gq.save_packed(model, folder / "model.safetensors")
        loaded = gq.load_packed(build().eval(), folder / "model.safetensors")
        for twin in (loaded, copy.deepcopy(loaded)):
            assert torch.equal(seeded(output_of, twin), packed)
    return loaded


def _take_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        layer, _, attribute = name.rpartition(".")
        layer = model.get_submodule(layer)
        if parametrize.is_parametrized(layer, attribute):
            setattr(layer, attribute, weight)
        else:
            layer.get_parameter(attribute).data.copy_(weight)


def _train(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(gq.param_groups(model, lr=1e-3, weight_decay=1e-2))
    annealer, losses = gq.Annealer(model, steps), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = seeded(loss_of, model)
        loss.backward()
        optimizer.step()
        annealer.step()
        losses.append(loss.item())
    return losses


def _trained_once(model: nn.Module, loss_of: Callable[[nn.Module], Tensor]) -> nn.Module:
    seeded(loss_of, model).backward()
    return model


def _without_gradient(model: nn.Module) -> set[str]:
    """Weights, and those of which they are made or that quantize them, that no gradient reached."""
    names = (name for name, each in model.named_parameters() if each.requires_grad and each.grad is None)
    return {name.replace(".parametrizations.", ".").split(".original")[0].split("_quantizer.")[0] for name in names}
