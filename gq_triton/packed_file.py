"""Packed models as safetensors files.

Format, version 1. The tensors are those of the packed model's state dict, under their names, each shared tensor once:
packed weights as ``<weight>_packed.codes`` (uint8 bit planes, exactly ``bits`` bits per weight, see
:mod:`gq_triton.kernels.packing`), ``.codebook`` and ``.scale``, all else as it is. The header's metadata entry
``gq_triton`` is JSON::

    {"version": 1,
     "weights": {"encoder.weight_ih_l0": {"config": {"bits": 4, ...}, "sqnr_db": 21.3}, ...},
     "aliases": {"head.weight_packed.codes": "embedding.weight_packed.codes", ...}}

``aliases`` gives, for each other name of a shared tensor, the name under which it is stored.
Other metadata entries are the caller's. Nothing in a file is executed, and everything in it is checked against the
model that it is loaded into before that model is touched.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gq_triton.files import write_atomically
from gq_triton.kernels.tables import stored_values
from gq_triton.layers import PackedLayer, PackedWeight, QATLayer, twins_of, weight_norm
from gq_triton.layers.packed_weight import finite_or_none, packed_layout
from gq_triton.packed_header import KEY, VERSION, Header, some
from gq_triton.quantize import Target, become, disable_fused_paths, find_targets, join, readers_of

_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_FLOAT_NAMES = ("F16", "BF16", "F32", "F64")

_Layout = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # shape and allowed dtypes of each tensor, by name


class PackedFileError(ValueError):
    """A packed file is damaged, is not one, or does not fit the model."""


def save_packed(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a packed model to a safetensors file, atomically; the layout is in this module's docstring.

    Args:
        model: the result of ``quantize_(model, step="convert")``.
        path: of the file; missing folders are made.
        metadata: texts to keep with it, for :func:`read_metadata`; the name "gq_triton" is taken.

    Raises:
        ValueError: if the model has no packed layer, still has prepared ones, or has state that is not a tensor; or if
            ``metadata`` does not map texts to texts.
    """
    metadata = _check_metadata(metadata)
    if any(isinstance(module, QATLayer) for module in model.modules()):
        raise ValueError("model has prepared layers that are not packed: call quantize_(model, step='convert') first")
    weights = {
        join(layer_name, name): {"config": packed.config.to_dict(), "sqnr_db": finite_or_none(packed.sqnr_db)}
        for layer_name, layer in model.named_modules()
        if isinstance(layer, PackedLayer)
        for name, packed in layer.packed_weights().items()
    }
    if not weights:
        raise ValueError("model has no packed layer: prepare and convert it with quantize_ first")
    tensors, aliases = _split_shared(model)
    header = json.dumps({"version": VERSION, "weights": weights, "aliases": aliases})
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(copies, temporary, {**metadata, KEY: header}))


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """Turns a float model into the packed one of a file, in place.

    Args:
        model: a model of the architecture that was saved, neither prepared nor packed; its values do not matter.
            Tensors go to the devices that it is on, and what is stored as floats takes its dtype.
        path: of a file that :func:`save_packed` wrote.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the model is prepared, packed, or on the meta device.
        PackedFileError: (a ValueError) the file is damaged, of another kind or of another version, or does not fit
            the model, which is then unchanged.
    """
    _check_float(model)
    with _open(path) as file:
        header = Header.read(file.metadata(), file.keys())
        plan = _plan(model, header)
        readers = readers_of(model, [target.layer for target in plan])
        layout = _expected_layout(model, plan, header)
        _check_layout(file, header, layout)
        _check_sharing(model, layout, header)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check_values(header, tensors)
        packed = _empty_weights(plan, header)
    for layer in (*readers, *(target.layer for target in plan)):
        become(layer, "packed")
    for target, pieces in zip(plan, packed, strict=True):
        target.layer.attach(target.weight_name, pieces)
    model.load_state_dict({**tensors, **{name: tensors[stored] for name, stored in header.aliases.items()}})
    disable_fused_paths(model)
    return model


def read_metadata(path: str | Path) -> dict[str, str]:
    """Returns the caller's metadata of a packed file.

    Raises:
        FileNotFoundError: there is no such file.
        PackedFileError: it is damaged or not a packed file.
    """
    with _open(path) as file:
        Header.read(file.metadata(), file.keys())
        metadata = file.metadata()
    return {name: text for name, text in metadata.items() if name != KEY}


# --- writing


def _check_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    metadata = dict(metadata or {})
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str) or name == KEY:
            raise ValueError(f"metadata must map texts, but not {KEY!r}, to texts; got {name!r}: {text!r}")
    return metadata


def _split_shared(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the state dict with each tensor under its first name only, and the other names of shared tensors."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    # Codes in tiles are converted for every name anew, and so are known by the buffer that holds them.
    buffers = {
        join(name, "codes"): module.codes
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedWeight)
    }
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"model has state that is not a tensor and cannot be saved: {name}")
        original = first.setdefault(id(buffers.get(name, tensor)), name)
        if original == name:
            tensors[name] = tensor
        else:
            aliases[name] = original
    return tensors, aliases


# --- reading


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    """Opens a safetensors file. What is found wrong while it is open becomes a PackedFileError that names it."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:
        raise PackedFileError(f"{path} cannot be loaded: {error}") from error


def _check_float(model: nn.Module) -> None:
    if any(isinstance(module, (QATLayer, PackedLayer)) for module in model.modules()):
        raise ValueError("model must be a float model, which the file then packs; it is prepared or packed already")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("model must not be on the meta device: call model.to_empty(device='cpu') first")


def _plan(model: nn.Module, header: Header) -> list[Target]:
    """Returns the model's weights that the file has in packed form."""
    names = set(header.configs)
    plan = [target for target in find_targets(model) if names.intersection(_pieces(target))]
    for target in plan:
        twins = twins_of(target.layer)
        fits = twins and not weight_norm.is_parametrized_otherwise(target.layer, twins.qat.weight_names(target.layer))
        if not fits or not names.issuperset(_pieces(target)):
            raise ValueError(f"{target.name} of the model cannot take the packed form that it has in the file")
    if unknown := names.difference(*(_pieces(target) for target in plan)):
        raise ValueError(f"it has packed weights that the model has not: {some(unknown)}")
    return plan


def _pieces(target: Target) -> dict[str, torch.Size]:
    """Returns the shapes, by full name, of the packed weights that a weight becomes; none if it is computed."""
    if target.weight is None:
        return {}
    rows, *rest = target.weight.shape
    pieces = target.pieces(rows).items()
    return {join(target.layer_names[0], name): torch.Size((part.stop - part.start, *rest)) for name, part in pieces}


def _expected_layout(model: nn.Module, plan: list[Target], header: Header) -> _Layout:
    layout: _Layout = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"the model has state that is not a tensor: {name}")
        dtypes = _FLOAT_NAMES if tensor.is_floating_point() else (_DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)),)
        layout[name] = (tuple(tensor.shape), dtypes)
    for target in {target.layer: target for target in plan}.values():
        _fold(layout, target)
    for target in plan:
        for layer_name in target.layer_names:
            del layout[join(layer_name, target.weight_name)]
            for piece, shape in _pieces(target).items():
                renamed = join(layer_name, piece.rpartition(".")[2])
                for buffer, (size, dtype) in packed_layout(header.configs[piece], shape).items():
                    layout[f"{renamed}_packed.{buffer}"] = (size, (_DTYPE_NAMES[dtype],))
    return layout


def _fold(layout: _Layout, target: Target) -> None:
    """Gives the weight-normed weights of a target's layer, of which all are folded, the entry of one tensor each."""
    twins = twins_of(target.layer)
    assert twins is not None
    for name in twins.qat.weight_names(target.layer):
        normed, parts = weight_norm.value(target.layer, name), weight_norm.parts(target.layer, name)
        for layer_name in target.layer_names if normed is not None else ():
            for part in parts:
                layout.pop(join(layer_name, part), None)
            layout[join(layer_name, name)] = (tuple(normed.shape), _FLOAT_NAMES)


def _check_sharing(model: nn.Module, layout: _Layout, header: Header) -> None:
    """A tensor that the model has in two places must be one in the file too: it has one value."""
    for name, original in _split_shared(model)[1].items():
        if {name, original} <= set(layout) and header.stored(name) != header.stored(original):
            raise ValueError(f"{name} and {original} are one tensor in the model and two in it")


def _check_layout(file: Any, header: Header, expected: _Layout) -> None:
    found = {*file.keys(), *header.aliases}
    if missing := set(expected) - found:
        raise ValueError(f"it lacks tensors that the model has: {some(missing)}")
    if unexpected := found - set(expected):
        raise ValueError(f"it has tensors that the model has not: {some(unexpected)}")
    for name, (shape, dtypes) in expected.items():
        entry = file.get_slice(header.stored(name))
        if tuple(entry.get_shape()) != shape:
            raise ValueError(f"{name} has shape {tuple(entry.get_shape())} in it and {shape} in the model")
        if entry.get_dtype() not in dtypes:
            raise ValueError(f"{name} has dtype {entry.get_dtype()} in it and {' or '.join(dtypes)} in the model")


def _check_values(header: Header, tensors: dict[str, Tensor]) -> None:
    for weight in header.configs:
        owner = header.owner(weight)
        scale, codebook = tensors[f"{owner}_packed.scale"], tensors[f"{owner}_packed.codebook"]
        if not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(f"{owner} has scales that are negative or not finite")
        if not (stored_values(codebook).abs() <= 1).all():
            raise ValueError(f"{owner} has codebook values outside of [-1, 1]")


def _empty_weights(plan: list[Target], header: Header) -> list[dict[str, PackedWeight]]:
    """Returns the packed weights that each planned weight becomes, by their names in the layer, to be filled."""
    made: dict[tuple[str, int], PackedWeight] = {}
    return [_pieces_of(target, header, made) for target in plan]


def _pieces_of(target: Target, header: Header, made: dict[tuple[str, int], PackedWeight]) -> dict[str, PackedWeight]:
    weight, groups = target.weight, target.row_groups
    assert weight is not None
    pieces = {}
    for name, shape in _pieces(target).items():
        owner = header.owner(name)
        empty = PackedWeight(header.configs[owner], shape, weight.dtype, weight.device, groups)
        packed = pieces[name.rpartition(".")[2]] = made.setdefault((owner, groups), empty)
        packed.sqnr_db = finite_or_none(header.sqnr_db[owner])
        if packed.shape != shape:
            raise ValueError(f"{name} and {owner} are one weight in it and have different shapes in the model")
    return pieces
