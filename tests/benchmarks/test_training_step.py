"""The benchmark of training steps, on models that take seconds."""

import json
import math

import pytest
import torch
from harness import Timing, Wrong
from matplotlib.image import imread
from scripts import load_script

training_step = load_script("benchmarks/training_step.py")
CPU = torch.device("cpu")
WORKLOAD = training_step.Workload("tiny", batch=2, frames=40, vocab_size=16, features=8)
PLAN = training_step.Plan((WORKLOAD,), bits=4, plain_limit=math.inf, profiled=1, timing=Timing(0.001, least=2, most=3))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return training_step.run(PLAN, tmp_path_factory.mktemp("record"), CPU)


@pytest.fixture
def results(path):
    (entry,) = json.loads(path.read_text())["cases"]
    assert entry["case"] == {"model": "tiny"}
    return entry["results"]


@pytest.mark.parametrize("name", ["float", "gq", "plain"])
def test_contenders_are_right_and_timed(results, name):
    result = results[name]
    milliseconds = result["ms"]["median"]
    assert result["frames_per_s"] == pytest.approx((40 + 20) / milliseconds * 1e3)
    assert result["longer_than_float_ms"] == pytest.approx(milliseconds - results["float"]["ms"]["median"])
    assert result["quantized_weights"] == (0 if name == "float" else result["weights"])


def test_the_quantizer_is_seen_where_there_is_one(results):
    assert results["float"]["quantizer_ms"] == 0
    assert results["plain"]["quantizer_ms"] > 0
    gq = results["gq"]
    assert gq["quantizer_ms"] == gq["kinds_ms"]["quantizer"] > 0
    for kind in ("recurrent", "loss", "optimizer", "GEMM"):
        assert gq["kinds_ms"][kind] > 0


def test_torchao_leaves_the_recurrent_layers_float(results):
    pytest.importorskip("torchao")
    joint = WORKLOAD.build().joint
    expected = joint.encoder.weight.numel() + joint.predictor.weight.numel()
    assert results["torchao"]["quantized_weights"] == expected < results["torchao"]["weights"]
    assert results["torchao"]["quantizer_ms"] > 0


def test_a_step_that_quantizes_wrong_is_found(monkeypatch):
    right = training_step.gq.functional.fake_quantize_group

    def wrong(*arguments, **options):
        return [100 * weight for weight in right(*arguments, **options)]

    step = training_step.Step(WORKLOAD, PLAN, CPU)
    step.check(step)
    monkeypatch.setattr(training_step.gq.functional, "fake_quantize_group", wrong)
    with pytest.raises(Wrong, match="the loss is .* in float"):
        training_step.GQStep(WORKLOAD, PLAN, CPU).check(step)


def test_a_step_without_a_gradient_is_found(monkeypatch):
    right = training_step.gq.functional.fake_quantize_group
    step = training_step.Step(WORKLOAD, PLAN, CPU)
    step.check(step)
    monkeypatch.setattr(
        training_step.gq.functional,
        "fake_quantize_group",
        lambda *arguments, **options: [weight.detach() for weight in right(*arguments, **options)],
    )
    with pytest.raises(Wrong, match="no finite gradient reaches .*weight_ih_l0"):
        training_step.GQStep(WORKLOAD, PLAN, CPU).check(step)


def test_the_plain_form_is_the_soft_value_of_the_kernels():
    weights = [torch.randn(3, 5, requires_grad=True), torch.randn(2, 4, requires_grad=True)]
    scale = torch.cat([1.1 * weight.detach().abs().amax(1) for weight in weights]).requires_grad_()
    centroids = torch.tensor([[-1.0, -0.4, 0.3, 1.0], [-1.0, -0.2, 0.5, 1.0]], requires_grad=True)
    inputs = [*weights, scale, centroids]
    options = dict(mu=torch.tensor([1.0, 8.0]), hardness=torch.tensor([2.0, 5.0]), per_channel=True)
    options |= dict(forward="soft", straight_through=0.2, codebook_dtype="float")
    plain = training_step.plain_group(weights, scale, centroids, **options)
    own = training_step.gq.functional.fake_quantize_group(weights, scale, centroids, **options)
    for one, other in zip(plain, own, strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(sum(out.sin().sum() for out in outs), inputs) for outs in (plain, own)]
    torch.testing.assert_close(*grads)


def test_the_plain_form_is_left_out_where_it_takes_minutes():
    limited = training_step.Plan((WORKLOAD,), 4, plain_limit=1e3, profiled=1, timing=PLAN.timing)
    with pytest.raises(training_step.Unavailable, match="would take minutes a step here"):
        training_step.PlainStep(WORKLOAD, limited, CPU)


def test_batches_have_realistic_lengths():
    workload = training_step.Workload("tiny", batch=3, frames=400, vocab_size=16, features=8)
    features, lengths, targets, labels = workload.draw(CPU)
    assert features.shape == (3, 400, 8)
    assert lengths.tolist() == [400, 300, 200]
    assert labels.tolist() == [16, 12, 8]
    assert targets.shape == (3, 16)
    assert targets.min() >= 1 and targets.max() < 16


def test_the_figure_is_drawn(path, tmp_path):
    record = json.loads(path.read_text())
    load_script("plots/training_step.py").draw(record, tmp_path / "training_step.png")
    assert imread(tmp_path / "training_step.png").shape[1] == 1350


def test_the_readme_table_is_made(path, results):
    lines = load_script("plots/readme.py").table(path).splitlines()
    (own,) = [line for line in lines if line.startswith("| tiny | GQ |")]
    assert own.endswith("| 100% |")
    assert f"| {results['gq']['frames_per_s']:,.0f} |" in own
    assert "batches of 2 x 0.4 s for tiny" in lines[-1]
