"""Trains a small prepared model for some steps, alone or under torchrun: `distributed_process.py KIND OUTPUT`.

Writes the model's state after the last step, its outputs, and how many operations quantized it for them. Only the
latter may depend on the number of processes.
"""

import os
import sys

import torch
from quantized import Operations
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gq_triton as gq
from gq_triton import grouping

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, MICRO_BATCHES, BATCH = 4, 2, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.unused = nn.Linear(6, 6)
        self.output = nn.Linear(6, 9)

    def forward(self, index):
        x = self.embedding(index)
        x = self.blocks[0](x)
        x = checkpoint(self.blocks[1], x, use_reentrant=False)
        return self.output(self.blocks[2](x)).clone()


def distributed(model, kind):
    if PROCESSES == 1:
        return model
    dist.init_process_group("gloo")
    if kind == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "fsdp1":
        cpu = torch.device("cpu")
        for index, block in enumerate(model.blocks):
            model.blocks[index] = FullyShardedDataParallel(block, device_id=cpu, use_orig_params=True)
        return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(kind, output):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    grouping.GROUP_BYTES = 4 * 150  # a block and a half
    model = gq.quantize_(Model(), gq.GQConfig(bits=3, learn_mu=True, centroid_interval=2))
    network = distributed(model, kind)
    annealer = gq.Annealer(model, STEPS)
    optimizer = torch.optim.SGD(gq.param_groups(model, lr=0.1, weight_decay=0.0))
    for _ in range(STEPS):
        for index in torch.randint(9, (MICRO_BATCHES, BATCH, 5)):
            network(index[RANK::PROCESSES]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        annealer.step()
    with torch.no_grad(), Operations() as operations:
        logits = network.eval()(torch.arange(9)[None])
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if RANK == 0:
        launches = torch.tensor(operations.counts["fake_quantize"])
        torch.save({**state, "logits": logits, "launches": launches}, output)
    if PROCESSES > 1:
        dist.barrier()  # a process that goes while the other still talks to it may be aborted
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
