import json
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from malformed import may_be_refused
from safetensors.torch import save_file

from gq_triton.runtime.tensor_file import MAX_HEADER, TensorFile

ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def write(path, header, data=b"\0\0\0\0"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_every_dtype_is_read_as_safetensors_wrote_it(tmp_path):
    tensors = {
        str(dtype): torch.randn(3, 5).mul(20).to(dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float64)
    }
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "m", {"state": "ü"})
    with TensorFile(tmp_path / "m") as file:
        assert file.metadata == {"state": "ü"}
        assert file.entries.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read(name), tensor.numpy(), strict=True)


def test_floats_become_float32(tmp_path):
    x = torch.randn(7, 3)
    tensors = {str(kind): x.to(kind) for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
    save_file(tensors, tmp_path / "m")
    with TensorFile(tmp_path / "m") as file:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(file.read_floats(name), tensor.float().numpy(), strict=True)


def test_fp8_is_read_as_bytes(tmp_path):
    x = torch.linspace(-256, 256, 16).to(torch.float8_e4m3fn)
    save_file({"x": x}, tmp_path / "m")
    with TensorFile(tmp_path / "m") as file:
        np.testing.assert_array_equal(file.read("x"), x.view(torch.uint8).numpy())


def test_a_name_that_occurs_twice_is_found_among_many_at_once(tmp_path):
    names = [*range(200_000), "again", "again"]
    path = write(tmp_path / "m", b"{" + ",".join(f'"{name}":0' for name in names).encode() + b"}")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="the name 'again' occurs twice"):
        TensorFile(path)
    assert time.perf_counter() - start < 20  # comparing each with each takes half an hour


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_floats_that_are_not_finite_are_refused(value, tmp_path):
    save_file({"x": torch.tensor([1.0, value], dtype=torch.float64)}, tmp_path / "m")
    with TensorFile(tmp_path / "m") as file, pytest.raises(ValueError, match="x has values that are not finite"):
        file.read_floats("x")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TensorFile(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        TensorFile(tmp_path)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    path = write(tmp_path / "m", {"x": ENTRY})
    with TensorFile(path) as file:
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="it ends within the data of x"):
            file.read("x")


@pytest.mark.parametrize("content", [b"", b"\1\0\0", struct.pack("<Q", 0)])
def test_files_too_short_for_a_header_are_refused(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ValueError, match=r"/m cannot be loaded: it"):
        TensorFile(tmp_path / "m")


@pytest.mark.parametrize("length", [3, MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_said_to_be_longer_than_the_file_takes_no_memory(length, tmp_path):
    (tmp_path / "m").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=rf"header is said to have {length} bytes, of 2 that follow"):
        TensorFile(tmp_path / "m")


def test_a_header_beyond_the_limit_is_refused(tmp_path):
    write(tmp_path / "m", b"{}" + b" " * MAX_HEADER, b"")
    with pytest.raises(ValueError, match="header is said to have"):
        TensorFile(tmp_path / "m")


@pytest.mark.parametrize(
    "header, match",
    [
        (b"{", "header is not valid JSON"),
        (b"\xff{}", "header is not valid JSON"),
        (b"[" * 100_000, "header is not valid JSON"),
        (b'{"x": NaN}', "header is not valid JSON: NaN"),
        (b'{"x": ' + b"9" * 5000 + b"}", "header is not valid JSON"),
        (b'{"x": {}, "x": {}}', "the name 'x' occurs twice"),
        (b"[]", "header must be a JSON object"),
        ({"__metadata__": []}, "metadata must map names to texts"),
        ({"__metadata__": {"a": 1}}, "metadata must map names to texts"),
        ({"x": 1}, "x must have a dtype, a shape and data_offsets"),
        ({"x": {"dtype": "U8"}}, "x must have a dtype"),
        ({"x": ENTRY | {"more": 1}}, "x must have a dtype"),
        ({"x": ENTRY | {"dtype": "C64"}}, "x has dtype 'C64'; allowed are BOOL, "),
        ({"x": ENTRY | {"dtype": ["U8"]}}, "x has dtype"),
        ({"x": ENTRY | {"shape": 4}}, "x must have a shape"),
        ({"x": ENTRY | {"shape": [-4]}}, "x must have a shape"),
        ({"x": ENTRY | {"shape": [True, 4]}}, "x must have a shape"),
        ({"x": ENTRY | {"shape": [4.0]}}, "x must have a shape"),
        ({"x": ENTRY | {"shape": [2**62 + 1]}}, "x must have a shape"),
        ({"x": ENTRY | {"shape": [4] + [1] * 8}}, "x must have a shape of at most 8 dimensions"),
        ({"x": ENTRY | {"shape": [2**62] * 8}}, "x has 4 bytes; its shape and dtype need"),
        ({"x": ENTRY | {"dtype": "F32"}}, "x has 4 bytes; its shape and dtype need 16"),
        ({"x": ENTRY | {"data_offsets": [0]}}, "x must have two data_offsets"),
        ({"x": ENTRY | {"data_offsets": [4, 0]}}, "x must have two data_offsets"),
        ({"x": ENTRY | {"data_offsets": [-4, 0]}}, "x must have two data_offsets"),
        ({"x": ENTRY | {"data_offsets": [1, 5]}}, "the data of x begins at 1, where 0 is"),
        ({"x": ENTRY, "y": ENTRY}, "the data of y begins at 0, where 4 is"),
        ({"x": ENTRY, "y": ENTRY | {"data_offsets": [4, 8]}}, "tensors take 8 bytes of data, of 4 that it has"),
        ({"x": ENTRY | {"shape": [3], "data_offsets": [0, 3]}}, "tensors take 3 bytes of data, of 4 that it has"),
    ],
)
def test_malformed_headers_are_refused_with_what_is_wrong(header, match, tmp_path):
    path = write(tmp_path / "m", header)
    with pytest.raises(ValueError, match=match) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("real") / "m"
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8), "c": torch.zeros(2).bfloat16()}
    save_file(tensors, path, {"state": "{}"})
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(real, tmp_path_factory, data):
    """Any bytes changed, cut or added: a ValueError, or tensors of the bytes that the file has."""
    content = bytearray(real)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    _read_all(path)


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["U8", "F32", "x"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["x", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    ),
    st.binary(max_size=8),
)
@example({"x": ENTRY}, b"abcd")
def test_any_json_is_read_or_refused(tmp_path_factory, header, data):
    _read_all(write(tmp_path_factory.getbasetemp() / "json", header, data))


def _read_all(path):
    with may_be_refused(path), TensorFile(path) as file:
        assert sum(file.read(name).nbytes for name in file.entries) <= file.size
