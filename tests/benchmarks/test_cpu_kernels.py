"""The benchmark of the CPU's kernels, at sizes that take seconds."""

import json
from dataclasses import replace
from functools import partial

import cpu_goals
import pytest
import torch
from click import UsageError
from harness import Timing, Wrong
from matplotlib.image import imread
from scripts import load_script

cpu_kernels = load_script("benchmarks/cpu_kernels.py")
CPU = torch.device("cpu")
Suite = cpu_kernels.Suite
TINY = cpu_kernels.Plan(
    suites=(
        Suite("linear", "L2", ((48, 64),), (1, 3), (8, 5), (4,), (8, 5)),
        Suite("linear", "memory", ((40, 128),), integer=(8, 4), weight_only=()),
        Suite("lstm", "cache", ((24, 40),), (1, 3), (8, 1), (8,), (8, 1), ()),
    ),
    threads=(1,),
    instructions=None,
    last_level_cache=5000,
    memory_bytes=20000,
    not_measured=("the rest",),
    timing=Timing(seconds=0.001, least=2, most=3),
)
OWN = {"gq int8/8", "gq int8/5", "gq int8/4", "gq int8/1", "gq/8", "gq/4"}
TORCH = {"torch fp32/32", "torch bf16/16", "torch int8/8", "torch int4/4"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "CACHED_WEIGHTS", 3 * 4 * 24 * (24 + 40))
        return cpu_kernels.run(TINY, tmp_path_factory.mktemp("record"), CPU)


@pytest.fixture
def record(path):
    return json.loads(path.read_text())


def results_of(record, **case):
    return next(entry["results"] for entry in record["cases"] if entry["case"].items() >= case.items())


def problem(op="linear", n=48, k=64, m=3, place="L2"):
    cpu_kernels.shared_weights.cache_clear()
    case = {"op": op, "place": place, "n": n, "k": k, "m": m, "threads": 1}
    return cpu_kernels.Problem(case, memory_bytes=0)


def test_every_case_is_there(record):
    assert [entry["case"] for entry in record["cases"]] == TINY.cases()
    assert len(record["cases"]) == 2 + 1 + 2
    assert record["settings"]["not_measured"] == ["the rest"]


def test_own_layers_and_torchs_are_right_and_timed(record):
    found = {name for entry in record["cases"] for name, result in entry["results"].items() if "ms" in result}
    assert found >= OWN | TORCH | {"read sum", "read dot"}
    assert not any("wrong" in result for entry in record["cases"] for result in entry["results"].values())
    lstm = results_of(record, op="lstm", m=3)
    assert lstm.keys() >= {"gq int8/8", "gq int8/1", "gq/8", "torch int8/8"}
    assert "torch int4/4" not in lstm and "read sum" not in lstm


def test_sets_and_bytes(record):
    one = results_of(record, place="L2", m=1)["gq int8/5"]
    assert (one["layers"], one["code_bytes"]) == (1, 48 * 64 * 5 // 8)
    assert one["set_bytes"] == one["layer_bytes"] >= one["code_bytes"] + 4 * 48
    for name, result in results_of(record, place="memory").items():
        if "ms" in result:
            assert TINY.memory_bytes <= result["set_bytes"] < TINY.memory_bytes + result["layer_bytes"], name
            assert result["set_bytes"] == result["layers"] * result["layer_bytes"]
    lstm = results_of(record, op="lstm", m=1)
    assert {result["layers"] for result in lstm.values() if "ms" in result} == {3}
    assert lstm["torch fp32/32"]["layer_bytes"] == 4 * 4 * 24 * (24 + 40)


def test_times_are_those_of_one_layer():
    one = problem()
    one.own(8, "int8")
    one.figures["gq int8/8"]["layers"] = 4
    results = {"gq int8/8": {"ms": {"median": 8.0, "p10": 4.0, "samples": 3}}}
    one.add_figures(results)
    assert results["gq int8/8"]["ms"] == {"median": 2.0, "p10": 1.0, "samples": 3}


def test_kernels_and_operators_have_their_own_reference():
    one = problem()
    one.figures = {name: {"layers": 1} for name in ("gq int8/8", "gq/4", "native int8/8", "native int8/4")}
    results = {name: {"ms": {"median": float(time)}} for time, name in enumerate(one.figures, 2)}
    one.add_figures(results)
    assert {name: result["over_own_8bit"] for name, result in results.items()} == {
        "gq int8/8": 1,
        "gq/4": 2 / 3,
        "native int8/8": 1,
        "native int8/4": 4 / 5,
    }


def test_rates_and_ratios(record):
    results = {name: result for name, result in results_of(record, place="L2", m=1).items() if "ms" in result}
    own = results["gq int8/5"]
    milliseconds = own["ms"]["median"]
    assert own["gb_per_s"] == pytest.approx(own["code_bytes"] / milliseconds / 1e6)
    fastest = max(results[f"read {way}"]["gb_per_s"] for way in ("sum", "dot"))
    assert own["read_share"] == pytest.approx(own["gb_per_s"] / fastest)
    references = {"over_own_8bit": "gq int8/8", "over_torch_int8": "torch int8/8", "over_torch_fp32": "torch fp32/32"}
    for figure, name in references.items():
        assert own[figure] == pytest.approx(results[name]["ms"]["median"] / milliseconds)
    several = results_of(record, place="L2", m=3)["gq int8/5"]
    assert "gb_per_s" not in several and "over_own_8bit" in several


@pytest.mark.skipif(not cpu_kernels.native.available(), reason="the native library is not built")
def test_native_kernels_are_right_and_timed(record):
    found = {entry["case"]["op"]: entry["results"] for entry in record["cases"] if entry["case"]["place"] != "memory"}
    assert "ms" in found["linear"]["native int8/5"] and "ms" in found["lstm"]["native int8/1"]
    native = cpu_kernels.native
    for op, owner, function in (("linear", native, "linear"), ("lstm", native.Recurrent, "__call__")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, function, lambda *args: None)
            with pytest.raises(Wrong, match="off by"):
                problem(op).native(4).check()


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("op, function", [("linear", "packed_linear"), ("lstm", "packed_recurrent")])
def test_a_wrong_layer_is_found(monkeypatch, op, function, activations):
    right = getattr(cpu_kernels.F, function)
    problem(op).own(4, activations).check()

    def wrong(*args, **options):
        out = right(*args, **options)
        return 1.02 * out if op == "linear" else [1.02 * each for each in out]

    monkeypatch.setattr(cpu_kernels.F, function, wrong)
    with pytest.raises(Wrong, match=r"off by 0\.02"):
        problem(op).own(4, activations).check()


def test_a_wrong_peer_is_found(monkeypatch):
    layer = cpu_kernels.linear_peers.Layer(partial(torch.mul, other=torch.zeros(())), 1)
    monkeypatch.setattr(cpu_kernels.linear_peers, "torch_int8", lambda weight, dtype: layer)
    with pytest.raises(Wrong, match="off by 1"):
        problem(n=64, k=64).peer("torch int8/8").check()


def test_a_layer_that_is_wrong_in_its_last_copy_is_found():
    broken = problem("linear", place="cache", n=512, k=512)
    contender = broken.peer("torch fp32/32")
    contender.check()
    calls = broken.weights.once(broken.weights.torch_float, torch.float32).calls
    assert len(calls) > 100
    calls[-1].keywords["weight"].zero_()
    with pytest.raises(Wrong, match="off by 1"):
        contender.check()


def test_copies_lie_in_memory_of_their_own():
    weight, lstm = torch.randn(5, 7), torch.nn.LSTM(3, 4)
    layer = partial(torch.nn.functional.linear, weight=weight)
    copied = cpu_kernels.in_memory_of_its_own(layer).keywords["weight"]
    assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    ((nested,), text) = cpu_kernels.in_memory_of_its_own([(weight,), "int8"])
    assert torch.equal(nested, weight) and nested.data_ptr() != weight.data_ptr() and text == "int8"
    module = cpu_kernels.in_memory_of_its_own(lstm)
    assert torch.equal(module.weight_hh_l0, lstm.weight_hh_l0)
    assert module.weight_hh_l0.data_ptr() != lstm.weight_hh_l0.data_ptr()


def test_an_lstm_as_it_should_be():
    lstm, x = torch.nn.LSTM(5, 6).double(), torch.randn(4, 1, 5).double()
    weights, biases = [lstm.weight_ih_l0, lstm.weight_hh_l0], [lstm.bias_ih_l0, lstm.bias_hh_l0]
    torch.testing.assert_close(cpu_kernels.exact_lstm(x, weights, biases, None), lstm(x)[0])
    x = cpu_kernels.F.quantize_activations(x.float(), "int8").double()
    one = cpu_kernels.exact_lstm(x[:1], weights, biases, "int8")  # whose h is zero, so that only inputs are rounded
    torch.testing.assert_close(one, lstm(x[:1])[0])


@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
def test_plans_have_no_case_twice(full, monkeypatch):
    monkeypatch.setattr(cpu_kernels.harness, "free_memory", lambda device: 1 << 40)
    plan = (cpu_kernels.Plan.full if full else cpu_kernels.Plan.quick)(CPU)
    cases = [str(case) for case in plan.cases()]
    assert len(set(cases)) == len(cases)
    assert {case["threads"] for case in plan.cases()} == set(cpu_kernels.thread_counts())
    assert plan.memory_bytes == 4 * cpu_kernels.last_level_cache()


def test_the_full_plan_measures_every_goal_within_16_gb(monkeypatch):
    monkeypatch.setattr(cpu_kernels.harness, "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(cpu_kernels, "last_level_cache", lambda: 260 << 20)
    plan = cpu_kernels.Plan.full(CPU)
    figures = {"over_own_8bit": 20.0, "over_torch_int8": 20.0, "over_torch_fp32": 20.0}
    cases = [
        {"case": case, "results": {f"gq int8/{bits}": figures for bits in suite.integer}}
        for case, suite in plan.suites_of_cases()
    ]
    assert all(outcome.met for outcome in cpu_goals.outcomes({"cases": cases}))
    assert max(plan.sets(suite) for suite in plan.suites if suite.place == "memory") * plan.memory_bytes < 16e9


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(cpu_kernels.harness, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(cpu_kernels, "last_level_cache", lambda: 260 << 20)
    plan = cpu_kernels.Plan.full(CPU)
    assert {suite.place for suite in plan.suites} == {"L2", "cache"}
    (reason,) = plan.not_measured
    assert reason.startswith("weights out of memory: 13 sets of 1,090,519,040 bytes do not fit in the 1,073,741,824")


def test_it_is_no_gpus():
    with pytest.raises(UsageError, match="a CPU's, not a cuda device's"):
        cpu_kernels.Plan.full(torch.device("cuda"))


def test_the_recognizers_matrices():
    others = {(640, 1024), (640, 768), (cpu_kernels.LABELS, 640), (3072, 256), (3072, 768)}
    assert set(cpu_kernels.recognizer_shapes()) == others | {(4096, 240), (4096, 1024), (4096, 2048)}
    assert set(cpu_kernels.recognizer_shapes((4096, 1024))) == others | {(4096, 240), (4096, 2048)}


def test_threads_are_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_kernels.harness, "ceilings", lambda device: {})
    before = torch.get_num_threads()
    cpu_kernels.run(replace(TINY, suites=TINY.suites[1:2], threads=(before + 1,)), tmp_path, CPU)
    assert torch.get_num_threads() == before


def test_the_figure_is_drawn(record, tmp_path):
    load_script("plots/cpu_kernels.py").draw(record, tmp_path / "cpu_kernels.png")
    assert imread(tmp_path / "cpu_kernels.png").shape[:2] == (1080, 1080)


def test_the_readme_table_is_made(path, record):
    readme = load_script("plots/readme.py")
    lines = readme.table(path).splitlines()
    (own,) = [line for line in lines if line.startswith("| GQ, 8 bits, int8 activations |")]
    expected = [
        results_of(record, m=1, **case)["gq int8/8"]["ms"]["median"] for case in ({"place": "L2"}, {"place": "memory"})
    ]
    cells = [cell.strip() for cell in own.split("|")[2:-1]]
    assert cells == [readme._number(1e3 * milliseconds) for milliseconds in expected]
    assert lines[0] == "| microseconds, 1 thread | 48 x 64, one | 40 x 128, out of memory |"
    assert "no native kernels" in lines[-1]
