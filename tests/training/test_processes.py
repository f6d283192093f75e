"""Training in processes of its own: killed and resumed, and several together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gq_triton.files import load_tensors, read_state
from gq_triton.training.log import read_metrics

PROCESS = str(Path(__file__).with_name("training_process.py"))
ROOT = Path(__file__).resolve().parents[2]


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, PROCESS, *arguments]
    path = os.pathsep.join(str(folder) for folder in (ROOT / "tests", ROOT))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(30000):
        if path.is_file() or process.poll() is not None:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_a_run_killed_by_the_system_resumes_exactly(tmp_path, kind):
    settings = ("epochs=10", "checkpoint_every=3", "evaluate_every=100", "log_every=1")
    whole = start(str(tmp_path / "whole"), kind, *settings)
    killed = start(str(tmp_path / "killed"), kind, *settings)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    wait_for(checkpoint, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    step = read_state(checkpoint)["step"]
    assert 0 < step < 40

    printed = finish(start(str(tmp_path / "killed"), kind, *settings))
    assert f"going on from step {step} of 40" in printed
    finish(whole)
    expected, state = load_tensors(tmp_path / "whole" / "checkpoint.safetensors")
    resumed, resumed_state = load_tensors(checkpoint)
    assert state == resumed_state
    assert state["step"] == 40
    assert resumed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
    assert read_metrics(tmp_path / "whole" / "metrics.csv") == read_metrics(tmp_path / "killed" / "metrics.csv")
    assert not list(checkpoint.parent.glob("*.tmp*"))


@pytest.mark.parametrize("kind", ["float", "quantized", "bifocal"])
def test_two_processes_take_the_steps_of_one(tmp_path, kind):
    # 14 utterances in batches of 4 or 3: the two processes' shares differ in size.
    settings = ("epochs=1", "freq_masks=0", "time_masks=0", "wake_share=0", "log_every=1")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    alone = start(str(tmp_path / "alone"), kind, *settings)
    finish(start(str(tmp_path / "together"), kind, *settings, launcher=torchrun))
    finish(alone)
    expected, _ = load_tensors(tmp_path / "alone" / "checkpoint.safetensors")
    found, _ = load_tensors(tmp_path / "together" / "checkpoint.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
