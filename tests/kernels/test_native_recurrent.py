"""LSTM and GRU layers of the native library."""

import pytest
import torch
from panels import CODEBOOKS, Panels, using

from gq_triton.kernels import native
from gq_triton.kernels import packed_recurrent as pr

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")

KINDS = ["lstm", "projected lstm", "gru"]
LENGTHS = [5, 4, 4, 2, 1]


class Layer:
    """One layer and direction, and its input."""

    def __init__(
        self,
        kind="lstm",
        *,
        inputs=20,
        hidden=37,
        batch=3,
        steps=4,
        lengths=None,
        reverse=False,
        bits=(4, 3, 5),
        codebook=torch.int8,
        quantized="int8",
        bias=True,
    ):
        torch.manual_seed(0)
        self.gates, projected = 3 if kind == "gru" else 4, kind == "projected lstm"
        size = 1 + hidden // 2 if projected else hidden
        self.sizes = [sum(n > t for n in lengths) for t in range(lengths[0])] if lengths else [batch] * steps
        batch = self.sizes[0] if self.sizes else batch
        self.reverse, self.quantized = reverse, quantized
        self.x = torch.randn(sum(self.sizes), inputs)
        self.states = [torch.randn(batch, size).tanh(), torch.randn(batch, hidden)][: self.gates - 2]
        shapes = pr.weight_shapes(inputs, [torch.empty(0, size), torch.empty(0, hidden)][: self.gates - 2])
        shapes = shapes[: 3 if projected else 2]
        self.weights = [
            Panels(rows, columns, width, codebook, groups, one_scale=groups == 1)
            for (rows, columns, groups), width in zip(shapes, bits, strict=False)
        ]
        self.biases = [torch.randn(self.gates * hidden) for _ in range(2 if bias else 0)]

    def segments(self):
        return list(pr._segments(self.sizes, self.reverse))

    def run(self, segments=None, x=None, states=None, threads=1):
        """[output, h, c] of an LSTM, [output, h] of a GRU."""
        x, states = self.x if x is None else x, self.states if states is None else states
        out = torch.full((len(x), self.states[0].shape[1]), torch.nan)
        last = [torch.full_like(state, torch.nan) for state in states]
        weights = [weight.weight for weight in self.weights]
        segments = native.Segments(self.segments() if segments is None else segments)
        native.Recurrent(weights, self.biases, self.activations(), threads)(x, segments, states, out, last)
        return [out, *last]

    def matrices(self):
        return [weight.matrix.double() for weight in self.weights]

    def activations(self):
        return [self.quantized] * len(self.weights)

    def reference(self):
        sizes = torch.tensor(self.sizes)
        return pr.reference(self.x, sizes, self.states, self.matrices(), self.biases, self.reverse, self.activations())

    def step(self, x, states):
        """The reference of a step with these states."""
        biases = [bias.double() for bias in self.biases]
        states = [state.double() for state in states]
        return pr._step(states, x.double(), self.matrices(), biases, self.activations())


def bits_of(results):
    return [result.view(torch.int32) for result in results]


def same(first, second):
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(bits_of(first), bits_of(second), strict=True))


def close(actual, expected, atol=3e-6):
    for result, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(result.double(), truth.double(), atol=atol, rtol=1e-5)


def step_by_step(layer, atol=3e-6):
    """Compares every step with its definition, from the h that the library had before it: rounding to integers would
    make much of a last bit."""
    output, *last = layer.run()
    c = layer.states[1].double() if layer.gates == 4 else None
    expected_last = [state.double() for state in layer.states]
    for row, first, count, before in layer.segments():
        tokens = slice(first, first + count)
        h = layer.states[0][tokens] if before is None else output[before : before + count]
        new = layer.step(layer.x[row : row + count], [h, c[tokens]] if layer.gates == 4 else [h])
        close([output[row : row + count]], new[:1], atol)
        for state, value in zip(expected_last, new, strict=True):
            state[tokens] = value
        c = expected_last[-1]
    close(last, expected_last, atol)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gate_functions_are_those_of_float64(isa):
    """Of an LSTM whose weights are 0, c = sigmoid(i) tanh(g) of the biases: either factor is 1 at 40."""
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 88.0, -88.0, 1e4, -1e4, 3e38, -3e38]
    ranges = [torch.linspace(-12, 12, 20001), torch.linspace(-100, 100, 5001), torch.logspace(-8, 1, 999)]
    values = torch.cat([torch.tensor(special), *ranges])
    hidden = len(values)
    ones, zeros = torch.full((hidden,), 40.0), torch.zeros(hidden)
    weights = [Panels(4 * hidden, 1, 1, groups=4), Panels(4 * hidden, 1, 1, groups=4), Panels(1, hidden, 1)]
    for weight in weights:
        weight.scale.zero_()
    for i, g, expected in (values, ones, torch.sigmoid(values.double())), (ones, values, torch.tanh(values.double())):
        bias, h, c = torch.cat([i, zeros, g, zeros]), torch.zeros(1, 1), torch.zeros(1, hidden)
        out, last_h, last_c = torch.empty(1, 1), torch.empty(1, 1), torch.empty(1, hidden)
        layer = native.Recurrent([weight.weight for weight in weights], [bias, torch.zeros_like(bias)], ["none"] * 3)
        layer(torch.zeros(1, 1), native.Segments.of_one_sequence(1), [h, c], out, [last_h, last_c])
        torch.testing.assert_close(last_c[0].double(), expected, atol=2e-7, rtol=0, equal_nan=True)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_floats_match_the_reference(kind, reverse, lengths, isa):
    layer = Layer(kind, reverse=reverse, lengths=lengths, codebook=torch.float32, quantized="none")
    close(layer.run(), layer.reference())


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_match_the_definition_step_by_step(kind, reverse, lengths):
    step_by_step(Layer(kind, reverse=reverse, lengths=lengths))


@pytest.mark.parametrize("quantized", ["none", "int8", "fp8"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_codebooks_and_activations(kind, codebook, quantized):
    step_by_step(Layer(kind, codebook=codebook, quantized=quantized))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_width(kind, bits):
    step_by_step(Layer(kind, bits=(bits, 1 + bits % 8, 9 - bits)))


@pytest.mark.parametrize("hidden", [1, 16, 17, 64, pytest.param(1000, marks=pytest.mark.full)])
@pytest.mark.parametrize("batch", [1, 2, 7, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, batch, hidden):
    # Of so many numbers to be projected, one or another is rounded to the other neighbour.
    atol = 1e-3 if kind == "projected lstm" and hidden == 1000 else 3e-6
    step_by_step(Layer(kind, hidden=hidden, batch=batch, inputs=1 + hidden, steps=2), atol)


@pytest.mark.parametrize("kind", KINDS)
def test_without_biases(kind):
    layer = Layer(kind, bias=False, codebook=torch.float32, quantized="none")
    close(layer.run(), layer.reference())


@pytest.mark.skipif(len(native.isas()) < 2, reason="one instruction set")
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_the_same_to_the_bit_on_every_instruction_set(kind, batch):
    layer = Layer(kind, batch=batch, inputs=70)
    results = []
    for name in native.isas():
        with using(name):
            results.append(layer.run())
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind, quantized):
    layer = Layer(kind, hidden=300, steps=20, lengths=[20, 20, 7], quantized=quantized)  # large enough for some
    assert all(same(layer.run(threads=threads), layer.run()) for threads in (2, 3, 16))


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_any_length_give_the_same_bits(kind, quantized):
    """Long enough for a call to take its inputs in several parts."""
    layer = Layer(kind, hidden=300, inputs=8, batch=2, steps=200, quantized=quantized)
    states, outputs, start = layer.states, [], 0
    for steps in (1, 1, 100, 3, 95):
        x = layer.x[2 * start : 2 * (start + steps)]
        output, *states = layer.run(list(pr._segments([2] * steps, False)), x, states)
        outputs.append(output)
        start += steps
    assert same([torch.cat(outputs), *states], layer.run())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_more_sequences_than_a_part_holds(kind):
    layer = Layer(kind, hidden=300, inputs=8, batch=250, steps=2)
    alone = [layer.run(list(pr._segments([1, 1], False)), *one(layer, token)) for token in (0, 217, 249)]
    output, *last = layer.run()
    for token, (expected, *states) in zip((0, 217, 249), alone, strict=True):
        assert same([output[token::250]], [expected])
        assert same([state[token : token + 1] for state in last], states)


def one(layer, token):
    """Input and states of one sequence."""
    return layer.x[token :: len(layer.states[0])].contiguous(), [state[token : token + 1] for state in layer.states]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("quantized", ["none", "int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_stays_with_its_token(kind, quantized, value, isa):
    layer = Layer(kind, batch=5, steps=2, quantized=quantized)
    layer.x[2, 1] = value
    output, *last = layer.run()
    for result in (output[:5], output[5:], *last):
        if value != value or quantized != "none":
            assert result[2].isnan().all()
        assert result[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 2])
def test_no_steps_leave_the_states(kind, batch):
    layer = Layer(kind, batch=batch, steps=0)
    output, *last = layer.run()
    assert output.shape[0] == 0 and same(last, layer.states)


def test_sequences_without_rows_keep_their_states():
    layer = Layer(batch=3, steps=1)
    output, *last = layer.run([(0, 1, 1, None)], layer.x[:1])
    for state, start in zip(last, layer.states, strict=True):
        assert same([state[[0, 2]]], [start[[0, 2]]])
    assert same([last[0][1]], [output[0]])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segments, message",
    [
        ([(0, 0, 2, None)], "segments must have all 6 rows, got 2"),
        ([(0, 0, 3, None), (2, 0, 3, 0)], "segment 1 writes a row for the second time"),
        ([(0, 0, 3, 3), (3, 0, 3, 0)], "segment 0 reads states before they are there"),
        ([(0, 0, 4, None), (3, 0, 3, 0)], "a segment's count must be from 1 to 3, got 4"),
        ([(4, 0, 3, None)], "a segment's row must be from 0 to 3, got 4"),
        ([(-1, 0, 3, None)], "a segment's row must be from 0 to 3, got -1"),
        ([(0, 1, 3, None)], "a segment's sequence must be from 0 to 0, got 1"),
        ([(0, 0, 0, None)], "a segment's count must be from 1 to 3, got 0"),
        ([(0, 0, 3, 4)], "a segment's row of states must be from -1 to 3, got 4"),
    ],
)
def test_segments_that_are_refused(segments, message):
    with pytest.raises(ValueError, match=message):
        Layer(steps=2).run(segments)


def first_columns(tensors, count):
    return [tensor[:, :count].contiguous() for tensor in tensors]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("x", lambda layer: layer.x[:, 1:].contiguous(), "x must have 240 elements, got 228"),
        ("states", lambda layer: first_columns(layer.states, 36), "out must have 444 elements, got 432"),
        ("states", lambda layer: [layer.states[0], layer.states[1][:2]], "c0 must have 111 elements, got 74"),
        ("biases", lambda layer: [bias[1:] for bias in layer.biases], "bias_ih must have 148 elements, got 147"),
        ("weights", lambda layer: [layer.weights[0]] * 2, "hh must have 148 rows, 37 columns and 4 groups"),
        ("weights", lambda layer: [*layer.weights, Panels(37, 36, 2)], "hr must have 37 rows, 37 columns and 1 groups"),
        ("weights", lambda layer: [Panels(148, 20, 2), layer.weights[1]], r"ih.groups must be 4 \(LSTM\) or 3"),
        ("quantized", lambda layer: "int4", "activations must be one of none, int8, fp8, got int4"),
    ],
)
def test_arguments_that_are_refused(name, change, message):
    layer = Layer()
    setattr(layer, name, change(layer))
    with pytest.raises(ValueError, match=message):
        layer.run()


@pytest.mark.parametrize("kind", KINDS)
def test_no_units_are_refused(kind):
    with pytest.raises(ValueError, match="ih.rows must be from 1"):
        Layer(kind, hidden=0).run()


def test_threads_that_are_refused():
    with pytest.raises(ValueError, match="threads must be from 1"):
        Layer().run(threads=0)
