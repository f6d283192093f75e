"""Prepared models under DDP and FSDP: two processes take the steps of one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gq_triton as gq

PROCESS = Path(__file__).with_name("distributed_process.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def trained(folder, kind, *launcher):
    output = folder / f"{kind}.pt"
    path = os.pathsep.join(str(folder) for folder in (PROCESS.parent, PROCESS.parent.parent))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *launcher, str(PROCESS), kind, str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("alone"), "alone")


@pytest.mark.parametrize("kind", ["ddp", "fsdp", pytest.param("fsdp1", marks=pytest.mark.full)])
def test_two_processes_take_the_steps_of_one(tmp_path, alone, kind):
    together = trained(tmp_path, kind, *TORCHRUN)
    names = ["logits"] if kind == "fsdp1" else [name for name in alone if name != "launches"]
    for name in names:
        torch.testing.assert_close(
            together[name], alone[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    # Groups of bounded size, or one for each of the three FSDP units and one for the rest.
    assert together["launches"] == (3 if kind == "ddp" else 4)


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_quantizers_that_fsdp_casts_are_refused(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = gq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), gq.GQConfig())
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"must be float32; got torch.bfloat16.*param_dtype None.*torch.autocast"):
        model(torch.randn(2, 4))


def test_fsdp_under_autocast(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = gq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), gq.GQConfig())
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 4))
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert all(parameter.grad.full_tensor().isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_may_be_a_unit_of_its_own(mesh, kind):
    from torch.distributed.fsdp import fully_shard

    model = gq.quantize_(nn.Sequential(kind(5, 4), nn.Identity()), gq.GQConfig(bits=2))
    sharded = copy.deepcopy(model)
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(6, 3, 5)
    for _ in range(2):  # its weights are other tensors in every step, and must be quantized all the same
        outputs = [network(x)[0] for network in (model, sharded)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            output.square().sum().backward()
        with torch.no_grad():
            for parameter in (*model.parameters(), *sharded.parameters()):
                parameter.sub_(0.1 * parameter.grad)
                parameter.grad = None
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), model.get_parameter(name))
