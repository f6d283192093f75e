"""The native library: layouts, quantized tokens, linear layers, threads, and what it refuses."""

import concurrent.futures
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from panels import CODEBOOKS, Panels

from gq_triton.kernels import activations, native, packing
from gq_triton.kernels.tables import stored_values

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")

SHAPES = [(1, 1, 1), (16, 32, 1), (37, 70, 1), (17, 129, 1), (51, 33, 3), (64, 256, 4), (20, 300, 4)]


@pytest.fixture(params=native.isas())
def isa(request):
    before = native.isa()
    native.use(request.param)
    yield request.param
    native.use(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(weight, x, bias=None, activations="none", threads=1):
    """The layer's output, in the middle of memory that must stay as it is."""
    rows = weight.weight.rows
    room = torch.full((len(x) * rows + 64,), torch.nan)
    out = room[32 : 32 + len(x) * rows].view(len(x), rows)
    native.linear(x, weight.weight, bias, out, activations, threads)
    assert room[:32].isnan().all() and room[-32:].isnan().all()
    return out


def same(first, second):
    """To the bit."""
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


# --- layouts ----------------------------------------------------------------------------------------------------------


def panels_by_definition(codes, codebook, bits, groups):
    """Panels as the docstring of `gq_triton.kernels.panels` has them, byte by byte."""
    rows, columns = codes.shape
    values = bits == 8 and codebook.dtype == torch.int8
    stored = codebook.numpy()[codes.numpy()].view(np.uint8) ^ 128 if values else codes.numpy()
    blocks, tiles = -(-rows // groups // 16), -(-columns // 32)
    padded = np.full((groups, blocks * 16, tiles * 32), 128 if values else 0, np.uint8)
    padded[:, : rows // groups, :columns] = stored.reshape(groups, rows // groups, columns)
    # [block][group][tile][column group j][place l = 4 row + column mod 4]
    ordered = padded.reshape(groups, blocks, 16, tiles, 8, 4).transpose(1, 0, 3, 4, 2, 5)
    each = ordered.reshape(blocks, groups, tiles, 8, 1, 64) >> np.arange(bits, dtype=np.uint8)[:, None] & 1
    whole = 8 // bits * bits  # groups whose codes are not cut; a register has 8 bits of each place
    parts = (
        part.reshape(blocks, groups, tiles, bits, -1, 64) for part in (each[..., :whole, :, :], each[..., whole:, :, :])
    )
    registers = np.concatenate(list(parts), axis=-2) << np.arange(8, dtype=np.uint8)[:, None]
    return torch.from_numpy(np.bitwise_or.reduce(registers, axis=-2).reshape(-1))


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_panels_are_as_defined_and_turn_back(bits, codebook):
    for rows, columns, groups in SHAPES:
        weight = Panels(rows, columns, bits, codebook, groups)
        codes = packing.unpack(weight.planes, bits, (rows, columns))
        panels = weight.weight.arrays[0]
        if bits == 8 and codebook == torch.int8:  # of several codes of a value, the first one
            first = torch.tensor([weight.codebook.tolist().index(value) for value in weight.codebook.tolist()])
            codes = first[codes.long()].to(torch.uint8)
        assert torch.equal(panels, panels_by_definition(codes, weight.codebook, bits, groups))
        planes = torch.full_like(weight.planes, 255)
        native.to_planes(panels, weight.codebook, planes, bits, rows, columns, groups)
        assert torch.equal(planes, packing.pack(codes, bits))


def test_values_that_the_codebook_does_not_have_are_refused():
    codebook = torch.arange(256).clamp(max=100).to(torch.int8)
    panels, planes = torch.full((512,), 128 + 101, dtype=torch.uint8), torch.zeros(512, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight.panels hold a value that weight.codebook does not have"):
        native.to_planes(panels, codebook, planes, 8, 16, 32)


@pytest.mark.parametrize("features", [1, 15, 16, 17, 320, 1024])
def test_layers_are_normalized(features, isa):
    x, weight, bias = 3 * torch.randn(2, 3, features) + 1, torch.randn(features), torch.randn(features)
    out = torch.full_like(x, torch.nan)
    native.layer_norm(x, weight, bias, out)
    double = (tensor.double() for tensor in (weight, bias))
    expected = torch.nn.functional.layer_norm(x.double(), (features,), *double)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    native.layer_norm(x, weight, bias, x)
    assert torch.equal(x, out)
    with pytest.raises(ValueError, match="bias must have"):
        native.layer_norm(x, weight, torch.zeros(features + 1), out)
    with pytest.raises(ValueError, match=f"x must have weight's {features + 1} elements in its last dimension"):
        native.layer_norm(x, torch.zeros(features + 1), torch.zeros(features + 1), out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 16, 32), "bits must be from 1 to 8, got 0"),
        ((9, 16, 32), "bits must be from 1 to 8, got 9"),
        ((4, -1, 32), "rows must be from 0 to 1099511627776, got -1"),
        ((4, 16, 1 << 41), "columns must be from 0 to 1099511627776, got 2199023255552"),
        ((4, 16, 32, 0), "groups must be from 1 to 2147483647, got 0"),
        ((4, 17, 32, 3), "groups must divide the 17 rows, got 3"),
        ((8, 1 << 40, 1 << 40), "sizes are too large"),
    ],
)
def test_shapes_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        native.panel_bytes(*arguments)


def test_bytes_of_panels():
    assert native.panel_bytes(4, 16, 32) == 256
    assert native.panel_bytes(3, 17, 33) == 2 * 2 * 192
    assert native.panel_bytes(1, 20, 64, 4) == 4 * 2 * 64
    assert native.panel_bytes(5, 0, 64) == native.panel_bytes(5, 64, 0) == 0


# --- tokens -----------------------------------------------------------------------------------------------------------


def quantize(x):
    q, scale = torch.full(x.shape, 77, dtype=torch.int8), torch.full(x.shape[:-1], torch.nan)
    native.quantize_tokens(x, q, scale)
    return q, scale


def check_tokens(x):
    (q, scale), (expected_q, expected_scale) = quantize(x), activations.quantize_tokens(x, "int8")
    assert torch.equal(q, expected_q)
    assert torch.equal(scale.isnan(), expected_scale.isnan())
    assert same(scale.nan_to_num(-1.0), expected_scale.nan_to_num(-1.0))


@pytest.mark.parametrize("features", [0, 1, 3, 4, 15, 16, 17, 100, 1024])
def test_tokens_are_quantized_as_defined(features, isa):
    check_tokens(torch.randn(7, features) * torch.logspace(-30, 30, 7).unsqueeze(1))
    check_tokens(torch.randn(2, 3, features))
    check_tokens(torch.zeros(0, features))


def test_ties_go_to_even(isa):
    check_tokens(torch.cat([torch.arange(-127.0, 128.0) + 0.5, torch.tensor([127.0, -127.0])])[1:].clamp(-127, 127))


def test_tokens_of_zeros_of_tiny_and_of_infinite_numbers(isa):
    special = [0.0, -0.0, 1e-45, 1e-38, 1.4e-36, 3.4e38, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(list(itertools.product(special, special)))
    check_tokens(x)
    check_tokens(torch.nn.functional.pad(x, (0, 30)))
    check_tokens(torch.nn.functional.pad(x, (30, 0)))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_token_is_quantized_as_defined(numbers):
    check_tokens(torch.tensor([numbers]))


# --- linear layers ----------------------------------------------------------------------------------------------------


def integer_result(weight, codes, x, bias):
    """y of integer products, each operation rounded to float32."""
    q, scale = activations.quantize_tokens(x, "int8")
    sums = q.double() @ weight.codebook.double()[codes.long()].T
    y = sums.float() * (scale.unsqueeze(1) * (weight.scale / 127))
    return y if bias is None else y + bias


def check_integers(bits, rows, columns, groups=1, tokens=1, bias=True, one_scale=False):
    weight = Panels(rows, columns, bits, torch.int8, groups, one_scale)
    codes = packing.unpack(weight.planes, bits, (rows, columns))
    bias = torch.randn(rows) if bias else None
    x = torch.randn(tokens, columns)
    assert same(run(weight, x, bias, "int8"), integer_result(weight, codes, x, bias))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_products_are_exact(bits, isa):
    for rows, columns, groups in SHAPES:
        check_integers(bits, rows, columns, groups, tokens=3)
    check_integers(bits, 40, 70, tokens=1, bias=False, one_scale=True)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 15, 16, 17, 31, 63, 64, 65, 100, 1024, 1089])
def test_any_number_of_tokens(tokens, isa):
    check_integers(3, 50, 70, tokens=tokens)
    check_integers(8, 33, 40, tokens=tokens)


@pytest.mark.full
@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_products_of_all_shapes(bits, isa):
    for rows, columns, tokens in itertools.product([1, 15, 16, 33], [1, 31, 32, 33, 64, 127, 128, 500], range(1, 34)):
        check_integers(bits, rows, columns, tokens=tokens)


def test_extreme_integers(isa):
    """Sums near the largest that are allowed, where bytes that saturate would show."""
    columns = 1 << 17
    for bits, entry, number in itertools.product([1, 8], [-128, 127], [-1.0, 1.0]):
        weight = Panels(16, columns, bits, torch.int8)
        weight.codebook.fill_(entry)
        weight.scale.fill_(127.0)
        native.to_panels(weight.planes, weight.codebook, weight.weight.arrays[0], bits, 16, columns)
        out = run(weight, torch.full((1, columns), number), None, "int8")
        assert torch.equal(out, torch.full((1, 16), entry * number * 127 * columns) * torch.tensor(1 / 127))


def float_result(weight, x, bias, quantized):
    if quantized != "none":
        x = activations.reference(x, quantized)
    y = x.double() @ weight.matrix.double().T
    return y if bias is None else y + bias.double()


def check_floats(bits, codebook, rows, columns, groups=1, tokens=1, quantized="none", bias=True):
    """Against float64, where sums of n terms err by some 1e-7 sqrt(n) of the terms' size."""
    weight = Panels(rows, columns, bits, codebook, groups)
    bias = torch.randn(rows) if bias else None
    x = torch.randn(tokens, columns)
    out, truth = run(weight, x, bias, quantized), float_result(weight, x, bias, quantized)
    torch.testing.assert_close(out.double(), truth, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_float_products(bits, codebook, isa):
    for rows, columns, groups in SHAPES:
        check_floats(bits, codebook, rows, columns, groups, tokens=3)
    check_floats(bits, codebook, 40, 300, tokens=37, bias=False)


@pytest.mark.parametrize("quantized", ["int8", "fp8"])
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_tokens_are_quantized_for_float_products(codebook, quantized, isa):
    check_floats(4, codebook, 37, 70, tokens=5, quantized=quantized)
    check_floats(8, codebook, 16, 65, tokens=1, quantized=quantized)


def test_e4m3_tokens_are_those_of_the_reference(isa):
    """A weight of one column per row, 1 or 0, gives the tokens themselves."""
    weight = Panels(64, 64, 1)
    weight.codebook.copy_(torch.tensor([0.0, 1.0]))
    weight.scale.fill_(1.0)
    planes = packing.pack(torch.eye(64, dtype=torch.uint8), 1)
    native.to_panels(planes, weight.codebook, weight.weight.arrays[0], 1, 64, 64)
    x = torch.randn(50, 64) * torch.logspace(-40, 20, 50).unsqueeze(1)
    x[0, :3], x[1] = torch.tensor([-0.0, 1e-3, 448.0]), 0.0
    assert torch.equal(run(weight, x, None, "fp8"), activations.reference(x, "fp8"))


@pytest.mark.parametrize("bits", [1, 5, 7, 8])
def test_float_results_do_not_depend_on_the_number_of_tokens(bits, isa):
    weight, x = Panels(50, 333, bits), torch.randn(100, 333)
    alone = torch.cat([run(weight, token.unsqueeze(0)) for token in x])
    for tokens in (2, 3, 5, 8, 13, 16, 64, 100):
        assert same(run(weight, x[:tokens]), alone[:tokens])


@pytest.mark.parametrize("quantized", ["none", "int8", "fp8"])
@pytest.mark.parametrize("codebook", [torch.float32, torch.int8])
def test_what_is_not_finite_stays_in_its_token(codebook, quantized, isa):
    weight, x = Panels(20, 70, 4, codebook), torch.randn(5, 70)
    expected = run(weight, x, None, quantized)
    x[1, 3], x[3, 69] = torch.nan, torch.inf
    out = run(weight, x, None, quantized)
    assert out[1].isnan().all() and not out[3].isfinite().any()
    assert same(out[::2], expected[::2])


def test_no_columns_leave_the_bias(isa):
    weight, bias = Panels(20, 4, 4), torch.randn(20)
    empty = torch.zeros(0, dtype=torch.uint8)
    for codebook, quantized in ((weight.codebook, "none"), (weight.codebook.to(torch.int8), "int8")):
        weight.weight = native.Weight(empty, codebook, weight.scale, 4, 20, 0)
        assert torch.equal(run(weight, torch.zeros(3, 0), bias, quantized), bias.expand(3, 20))


def test_no_tokens_and_no_rows():
    assert run(Panels(20, 40, 4), torch.zeros(0, 40)).shape == (0, 20)
    weight = Panels(20, 40, 4)
    weight.weight = native.Weight(torch.zeros(0, dtype=torch.uint8), weight.codebook, torch.zeros(0), 4, 0, 40)
    assert run(weight, torch.zeros(3, 40)).shape == (3, 0)


def test_arrays_need_no_alignment(isa):
    weight, x = Panels(40, 100, 6, torch.int8), torch.randn(3, 100)
    expected = run(weight, x, None, "int8"), run(weight, x)
    panels = torch.cat([torch.zeros(1, dtype=torch.uint8), weight.weight.arrays[0]])[1:]
    weight.weight = native.Weight(panels, weight.codebook, weight.scale, 6, 40, 100)
    x = torch.cat([torch.zeros(1), x.view(-1)])[1:].view(3, 100)
    assert same(run(weight, x, None, "int8"), expected[0]) and same(run(weight, x), expected[1])


def test_arrays_of_numpy_do_as_well():
    weight, x, bias = Panels(20, 40, 4, torch.int8), torch.randn(3, 40), torch.randn(20)
    arrays = [array.numpy() for array in weight.weight.arrays]
    out = np.full((3, 20), np.nan, np.float32)
    native.linear(x.numpy(), native.Weight(*arrays, 4, 20, 40), bias.numpy(), out, "int8")
    assert np.array_equal(out, run(weight, x, bias, "int8").numpy())
    e4m3 = Panels(20, 40, 4, torch.float8_e4m3fn)
    codebook = e4m3.codebook.view(torch.uint8).numpy()
    panels, _, scale = e4m3.weight.arrays
    native.linear(x.numpy(), native.Weight(panels, codebook, scale, 4, 20, 40, e4m3=True), None, out)
    assert np.array_equal(out, run(e4m3, x).numpy())


def test_all_e4m3_numbers(isa):
    weight, codes = Panels(256, 1, 8, torch.float8_e4m3fn), torch.arange(256)
    weight.codebook.copy_(codes.to(torch.uint8).view(torch.float8_e4m3fn))
    finite = weight.codebook.float().isfinite()
    native.to_panels(packing.pack(codes.to(torch.uint8), 8), weight.codebook, weight.weight.arrays[0], 8, 256, 1)
    weight.scale.fill_(1.0)
    out = run(weight, torch.ones(1, 1))[0]
    assert torch.equal(out[finite], stored_values(weight.codebook)[finite])


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", ["none", "int8"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_threads_change_nothing(tokens, quantized):
    weight, x, bias = Panels(1200, 700, 4, torch.int8), torch.randn(tokens, 700), torch.randn(1200)
    expected = run(weight, x, bias, quantized)
    for threads in (2, 3, 64):
        assert same(run(weight, x, bias, quantized, threads), expected)


def test_threads_treat_subnormal_numbers_as_their_caller_does():
    weight, x = Panels(1200, 700, 4, torch.float32), 1e-37 * torch.randn(4, 700)
    run(weight, x, threads=2)  # from here on there are threads
    if not torch.set_flush_denormal(True):
        pytest.skip("subnormal numbers cannot be flushed here")
    try:
        assert same(run(weight, x, threads=2), run(weight, x))
    finally:
        torch.set_flush_denormal(False)


def test_calls_from_many_threads():
    weights = [Panels(1000, 500, bits, torch.int8) for bits in (2, 4, 8)]
    x = torch.randn(3, 500)
    expected = [run(weight, x, None, "int8") for weight in weights]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda i: run(weights[i % 3], x, None, "int8", 2), range(300)))
    assert all(same(result, expected[i % 3]) for i, result in enumerate(results))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_threads_of_its_own():
    weight, x = Panels(2000, 1000, 4, torch.int8), torch.randn(4, 1000)
    expected = run(weight, x, None, "int8", 2)
    child = os.fork()
    if not child:
        os._exit(0 if same(run(weight, x, None, "int8", 2), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same(run(weight, x, None, "int8", 2), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 9}, "weight.bits must be from 1 to 8, got 9"),
        ({"rows": -1}, "weight.rows must be from 0"),
        ({"rows": 64}, "weight.panels must have 2048 elements, got 1024"),
        ({"columns": 65}, "weight.panels must have 1536 elements, got 1024"),
        ({"groups": 7}, "weight.groups must divide the 20 rows, got 7"),
        ({"codebook": torch.zeros(8)}, "weight.codebook must have 64 elements, got 32"),
        ({"scale": torch.zeros(19)}, "weight.scale must have 20 elements, got 19"),
        ({"scale": None}, "weight.scale must have 20 elements, got 0"),
    ],
)
def test_weights_that_are_refused(changes, message):
    panels, codebook, scale = Panels(20, 64, 4).weight.arrays
    arguments = {"panels": panels, "codebook": codebook, "scale": scale, "bits": 4, "rows": 20, "columns": 64} | changes
    with pytest.raises(ValueError, match=message):
        native.linear(torch.zeros(1, arguments["columns"]), native.Weight(**arguments), None, torch.zeros(1, 20))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.zeros(3, 63)}, "x must have 128 elements, got 189"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x must be float32, got float64"),
        ({"x": torch.zeros(64, 3).T}, r"x must be contiguous and on the CPU, got strides \(1, 3\) on cpu"),
        ({"x": torch.zeros(3, 64, device="meta")}, "x must be contiguous and on the CPU, got .* on meta"),
        ({"x": np.zeros((3, 64))}, "x must be float32, got float64"),
        ({"x": np.zeros((64, 3), np.float32).T}, r"x must be contiguous, got strides \(4, 12\)"),
        ({"out": torch.zeros(3, 19)}, "y must have 60 elements, got 57"),
        ({"out": torch.zeros(3, 20, dtype=torch.int32)}, "out must be float32, got int32"),
        ({"bias": torch.zeros(3)}, "bias must have 20 elements, got 3"),
        ({"activations": "int4"}, "activations must be one of none, int8, fp8, got int4"),
        ({"threads": 0}, "threads must be from 1 to 2147483647, got 0"),
    ],
)
def test_arguments_that_are_refused(changes, message):
    arguments = {"x": torch.zeros(3, 64), "weight": Panels(20, 64, 4).weight, "bias": None, "out": torch.zeros(3, 20)}
    with pytest.raises(ValueError, match=message):
        native.linear(**(arguments | changes))


def test_outputs_that_cannot_be_written_are_refused():
    out = np.zeros((1, 20), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        native.linear(torch.zeros(1, 64), Panels(20, 64, 4).weight, None, out)


def test_integer_sums_that_could_overflow_are_refused():
    columns = (1 << 17) + 1
    weight = Panels(1, columns, 1, torch.int8)
    with pytest.raises(ValueError, match="weight.columns must be from 0 to 131072, got 131073"):
        run(weight, torch.zeros(1, columns), None, "int8")
    assert run(weight, torch.zeros(1, columns)).item() == 0


def test_columns_of_no_rows_take_no_memory():
    nothing = torch.empty(0, dtype=torch.uint8)
    native.to_panels(nothing, torch.zeros(16), nothing, 4, 0, 1 << 40)
    native.to_planes(nothing, torch.zeros(16), nothing, 4, 0, 1 << 40)


def test_codebooks_and_planes_that_are_refused():
    planes, panels, codebook = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8), torch.zeros(16)
    with pytest.raises(ValueError, match="codebook must be one of float32, int8, float8_e4m3fn, got float16"):
        native.to_panels(planes, codebook.half(), panels, 4, 16, 32)
    with pytest.raises(ValueError, match="planes must have 256 elements, got 255"):
        native.to_panels(planes[1:], codebook, panels, 4, 16, 32)
    with pytest.raises(ValueError, match="planes must have 240 elements, got 256"):
        native.to_planes(panels, codebook, planes, 4, 15, 32)
    with pytest.raises(ValueError, match="q must have 6 elements and scale one for each 3, got 5 and 2"):
        native.quantize_tokens(torch.zeros(2, 3), torch.zeros(5, dtype=torch.int8), torch.zeros(2))


# --- the module -------------------------------------------------------------------------------------------------------


def python(program, **environment):
    """What a program prints in a process of its own."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, **environment}
    command = [sys.executable, "-c", f"from gq_triton.kernels import native; {program}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_instruction_sets():
    assert native.isas()[-1] == "portable" and native.isa() in native.isas()
    with pytest.raises(ValueError, match=r"name must be one of .*portable, got mmx"):
        native.use("mmx")


def test_the_environment_chooses():
    assert python("print(native.isa())", GQ_TRITON_CPU="portable").stdout == "portable\n"
    program = "print(native.available(), native.isa(), native.isas(), native.reason())"
    assert python(program, GQ_TRITON_CPU="torch").stdout == "False None () GQ_TRITON_CPU is torch\n"
    assert "GQ_TRITON_CPU must be one of" in python("", GQ_TRITON_CPU="mmx").stderr
    failed = python("native.panel_bytes(4, 16, 32)", GQ_TRITON_CPU="torch").stderr
    assert "RuntimeError: the native CPU kernels are not available: GQ_TRITON_CPU is torch" in failed


def test_neither_torch_nor_numpy_is_imported():
    assert python("import sys; print({'torch', 'numpy'} & set(sys.modules))").stdout == "set()\n"


def test_huge_pages_leave_arrays_alone():
    for array in (torch.arange(3 << 19), np.arange(3 << 19), torch.zeros(0)):
        before = array.tolist()
        native.advise_huge(array)
        assert array.tolist() == before
