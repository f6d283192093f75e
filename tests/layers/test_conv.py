import pytest
import torch
from quantized import Operations, convert, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton import functional as F

OPTIONS = [
    {},
    {"bias": False, "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid", "groups": 2},
    {"groups": 6, "padding": "same", "dilation": 2},  # depthwise
    {"groups": 6, "stride": 2, "padding": 3},
    {"groups": 6, "padding": 1, "padding_mode": "circular"},
    {"groups": 6, "kernel_size": 4, "padding": "same", "bias": False},  # one more behind than before
    {"groups": 6, "kernel_size": 4, "padding": "same", "padding_mode": "reflect", "dilation": 2},
    {"groups": 6, "kernel_size": 1, "padding": "valid"},
    {"kernel_size": 1},  # pointwise
    {"kernel_size": 1, "padding": "same", "padding_mode": "reflect", "dilation": 2, "bias": False},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate", "groups": 3},
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_every_option(dims, options, batched):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    prepared, twin = prepare(kind(6, 12, **({"kernel_size": 3} | options)), bits=3)
    x = torch.randn(*[2] * batched, 6, *[8] * dims)
    same(prepared(x), twin(x))
    same(convert(prepared)(x), twin(x))


@pytest.mark.parametrize("options", [{}, {"kernel_size": 1}, {"groups": 6}])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
def test_activations_are_quantized_over_the_channels(dims, batched, options):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    prepared, twin = prepare(kind(6, 12, **({"kernel_size": 3} | options)), activations="int8")
    x = torch.randn(*[2] * batched, 6, *[5] * dims)
    channel = int(batched)
    expected = twin(F.quantize_activations(x.movedim(channel, -1), "int8").movedim(-1, channel))
    same(prepared(x), expected)
    same(convert(prepared)(x), expected)


def test_gradients_reach_weight_bias_and_input():
    prepared, _ = prepare(nn.Conv1d(6, 12, 3, groups=3), bits=2)
    x = torch.randn(2, 6, 9, requires_grad=True)
    prepared(x).square().sum().backward()
    for tensor in (x, *prepared.parameters()):
        assert tensor.grad.abs().sum() > 0


# --- packed -----------------------------------------------------------------------------------------------------------

PATHS = {
    "pointwise 1-D": (lambda: nn.Conv1d(6, 9, 1), (2, 6, 8), "packed_linear"),
    "pointwise 2-D": (lambda: nn.Conv2d(6, 9, 1), (2, 6, 4, 5), "packed_linear"),
    "depthwise 1-D": (lambda: nn.Conv1d(6, 6, 5, groups=6, padding="same"), (2, 6, 8), "packed_depthwise_conv1d"),
    "depthwise 2-D": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 4, 5), None),
    "strided": (lambda: nn.Conv1d(6, 9, 1, stride=2), (2, 6, 8), None),
    "grouped": (lambda: nn.Conv1d(6, 9, 3, groups=3), (2, 6, 8), None),
}
OURS = ("packed_linear", "packed_depthwise_conv1d")


def operators(graph):
    """Our operators in a graph, one entry a call."""
    names = [str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function"]
    return [name[1] for name in names if name[0] == "gq_triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_decoded_convolution(path, codebook, dtype, device):
    make, shape, operator = PATHS[path]
    packed, x = convert(prepare(make(), bits=3, codebook=codebook)[0]).to(device, dtype), torch.randn(shape)
    x = x.to(device, dtype)
    with Operations() as operations:
        y = packed(x)
    assert [name for name in OURS for _ in range(operations.counts[name])] == [operator] * (operator is not None)
    expected = packed._conv_forward(x.float(), packed.weight_packed.decode().float(), packed.bias.float())
    step = 2e-6 if dtype == torch.float32 else 3e-2
    same(y.float(), expected, atol=step, rtol=step)
    assert y.dtype == dtype


def test_a_dense_copy_takes_the_place_of_the_depthwise_kernel():
    make, shape, _ = PATHS["depthwise 1-D"]
    packed, x = convert(prepare(make())[0]), torch.randn(shape)
    expected = packed(x)
    with Operations() as operations:
        same(gq.allow_dense(packed)(x), expected)
    assert not operations.counts["packed_depthwise_conv1d"]


@pytest.mark.parametrize("adjacent", [True, False])
def test_outputs_are_laid_out_as_inputs(adjacent):
    """Where channels are adjacent, no layer of a convolution module has to copy the output of the one before."""
    convolutions = [nn.Conv1d(6, 8, 1), nn.Conv1d(8, 8, 3, groups=8, padding=1), nn.Conv1d(8, 6, 1)]
    packed = convert(prepare(nn.Sequential(*convolutions))[0])
    x = torch.randn(2, 9, 6).movedim(1, 2) if adjacent else torch.randn(2, 6, 9)
    for layer in packed:
        x = layer(x)
        assert (x.movedim(1, 2) if adjacent else x).is_contiguous()


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_outputs_may_be_changed_in_place(path, adjacent, cpu_kernels):
    make, shape, _ = PATHS[path]
    packed, x = convert(prepare(make())[0]), torch.randn(shape)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if adjacent else x
    expected = torch.relu(packed(x))
    same(torch.relu_(packed(x)), expected)
    with torch.no_grad():
        same(torch.relu_(packed(x)), expected)


@pytest.mark.parametrize("path", PATHS)
def test_packed_gradients(path):
    make, shape, _ = PATHS[path]
    prepared, twin = prepare(make())
    packed, inputs = convert(prepared), [torch.randn(shape).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    for layer, x in zip((packed, twin), inputs, strict=True):
        layer(x).square().sum().backward()
    same(inputs[0].grad, inputs[1].grad, atol=1e-5)
    same(packed.bias.grad, twin.bias.grad, atol=1e-5)


@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("path", PATHS)
def test_compiles_without_graph_breaks(path, activations, device):
    torch.compiler.reset()
    make, shape, _ = PATHS[path]
    packed = convert(prepare(make(), activations=activations)[0]).to(device)
    compiled, x = torch.compile(packed, backend="aot_eager", fullgraph=True), torch.randn(shape, device=device)
    same(compiled(x), packed(x))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(packed(x).square().sum(), x)
    same(torch.autograd.grad(compiled(x).square().sum(), x)[0], grad, atol=1e-5)


@pytest.mark.parametrize("path", [name for name, (_, _, operator) in PATHS.items() if operator])
def test_exports_one_operator(path, device):
    make, shape, operator = PATHS[path]
    packed, x = convert(prepare(make().eval())[0]).to(device), torch.randn(shape, device=device)
    dynamic = ({0: torch.export.Dim("batch"), len(shape) - 1: torch.export.Dim("time")},)
    program = torch.export.export(packed, (x,), dynamic_shapes=dynamic)
    assert operators(program.graph_module) == [operator]
    longer = torch.randn(3, *shape[1:-1], 13, device=device)
    same(program.module()(longer), packed(longer))
