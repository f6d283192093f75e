"""Modules that read another's weight, instead of calling it, compute with the quantized one."""

import copy
import warnings

import pytest
import torch
from quantized import convert, hard_weights, prepare, same
from torch import nn
from torch.nn.functional import linear, multi_head_attention_forward
from torch.utils.checkpoint import checkpoint

import gq_triton as gq


class Tied(nn.Module):
    """Multiplies by its embedding's weight, as decoders do that tie input and output; ``run`` is how it does so."""

    def __init__(self, run=lambda function, *args: function(*args)):
        super().__init__()
        self.embedding, self.inner, self.run = nn.Embedding(9, 6), nn.Linear(6, 6), run

    def forward(self, index):
        return self.run(self.output, torch.tanh(self.inner(self.embedding(index))))

    def output(self, x):
        return x @ self.embedding.weight.to(x.dtype).T


class Attention(nn.Module):
    """Hands the weights of its projections to one function, as WavLM does."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "v", "out"):
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        q, k, v, out = self.q, self.k, self.v, self.out
        biases = torch.cat([q.bias, k.bias, v.bias])
        return multi_head_attention_forward(
            *(x, x, x, 6, 2, None, biases, None, None, False, 0.0, out.weight, out.bias),
            use_separate_proj_weight=True,
            q_proj_weight=q.weight,
            k_proj_weight=k.weight,
            v_proj_weight=v.weight,
        )[0]


class Projections(nn.Module):
    """Reads the weights of a whole attention module, as torchaudio's WavLM does, and whether it has others."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, **options)

    def forward(self, x):
        attention = self.attention
        if attention.in_proj_weight is None:
            return linear(linear(x, attention.q_proj_weight), attention.out_proj.weight)
        return linear(linear(x, attention.in_proj_weight)[..., :6], attention.out_proj.weight)


class Kernel(nn.Module):
    """Reads the weight of a convolution, and has nothing else to quantize."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 1)

    def forward(self, x):
        return linear(x, self.conv.weight[:, :, 0])


INDEX = torch.tensor([[1, 4, 2], [0, 8, 5]])
X = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
CASES = {
    "tied": (Tied, INDEX),
    "attention": (Attention, X),
    "projections": (Projections, X),
    "separate projections": (lambda: Projections(kdim=4, vdim=4), X),
    "kernel": (Kernel, X),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    build, x = CASES[request.param]
    return build(), x


def test_prepared_and_packed_models_compute_with_the_quantized_weight(case):
    model, x = case
    before = model(x)
    model, twin = prepare(model, bits=2)
    same(model(x), twin(x))
    assert not torch.allclose(model(x), before)
    model(x).square().sum().backward()
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, gq.WeightQuantizer) and not name.startswith(("attention.k", "attention.v")):
            assert quantizer.log_scale.grad.any(), name
    with torch.no_grad():
        same(model(x), twin(x))
        same(model.eval()(x), twin(x))
    same(convert(model)(x), twin(x))


@pytest.mark.parametrize("name", ["tied", "attention", "projections", "kernel"])
def test_training_them_gives_no_warning(name):
    build, x = CASES[name]
    model = build()
    gq.quantize_(model, gq.GQConfig())
    annealer = gq.Annealer(model, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).sum().backward()
        annealer.step()
        gq.quantize_(model, step="convert")


@pytest.mark.parametrize("name", ["tied", "projections"])
def test_compiled(name):
    build, x = CASES[name]
    model = gq.quantize_(build(), gq.GQConfig(bits=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    same(compiled(x), model(x))


def checkpointed(use_reentrant):
    return lambda function, *args: checkpoint(function, *args, use_reentrant=use_reentrant)


def test_recomputed_regions():
    plain, region = Tied(), Tied(checkpointed(use_reentrant=False))
    region.load_state_dict(plain.state_dict())
    for model in (plain, region):
        gq.quantize_(model, gq.GQConfig(bits=2))
        model(INDEX).square().sum().backward()
    same(region(INDEX), plain(INDEX))
    for (name, mine), other in zip(region.named_parameters(), plain.parameters(), strict=True):
        same(mine.grad, other.grad, atol=1e-5), name


def test_reentrant_regions_that_call_a_module():
    class Outer(nn.Module):
        def __init__(self, run):
            super().__init__()
            self.tied, self.run = Attention(), run

        def forward(self, x):
            return self.run(self.tied, x)

    plain, region = Outer(lambda function, x: function(x)), Outer(checkpointed(use_reentrant=True))
    region.load_state_dict(plain.state_dict())
    for model in (plain, region):
        gq.quantize_(model, gq.GQConfig(bits=2))
        model(X.clone().requires_grad_()).square().sum().backward()
    for mine, other in zip(region.parameters(), plain.parameters(), strict=True):
        same(mine.grad, other.grad, atol=1e-5)


def test_autocast_leaves_a_weight_that_is_read_in_its_dtype():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            self.read = self.layer.weight
            return self.layer(x)

    model = gq.quantize_(Reader(), gq.GQConfig())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16
    assert model.read.dtype == torch.float32
    same(model.read, hard_weights(model)["layer.weight"])


# --- who reads the trained weight


def test_outside_of_calls_it_is_the_parameter():
    model = gq.quantize_(Tied(), gq.GQConfig())
    assert model.inner.weight is dict(model.named_parameters())["inner.weight"]
    assert hasattr(model.inner, "weight") and isinstance(model.inner.weight, nn.Parameter)
    model.inner.weight = nn.Parameter(torch.zeros(6, 6))
    assert not model.get_parameter("inner.weight").any()
    del model.inner.weight
    assert not hasattr(model.inner, "weight")
    with pytest.raises(AttributeError, match="'QATLinear' object has no attribute 'weight'"):
        _ = model.inner.weight


def test_hooks_that_change_it_and_hooks_of_the_backward_pass():
    model = gq.quantize_(Tied(), gq.GQConfig())
    parameter, seen = model.inner.weight, []

    def shrink(layer, args):
        with torch.no_grad():
            layer.weight.mul_(0.5)

    model.inner.register_forward_pre_hook(shrink)
    model.inner.register_full_backward_hook(lambda layer, *_: seen.append(layer.weight))
    before = parameter.detach().clone()
    model(INDEX).sum().backward()
    assert torch.equal(parameter, before * 0.5)
    assert seen[0] is parameter


def test_a_weight_that_is_set_to_what_is_no_parameter():
    model = gq.quantize_(nn.Sequential(nn.Linear(4, 3)), gq.GQConfig())
    weight = model[0].weight.detach() * 2
    expected = copy.deepcopy(model)
    expected[0].weight.data.mul_(2)
    del model[0].weight
    model[0].weight = weight
    assert model[0].weight is weight
    x = torch.randn(2, 4)
    same(model(x), expected(x))


def test_a_weight_that_is_left_float():
    model = gq.quantize_(Projections(), {"attention.out_proj.weight": gq.GQConfig(bits=1)})
    assert model.attention.in_proj_weight is model.get_parameter("attention.in_proj_weight")
    weight = model.attention.in_proj_weight[:6]
    for _ in range(2):
        same(model(X), linear(linear(X, weight), hard_weights(model)["attention.out_proj.weight"]))
        model.eval()


# --- packed


def test_packed_weights_that_are_read_have_the_dtype_of_the_layer():
    model = gq.quantize_(nn.Sequential(nn.Linear(5, 3)), gq.GQConfig()).eval()
    expected = hard_weights(model)["0.weight"]
    gq.quantize_(model, step="convert").to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    same(model[0].weight, expected.bfloat16())
