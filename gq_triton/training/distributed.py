"""Several training processes, as `torchrun` starts them; every function is a no-op with one process.

Two ways to share the work: distributed data parallel (DDP), where each process has all of the model, and fully sharded
data parallel (FSDP2; Zhao et al., arXiv 2304.11277), where each keeps a share of its parameters, their gradients and
what the optimizer knows of them.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "PARALLEL",
    "barrier",
    "distribute",
    "gathered",
    "is_main",
    "placed_like",
    "process_group",
    "rank",
    "synchronizing",
    "training_device",
    "unwrapped",
    "whole",
    "world_size",
]

PARALLEL = ("ddp", "fsdp")
PATIENCE = timedelta(hours=2)  # of the processes that wait while the first one evaluates


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def training_device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started (NCCL with GPUs, else Gloo); outside torchrun does nothing."""
    if "RANK" not in os.environ:
        yield
        return
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- networks ---------------------------------------------------------------------------------------------------------


def distribute(network: nn.Module, device: torch.device, parallel: str, *, partly_used: bool) -> nn.Module:
    """What to call in the place of ``network`` to train it with the other processes, from the first one's weights.

    Args:
        network: moved to ``device`` but for "fsdp", where a sharded copy is trained.
        device: this process's.
        parallel: one of :data:`PARALLEL`.
        partly_used: whether some parameters may have no part in a loss.

    Raises:
        ValueError: an unknown ``parallel``, or "fsdp" for a network that may be used partly.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel is {parallel!r}; allowed: {', '.join(PARALLEL)}")
    if world_size() == 1:
        return network.to(device)
    if parallel == "fsdp":
        if partly_used:
            raise ValueError("parallel is 'fsdp', which needs all weights at every step; a bifocal model needs 'ddp'")
        return _fully_sharded(network, device)
    network.to(device)
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        network, device_ids=devices, broadcast_buffers=False, find_unused_parameters=partly_used
    )


def _fully_sharded(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy of which each process has a share, gathered layer by layer as they are computed with."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Recurrent layers and Conformer blocks return views; nothing here changes them in place, which is what it warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    network = copy.deepcopy(network).to(device)
    for tensor in (*network.parameters(), *network.buffers()):
        dist.broadcast(tensor.detach(), src=0)
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in _layers(network):
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def _layers(network: nn.Module) -> list[nn.Module]:
    """The members of module lists that have matrices: LSTM layers and Conformer blocks, but not norms."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    members = [member for each in lists for member in each]
    return [member for member in members if any(parameter.dim() > 1 for parameter in member.parameters())]


def unwrapped(network: nn.Module) -> nn.Module:
    """What :func:`distribute` made ready for training."""
    return network.module if isinstance(network, DistributedDataParallel) else network


@contextmanager
def synchronizing(network: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward pass of one of the micro-batches of a step: processes exchange gradients in the ``last``."""
    if isinstance(network, DistributedDataParallel):
        with nullcontext() if last else network.no_sync():
            yield
        return
    if hasattr(network, "set_requires_gradient_sync"):  # of FSDP
        network.set_requires_gradient_sync(last)
    yield


# --- tensors that FSDP has sharded ------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which FSDP may have given this process a share; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, whole and on the CPU, in the first process, and none in the others; every process must ask."""
    result = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if is_main():
            result[name] = full.cpu()
    return result


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor on the device of ``other``; this process's share of it where ``other``, of that shape, is one."""
    tensor = tensor.to(other.device)
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
