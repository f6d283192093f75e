"""The benchmark of packed linear layers, at sizes that take seconds."""

import json
from dataclasses import replace

import packed_goals
import pytest
import torch
from harness import Timing, Wrong
from matplotlib.image import imread
from scripts import load_script

packed_linear = load_script("benchmarks/packed_linear.py")
CPU = torch.device("cpu")
TINY = packed_linear.Plan(
    suites=(
        packed_linear.Suite(((48, 64), (64, 128)), (1, 16), (1,), (1, 4, 8), "float32", ("turns",)),
        packed_linear.Suite(((64, 128),), (3,), (), (), "bfloat16", ("turns",)),
    ),
    main=4,
    eight_bit=("int8",),
    eight_bit_bits=(4, 8),
    shown=((48, 64), (64, 128)),
    not_measured=("goals",),
    timing=Timing(seconds=0.001, least=2, most=3),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packed_linear.harness.MATMUL_SIZE, "cpu", 64)
        return packed_linear.run(TINY, tmp_path_factory.mktemp("record"), CPU)


@pytest.fixture
def record(path):
    return json.loads(path.read_text())


@pytest.fixture
def gpu_plan(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return packed_linear.Plan.full(torch.device("cuda"))


def results_of(record, **case):
    return next(entry["results"] for entry in record["cases"] if entry["case"].items() >= case.items())


def problem(**changes):
    case = {"n": 64, "k": 128, "m": 5, "dtype": "float32", "mode": "turns", "bits": [4]} | changes
    return packed_linear.Problem(case, CPU)


def test_every_case_is_there(record):
    assert [entry["case"] for entry in record["cases"]] == TINY.cases()
    assert len(record["cases"]) == 2 * 2 + 1


def test_what_is_not_measured_is_told(tmp_path, capsys, monkeypatch, record):
    assert record["settings"]["not_measured"] == ["goals"]
    monkeypatch.setattr(packed_linear.harness, "ceilings", lambda device: {})
    monkeypatch.setattr(packed_linear.harness, "matmul_ceilings", lambda device: {})
    packed_linear.run(replace(TINY, suites=()), tmp_path, CPU)
    assert capsys.readouterr().err.startswith("not measured: goals\n")


def test_own_contenders_and_dense_are_right_and_timed(record):
    wide = results_of(record, n=64, m=1)
    narrow = results_of(record, n=64, m=16)
    half = results_of(record, dtype="bfloat16")
    own = {"torch", "gq/4", "gq int8/4"}
    assert wide.keys() >= own | {"gq/1", "gq/8", "gq int8/8"}
    assert "gq int8/1" not in wide
    for results in (narrow, half):
        assert {name for name in results if name.startswith("gq")} == own - {"torch"}
    for results in (wide, narrow, half):
        assert all("ms" in result for name, result in results.items() if name == "torch" or name.startswith("gq"))
    assert "ms" in narrow["torch int8/8"]
    assert "ms" in half["torch int4/4"]


def test_errors(record):
    results = results_of(record, n=64, m=1)
    assert results["torch"]["error"] < 1e-6
    assert results["gq/1"]["error"] > 0.3 > results["gq/4"]["error"] > 0.03 > results["gq/8"]["error"]
    for name, result in results.items():
        if name.startswith("gq"):
            assert result["numerical_error"] < 1e-5
    assert results["gq int8/8"]["error"] > results["gq/8"]["error"]


def test_bytes_floor_and_peak(record):
    results, ceilings = results_of(record, n=64, m=16), record["ceilings"]
    activations = 4 * 16 * (64 + 128)
    assert results["torch"]["bytes"] == 4 * 64 * 128 + activations
    own = results["gq/4"]
    assert own["weight_bytes"] == 64 * 128 // 2 + 4 * 64
    assert own["bytes"] == own["weight_bytes"] + activations
    milliseconds = own["ms"]["median"]
    floor = ceilings["operation_ms"] + own["bytes"] / (ceilings["copy_gb_per_s"] * 1e9) * 1e3
    assert own["floor_share"] == pytest.approx(floor / milliseconds)
    rate = 2 * 16 * 64 * 128 / (milliseconds / 1e3) / 1e12
    assert own["peak_share"] == pytest.approx(rate / ceilings["matmul_tops"]["float32"])
    int8 = results["gq int8/4"]
    assert int8["peak_share"] * int8["ms"]["median"] == pytest.approx(
        own["peak_share"] * milliseconds * ceilings["matmul_tops"]["float32"] / ceilings["matmul_tops"]["int8"]
    )
    assert own["speedup"] == pytest.approx(results["torch"]["ms"]["median"] / milliseconds)


def test_warm_caches_have_no_floor():
    ceilings = {"operation_ms": 1.0, "copy_gb_per_s": 1.0, "matmul_tops": {}}
    for mode, expected in {"cold": True, "cold graph": True, "warm": False, "warm graph": False}.items():
        warm = problem(mode=mode)
        warm.dense()
        results = {"torch": {"ms": {"median": 2.0}}}
        warm.add_figures(results, ceilings)
        assert ("floor_share" in results["torch"]) == expected
        assert "peak_share" not in results["torch"]  # nobody measured it


@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_wrong_product_is_found(monkeypatch, activations):
    right = packed_linear.F.packed_linear
    problem().packed("gq/4", 4, activations).check()
    monkeypatch.setattr(packed_linear.F, "packed_linear", lambda *args, **options: 1.02 * right(*args, **options))
    with pytest.raises(Wrong, match=r"off by 0\.02 from that with the weight as decoded"):
        problem().packed("gq/4", 4, activations).check()


def test_a_wrong_peer_is_found(monkeypatch):
    layer = packed_linear.linear_peers.Layer(lambda x: 0 * x[:, :64], 1)
    monkeypatch.setitem(packed_linear.PEERS, "wrong/4", lambda weight, dtype: layer)
    with pytest.raises(Wrong, match="off by 1"):
        problem().peer("wrong/4").check()


def test_a_weight_is_quantized_once():
    one, other = problem(m=1), problem(m=2)
    assert one.weight is other.weight
    assert one.weight.once(packed_linear.pack, 4, "float") is other.weight.once(packed_linear.pack, 4, "float")
    assert problem(n=48).weight is not one.weight


@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_plans_have_no_case_twice_and_show_what_they_measure(kind, full, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    plan = (packed_linear.Plan.full if full else packed_linear.Plan.quick)(torch.device(kind))
    cases = [tuple((key, str(value)) for key, value in case.items() if key != "bits") for case in plan.cases()]
    assert len(set(cases)) == len(cases)
    assert {case["mode"] for case in plan.cases()} <= packed_linear.MODES.keys()
    assert set(plan.shown) <= {(case["n"], case["k"]) for case in plan.cases()}
    assert "fp8" not in plan.eight_bit  # not on this part


def test_the_gpu_plan_measures_every_goal(gpu_plan):
    """All but the peers', which depend on what is installed."""
    cases = []
    for case in gpu_plan.cases():
        names = [f"gq {kind}/{bits}" if kind else f"gq/{bits}" for kind, bits in gpu_plan.packed(case)]
        figures = {"ms": {"median": 1.0}, "speedup": 10.0, "floor_share": 1.0}
        cases.append({"case": case, "results": dict.fromkeys(names, figures)})
    goals = packed_goals.outcomes({"cases": cases})[: len(packed_goals.GOALS)]
    assert [goal.what for goal in goals if not goal.met] == []
    assert gpu_plan.eight_bit == ("int8", "fp8")


def test_every_kernel_is_compiled_ahead_once(gpu_plan):
    small = replace(gpu_plan, suites=(packed_linear.Suite(((64, 128),), (1, 3), (1,), (1, 4), "bfloat16", ("cold",)),))
    jobs = packed_linear.compile_jobs(small, processors=132)
    assert {(job.activations, job.bits, job.tokens) for job in jobs} == {
        *((kind, bits, 1) for kind in (None, "int8", "fp8") for bits in (1, 4)),
        *((kind, 4, 8) for kind in (None, "int8", "fp8")),
    }
    assert len(packed_linear.compile_jobs(replace(small, suites=2 * small.suites), 132)) == len(jobs)
    assert [packed_linear._alike(size) for size in (1, 2, 16, 48, 8192, 8200)] == [1, 8, 16, 16, 16, 8]


def test_jobs_for_many_tokens_run_as_the_case_does(gpu_plan):
    suite = packed_linear.Suite(((8192, 8192),), (1024,), (1024,), (4,), "bfloat16", ("cold",))
    jobs = packed_linear.compile_jobs(replace(gpu_plan, suites=(suite,)), processors=132)
    kernels = packed_linear.kernels
    plans = {kind: kernels.plan(1024, 8192, 8192, 4, 132, kind) for kind in ("bf16", "byte", "fp8")}
    assert [job.chosen for job in jobs] == list(plans.values())
    assert plans["fp8"] != plans["bf16"]
    assert all(job.tokens > kernels.FEW and job.tokens % 16 == 0 for job in jobs)  # few are not multiplied as fp8


@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
def test_a_job_launches_its_kernel(activations):
    pytest.importorskip("triton")
    plan = packed_linear.kernels.plan(3, 16, 16, 3, processors=132)
    out = packed_linear.launch_job(packed_linear.Job(plan, 3, activations, 8, 16, 16))
    assert out.shape == (8, 16)
    assert not out.any()


def test_a_job_that_fails_is_left_to_its_contender():
    packed_linear.run_job(packed_linear.Job(None, 3, None, 8, 16, 16))


def test_the_figure_is_drawn(record, tmp_path):
    load_script("plots/packed_linear.py").draw(record, tmp_path / "packed_linear.png")
    assert imread(tmp_path / "packed_linear.png").shape[:2] == (1020, 1020)


def test_the_readme_table_is_made(path, record):
    readme = load_script("plots/readme.py")
    lines = readme.table(path).splitlines()
    (own,) = [line for line in lines if line.startswith("| GQ, 4 bits |")]
    one, many = (results_of(record, n=64, k=128, m=m)["gq/4"] for m in (1, 16))
    cells = [cell.strip() for cell in own.split("|")[2:-1]]
    assert cells[0] == f"{8 * one['weight_bytes'] / 64 / 128:.3g}"
    assert cells[1] == f"{100 * many['error']:.2g} %"
    assert cells[-1] == " / ".join(readme._number(1e3 * result["ms"]["median"]) for result in (one, many)) + " / -"
