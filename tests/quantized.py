"""Helpers for tests of quantized layers."""

import copy
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gq_triton as gq
from gq_triton.layers import PackedLayer, QATLayer


def hard_weights(model):
    """Every quantized weight of a prepared model by full name, as it would be deployed."""
    weights = {}
    for prefix, layer in model.named_modules():
        for name, quantizer in layer.quantizers().items() if isinstance(layer, QATLayer) else ():
            mode = quantizer.training
            weights[f"{prefix}.{name}".lstrip(".")] = quantizer.eval()(getattr(layer, name)).detach()
            quantizer.train(mode)
    return weights


def packed_weights(model):
    """Every packed weight of a converted model by full name, decoded."""
    return {
        f"{prefix}.{name}".lstrip("."): packed.decode()
        for prefix, layer in model.named_modules()
        if isinstance(layer, PackedLayer)
        for name, packed in layer.packed_weights().items()
    }


def prepare(layer, config=None, **options):
    """Prepares ``layer`` in place; returns it and a float twin with the hard weights, so with the same outputs."""
    twin = copy.deepcopy(layer)
    gq.quantize_(layer, config or gq.GQConfig(**options))
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in hard_weights(layer).items():
            parameters[name].copy_(weight)
    return layer, twin


def convert(model):
    """A packed copy of a prepared model."""
    return gq.quantize_(copy.deepcopy(model), step="convert")


def same(actual, expected, atol=2e-6, rtol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def ungrouped(model):
    """A copy of a prepared model that quantizes its weights one by one."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module._forward_hooks_always_called.clear()
    return twin


class Operations(TorchDispatchMode):
    """Counts the operations run within, by name, but for views, which compute nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += not func.is_view
        return func(*args, **(kwargs or {}))
