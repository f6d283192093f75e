"""The training loss: which way it is computed, and that both ways agree."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gq_triton as gq
from gq_triton.kernels.rnnt_loss import rnnt_loss
from gq_triton.models import CTC, RNNT, RNNTConfig
from gq_triton.training import objective
from gq_triton.training.objective import TransducerObjective, objective_of, transducer_loss

BATCH = dict(
    features=torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0)),
    feature_lengths=torch.tensor([20, 13]),
    targets=torch.tensor([[1, 2, 3], [4, 1, 1]]),
    target_lengths=torch.tensor([3, 1]),
)


class Scaled(nn.Linear):
    """A layer that does more than apply its weight."""

    def forward(self, input):
        return 2 * super().forward(input)


def new_model(device="cpu"):
    torch.manual_seed(0)
    sizes = dict(stack=2, encoder_layers=2, encoder_hidden=12, predictor_embedding=6, predictor_hidden=9, joint=10)
    return RNNT(RNNTConfig(vocab_size=7, features=5, dropout=0.0, **sizes)).to(device)


def plain(model):
    return model


def weights_quantized(model):
    return gq.quantize_(model, gq.GQConfig(bits=3), step="prepare")


def activations_quantized(model):
    return gq.quantize_(model, gq.GQConfig(bits=3, activations="int8"), step="prepare")


def packed(model):
    gq.quantize_(model, {"joint.output": gq.GQConfig(bits=3)}, step="prepare")
    return gq.quantize_(model, step="convert")


def subclassed(model):
    model.joint.output.__class__ = Scaled
    return model


def batch_on(device):
    return {name: tensor.to(device) for name, tensor in BATCH.items()}


def loss_of_all_logits(model, batch):
    lattice = model(batch["features"], batch["feature_lengths"], batch["targets"])
    logits = model.joint.combine(lattice.frames[:, :, None], lattice.positions[:, None])
    return rnnt_loss(logits, batch["targets"], lattice.lengths, batch["target_lengths"], reduction="sum")


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize(
    "variant, fused",
    [(plain, True), (weights_quantized, True), (activations_quantized, False), (packed, False), (subclassed, False)],
)
def test_equals_the_loss_of_all_logits(monkeypatch, device, variant, fused):
    model, batch = variant(new_model(device)), batch_on(device)
    calls = []
    spied = objective.joint_rnnt_loss
    monkeypatch.setattr(objective, "joint_rnnt_loss", lambda *args, **kwargs: calls.append(1) or spied(*args, **kwargs))
    loss = TransducerObjective(model, ctc_weight=0.0)(**batch)
    expected = loss_of_all_logits(model, batch)
    assert len(calls) == fused
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for found, ideal in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(found, ideal, rtol=1e-3, atol=1e-4)


def test_a_plain_output_layer_in_a_quantized_model(device):
    model = gq.quantize_(new_model(device), {"encoder.*": gq.GQConfig(bits=3)}, step="prepare")
    batch = batch_on(device)
    loss = TransducerObjective(model, ctc_weight=0.0)(**batch)
    torch.testing.assert_close(loss, loss_of_all_logits(model, batch), rtol=1e-4, atol=1e-4)


def test_every_weight_is_quantized_once(monkeypatch):
    model = weights_quantized(new_model())
    seen = []
    spied = gq.functional.fake_quantize_group
    monkeypatch.setattr(
        gq.functional,
        "fake_quantize_group",
        lambda weights, *args, **kwargs: seen.extend(map(id, weights)) or spied(weights, *args, **kwargs),
    )
    TransducerObjective(model, ctc_weight=0.3)(**BATCH).backward()
    assert id(model.joint.output.weight) in seen
    assert len(seen) == len(set(seen))
    assert model.joint.output.weight_quantizer.log_scale.grad.any()


@pytest.mark.parametrize("variant", [plain, weights_quantized])
def test_under_autocast(device, variant):
    model, batch = variant(new_model(device)), batch_on(device)
    exact = TransducerObjective(model, ctc_weight=0.3)
    expected = exact(**batch)
    with torch.autocast(device.type, torch.bfloat16):
        loss = exact(**batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0.0)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in exact.parameters())


def test_under_activation_checkpointing(device):
    model, batch = weights_quantized(new_model(device)), batch_on(device)
    whole = copy.deepcopy(model)

    def loss(network, features):
        lattice = network(features, batch["feature_lengths"], batch["targets"])
        return transducer_loss(network.joint, lattice, batch["targets"], batch["target_lengths"])

    checkpoint(loss, model, batch["features"], use_reentrant=False).backward()
    loss(whole, batch["features"]).backward()
    for found, ideal in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found.grad, ideal.grad)


def test_the_ctc_loss_is_added():
    model = new_model()
    both, alone = TransducerObjective(model, ctc_weight=0.5), TransducerObjective(model, ctc_weight=0.0)
    log_probs = both.ctc(model.encoder(BATCH["features"], BATCH["feature_lengths"])[0]).log_softmax(-1).transpose(0, 1)
    lengths = BATCH["feature_lengths"] // 4, BATCH["target_lengths"]
    ctc = nn.functional.ctc_loss(log_probs, BATCH["targets"], *lengths, reduction="sum", zero_infinity=True)
    assert model.encoder.subsampling == 4 and ctc > 0
    torch.testing.assert_close(both(**BATCH), alone(**BATCH) + 0.5 * ctc)


def test_the_loss_of_a_ctc_model():
    torch.manual_seed(0)
    model = CTC(RNNTConfig(vocab_size=7, features=5, dropout=0.0, encoder_layers=2, predictor_layers=0))
    objective = objective_of(model, ctc_weight=0.3)
    logits, lengths = model(BATCH["features"], BATCH["feature_lengths"])
    terms = [
        nn.functional.ctc_loss(
            row[:count].log_softmax(-1)[:, None], labels[:many][None], count[None], many[None], reduction="sum"
        )
        for row, count, labels, many in zip(logits, lengths, BATCH["targets"], BATCH["target_lengths"], strict=True)
    ]
    loss = objective(**BATCH)
    torch.testing.assert_close(loss, sum(term for term in terms if term.isfinite()))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_reductions():
    model = new_model()
    lattice = model(BATCH["features"], BATCH["feature_lengths"], BATCH["targets"])
    arguments = model.joint, lattice, BATCH["targets"], BATCH["target_lengths"]
    each = transducer_loss(*arguments, reduction="none")
    torch.testing.assert_close(transducer_loss(*arguments), each.sum())
    with pytest.raises(ValueError, match="reduction is 'median'"):
        transducer_loss(*arguments, reduction="median")


@pytest.mark.parametrize("quantize", [plain, weights_quantized, activations_quantized])
def test_a_blank_bonus_is_as_if_the_bias_had_it(quantize):
    """Fused and, where activations are quantized, called as a layer."""
    model = quantize(new_model())
    favoured, unfavoured = (TransducerObjective(model, blank_bonus=bonus)(**BATCH) for bonus in (1.5, 0.0))
    with torch.no_grad():
        model.joint.output.bias[model.blank] += 1.5
    torch.testing.assert_close(favoured, TransducerObjective(model)(**BATCH))
    assert not torch.isclose(favoured, unfavoured)
