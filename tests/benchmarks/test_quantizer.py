"""The benchmark of the quantizer's operations, at sizes that take seconds."""

import json
from dataclasses import replace

import pytest
import torch
from harness import Timing, Wrong, measure
from matplotlib.image import imread
from scripts import load_script

quantizer = load_script("benchmarks/quantizer.py")
CPU = torch.device("cpu")
TINY = quantizer.Plan(
    sizes=(8, 10),
    main=10,
    bits=(1, 4),
    peer_bits=(4,),
    dtypes=("float32", "bfloat16"),
    compiled=False,
    group=3,
    instructions=None,
    timing=Timing(seconds=0.001, least=2, most=3),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return quantizer.run(TINY, tmp_path_factory.mktemp("record"), CPU)


@pytest.fixture
def record(path):
    return json.loads(path.read_text())


def results_of(record, **case):
    return next(entry["results"] for entry in record["cases"] if entry["case"].items() >= case.items())


def test_every_case_is_there(record):
    assert [entry["case"] for entry in record["cases"]] == TINY.cases()
    assert len(record["cases"]) == 4 + 3 * 3  # tables; two sizes, one of them in two dtypes, by passes


@pytest.mark.parametrize("name", ["gq", "gq kernel", "gq soft", "plain", "uniform", "lsq"])
def test_contenders_are_right_and_timed(record, name):
    for entry in record["cases"]:
        for contender, result in entry["results"].items():
            if contender == f"{name}/4":
                assert "ms" in result, result


def test_peers_are_measured_at_every_width_at_the_main_size_only(record):
    main = results_of(record, size=1024, dtype="float32")
    small = results_of(record, size=256)
    assert {"gq/1", "gq/4", "plain/1", "plain/4", "torchao/1", "torchao/4"} <= main.keys()
    assert {"gq/1", "gq/4", "plain/4"} <= small.keys()
    assert "plain/1" not in small
    assert not any(name.startswith("plain") for name in results_of(record, dtype="bfloat16"))


def test_bytes_and_shares(record):
    forward = results_of(record, size=1024, dtype="float32", **{"pass": "forward"})
    backward = results_of(record, size=1024, dtype="bfloat16", **{"pass": "backward"})
    assert forward["gq/4"]["bytes"] == 1024 * 4 * 2
    assert backward["gq/4"]["bytes"] == 1024 * 2 * 3
    assert backward["copy"]["bytes"] == 1024 * 2 * 2
    for results in (forward, backward):
        assert results["copy"]["copy_share"] == 1
        own, copy = results["gq/4"], results["copy"]
        seconds = own["ms"]["median"] / 1e3
        assert own["gb_per_s"] == pytest.approx(own["bytes"] / seconds / 1e9)
        assert own["copy_share"] == pytest.approx(own["gb_per_s"] / copy["gb_per_s"])


def test_a_second_run_measures_what_is_missing(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(quantizer.harness, "environment", lambda: {"commit": "0123abc"})
    monkeypatch.setattr(quantizer.harness, "ceilings", lambda device: {"copy_gb_per_s": 1.0})

    def interrupted(makers, timing, device):
        measured.append(list(makers))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure({"gq tables/1": makers["gq tables/1"]}, timing, device)

    monkeypatch.setattr(quantizer.harness, "measure", interrupted)
    tables_only = replace(TINY, sizes=())
    with pytest.raises(KeyboardInterrupt):
        quantizer.run(tables_only, tmp_path, CPU)
    quantizer.run(tables_only, tmp_path, CPU)
    assert len(measured) == 3 + 2


@pytest.mark.parametrize("passed", ["forward", *quantizer.BACKWARDS])
@pytest.mark.parametrize("forward", ["hard", "soft"])
def test_a_wrong_quantizer_is_found(passed, forward, monkeypatch):
    right = quantizer.F.fake_quantize

    def wrong(weight, *arguments, **options):
        return right(weight, *arguments, **options) * 1.02

    problem = quantizer.Problem(4096, torch.float32, passed, CPU)
    problem.gq(4, forward).check()
    monkeypatch.setattr(quantizer.F, "fake_quantize", wrong)
    with pytest.raises(Wrong, match="is off by 0.02"):
        problem.gq(4, forward).check()


@pytest.mark.parametrize("which", ["weight", "scale", "centroids"])
def test_a_wrong_gradient_is_found(which):
    problem = quantizer.Problem(4096, torch.float32, "backward with centroids", CPU)
    spoilt = ["weight", "scale", "centroids"].index(which)

    def check(out, grads):
        grads[spoilt] = torch.zeros_like(grads[spoilt])
        problem._check_general(4, "hard", out, grads)

    function = quantizer.partial(quantizer.F.fake_quantize, mu=problem.mu, hardness=problem.hardness)
    inputs = [problem.weight, problem.scale, problem.centroids(4)]
    with pytest.raises(Wrong, match=f"the gradient of the {which} is off by 1"):
        problem._contender(function, inputs, check).check()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda w: w, "levels at 4 bits"),
        (lambda w: 0 * w, "is off by 1 "),
        (lambda w: quantizer.peers.uniform(w, torch.full((64,), 0.5), bits=4) + (w - w.detach()), "only 0% of the"),
    ],
)
def test_a_wrong_rounding_is_found(wrong, message):
    problem = quantizer.Problem(4096, torch.float32, "backward", CPU)
    contender = problem._contender(wrong, [problem.weight], quantizer.partial(problem._check_rounding, 4))
    with pytest.raises(Wrong, match=message):
        contender.check()


def test_wrong_tables_are_found(monkeypatch):
    right = quantizer.build_tables
    contender = quantizer.tables_contender(3, "backward", CPU, 4)
    contender.check()
    monkeypatch.setattr(quantizer, "build_tables", lambda *arguments: 1.1 * right(*arguments))
    with pytest.raises(Wrong, match="the codebook is off by 0.1"):
        contender.check()
    monkeypatch.setattr(quantizer, "build_tables", lambda z, *rest: right(z.detach() + 0.5 * (z - z.detach()), *rest))
    with pytest.raises(Wrong, match="the gradient of the centroids is off by 0.5"):
        contender.check()


@pytest.mark.parametrize("full", [False, True], ids=["quick", "full"])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_plans_have_their_main_size(kind, full):
    plan = (quantizer.Plan.full if full else quantizer.Plan.quick)(torch.device(kind))
    assert plan.main in plan.sizes
    assert set(plan.peer_bits) <= set(plan.bits)
    assert {"size": 2**plan.main, "dtype": "float32", "pass": "forward", "of": "weight"} in plan.cases()


def test_the_figure_is_drawn(path, record, tmp_path):
    load_script("plots/quantizer.py").draw(record, tmp_path / "quantizer.png")
    assert imread(tmp_path / "quantizer.png").shape[:2] == (960, 1500)


def test_the_readme_table_is_made(path, record):
    readme = load_script("plots/readme.py")
    lines = readme.table(path).splitlines()
    median = results_of(record, size=1024, dtype="float32", **{"pass": "backward"})["gq/4"]["ms"]["median"]
    (own,) = [line for line in lines if line.startswith("| GQ |")]
    assert own.split("|")[3].strip() == f"{readme._number(median)} / -"  # no 8 bits here
    assert "A weight of 1,024 entries, float32 (0.00391 MiB)" in lines[-1]


@pytest.mark.full
def test_compiled_contenders_are_right():
    plan = replace(TINY, sizes=(10,), dtypes=("float32",), compiled=True)
    for case in plan.cases()[4:]:
        results = measure(quantizer.weight_makers(plan, case, CPU), plan.timing, CPU)
        assert all("ms" in result for name, result in results.items() if name.startswith(("plain", "lsq compiled")))
