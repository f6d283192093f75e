import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import packing


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 1, 1, 1], [0b11000001, 0b1]),
        (2, [3, 0, 1, 2, 1], [0b10_01_00_11, 0b01]),
        (3, [0b101, 0b010, 0b111], [0b11_01_10, 0b101]),
        (4, [0xA, 0x3, 0xF], [0x3A, 0x0F]),
        (5, [0b10011, 0b01100, 0b11111], [0b0110_1001, 0b1111, 0b101]),
        (6, [0b111001, 0b000110], [0b0001_1110, 0b10_01]),
        (7, [0b1010_11_0, 0b0001_00_1], [0b0001_1010, 0b00_11, 0b10]),
        (8, [0xAB, 0xCD, 0xEF], [0xCA, 0x0E, 0xDB, 0x0F]),
    ],
)
def test_layout(bits, codes, expected):
    packed = packing.pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert packed.numel() == packing.packed_bytes(len(codes), bits)


@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 70))
def test_round_trip(data, bits, count):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count)))
    codes = codes.to(torch.uint8)
    packed = packing.pack(codes, bits)
    assert torch.equal(packing.unpack(packed, bits, (count,)), codes)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert torch.equal(packing.unpack_range(packed, bits, count, start, stop), codes[start:stop])
    if count:
        index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=9)), dtype=torch.int64)
        assert torch.equal(packing.unpack_at(packed, bits, count, index), codes[index])


@pytest.mark.parametrize("bits", range(1, 9))
def test_exactly_bits_per_code(bits):
    assert packing.packed_bytes(8 * 1000, bits) == 1000 * bits
    assert packing.packed_bytes(0, bits) == 0


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip_on_every_device(device, bits):
    codes = torch.randint(0, 2**bits, (5, 7, 3), dtype=torch.uint8, device=device)
    packed = packing.pack(codes, bits)
    assert packed.device == codes.device
    assert torch.equal(packing.unpack(packed, bits, (5, 7, 3)), codes)
    assert torch.equal(packed.cpu(), packing.pack(codes.cpu(), bits))


def test_packing_reads_any_stride():
    codes = torch.randint(0, 8, (6, 4), dtype=torch.uint8).t()
    assert torch.equal(packing.unpack(packing.pack(codes, 3), 3, (4, 6)), codes)
