import gc
import json
import subprocess
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import harness
import pytest
import torch
from harness import Contender, Mode, Record, Timing, Unavailable, Wrong, measure

CPU = torch.device("cpu")
QUICK = Timing(seconds=0.001, least=2, most=5)
CLEAN = {"device": "some processor", "driver": None, "versions": {"torch": "2.13"}, "commit": "0123abc"}


@pytest.fixture
def clean(monkeypatch):
    """A clean checkout on a known machine."""
    monkeypatch.setattr(harness, "environment", lambda: dict(CLEAN))


def calls(log, name):
    return lambda: Contender(lambda: lambda: log.append(name))


def failing(error):
    def fail():
        raise error

    return fail


# --- measuring


def test_quantiles_of_samples():
    summary = harness.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert summary == pytest.approx({"median": 3.0, "p10": 1.4, "p90": 4.6, "least": 1.0, "samples": 5})


def test_a_sample_is_the_time_of_the_call_without_its_preparation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    def prepare():
        pass_time(7.0)
        return lambda: pass_time(0.002)

    assert harness.Clock(CPU).sample(prepare)() == pytest.approx(2.0)


def test_a_sample_of_several_calls_tells_the_time_of_one(monkeypatch):
    now, prepared = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.002

    def prepare():
        prepared.append(1)
        return call

    mode = Mode(calls=5)
    assert harness.Clock(CPU, mode).sample(harness._repeated(prepare, mode))() == pytest.approx(2.0)
    assert now[0] == pytest.approx(0.01)
    assert len(prepared) == 1


def test_calls_of_a_sample_are_counted_in_its_time(monkeypatch):
    monkeypatch.setattr(harness.Clock, "_host_sample", staticmethod(lambda call, calls: call() or (lambda: 20.0)))
    log = []
    timing = Timing(seconds=1.0, most=1000)
    results = measure({"A": calls(log, "A")}, timing, CPU, Mode(calls=5))
    assert results["A"]["ms"]["samples"] == 10  # of 5 * 20 ms
    assert len(log) == 1 + 5 * (2 + 10)  # memory, estimates, samples


def test_a_graph_without_a_gpu_is_recorded_as_absent():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    results = measure({"A": calls([], "A")}, QUICK, CPU, Mode(graph=True))
    assert results["A"].keys() == {"absent"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("flush", [False, True])
def test_a_graph_makes_all_calls_of_a_sample(flush):
    device, mode = torch.device("cuda"), Mode(flush, calls=5, graph=True)
    counter = torch.zeros(1, device=device)
    replay = harness._repeated(lambda: partial(counter.add_, 1), mode)
    assert counter.item() == 0  # captured, not run
    assert harness.Clock(device, mode).sample(replay)() > 0
    assert counter.item() == (5 if flush else 10)  # one replay fills the cache


def test_a_graph_keeps_the_tensors_that_it_reads(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    tensor = torch.ones(3)
    kept, replay = weakref.ref(tensor), harness._captured(partial(torch.neg, tensor), 2)
    del tensor
    gc.collect()
    replay()
    assert kept() is not None


@pytest.mark.parametrize("milliseconds, count", [(1e-9, 100), (20.0, 50), (600.0, 3)])
def test_number_of_samples_fills_the_time_within_limits(milliseconds, count):
    assert harness._sample_count(milliseconds, Timing(seconds=1.0, least=3, most=100)) == count


def test_contenders_take_turns():
    log = []
    clock, prepare = harness.Clock(CPU), {name: calls(log, name)().prepare for name in "AB"}
    samples = harness._take_turns(prepare, {"A": 3, "B": 3}, clock, {"A": {}, "B": {}})
    assert log == ["A", "B"] * 3
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 3, "B": 3}


def test_slow_contenders_sit_out_turns_evenly():
    log = []
    running = {name: calls(log, name)().prepare for name in ("fast", "slow")}
    harness._take_turns(running, {"fast": 6, "slow": 2}, harness.Clock(CPU), {"fast": {}, "slow": {}})
    assert log == ["fast", "fast", "fast", "slow"] * 2


def test_results_have_times_and_memory():
    results = measure({"ones": lambda: Contender(lambda: lambda: torch.ones(1000))}, QUICK, CPU)
    assert results["ones"]["peak_bytes"] == 4000
    assert 2 <= results["ones"]["ms"]["samples"] <= 5
    assert 0 < results["ones"]["ms"]["least"] <= results["ones"]["ms"]["median"]


@pytest.mark.parametrize(
    "error, reason",
    [
        (Unavailable("not installed"), "not installed"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), "OutOfMemoryError: CUDA out of memory."),
        (KeyError(), "KeyError: no message"),
    ],
)
@pytest.mark.parametrize("stage", ["make", "check", "prepare", "call"])
def test_a_contender_that_fails_is_recorded_as_absent_and_the_others_are_timed(error, reason, stage):
    fail = failing(error)
    makers = {
        "make": fail,
        "check": lambda: Contender(lambda: lambda: None, fail),
        "prepare": lambda: Contender(fail),
        "call": lambda: Contender(lambda: fail),
    }
    results = measure({"bad": makers[stage], "good": calls([], "good")}, QUICK, CPU)
    assert results["bad"] == {"absent": reason}
    assert "ms" in results["good"]


def test_a_contender_that_fails_late_is_recorded_as_absent():
    left = [4]  # one call for the memory and two for the estimate succeed, and one sample

    def call():
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("late")

    results = measure({"late": lambda: Contender(lambda: call), "good": calls([], "good")}, QUICK, CPU)
    assert results["late"] == {"absent": "RuntimeError: late"}
    assert results["good"]["ms"]["samples"] >= 2


def test_a_wrong_contender_is_not_timed():
    log = []
    wrong = Contender(lambda: lambda: log.append("timed"), failing(Wrong("off by 3")))
    results = measure({"wrong": lambda: wrong}, QUICK, CPU)
    assert results == {"wrong": {"wrong": "off by 3"}}
    assert log == []


def test_an_interrupt_ends_the_run():
    with pytest.raises(KeyboardInterrupt):
        measure({"any": failing(KeyboardInterrupt())}, QUICK, CPU)


def test_peak_memory_is_that_of_what_lives_at_the_same_time(device):
    kept = torch.ones(1 << 20, device=device)

    def call():
        first = kept + 1
        second = first * 2
        del first
        return second + 1

    assert harness.peak_bytes(call, device) == pytest.approx(2 * harness.tensor_bytes(kept), rel=1e-4)


def test_peak_memory_counts_what_operators_allocate_inside():
    # softmax of a transposed tensor makes a contiguous copy of it before its result
    x = torch.ones(512, 512).t()
    assert harness.peak_bytes(lambda: torch.softmax(x, -1), CPU) == pytest.approx(2 * harness.tensor_bytes(x), rel=0.01)


def test_memory_that_does_not_fit_is_counted_not_tried(device):
    harness.require_memory(1 << 10, "a little", device)
    with pytest.raises(Unavailable, match=r"all of it takes 1048576\.0 GiB, and .* GiB are free"):
        harness.require_memory(1 << 50, "all of it", device)


def test_ceilings(device):
    found = harness.ceilings(device)
    assert found["copy_bytes"] == 2 * 4 << (28 if device.type == "cuda" else 24)
    assert found["copy_gb_per_s"] > 0.1
    assert 0 < found["operation_ms"] < 100


def test_peak_rates_of_products(device, monkeypatch):
    monkeypatch.setitem(harness.MATMUL_SIZE, device.type, 64)
    found = harness.matmul_ceilings(device)
    assert found["matmul_size"] == 64
    assert found["matmul_tops"].keys() >= {"float32", "bfloat16", "int8"}
    assert all(0 < rate < 100 for rate in found["matmul_tops"].values())


def test_a_peak_rate_is_operations_over_time(monkeypatch):
    taken = {"float32": {"ms": {"median": 2.0}}, "int8": {"absent": "not here"}}
    monkeypatch.setattr(harness, "measure", lambda *arguments: taken)
    assert harness.matmul_ceilings(CPU)["matmul_tops"] == {"float32": pytest.approx(2 * 1024**3 / 0.002 / 1e12)}


def test_environment_names_device_versions_and_commit():
    found = harness.environment()
    assert found.keys() == CLEAN.keys()
    assert found["versions"]["torch"] == torch.__version__
    assert "torchao" in found["versions"]


def test_what_is_seen_of_a_gpu(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="1980 MHz\n")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="0123-abcd"))
    monkeypatch.setattr(subprocess, "run", run)
    assert harness.seen()["clocks"] == {"sm": "1980 MHz", "memory": "1980 MHz", "sm_limit": "1980 MHz"}
    assert all("--id=GPU-0123-abcd" in command for command in asked)


def test_slug():
    assert harness.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert harness.slug("Intel(R) Xeon(R), 2 threads") == "intel-r-xeon-r-2-threads"


# --- records

TIMED = {"ms": {"median": 1.0}}


def read(path):
    return json.loads(path.read_text())


def test_a_killed_run_goes_on(tmp_path, clean):
    cases = [{"bits": bits} for bits in (1, 2, 3)]
    killed = Record("bench", {"seconds": (1, 2)}, tmp_path)
    for case in list(killed.missing(cases))[:2]:
        killed.add(case, {"A": TIMED | case})
    resumed = Record("bench", {"seconds": (1, 2)}, tmp_path)
    assert list(resumed.missing(cases)) == [{"bits": 3}]
    resumed.add({"bits": 3}, {"A": TIMED})
    path = resumed.finish()
    assert [entry["case"]["bits"] for entry in read(path)["cases"]] == [1, 2, 3]
    assert read(path)["cases"][0]["results"] == {"A": TIMED | {"bits": 1}}
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_a_finished_record_is_kept_until_the_next_run_has_finished(tmp_path, clean):
    Record("bench", {}, tmp_path).finish()
    again = Record("bench", {}, tmp_path)
    again.add({"bits": 1}, {"A": TIMED})
    assert read(tmp_path / "bench.json")["cases"] == []
    again.finish()
    assert len(read(tmp_path / "bench.json")["cases"]) == 1


@pytest.mark.parametrize(
    "environment, settings",
    [
        (CLEAN, {"seconds": 2}),
        (CLEAN | {"device": "another"}, {"seconds": 1}),
        (CLEAN | {"versions": {"torch": "2.14"}}, {"seconds": 1}),
        (CLEAN | {"commit": "4567def"}, {"seconds": 1}),
        (CLEAN | {"commit": "0123abc+changes"}, {"seconds": 1}),
        (CLEAN | {"commit": None}, {"seconds": 1}),
    ],
    ids=["settings", "device", "versions", "commit", "changes", "no checkout"],
)
def test_a_run_under_other_conditions_starts_anew(tmp_path, clean, monkeypatch, environment, settings):
    Record("bench", {"seconds": 1}, tmp_path).add({"bits": 1}, {"A": TIMED})
    monkeypatch.setattr(harness, "environment", lambda: environment)
    assert list(Record("bench", settings, tmp_path).missing([{"bits": 1}])) == [{"bits": 1}]


def test_changes_that_have_no_name_are_never_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "environment", lambda: CLEAN | {"commit": "0123abc+changes"})
    Record("bench", {}, tmp_path).add({"bits": 1}, {"A": TIMED})
    assert list(Record("bench", {}, tmp_path).missing([{"bits": 1}])) == [{"bits": 1}]


def test_a_record_names_what_is_absent(tmp_path, clean, capsys):
    record = Record("bench", {}, tmp_path)
    record.add({"bits": 1, "pass": "forward"}, {"A": TIMED, "B": {"absent": "not installed"}})
    record.finish()
    assert "absent: B (1, forward): not installed\n" in capsys.readouterr().out
    assert read(record.path)["cases"][0]["results"]["B"] == {"absent": "not installed"}


def test_what_is_absent_for_one_reason_is_named_once(tmp_path, clean, capsys):
    record = Record("bench", {}, tmp_path)
    for bits in (1, 2, 3):
        record.add({"bits": bits}, {"A": TIMED, "B": {"absent": "too wide" if bits == 3 else "not installed"}})
    record.finish()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["absent: B (1; and 1 more): not installed", "absent: B (3): too wide"]


def test_ceilings_are_measured_once(tmp_path, clean, monkeypatch):
    asked = []
    monkeypatch.setattr(harness, "ceilings", lambda device: asked.append("copy") or {"copy_gb_per_s": 2.0})
    record = Record("bench", {}, tmp_path)
    for _ in range(2):
        record.measure_ceilings(CPU, lambda device: asked.append("matmul") or {"matmul_tops": {}})
    assert record.content["ceilings"] == {"copy_gb_per_s": 2.0, "matmul_tops": {}}
    assert asked == ["copy", "matmul"]


def test_a_wrong_contender_fails_the_program_after_the_record_is_written(tmp_path, clean, capsys):
    record = Record("bench", {}, tmp_path)
    record.add({"bits": 1}, {"A": {"wrong": "off by 3"}})
    with pytest.raises(SystemExit, match="1"):
        record.finish()
    assert "wrong: A (1): off by 3\n" in capsys.readouterr().out
    assert record.path.is_file()


def test_folder_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "device_name", lambda: "A GPU")
    assert harness.folder(tmp_path, quick=False) == tmp_path
    assert harness.folder(None, quick=False) == harness.RESULTS / "a-gpu"
    assert harness.folder(None, quick=True) == harness.QUICK_RESULTS / "a-gpu"  # committed records are full ones
