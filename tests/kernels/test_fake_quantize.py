import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import backend, fake_quantize_cpu, tables
from gq_triton.kernels import fake_quantize as fq
from gq_triton.kernels import fake_quantize_triton as gpu
from gq_triton.kernels.backend import tl

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: 1 / 0 and NaN

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def reference(problem, forward="soft", codebook=None, **options):
    values = tables.codebook(problem.centroids, problem.mu, codebook)
    options = {"mu": problem.mu, "hardness": problem.hardness, "forward": forward, **options}
    return fq.reference(problem.weight, problem.scale, problem.centroids, values, **options)


def reference_grads(problem, grad):
    """Autograd through the definition: gradients of weight, scale, centroids and mu."""
    leaves = [tensor.clone().requires_grad_() for tensor in problem[:4]]
    problem = problem._replace(weight=leaves[0], scale=leaves[1], centroids=leaves[2], mu=leaves[3])
    return torch.autograd.grad(reference(problem), leaves, grad)


def quantize(weight, scale, table, soft, straight_through=0.0, table_grad=False):
    """The operator, of one weight."""
    arguments = [weight], scale, table[None], scale.numel() == len(weight), soft, straight_through, table_grad, None
    return fq.fake_quantize(*arguments)[0]


def differentiate(grad, weight, scale, table, straight_through, table_grad):
    """The operator's backward pass, of one weight."""
    per_channel = scale.numel() == len(weight)
    arguments = [grad], [weight], scale, table[None], per_channel, straight_through, table_grad
    dweights, dscale, dtables = fq.fake_quantize_backward(*arguments)
    return dweights[0], dscale, dtables[0]


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# --- the reference itself ---------------------------------------------------------------------------------------------


def test_reference_by_hand():
    weight = torch.tensor([[0.1, 0.9, -3.0]], dtype=torch.float64)
    scale, centroids = torch.tensor([2.0]).double(), torch.tensor([-1.0, 1.0]).double()
    options = {"mu": torch.tensor(0.0).double(), "hardness": torch.tensor(1.0).double()}
    soft = fq.reference(weight, scale, centroids, centroids, **options)
    x = torch.tensor([0.05, 0.45, -1.0]).double()  # two centroids: sum_i p_i c_i = tanh(a x / D), D = 2
    torch.testing.assert_close(soft, 2 * torch.tanh(x / 2)[None])
    hard = fq.reference(weight, scale, centroids, centroids, forward="hard", **options)
    assert hard.tolist() == [[2.0, 2.0, -2.0]]


def test_reference_squared_distance_by_hand():
    weight, scale = torch.tensor([[0.3]]).double(), torch.tensor([1.0]).double()
    centroids = torch.tensor([-1.0, 1.0]).double()
    options = {"mu": torch.tensor(0.0).double(), "hardness": torch.tensor(2.0).double(), "squared": True}
    p = torch.softmax(-2 * torch.tensor([1.3 / 2, 0.7 / 2]).double().square(), 0)
    torch.testing.assert_close(fq.reference(weight, scale, centroids, centroids, **options).squeeze(), p[1] - p[0])


# --- CPU against the reference, in float64 ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mu", [0.0, 2.0, 255.0])
@pytest.mark.parametrize("per_channel", [True, False])
def test_float64_matches_the_reference(make_quantizer, bits, mu, per_channel):
    problem = make_quantizer(bits, mu=mu, per_channel=per_channel)
    for codebook in (None, "int8", "fp8"):
        table = problem.table(torch.float64, codebook)
        soft = quantize(problem.weight, problem.scale, table, True)
        torch.testing.assert_close(soft, reference(problem, "soft", codebook), rtol=0, atol=1e-11)
        hard = quantize(problem.weight, problem.scale, table, False)
        torch.testing.assert_close(hard, reference(problem, "hard", codebook), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("mu", [0.0, 0.05, 255.0])
def test_float64_gradients_match_the_reference(make_quantizer, bits, mu):
    problem = make_quantizer(bits, mu=mu, limit=0.97)
    grad = torch.randn_like(problem.weight)
    expected = reference_grads(problem, grad)
    leaves = [tensor.clone().requires_grad_() for tensor in problem[:4]]
    table = tables.build_tables(leaves[2][None], leaves[3][None], problem.hardness[None], None, torch.float64)[0]
    soft = quantize(leaves[0], leaves[1], table, True, 0.0, True)
    actual = torch.autograd.grad(soft, leaves, grad)
    inside = tables.compress(problem.weight / problem.scale[:, None], problem.mu).abs() < 0.97
    torch.testing.assert_close(actual[0] * inside, expected[0] * inside, rtol=1e-8, atol=1e-9)
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradcheck(make_quantizer, bits):
    problem = make_quantizer(bits, shape=(3, 5), limit=0.97)
    weight = problem.weight.clamp(-0.45, 0.45)  # beyond the outer centroids the gradient is not that of the function

    def function(weight, scale, centroids, mu):
        table = tables.build_tables(centroids[None], mu[None], problem.hardness[None], None, torch.float64)[0]
        return quantize(weight, scale, table, True, 0.0, True)

    leaves = (weight, problem.scale, problem.centroids, problem.mu)
    assert torch.autograd.gradcheck(function, [leaf.clone().requires_grad_() for leaf in leaves])


def test_hard_forward_has_the_gradient_of_soft(make_quantizer):
    problem = make_quantizer(3)
    grads = []
    for soft in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in problem[:4]]
        table = tables.build_tables(leaves[2][None], leaves[3][None], problem.hardness[None], "int8", torch.float64)[0]
        out = quantize(leaves[0], leaves[1], table, soft, 0.3, True)
        grads.append(torch.autograd.grad(out.square().sum() * 0 + out.sum(), leaves))
    for hard, soft in zip(*grads, strict=True):
        assert torch.equal(hard, soft)


def test_straight_through_share(make_quantizer):
    problem = make_quantizer(3)
    grad = torch.randn_like(problem.weight)
    grads = [differentiate(grad, *problem[:2], problem.table(torch.float64), h, True) for h in (0, 0.25, 1)]
    torch.testing.assert_close(grads[2][0], grad)
    for plain, mixed, identity in zip(*[g[:2] for g in grads], strict=True):
        torch.testing.assert_close(mixed, 0.75 * plain + 0.25 * identity)
    assert torch.equal(grads[0][2], grads[1][2])  # centroids and mu do not see it


def test_clamped_weights_keep_the_gradient_of_the_border(make_quantizer):
    problem = make_quantizer(2, shape=(1, 5))
    scale = problem.scale.item()
    weight = torch.tensor([[-7.0, -1.0, 0.3, 1.0, 7.0]]).double() * scale
    dweight, dscale, _ = differentiate(
        torch.ones(1, 5).double(), weight, problem.scale, problem.table(torch.float64), 0.0, False
    )
    assert (dweight > 0).all()
    torch.testing.assert_close(dweight[0, [0, 4]], dweight[0, [1, 3]])
    soft = reference(problem._replace(weight=weight))
    clamped = differentiate(
        torch.tensor([[1.0, 0, 0, 0, 0]]).double(), weight, problem.scale, problem.table(torch.float64), 0.0, False
    )
    torch.testing.assert_close(clamped[1] * scale, soft[0, :1])  # soft = s q(+-1): linear in the scale
    assert dscale.isfinite().all()


def test_table_gradient_can_be_left_out(make_quantizer):
    problem = make_quantizer(4)
    arguments = (torch.randn_like(problem.weight), *problem[:2], problem.table(torch.float64), 0.1)
    full, partial = differentiate(*arguments, True), differentiate(*arguments, False)
    assert torch.equal(full[0], partial[0])
    assert torch.equal(full[1], partial[1])
    assert not partial[2].any()
    assert full[2].any()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_do_not_change_the_result(make_quantizer, monkeypatch, chunk):
    problem = make_quantizer(4, shape=(6, 19))
    table, grad = problem.table(torch.float64), torch.randn_like(problem.weight)

    def run():
        outputs = [quantize(*problem[:2], table, soft) for soft in (False, True)]
        borders = tables.split_table(table).thresholds.contiguous()
        return [
            *outputs,
            fq.encode(*problem[:2], borders),
            *differentiate(grad, *problem[:2], table, 0, True),
        ]

    whole = run()
    monkeypatch.setattr(fake_quantize_cpu, "CHUNK", chunk)
    for mine, theirs in zip(run(), whole, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- codes ------------------------------------------------------------------------------------------------------------


def count_by_definition(weight, scale, borders):
    return (scale[:, None, None] * borders < weight[..., None]).sum(-1).to(torch.uint8)


@given(
    borders=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=15),
    scale=st.floats(0, 2.0**100, width=32, allow_subnormal=False),
    weights=st.lists(st.floats(width=32, allow_nan=False), max_size=20),
)
def test_codes_count_thresholds_exactly(borders, scale, weights):
    """Whatever the rounding of weight / scale: tiny and huge scales, weights on a border, subnormal, infinite."""
    borders = torch.tensor([*borders, *[torch.inf] * (2 ** len(borders).bit_length() - 1 - len(borders))])
    borders, scale = borders.sort().values, torch.tensor([scale])
    weight = torch.cat([torch.tensor(weights), scale * borders[borders.isfinite()]])[None]
    assert torch.equal(fq.encode(weight, scale, borders), count_by_definition(weight, scale, borders))


def test_a_tie_goes_to_the_lower_code():
    borders = torch.tensor([-0.5, 0.0, 0.5])
    weight = torch.tensor([[-1.0, 0.0, 1.0, 1.0001]])
    assert fq.encode(weight, torch.tensor([2.0]), borders).tolist() == [[0, 1, 2, 3]]


def test_codes_of_a_crowded_grid_are_exact():
    """More borders than bins: every look-up needs many corrections."""
    borders = torch.cat([torch.linspace(-1e-6, 1e-6, 200), torch.linspace(1e-3, 1, 55)])
    weight, scale = torch.randn(2, 3000) * torch.tensor([[1e-6], [1.0]]), torch.tensor([1.0, 0.7])
    assert torch.equal(fq.encode(weight, scale, borders), count_by_definition(weight, scale, borders))


# --- awkward inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_low_precision_weights_are_computed_in_float32(make_quantizer, soft, dtype):
    problem = make_quantizer(4)
    weight, scale, table = problem.weight.to(dtype), problem.scale.float(), problem.table()
    expected = quantize(weight.float(), scale, table, soft)
    actual = quantize(weight, scale, table, soft)
    assert actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))


def test_non_contiguous_weight_and_gradient(make_quantizer):
    problem = make_quantizer(4, shape=(6, 4, 3))
    table, strided = problem.table(torch.float64), problem.weight.transpose(1, 2).contiguous().transpose(1, 2)
    grad = torch.randn_like(problem.weight)
    assert not strided.is_contiguous()
    for soft in (False, True):
        expected = quantize(problem.weight, problem.scale, table, soft)
        actual = quantize(strided, problem.scale, table, soft)
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)
    strided_grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    expected = differentiate(grad, problem.weight, problem.scale, table, 0.0, True)
    for mine, theirs in zip(
        differentiate(strided_grad, strided, problem.scale, table, 0.0, True), expected, strict=True
    ):
        assert torch.equal(mine, theirs)


def test_inputs_are_not_modified(make_quantizer):
    problem = make_quantizer(3)
    table, grad = problem.table(torch.float64), torch.randn_like(problem.weight)
    inputs = [grad, problem.weight, problem.scale, table]
    copies = [tensor.clone() for tensor in inputs]
    differentiate(*inputs, 0.1, True)
    quantize(*inputs[1:], True)
    assert all(map(torch.equal, inputs, copies))


def test_negative_scale_and_unsorted_centroids_are_refused(make_quantizer):
    problem = make_quantizer(2)
    scale = problem.scale.clone()
    scale[1] = -0.25
    with pytest.raises(ValueError, match=r"scale must not be negative.*-0\.25"):
        quantize(problem.weight, scale, problem.table(torch.float64), False)
    backwards = problem._replace(centroids=problem.centroids.flip(0))
    with pytest.raises(ValueError, match="centroids must be sorted"):
        quantize(problem.weight, problem.scale, backwards.table(torch.float64), False)


# --- operators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [True, False])
def test_operator_registration(make_quantizer, device, per_channel):
    problem = make_quantizer(2, shape=(3, 4, 2), per_channel=per_channel)
    weight, scale = problem.weight.float().to(device), problem.scale.float().to(device)
    table = problem.table().to(device)
    weights = [weight.transpose(1, 2), weight[:, 0]]
    leaves = [tensor.clone().requires_grad_() for tensor in (scale.repeat(2), table.repeat(2, 1))]
    options = per_channel, True, 0.1, True, None
    torch.library.opcheck(fq.fake_quantize, ([w.requires_grad_() for w in weights], *leaves, *options))
    plain, grads = [w.detach() for w in weights], [torch.randn_like(weights[0]), None]
    tensors = [tensor.detach() for tensor in leaves]
    torch.library.opcheck(fq.fake_quantize_backward, (grads, plain, *tensors, per_channel, 0.1, True))
    torch.library.opcheck(fq.encode, (plain[0], scale.detach(), tables.split_table(table).thresholds))


def test_compiled_whole(make_quantizer):
    problem = make_quantizer(3)

    def loss(weight, scale, centroids, mu):
        table = tables.build_tables(centroids[None], mu[None], problem.hardness[None], None, torch.float64)[0]
        return quantize(weight, scale, table, True, 0.0, True).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (loss, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in problem[:4]]
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


# --- all implementations: native, torch, and Triton on a GPU or in its interpreter ------------------------------------


class Implementation:
    """The functions behind the operators, of one weight; the interpreter launches kernels on CPU tensors too."""

    def __init__(self, device, triton):
        self.device, self.triton = device, triton
        self.encode = gpu.encode if triton else fake_quantize_cpu.encode

    def forward(self, weight, scale, table, soft):
        if not self.triton:
            return fake_quantize_cpu.forward(weight, scale, table, soft)
        return gpu.forward([weight], scale, table[None], scale.numel() == len(weight), soft, None)[0]

    def backward(self, grad, weight, scale, table, straight_through, table_grad):
        if not self.triton:
            return fake_quantize_cpu.backward(grad, weight, scale, table, straight_through, table_grad)
        tensors = [grad], [weight], scale, table[None]
        dweights, dscale, dtables = gpu.backward(*tensors, scale.numel() == len(weight), straight_through, table_grad)
        return dweights[0], dscale, dtables[0]


@pytest.fixture
def implementation(kernels, request):
    if kernels == "triton":
        return Implementation(request.getfixturevalue("kernel_device"), triton=True)
    return Implementation(torch.device("cpu"), triton=False)


SHAPES = [((3, 37), True), ((2, 5, 3), True), ((2, 150), False), ((1, 1), True)]
LONG = [((1, 2500), True), ((130, 3), True), ((4, 512), True), ((7, 129), False), ((17, 1), True)]
CASES = [pytest.param(*case) for case in SHAPES] + [pytest.param(*case, marks=pytest.mark.full) for case in LONG]


def inputs_of(problem, device, dtype=torch.float32):
    return [problem.weight.to(dtype).to(device), problem.scale.float().to(device), problem.table().to(device)]


def rounded(problem, dtype):
    """The problem that the inputs in ``dtype`` pose, in float64."""
    weight, scale = problem.weight.to(dtype).double(), problem.scale.float().double()
    return problem._replace(weight=weight, scale=scale, centroids=problem.centroids.float().double())


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("shape", "per_channel"), CASES)
def test_forward_matches_the_reference(make_quantizer, implementation, bits, shape, per_channel):
    problem = make_quantizer(bits, shape, per_channel=per_channel)
    weight, scale, table = inputs_of(problem, implementation.device)
    exact = rounded(problem, torch.float32)
    soft = implementation.forward(weight, scale, table, True)
    torch.testing.assert_close(soft.cpu().double(), reference(exact), rtol=0, atol=4e-6)
    hard = implementation.forward(weight, scale, table, False)
    assert torch.equal(hard.cpu(), fake_quantize_cpu.forward(weight.cpu(), scale.cpu(), table.cpu(), False))
    agree = (hard.cpu().double() - reference(exact, "hard")).abs() < 1e-6
    assert agree.double().mean() > 0.99  # but for weights within rounding of a border
    borders = tables.split_table(table).thresholds
    codes = implementation.encode(weight, scale, borders).cpu()
    rows = weight.cpu().reshape(len(scale), -1)
    assert torch.equal(codes.reshape(rows.shape), count_by_definition(rows, scale.cpu(), borders.cpu()))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", [1, 3, 4, 5, 8])
@pytest.mark.parametrize(("shape", "per_channel"), CASES)
@pytest.mark.parametrize(
    "mu", [2.0, pytest.param(0.0, marks=pytest.mark.full), pytest.param(255.0, marks=pytest.mark.full)]
)
def test_backward_matches_float64(make_quantizer, implementation, bits, shape, per_channel, mu):
    problem = make_quantizer(bits, shape, per_channel=per_channel, mu=mu, limit=0.9)
    inputs = inputs_of(problem, implementation.device)
    grad = torch.randn(shape)
    actual = implementation.backward(grad.to(implementation.device), *inputs, 0.1, True)
    exact = [tensor.cpu().double() for tensor in inputs]
    expected = fake_quantize_cpu.backward(grad.double(), *exact, 0.1, True)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine.cpu(), theirs) < (1e-4 if bits > 5 else 2e-5)
    without = implementation.backward(grad.to(implementation.device), *inputs, 0.1, False)
    assert torch.equal(without[0], actual[0])
    torch.testing.assert_close(without[1], actual[1], rtol=1e-5, atol=1e-5)  # another order of summation
    assert not without[2].any()


@pytest.mark.parametrize("mu", [0.0, 1e-6, 3.9e-3, 4.1e-3, 0.1])
def test_small_mu_in_float32(make_quantizer, implementation, mu):
    problem = make_quantizer(2, mu=mu)
    inputs, grad = inputs_of(problem, implementation.device), torch.randn(5, 70)
    soft = implementation.forward(*inputs, True)
    torch.testing.assert_close(soft.cpu().double(), reference(rounded(problem, torch.float32)), rtol=0, atol=2e-6)
    actual = implementation.backward(grad.to(implementation.device), *inputs, 0.0, True)
    expected = fake_quantize_cpu.backward(grad.double(), *[tensor.cpu().double() for tensor in inputs], 0.0, True)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(make_quantizer, implementation, dtype):
    problem = make_quantizer(3, (4, 40))
    weight, scale, table = inputs_of(problem, implementation.device, dtype)
    grad = torch.randn(4, 40, device=weight.device).to(dtype)
    eps = 2 * torch.finfo(dtype).eps  # the interpreter truncates to bfloat16
    for soft in (False, True):
        expected = implementation.forward(weight.float(), scale, table, soft)
        actual = implementation.forward(weight, scale, table, soft)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=eps, atol=1e-6)
    actual = implementation.backward(grad, weight, scale, table, 0.0, True)
    expected = implementation.backward(grad.float(), weight.float(), scale, table, 0.0, True)
    assert [tensor.dtype for tensor in actual] == [dtype, torch.float32, torch.float32]
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_empty(make_quantizer, implementation, shape):
    table = make_quantizer(2).table().to(implementation.device)
    weight, scale = table.new_empty(shape), table.new_ones(shape[0])
    assert implementation.forward(weight, scale, table, False).shape == shape
    assert implementation.encode(weight, scale, table[:3]).shape == shape
    dweight, dscale, dtable = implementation.backward(weight, weight, scale, table, 0.0, True)
    assert dweight.shape == shape
    assert torch.equal(dscale, torch.zeros_like(scale))
    assert torch.equal(dtable, torch.zeros_like(table))


@pytest.mark.parametrize("scale", [0.0, 1e-42])
def test_a_channel_without_scale_gives_zeros_and_finite_gradients(make_quantizer, implementation, scale):
    problem = make_quantizer(3)
    weight, scales, table = inputs_of(problem, implementation.device)
    scales[2] = scale
    for soft in (False, True):
        out = implementation.forward(weight, scales, table, soft)[2]
        assert (out.abs() <= scale).all()
        assert scale or not torch.signbit(out).any()
    grads = implementation.backward(torch.ones_like(weight), weight, scales, table, 0.1, True)
    assert all(grad.isfinite().all() for grad in grads)
    weight[2] = 0
    assert not implementation.forward(weight, scales * (scales > 1e-30), table, False)[2].any()


@pytest.mark.parametrize("table_grad", [True, False])
def test_a_weight_too_large_for_its_scale_gives_finite_gradients(make_quantizer, implementation, table_grad):
    """weight / scale overflows; the weight is as clamped as any other."""
    problem = make_quantizer(3, (2, 40))
    weight, scale, table = inputs_of(problem, implementation.device)
    scale[1] = 2e-38
    weight[1, :2] = torch.tensor([1e4, -1e4])
    dweight, *sums = implementation.backward(torch.ones_like(weight), weight, scale, table, 0.1, table_grad)
    assert dweight.isfinite().all() and all(total.isfinite().all() for total in sums)
    weight[1, :2] = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(
        dweight, implementation.backward(torch.ones_like(weight), weight, scale, table, 0.1, table_grad)[0]
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_gives_nan(make_quantizer, implementation, bad):
    problem = make_quantizer(3)
    weight, scale, table = inputs_of(problem, implementation.device)
    clean = [implementation.forward(weight, scale, table, soft) for soft in (False, True)]
    where = torch.zeros_like(weight, dtype=torch.bool)
    where[1, 2] = where[3, 69] = True
    weight[where] = bad
    for soft in (False, True):
        out = implementation.forward(weight, scale, table, soft)
        assert out[where].isnan().all()
        assert torch.equal(out[~where], clean[soft][~where])
    dweight, dscale, dtable = implementation.backward(torch.ones_like(weight), weight, scale, table, 0.0, True)
    assert torch.equal(dweight.isnan(), where)
    assert torch.equal(dscale.isnan(), where.any(1))
    assert dtable.isnan().any()


def test_backward_is_repeatable_bit_for_bit(make_quantizer, implementation):
    problem = make_quantizer(4, (9, 130))
    inputs, grad = inputs_of(problem, implementation.device), torch.randn(9, 130, device=implementation.device)
    first, second = (implementation.backward(grad, *inputs, 0.1, True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("bits", [3, 5, 8])
@pytest.mark.parametrize("shape", [(3, 200), (20, 24)])
def test_chunks_are_parts_of_the_same_sums(make_quantizer, kernel_device, monkeypatch, bits, shape):
    """A weight cut into many chunks, of rows and of columns, and into few."""
    problem = make_quantizer(bits, shape)
    weight, scale, table = inputs_of(problem, kernel_device)
    grad = torch.randn(shape, device=kernel_device)

    def run():
        quantized = [gpu.forward([weight], scale, table[None], True, soft, None)[0] for soft in (False, True)]
        plain = gpu.backward([grad], [weight], scale, table[None], True, 0.0, False)
        learning = gpu.backward([grad], [weight], scale, table[None], True, 0.0, True)
        return [*quantized, *plain[0], plain[1], *learning[0], *learning[1:]]

    few = run()
    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(gpu, name, gpu.Tile(2, 16, 64, 4))
    monkeypatch.setattr(gpu, "table_grad_tile", lambda bits: gpu.Tile(1, 32, 96, 1))
    for mine, theirs in zip(run(), few, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-5)


def test_offsets_do_not_overflow_32_bits(kernel_device):
    """A row so far down a wide matrix that its offset takes 33 bits; only this row exists in memory."""
    row, columns = 5_000_000, 1024
    weight, out = torch.randn(2, columns, device=kernel_device).unbind()
    record = torch.tensor([[0, row, row + 1, 0, columns, -row, 1, 0]], device=kernel_device)
    numbers = [n for t in (weight, out) for n in (t.data_ptr() - row * columns * 4, columns)]
    matrices = torch.tensor([numbers], device=kernel_device)
    scale, table = torch.ones(1, device=kernel_device), torch.zeros(1, 12, device=kernel_device)
    table[0, 1:3] = torch.tensor([-1.0, 1.0])
    types = gpu._type(torch.float32), gpu._type(torch.float32)
    gpu._forward_kernel[(1,)](matrices, record, scale, table, gpu._lookups(table), False, 1, *types, gpu.ALIGN, 8, 128)
    assert torch.equal(out, torch.where(weight > 0, 1.0, -1.0))


@pytest.mark.parametrize("bits", [5, 8])
def test_search_is_exact_on_crowded_grids(bits, kernel_device):
    """Borders bunched within one bin, repeated, or infinite: the code is still their count."""
    levels = 2**bits
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(2, 600, generator=generator) * torch.tensor([[1.0], [1e-3]])
    grids = [
        torch.linspace(-1e-5, 1e-5, levels - 1),
        torch.cat([torch.linspace(-1, 1, levels // 2), torch.full((levels // 2 - 1,), 0.1)]).sort().values,
        torch.cat([torch.full((3,), -torch.inf), torch.linspace(-0.5, 0.9, levels - 6), torch.full((2,), torch.inf)]),
    ]
    scale = torch.tensor([1.3, 1e-3])
    for borders in grids:
        for mu in (0.0, 255.0):
            table = torch.zeros(6 * levels)
            table[: levels - 1], table[levels - 1 : 2 * levels - 1] = borders, torch.arange(levels)
            table[-3] = mu
            inputs = [tensor.to(kernel_device) for tensor in (weight, scale, table[None])]
            out = gpu.forward([inputs[0]], *inputs[1:], True, False, None)[0].cpu()
            codes = count_by_definition(weight, scale, borders)
            assert torch.equal(out, codes * scale[:, None])


# --- groups -----------------------------------------------------------------------------------------------------------

GROUP = [(5, 70), (3, 16), (0, 4), (9, 4, 8), (2, 3), (4,)]  # aligned and not, empty, of any number of dimensions


@pytest.fixture
def group(make_quantizer):
    """(weights, scales in a row, tables (G, 6 K)), and the scales split."""
    torch.manual_seed(3)
    problems = [make_quantizer(4, mu=mu) for mu in (0.0, 2.0, 255.0, 1.0, 2.0, 30.0)]
    weights = [torch.randn(shape) for shape in GROUP]
    scale = torch.rand(sum(map(len, weights))) + 0.5
    return weights, scale, torch.stack([problem.table() for problem in problems])


def of_each(group):
    weights, scale, stacked = group
    return zip(weights, scale.split([len(weight) for weight in weights]), stacked, strict=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("soft", [False, True])
def test_a_group_is_its_members(group, kernel_device, soft):
    expected = [fake_quantize_cpu.forward(*member, soft) for member in of_each(group)]
    weights, scale, stacked = group
    on_cpu = fq.fake_quantize(weights, scale, stacked, True, soft, 0.0, False, None)
    assert all(map(torch.equal, on_cpu, expected))
    weights = [weight.to(kernel_device) for weight in weights]
    quantized = gpu.forward(weights, scale.to(kernel_device), stacked.to(kernel_device), True, soft, None)
    for mine, theirs in zip(quantized, expected, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=4e-6 if soft else 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("unused", [(), (0,), (3, 5), (0, 1, 2, 3, 4, 5)])
def test_gradients_of_a_group_are_those_of_its_members(group, kernel_device, unused):
    weights, scale, stacked = group
    grads = [None if index in unused else torch.randn_like(weight) for index, weight in enumerate(weights)]
    launched = gpu.backward(
        [None if grad is None else grad.to(kernel_device) for grad in grads],
        [weight.to(kernel_device) for weight in weights],
        scale.to(kernel_device),
        stacked.to(kernel_device),
        *(True, 0.1, True),
    )
    for dweights, dscale, dtables in (fq.fake_quantize_backward(grads, *group, True, 0.1, True), launched):
        dscales = dscale.cpu().split([len(weight) for weight in weights])
        for index, member in enumerate(of_each(group)):
            if grads[index] is None:
                assert dweights[index].shape == (0,)
                assert not dscales[index].any() and not dtables[index].any()
            elif member[0].numel():
                expected = fake_quantize_cpu.backward(grads[index], *member, 0.1, True)
                actual = dweights[index].cpu(), dscales[index], dtables[index].cpu()
                for mine, theirs in zip(actual, expected, strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


def test_one_scale_for_each_weight_of_a_group(group, kernel_device):
    weights, _, stacked = group
    scale = torch.rand(len(weights)) + 0.5
    grads = [torch.randn_like(weight) for weight in weights]
    expected = fq.fake_quantize_backward(grads, weights, scale, stacked, False, 0.1, True)
    weights, grads = ([tensor.to(kernel_device) for tensor in tensors] for tensors in (weights, grads))
    actual = gpu.backward(grads, weights, scale.to(kernel_device), stacked.to(kernel_device), False, 0.1, True)
    torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=1e-5, atol=1e-5)
    quantized = gpu.forward(weights, scale.to(kernel_device), stacked.to(kernel_device), False, False, None)
    for mine, weight, own, table in zip(quantized, group[0], scale, stacked, strict=True):
        assert torch.equal(mine.cpu(), fake_quantize_cpu.forward(weight, own[None], table, False))


def test_weights_whose_results_are_unused_get_no_gradient(group):
    weights, scale, stacked = group
    leaves = [weight.clone().requires_grad_() for weight in weights]
    scale, stacked = scale.clone().requires_grad_(), stacked.clone().requires_grad_()
    quantized = fq.fake_quantize(leaves, scale, stacked, True, True, 0.0, True, None)
    (quantized[0].sum() + quantized[3].square().sum()).backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, False, False, True, False, False]
    assert scale.grad[:5].all() and not scale.grad[5:8].any() and scale.grad[8:17].all()
    assert stacked.grad[0].any() and not stacked.grad[1].any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("dtype", "result"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_results_in_another_dtype_are_casts(group, kernel_device, soft, dtype, result):
    """Under autocast the cast costs nothing that way, and the gradient comes back in the cast's dtype."""
    dtype, result = getattr(torch, dtype), getattr(torch, result)
    weights, scale, stacked = group
    weights = [weight.to(dtype) for weight in weights]
    wide = fq.fake_quantize([weight.float() for weight in weights], scale, stacked, True, soft, 0.0, False, None)
    narrow = fq.fake_quantize(weights, scale, stacked, True, soft, 0.0, False, result)
    assert all(map(torch.equal, narrow, [tensor.to(result) for tensor in wide]))
    weights = [weight.to(kernel_device) for weight in weights]
    launched = gpu.forward(weights, scale.to(kernel_device), stacked.to(kernel_device), True, soft, result)
    for mine, theirs in zip(launched, wide, strict=True):
        eps = 2 * torch.finfo(result).eps  # the interpreter truncates to bfloat16
        assert mine.dtype == result
        torch.testing.assert_close(mine.cpu().float(), theirs, rtol=eps, atol=4e-6)
    grads = [torch.randn(weight.shape, device=kernel_device).to(result) for weight in weights]
    arguments = weights, scale.to(kernel_device), stacked.to(kernel_device), True, 0.1, True
    actual, expected = gpu.backward(grads, *arguments), gpu.backward([g.float() for g in grads], *arguments)
    assert all(map(torch.equal, actual[0], expected[0]))
    assert all(grad.dtype == dtype for grad in actual[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


def test_rows_apart_in_memory_are_read_where_they_are(kernel_device):
    """A slice of a wider matrix needs no copy; a transposed one does."""
    wide = torch.randn(6, 40, device=kernel_device)
    assert gpu._as_matrix(wide[:, 8:24])[1:] == (wide[:, 8:24].data_ptr(), 40, True)
    assert not gpu._as_matrix(wide[:, 7:23]).aligned
    assert gpu._as_matrix(wide.t()).tensor.is_contiguous()
    assert gpu._as_matrix(wide.t()).stride == 6


@pytest.mark.parametrize("part", [slice(None), (slice(None), slice(8, 24)), (slice(None), slice(3, 4))])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_stride(make_quantizer, kernel_device, part, transposed):
    problem = make_quantizer(3, (40, 40))
    _, scale, table = inputs_of(problem, kernel_device)
    weight, grad = (tensor.to(kernel_device) for tensor in torch.randn(2, 40, 40))
    weight, grad = ((t.t() if transposed else t)[part] for t in (weight, grad))
    for soft in (False, True):
        actual = gpu.forward([weight], scale, table[None], True, soft, None)[0]
        assert torch.equal(actual, gpu.forward([weight.contiguous()], scale, table[None], True, soft, None)[0])
    actual = gpu.backward([grad], [weight], scale, table[None], True, 0.1, True)
    expected = gpu.backward([grad.contiguous()], [weight.contiguous()], scale, table[None], True, 0.1, True)
    torch.testing.assert_close(actual[0][0], expected[0][0])
    torch.testing.assert_close(actual[1], expected[1])
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-5, atol=1e-5)


def launch(group, device):
    weights, (scale, stacked) = [weight.to(device) for weight in group[0]], (tensor.to(device) for tensor in group[1:])
    quantized = gpu.forward(weights, scale, stacked, True, True, None)
    dweights, *sums = gpu.backward(weights, weights, scale, stacked, True, 0.1, True)
    return [*quantized, *dweights, *sums]


def test_launching_under_another_default_device(group, kernel_device):
    expected = launch(group, kernel_device)
    gpu._plan.cache_clear()
    gpu._uploaded.cache_clear()
    gpu._identity.cache_clear()
    with torch.device("meta"):
        actual = launch(group, kernel_device)
    assert all(map(torch.equal, actual, expected))


def test_what_is_copied_in_a_capture_is_for_the_graph_alone(group, kernel_device, monkeypatch):
    """The copy is made when the graph is replayed: until then nobody else may read it."""
    launch(group, kernel_device)
    monkeypatch.setattr(gpu, "_captured", [])
    monkeypatch.setattr(gpu, "_capturing", lambda device: True)
    before = gpu._uploaded.cache_info()
    launch(group, kernel_device)
    assert gpu._uploaded.cache_info() == before
    assert len(gpu._captured) == 2
    assert all(plan.chunks.device == kernel_device and host.device.type == "cpu" for plan, host in gpu._captured)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_captured_in_a_cuda_graph(group):
    weights, scale, stacked = [weight.cuda() for weight in group[0]], group[1].cuda(), group[2].cuda()

    def step():
        leaves = [tensor.detach().requires_grad_() for tensor in (*weights, scale, stacked)]
        quantized = fq.fake_quantize(leaves[:-2], *leaves[-2:], True, True, 0.1, True, None)
        used = [leaf for leaf in leaves if leaf.numel()]
        return [*quantized, *torch.autograd.grad(sum(out.square().sum() for out in quantized), used)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    gpu._plan.cache_clear()
    gpu._uploaded.cache_clear()
    for _ in range(2):
        for tensor in (*weights, scale):
            tensor.mul_(1.1)
        graph.replay()
        expected = step()
        assert all(map(torch.equal, captured, expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_compiled_with_cuda_graphs(group):
    scale, stacked = group[1].cuda(), group[2].cuda()

    def step(weights):
        return sum(
            out.square().sum() for out in fq.fake_quantize(weights, scale, stacked, True, True, 0.1, False, None)
        )

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        leaves = [torch.randn(weight.shape, device="cuda", requires_grad=True) for weight in group[0]]
        used = [leaf for leaf in leaves if leaf.numel()]
        torch.compiler.cudagraph_mark_step_begin()
        actual, expected = (torch.autograd.grad(function(leaves), used) for function in (compiled, step))
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_launching_without_triton_is_a_clear_error(make_quantizer, monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    weight, scale, table = inputs_of(make_quantizer(2), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="triton is needed"):
        gpu.forward([weight], scale, table[None], True, False, None)


@given(st.floats(0, 1e4, width=32))
def test_log1p_is_exact_to_a_few_ulp(x):
    if not backend.INTERPRETED:
        pytest.skip("checked in the interpreter")
    out = torch.empty(1)
    _store_log1p[(1,)](torch.tensor([x]), out)
    expected = torch.tensor([x], dtype=torch.float64).log1p()
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=0)


@backend.jit
def _store_log1p(x, out):
    tl.store(out + tl.arange(0, 1), gpu._log1p(tl.load(x + tl.arange(0, 1))))
