import copy
import itertools
import json
from dataclasses import replace

import pytest
import tones
import torch

import gq_triton as gq
from gq_triton.baselines import KMeansConfig, LSQConfig, S8BQATConfig, UniformConfig
from gq_triton.files import load_tensors
from gq_triton.models import ConformerConfig, model_of
from gq_triton.training import SpeechSet, TrainConfig, Trainer
from gq_triton.training.log import read_metrics

CONFIG = TrainConfig(
    epochs=3,
    batch_size=4,
    learning_rate=1e-2,
    ctc_weight=0.3,
    curriculum_epochs=1,
    average_decay=0.8,
    speeds=(0.9, 1.0),
    evaluate_every=2,
    checkpoint_every=3,
    log_every=1,
)
TOTAL = 9  # steps
GQ = gq.GQConfig(bits=3)
RIVALS = [UniformConfig(2), KMeansConfig(2), LSQConfig(2), S8BQATConfig(2, compress_every=3)]


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def spoken():
    return tones.utterances(12)


@pytest.fixture(scope="module")
def speech(spoken):
    made = tones.recognizer(spoken)
    return SpeechSet(spoken, made.front_end, made.tokenizer, speeds=CONFIG.speeds, progress=False)


def new_model(spoken, quantization: gq.WeightConfig | None = None, **changes) -> torch.nn.Module:
    recognizer = tones.recognizer(spoken, **changes)
    return recognizer.prepare(quantization).model if quantization else recognizer.model


def trainer(model, speech, output, config=CONFIG, **options) -> Trainer:
    return Trainer(model, speech, config, output, progress=False, **options)


def losses(output) -> list[float]:
    return [value for _, name, value in read_metrics(output / "metrics.csv") if name == "loss"]


@pytest.mark.parametrize("quantization", [None, GQ])
def test_training_lowers_the_loss(spoken, speech, tmp_path, quantization):
    config = TrainConfig(epochs=12, batch_size=4, learning_rate=2e-2, log_every=1)
    trainer(new_model(spoken, quantization), speech, tmp_path, config).run()
    history = losses(tmp_path)
    assert len(history) == 36
    assert sum(history[-3:]) < 0.6 * sum(history[:3])


@pytest.mark.parametrize(
    "quantization, stop",
    [*itertools.product([None, GQ], [4, 5, 6]), *((rival, 4) for rival in RIVALS)],
)
def test_an_interrupted_run_ends_with_the_same_weights(spoken, speech, tmp_path, monkeypatch, quantization, stop):
    whole = trainer(new_model(spoken, quantization), speech, tmp_path / "whole").run()

    broken = trainer(new_model(spoken, quantization), speech, tmp_path / "broken")
    update = broken.update

    def update_until_killed(*arguments):
        if broken.step == stop:
            raise Killed
        return update(*arguments)

    monkeypatch.setattr(broken, "update", update_until_killed)
    with pytest.raises(Killed):
        broken.run()
    _, state = load_tensors(tmp_path / "broken" / "checkpoint.safetensors")
    assert state["step"] == stop - stop % 3

    torch.manual_seed(1234)  # nothing may depend on the state a new process happens to be in
    resumed = trainer(new_model(spoken, quantization), speech, tmp_path / "broken").run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    whole_rows, resumed_rows = (read_metrics(tmp_path / run / "metrics.csv") for run in ("whole", "broken"))
    assert whole_rows == resumed_rows


def test_the_average_of_the_parameters_is_evaluated_and_returned(spoken, speech, tmp_path):
    config = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, average_decay=0.5, evaluate_every=1)
    model = new_model(spoken)
    run = trainer(model, speech, tmp_path, config, evaluate=lambda: {"norm": model.joint.output.bias.norm().item()})
    trail = []
    update = run.update

    def follow(*arguments):
        result = update(*arguments)
        trail.append(model.joint.output.bias.detach().clone())
        return result

    run.update = follow
    run.run()
    average = trail[0]  # the first update starts the average
    for value in trail[1:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(model.joint.output.bias.detach(), average, rtol=1e-5, atol=1e-7)
    evaluated = [value for _, name, value in read_metrics(tmp_path / "metrics.csv") if name == "norm"]
    assert evaluated[-1] == pytest.approx(float(average.norm()), rel=1e-5)


def layers_of(model):
    return [(layer.weight, layer.weight_quantizer) for layer in model.modules() if hasattr(layer, "weight_quantizer")]


@pytest.mark.parametrize("quantization", [*RIVALS, GQ], ids=lambda config: type(config).__name__)
def test_scales_that_follow_the_weights_follow_their_average(spoken, speech, tmp_path, quantization):
    model = new_model(spoken, quantization)
    run = trainer(model, speech, tmp_path, replace(CONFIG, learning_rate=3e-2))
    deploy, raw = run._deploy, []

    def follow():
        raw.append([copy.deepcopy(quantizer) for _, quantizer in layers_of(model)])
        deploy()

    run._deploy = follow
    run.run()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stale = 0
    for before, (weight, quantizer) in zip(raw[-1], layers_of(model), strict=True):
        assert torch.equal(weight, run.average.values[names[id(weight)]])  # not even S8BQAT compresses it
        if type(quantization) in (UniformConfig, KMeansConfig):
            stale += not torch.equal(before.scales, quantizer.scales)
            before.update(weight, 1)
        for name, buffer in quantizer.named_buffers():
            assert torch.equal(buffer, before.get_buffer(name)), name
    assert stale or type(quantization) not in (UniformConfig, KMeansConfig)


@pytest.mark.parametrize("quantization", [*RIVALS, GQ], ids=lambda config: type(config).__name__)
def test_an_evaluation_leaves_no_trace_in_the_model(spoken, speech, tmp_path, quantization):
    run = trainer(new_model(spoken, quantization), speech, tmp_path, replace(CONFIG, evaluate_every=100), evaluate=None)
    for batches, divisor in itertools.islice(run.batches(), 3):
        run.update(batches, divisor)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with run._deployed():
        scales = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.endswith("scales") for name in scales) == (type(quantization) in (UniformConfig, KMeansConfig))
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_scales_of_weights_that_are_not_averaged_stay(spoken, speech, tmp_path):
    run = trainer(new_model(spoken, UniformConfig(2)), speech, tmp_path, replace(CONFIG, average_decay=0.0))
    run.run()
    tensors, _ = load_tensors(tmp_path / "checkpoint.safetensors")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"objective.model.{name}"]), name


def test_a_curriculum_begins_with_the_shortest(spoken, speech, tmp_path):
    config = TrainConfig(epochs=2, batch_size=3, curriculum_epochs=1)
    run = trainer(new_model(spoken), speech, tmp_path, config)
    longest = [int(batch.feature_lengths.max()) for (batch,), _ in run.batches()]
    assert longest[:4] == sorted(longest[:4])
    assert longest[:4] != longest[4:]


def test_a_finished_run_is_not_repeated(spoken, speech, tmp_path):
    first = trainer(new_model(spoken), speech, tmp_path).run()
    again = trainer(new_model(spoken, seed=7), speech, tmp_path)
    again.update = None  # calling it would fail
    again.run()
    assert torch.equal(again.model.joint.output.weight, first.joint.output.weight)


def test_seeds_lead_to_different_weights(spoken, speech, tmp_path):
    weights = [
        trainer(new_model(spoken), speech, tmp_path / str(seed), TrainConfig(epochs=1, batch_size=4, seed=seed)).run()
        for seed in (0, 1)
    ]
    assert not torch.equal(weights[0].joint.output.weight, weights[1].joint.output.weight)


def test_metrics_are_logged_and_evaluated_when_due(spoken, speech, tmp_path):
    modes = []
    model = new_model(spoken)

    def evaluate():
        modes.append(model.training)
        return {"wer": 0.25}

    trainer(model, speech, tmp_path, evaluate=evaluate).run()
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [step for step, name, _ in rows if name == "loss"] == list(range(TOTAL))
    assert [(step, value) for step, name, value in rows if name == "wer"] == [(5, 0.25), (8, 0.25)]
    assert modes == [False, False]
    rates = [value for _, name, value in rows if name == "learning_rate"]
    assert rates == [pytest.approx(CONFIG.learning_rate * CONFIG.rate(step, TOTAL)) for step in range(TOTAL)]


def test_a_run_of_another_configuration_is_not_touched(spoken, speech, tmp_path):
    trainer(new_model(spoken), speech, tmp_path, description={"preset": "a"}).run()
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    other = TrainConfig(**{**CONFIG.__dict__, "epochs": 4})
    with pytest.raises(ValueError, match=r"another configuration: train is epochs=3 there, 4 here"):
        trainer(new_model(spoken), speech, tmp_path, other, description={"preset": "a"})
    with pytest.raises(ValueError, match="preset is 'a' there, 'b' here"):
        trainer(new_model(spoken), speech, tmp_path, description={"preset": "b"})
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    fresh = trainer(new_model(spoken), speech, tmp_path, other, overwrite=True)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    fresh.run()
    assert json.loads((tmp_path / "config.json").read_text())["train"]["epochs"] == 4


def test_a_damaged_checkpoint_is_named(spoken, speech, tmp_path):
    trainer(new_model(spoken), speech, tmp_path).run()
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors .* damaged"):
        trainer(new_model(spoken), speech, tmp_path).run()


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(spoken, speech, tmp_path):
    model = new_model(spoken)
    run = trainer(model, speech, tmp_path)
    update = run.update

    def poisoned(*arguments):
        if run.step == 4:
            model.joint.output.weight.data.fill_(float("nan"))
        return update(*arguments)

    run.update = poisoned
    with pytest.raises(FloatingPointError, match="loss is nan at step"):
        run.run()
    tensors, state = load_tensors(tmp_path / "checkpoint.safetensors")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for name, tensor in tensors.items() if name.startswith("objective."))


def test_weights_that_the_last_step_destroyed_are_not_saved(spoken, speech, tmp_path):
    run = trainer(new_model(spoken), speech, tmp_path)
    update = run.update

    def destroying(*arguments):
        loss = update(*arguments)
        if run.step == TOTAL - 1:
            run.model.joint.output.weight.data[0, 0] = torch.inf
        return loss

    run.update = destroying
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 9"):
        run.run()
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == 6


def test_a_failing_evaluation_leaves_the_models_own_weights(spoken, speech, tmp_path):
    run = trainer(new_model(spoken), speech, tmp_path, replace(CONFIG, average_decay=0.9), evaluate=None)
    run.average.update()
    run.average.values["joint.output.bias"].add_(1)
    own = run.model.joint.output.bias.clone()

    def evaluate_and_fail():
        with run._deployed():
            assert not torch.equal(run.model.joint.output.bias, own)
            raise Killed

    with pytest.raises(Killed):
        evaluate_and_fail()
    assert torch.equal(run.model.joint.output.bias, own)


def test_only_quantized_models_are_annealed(spoken, speech, tmp_path):
    config = TrainConfig(epochs=2, batch_size=4, hardness=(3.0, 30.0))
    model = new_model(spoken, GQ)
    trainer(model, speech, tmp_path / "qat", config).run()
    hardness = [float(buffer) for name, buffer in model.named_buffers() if name.endswith("hardness")]
    assert hardness == [pytest.approx(30.0)] * len(hardness) != []
    assert trainer(new_model(spoken), speech, tmp_path / "float", config).annealer is None


def test_augmentation_changes_what_is_learned(spoken, speech, tmp_path):
    def weight(name, **settings):
        config = TrainConfig(epochs=1, batch_size=4, **settings)
        model = new_model(spoken, dropout=0.0)
        return trainer(model, speech, tmp_path / name, config).run().joint.output.weight

    plain = weight("plain", freq_masks=0, time_masks=0)
    assert torch.equal(plain, weight("again", freq_masks=0, time_masks=0, evaluate_every=1))
    assert not torch.equal(plain, weight("masked", freq_masks=2, time_masks=2))


@pytest.mark.parametrize("quantization", [None, GQ])
def test_micro_batches_add_up_to_the_step_of_the_whole_batch(spoken, speech, tmp_path, quantization):
    # 12 utterances in batches of 6, their micro-batches of 2, 2, 1 and 1.
    settings = dict(epochs=2, batch_size=6, freq_masks=0, time_masks=0, ctc_weight=0.3, log_every=1, learning_rate=1e-3)
    rows, states = [], []
    for accumulate in (1, 4):
        run = trainer(
            new_model(spoken, quantization, dropout=0.0),
            speech,
            tmp_path / str(accumulate),
            TrainConfig(**settings, accumulate=accumulate),
        )
        states.append(run.run().state_dict())
        rows.append(read_metrics(run.output / "metrics.csv"))
        assert run.step == 4
        assert run.annealer is None or run.annealer.steps == 4
    for (step, name, value), other in zip(*rows, strict=True):
        assert other == (step, name, pytest.approx(value, rel=1e-4))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_every_micro_batch_has_masks_of_its_own(spoken, speech, tmp_path):
    run = trainer(new_model(spoken), speech, tmp_path, TrainConfig(batch_size=4, accumulate=2))
    masked, augmented = [], run._augmented

    def follow(batch, draw):
        masked.append((augmented(batch, draw) == 0).all(1))  # (B, bins)
        return masked[-1][..., None, :] * 0 + batch.features

    run._augmented = follow
    batches, utterances = next(run.batches())
    assert [len(batch.features) for batch in batches] == [2, 2] and utterances == 4
    run.update(batches, utterances)
    assert len({tuple(row.tolist()) for rows in masked for row in rows}) > 2


def test_batches_too_small_for_their_parts_are_refused(spoken, speech, tmp_path):
    with pytest.raises(ValueError, match=r"smallest batch has 2 utterances, too few for 1 processes with 3 micro"):
        trainer(new_model(spoken), speech, tmp_path, TrainConfig(batch_size=2, accumulate=3))
    assert not (tmp_path / "config.json").exists()


def test_steps_are_those_of_batches_by_seconds(spoken, speech, tmp_path):
    config = TrainConfig(epochs=2, batch_seconds=4.0, max_seconds=0.9, log_every=1)
    run = trainer(new_model(spoken), speech, tmp_path, config)
    kept = [utterance for utterance in spoken if utterance.duration <= 0.9]
    assert 0 < sum(run.plan.sizes) == len(kept) < len(spoken)
    run.run()
    assert run.step == run.total_steps == 2 * len(run.plan.sizes)
    assert len(losses(tmp_path)) == run.total_steps
    sizes = [len(batch) for batch in run.plan.epoch(0)]
    assert len(set(sizes)) > 1
    assert {run.plan.divisor(batch) for batch in run.plan.epoch(0)} == {sum(sizes) / len(sizes)}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("architecture", ["recurrent", "conformer"])
def test_bfloat16_on_the_cpu_is_near_float32(spoken, speech, tmp_path, architecture, quantized):
    made = tones.recognizer(spoken, dropout=0.0)
    if architecture == "conformer":
        sizes = dict(encoder_layers=1, encoder_size=32, channels=4, dropout=0.0)
        made.model = model_of(ConformerConfig.preset("tiny", made.tokenizer.vocab_size, **sizes))
    if quantized:
        made.prepare(gq.GQConfig(bits=4))
    settings = dict(epochs=1, batch_size=6, ctc_weight=0.3, log_every=1, freq_masks=0, time_masks=0)

    def history(precision):
        config = TrainConfig(**settings, precision=precision)
        run = trainer(copy.deepcopy(made.model), speech, tmp_path / precision, config)
        dtypes = []
        run.model.joint.encoder.register_forward_hook(lambda module, arguments, output: dtypes.append(output.dtype))
        run.run()
        assert set(dtypes) == {getattr(torch, run.config.precision)}
        assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
        assert json.loads((run.output / "config.json").read_text())["train"]["precision"] == run.config.precision
        return losses(run.output)

    exact, near = history("float32"), history("bfloat16")
    assert near == pytest.approx(exact, rel=0.05)
    assert near != exact


def test_the_precision_follows_the_device_unless_it_is_said(spoken, speech, tmp_path):
    run = trainer(new_model(spoken), speech, tmp_path)
    assert run.config.precision == ("bfloat16" if run.device.type == "cuda" else "float32")


def test_both_encoders_of_a_bifocal_model_learn(speech, spoken, tmp_path):
    small = dict(small_encoder_layers=2, small_encoder_hidden=8)
    learnt = {}
    for share in (0.0, 1.0):
        model = tones.recognizer(spoken, **small).model
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        config = TrainConfig(epochs=1, batch_size=4, wake_share=share, weight_decay=0.0)
        trainer(model, speech, tmp_path / str(share), config).run()
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        learnt[share] = {name.split(".")[1] for name in moved if name.startswith("encoder")}
    assert learnt == {0.0: {"large"}, 1.0: {"small", "large", "widen"}}


@pytest.mark.parametrize("predictor_layers", [1, 0], ids=["transducer", "CTC"])
def test_a_conformer_learns(spoken, speech, tmp_path, predictor_layers):
    sizes = dict(encoder_layers=1, encoder_size=32, channels=4, predictor_layers=predictor_layers)
    torch.manual_seed(0)
    model = model_of(ConformerConfig.preset("tiny", tones.recognizer(spoken).tokenizer.vocab_size, **sizes))
    config = TrainConfig(epochs=10, batch_size=4, learning_rate=5e-3, ctc_weight=0.3, log_every=1, freq_masks=0)
    trainer(model, speech, tmp_path, config).run()
    history = losses(tmp_path)
    assert sum(history[-3:]) < 0.7 * sum(history[:3])
