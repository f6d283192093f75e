"""Rows of weights as the native library decodes them."""

import numpy as np
import pytest
import torch
from panels import CODEBOOKS, Panels

from gq_triton.kernels import native
from gq_triton.kernels import packed_embedding as pe

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no native library"),
    pytest.mark.usefixtures("isa"),
]


def decode(weight, indices, columns):
    out = torch.full((len(indices), columns), torch.nan)
    native.decode_rows(indices, weight.weight, out)
    return out


def expected(weight, indices, columns):
    rows = weight.matrix.shape[0]
    scale = weight.scale.expand(rows).contiguous()
    return pe.reference(indices, weight.planes, weight.codebook, scale, weight.bits, columns)


def bits_of(tensor):
    return tensor.view(torch.int32)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_are_those_of_the_reference_to_the_bit(bits, codebook):
    weight = Panels(37, 70, bits, codebook)
    indices = torch.randint(0, 37, (50,))
    assert torch.equal(bits_of(decode(weight, indices, 70)), bits_of(expected(weight, indices, 70)))


@pytest.mark.parametrize("rows, columns, groups", [(1, 1, 1), (16, 32, 1), (40, 33, 4), (51, 300, 3), (68, 5, 4)])
def test_a_whole_weight(rows, columns, groups):
    weight = Panels(rows, columns, 5, torch.int8, groups)
    assert torch.equal(decode(weight, torch.arange(rows), columns), weight.matrix)


def test_one_scale_for_all_rows():
    weight = Panels(20, 40, 3, one_scale=True)
    assert torch.equal(decode(weight, torch.arange(20), 40), weight.matrix)


def test_a_subnormal_scale_counts_as_zero():
    weight = Panels(20, 40, 3)
    weight.scale[:3] = torch.tensor([1e-39, -1e-39, 2e-38])
    out = decode(weight, torch.arange(20), 40)
    assert not out[:2].any() and out[2].all()
    assert torch.equal(out, expected(weight, torch.arange(20), 40))


def test_arrays_of_numpy():
    weight = Panels(20, 40, 3)
    out = np.empty((3, 40), np.float32)
    native.decode_rows(np.array([19, 0, 7]), weight.weight, out)
    assert np.array_equal(out, weight.matrix[[19, 0, 7]].numpy())


def test_no_rows():
    assert decode(Panels(20, 40, 3), torch.empty(0, dtype=torch.int64), 40).shape == (0, 40)


@pytest.mark.parametrize("index", [-1, 20, 2**40])
def test_indices_out_of_range(index):
    with pytest.raises(ValueError, match=rf"indices must be from 0 to 19, got {index}"):
        decode(Panels(20, 40, 3), torch.tensor([3, index]), 40)


def test_an_output_of_another_size():
    with pytest.raises(ValueError, match="out must have 40 elements, got 41"):
        decode(Panels(20, 40, 3), torch.tensor([3]), 41)
