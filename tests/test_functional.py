import pytest
import torch

import gq_triton.functional as F
from gq_triton.kernels import tables

CODEBOOKS = [None, "float", "int8", "fp8"]
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def centroids_of(bits):
    return torch.linspace(-1, 1, 2**bits)


def deployed(values, codebook):
    """Codebook values in the dtype that they are deployed in."""
    if codebook not in STORED:
        return values
    entries = values * tables.CODEBOOK_SCALES[STORED[codebook]]
    return (entries.round() if codebook == "int8" else entries).to(STORED[codebook])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_decoded_codes_equal_the_hard_weight_bit_for_bit(device, bits, codebook, per_channel):
    weight = torch.randn(6, 5, 7, device=device)
    scale = torch.rand(6 if per_channel else 1, device=device)
    scale[0] *= per_channel
    centroids = centroids_of(bits).to(device)
    hard = F.fake_quantize(weight, scale, centroids, mu=3.0, hardness=2.0, codebook_dtype=codebook)
    codes = F.encode(weight, scale, centroids, mu=3.0)
    values = F.codebook(centroids, mu=3.0, dtype=codebook)
    assert torch.equal(F.decode(codes, scale, values), hard)
    assert torch.equal(F.decode(F.unpack(F.pack(codes, bits), bits, codes.shape), scale, values), hard)
    assert torch.equal(F.decode(codes, scale, deployed(values, codebook)), hard)


def test_mu_and_hardness_as_tensors_equal_numbers():
    weight, scale, centroids = torch.randn(3, 8), torch.rand(3), centroids_of(3)
    expected = F.fake_quantize(weight, scale, centroids, mu=2.0, hardness=3.0, forward="soft")
    for shape in [(), (1,)]:
        mu, hardness = torch.full(shape, 2.0), torch.full(shape, 3.0)
        assert torch.equal(
            F.fake_quantize(weight, scale, centroids, mu=mu, hardness=hardness, forward="soft"), expected
        )


@pytest.mark.parametrize("forward", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_reach_every_leaf(forward, dtype):
    leaves = [torch.randn(4, 9, dtype=dtype), torch.rand(4) + 0.5, centroids_of(2), torch.tensor([2.0])]
    weight, scale, centroids, mu = (leaf.requires_grad_() for leaf in leaves)
    out = F.fake_quantize(weight, scale, centroids, mu=mu, hardness=3.0, forward=forward)
    assert out.dtype == dtype
    out.square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


def test_no_gradient_is_formed_for_fixed_centroids():
    weight = torch.randn(4, 9, requires_grad=True)
    F.fake_quantize(weight, torch.ones(4), centroids_of(2), mu=2.0, hardness=3.0).sum().backward()
    assert weight.grad.any()


def test_one_bit_trains_towards_the_target():
    """K = 2: the scale alone finds the magnitude, the weights the signs."""
    target = torch.randn(4, 16).sign() * 0.7
    weight, scale = (torch.randn(4, 16) * 0.1).requires_grad_(), torch.full((4,), 0.2, requires_grad=True)
    optimizer = torch.optim.Adam([weight, scale], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (F.fake_quantize(weight, scale, centroids_of(1), mu=0.0, hardness=2.0) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2


def group_of(device, dtype=torch.float32):
    """Three weights and the arguments that quantize them together."""
    weights = [torch.randn(shape, device=device, dtype=dtype) for shape in [(4, 6), (3, 5, 2), (8,)]]
    tensors = {
        "scale": torch.rand(15, device=device) + 0.5,
        "centroids": torch.stack([centroids_of(3) * limit for limit in (1.0, 0.9, 0.8)]).to(device),
        "mu": torch.tensor([0.0, 2.0, 255.0], device=device),
        "hardness": torch.tensor([1.0, 4.0, 9.0], device=device),
    }
    return weights, tensors


@pytest.mark.parametrize("forward", ["hard", "soft"])
@pytest.mark.parametrize("codebook", [None, "int8"])
def test_a_group_equals_its_members_with_all_gradients(device, forward, codebook):
    weights, tensors = group_of(device)
    options = {"forward": forward, "codebook_dtype": codebook, "straight_through": 0.1}
    grads = []
    for together in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (*weights, *tensors.values())]
        own, (scale, centroids, mu, _) = leaves[:3], leaves[3:]
        hardness = tensors["hardness"]
        if together:
            shared = {"mu": mu, "hardness": hardness, "per_channel": True, **options}
            quantized = F.fake_quantize_group(own, scale, centroids, **shared)
        else:
            members = zip(own, scale.split([4, 3, 8]), centroids, mu, hardness, strict=True)
            quantized = [F.fake_quantize(w, s, z, mu=m, hardness=a, **options) for w, s, z, m, a in members]
        loss = sum((index + 1) * out.square().sum() for index, out in enumerate(quantized))
        grads.append([*quantized, *torch.autograd.grad(loss, leaves[:6])])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_tables_that_are_not_learned_get_no_gradient():
    weights, tensors = group_of("cpu")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    quantized = F.fake_quantize_group(
        [w.requires_grad_() for w in weights], **leaves, per_channel=True, learn_tables=False
    )
    sum(out.sum() for out in quantized).backward()
    assert leaves["scale"].grad.any() and weights[0].grad.any()
    assert leaves["centroids"].grad is None and leaves["mu"].grad is None


def test_an_empty_group():
    nothing = torch.empty(0)
    arguments = {"mu": nothing, "hardness": nothing, "per_channel": True}
    assert F.fake_quantize_group([], nothing, torch.empty(0, 4), **arguments) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": torch.ones(14)}, r"scale must have shape \(15,\) for 3 weights, got \(14,\)"),
        ({"scale": torch.ones(15), "per_channel": False}, r"scale must have shape \(3,\)"),
        ({"mu": torch.ones(2)}, r"mu must have shape \(3,\)"),
        ({"hardness": torch.ones(3, 1)}, r"hardness must have shape \(3,\)"),
        ({"centroids": torch.zeros(3, 5)}, r"centroids must have shape \(3, K\) with K a power of two"),
        ({"centroids": torch.zeros(2, 4)}, r"centroids must have shape \(3, K\)"),
        ({"forward": "firm"}, "forward must be one of 'hard', 'soft'"),
        ({"straight_through": 2.0}, "straight_through must lie in"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"scale": torch.ones(15, device="meta")}, "scale must be on the weights' device, cpu, but is on meta"),
        ({"centroids": torch.ones(3, 8, device="meta")}, "centroids must be on the weights' device"),
    ],
)
def test_wrong_groups_are_refused(change, message):
    weights, tensors = group_of("cpu")
    with pytest.raises(ValueError, match=message):
        F.fake_quantize_group(weights, **{**tensors, "per_channel": True, **change})


def test_a_group_of_two_dtypes_is_refused():
    weights, tensors = group_of("cpu")
    weights[1] = weights[1].bfloat16()
    with pytest.raises(ValueError, match="weights must have one dtype and device, got torch.float32 on cpu and"):
        F.fake_quantize_group(weights, **tensors, per_channel=True)


def in_layout(layout, codes, bits, codebook, groups=1):
    """Codes as the public functions lay them out."""
    packed, shape = F.pack(codes, bits), (bits, len(codes), codes[0].numel(), groups)
    if layout == "panels":
        return F.panel(packed, codebook, *shape)
    return F.tile(packed, *shape) if layout == "tiles" else packed


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("codebook", CODEBOOKS[1:])
def test_packed_linear_equals_linear_on_the_hard_weight(device, bits, activations, codebook, layout):
    weight, scale, x = torch.randn(11, 30), torch.rand(11), torch.randn(2, 5, 30, device=device)
    bias, centroids = torch.randn(11, device=device), centroids_of(bits)
    hard = F.fake_quantize(weight, scale, centroids, mu=1.0, hardness=1.0, codebook_dtype=codebook).to(device)
    stored = deployed(F.codebook(centroids, mu=1.0, dtype=codebook), codebook).to(device)
    packed = in_layout(layout, F.encode(weight, scale, centroids, mu=1.0).to(device), bits, stored)
    quantized = x if activations is None else F.quantize_activations(x, activations)
    expected = torch.relu(torch.nn.functional.linear(quantized, hard, bias))
    options = {"bits": bits, "in_features": 30, "activations": activations, "epilogue": "relu", "layout": layout}
    actual = F.packed_linear(x, packed, stored, scale.to(device), bias, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epilogue", ["tanh", "sigmoid", "glu"])
def test_epilogues_of_packed_linear_are_torchs(device, epilogue):
    x, scale, bias = (torch.randn(shape, device=device) for shape in [(2, 5, 30), (12,), (12,)])
    codes = torch.randint(0, 8, (12, 30), dtype=torch.uint8, device=device)
    arguments = F.pack(codes, 3), torch.linspace(-1, 1, 8, device=device), scale.abs(), bias
    plain = F.packed_linear(x, *arguments, bits=3, in_features=30)
    function = getattr(torch.nn.functional, epilogue)
    actual = F.packed_linear(x, *arguments, bits=3, in_features=30, epilogue=epilogue)
    torch.testing.assert_close(actual, function(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [1, 4])
def test_packed_linear_gives_all_its_parts_gradients(device, scales):
    codes = torch.randint(0, 4, (4, 3), dtype=torch.uint8, device=device)
    shapes = (5, 3), (4,), (scales,), (4,)
    x, codebook, scale, bias = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    dense = torch.relu(torch.nn.functional.linear(x, scale[:, None] * codebook[codes.int()], bias))
    packed = F.packed_linear(x, F.pack(codes, 2), codebook, scale, bias, bits=2, in_features=3, epilogue="relu")
    leaves = x, codebook, scale, bias
    gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (packed, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("groups", [1, 3])
def test_tiles_round_trip(device, bits, groups):
    packed = F.pack(torch.randint(0, 2**bits, (6, 70), dtype=torch.uint8), bits).to(device)
    tiles = F.tile(packed, bits, 6, 70, groups)
    assert (tiles.dtype, tiles.device.type) == (torch.uint8, device.type)
    assert torch.equal(F.untile(tiles, bits, 6, 70, groups), packed)


@pytest.mark.parametrize("bits", [2, 5])
def test_packed_embedding_equals_rows_of_the_hard_weight(device, bits):
    weight, scale, centroids = torch.randn(11, 6), torch.rand(1), centroids_of(bits)
    hard = F.fake_quantize(weight, scale, centroids, mu=1.0, hardness=1.0)
    packed = F.pack(F.encode(weight, scale, centroids, mu=1.0), bits).to(device)
    indices = torch.tensor([[0, 10], [3, 3]])
    options = {"bits": bits, "embedding_dim": 6, "num_embeddings": 11}
    values = F.codebook(centroids, mu=1.0).to(device)
    actual = F.packed_embedding(indices.to(device), packed, values, scale.to(device), **options)
    assert torch.equal(actual.cpu(), hard[indices])


def test_one_scale_needs_the_number_of_rows_said_once():
    packed, values = F.pack(torch.ones(4, 3, dtype=torch.uint8), 1), torch.tensor([-1.0, 1.0])
    x, scale, options = torch.ones(2, 3), torch.tensor([0.5]), {"bits": 1, "in_features": 3}
    by_number = F.packed_linear(x, packed, values, scale, out_features=4, **options)
    by_bias = F.packed_linear(x, packed, values, scale, torch.zeros(4), **options)
    by_scale = F.packed_linear(x, packed, values, scale.expand(4), **options)
    assert torch.equal(by_number, torch.full((2, 4), 1.5))
    assert torch.equal(by_number, by_bias)
    assert torch.equal(by_number, by_scale)


# --- errors -----------------------------------------------------------------------------------------------------------

GOOD = {"weight": torch.ones(4, 3), "scale": torch.ones(4), "centroids": centroids_of(2), "mu": 1.0, "hardness": 1.0}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
        ({"weight": torch.ones(4, 3, dtype=torch.int32)}, TypeError, r"weight must have dtype .*got torch\.int32"),
        ({"weight": torch.tensor(1.0)}, ValueError, "weight must have at least one dimension"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \(4,\).*or \(1,\), got \(3,\)"),
        ({"scale": torch.ones(4, 1)}, ValueError, r"scale must have shape .*got \(4, 1\)"),
        ({"scale": torch.ones(4, dtype=torch.int64)}, TypeError, "scale must have dtype"),
        ({"scale": -torch.ones(4)}, ValueError, "scale must not be negative"),
        (
            {"scale": torch.ones(4, device="meta")},
            ValueError,
            "scale must be on the weight's device, cpu, but is on meta",
        ),
        ({"centroids": torch.ones(3)}, ValueError, r"centroids must have shape \(K,\).*got \(3,\)"),
        ({"centroids": torch.zeros(512)}, ValueError, "centroids must have shape"),
        ({"centroids": centroids_of(2).flip(0)}, ValueError, "centroids must be sorted"),
        ({"centroids": centroids_of(1).flip(0)}, ValueError, "centroids must be sorted"),
        ({"centroids": torch.zeros(4)}, ValueError, "centroids must be sorted and not all equal"),
        ({"hardness": torch.tensor(torch.inf)}, ValueError, "hardness finite"),
        ({"mu": -1.0}, ValueError, r"mu must be finite and not negative, got -1\.0"),
        ({"mu": float("nan")}, ValueError, "mu must be finite"),
        ({"mu": torch.ones(2)}, ValueError, r"mu must have one element, got shape \(2,\)"),
        ({"hardness": float("inf")}, ValueError, "hardness must be finite"),
        ({"forward": "medium"}, ValueError, "forward must be one of 'hard', 'soft', got 'medium'"),
        ({"codebook_dtype": "int4"}, ValueError, "codebook_dtype must be one of .*got 'int4'"),
        ({"straight_through": 1.5}, ValueError, r"straight_through must lie in \[0, 1\], got 1\.5"),
    ],
)
def test_fake_quantize_names_what_is_wrong(change, error, match):
    with pytest.raises(error, match=match):
        F.fake_quantize(**{**GOOD, **change})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_encode_refuses_weights_that_are_not_finite(bad):
    weight = torch.ones(2, 3)
    weight[0, 1] = bad
    with pytest.raises(ValueError, match="weight must be finite to be encoded, but 1 of its 6 entries"):
        F.encode(weight, torch.ones(2), centroids_of(2), mu=0.0)


def test_encode_checks_values():
    with pytest.raises(ValueError, match="scale must not be negative"):
        F.encode(torch.ones(2, 3), -torch.ones(1), centroids_of(2), mu=0.0)
    with pytest.raises(ValueError, match="centroids must be sorted"):
        F.encode(torch.ones(2, 3), torch.ones(1), centroids_of(1).flip(0), mu=0.0)


def linear_arguments():
    return {
        "x": torch.ones(2, 3),
        "packed": torch.zeros(6, dtype=torch.uint8),
        "codebook": torch.zeros(16),
        "scale": torch.ones(4),
        "bits": 4,
        "in_features": 3,
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(2, 4)}, ValueError, r"x must have in_features = 3 .*got shape \(2, 4\)"),
        (
            {"packed": torch.zeros(7, dtype=torch.uint8)},
            ValueError,
            r"packed must have shape \(6,\) for 12 codes of 4 bits",
        ),
        ({"packed": torch.zeros(6)}, TypeError, "packed must have dtype torch.uint8"),
        ({"codebook": torch.zeros(8)}, ValueError, r"codebook must have shape \(16,\) for 4 bits, got \(8,\)"),
        ({"codebook": torch.zeros(16, dtype=torch.float64)}, TypeError, "codebook must have dtype"),
        ({"scale": torch.ones(4).double()}, TypeError, "scale must have dtype torch.float32"),
        (
            {"scale": torch.ones(4), "out_features": 5},
            ValueError,
            r"scale must have shape \(5,\) or \(1,\), got \(4,\)",
        ),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"activations": "int4"}, ValueError, "activations must be one of"),
        ({"epilogue": "softmax"}, ValueError, "epilogue must be one of .*'glu', got 'softmax'"),
        ({"epilogue": "none"}, ValueError, "epilogue must be one of None, "),
        ({"scale": torch.ones(5), "epilogue": "glu"}, ValueError, "out_features must be even .*'glu'.* got 5"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "bias must have dtype"),
        ({"layout": "tiles"}, ValueError, r"packed must have shape \(512,\) for 12 codes of 4 bits, got \(6,\)"),
        ({"layout": "panels"}, ValueError, r"packed must have shape \(256,\) for 12 codes of 4 bits, got \(6,\)"),
        ({"layout": "rows"}, ValueError, "layout must be one of 'planes', 'tiles', 'panels', got 'rows'"),
        (
            {"codebook": torch.zeros(16).to(torch.float8_e4m3fn).requires_grad_()},
            TypeError,
            "codebook must have dtype torch.float32 to receive a gradient",
        ),
        (
            {"codebook": torch.zeros(16, device="meta")},
            ValueError,
            "codebook must be on the device of x, cpu, but is on meta",
        ),
    ],
)
def test_packed_linear_names_what_is_wrong(change, error, match):
    with pytest.raises(error, match=match):
        F.packed_linear(**{**linear_arguments(), **change})


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: F.pack(torch.ones(3), 4), TypeError, "codes must have dtype"),
        (lambda: F.pack(torch.ones(3, dtype=torch.uint8), 0), ValueError, "bits must be"),
        (lambda: F.pack(torch.tensor([1, 4], dtype=torch.uint8), 2), ValueError, r"codes must be below 4 .*got 4"),
        (lambda: F.unpack(torch.zeros(3, dtype=torch.uint8), 4, (7,)), ValueError, r"packed must have shape \(4,\)"),
        (lambda: F.tile(torch.zeros(3, dtype=torch.uint8), 4, 2, 4), ValueError, r"packed must have shape \(4,\)"),
        (lambda: F.tile(torch.zeros(4), 4, 2, 4), TypeError, "packed must have dtype torch.uint8"),
        (lambda: F.tile(torch.zeros(4, dtype=torch.uint8), 9, 2, 4), ValueError, "bits must be an integer"),
        (lambda: F.tile(torch.zeros(4, dtype=torch.uint8), 4, 2, 4, 3), ValueError, "groups must divide the rows"),
        (lambda: F.untile(torch.zeros(4, dtype=torch.uint8), 4, 2, 4), ValueError, r"tiles must have shape \(512,\)"),
        (lambda: F.decode(torch.zeros(2, 3), torch.ones(2), torch.zeros(4)), TypeError, "codes must have dtype"),
        (lambda: F.codebook(torch.zeros(3), mu=0.0), ValueError, "centroids must have shape"),
        (lambda: F.codebook(torch.zeros(4), mu=0.0, dtype="int4"), ValueError, "dtype must be one of"),
        (lambda: F.quantize_activations(torch.ones(3), "int4"), ValueError, "dtype must be one of 'int8', 'fp8'"),
        (lambda: F.quantize_activations(torch.tensor(1.0), "int8"), ValueError, "x must have at least one dimension"),
        (lambda: F.quantize_activations(torch.ones(3).int(), "int8"), TypeError, "x must have dtype"),
    ],
)
def test_the_other_functions_name_what_is_wrong(call, error, match):
    with pytest.raises(error, match=match):
        call()


def depthwise_arguments():
    return {
        "x": torch.ones(2, 4, 9),
        "packed": torch.zeros(6, dtype=torch.uint8),
        "codebook": torch.zeros(16),
        "scale": torch.ones(4),
        "bits": 4,
        "kernel_size": 3,
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(2, 4, 9, dtype=torch.float64)}, TypeError, "x must have dtype"),
        ({"x": torch.ones(9)}, ValueError, r"x must have shape \(B, C, T\) or \(C, T\), got \(9,\)"),
        ({"x": torch.ones(2, 4, 2)}, ValueError, "x must be at least 3 long in time .*got 2"),
        ({"dilation": 6, "padding": 1}, ValueError, "x must be at least 11 long .*dilation 6 and padding 1, got 9"),
        ({"x": torch.ones(2, 3, 9)}, ValueError, "out_channels must be a multiple of the 3 channels of x, got 4"),
        ({"x": torch.ones(2, 0, 9)}, ValueError, "out_channels must be a multiple of the 0 channels of x, got 4"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"bits": 9}, ValueError, "bits must be an integer from 1 to 8, got 9"),
        ({"out_channels": 8}, ValueError, r"scale must have shape \(8,\) or \(1,\), got \(4,\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, TypeError, "bias must have dtype"),
        ({"packed": torch.zeros(7, dtype=torch.uint8)}, ValueError, r"packed must have shape \(6,\) for 12 codes"),
        ({"layout": "tiles"}, ValueError, r"packed must have shape \(512,\) for 12 codes of 4 bits, got \(6,\)"),
        ({"layout": "panels"}, ValueError, r"packed must have shape \(256,\) for 12 codes of 4 bits, got \(6,\)"),
        ({"layout": "rows"}, ValueError, "layout must be one of 'planes', 'tiles', 'panels', got 'rows'"),
        ({"codebook": torch.zeros(8)}, ValueError, r"codebook must have shape \(16,\) for 4 bits, got \(8,\)"),
        ({"codebook": torch.zeros(16, device="meta")}, ValueError, "codebook must be on the device of x, cpu"),
    ],
)
def test_packed_depthwise_conv1d_names_what_is_wrong(change, error, match):
    with pytest.raises(error, match=match):
        F.packed_depthwise_conv1d(**{**depthwise_arguments(), **change})


def test_packed_depthwise_conv1d_equals_conv1d_on_the_decoded_weight(device, layout):
    codes, x = torch.randint(0, 8, (6, 1, 4), dtype=torch.uint8), torch.randn(2, 3, 20, device=device)
    codebook, scale, bias = torch.linspace(-1, 1, 8), torch.rand(1), torch.randn(6)
    weight = F.decode(codes, scale, codebook).to(device)
    tensors = [tensor.to(device) for tensor in (in_layout(layout, codes, 3, codebook), codebook, scale, bias)]
    options = {"stride": 2, "padding": 1, "dilation": 3}
    expected = torch.nn.functional.conv1d(x, weight, bias.to(device), **options, groups=3)
    for inputs, outputs in ((x, expected), (x[1], expected[1])):
        actual = F.packed_depthwise_conv1d(inputs, *tensors, bits=3, kernel_size=4, **options, layout=layout)
        torch.testing.assert_close(actual, outputs, atol=1e-5, rtol=1e-5)


def test_packed_embedding_names_what_is_wrong():
    table = torch.zeros(6, dtype=torch.uint8), torch.zeros(16), torch.ones(4)
    with pytest.raises(TypeError, match="indices must have dtype"):
        F.packed_embedding(torch.zeros(2), *table, bits=4, embedding_dim=3)
    with pytest.raises(ValueError, match="packed must have shape"):
        F.packed_embedding(torch.zeros(2).long(), *table, bits=4, embedding_dim=4)
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 4\)"):
        F.packed_embedding(torch.tensor([4]), *table, bits=4, embedding_dim=3)


def test_a_subnormal_scale_counts_as_zero():
    """Its products with thresholds would round so coarsely that devices and layouts could disagree about a code."""
    weight = torch.tensor([[1.4e-45, -3e-45, 0.5], [0.25, -0.5, 1.0]])
    scale, centroids = torch.tensor([1.4e-45, 1.0]), torch.linspace(-1, 1, 4)
    quantized = F.fake_quantize(weight, scale, centroids, mu=0.0, hardness=4.0)
    codes, codebook = F.encode(weight, scale, centroids, mu=0.0), F.codebook(centroids, mu=0.0)
    assert not quantized[0].any() and quantized[1].all()
    assert torch.equal(F.decode(codes, scale, codebook), quantized)
    rows = F.packed_embedding(torch.tensor([0, 1]), F.pack(codes, 2), codebook, scale, bits=2, embedding_dim=3)
    assert torch.equal(rows, quantized)


def recurrent_arguments(batch_sizes=None):
    """Of `packed_recurrent`, for an LSTM of 6 inputs, 5 units and a projection to 3."""
    bits, shapes = [2, 3, 4], [(20, 6), (20, 3), (3, 5)]
    weights = [
        (F.pack(torch.randint(2**width, shape, dtype=torch.uint8), width), torch.randn(2**width), torch.rand(shape[0]))
        for width, shape in zip(bits, shapes, strict=True)
    ]
    x = torch.randn(4, 2, 6) if batch_sizes is None else torch.randn(4, 6)
    keywords = {"bits": bits, "batch_sizes": None if batch_sizes is None else torch.tensor(batch_sizes)}
    states, biases = [torch.randn(2, 3), torch.randn(2, 5)], [torch.randn(20), torch.randn(20)]
    return {"x": x, "states": states, "weights": weights, "biases": biases, **keywords}


@pytest.mark.parametrize("batch_sizes", [None, [2, 1, 1]])
def test_packed_recurrent_equals_lstm_on_the_decoded_weights(device, batch_sizes, layout):
    arguments = recurrent_arguments(batch_sizes)
    x, states = arguments["x"], arguments["states"]
    shapes, bits = [(20, 6, 4), (20, 3, 4), (3, 5, 1)], arguments["bits"]
    floats = [
        F.decode(F.unpack(codes, width, shape[:2]), scale, codebook)
        for (codes, codebook, scale), width, shape in zip(arguments["weights"], bits, shapes, strict=True)
    ]
    lstm = torch.nn.LSTM(6, 5, proj_size=3).requires_grad_(False)
    for parameter, value in zip(lstm.parameters(), [*floats[:2], *arguments["biases"], floats[2]], strict=True):
        parameter.copy_(value)
    packed = x if batch_sizes is None else torch.nn.utils.rnn.PackedSequence(x, arguments["batch_sizes"])
    output, (h, c) = lstm(packed, tuple(state[None] for state in states))
    expected = [output if batch_sizes is None else output.data, h[0], c[0]]
    arguments["weights"] = [
        (in_layout(layout, F.unpack(codes, width, shape), width, codebook, groups), codebook, scale)
        for (codes, codebook, scale), width, (*shape, groups) in zip(arguments["weights"], bits, shapes, strict=True)
    ]
    for name in ("states", "biases"):
        arguments[name] = [tensor.to(device) for tensor in arguments[name]]
    arguments["weights"] = [[tensor.to(device) for tensor in weight] for weight in arguments["weights"]]
    actual = F.packed_recurrent(**{**arguments, "x": x.to(device)}, layout=layout)
    torch.testing.assert_close([result.cpu() for result in actual], expected, rtol=1e-5, atol=1e-5)


WRONG_RECURRENT = [
    (lambda a: a | {"x": a["x"].double()}, TypeError, "x must have dtype"),
    (lambda a: a | {"x": a["x"][0]}, ValueError, r"x must have shape \(T, B, K\) .* got \(2, 6\)"),
    (lambda a: a | {"x": a["x"][:0]}, ValueError, "with T > 0"),
    (lambda a: a | {"x": a["x"][..., :5]}, ValueError, "packed must have shape .* for 100 codes of 2 bits"),
    (lambda a: a | {"states": a["states"] * 2}, ValueError, "states must be .* got 4 tensors"),
    (lambda a: a | {"states": [state.half() for state in a["states"]]}, TypeError, r"states\[0\] must have dtype"),
    (lambda a: a | {"states": [a["states"][0], torch.zeros(3, 5)]}, ValueError, r"states\[1\] must have shape"),
    (lambda a: a | {"weights": a["weights"][:2], "bits": [2, 3]}, ValueError, r"sizes \[3, 5\]; got 2 and 2"),
    (lambda a: a | {"states": a["states"][:1]}, ValueError, r"sizes \[3\]; got 3 and 3"),
    (lambda a: a | {"bits": [2, 3]}, ValueError, "got 3 and 2"),
    (lambda a: a | {"bits": [2, 3, 9]}, ValueError, "bits must be an integer from 1 to 8"),
    (lambda a: a | {"layout": "tiles"}, ValueError, "packed must have shape"),
    (lambda a: a | {"activations": ["int4"] * 3}, ValueError, "activations must be one of .* got 'int4'"),
    (lambda a: a | {"activations": ["int8"]}, ValueError, "activations must be given for each of 3 weights .* got 1"),
    (lambda a: a | {"biases": a["biases"][:1]}, ValueError, "biases must be .* got 1 tensors"),
    (lambda a: a | {"biases": [torch.zeros(20), torch.zeros(5)]}, ValueError, r"biases\[1\] must have shape \(20,\)"),
    (lambda a: a | {"biases": [torch.zeros(20).long()] * 2}, TypeError, r"biases\[0\] must have dtype"),
]


@pytest.mark.parametrize(("change", "error", "match"), WRONG_RECURRENT)
def test_packed_recurrent_names_what_is_wrong(change, error, match):
    with pytest.raises(error, match=match):
        F.packed_recurrent(**change(recurrent_arguments()))


@pytest.mark.parametrize("batch_sizes", [[2, 1], [1, 2, 1], [2, 2, 0], [[2, 2]], []])
def test_packed_recurrent_refuses_batch_sizes_that_are_none(batch_sizes):
    arguments = recurrent_arguments([2, 1, 1]) | {"batch_sizes": torch.tensor(batch_sizes, dtype=torch.int64)}
    with pytest.raises(ValueError, match="batch_sizes must be positive and falling numbers on the CPU, of sum 4"):
        F.packed_recurrent(**arguments)
