"""Tuned plans, measured by a fake clock; `time_plan` itself runs where there is a GPU."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import gq_triton as gq
from gq_triton import tuning
from gq_triton.kernels import packed_linear_triton as kernels
from gq_triton.tuning import Case, tune

GPU = SimpleNamespace(name="A GPU", multi_processor_count=132, L2_cache_size=1 << 20)
CASES = [Case(1, 512, 256, 4, "bf16"), Case(64, 512, 256, 4, "byte")]
gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of a known name, and nothing tuned for it."""
    monkeypatch.setattr(tuning, "_present_gpu", lambda: GPU)
    monkeypatch.setattr(tuning, "_versions", lambda: {"torch": "2.13", "triton": "3.9"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU.name)
    monkeypatch.setattr(kernels, "_TUNED", {})


class Clock:
    """Every plan takes 2 ms, the rule's 3 ms, the last candidate 1 ms."""

    def __init__(self):
        self.asked = []

    def __call__(self, case, plan):
        self.asked.append(case)
        if [plan] == kernels.candidates(*case[:4])[-1:]:
            return 1.0
        return 3.0 if plan == kernels.plan(*case[:4], 132) else 2.0


def test_the_fastest_plan_is_found_and_used(gpu, tmp_path):
    path = tmp_path / "plans.json"
    found = list(tune(CASES, path, Clock()))
    assert [tuned.case for tuned in found] == CASES
    assert [tuned.plan for tuned in found] == [kernels.candidates(*case[:4])[-1] for case in CASES]
    assert [(tuned.ms, tuned.rule_ms) for tuned in found] == [(1.0, 3.0)] * 2
    gq.load_tuned(path)
    assert {(GPU.name, *tuned.case): tuned.plan for tuned in found} == kernels._TUNED


def test_a_stopped_run_goes_on(gpu, tmp_path):
    path, clock = tmp_path / "plans.json", Clock()
    next(tune(CASES, path, clock))
    assert set(clock.asked) == {CASES[0]}
    assert [entry["tokens"] for entry in json.loads(path.read_text())["plans"]] == [1]
    rest = Clock()
    found = list(tune(CASES, path, rest))
    assert set(rest.asked) == {CASES[1]}
    assert [tuned.case for tuned in found] == CASES
    more = Clock()
    list(tune([Case(1, 64, 64, 1, "fp32")], path, more))
    assert len(json.loads(path.read_text())["plans"]) == 3  # what was there stays
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"]


@pytest.mark.parametrize("operand", tuning.DTYPES)
def test_the_rule_is_that_of_the_operand(operand):
    case = Case(1024, 8192, 8192, 4, operand)
    assert tuning._plans(case, 132)[0] == kernels.plan(*case[:4], 132, operand)


def test_plans_that_do_not_run_are_passed_over(gpu, tmp_path):
    rule = kernels.plan(*CASES[0][:4], 132)
    (tuned,) = tune(CASES[:1], tmp_path / "plans.json", lambda case, plan: 5.0 if plan == rule else math.inf)
    assert tuned.plan == rule
    with pytest.raises(RuntimeError, match="the rule's Plan.* does not run Case"):
        list(tune(CASES[1:], tmp_path / "plans.json", lambda case, plan: math.inf))


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "name",
            "Another GPU",
            r"plans.json was measured on A GPU, torch 2\.13, triton 3\.9, and this is Another GPU,",
        ),
        (
            "versions",
            {"torch": "2.14"},
            r"measured on A GPU, torch 2\.13, triton 3\.9, and this is A GPU, torch 2\.14:",
        ),
    ],
)
def test_a_file_of_another_machine_is_not_gone_on_with(gpu, tmp_path, monkeypatch, name, value, message):
    path = tmp_path / "plans.json"
    list(tune(CASES[:1], path, Clock()))
    if name == "versions":
        monkeypatch.setattr(tuning, "_versions", lambda: value)
    else:
        monkeypatch.setattr(tuning, "_present_gpu", lambda: SimpleNamespace(**vars(GPU) | {name: value}))
    with pytest.raises(ValueError, match=message):
        list(tune(CASES, path, Clock()))


def test_a_file_of_another_gpu_is_not_loaded(gpu, tmp_path, monkeypatch):
    path = tmp_path / "plans.json"
    list(tune(CASES[:1], path, Clock()))
    monkeypatch.setattr(tuning, "_present_gpu", lambda: SimpleNamespace(name="Another GPU"))
    with pytest.raises(ValueError, match="was measured on A GPU, and this machine has Another GPU"):
        gq.load_tuned(path)
    assert kernels._TUNED == {}


def test_the_rule_may_choose_what_is_no_candidate(gpu, tmp_path, monkeypatch):
    path, rule = tmp_path / "plans.json", kernels.plan(*CASES[0][:4], 132)
    monkeypatch.setattr(kernels, "candidates", lambda *sizes: [])
    (tuned,) = tune(CASES[:1], path, Clock())
    assert (tuned.plan, tuned.ms, tuned.rule_ms) == (rule, 3.0, 3.0)
    gq.load_tuned(path)
    assert list(kernels._TUNED.values()) == [rule]


def without(name):
    return lambda content: content.pop(name)


def changed(**values):
    return lambda content: content["plans"][0].update(values)


@pytest.mark.parametrize(
    "spoil",
    [
        without("format"),
        without("plans"),
        lambda content: content.update(version=2),
        lambda content: content.update(plans=[None]),
        changed(tokens=0),
        changed(rows="512"),
        changed(bits=9),
        changed(operand="int4"),
        changed(ms="fast"),
        changed(plan={"kernel": "gemv"}),
        lambda content: content["plans"][0]["plan"].update(warps=3),
        lambda content: content["plans"][0]["plan"].update(more=1),
    ],
)
def test_damaged_files(gpu, tmp_path, spoil):
    path = tmp_path / "plans.json"
    list(tune(CASES[:1], path, Clock()))
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    for use in (lambda: gq.load_tuned(path), lambda: list(tune(CASES, path, Clock()))):
        with pytest.raises(ValueError, match="plans.json is no file of `gq-triton tune`, or it is damaged"):
            use()
    assert kernels._TUNED == {}


def test_what_is_no_json_or_not_there(gpu, tmp_path):
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(ValueError, match="or it is damaged"):
        gq.load_tuned(tmp_path / "plans.json")
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        gq.load_tuned(tmp_path / "none.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="on a CUDA GPU, and torch finds none"):
        gq.load_tuned(tmp_path / "plans.json")
    with pytest.raises(ValueError, match="on a CUDA GPU, and torch finds none"):
        next(tune(CASES, tmp_path / "plans.json"))


@gpu_only
@pytest.mark.parametrize("operand", list(tuning.DTYPES))
def test_times_of_a_gpu(operand):
    case = Case(4, 512, 256, 3, operand)
    rule = kernels.plan(*case[:4], torch.cuda.get_device_properties(0).multi_processor_count)
    assert 0 < tuning.time_plan(case, rule) < 10


@gpu_only
def test_a_plan_that_computes_something_else_is_not_timed(monkeypatch):
    case = Case(4, 512, 256, 4, "bf16")
    rule = kernels.plan(*case[:4], 132)
    tuning._product(case)
    right = kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *arguments, **options: 1.1 * right(*arguments, **options))
    assert tuning.time_plan(case, rule) == math.inf
