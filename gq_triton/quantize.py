"""``quantize_``: swaps a model's layers for their quantized twins, in place."""

import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gq_triton.config import GQConfig
from gq_triton.grouping import regroup
from gq_triton.layers import PackedLayer, PackedWeight, QATLayer, family_of, twins_of
from gq_triton.quantizer import WeightQuantizer, warn_of_bypassed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_(
    model: nn.Module,
    config: GQConfig | Mapping[str, GQConfig | None] | None = None,
    step: Literal["prepare", "convert"] = "prepare",
) -> nn.Module:
    """Quantizes a model in place: linear, embedding, convolution, attention, LSTM and GRU layers.

    ``step="prepare"`` makes them quantization-aware: they train their float weights, and each quantized weight gets a
    :class:`WeightQuantizer`, fitted to it. ``step="convert"`` replaces the float weights of a prepared model by
    packed codes. Preparing and converting without training in between is post-training quantization.

    Modules that hold several quantized weights get forward hooks, which have them quantized together
    (:mod:`gq_triton.grouping`).

    A layer keeps its identity and changes its class, so a lone layer may be passed as the model too. But pass the whole
    model: only then are the modules seen that share a weight or read another module's.

    Args:
        model: the model; its weights must be real (not on the meta device).
        config: for "prepare": one configuration for every layer, or a mapping of patterns (``fnmatch`` style, where
            ``*`` also matches dots) to configurations, or to None for what stays float. The first pattern wins that
            matches a weight's name (``encoder.weight_hh_l0``) or its module's (``encoder``); ``out_proj`` of an
            attention module also answers to that module's name. What no pattern matches stays float. Not given for
            "convert".
        step: "prepare" or "convert".

    Returns:
        ``model`` itself.

    Raises:
        ValueError: if an argument is not as described; nothing was prepared ("convert"); a selected weight is already
            prepared or packed, is shared with something that cannot or is not to be quantized alike, holds NaN or
            infinity, or is parametrized; or a selected layer is of a subclass with its own forward, or has an option
            that is not supported. The model is then unchanged.

    Warns:
        UserWarning: naming patterns that match nothing, or weights that are all zeros; or, for "convert", layers that
            were never called in training while others were.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if step == "prepare":
        _prepare(model, _patterns(config))
    elif step == "convert":
        if config is not None:
            raise ValueError("config must not be given for step='convert': each weight keeps what it was prepared with")
        _convert(model)
    else:
        raise ValueError(f"step must be 'prepare' or 'convert'; got {step!r}")
    disable_fused_paths(model)
    regroup(model)
    return model


@dataclass(frozen=True)
class Target:
    """A weight that can be quantized, found in a model.

    Attributes:
        layer: the module that has it.
        weight_name: its name there.
        layer_names: full names of the module; several if the model holds it in several places.
        owner_names: full names of the attention modules that read this ``out_proj``; empty for others.
    """

    layer: nn.Module
    weight_name: str
    layer_names: tuple[str, ...]
    owner_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first full name of the weight."""
        return join(self.layer_names[0], self.weight_name)

    @property
    def aliases(self) -> tuple[str, ...]:
        """Every name that a pattern may match."""
        return (*(join(name, self.weight_name) for name in self.layer_names), *self.layer_names, *self.owner_names)

    def pieces(self, rows: int) -> dict[str, slice]:
        """Returns the packed weights that the weight, of ``rows`` rows, becomes: local names and slices of rows."""
        twins = family_of(self.layer)
        assert twins is not None
        return twins.packed.split(self.weight_name, rows)

    @property
    def row_groups(self) -> int:
        """How many equal groups the weight's rows form."""
        twins = family_of(self.layer)
        assert twins is not None
        return twins.packed.row_groups(self.layer, self.weight_name)

    @property
    def weight(self) -> Tensor | None:
        """The parameter; None where it is computed (parametrized, weight-normed) or packed."""
        return self.layer._parameters.get(self.weight_name)


def find_targets(model: nn.Module) -> list[Target]:
    """Returns every weight of ``model`` that is of a kind that can be quantized, whether it may be or not."""
    names: dict[nn.Module, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names[module] = (*names.get(module, ()), name)
    owners = _attention_owners(model)
    return [
        Target(layer, weight_name, layer_names, tuple(name for owner in owners.get(layer, ()) for name in names[owner]))
        for layer, layer_names in names.items()
        if (twins := family_of(layer)) is not None
        for weight_name in twins.qat.weight_names(layer)
    ]


def join(*parts: str) -> str:
    """Joins names of modules and of what is in them; the root module's name is empty."""
    return ".".join(part for part in parts if part)


def disable_fused_paths(model: nn.Module) -> None:
    """Keeps torch's transformer encoder from handing float weights of its layers to a fused kernel in ``eval``."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if not any(isinstance(child, (QATLayer, PackedLayer)) for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        else:
            module.activation_relu_or_gelu = 0  # its one use is to allow that kernel


def become(layer: nn.Module, form: Literal["qat", "packed"]) -> None:
    """Turns a layer of a supported type into its quantized twin, in place."""
    layer.__class__ = getattr(twins_of(layer), form)


def readers_of(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the attention modules that read an ``out_proj`` among ``layers``, and so must become twins with it.

    Raises:
        ValueError: if one is of a subclass of ``nn.MultiheadAttention``.
    """
    owners = _attention_owners(model)
    readers = [owner for layer in layers for owner in owners.get(layer, ())]
    for reader in readers:
        if twins_of(reader) is None:
            raise ValueError(f"{type(reader).__name__} reads its out_proj's weight by itself: leave out_proj float")
    return readers


def _patterns(config: object) -> dict[str, GQConfig | None]:
    if isinstance(config, GQConfig):
        return {"*": config}
    if not isinstance(config, Mapping) or not config:
        raise ValueError(
            f"config must be a GQConfig, or a mapping of name patterns to GQConfig or None; got {config!r}"
        )
    for pattern, value in config.items():
        if not isinstance(pattern, str) or not isinstance(value, (GQConfig, type(None))):
            raise ValueError(f"config must map name patterns to GQConfig or None; got {pattern!r}: {value!r}")
    return dict(config)


def _attention_owners(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Returns the attention modules of each ``out_proj``."""
    owners: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            owners.setdefault(module.out_proj, []).append(module)
    return owners


def _prepare(model: nn.Module, patterns: dict[str, GQConfig | None]) -> None:
    chosen = _choose(find_targets(model), patterns)
    readers = readers_of(model, [target.layer for target, _ in chosen])
    # Everything that can fail comes before the first change.
    fitted = [(targets, _fit(*targets[0])) for targets in _group(model, chosen)]
    for targets, quantizer in fitted:
        for target, _ in targets:
            become(target.layer, "qat")
            target.layer.attach(target.weight_name, quantizer)
    for reader in readers:
        if not isinstance(reader, PackedLayer):
            become(reader, "qat")


def _choose(targets: list[Target], patterns: dict[str, GQConfig | None]) -> list[tuple[Target, GQConfig]]:
    """Returns the targets that some configuration wins, checked; warns of patterns that match none."""
    unmatched = set(patterns)
    chosen = []
    for target in targets:
        matching = [pattern for pattern in patterns if _matches(pattern, target.aliases)]
        unmatched.difference_update(matching)
        config = patterns[matching[0]] if matching else None
        if config is not None:
            _check(target)
            chosen.append((target, config))
    if unmatched:
        names = ", ".join(repr(pattern) for pattern in patterns if pattern in unmatched)
        warnings.warn(f"these patterns match no layer that can be quantized: {names}", UserWarning, stacklevel=4)
    return chosen


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _check(target: Target) -> None:
    objection = _objection(target)
    if objection is not None:
        hint = f"to leave it float, put {{{target.name!r}: None}} before the pattern that selects it"
        raise ValueError(f"{target.name} cannot be quantized: {objection} ({hint})")


def _objection(target: Target) -> str | None:
    layer, weight = target.layer, target.weight
    kind = type(layer).__name__
    if isinstance(layer, PackedLayer):
        return "its layer is packed already"
    if parametrize.is_parametrized(layer):
        return "its layer is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    twins = twins_of(layer)
    if twins is None:
        return f"its layer is a {kind}, a subclass whose own forward the quantized layer would not have"
    if isinstance(layer, QATLayer) and target.weight_name in layer.quantizers():
        return "it is prepared already"
    if weight is None:
        return "it is not a parameter but computed, as by weight_norm or pruning; remove that first"
    if weight.dtype not in _FLOATS:
        return f"its dtype is {weight.dtype}; allowed are {', '.join(map(str, _FLOATS))}"
    if weight.is_meta:
        return "it is on the meta device and has no values"
    return twins.qat.refuse(layer)


def _group(model: nn.Module, chosen: list[tuple[Target, GQConfig]]) -> list[list[tuple[Target, GQConfig]]]:
    """Groups targets that share one weight, which get one quantizer.

    Raises:
        ValueError: if a weight has another user that is not quantized, or with other settings.
    """
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(join(module_name, name))
    groups: dict[int, list[tuple[Target, GQConfig]]] = {}
    for target, config in chosen:
        groups.setdefault(id(target.weight), []).append((target, config))
    for key, group in groups.items():
        first, config = group[0]
        others = sorted(set(users[key]) - {target.name for target, _ in group})
        if others:
            raise ValueError(
                f"{first.name} is shared with {', '.join(others)}, which would read it unquantized: "
                "give all of them one config, or leave all of them float"
            )
        for target, other in group:
            if other != config:
                raise ValueError(
                    f"{first.name} and {target.name} are one weight but match different configs: {config} and {other}"
                )
    return list(groups.values())


def _fit(target: Target, config: GQConfig) -> WeightQuantizer:
    weight = target.weight
    assert weight is not None
    quantizer = WeightQuantizer(config, len(weight), weight.device)
    try:
        quantizer.fit(weight)
    except ValueError as error:
        raise ValueError(f"{target.name} cannot be quantized: {error}") from error
    if not weight.any():
        message = f"{target.name} is all zeros and quantizes to zeros however it is trained: give it values first"
        warnings.warn(message, UserWarning, stacklevel=4)
    return quantizer.train(target.layer.training).requires_grad_(weight.requires_grad)


def _convert(model: nn.Module) -> None:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}
    if not layers:
        raise ValueError("model has no prepared layer to convert: call quantize_(model, config, step='prepare') first")
    warn_of_bypassed(model)
    made: dict[tuple[object, ...], PackedWeight] = {}
    # Everything that can fail comes before the first change.
    packed = [
        (layer, name, _pack(join(layer_name, name), layer, name, made))
        for layer_name, layer in layers.items()
        for name in layer.quantizers()
    ]
    for layer in layers.values():
        become(layer, "packed")
    for layer, name, pieces in packed:
        layer.attach(name, pieces)


def _pack(
    full_name: str, layer: QATLayer, name: str, made: dict[tuple[object, ...], PackedWeight]
) -> dict[str, PackedWeight]:
    """Returns the packed pieces of a weight; those that another layer shares are taken from ``made``, or put there."""
    weight, quantizer, groups = getattr(layer, name), layer.quantizers()[name], layer.row_groups(layer, name)
    pieces = {}
    for piece, rows in layer.split(name, len(weight)).items():
        key = quantizer, id(weight), rows.start, rows.stop, groups
        try:
            pieces[piece] = made[key] = made.get(key) or PackedWeight.from_quantizer(quantizer, weight, rows, groups)
        except ValueError as error:
            raise ValueError(f"{full_name} cannot be packed: {error}") from error
    return pieces
