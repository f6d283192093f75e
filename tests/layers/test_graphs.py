"""What torch.compile, torch.export and CUDA graphs see of packed layers: one operator each, and no break between."""

import copy
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from quantized import convert, prepare, same
from torch import nn
from torch.fx import GraphModule

import gq_triton as gq


@pytest.fixture(autouse=True)
def fresh():
    """Compilations are counted per function, and a test compiles its own."""
    torch.compiler.reset()


class Block(nn.Module):
    """Attention and a feed-forward network, with what lies between."""

    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


WIDTH, LINEAR_MAPS = 8, 6  # query, key, value and output of attention; up and down


def packed_block(device="cpu", **options):
    return convert(prepare(Block(WIDTH).eval(), gq.GQConfig(bits=3, **options))[0]).to(device)


def operators(graph: GraphModule) -> Counter:
    """How often a graph calls each of our operators."""
    names = [str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function"]
    return Counter(name[1] for name in names if name[0] == "gq_triton")


@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("codebook", ["float", "int8", "fp8"])
def test_compiles_without_graph_breaks(activations, codebook, device):
    block = packed_block(device, activations=activations, codebook=codebook)
    x = torch.randn(2, 5, WIDTH, device=device)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        # A quantized activation may round the other way where the sums before it were taken in another order.
        same(compiled(x), block(x), atol=2e-6 if activations is None else 1e-2)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Embedding"])
def test_other_layers_compile_without_graph_breaks(kind, device):
    layer, x = {
        "Conv1d": (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9)),
        "Conv2d": (nn.Conv2d(3, 4, (2, 3)), torch.randn(2, 3, 5, 6)),
        "Embedding": (nn.Embedding(7, 4), torch.randint(7, (2, 3))),
    }[kind]
    packed, x = convert(prepare(layer.eval())[0]).to(device), x.to(device)
    with torch.no_grad():
        same(torch.compile(packed, backend="aot_eager", fullgraph=True)(x), packed(x))


def test_one_graph_serves_every_number_of_tokens(device):
    block = packed_block(device)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for length in (3, 5, 9):
        x = torch.randn(2, length, WIDTH, device=device)
        with torch.no_grad():
            same(compiled(x), block(x))
    assert len(graphs) == 1


def test_training_around_a_packed_model_compiles(device):
    """An adapter beside frozen packed layers, whose scales are learned too."""
    block = packed_block(device)
    adapter = nn.Linear(WIDTH, WIDTH, device=device)
    scale = block.up.weight_packed.scale.requires_grad_()
    x, seen = torch.randn(2, 5, WIDTH, device=device), []

    def compiler(graph, inputs):
        seen.append(operators(graph))
        return make_boxed_func(graph.forward)

    def loss():
        return block(adapter(x)).square().mean()

    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    gradients = []
    for function in (loss, torch.compile(loss, backend=backend, fullgraph=True)):
        leaves = (*adapter.parameters(), *block.parameters(), scale)
        gradients.append(torch.autograd.grad(function(), leaves))
    for expected, actual in zip(*gradients, strict=True):
        same(actual, expected)
    assert sum(seen, Counter()) == {"packed_linear": LINEAR_MAPS, "packed_linear_backward": LINEAR_MAPS}


@pytest.mark.full
def test_compiles_to_machine_code(device):
    block = packed_block(device)
    x = torch.randn(2, 5, WIDTH, device=device)
    with torch.no_grad():
        same(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("activations", [None, "int8"])
def test_exports_with_one_operator_for_each_layer(activations, device):
    block = packed_block(device, activations=activations)
    x = torch.randn(2, 5, WIDTH, device=device)
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}}
    program = torch.export.export(block, (x,), dynamic_shapes=shapes)
    assert operators(program.graph_module) == {"packed_linear": LINEAR_MAPS}
    assert operators(program.run_decompositions().graph_module) == {"packed_linear": LINEAR_MAPS}
    for each in (x, torch.randn(3, 7, WIDTH, device=device)):
        with torch.no_grad():
            same(program.module()(each), block(each), atol=2e-6 if activations is None else 1e-2)


def test_exported_programs_are_saved_and_loaded(tmp_path):
    layer, x = convert(prepare(nn.Linear(9, 5), codebook="int8")[0]), torch.randn(4, 9)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 300])
def test_cuda_graphs_replay_packed_layers(activations, tokens):
    block = packed_block("cuda", activations=activations, codebook="int8")
    x = torch.randn(1, tokens, WIDTH, device="cuda")
    with torch.no_grad():
        block(x)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(out, block(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_graphs_replay_training_around_packed_layers():
    block = packed_block("cuda")
    x = torch.randn(1, 4, WIDTH, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(block(x).sum(), x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(block(x).sum(), x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    same(gradient, torch.autograd.grad(copy.deepcopy(block)(x).sum(), x)[0])
