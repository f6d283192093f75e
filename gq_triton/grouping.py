"""Quantizes the weights of a model in groups: a model has hundreds of small weights, and launching costs more than
computing.

While a module with several quantizers is called, a *scope* is open. The first layer in it that asks for its quantized
weight has a whole group quantized, that layer's weight and those of its neighbours, in one operation; the neighbours
find theirs ready. When the call returns, all is forgotten. A group holds consecutive weights in module order, at
most :data:`GROUP_BYTES` of them.

A group is quantized when its first member is needed, not earlier: autograd runs what was recorded last first, so the
gradients of a group that was quantized ahead of other layers would be held back until those layers have run backward.
As it is, gradients arrive group by group, in time for DDP to send them while earlier layers still run.

A layer takes what a group made only where quantizing alone, there and then, would give the same value *and* the same
graph (:meth:`Scope.find`): not after an update, for instance, nor in a checkpointed region, be it in its forward or in
its recomputation. Modules called in such a region open scopes of their own; so does an FSDP unit, whose weights are
whole only while it runs. Two things are left to the caller: weights that are changed through ``.data`` between two
layers of one call are not seen; and a weight that is changed in place between the first layer of its group and the
backward pass fails that pass, as autograd then says, even where its own layer runs after the change.

Only the General Quantizer's weights form groups; other methods' are quantized one by one. Under ``torch.compile`` there
are no scopes, and weights are quantized one by one: what is ready would be told apart by
the identity of tensors and modules, which a compiled graph, shared by modules of one structure, does not check.

Scopes also tell modules that compute with another's ``weight`` without calling it, who are to find it quantized, from
all else that reads a weight (:func:`read`).
"""

import sys
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gq_triton.quantizer import Quantizer, WeightQuantizer, quantize_group

GROUP_BYTES = 25 << 20  # DDP's default bucket: the gradients of a group fill one

_SUFFIX = "_quantizer"  # a quantizer is named after the weight beside it


def regroup(model: nn.Module) -> None:
    """Has every module of ``model`` that holds quantizers open a scope when it is called, and no other one.

    A layer that has a single quantizer and reads its weight by :func:`quantized` alone has no use for one.
    """
    for module in model.modules():
        _remove_hooks(module)
        count = sum(isinstance(child, Quantizer) for child in module.modules())
        if count > 1 or (count == 1 and getattr(module, "may_read", not isinstance(module, Quantizer))):
            module.register_forward_pre_hook(open_scope)
            module.register_forward_hook(close_scope, always_call=True)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (open_scope, close_scope)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def quantized(layer: nn.Module, name: str, autocast: bool = True) -> Tensor:
    """Returns weight ``name`` of ``layer``, quantized in a group where there is one, else alone.

    Under autocast, layers whose weights it would cast get them in its dtype at once, unless ``autocast`` is False.
    """
    weight, quantizer = _plain(layer, name), getattr(layer, name + _SUFFIX)
    weight = getattr(layer, name) if weight is None else weight
    dtype = _autocast_dtype(layer, quantizer, weight) if autocast else None
    groups = isinstance(quantizer, WeightQuantizer)
    if not groups or is_compiling() or not _thread.scopes or not _may_join(quantizer, weight):
        return quantizer(weight, dtype)
    ready = _thread.scopes[-1].find(quantizer, weight, dtype)
    return quantizer(weight, dtype) if ready is None else quantizer.remember(weight, ready)


def read(layer: nn.Module, name: str) -> Tensor | None:
    """Returns weight ``name`` of ``layer`` to whoever reads it as an attribute.

    While a module is called, or recomputed in a backward pass, that is the quantized weight. It is the trained one to
    all others, such as optimizers, and to those that turned gradients off within a call, such as hooks that change it.
    """
    weight = _plain(layer, name)
    if weight is None and name not in layer._parameters:
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {name!r}")
    if weight is None or name + _SUFFIX not in layer._modules:
        return weight
    return quantized(layer, name, autocast=False) if _computes() else weight


def _computes() -> bool:
    if is_compiling():
        return True
    if _thread.scopes:
        return _thread.scopes[-1].records == torch.is_grad_enabled()
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


# --- hooks: plain functions, so that modules that have them can be copied and pickled


def open_scope(module: nn.Module, args: Any) -> None:
    """Forward pre-hook: opens a scope, unless the one that is open covers ``module``."""
    if is_compiling():
        return
    close_scope(module)  # left open if an interrupt, such as Ctrl-C, ended the last call
    scopes = _thread.scopes
    if not scopes or not scopes[-1].covers(module):
        scopes.append(Scope(module))


def close_scope(module: nn.Module, args: Any = None, output: Any = None) -> None:
    """Forward hook, run after exceptions too: undoes :func:`open_scope`."""
    if is_compiling():
        return
    for index, scope in enumerate(_thread.scopes):
        if scope.module is module:
            del _thread.scopes[index:]
            return


class _Thread(threading.local):
    """The scopes that are open in a thread, outermost first."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_thread = _Thread()


# --- scopes


class Scope:
    """What is quantized while ``module`` is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.records = torch.is_grad_enabled()
        self._state = _autograd_state()
        self._modules = _unit(module)
        self._members: dict[WeightQuantizer, Member] | None = None

    def covers(self, module: nn.Module) -> bool:
        """Whether layers below ``module`` can use this scope now."""
        return module in self._modules and self._state == _autograd_state()

    def find(self, quantizer: WeightQuantizer, weight: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """Returns the quantized ``weight``, in its dtype or in ``dtype``, or None if it must be quantized alone.

        It can be used where ``weight`` is the same tensor and has, as its quantizer, not changed since; where autograd
        records alike and saves tensors in the same place; and where no backward pass has used it up.
        """
        if self._state != _autograd_state():
            return None
        member = self._grouped().get(quantizer)
        if member is None or member.weight is not weight:
            return None
        member.group.make()
        if member.quantized is not None and member.stamp != _stamp(quantizer, weight):
            member.group.forget()
        quantized = member.quantized
        if not torch.is_grad_enabled():
            member.quantized = None  # no graph holds it: a second reader is no reason to keep a whole quantized model
        return quantized if quantized is not None and quantized.dtype in (weight.dtype, dtype) else None

    def _grouped(self) -> "dict[WeightQuantizer, Member]":
        if self._members is None:
            self._members = _members(self._modules)
            groups: dict[Hashable, Group] = {}
            for member in self._members.values():
                key = member.key()
                if key not in groups or groups[key].bytes + member.weight.nbytes > GROUP_BYTES:
                    groups[key] = Group(key)
                groups[key].add(member)
        return self._members


class Member:
    """A weight in a group: its quantizer, the dtype wanted, what came of it, and what that was made from."""

    group: "Group"
    sources: list[Tensor]  # held, so that the stamp tells them from others by id()
    stamp: Hashable

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, dtype: torch.dtype | None) -> None:
        self.quantizer, self.weight, self.dtype = quantizer, weight, dtype
        self.quantized: Tensor | None = None

    def key(self) -> Hashable:
        """What the members of one group have in common."""
        quantizer, weight = self.quantizer, self.weight
        trained = [tensor.requires_grad for tensor in _sources(quantizer, weight)]
        modes = quantizer.training, quantizer.learn_tables, *trained
        return id(quantizer.config), weight.dtype, weight.device, self.dtype, modes

    def take(self, quantized: Tensor) -> None:
        self.quantized = quantized
        self.sources = _sources(self.quantizer, self.weight)
        self.stamp = _stamp(self.quantizer, self.weight)


class Group:
    """Weights that are quantized together, once; ``key`` is what their members have in common."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.members: list[Member] = []
        self.bytes = 0
        self._made = False

    def add(self, member: Member) -> None:
        self.members.append(member)
        self.bytes += member.weight.nbytes
        member.group = self

    def make(self) -> None:
        """Quantizes the members, if that is still to be done."""
        if self._made:
            return
        self._made = True
        members = [member for member in self.members if member.key() == self.key]  # others were changed meanwhile
        if not members:
            return
        quantizers, weights = [member.quantizer for member in members], [member.weight for member in members]
        values = quantize_group(quantizers, weights, members[0].dtype)
        for member, value in zip(members, values, strict=True):
            member.take(value)
        if values[0].grad_fn is not None:
            values[0].grad_fn.register_prehook(_forgetting(weakref.ref(self)))

    def forget(self) -> None:
        for member in self.members:
            member.quantized = None


def _forgetting(group: "weakref.ref[Group]") -> Callable[[Any], None]:
    """Returns a hook for a backward pass within the call: it frees the graph, on which later layers must not build."""

    def hook(grads: Any) -> None:
        if (target := group()) is not None:
            target.forget()

    return hook


def _members(modules: dict[nn.Module, None]) -> dict[WeightQuantizer, Member]:
    """Returns the weights that are to be quantized now, in module order, one for each quantizer.

    Weights that are computed, and those of layers with forward pre-hooks of others, which may set or change them, are
    left out: they are not known before the layer itself runs.
    """
    members: dict[WeightQuantizer, Member] = {}
    for layer in modules:
        if any(hook is not open_scope for hook in layer._forward_pre_hooks.values()):
            continue
        for name, child in layer._modules.items():
            if not isinstance(child, WeightQuantizer) or child not in modules:
                continue
            weight = _plain(layer, name.removesuffix(_SUFFIX))
            if weight is None:
                continue
            dtype = _autocast_dtype(layer, child, weight)
            if child in members:  # shared; a layer that autocast leaves alone has the last word
                members[child].dtype = members[child].dtype and dtype
            elif _may_join(child, weight):
                members[child] = Member(child, weight, dtype)
    return members


def _plain(layer: nn.Module, name: str) -> Tensor | None:
    """Returns a weight that is a parameter, or the tensor that FSDP has in its place; None for a parametrized one."""
    weight = layer._parameters.get(name)
    return vars(layer).get(name) if weight is None else weight


def _may_join(quantizer: WeightQuantizer, weight: Tensor) -> bool:
    """Whether the weight is quantized afresh now, and its changes can be told by versions."""
    return not any(tensor.is_inference() for tensor in _sources(quantizer, weight)) and quantizer.due(weight)


def _sources(quantizer: WeightQuantizer, weight: Tensor) -> list[Tensor]:
    """What the quantized weight is computed from."""
    return [weight, *quantizer._parameters.values(), *quantizer._buffers.values()]


def _stamp(quantizer: WeightQuantizer, weight: Tensor) -> Hashable:
    """Changes whenever the quantized weight, or its graph, might, and where another CUDA stream would have to wait."""
    tensors = [(id(tensor), tensor._version, tensor.requires_grad) for tensor in _sources(quantizer, weight)]
    return quantizer.training, quantizer.learn_tables, _stream(weight), *tensors


def _stream(tensor: Tensor) -> int | None:
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else None


def _unit(module: nn.Module) -> dict[nn.Module, None]:
    """Returns the modules below and including ``module``, in order, without the FSDP units among them."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # a program that does not import it has no such units
    units = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    found: dict[nn.Module, None] = {}

    def visit(current: nn.Module) -> None:
        found[current] = None
        for child in current._modules.values():
            if child is not None and child not in found and not isinstance(child, units):
                visit(child)

    visit(module)
    return found


def _autograd_state() -> Hashable:
    """What autograd would do with an operation now. Checkpointed regions differ in it from what is around them."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),  # pushed by checkpointing that is not reentrant
        torch._C._functorch.maybe_current_level(),  # of torch.func.grad and the like
        torch._C._current_graph_task_id(),  # the backward pass that runs, as a reentrant recomputation is part of one
    )


def _autocast_dtype(layer: nn.Module, quantizer: Quantizer, weight: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast would cast the quantized weight, or None if it would not."""
    device = weight.device.type
    if not layer.autocasts or weight.dtype != torch.float32 or weight.is_meta:
        return None
    if quantizer.reuses or not torch.is_autocast_enabled(device):  # what is used again may be so without autocast
        return None
    return torch.get_autocast_dtype(device)
