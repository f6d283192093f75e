import itertools

import pytest
import torch
from quantized import convert, packed_weights, prepare, same
from torch import nn

import gq_triton as gq
from gq_triton import functional as F
from gq_triton.layers import QATMultiheadAttention

MODULES = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "batch_first": True},
    {"kdim": 5, "vdim": 7},
    {"kdim": 5, "batch_first": True, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
]
CALLS = [
    dict(zip(("need_weights", "average_attn_weights"), values, strict=True))
    for values in itertools.product((False, True), (False, True))
]


def inputs(module, batch=2, queries=3, keys=4):
    lengths = (queries, module.embed_dim), (keys, module.kdim), (keys, module.vdim)
    order = (lambda n, e: (batch, n, e)) if module.batch_first else (lambda n, e: (n, batch, e))
    return tuple(torch.randn(order(*length)) for length in lengths)


def check(prepared, twin, *args, **kwargs):
    expected = twin(*args, **kwargs)
    for model in (prepared, convert(prepared)):
        output, weights = model(*args, **kwargs)
        same(output, expected[0])
        if expected[1] is None:
            assert weights is None
        else:
            same(weights, expected[1])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", MODULES)
def test_the_whole_surface(options, call):
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, **options), bits=3)
    args = inputs(prepared)
    mask, padding = torch.rand(3, 4) < 0.3, torch.tensor([[False] * 4, [False, False, True, True]])
    mask[:, 0] = False
    check(prepared, twin, *args, **call)
    check(prepared, twin, *args, attn_mask=mask, key_padding_mask=padding, **call)
    check(prepared, twin, *args, attn_mask=torch.randn(3, 4), **call)
    check(prepared, twin, *args, attn_mask=torch.randn(4, 3, 4), key_padding_mask=padding.float(), **call)
    first = tuple(x[0] if prepared.batch_first else x[:, 0] for x in args)
    check(prepared, twin, *first, key_padding_mask=padding[1], attn_mask=mask, **call)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_self_attention_never_takes_the_float_fast_path(grad, train):
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, batch_first=True).train(train), bits=1)
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        check(prepared, twin, x, x, x)
        causal = nn.Transformer.generate_square_subsequent_mask(5)
        check(prepared, twin, x, x, x, attn_mask=causal, is_causal=True, need_weights=False)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}])
def test_activations_are_quantized_at_every_projection(options):
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, **options), activations="int8")
    query, key, value = inputs(prepared)
    seen = []
    prepared.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output, _ = prepared(query, key, value)
    outer = nn.functional.linear(F.quantize_activations(seen[0], "int8"), twin.out_proj.weight, twin.out_proj.bias)
    same(output, outer)
    twin.out_proj = nn.Linear(8, 8)
    with torch.no_grad():
        twin.out_proj.weight.copy_(torch.eye(8))
    twin.out_proj.bias.data.zero_()
    inner = twin(*(F.quantize_activations(x, "int8") for x in (query, key, value)))[0]
    same(seen[0], inner)


@pytest.mark.parametrize("shape", [(3, 2, 8), (3, 8)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_outputs_lie_in_memory_as_they_are_indexed(batch_first, shape):
    """As callers expect who take a ``view`` of them."""
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    x = torch.randn(shape)
    for layer in (prepared, convert(prepared)):
        output = layer(x, x, x)[0]
        assert output.is_contiguous()
        same(output, twin(x, x, x)[0])


def test_dropout_in_training_only():
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, dropout=0.5))
    args = inputs(prepared)
    torch.manual_seed(1)
    _, weights = prepared(*args)
    assert (weights == 0).any() or not torch.allclose(weights.sum(-1), torch.ones(2, 3))
    check(prepared.eval(), twin.eval(), *args)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}])
def test_gradients_are_those_of_torch_with_the_quantized_weights(options):
    prepared, twin = prepare(nn.MultiheadAttention(8, 2, **options), straight_through=1.0, bits=2)
    args = inputs(prepared)
    for model in (prepared, twin):
        model(*args)[0].square().sum().backward()
    for name, parameter in twin.named_parameters():
        same(dict(prepared.named_parameters())[name].grad, parameter.grad)


@pytest.mark.parametrize(
    ("config", "quantized"),
    [
        ({"attention": gq.GQConfig()}, {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}),
        ({"attention.out_proj": gq.GQConfig()}, {"out_proj.weight"}),
        ({"*.out_proj": None, "*": gq.GQConfig()}, {"q_proj_weight", "k_proj_weight", "v_proj_weight"}),
        ({"*in_proj_weight": None, "*": gq.GQConfig()}, {"out_proj.weight"}),
    ],
)
def test_projections_are_chosen_by_name(config, quantized):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)

    prepared, twin = prepare(Model().eval(), config)
    with torch.no_grad():
        check(prepared, twin, torch.randn(2, 5, 8))
    assert set(packed_weights(convert(prepared))) == {f"attention.{name}" for name in quantized}
    assert type(prepared.attention) is QATMultiheadAttention


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pattern", ["*", "*.linear1", "*.self_attn", "*.out_proj"])
def test_transformer_encoders_never_take_the_float_fast_path(pattern, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    prepared, twin = prepare(encoder.eval(), {pattern: gq.GQConfig(bits=1)})
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False, False, False, True, True]])
    expected = twin(x, src_key_padding_mask=padding)
    for model in (prepared, convert(prepared)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                output = model(x, src_key_padding_mask=padding)
            same(output[~padding], expected[~padding], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("attn_mask", torch.zeros(2, 3, 3), r"must have shape \(3, 3\) or \(4, 3, 3\)"),  # would broadcast over batches
        ("attn_mask", torch.zeros(3, 4), "must have shape"),
        ("attn_mask", torch.zeros(3, 3, dtype=torch.uint8), "must be boolean or floating"),
        ("key_padding_mask", torch.zeros(1, 3), r"must have shape \(2, 3\)"),
        ("key_padding_mask", torch.zeros(2, 3, dtype=torch.int64), "must be boolean or floating"),
    ],
)
def test_masks_that_torch_would_refuse(name, mask, message):
    prepared, _ = prepare(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        prepared(x, x, x, **{name: mask})


def test_bad_arguments():
    prepared, _ = prepare(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        prepared(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="key has 2"):
        prepared(x, x[0], x)
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(ValueError, match="query must not be a nested tensor"):
        prepared(nested, nested, nested)
