"""What every quantized layer shares.

A layer is quantized in place: its class is replaced, ``nn.Linear`` -> ``QATLinear`` -> ``PackedLinear``, and its
identity, hooks, training flag and remaining parameters stay. Whoever holds a reference to it, be it a parent, a
second name for a shared module, or the caller who quantizes one lone layer, keeps a valid one.

``QATLinear.weight`` remains the trained float parameter, under its old name; its quantizer is the sub-module
``weight_quantizer``. ``PackedLinear`` has ``weight_packed`` instead of both. Layers with several weights have a
sub-module per weight: ``weight_ih_l0_quantizer``, ``in_proj_weight_packed``, ...

Some modules read another layer's ``weight`` and compute with it, without a call of that layer. While they run they find
it as it is deployed: quantized in a prepared layer (:class:`ReadWeight`), decoded at every read in a packed one.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from gq_triton import functional as F
from gq_triton import grouping
from gq_triton.kernels.packed_linear import prefers_dense
from gq_triton.layers.packed_weight import PackedWeight
from gq_triton.quantizer import Quantizer

Child = TypeVar("Child", bound=nn.Module)


class QuantizableLayer(nn.Module):
    """What there is to quantize in a torch layer and in its twins. A mixin for twins of ``nn.Module`` subclasses."""

    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        """Returns the names of the parameters that can be quantized."""
        return ("weight",)

    @staticmethod
    def refuse(layer: nn.Module) -> str | None:
        """Returns why this very layer cannot be quantized, or None if it can."""
        return None

    @staticmethod
    def row_groups(layer: nn.Module, name: str) -> int:
        """Returns how many equal groups the rows of weight ``name`` form: the gates of a recurrent layer."""
        return 1

    @staticmethod
    def split(name: str, rows: int) -> dict[str, slice]:
        """Returns the packed weights that weight ``name``, of ``rows`` rows, becomes, as slices of its rows."""
        return {name: slice(0, rows)}


class ReadWeight:
    """``weight`` of a prepared layer, read as an attribute: the trained parameter or, to modules that compute with it
    instead of calling the layer, the quantized weight."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: nn.Module | None, owner: type) -> Any:
        return self if layer is None else grouping.read(layer, self.name)

    def __set__(self, layer: nn.Module, value: object) -> None:  # of what is no parameter: as replicas and pruning do
        vars(layer)[self.name] = value

    def __delete__(self, layer: nn.Module) -> None:
        del vars(layer)[self.name]


class QATLayer(QuantizableLayer):
    """A layer in quantization-aware training: float parameters, and a quantizer beside each quantized one."""

    autocasts = False  # whether autocast casts this kind of layer's weights
    may_read = False  # whether a forward of its own may read the weight as an attribute

    def attach(self, name: str, quantizer: Quantizer) -> None:
        """Gives weight ``name`` its quantizer."""
        self.add_module(f"{name}_quantizer", quantizer)

    def quantizers(self) -> dict[str, Quantizer]:
        """Returns the quantizers by name of the weight; weights without one are computed with as they are."""
        return _children(self, Quantizer, "_quantizer")

    def quantized(self, name: str) -> Tensor:
        """Returns weight ``name`` as the layer computes with it."""
        return grouping.quantized(self, name) if f"{name}_quantizer" in self._modules else getattr(self, name)

    def quantized_input(self, x: Tensor, name: str) -> Tensor:
        """Returns the input of weight ``name``, fake-quantized over its last dim if the configuration says so."""
        quantizer = getattr(self, f"{name}_quantizer", None)
        return x if quantizer is None else quantize_activations(x, quantizer.config.activations)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        *_, errors = args
        for name, quantizer in self.quantizers().items():
            own = f"{prefix}{name}_quantizer."
            if f"{prefix}{name}" in state_dict and not any(key.startswith(own) for key in state_dict):
                # A float checkpoint: what was fitted belonged to the previous weight.
                try:
                    quantizer.fit(getattr(self, name))
                except ValueError as error:
                    errors.append(f"{prefix}{name} cannot be quantized: {error}")
                state_dict.update(quantizer.state_dict(prefix=own))


class PackedLayer(QuantizableLayer):
    """A layer whose quantized weights exist only in packed form, but for the dense copies that
    :func:`gq_triton.allow_dense` makes. For inference."""

    uses_dense = True  # whether dense copies are of use to this kind of layer
    readable = True  # whether weights are decoded where something reads them as attributes

    def attach(self, name: str, pieces: dict[str, PackedWeight]) -> None:
        """Replaces weight ``name``, and its quantizer if it has one, by its packed pieces."""
        delattr(self, name)
        self._modules.pop(f"{name}_quantizer", None)
        for piece, packed in pieces.items():
            self.add_module(f"{piece}_packed", packed)

    def packed_weights(self) -> dict[str, PackedWeight]:
        """Returns the packed weights by name of the weight."""
        return _children(self, PackedWeight, "_packed")

    def decoded(self, name: str) -> Tensor:
        """Returns weight ``name`` as the layer computes with it."""
        packed = getattr(self, f"{name}_packed", None)
        if packed is None:
            return getattr(self, name)
        return packed.decode() if packed.dense is None else packed.dense

    def quantized_input(self, x: Tensor, name: str) -> Tensor:
        """Returns the input of weight ``name``, quantized over its last dim if the configuration says so."""
        packed = getattr(self, f"{name}_packed", None)
        return x if packed is None else quantize_activations(x, packed.config.activations)

    def linear(self, x: Tensor, name: str, bias: Tensor | None) -> Tensor:
        """Applies packed weight ``name`` to ``x``, (..., in) -> (..., out): its dense copy where there is one and it is
        faster, else the codes, which are never held as floats."""
        packed: PackedWeight = getattr(self, f"{name}_packed")
        activations = packed.config.activations
        usable = packed.dense is not None and packed.dtype == x.dtype
        if usable and prefers_dense(x.shape[:-1].numel(), activations or "none", x.device):
            return linear(quantize_activations(x, activations), packed.dense.flatten(1), bias)
        return F.packed_linear(
            autocast(x),
            packed.codes,
            packed.codebook,
            packed.scale,
            bias,
            bits=packed.config.bits,
            in_features=packed.shape[1],
            out_features=packed.shape[0],
            activations=activations,
            layout=packed.layout,
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pieces, modules = self.split(name, 0), self.__dict__.get("_modules", {})
            if not all(f"{piece}_packed" in modules for piece in pieces):
                raise
        if not self.readable:
            raise AttributeError(f"{type(self).__name__}.{name} is packed and cannot be read: decode {name}_packed")
        decoded = [self.decoded(piece) for piece in pieces]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)


def _children(layer: nn.Module, kind: type[Child], suffix: str) -> dict[str, Child]:
    # Not named_children(), which leaves out the second name of a child that tied weights share.
    return {name.removesuffix(suffix): child for name, child in layer._modules.items() if isinstance(child, kind)}


def autocast(x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype in which torch's own layers would compute with it, where autocast is on."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def quantize_activations(x: Tensor, dtype: str | None) -> Tensor:
    """Returns ``x`` quantized over its last dim to ``dtype`` ("int8" or "fp8"), or as it is for None."""
    return x if dtype is None else F.quantize_activations(x, dtype)
