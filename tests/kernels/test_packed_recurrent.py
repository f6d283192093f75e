import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import packed_recurrent as pr
from gq_triton.kernels import packing, tiles

KINDS = {"lstm": (2, 0), "projected lstm": (2, 3), "gru": (1, 0)}  # states, outputs of the projection
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
ENTRIES = {torch.float32: 1.0, torch.int8: 127.0, torch.float8_e4m3fn: 256.0}
LENGTHS = [3, 3, 1]


def problem(
    kind="lstm",
    *,
    inputs=6,
    hidden=7,
    batch=5,
    steps=2,
    bits=(3, 5, 2),
    dtype=torch.float32,
    codebook=torch.float32,
    lengths=None,
    bias=True,
):
    """Arguments of `packed_recurrent` up to `biases`; with ``lengths``, of sequences that are so long."""
    count, projection = KINDS[kind]
    size, batch = projection or hidden, len(lengths) if lengths else batch
    batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])]) if lengths else None
    x = torch.randn(sum(lengths), inputs) if lengths else torch.randn(steps, batch, inputs)
    states = [torch.randn(batch, size), torch.randn(batch, hidden)][:count]
    shapes = pr.weight_shapes(inputs, states)[: 3 if projection else 2]
    weights = [part for shape, width in zip(shapes, bits, strict=False) for part in weight(*shape[:2], width, codebook)]
    biases = [torch.randn(shapes[0][0]) for _ in range(2 if bias else 0)]
    states, biases = ([tensor.to(dtype) for tensor in part] for part in (states, biases))
    return [x.to(dtype), batch_sizes, states, weights, list(bits[: len(shapes)]), biases]


def weight(rows, columns, bits, codebook):
    """Codes, codebook and scale; entries are exact in 16 bits, as a GPU's tensor cores take them."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    entries = torch.linspace(-1, 1, 2**bits).bfloat16().float() * ENTRIES[codebook]
    entries = entries.round() if codebook == torch.int8 else entries
    return [packing.pack(codes, bits), entries.to(codebook), torch.rand(rows) / columns**0.5 + 0.1]


def tiled(arguments):
    """The same problem with tiled codes."""
    x, batch_sizes, states, weights, bits, biases = arguments
    weights = list(weights)
    for index, (shape, width) in enumerate(zip(pr.weight_shapes(x.shape[-1], states), bits, strict=False)):
        weights[3 * index] = tiles.tile(weights[3 * index], width, *shape)
    return [x, batch_sizes, states, weights, bits, biases]


def on(device, arguments):
    """The arguments there, but for `batch_sizes`, which stay."""
    x, batch_sizes, states, weights, bits, biases = arguments
    moved = [[tensor.to(device) for tensor in part] for part in (states, weights, biases)]
    return [x.to(device), batch_sizes, moved[0], moved[1], bits, moved[2]]


def expected(arguments, reverse=False):
    x, batch_sizes, states, weights, bits, biases = arguments
    decoded = pr.decode_weights(x, states, weights, bits, tiled=False)
    return pr.reference(x, batch_sizes, states, decoded, biases, reverse)


def check(actual, wanted, dtype=torch.float32):
    for result, truth in zip(actual, wanted, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double().cpu(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    """Runs the operator's arguments in the layout that the implementation wants."""
    if request.param == "cpu":
        return lambda arguments, reverse=False: pr._forward_cpu(*arguments, reverse, False)
    device = request.getfixturevalue("kernel_device")
    return lambda arguments, reverse=False: pr._launch(*on(device, tiled(arguments)), reverse, True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, LENGTHS, pytest.param([5, 4, 4, 2, 1], marks=pytest.mark.full)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_reference(implementation, kind, reverse, lengths):
    arguments = problem(kind, lengths=lengths)
    check(implementation(arguments, reverse), expected(arguments, reverse))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_width(implementation, kind, bits, steps):
    arguments = problem(kind, bits=(bits, 1 + bits % 8, 9 - bits), steps=steps, batch=2)
    check(implementation(arguments), expected(arguments))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_several_blocks_of_rows_columns_and_tokens(implementation, kind, steps):
    arguments = problem(kind, inputs=70, hidden=37, batch=9, bits=(4, 4, 4), steps=steps)
    check(implementation(arguments), expected(arguments))


@pytest.mark.full
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("batch", [17, 64, 70])
@pytest.mark.parametrize("hidden", [16, 33, 96])
@pytest.mark.parametrize("kind", KINDS)
def test_larger_batches(implementation, kind, hidden, batch):
    arguments = problem(kind, inputs=130, hidden=hidden, batch=batch, bits=(2, 4, 1))
    check(implementation(arguments), expected(arguments))


@pytest.mark.parametrize("codebook", ENTRIES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(implementation, dtype, codebook):
    arguments = problem("projected lstm", dtype=dtype, codebook=codebook, steps=1)
    check(implementation(arguments), expected(arguments), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_in_16_bits(implementation, kind, dtype):
    arguments = problem(kind, dtype=dtype, batch=2)
    check(implementation(arguments), expected(arguments), dtype)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_without_biases(implementation, kind, steps):
    arguments = problem(kind, bias=False, steps=steps)
    check(implementation(arguments), expected(arguments))


@pytest.mark.parametrize("kind", KINDS)
def test_any_stride_one_scale_and_wide_biases(implementation, kind):
    x, batch_sizes, states, weights, bits, biases = problem(kind, dtype=torch.float16)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    states = [state.t().contiguous().t() for state in states]
    weights[2::3] = [scale[:1] for scale in weights[2::3]]
    arguments = [x, batch_sizes, states, weights, bits, [bias.float() for bias in biases]]
    check(implementation(arguments), expected(arguments), torch.float16)


def test_the_cell_is_kept_in_float32_on_a_gpu(kernel_device):
    """Forget gates of 1 and inputs that add less than half a unit in the last place of float16, many times."""
    steps, hidden = 40, 3
    bias = torch.tensor([-8.0, 20.0, 20.0, 20.0]).repeat_interleave(hidden)
    states = [torch.zeros(1, hidden).half(), torch.ones(1, hidden).half()]
    weights = [*weight(4 * hidden, 2, 1, torch.float32), *weight(4 * hidden, hidden, 1, torch.float32)]
    for scale in weights[2::3]:
        scale.zero_()
    arguments = [torch.zeros(steps, 1, 2).half(), None, states, weights, [1, 1], [bias, torch.zeros_like(bias)]]
    *_, c = pr._launch(*on(kernel_device, tiled(arguments)), False, True)
    torch.testing.assert_close(c.double().cpu(), expected(arguments)[2], atol=1e-3, rtol=0)


def test_results_repeat_to_the_bit(implementation):
    arguments = problem("projected lstm", inputs=200, hidden=40, bits=(4, 4, 4))
    for first, second in zip(implementation(arguments), implementation(arguments), strict=True):
        assert torch.equal(first, second)


def test_not_a_number_stays_with_its_token(implementation):
    for kind in KINDS:
        arguments = problem(kind)
        arguments[0][0, 2, 1] = torch.nan
        for result in implementation(arguments):
            assert result[..., 2, :].isnan().all()
            assert result[..., [0, 1, 3, 4], :].isfinite().all()


def test_an_empty_batch(implementation):
    for kind, (count, projection) in KINDS.items():
        output, *last = implementation(problem(kind, batch=0))
        assert output.shape == (2, 0, projection or 7)
        assert [state.shape for state in last] == [(0, projection or 7), (0, 7)][:count]


@pytest.mark.parametrize("kind", KINDS)
def test_either_layout_runs_anywhere(kind, kernel_device):
    arguments = problem(kind, batch=2)
    check(pr._forward_cpu(*tiled(arguments), False, True), expected(arguments))
    check(pr._launch(*on(kernel_device, arguments), False, False), expected(arguments))


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6).map(lambda n: sorted(n, reverse=True)),
    back=st.booleans(),
)
def test_segments_take_every_row_once_and_continue_where_its_sequence_was(lengths, back):
    sizes = [sum(length > step for length in lengths) for step in range(lengths[0])]
    places = [(step, token) for step, size in enumerate(sizes) for token in range(size)]
    row_of = {place: row for row, place in enumerate(places)}
    done = []
    for row, first, count, before in pr._segments(sizes, back):
        for token in range(first, first + count):
            step, owner = places[row + token - first]
            assert owner == token
            earlier = (step + 1 if back else step - 1, token)
            assert row_of.get(earlier) == (None if before is None else before + token)
            assert before is None or row_of[earlier] in done
        done += range(row, row + count)
    assert sorted(done) == list(range(sum(lengths)))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(kind, reverse, lengths, device):
    x, _, states, weights, _, biases = arguments = problem(kind, lengths=lengths)
    leaves = [x, *states, *biases, *weights[1::3], *weights[2::3]]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = pr.packed_recurrent(*on(device, arguments), reverse, False)
    factors = [torch.randn(output.shape) for output in outputs]
    losses = [
        sum((result.cpu() * factor).sum() for result, factor in zip(results, factors, strict=True))
        for results in (outputs, expected(arguments, reverse))
    ]
    actual, wanted = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_only_where_they_are_asked_for(device):
    x, *rest = on(device, problem("gru"))
    output, _ = pr.packed_recurrent(x.requires_grad_(), *rest, False, False)
    output.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in (*rest[1], *rest[2], *rest[4]))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_registration(kind, device):
    arguments = on(device, problem(kind, lengths=LENGTHS))
    torch.library.opcheck(pr.packed_recurrent, (*arguments, True, False))
    arguments = on(device, tiled(problem(kind, bias=False)))
    arguments[0].requires_grad_()
    torch.library.opcheck(pr.packed_recurrent, (*arguments, False, True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_capture_a_call(kind, lengths):
    arguments = on("cuda", tiled(problem(kind, lengths=lengths)))
    x = arguments[0]
    pr.packed_recurrent(*arguments, False, True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pr.packed_recurrent(*arguments, False, True)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, pr.packed_recurrent(*arguments, False, True), atol=0, rtol=0)
