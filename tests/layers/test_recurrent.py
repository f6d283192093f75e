import copy
import itertools
import threading

import pytest
import torch
from quantized import convert, hard_weights, prepare, same
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gq_triton as gq
from gq_triton import functional as F

SURFACE = [
    dict(zip(("num_layers", "bidirectional", "batch_first", "bias"), values, strict=True))
    for values in itertools.product((1, 2), (False, True), (False, True), (False, True))
]
KINDS = [
    *((nn.LSTM, options) for options in SURFACE),
    *((nn.GRU, options) for options in SURFACE),
    *((nn.LSTM, {"proj_size": 4, **options}) for options in SURFACE if options["bias"] or not options["bidirectional"]),
]


def states(layer, batch=(3,)):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, *batch, layer.proj_size or layer.hidden_size)
    return (h, torch.randn(count, *batch, layer.hidden_size)) if isinstance(layer, nn.LSTM) else h


def check(prepared, twin, *inputs):
    expected = twin(*inputs)
    for model in (prepared, convert(prepared)):
        output, final = model(*inputs)
        same(output, expected[0])
        same(final, expected[1])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_whole_surface(kind, options):
    prepared, twin = prepare(kind(5, 7, **options), bits=3)
    x = torch.randn(3, 6, 5) if prepared.batch_first else torch.randn(6, 3, 5)
    check(prepared, twin, x)
    check(prepared, twin, x, states(prepared))
    check(prepared, twin, torch.randn(6, 5), states(prepared, ()))
    padded = pack_padded_sequence(x, torch.tensor([2, 6, 4]), prepared.batch_first, enforce_sorted=False)
    expected, finals = twin(padded, states(prepared))[0], twin(padded)[1]
    for model in (prepared, convert(prepared)):
        same(model(padded)[1], finals)
        same(pad_packed_sequence(model(padded)[0]), pad_packed_sequence(twin(padded)[0]))
        assert type(model(padded)[0]) is type(expected)


def test_every_weight_has_its_own_quantizer():
    prepared, _ = prepare(nn.LSTM(5, 7, 2, bidirectional=True, proj_size=4))
    names = {
        f"weight_{kind}_l{layer}{end}" for kind in ("ih", "hh", "hr") for layer in (0, 1) for end in ("", "_reverse")
    }
    assert set(prepared.quantizers()) == names
    assert len({id(q) for q in prepared.quantizers().values()}) == len(names)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gradients_are_those_of_torch_with_the_quantized_weights(kind):
    prepared, twin = prepare(kind(5, 7, 2, bidirectional=True), straight_through=1.0, bits=2)
    x, g = torch.randn(6, 3, 5, requires_grad=True), torch.randn(6, 3, 14)
    (prepared(x)[0] * g).sum().backward()
    dx, x.grad = x.grad, None
    (twin(x)[0] * g).sum().backward()
    same(dx, x.grad)
    for name, parameter in twin.named_parameters():  # the quantizer passes all of the gradient through
        same(getattr(prepared, name).grad, parameter.grad)
    for quantizer in prepared.quantizers().values():
        assert quantizer.log_scale.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_layers_in_training_only(kind):
    prepared, twin = prepare(kind(5, 7, 3, dropout=0.5))
    x = torch.randn(6, 3, 5)
    outputs = []
    for model in (prepared, twin):
        torch.manual_seed(1)
        outputs.append(model.train()(x)[0])
    same(*outputs)
    assert not torch.equal(prepared(x)[0], prepared(x)[0])
    assert torch.equal(prepared.eval()(x)[0], prepared(x)[0])


@pytest.mark.parametrize("packed_sequence", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_activations_are_quantized_at_the_first_layers_input(kind, packed_sequence):
    prepared, twin = prepare(kind(5, 7, 2), activations="int8")
    x = torch.randn(6, 3, 5)
    wrap = (lambda x: pack_padded_sequence(x, [6, 5, 2])) if packed_sequence else lambda x: x
    expected = twin(wrap(F.quantize_activations(x, "int8")))[1]
    for model in (prepared, convert(prepared)):
        same(model(wrap(x))[1], expected)


def test_weights_may_differ_in_configuration_or_stay_float():
    config = {"weight_hh_*": gq.GQConfig(bits=1), "weight_ih_l1": None, "*": gq.GQConfig(bits=6)}
    prepared, twin = prepare(nn.LSTM(5, 7, 2), config)
    assert {name: q.config.bits for name, q in prepared.quantizers().items()} == {
        "weight_hh_l0": 1,
        "weight_hh_l1": 1,
        "weight_ih_l0": 6,
    }
    check(prepared, twin, torch.randn(6, 3, 5))
    assert convert(prepared).weight_ih_l1 is not None


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_training_updates_are_seen_at_once(kind):
    prepared, _ = prepare(kind(5, 7))
    x = torch.randn(6, 3, 5)
    before = prepared(x)[0]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.5)
    before.square().sum().backward()
    optimizer.step()
    twin = kind(5, 7)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(hard_weights(prepared).get(name, getattr(prepared, name)))
    same(prepared(x)[0], twin(x)[0])
    assert not torch.allclose(prepared(x)[0], before)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_layers_hold_no_graph_between_calls_and_copy(kind):
    prepared, _ = prepare(kind(5, 7))
    x = torch.randn(6, 3, 5)
    expected = prepared(x)[0]
    assert all(isinstance(weight, nn.Parameter) for weight in prepared._flat_weights)
    for model in (prepared, convert(prepared)):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x)[0], model(x)[0])
        same(model(x)[0], expected)
        assert all(weight is None or isinstance(weight, nn.Parameter) for weight in model._flat_weights)


def test_threads_may_share_a_packed_layer():
    packed = convert(prepare(nn.LSTM(16, 32))[0])
    x = torch.randn(20, 2, 16)
    expected, results = packed(x)[0], []

    def run():
        for _ in range(10):
            results.append(torch.equal(packed(x)[0], expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_wrong_inputs_get_torchs_errors():
    prepared, _ = prepare(nn.LSTM(5, 7))
    for model in (prepared, convert(prepared)):
        with pytest.raises(RuntimeError, match="input_size"):
            model(torch.randn(6, 3, 4))
        with pytest.raises(ValueError, match="dtype"):
            model(torch.randn(6, 3, 5, dtype=torch.float64))
