"""The native kernels of fake quantization, on every instruction set, against the definition in float64."""

import itertools

import numpy as np
import pytest
import torch
from panels import using

from gq_triton.kernels import fake_quantize as fq
from gq_triton.kernels import fake_quantize_cpu, native, tables

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")

SHAPES = [((3, 37), True), ((2, 5, 3), True), ((2, 150), False), ((1, 1), True), ((5, 16), True), ((1, 300), True)]
CHUNK = 1 << 15  # weights whose sums are float32, see fake_quantize.cpp
WAVE = 64 * CHUNK


def forward(weight, scale, table, soft, threads=1):
    """The result, in the middle of memory that must stay as it is."""
    room = torch.full((weight.numel() + 64,), torch.nan)
    out = room[32 : 32 + weight.numel()].view(weight.shape)
    native.fake_quantize(weight, scale, table, soft, out, threads)
    assert room[:32].isnan().all() and room[-32:].isnan().all()
    return out


def encode(weight, scale, borders, threads=1):
    room = torch.full((weight.numel() + 64,), 77, dtype=torch.uint8)
    codes = room[32 : 32 + weight.numel()].view(weight.shape)
    native.encode(weight, scale, borders.contiguous(), codes, threads)
    assert (room[:32] == 77).all() and (room[-32:] == 77).all()
    return codes


def backward(grad, weight, scale, table, straight_through=0.1, table_grad=True, threads=1):
    outputs = [torch.full_like(tensor, torch.nan) for tensor in (weight, scale, table)]
    arrays = *outputs[:2], outputs[2] if table_grad else None
    native.fake_quantize_backward(grad, weight, scale, table, straight_through, *arrays, threads)
    return outputs


def inputs_of(problem):
    return problem.weight.float(), problem.scale.float(), problem.table()


def count_by_definition(weight, scale, borders):
    rows = weight.reshape(len(scale), -1)
    return (scale[:, None, None] * borders < rows[..., None]).sum(-1).to(torch.uint8).view(weight.shape)


def away_from_edges(weight, scale, table):
    """Where the cell of a weight (rows, columns) does not depend on rounding: between cells, the derivative jumps."""
    parts = tables.split_table(table.double())
    y = tables.compress((weight.double() / scale.double()[:, None]).clamp(-1, 1), parts.curve[1])
    return ((y[..., None] - parts.edges).abs() > 1e-5).all(-1)


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def same(first, second):
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True))


# --- against the definition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("shape", "per_channel"), SHAPES)
def test_codes_and_values(make_quantizer, isa, bits, shape, per_channel):
    problem = make_quantizer(bits, shape, per_channel=per_channel)
    weight, scale, table = inputs_of(problem)
    parts = tables.split_table(table)
    codes = encode(weight, scale, parts.thresholds)
    assert torch.equal(codes, count_by_definition(weight, scale, parts.thresholds))
    column = scale.view(-1, *[1] * (len(shape) - 1))
    assert torch.equal(forward(weight, scale, table, False), column * parts.values[codes.int()])
    exact = problem._replace(weight=weight.double(), scale=scale.double(), centroids=problem.centroids.float().double())
    values = tables.codebook(exact.centroids, exact.mu, None)
    arguments = *exact[:3], values
    expected = fq.reference(*arguments, mu=exact.mu, hardness=exact.hardness)
    torch.testing.assert_close(forward(weight, scale, table, True).double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("mu", [0.0, 1e-6, 0.02, 0.04, 0.5, 255.0])
def test_soft_values_of_any_mu(make_quantizer, isa, bits, mu):
    problem = make_quantizer(bits, (7, 130), mu=mu)
    weight, scale, table = inputs_of(problem)
    expected = fake_quantize_cpu.forward(weight.double(), scale.double(), table.double(), True)
    torch.testing.assert_close(forward(weight, scale, table, True).double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("shape", "per_channel"), SHAPES)
def test_gradients(make_quantizer, isa, bits, shape, per_channel):
    problem = make_quantizer(bits, shape, per_channel=per_channel, limit=0.9)
    inputs, grad = inputs_of(problem), torch.randn(shape)
    actual = backward(grad, *inputs)
    exact = [tensor.double() for tensor in inputs]
    expected = fake_quantize_cpu.backward(grad.double(), *exact, 0.1, True)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs) < (1e-4 if bits > 5 else 2e-5)
    without = backward(grad, *inputs, table_grad=False)
    assert same(without[:2], actual[:2]) and without[2].isnan().all()


@pytest.mark.parametrize("mu", [0.0, 1e-8, 1e-3, 3.9e-3, 4.1e-3, 0.029, 0.031, 0.1, 8.0, 255.0])
def test_the_gradient_of_mu(make_quantizer, isa, mu):
    """Where the closed form cancels, and where the series ends."""
    problem = make_quantizer(3, (20, 100), mu=mu)
    inputs, grad = inputs_of(problem), torch.randn(20, 100)
    exact = [tensor.double() for tensor in inputs]
    leaf = exact[2].clone().requires_grad_()
    parts = tables.split_table(leaf)
    x = exact[0] / exact[1][:, None]
    y = tables.compress(x.clamp(*parts.bounds.tolist()), parts.curve[1])
    inside = (x > parts.bounds[0]) & (x < parts.bounds[1])
    cell = torch.searchsorted(parts.edges.detach(), y.detach())
    sigma = torch.sigmoid(parts.curve[0] * y + parts.offset[cell])
    soft = exact[1][:, None] * (parts.left[cell] + parts.jump[cell] * sigma)
    (dtable,) = torch.autograd.grad(soft[inside], leaf, grad[inside].double())
    actual = backward(grad * inside, *inputs, straight_through=0.0)[2]
    torch.testing.assert_close(actual[-3].double(), dtable[-3], rtol=2e-4, atol=2e-4)


def test_straight_through_shares(make_quantizer, isa):
    inputs = inputs_of(make_quantizer(3))
    grad = torch.randn(inputs[0].shape)
    plain, mixed, identity = (backward(grad, *inputs, straight_through=share) for share in (0.0, 0.25, 1.0))
    assert torch.equal(identity[0], grad)
    torch.testing.assert_close(mixed[0], 0.75 * plain[0] + 0.25 * identity[0])
    torch.testing.assert_close(mixed[1], 0.75 * plain[1] + 0.25 * identity[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(plain[2], mixed[2])


# --- what is awkward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 100, 254, 255])
def test_any_number_of_borders_in_any_crowd(isa, count):
    torch.manual_seed(count)
    weight, scale = torch.randn(4, 333), torch.tensor([1.0, 0.3, 2.0**-100, 2.0**100])
    weight *= scale[:, None]
    infinite = torch.randn(count).masked_fill_(torch.rand(count) < 0.3, torch.inf)
    for borders in (torch.randn(count), torch.randn(count) * 1e-6, torch.zeros(count), infinite, -infinite):
        borders = borders.sort().values
        weight[:, :count] = (scale[:, None] * borders).nan_to_num(posinf=0, neginf=0)  # on the borders
        assert torch.equal(encode(weight, scale, borders), count_by_definition(weight, scale, borders))


def test_no_borders_give_zeros(isa):
    assert not encode(torch.randn(3, 20), torch.ones(3), torch.zeros(0)).any()


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-45, -1e-45, 0.0, -0.0, 1.0])


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_special_weights(make_quantizer, isa, bits):
    table, scale = make_quantizer(bits).table(), torch.tensor([0.5, 0.0, 1e-42, 2e-38, 1e30])
    weight = SPECIAL.repeat(5, 2)[:, :19].contiguous()
    finite, borders = weight.isfinite(), tables.split_table(table).thresholds
    assert torch.equal(encode(weight, scale, borders)[0], count_by_definition(weight, scale, borders)[0])
    for soft in (False, True):
        out = forward(weight, scale, table, soft)
        assert torch.equal(out.isnan(), ~finite)
        assert not out[1][finite[1]].any() and not torch.signbit(out[1][finite[1]]).any()
        assert (out[finite].abs() <= scale[:, None].expand_as(out)[finite]).all()
    dweight, dscale, dtable = backward(torch.ones_like(weight), weight, scale, table)
    assert torch.equal(dweight.isnan(), ~finite)
    assert dscale.isnan().all() and dtable.isnan().any()
    weight = weight.nan_to_num(0.0, 3e38, -3e38)
    assert all(grad.isfinite().all() for grad in backward(torch.ones_like(weight), weight, scale, table))


def test_nothing_to_quantize():
    table = torch.zeros(24)
    for shape, scales in (((0, 3), 0), ((4, 0), 4), ((0,), 1)):
        weight, scale = torch.zeros(shape), torch.ones(scales)
        assert forward(weight, scale, table, True).shape == encode(weight, scale, table[:3]).shape == shape
        _, dscale, dtable = backward(weight, weight, scale, table)
        assert torch.equal(dscale, torch.zeros(scales)) and torch.equal(dtable, torch.zeros(24))


def test_arrays_need_no_alignment(make_quantizer, isa):
    weight, scale, table = inputs_of(make_quantizer(5, (3, 40)))
    shifted = torch.cat([torch.zeros(1), weight.flatten()])[1:].view(3, 40)
    for soft in (False, True):
        assert torch.equal(forward(shifted, scale, table, soft), forward(weight, scale, table, soft))
    assert same(backward(shifted, shifted, scale, table), backward(weight, weight, scale, table))


def test_arrays_of_numpy_do_as_well(make_quantizer):
    weight, scale, table = inputs_of(make_quantizer(4))
    out = np.full(weight.shape, np.nan, np.float32)
    native.fake_quantize(weight.numpy(), scale.numpy(), table.numpy(), True, out)
    assert np.array_equal(out, forward(weight, scale, table, True).numpy())


# --- chunks and threads -----------------------------------------------------------------------------------------------

CHUNKED = [(3, 50_000), (700, 97), (1, CHUNK), (2, CHUNK), (5, CHUNK // 2 + 1), (1, 3 * CHUNK + 5)]


@pytest.mark.parametrize("shape", CHUNKED)
@pytest.mark.parametrize("per_channel", [True, False])
def test_rows_that_chunks_cut(make_quantizer, shape, per_channel):
    problem = make_quantizer(4, shape, per_channel=per_channel)
    inputs = inputs_of(problem)
    grad = torch.randn(shape) * away_from_edges(*inputs)
    actual = backward(grad, *inputs)
    expected = fake_quantize_cpu.backward(grad.double(), *[tensor.double() for tensor in inputs], 0.1, True)
    assert relative_error(actual[0], expected[0]) < 2e-5
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=5e-3)  # a sum's terms reach 4


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("shape", CHUNKED)
def test_threads_do_not_change_results(make_quantizer, isa, bits, shape):
    if isa == "portable" and bits == 8:
        pytest.skip("slow")
    weight, scale, table = inputs_of(make_quantizer(bits, shape))
    borders = tables.split_table(table).thresholds
    grad = torch.randn(shape)
    results = [
        [forward(weight, scale, table, soft, threads) for soft in (False, True)]
        + [encode(weight, scale, borders, threads).int(), *backward(grad, weight, scale, table, threads=threads)]
        for threads in (1, 2, 5)
    ]
    assert same(results[1], results[0]) and same(results[2], results[0])


def test_sums_of_more_chunks_than_are_kept(make_quantizer):
    """The first rows alone give the same sums, those of the others are 0."""
    weight, scale, table = inputs_of(make_quantizer(2, (3, WAVE // 2 + 1000)))
    grad = torch.randn(weight.shape)
    whole, last = backward(grad, weight, scale, table), backward(grad[2:], weight[2:], scale[2:], table)
    first = backward(grad[:2], weight[:2], scale[:2], table)
    assert torch.equal(whole[0], torch.cat([first[0], last[0]]))
    torch.testing.assert_close(whole[1], torch.cat([first[1], last[1]]), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(whole[2], first[2] + last[2], rtol=1e-4, atol=1e-1)
    assert same(backward(grad, weight, scale, table, threads=3), whole)


def test_codes_and_hard_values_are_the_same_everywhere(make_quantizer):
    for bits in range(1, 9):
        weight, scale, table = inputs_of(make_quantizer(bits, (9, 333)))
        borders = tables.split_table(table).thresholds
        results = []
        for isa in native.isas():
            with using(isa):
                results.append((encode(weight, scale, borders).int(), forward(weight, scale, table, False)))
        assert all(same(result, results[0]) for result in results)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": torch.zeros(3, 4).double()}, "weight must be float32, got float64"),
        ({"weight": torch.zeros(4, 3).T}, "weight must be contiguous"),
        ({"scale": torch.ones(5)}, "scales must divide the 12 weights, got 5"),
        ({"scale": torch.ones(0)}, "scales must be from 1 to .*, got 0"),
        ({"table": torch.zeros(23)}, "table must have 24 elements, got 23"),
        ({"table": torch.zeros(6 * 512)}, "table must have 1536 elements, got 3072"),
        ({"table": torch.zeros(0)}, "table must have 12 elements, got 0"),
        ({"out": torch.zeros(11)}, "out must have 12 elements, got 11"),
        ({"threads": 0}, "threads must be from 1 to 2147483647, got 0"),
    ],
)
def test_arguments_that_are_refused(changes, message):
    arguments = {"weight": torch.zeros(3, 4), "scale": torch.ones(3), "table": torch.zeros(24), "soft": False}
    arguments |= {"out": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=message):
        native.fake_quantize(**(arguments | changes))


def test_arguments_of_the_backward_pass_that_are_refused():
    weight, scale, table = torch.zeros(3, 4), torch.ones(3), torch.zeros(24)
    right = [weight, weight, scale, table, 0.0, weight.clone(), scale.clone(), table.clone()]
    names = ["grad", "weight", "scale", "table", None, "dweight", "dscale", "dtable"]
    for place, name in itertools.compress(enumerate(names), names):
        arguments = list(right)
        arguments[place] = arguments[place].double()
        with pytest.raises(ValueError, match=f"{name} must be float32, got float64"):
            native.fake_quantize_backward(*arguments)
    for place in (0, 5, 6, 7):
        arguments = list(right)
        arguments[place] = torch.zeros(1)
        with pytest.raises(ValueError, match=f"{names[place]} must have .* elements, got 1"):
            native.fake_quantize_backward(*arguments)


def test_borders_and_codes_that_are_refused():
    weight, scale, codes = torch.zeros(3, 4), torch.ones(3), torch.zeros(3, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="border_count must be from 0 to 255, got 256"):
        native.encode(weight, scale, torch.zeros(256), codes)
    with pytest.raises(ValueError, match="codes must be uint8, got int8"):
        native.encode(weight, scale, torch.zeros(3), codes.to(torch.int8))
