import copy

import pytest
import torch
from quantized import convert, prepare, same
from torch import nn
from torch.nn import functional as tF

import gq_triton as gq
from gq_triton import functional as F


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 9), (2, 3, 9), (0, 9)])
def test_any_leading_dimensions(shape, bias):
    prepared, twin = prepare(nn.Linear(9, 5, bias=bias), bits=3)
    x = torch.randn(shape)
    same(prepared(x), twin(x))
    same(convert(prepared)(x), twin(x))


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_activations_are_quantized_per_token(activations):
    prepared, twin = prepare(nn.Linear(9, 5), activations=activations)
    x = torch.randn(4, 9) * torch.tensor([[1e-3], [1.0], [1e3], [0.0]])
    expected = twin(F.quantize_activations(x, activations))
    assert torch.equal(prepared(x), expected)
    assert not torch.allclose(expected, twin(x), rtol=1e-4)
    same(convert(prepared)(x), expected, atol=1e-3)


def test_gradients_are_those_of_the_functional_form():
    layer = nn.Linear(9, 5)
    weight = layer.weight.detach().clone().requires_grad_()
    prepared, _ = prepare(layer, bits=2, mu=3.0, straight_through=0.25)
    x, g = torch.randn(4, 9), torch.randn(4, 5)
    (prepared(x) * g).sum().backward()
    q = prepared.weight_quantizer
    scale = q.scale().detach().requires_grad_()
    quantized = F.fake_quantize(
        weight, scale, q.centroids().detach(), mu=3.0, hardness=q.hardness, straight_through=0.25
    )
    (tF.linear(x, quantized, layer.bias.detach()) * g).sum().backward()
    same(prepared.weight.grad, weight.grad)
    same(prepared.bias.grad, g.sum(0))
    same(q.log_scale.grad, scale.grad * scale.detach())


@pytest.mark.parametrize("options", [{}, {"forward": "soft"}, {"activations": "int8", "learn_mu": True}])
def test_prepared_layers_compile_without_graph_breaks(options):
    prepared, _ = prepare(nn.Linear(9, 5), bits=3, **options)
    eager = copy.deepcopy(prepared)
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True)
    for hardness in (2.0, 5.0):
        prepared.weight_quantizer.hardness.fill_(hardness)
        eager.weight_quantizer.hardness.fill_(hardness)
        x = torch.randn(4, 9)
        compiled(x).square().sum().backward()
        eager(x).square().sum().backward()
        same(compiled(x), eager(x))
    for mine, other in zip(prepared.parameters(), eager.parameters(), strict=True):
        same(mine.grad, other.grad)


@pytest.mark.parametrize("grad", [False, True])
def test_packed_layers_compile_without_graph_breaks(grad):
    packed = convert(prepare(nn.Linear(9, 5), bits=3)[0])
    x = torch.randn(4, 9)
    with torch.set_grad_enabled(grad):
        same(torch.compile(packed, backend="aot_eager", fullgraph=True)(x), packed(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_through_packed_layers(dtype):
    prepared, twin = prepare(nn.Linear(9, 5), bits=3)
    packed, twin = convert(prepared).to(dtype), twin.to(dtype)
    x = torch.randn(2, 4, 9, dtype=dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, input in zip((packed, twin), inputs, strict=True):
        layer(input).square().sum().backward()
    tolerance = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {}
    same(inputs[0].grad, inputs[1].grad, **tolerance)
    same(packed.bias.grad, twin.bias.grad, **tolerance)


def test_changed_hardness_does_not_recompile():
    prepared, _ = prepare(nn.Linear(9, 5))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(prepared, backend=backend, fullgraph=True)
    annealer = gq.Annealer(prepared, 5)
    for _ in range(4):
        compiled(torch.randn(4, 9)).sum().backward()
        annealer.step()
    assert len(graphs) == 1


def test_requantization_interval_holds_under_compile():
    eager, _ = prepare(nn.Linear(9, 5), requantize_every=3)
    compiled = copy.deepcopy(eager)
    forward = torch.compile(compiled, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, compiled)]
    for _ in range(5):
        x = torch.randn(4, 9)
        losses = [model(x).square().sum() for model in (eager, forward)]
        same(*losses)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 1)])
def test_packed_layers_follow_autocast(layer, dense):
    """As torch's layers do, whether or not there is a dense copy."""
    x = torch.randn(2, 6, 9)
    packed = gq.allow_dense(convert(prepare(copy.deepcopy(layer), bits=4)[0]), dense)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert packed(x).dtype == layer(x).dtype == torch.bfloat16
        same(packed(x).float(), gq.allow_dense(packed)(x).float(), atol=3e-2)
    assert packed(x).dtype == torch.float32
