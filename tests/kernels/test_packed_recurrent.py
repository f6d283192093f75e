import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import packed_recurrent as pr
from gq_triton.kernels import packing
from gq_triton.kernels.layouts import convert

KINDS = {"lstm": (2, 0), "projected lstm": (2, 3), "gru": (1, 0)}  # states, outputs of the projection
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}
READS = {"native": "panels", "torch": "planes", "triton": "tiles"}
QUANTIZED = [["int8", "int8", "int8"], ["fp8", "fp8", "fp8"], ["none", "int8", "none"], ["int8", "none", "fp8"]]
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
    activations=("none", "none", "none"),
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
    count = len(shapes)
    return [x.to(dtype), batch_sizes, states, weights, list(bits[:count]), list(activations[:count]), biases]


def weight(rows, columns, bits, codebook):
    """Codes, codebook and scale; entries are exact in 16 bits, as a GPU's tensor cores take them."""
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    entries = torch.linspace(-1, 1, 2**bits).bfloat16().float() * ENTRIES[codebook]
    entries = entries.round() if codebook == torch.int8 else entries
    return [packing.pack(codes, bits), entries.to(codebook), torch.rand(rows) / columns**0.5 + 0.1]


def stored(arguments, layout):
    """The same problem with its codes in that layout."""
    x, batch_sizes, states, weights, bits, activations, biases = arguments
    weights = list(weights)
    for index, (shape, width) in enumerate(zip(pr.weight_shapes(x.shape[-1], states), bits, strict=False)):
        codes, codebook, _ = weights[3 * index : 3 * index + 3]
        weights[3 * index] = convert(codes, codebook, "planes", layout, width, *shape)
    return [x, batch_sizes, states, weights, bits, activations, biases]


def on(device, arguments):
    """The arguments there, but for `batch_sizes`, which stay."""
    x, batch_sizes, states, weights, bits, activations, biases = arguments
    moved = [[tensor.to(device) for tensor in part] for part in (states, weights, biases)]
    return [x.to(device), batch_sizes, moved[0], moved[1], bits, activations, moved[2]]


def expected(arguments, reverse=False):
    x, batch_sizes, states, weights, bits, activations, biases = arguments
    decoded = pr.decode_weights(x, states, weights, bits, "planes")
    return pr.reference(x, batch_sizes, states, decoded, biases, reverse, activations)


def check(actual, wanted, dtype=torch.float32):
    for result, truth in zip(actual, wanted, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double().cpu(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture
def implementation(kernels, request):
    """Runs the operator's arguments in the layout that the implementation wants."""
    device = request.getfixturevalue("kernel_device") if kernels == "triton" else torch.device("cpu")
    run, layout = pr._launch if kernels == "triton" else pr._forward_cpu, READS[kernels]
    return lambda arguments, reverse=False: run(*on(device, stored(arguments, layout)), reverse, layout)


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
    x, batch_sizes, states, weights, bits, activations, biases = problem(kind, dtype=torch.float16)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    states = [state.t().contiguous().t() for state in states]
    weights[2::3] = [scale[:1] for scale in weights[2::3]]
    arguments = [x, batch_sizes, states, weights, bits, activations, [bias.float() for bias in biases]]
    check(implementation(arguments), expected(arguments), torch.float16)


def test_the_cell_is_kept_in_float32_on_a_gpu(kernel_device):
    """Forget gates of 1 and inputs that add less than half a unit in the last place of float16, many times."""
    steps, hidden = 40, 3
    bias = torch.tensor([-8.0, 20.0, 20.0, 20.0]).repeat_interleave(hidden)
    states = [torch.zeros(1, hidden).half(), torch.ones(1, hidden).half()]
    weights = [*weight(4 * hidden, 2, 1, torch.float32), *weight(4 * hidden, hidden, 1, torch.float32)]
    for scale in weights[2::3]:
        scale.zero_()
    biases, activations = [bias, torch.zeros_like(bias)], ["none", "none"]
    arguments = [torch.zeros(steps, 1, 2).half(), None, states, weights, [1, 1], activations, biases]
    *_, c = pr._launch(*on(kernel_device, stored(arguments, "tiles")), False, "tiles")
    torch.testing.assert_close(c.double().cpu(), expected(arguments)[2], atol=1e-3, rtol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("activations", QUANTIZED)
@pytest.mark.parametrize("codebook", [torch.float32, torch.int8])
@pytest.mark.parametrize("kind", KINDS)
def test_activations(implementation, kind, codebook, activations, lengths):
    arguments = problem(kind, codebook=codebook, activations=activations, lengths=lengths)
    check(implementation(arguments, True), expected(arguments, True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_16_bits_with_quantized_activations(implementation, kind):
    arguments = problem(kind, dtype=torch.bfloat16, activations=QUANTIZED[0], codebook=torch.int8, steps=1)
    check(implementation(arguments), expected(arguments), torch.bfloat16)


def test_what_a_gru_keeps_is_not_quantized(implementation):
    arguments = problem("gru", activations=QUANTIZED[0])
    arguments[-1][0][7:14] = 200.0  # Z = 1
    h = arguments[2][0]
    for result in implementation(arguments):
        assert torch.equal(result.cpu(), h.expand_as(result))


@pytest.mark.parametrize("activations", QUANTIZED)
def test_sequences_may_be_cut_anywhere(implementation, activations):
    """A call for each step gives what one for all gives: h is quantized at every step, not once."""
    x, batch_sizes, states, *rest = problem("projected lstm", activations=activations, steps=4, batch=2)
    whole = implementation([x, batch_sizes, states, *rest])
    outputs = []
    for step in x:
        output, *states = implementation([step[None], batch_sizes, states, *rest])
        outputs.append(output)
    torch.testing.assert_close([torch.cat(outputs), *states], whole, atol=1e-5, rtol=1e-5)


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
def test_any_layout_runs_anywhere(kind, layout, kernel_device):
    arguments = problem(kind, batch=2)
    check(pr._forward_cpu(*stored(arguments, layout), False, layout), expected(arguments))
    check(pr._launch(*on(kernel_device, stored(arguments, layout)), False, layout), expected(arguments))


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
@pytest.mark.parametrize("activations", [["none"] * 3, ["int8"] * 3])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(kind, activations, reverse, lengths, device):
    x, _, states, weights, _, _, biases = arguments = problem(kind, lengths=lengths, activations=activations)
    leaves = [x, *states, *biases, *weights[1::3], *weights[2::3]]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = pr.packed_recurrent(*on(device, arguments), reverse, "planes")
    factors = [torch.randn(output.shape) for output in outputs]
    losses = [
        sum((result.cpu() * factor).sum() for result, factor in zip(results, factors, strict=True))
        for results in (outputs, expected(arguments, reverse))
    ]
    actual, wanted = (torch.autograd.grad(loss, leaves) for loss in losses)
    torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_only_where_they_are_asked_for(device):
    x, *rest = on(device, problem("gru"))
    output, _ = pr.packed_recurrent(x.requires_grad_(), *rest, False, "planes")
    output.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in (*rest[1], *rest[2], *rest[5]))


@pytest.mark.parametrize("kind", KINDS)
def test_operator_registration(kind, layout, device):
    arguments = on(device, stored(problem(kind, lengths=LENGTHS), layout))
    torch.library.opcheck(pr.packed_recurrent, (*arguments, True, layout))
    arguments = on(device, stored(problem(kind, bias=False, activations=["int8"] * 3), layout))
    arguments[0].requires_grad_()
    torch.library.opcheck(pr.packed_recurrent, (*arguments, False, layout))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", [["none"] * 3, ["int8"] * 3])
def test_cuda_graphs_capture_a_call(activations, kind, lengths):
    arguments = on("cuda", stored(problem(kind, lengths=lengths, activations=activations), "tiles"))
    x = arguments[0]
    pr.packed_recurrent(*arguments, False, "tiles")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pr.packed_recurrent(*arguments, False, "tiles")
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, pr.packed_recurrent(*arguments, False, "tiles"), atol=0, rtol=0)
