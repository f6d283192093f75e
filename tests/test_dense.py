"""Dense copies of packed weights: used where they are faster, never saved, always those of the codes."""

import copy

import pytest
import torch
from quantized import Operations, convert, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton.layers import base

LAYERS = {
    "Linear": (lambda: nn.Linear(9, 6), (4, 9)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), (5, 2, 8)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 9)),
    "pointwise Conv1d": (lambda: nn.Conv1d(6, 4, 1), (2, 6, 9)),
    "depthwise Conv1d": (lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, (2, 3)), (2, 3, 5, 6)),
}


def packed(make=lambda: nn.Linear(9, 6), **options):
    return convert(prepare(make().eval(), **options)[0])


def weights(model):
    layers = [module for module in model.modules() if isinstance(module, base.PackedLayer)]
    return [weight for layer in layers for weight in layer.packed_weights().values()]


def run(model, x):
    """The output, and how many of the packed operators were run."""
    with Operations() as operations:
        out = model(x, x, x)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
    return out, sum(count for name, count in operations.counts.items() if name.startswith("packed_"))


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_dense_copy_computes_the_same_without_decoding(kind, activations, device, monkeypatch):
    monkeypatch.setattr(base, "prefers_dense", lambda *sizes: True)
    make, shape = LAYERS[kind]
    model, x = packed(make, activations=activations).to(device), torch.randn(shape, device=device)
    expected, _ = run(model, x)
    assert gq.allow_dense(model) is model
    assert all(torch.equal(weight.dense, weight.decode()) for weight in weights(model))
    actual, calls = run(model, x)
    # A quantized activation may round the other way where the sums before it were taken in another order.
    same(actual, expected, atol=2e-6 + 1e-2 * (kind == "MultiheadAttention" and activations is not None))
    assert calls == 0


def test_codes_are_read_where_they_are_faster(monkeypatch):
    model, x = gq.allow_dense(packed()), torch.randn(4, 9)
    asked = []
    monkeypatch.setattr(base, "prefers_dense", lambda *sizes: asked.append(sizes))
    assert run(model, x)[1] == 1
    assert asked == [(4, "none", torch.device("cpu"))]


def test_inputs_of_another_dtype_read_the_codes():
    out, calls = run(gq.allow_dense(packed(lambda: nn.Linear(9, 6, bias=False))), torch.randn(4, 9).bfloat16())
    assert (out.dtype, calls) == (torch.bfloat16, 1)


def test_copies_can_be_dropped():
    model = gq.allow_dense(gq.allow_dense(packed()), False)
    assert model.weight_packed.dense is None
    assert run(model, torch.randn(2, 9))[1] == 1


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4), nn.LSTM(4, 3), nn.GRU(4, 3)])
def test_layers_without_a_use_for_copies_get_none(layer):
    model = gq.allow_dense(packed(lambda: layer))
    assert weights(model)
    assert all(weight.dense is None for weight in weights(model))


def test_a_part_of_a_model():
    model = packed(lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    gq.allow_dense(model[1])
    assert [weight.dense is not None for weight in weights(model)] == [False, True]


def test_a_shared_weight_has_one_copy():
    def tied():
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
        model[1].weight = model[0].weight
        return model

    model = gq.allow_dense(packed(tied))
    assert model[0].weight_packed is model[1].weight_packed
    assert gq.report(model).dense_bytes == 4 * 28


def test_copies_follow_dtype_and_values():
    model = gq.allow_dense(packed())
    exact = model.weight_packed.decode()
    model.bfloat16()
    assert torch.equal(model.weight_packed.dense, exact.bfloat16())
    assert torch.equal(model.float().weight_packed.dense, exact)
    other = packed()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.weight_packed.dense, other.weight_packed.decode())
    assert not torch.equal(model.weight_packed.dense, exact)
    model.load_state_dict(packed().state_dict(), assign=True)
    assert torch.equal(model.weight_packed.dense, model.weight_packed.decode())
    assert torch.equal(copy.deepcopy(model).weight_packed.dense, model.weight_packed.dense)


def test_copies_are_not_saved(tmp_path):
    model = packed()
    names, x = model.state_dict().keys(), torch.randn(2, 9)
    gq.save_packed(model, tmp_path / "without.safetensors")
    gq.save_packed(gq.allow_dense(model), tmp_path / "with.safetensors")
    assert model.state_dict().keys() == names
    assert (tmp_path / "with.safetensors").read_bytes() == (tmp_path / "without.safetensors").read_bytes()
    loaded = gq.load_packed(nn.Linear(9, 6), tmp_path / "with.safetensors")
    assert loaded.weight_packed.dense is None
    same(loaded(x), model(x))


def test_gradients_pass_through_copies():
    plain, model = packed(), None
    model, x = gq.allow_dense(copy.deepcopy(plain)), torch.randn(4, 9)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for each, input in zip((plain, model), inputs, strict=True):
        each(input).square().sum().backward()
    same(inputs[0].grad, inputs[1].grad)
    same(plain.bias.grad, model.bias.grad)
    assert not model.weight_packed.dense.requires_grad


def test_reports_tell():
    model = packed(lambda: nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 2)))
    before = gq.report(model)
    gq.allow_dense(model[0])
    report = gq.report(model)
    assert (before.dense_bytes, report.dense_bytes) == (0, 4 * 1200)
    assert report.bytes == before.bytes + 4 * 1200
    assert (report.packed_bytes, report.ratio) == (before.packed_bytes, before.ratio)
    assert [row.dense_bytes for row in report.rows if row.bits < 32] == [4800, 0]
    assert report.to_dict()["dense_bytes"] == 4800
    head, *lines = str(report).splitlines()
    assert "dense" in head.split()
    assert [line.split()[0] for line in lines if " 4,800 " in line] == ["0.weight", "total"]


def test_dense_copies_compile_without_graph_breaks():
    model = gq.allow_dense(packed(lambda: nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4))))
    x = torch.randn(4, 9)
    same(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_what_cannot_have_copies_is_refused():
    with pytest.raises(ValueError, match="model has no packed layer: prepare and convert"):
        gq.allow_dense(nn.Linear(3, 2))
    model = packed()
    model.weight_packed.scale.requires_grad_()
    with pytest.raises(ValueError, match="scale or codebook requires a gradient"):
        gq.allow_dense(model)
    assert model.weight_packed.dense is None
    gq.allow_dense(model, False)
