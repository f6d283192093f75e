import pytest
import torch

import gq_triton.functional as F
from gq_triton.kernels import tables

CODEBOOKS = [None, "float", "int8", "fp8"]
STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def centroids_of(bits):
    return torch.linspace(-1, 1, 2**bits)


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
    if codebook in STORED:
        stored = (values * tables.CODEBOOK_SCALES[STORED[codebook]]).to(STORED[codebook])
        assert torch.equal(F.decode(codes, scale, stored), hard)


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


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
def test_packed_linear_equals_linear_on_the_hard_weight(device, bits, activations):
    weight, scale, x = torch.randn(11, 30), torch.rand(11), torch.randn(2, 5, 30, device=device)
    bias, centroids = torch.randn(11, device=device), centroids_of(bits)
    hard = F.fake_quantize(weight, scale, centroids, mu=1.0, hardness=1.0).to(device)
    packed = F.pack(F.encode(weight, scale, centroids, mu=1.0), bits).to(device)
    values = F.codebook(centroids, mu=1.0).to(device)
    quantized = x if activations is None else F.quantize_activations(x, activations)
    expected = torch.relu(torch.nn.functional.linear(quantized, hard, bias))
    options = {"bits": bits, "in_features": 30, "activations": activations, "epilogue": "relu"}
    actual = F.packed_linear(x, packed, values, scale.to(device), bias, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


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
        ({"epilogue": "tanh"}, ValueError, "epilogue must be one of"),
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
