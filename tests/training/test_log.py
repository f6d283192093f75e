import subprocess
import sys

import pytest

from gq_triton.training.log import MetricLog, read_metrics


def test_rows_are_appended_and_read_back(tmp_path):
    log = MetricLog(tmp_path / "run")
    log.write(0, {"loss": 2.5, "learning_rate": 1e-3})
    log.write(10, {"loss": 1.25})
    log.close()
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0] == "step,name,value"
    assert read_metrics(tmp_path / "run" / "metrics.csv") == [
        (0, "loss", 2.5),
        (0, "learning_rate", 1e-3),
        (10, "loss", 1.25),
    ]


def test_a_resumed_log_drops_what_its_checkpoint_did_not_reach(tmp_path):
    log = MetricLog(tmp_path)
    for step in (0, 10, 20):
        log.write(step, {"loss": float(step)})
    log.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("25,lo")  # the process was killed in the middle of a line
    log = MetricLog(tmp_path, step=20)
    log.write(20, {"loss": 99.0})
    log.close()
    assert read_metrics(tmp_path / "metrics.csv") == [(0, "loss", 0.0), (10, "loss", 10.0), (20, "loss", 99.0)]


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricLog(tmp_path, tensorboard=True)
    log.write(3, {"loss": 2.0})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(3, 2.0)]


def test_a_missing_tensorboard_is_named(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None\n"
        "from pathlib import Path\n"
        "from gq_triton.training.log import MetricLog\n"
        f"MetricLog(Path({str(tmp_path)!r}), tensorboard=True)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "pip install tensorboard" in run.stderr
