import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.kernels import packing, tiles
from gq_triton.kernels.backend import jit, tl

SHAPES = [(1, 1, 1), (16, 256, 1), (17, 63, 1), (18, 70, 3), (20, 257, 4), (5, 130, 1), (0, 5, 1), (5, 0, 1), (0, 0, 3)]


def random_codes(bits, rows, columns, device="cpu"):
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)


def by_definition(codes, bits, groups):
    """The layout of the module's docstring, word by word and bit by bit."""
    rows, columns = codes.shape
    size = rows // groups
    unit = 256 // packing.PLANES[bits][-1]
    words, shift = [], bits
    for width in packing.PLANES[bits]:
        shift -= width
        for group in range(groups):
            for block in range(-(-size // 16)):
                for part in range(-(-columns // unit) * unit * width // 256):
                    for place in range(128):
                        g, t, r, u = place // 16, place // 4 % 4, place // 2 % 2, place % 2
                        row, word = 16 * block + 8 * r + g, 0
                        for j in range(8):
                            for i in range(4 // width):
                                column = 256 // width * part + 64 * i + 32 * u + 8 * t + j
                                inside = row < size and column < columns
                                code = int(codes[group * size + row, column]) if inside else 0
                                word |= ((code >> shift) % 2**width) << (4 * j + width * i)
                        words.append(word)
    return torch.tensor([byte for word in words for byte in word.to_bytes(4, "little")], dtype=torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_layout_is_the_documented_one(device, bits, shape):
    rows, columns, groups = shape
    codes = random_codes(bits, rows, columns, device)
    packed = packing.pack(codes, bits)
    tiled = tiles.tile(packed, bits, rows, columns, groups)
    assert tiled.device == codes.device
    assert tiled.numel() == tiles.tiled_bytes(rows, columns, bits, groups)
    assert torch.equal(tiled.cpu(), by_definition(codes.cpu(), bits, groups))  # zero bits for padding among them
    assert torch.equal(tiles.untile(tiled, bits, rows, columns, groups), packed)


@pytest.mark.parametrize("step", [1, 2])
def test_tiles_anywhere_in_memory(device, step):
    codes = random_codes(5, 20, 70, device)
    packed = packing.pack(codes, 5)
    tiled = tiles.tile(packed, 5, 20, 70)
    moved = torch.empty(1 + step * len(tiled), dtype=torch.uint8, device=device)[1::step]
    moved.copy_(tiled)
    assert torch.equal(tiles.as_words(moved), tiles.as_words(tiled))
    assert tiles.as_words(tiled).data_ptr() == tiled.data_ptr()
    assert torch.equal(tiles.untile(moved, 5, 20, 70), packed)


def test_a_word_of_four_bits_is_eight_codes_of_a_row():
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 4)
    words = tiles.tile(packing.pack(codes, 4), 4, 16, 64).view(torch.int32).view(8, 4, 2, 2)
    assert (words[:, 0::2] == 0x76543210).all()
    assert (words[:, 1::2] == 0xFEDCBA98 - 2**32).all()


@given(
    data=st.data(),
    bits=st.integers(1, 8),
    groups=st.integers(1, 4),
    size=st.integers(0, 35),
    columns=st.integers(0, 270),
    chunk=st.sampled_from([1, 700, 1 << 20]),
)
def test_round_trip(data, bits, groups, size, columns, chunk):
    """However the rows fall into chunks."""
    rows = groups * size
    seed = data.draw(st.integers(0, 2**16))
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = packing.pack(codes, bits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_CHUNK", chunk)
        tiled = tiles.tile(packed, bits, rows, columns, groups)
        assert torch.equal(tiles.untile(tiled, bits, rows, columns, groups), packed)
    assert torch.equal(tiled, tiles.tile(packed, bits, rows, columns, groups))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_that_fills_its_tiles_takes_no_more_than_packed(bits):
    assert tiles.tiled_bytes(64, 512, bits, 4) == packing.packed_bytes(64 * 512, bits)
    assert tiles.tiled_bytes(1, 1, bits) == 16 * 256 // packing.PLANES[bits][-1] * bits // 8


def test_wrong_sizes_are_refused():
    packed = packing.pack(random_codes(3, 6, 5), 3)
    tiled = tiles.tile(packed, 3, 6, 5)
    with pytest.raises(ValueError, match=r"packed must be uint8 of shape \(12,\); got torch.uint8 of \(11,\)"):
        tiles.tile(packed[1:], 3, 6, 5)
    with pytest.raises(ValueError, match=r"tiles must be uint8 of shape \(1536,\); got torch.int8 of \(1536,\)"):
        tiles.untile(tiled.to(torch.int8), 3, 6, 5)
    with pytest.raises(ValueError, match=r"tiles must be uint8 of shape \(1536,\); got torch.uint8 of \(1536, 1\)"):
        tiles.untile(tiled[:, None], 3, 6, 5)
    for convert in (tiles.tile, tiles.untile):
        with pytest.raises(ValueError, match="groups must divide the rows: got 6 rows in 4 groups"):
            convert(packed, 3, 6, 5, 4)
    with pytest.raises(ValueError, match="groups must divide the rows: got 6 rows in 0 groups"):
        tiles.tiled_bytes(6, 5, 3, 0)


def test_only_shapes_matter_on_the_meta_device():
    packed = packing.pack(random_codes(5, 18, 7), 5).to("meta")
    tiled = tiles.tile(packed, 5, 18, 7, 3)
    assert tiled.is_meta
    assert tiled.numel() == tiles.tiled_bytes(18, 7, 5, 3)
    assert tiles.untile(tiled, 5, 18, 7, 3).shape == packed.shape


@jit
def _load_all(tiled, codes, blocks, columns, group_rows, group_span, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK).to(tl.int64)
    place = row // group_rows * group_span + row % group_rows
    found = tiles.load_tiled(tiled, place, column, blocks, columns, column < columns, BITS)
    tl.store(codes + row * BLOCK + column, found)


@pytest.mark.parametrize("shape", [(1, 1, 1), (18, 70, 3), (17, 257, 1)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_kernels_load_any_code(kernel_device, bits, shape):
    rows, columns, groups = shape
    codes = random_codes(bits, rows, columns, kernel_device)
    tiled = tiles.tile(packing.pack(codes, bits), bits, rows, columns, groups)
    block = 512
    found = torch.full((rows, block), -1, dtype=torch.int32, device=kernel_device)
    blocks = tiles.row_blocks(rows, groups)
    sizes = blocks, columns, rows // groups, blocks // groups * tiles.ROW_BLOCK
    _load_all[(rows,)](tiled, found, *sizes, bits, block)
    assert torch.equal(found[:, :columns], codes.int())
    assert not found[:, columns:].any()  # 0 where masked
