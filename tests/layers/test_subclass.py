"""Subclasses of torch layers, as many models have them, are quantized with their own forward."""

import copy
import io

import pytest
import torch
from quantized import convert, prepare, same
from torch import nn
from torch.nn.functional import linear, pad

import gq_triton as gq
from gq_triton.layers import PackedConv1d, PackedEmbedding, QATConv1d, QATEmbedding


class Scaled(nn.Embedding):
    """Calls the forward of its base, as word embeddings of many decoders do."""

    def __init__(self, *args, scale=3.0):
        super().__init__(*args)
        self.scale = scale

    def forward(self, index):
        return self.scale * super().forward(index)


class Positions(nn.Embedding):
    """Reads its weight, with other arguments than its base, as Whisper's do."""

    def forward(self, index, offset=0):
        return self.weight[offset : offset + index.shape[-1]]


class Casting(nn.Linear):
    """Passes its weight on, as OpenAI's Whisper does."""

    def forward(self, x):
        return linear(x, self.weight.to(x.dtype), self.bias)


class Causal(nn.Conv1d):
    """Pads by itself, as streaming models do."""

    def forward(self, x):
        return super().forward(pad(x, (self.kernel_size[0] - 1, 0)))


class Standardized(nn.Conv1d):
    """Computes another weight from its own one, and changes how its base computes."""

    def _conv_forward(self, x, weight, bias):
        weight = (weight - weight.mean((1, 2), keepdim=True)) / weight.std((1, 2), keepdim=True)
        return super()._conv_forward(x, weight, bias)


class Standardized2d(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Named(nn.Linear):
    """Has a constructor of its own and no forward."""

    def __init__(self, name):
        super().__init__(6, 4)
        self.name = name


INDEX = torch.tensor([[1, 4, 2], [0, 0, 5]])
CASES = {
    "calls super": (lambda: Scaled(6, 4), INDEX),
    "reads its weight": (lambda: Positions(6, 4), INDEX),
    "casts its weight": (lambda: Casting(6, 4), torch.randn(2, 3, 6)),
    "pads": (lambda: Causal(6, 4, 3), torch.randn(2, 6, 5)),
    "pads, depthwise": (lambda: Causal(6, 6, 3, groups=6), torch.randn(2, 6, 5)),
    "changes its weight": (lambda: Standardized(6, 4, 3), torch.randn(2, 6, 5)),
    "changes its weight, pointwise": (lambda: Standardized(6, 4, 1), torch.randn(2, 6, 5)),
    "changes its weight, depthwise": (lambda: Standardized(6, 6, 3, groups=6), torch.randn(2, 6, 5)),
    "changes its weight, two-dimensional": (lambda: Standardized2d(6, 4, 1), torch.randn(2, 6, 5, 2)),
    "no forward": (lambda: Named("x"), torch.randn(3, 6)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    build, x = CASES[request.param]
    return build(), x


@pytest.mark.parametrize("lone", [True, False])
def test_outputs_and_gradients_are_those_of_the_quantized_weight(case, lone):
    layer, x = case
    kind = type(layer)
    prepared, twin = prepare(layer if lone else nn.Sequential(layer), bits=3)
    same(prepared(x), twin(x))
    assert isinstance(layer, kind)
    for each in (prepared, twin):
        each(x).square().sum().backward()
    quantizer = layer.weight_quantizer
    assert layer.get_parameter("weight").grad.any() and quantizer.log_scale.grad.any() and quantizer.trained
    biases = [dict(each.named_parameters()).get("bias" if lone else "0.bias") for each in (prepared, twin)]
    if None not in biases:
        same(*(bias.grad for bias in biases), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"codebook": "int8", "activations": "int8"}])
def test_packed_outputs_are_those_of_the_prepared_layer(case, options, tmp_path):
    layer, x = case
    blank, model = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(layer).eval()
    gq.quantize_(model, gq.GQConfig(bits=3, **options))
    expected = model(x)
    packed = convert(model)
    same(packed(x), expected, atol=1e-5)
    gq.save_packed(packed, tmp_path / "layer.safetensors")
    assert torch.equal(gq.load_packed(blank, tmp_path / "layer.safetensors")(x), packed(x))
    assert "weight" not in dict(packed.named_parameters())


def test_copies_and_pickles(case):
    layer, x = case
    name = type(layer).__name__
    model = gq.quantize_(nn.Sequential(layer), gq.GQConfig(bits=2)).eval()
    for each in (model, convert(model)):
        file = io.BytesIO()
        torch.save(each, file)
        file.seek(0)
        for twin in (copy.deepcopy(each), copy.copy(each), torch.load(file, weights_only=False)):
            assert torch.equal(twin(x), each(x))
            assert type(twin[0]) is type(each[0])
    assert [type(each[0]).__name__ for each in (model, convert(model))] == [f"QAT{name}", f"Packed{name}"]


def test_classes_are_made_once_and_keep_their_own_members():
    first, second = (gq.quantize_(nn.Sequential(Scaled(5, 4, scale=scale)), gq.GQConfig())[0] for scale in (1.0, 2.0))
    assert type(first) is type(second) and issubclass(type(first), QATEmbedding)
    assert second.scale == 2.0
    gq.quantize_(first, step="convert")
    assert issubclass(type(first), PackedEmbedding) and type(first).__name__ == "PackedScaled"
    same(first(INDEX[:, :2] % 5), first.weight[INDEX[:, :2] % 5])


def test_a_subclass_that_shares_its_weight():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = Scaled(9, 6)
            self.output = nn.Linear(6, 9, bias=False)
            self.output.weight = self.embedding.weight

        def forward(self, index):
            return self.output(torch.tanh(self.embedding(index)))

    model, twin = prepare(Decoder(), bits=3)
    same(model(INDEX), twin(INDEX))
    model(INDEX).square().sum().backward()
    packed = convert(model)
    assert packed.output.weight_packed is packed.embedding.weight_packed
    same(packed(INDEX), twin(INDEX))


@pytest.mark.parametrize("name", ["reads its weight", "pads"])
def test_compiled(name):
    build, x = CASES[name]
    model = gq.quantize_(nn.Sequential(build()), gq.GQConfig())
    for _ in range(2):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        same(compiled(x), model(x))
        if isinstance(model[0], (QATEmbedding, QATConv1d)):
            compiled(x).sum().backward()
            gq.quantize_(model, step="convert")
    assert isinstance(model[0], (PackedEmbedding, PackedConv1d))


def test_members_that_the_quantized_layer_needs_itself():
    class Split(nn.Linear):
        def split(self):
            return 2

    inherited = Split(3, 3)
    on_the_object = Named("x")
    on_the_object.linear = nn.Linear(2, 2)
    for layer, member in ((inherited, "split"), (on_the_object, "linear")):
        with pytest.raises(ValueError, match=rf"^0\.weight cannot be quantized: .* needs itself: \['{member}'\]"):
            gq.quantize_(nn.Sequential(layer), {"0": gq.GQConfig()})


def test_subclasses_of_recurrent_and_attention_layers_are_refused():
    class Reversed(nn.LSTM):
        def forward(self, x):
            return super().forward(x.flip(0))

    class Attention(nn.MultiheadAttention):
        pass

    for layer, count in ((Reversed(3, 3), 2), (Attention(4, 2), 1)):
        with pytest.raises(ValueError, match=rf"a {type(layer).__name__}; of such layers, only torch's own") as caught:
            gq.quantize_(layer, {"*weight*": gq.GQConfig(), "out_proj*": None})
        assert str(caught.value).count("cannot be quantized") == count
