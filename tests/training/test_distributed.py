"""Sharing of work, by process groups of one; test_processes.py has several."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gq_triton.training import distributed
from gq_triton.training.distributed import distribute, gathered, placed_like, synchronizing, unwrapped, whole

CPU = torch.device("cpu")


@pytest.fixture
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(group):
    from torch.distributed.fsdp import fully_shard

    network = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    return fully_shard(network, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_shares_with_nobody(parallel):
    network = nn.Linear(3, 2)
    assert distribute(network, CPU, parallel, partly_used=False) is network
    assert unwrapped(network) is network
    with synchronizing(network, last=False):
        network(torch.ones(3)).sum().backward()


def test_ways_to_share_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="parallel is 'dp'; allowed: ddp, fsdp"):
        distribute(nn.Linear(3, 2), CPU, "dp", partly_used=False)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="parallel is 'fsdp', which needs all weights .* a bifocal model needs 'ddp'"):
        distribute(nn.Linear(3, 2), CPU, "fsdp", partly_used=True)


def test_gradients_are_exchanged_with_the_last_micro_batch_only(group):
    network, exchanged = DistributedDataParallel(nn.Linear(3, 2)), []

    def hook(state, bucket):
        exchanged.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    network.register_comm_hook(None, hook)
    for last in (False, False, True):
        assert not exchanged
        with synchronizing(network, last):
            network(torch.ones(3)).sum().backward()
    assert exchanged == [0]
    torch.testing.assert_close(unwrapped(network).weight.grad, torch.full((2, 3), 3.0))


def test_shards_are_reduced_with_the_last_micro_batch_only(sharded):
    for last in (False, False, True):
        assert all(parameter.grad is None for parameter in sharded.parameters())
        with synchronizing(sharded, last):
            sharded(torch.ones(2, 3)).sum().backward()
    torch.testing.assert_close(whole(sharded[1].bias.grad), torch.full((2,), 6.0))


def test_tensors_are_gathered_and_shared_out_again(sharded):
    tensors = sharded.state_dict()
    full = gathered(tensors)
    assert {name: tensor.shape for name, tensor in full.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    for name, tensor in tensors.items():
        again = placed_like(full[name], tensor)
        assert type(again) is type(tensor) and again.placements == tensor.placements
        assert torch.equal(whole(again), full[name])
    step = torch.tensor(3.0)
    assert placed_like(step, tensors["0.weight"]) is step  # of the optimizer, and no share of anything


def test_only_the_first_process_keeps_what_is_gathered(monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert gathered({"weight": torch.ones(2)}) == {}
