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
from gq_triton.kernels.packed_recurrent import reference

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
    return (h, torch.randn(count, *batch, layer.hidden_size)) if layer.mode == "LSTM" else h


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
def test_training_quantizes_activations_at_the_first_layers_input(kind, packed_sequence):
    prepared, twin = prepare(kind(5, 7, 2), activations="int8")
    x = torch.randn(6, 3, 5)
    wrap = (lambda x: pack_padded_sequence(x, [6, 5, 2])) if packed_sequence else lambda x: x
    same(prepared(wrap(x))[1], twin(wrap(F.quantize_activations(x, "int8")))[1])


@pytest.mark.parametrize("left_float", [None, "weight_ih_l1", "weight_hh_l0_reverse"])
@pytest.mark.parametrize(
    ("kind", "options"), [(nn.LSTM, {"proj_size": 4}), (nn.LSTM, {"bidirectional": True}), (nn.GRU, {})]
)
def test_packed_layers_quantize_what_each_packed_weight_multiplies(kind, options, left_float):
    config = {left_float: None} if left_float else {}
    prepared, twin = prepare(kind(5, 7, 2, **options), {**config, "*": gq.GQConfig(bits=4, activations="int8")})
    packed, x, first = convert(prepared), torch.randn(6, 3, 5), states(prepared)
    output, final = packed(x, first)
    expected, finals = x, []
    for layer in range(2):
        outputs = []
        for end in ("", "_reverse")[: 2 if twin.bidirectional else 1]:
            h = [state[len(finals)] for state in (first if kind is nn.LSTM else [first])]
            names = [f"weight_{name}_l{layer}{end}" for name in ("ih", "hh", "hr")[: 3 if twin.proj_size else 2]]
            biases = [getattr(twin, f"bias_{name}_l{layer}{end}") for name in ("ih", "hh")]
            kinds = ["int8" if f"{name}_packed" in packed._modules else "none" for name in names]
            weights = [getattr(twin, name) for name in names]
            out, *last = reference(expected, None, h, weights, biases, bool(end), kinds)
            outputs.append(out)
            finals.append(last)
        expected = torch.cat(outputs, -1).float()
    same(output, expected, atol=1e-5)
    same(final[0] if kind is nn.LSTM else final, torch.stack([last[0] for last in finals]).float(), atol=1e-5)


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


ERRORS = {
    "features": (lambda x, h: (x[..., :4], h), RuntimeError, r"input_size\. Expected 5, got 4"),
    "dtype": (lambda x, h: (x.double(), h), ValueError, r"input dtype \(torch.float64\) does not match weight dtype"),
    "dimensions": (lambda x, h: (x[None], h), ValueError, "Expected input to be 2D or 3D, got 4D"),
    "unbatched states": (lambda x, h: (x, h[:, 0]), RuntimeError, r"For batched 3-D input, .* 3-D"),
    "batched states": (lambda x, h: (x[:, 0], h), RuntimeError, r"For unbatched 2-D input, .* 2-D"),
    "batch": (lambda x, h: (x, h[:, :2]), RuntimeError, r"Expected hidden.* size \(1, 3, 7\), got \[1, 2, 7\]"),
    "hidden size": (lambda x, h: (x, h[..., 1:]), RuntimeError, r"Expected hidden.* size \(1, 3, 7\), got \[1, 3, 6\]"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_wrong_inputs_get_torchs_errors(kind, error):
    change, exception, message = ERRORS[error]
    x, h = change(torch.randn(6, 3, 5), torch.randn(1, 3, 7))
    prepared, _ = prepare(kind(5, 7))
    for model in (prepared, convert(prepared)):
        with pytest.raises(exception, match=message):
            model(x, (h, h) if kind is nn.LSTM else h)


def test_wrong_packed_sequences_and_cells_get_torchs_errors():
    packed = convert(prepare(nn.LSTM(5, 7))[0])
    h = torch.randn(1, 3, 7)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 7\), got \[1, 3, 6\]"):
        packed(torch.randn(6, 3, 5), (h, h[..., 1:]))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        packed(pack_padded_sequence(torch.randn(6, 3, 5, 1), [6, 5, 2]))
    with pytest.raises(ValueError, match="x must have shape .* with T > 0"):
        packed(torch.randn(0, 3, 5))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_gradients_of_packed_layers_are_those_of_torch_with_the_same_weights(kind, options):
    prepared, twin = prepare(kind(5, 7, **options))
    packed = convert(prepared)
    x, first = torch.randn(6, 3, 5), states(packed)
    gradients = []
    for model in (packed, twin):
        leaves = [x.clone().requires_grad_(), *(p for name, p in model.named_parameters() if name.startswith("bias"))]
        output, final = model(pack_padded_sequence(leaves[0], [6, 4, 4]), first)
        ((output.data**2).sum() + sum(state.sum() for state in final)).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_an_adapter_below_a_packed_layer_can_be_trained():
    packed = convert(prepare(nn.GRU(5, 7))[0]).requires_grad_(False)
    adapter = nn.Linear(5, 5)
    packed(adapter(torch.randn(6, 3, 5)))[0].square().sum().backward()
    assert adapter.weight.grad.abs().sum() > 0


def test_dropout_of_a_packed_layer():
    prepared, _ = prepare(nn.LSTM(5, 7, 3, dropout=0.5))
    packed, x = convert(prepared), torch.randn(6, 3, 5)
    outputs = []
    for model in (packed.train(), prepared):
        torch.manual_seed(1)
        outputs.append(model(x)[0])
    same(*outputs)
    assert not torch.equal(packed(x)[0], packed(x)[0])


def test_an_empty_batch():
    packed = convert(prepare(nn.LSTM(5, 7, batch_first=True))[0])
    output, (h, c) = packed(torch.randn(0, 6, 5))
    assert output.shape == (0, 6, 7)
    assert h.shape == c.shape == (1, 0, 7)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_under_autocast_a_packed_layer_computes_in_the_dtype_of_its_input(kind):
    packed = convert(prepare(kind(5, 7))[0])
    x = torch.randn(6, 3, 5)
    expected = packed(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x)[0], expected)
        output = packed(x.bfloat16(), states(packed))[0]
    assert output.dtype == torch.bfloat16


def operators(graph):
    """How often a graph calls the recurrent operator, and whether it calls another kernel of that kind."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return sum("packed_recurrent" in target for target in targets), any("lstm" in target for target in targets)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_compiled_without_breaks_and_with_an_operator_for_each_layer_and_direction(kind):
    packed = convert(prepare(kind(5, 7, 2, bidirectional=True, batch_first=True), activations="int8")[0])
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    compiled = torch.compile(packed, fullgraph=True, backend=backend)
    for lengths in (6, 9):
        x, first = torch.randn(3, lengths, 5), states(packed)
        same(compiled(x, first), packed(x, first))
    assert all(operators(graph) == (4, False) for graph in graphs)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_compiled_gradients(kind):
    packed = convert(prepare(kind(5, 7))[0])
    x = torch.randn(6, 3, 5)
    gradients = []
    for model in (packed, torch.compile(packed, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        model(leaf)[0].square().sum().backward()
        gradients.append(leaf.grad)
    same(*gradients)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_exported_with_an_operator_for_each_layer_and_direction(kind):
    packed = convert(prepare(kind(5, 7, 2, bidirectional=True))[0]).eval()
    x, first = torch.randn(6, 3, 5), states(packed)
    steps, fixed = {0: torch.export.Dim("steps", min=2, max=50)}, (None, None) if kind is nn.LSTM else None
    exported = torch.export.export(packed, (x, first), dynamic_shapes=(steps, fixed))
    assert operators(exported.graph) == (4, False)
    for inputs in ((x, first), (torch.randn(9, 3, 5), first)):
        same(exported.module()(*inputs), packed(*inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_cuda_graphs_capture_a_packed_layer(kind):
    packed = convert(prepare(kind(5, 40, 2, bidirectional=True))[0]).cuda().eval()
    x = torch.randn(1, 3, 5, device="cuda")
    with torch.no_grad():
        packed(x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = packed(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        same(captured, packed(x), atol=0, rtol=0)
