"""``quantize_``: swaps a model's layers for their quantized twins, in place."""

import fnmatch
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gq_triton.config import WeightConfig
from gq_triton.grouping import regroup
from gq_triton.layers import PackedLayer, PackedWeight, QATLayer, family_of, objection_to_class, twins_of, weight_norm
from gq_triton.quantizer import Quantizer, quantizer_class, quantizer_of, warn_of_bypassed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PARAMETRIZED = "parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"


def quantize_(
    model: nn.Module,
    config: WeightConfig | Mapping[str, WeightConfig | None] | None = None,
    step: Literal["prepare", "convert"] = "prepare",
) -> nn.Module:
    """Quantizes a model in place: linear, embedding, convolution, attention, LSTM and GRU layers.

    ``step="prepare"`` makes them quantization-aware: they train their float weights, and each quantized weight gets a
    :class:`~gq_triton.quantizer.Quantizer`, fitted to it. ``step="convert"`` replaces the float weights of a prepared
    model by packed codes. Preparing and converting without training in between is post-training quantization.

    Modules that hold several quantized weights get forward hooks, which have them quantized together
    (:mod:`gq_triton.grouping`).

    A layer keeps its identity and changes its class, so a lone layer may be passed as the model too. But pass the whole
    model: only then are the modules seen that share a weight or read another module's.

    Subclasses of linear, embedding and convolution layers keep their own forward, which finds ``self.weight``
    quantized; what it does to it in place is lost. Modules that read another's ``weight`` while they run, instead of
    calling it, find it quantized, too; to optimizers and all others it is the trained parameter. Weight normalization
    is folded: the layer then has ``weight`` instead of its two parts, so load float checkpoints before. All else stays
    float.

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
            infinity, or is parametrized by other than weight normalization; or a selected layer is of a subclass of an
            attention or recurrent layer, or has an option that is not supported. The model is then unchanged, and the
            error names every such weight, with the pattern that leaves them float.

    Warns:
        UserWarning: naming patterns that match nothing, or weights that are all zeros; or, for "convert", layers that
            were never called in training while others were.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if step == "prepare":
        _prepare(model, select(model, config))
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
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the weight is made of, by full name: itself, or the two parts of a weight-normed one; nothing where it
        is computed in another way, or packed."""
        own = self.layer._parameters.get(self.weight_name)
        found = weight_norm.parts(self.layer, self.weight_name) if own is None else {self.weight_name: own}
        return {join(self.layer_names[0], name): parameter for name, parameter in found.items()}

    @property
    def weight(self) -> Tensor | None:
        """The parameter, or what the layer's weight normalization computes; None where there is neither."""
        own = self.layer._parameters.get(self.weight_name)
        return weight_norm.value(self.layer, self.weight_name) if own is None else own


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
    """Turns a layer of a supported type into its quantized twin, in place; folds its weight normalization."""
    twins = twins_of(layer)
    assert twins is not None
    weight_norm.fold(layer, twins.qat.weight_names(layer))
    layer.__class__ = getattr(twins, form)


def readers_of(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the attention modules that read an ``out_proj`` among ``layers``, and so must become twins with it.

    Raises:
        ValueError: if one is of a subclass of ``nn.MultiheadAttention``.
    """
    owners = _attention_owners(model)
    readers = [owner for layer in layers for owner in owners.get(layer, ())]
    for reader in readers:
        twins = twins_of(reader)
        if twins is None or weight_norm.is_parametrized_otherwise(reader, twins.qat.weight_names(reader)):
            raise ValueError(f"{type(reader).__name__} reads its out_proj's weight by itself: leave out_proj float")
    return readers


def patterns_of(config: object) -> dict[str, WeightConfig | None]:
    """Returns the patterns, in their order, of what :func:`quantize_` takes for ``config``.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(config, WeightConfig):
        return {"*": config}
    if not isinstance(config, Mapping) or not config:
        raise ValueError(
            "config must be a configuration such as GQConfig, or a mapping of name patterns to configurations or None; "
            f"got {config!r}"
        )
    for pattern, value in config.items():
        if not isinstance(pattern, str) or not isinstance(value, (WeightConfig, type(None))):
            raise ValueError(f"config must map name patterns to configurations or None; got {pattern!r}: {value!r}")
    return dict(config)


def _attention_owners(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Returns the attention modules of each ``out_proj``."""
    owners: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            owners.setdefault(module.out_proj, []).append(module)
    return owners


def select(
    model: nn.Module, config: WeightConfig | Mapping[str, WeightConfig | None] | None
) -> list[list[tuple[Target, WeightConfig]]]:
    """Returns the weights that :func:`quantize_` would quantize by ``config``, each with all targets that share it.

    Raises:
        ValueError: it would refuse them.
    """
    chosen = _choose(find_targets(model), patterns_of(config))
    readers_of(model, [target.layer for target, _ in chosen])
    return _group(model, chosen)


def _prepare(model: nn.Module, selected: list[list[tuple[Target, WeightConfig]]]) -> None:
    # Everything that can fail comes before the first change.
    fitted = [(targets, fit_quantizer(*targets[0])) for targets in selected]
    readers = readers_of(model, [target.layer for targets in selected for target, _ in targets])
    for targets, quantizer in fitted:
        for target, _ in targets:
            become(target.layer, "qat")
            target.layer.attach(target.weight_name, quantizer)
    for reader in readers:
        if not isinstance(reader, PackedLayer):
            become(reader, "qat")


def _choose(targets: list[Target], patterns: dict[str, WeightConfig | None]) -> list[tuple[Target, WeightConfig]]:
    """Returns the targets that some configuration wins, checked; warns of patterns that match none."""
    unmatched = set(patterns)
    chosen = []
    objections = {}
    for target in targets:
        matching = [pattern for pattern in patterns if _matches(pattern, target.aliases)]
        unmatched.difference_update(matching)
        config = patterns[matching[0]] if matching else None
        if config is not None:
            objections[target.name] = _objection(target) or quantizer_class(config).refuse(target.layer)
            chosen.append((target, config))
    _check(objections)
    if unmatched:
        names = ", ".join(repr(pattern) for pattern in patterns if pattern in unmatched)
        warnings.warn(f"these patterns match no layer that can be quantized: {names}", UserWarning, stacklevel=4)
    return chosen


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _check(objections: dict[str, str | None]) -> None:
    """Raises an error that names all weights with an objection."""
    found = {name: objection for name, objection in objections.items() if objection is not None}
    if found:
        reasons = "; ".join(f"{name} cannot be quantized: {objection}" for name, objection in found.items())
        hint = f"to leave it float, put {dict.fromkeys(found)} before the pattern that selects it"
        raise ValueError(f"{reasons} ({hint})")


def _objection(target: Target) -> str | None:
    layer, weight = target.layer, target.weight
    if isinstance(layer, PackedLayer):
        return "its layer is packed already"
    twins = twins_of(layer)
    if twins is None:
        return objection_to_class(layer)
    if weight_norm.is_parametrized_otherwise(layer, twins.qat.weight_names(layer)):
        return f"its layer is {_PARAMETRIZED}"
    if isinstance(layer, QATLayer) and target.weight_name in layer.quantizers():
        return "it is prepared already"
    if weight is None:
        return "it is not a parameter but computed, as by pruning; make it one first"
    if weight.dtype not in _FLOATS:
        return f"its dtype is {weight.dtype}; allowed are {', '.join(map(str, _FLOATS))}"
    if weight.is_meta:
        return "it is on the meta device and has no values"
    return twins.qat.refuse(layer)


def _group(model: nn.Module, chosen: list[tuple[Target, WeightConfig]]) -> list[list[tuple[Target, WeightConfig]]]:
    """Groups targets that share one weight, which get one quantizer.

    Raises:
        ValueError: if a weight has another user that is not quantized, or with other settings.
    """
    users: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            users.setdefault(id(parameter), []).append(join(module_name, name))
    groups: dict[tuple[int, ...], list[tuple[Target, WeightConfig]]] = {}
    for target, config in chosen:
        groups.setdefault(tuple(map(id, target.parameters.values())), []).append((target, config))
    for key, group in groups.items():
        first, config = group[0]
        known = {name for target, _ in group for name in target.parameters}
        others = sorted({name for parameter in key for name in users[parameter]} - known)
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


def fit_quantizer(target: Target, config: WeightConfig) -> Quantizer:
    """Returns a quantizer that fits a target's weight.

    Raises:
        ValueError: the weight holds NaN or infinity, or nothing.
    """
    weight = target.weight
    assert weight is not None
    quantizer = quantizer_of(config, len(weight), weight.device)
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
    for name, layer in layers.items():
        if weight_norm.is_parametrized_otherwise(layer, layer.quantizers()):
            raise ValueError(f"{name} cannot be packed: it is {_PARAMETRIZED}")
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
