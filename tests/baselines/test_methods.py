"""What every rival method must do: be prepared, train, be deployed exactly, and go on after an interruption."""

import copy
import importlib.util

import pytest
import torch
from quantized import hard_weights, packed_weights
from torch import nn
from torch.nn.functional import mse_loss

import gq_triton as gq
from gq_triton.baselines import KMeansConfig, LSQConfig, S8BQATConfig, TorchaoConfig, UniformConfig
from gq_triton.quantizer import quantizer_of

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
EVERYWHERE = [UniformConfig, KMeansConfig, LSQConfig, S8BQATConfig]
METHODS = [*EVERYWHERE, pytest.param(TorchaoConfig, marks=needs_torchao)]
INDEX = torch.arange(14).reshape(2, 7) % 11


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 4)
        nn.init.zeros_(self.head.weight[1])

    def forward(self, index):
        x = self.conv(self.embedding(index).transpose(1, 2)).transpose(1, 2)
        return self.head(self.lstm(x)[0])


def prepared(kind, bits=4, **options):
    """A model prepared by a method; by torchao's, as it offers no more, the linear layer alone."""
    torch.manual_seed(0)
    pattern = "head" if kind is TorchaoConfig else "*"
    return gq.quantize_(Model(), {pattern: kind(bits=bits, **options)})


class Training:
    """Ten steps at most, each of which sees the same data."""

    def __init__(self, model) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(gq.param_groups(model, lr=1e-2, weight_decay=1e-2))
        self.annealer = gq.Annealer(model, total_steps=10)

    def step(self) -> float:
        loss = mse_loss(self.model(INDEX), torch.linspace(-1, 1, 56).view(2, 7, 4))
        self.optimizer.zero_grad()
        (loss + gq.penalty(self.model)).backward()
        self.optimizer.step()
        self.annealer.step()
        return loss.item()


def widths(kind):
    fewer = {TorchaoConfig: (4, 8), KMeansConfig: (1, 2, 5, 8), S8BQATConfig: (1, 3)}  # the latter's grids are k-means'
    return fewer.get(kind, range(1, 9))


def assert_deployed_exactly(model, atol=1e-5):
    model.eval()
    expected, output = hard_weights(model), model(INDEX)
    packed = gq.quantize_(copy.deepcopy(model), step="convert")
    decoded = packed_weights(packed)
    assert decoded.keys() == expected.keys()
    for name, weight in decoded.items():
        assert torch.equal(weight, expected[name]), name
    torch.testing.assert_close(packed(INDEX), output, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", METHODS)
def test_trained_weights_are_deployed_exactly_at_every_width(kind):
    for bits in widths(kind):
        training = Training(prepared(kind, bits))
        assert_deployed_exactly(training.model)
        for _ in range(2):
            training.model.train()
            training.step()
        assert_deployed_exactly(training.model)


@pytest.mark.parametrize("codebook", ["int8", "fp8"])
@pytest.mark.parametrize("kind", EVERYWHERE)
def test_stored_codebooks_are_deployed_exactly(kind, codebook):
    for bits in (3, 8) if kind in (UniformConfig, LSQConfig) else (3,):
        training = Training(prepared(kind, bits, codebook=codebook, activations="int8"))
        training.step()
        assert_deployed_exactly(training.model, atol=5e-3)  # training does not see the rounding within the LSTM


@pytest.mark.parametrize("kind", METHODS)
def test_training_computes_with_what_is_deployed(kind):
    model = prepared(kind)
    for layer in model.children():
        for name, quantizer in layer.quantizers().items() if hasattr(layer, "quantizers") else ():
            weight = layer.get_parameter(name)
            trained = weight if kind is S8BQATConfig else quantizer.eval()(weight)  # which computes with float weights
            assert torch.equal(quantizer.train()(weight), trained)
            assert quantizer(weight, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", METHODS)
def test_training_lowers_the_loss_and_reaches_every_parameter(kind):
    training = Training(prepared(kind))
    first = training.step()
    missing = [name for name, parameter in training.model.named_parameters() if parameter.grad is None]
    assert not missing, "DistributedDataParallel waits for every gradient"
    for _ in range(9):
        last = training.step()
    assert last < first


@pytest.mark.parametrize("kind", METHODS)
def test_zero_channels_stay_zero(kind):
    training = Training(prepared(kind))
    assert not hard_weights(training.model)["head.weight"][1].any()
    for _ in range(2):
        training.step()
    channel = packed_weights(gq.quantize_(training.model, step="convert"))["head.weight"][1]
    assert channel.isfinite().all()
    if kind is not TorchaoConfig:  # whose scale is that of the weight, at every step
        assert not channel.any()


@pytest.mark.parametrize("kind", METHODS)
def test_an_interrupted_run_ends_with_the_same_weights(kind):
    options = {"compress_every": 3} if kind is S8BQATConfig else {}
    whole = Training(prepared(kind, **options))
    for _ in range(4):
        whole.step()
    broken, resumed = (Training(prepared(kind, **options)) for _ in range(2))
    for _ in range(2):
        broken.step()
    resumed.model.load_state_dict(broken.model.state_dict())
    resumed.optimizer.load_state_dict(broken.optimizer.state_dict())
    resumed.annealer.load_state_dict(broken.annealer.state_dict())
    for _ in range(2):
        resumed.step()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", METHODS)
def test_files_and_reports(kind, tmp_path):
    model = gq.quantize_(prepared(kind).eval(), step="convert")
    gq.save_packed(model, tmp_path / "model.safetensors")
    loaded = gq.load_packed(Model().eval(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(INDEX), model(INDEX))
    assert loaded.head.weight_packed.config == kind(bits=4)
    (before,), (after,) = (
        [row for row in gq.report(each).rows if row.name == "head.weight"] for each in (prepared(kind), loaded)
    )
    assert (before.bits, before.packed_bytes, before.sqnr_db) == (4, after.packed_bytes, after.sqnr_db)


def test_methods_may_be_mixed():
    torch.manual_seed(0)
    config = {
        "embedding": None,
        "conv": KMeansConfig(bits=3),
        "lstm.weight_ih*": gq.GQConfig(bits=2),
        "lstm": LSQConfig(bits=5),
        "head": S8BQATConfig(bits=4, codebook="int8"),
    }
    training = Training(gq.quantize_(Model(), config))
    training.step()
    assert_deployed_exactly(training.model)


@pytest.mark.parametrize("kind", METHODS)
def test_float_checkpoints_are_fitted_as_they_are_loaded(kind):
    model, other = prepared(kind), Model()
    model.load_state_dict(other.state_dict())
    gq.quantize_(other, {"head" if kind is TorchaoConfig else "*": kind()})
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", METHODS)
def test_weights_that_cannot_be_fitted(kind):
    for weight, message in (
        (torch.full((3, 4), torch.nan), "must be finite"),
        (torch.zeros(2, 4), "has 2 channels where the quantizer has 3"),
        (torch.zeros(3, 0), "must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            quantizer_of(kind(), 3).fit(weight)


@pytest.mark.parametrize("kind", METHODS)
def test_weights_that_are_not_finite_are_seen_in_the_output(kind):
    quantizer = quantizer_of(kind(), 2)
    quantizer.fit(torch.randn(2, 6))
    weight = torch.ones(2, 6)
    weight[0, 3] = torch.nan
    assert quantizer(weight).isnan().any()


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_weights_magnitude_does_not_matter(kind, size):
    weight = torch.randn(4, 60)
    quantizer = quantizer_of(kind(), 4).eval()
    quantizer.fit(size * weight)
    quantizer.update((size * weight).requires_grad_(), 1)
    relative = (quantizer(size * weight) / size - weight).norm() / weight.norm()
    assert relative < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", METHODS)
def test_half_precision_weights_are_deployed_exactly(kind, dtype):
    layer = nn.Sequential(nn.Linear(9, 5)).to(dtype)
    gq.quantize_(layer, kind())
    assert layer[0].weight_quantizer(layer[0].weight).dtype == dtype
    expected = hard_weights(layer)["0.weight"]
    assert torch.equal(packed_weights(gq.quantize_(layer, step="convert"))["0.weight"], expected)


def test_layers_that_training_passes_by_are_named():
    model = gq.quantize_(Model(), UniformConfig())
    model.conv(torch.randn(1, 6, 4))
    with pytest.warns(UserWarning, match=r"^embedding.weight, lstm.weight_ih_l0, .*: trained without its layer"):
        gq.quantize_(model, step="convert")
