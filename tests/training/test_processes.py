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

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
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
    whole = start(str(tmp_path / "whole"), kind, "ddp", *settings)
    killed = start(str(tmp_path / "killed"), kind, "ddp", *settings)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    wait_for(checkpoint, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    step = read_state(checkpoint)["step"]
    assert 0 < step < 40

    printed = finish(start(str(tmp_path / "killed"), kind, "ddp", *settings))
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


# Batches of 7 or of 4 and 3 utterances: the shares of two processes differ, and so do their micro-batches.
STILL = ("epochs=1", "freq_masks=0", "time_masks=0", "wake_share=0", "log_every=1")
SHARED = {
    "float": ("float", "ddp", ()),
    "quantized": ("quantized", "ddp", ("batch_size=7", "accumulate=2", "average_decay=0.5")),
    "bifocal": ("bifocal", "ddp", ()),
    "sharded": ("quantized", "fsdp", ("batch_size=7", "accumulate=2", "average_decay=0.5")),
    "sharded-conformer": ("conformer", "fsdp", ("batch_seconds=5", "learning_rate=1e-3")),
}
RESUMED = ("epochs=2", "checkpoint_every=3", "log_every=1", "average_decay=0.5", "evaluate_every=1")
WAKES = ("epochs=4", "batch_size=7", "accumulate=2", "wake_share=0.15")  # few: not in every last micro-batch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of runs: of one process alone, and of two together. The processes that take the runs are few."""
    folders = [tmp_path_factory.mktemp(name) for name in ("alone", "together")]
    lists: tuple[list[str], list[str]] = ([], [])
    for name, (kind, parallel, settings) in SHARED.items():
        alone = [setting for setting in settings if "accumulate" not in setting]
        lists[0].extend(("--", str(folders[0] / name), kind, "ddp", *STILL, *alone))
        lists[1].extend(("--", str(folders[1] / name), kind, parallel, *STILL, *settings))
    for parallel in ("ddp", "fsdp"):
        whole, broken = (str(folders[1] / f"{run}-{parallel}") for run in ("whole", "broken"))
        lists[1].extend(("--", whole, "quantized", parallel, *RESUMED))
        lists[1].extend(("--", broken, "quantized", parallel, *RESUMED, "stop=5"))
        lists[1].extend(("--", broken, "quantized", parallel, *RESUMED))
    lists[1].extend(("--", str(folders[1] / "both"), "quantized", "fsdp", *RESUMED, "stop=5"))
    lists[1].extend(("--", str(folders[1] / "both"), "quantized", "ddp", *RESUMED))
    lists[1].extend(("--", str(folders[1] / "wakes"), "bifocal", "ddp", *WAKES))
    processes = start(*lists[0]), start(*lists[1], launcher=TORCHRUN)
    for process in processes:
        finish(process)
    return folders


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            other[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_take_the_steps_of_one(folders, name):
    alone, together = (folder / name for folder in folders)
    assert_close(*(load_tensors(folder / "checkpoint.safetensors")[0] for folder in (alone, together)))
    assert_close(*(torch.load(folder / "model-0.pt") for folder in (alone, together)))
    rows = [[row for row in read_metrics(folder / "metrics.csv") if row[1] != "loss"] for folder in (alone, together)]
    assert {"norm", "gradient_norm"} <= {name for _, name, _ in rows[0]}  # and the loss is one process's share
    assert rows[1] == [(step, name, pytest.approx(value, rel=1e-3)) for step, name, value in rows[0]]


@pytest.mark.parametrize("name", [*SHARED, "wakes"])
def test_all_processes_end_with_the_same_model(folders, name):
    assert_equal(*(torch.load(folders[1] / name / f"model-{rank}.pt") for rank in (0, 1)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_resume_exactly(folders, parallel):
    whole, broken = (folders[1] / f"{run}-{parallel}" for run in ("whole", "broken"))
    (expected, state), (found, found_state) = (load_tensors(run / "checkpoint.safetensors") for run in (whole, broken))
    assert state == found_state
    assert state["step"] == 8
    assert_equal(expected, found)
    assert_equal(*(torch.load(run / "model-0.pt") for run in (whole, broken)))
    assert read_metrics(whole / "metrics.csv") == read_metrics(broken / "metrics.csv")


def test_a_run_may_go_on_with_its_work_shared_in_another_way(folders):
    whole, both = (load_tensors(folders[1] / run / "checkpoint.safetensors") for run in ("whole-ddp", "both"))
    assert both[1] == whole[1]
    assert_close(whole[0], both[0])
