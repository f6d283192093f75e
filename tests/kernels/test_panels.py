import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.kernels import native, packing
from gq_triton.kernels.panels import panel, panel_bytes, unpanel

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library")
CODEBOOKS = {
    "float": lambda levels: torch.linspace(-1, 1, levels),
    "int8": lambda levels: torch.linspace(-128, 127, levels).round().to(torch.int8),
    "fp8": lambda levels: torch.linspace(-256, 256, levels).to(torch.float8_e4m3fn),
}


def by_definition(codes, codebook, bits, groups):
    """The layout, byte by byte, as the module's formulas say it."""
    rows, columns = codes.shape
    size, entries = rows // groups, bits == 8 and codebook.dtype == torch.int8

    def code(unit, group, tile, j, place):
        row, column = 16 * unit + place // 4, 32 * tile + 4 * j + place % 4
        if row >= size or column >= columns:
            return 128 if entries else 0
        found = int(codes[group * size + row, column])
        return int(codebook[found]) + 128 if entries else found

    out = []
    for unit in range(-(-size // 16)):
        for group in range(groups):
            for tile in range(-(-columns // 32)):
                found = [[code(unit, group, tile, j, place) for j in range(8)] for place in range(64)]
                whole, left = 8 // bits, 8 % bits  # codes in a byte, and bits beside them
                for register in range(bits):
                    for of_place in found:
                        of_byte = of_place[register * whole : (register + 1) * whole]
                        byte = sum(value << (bits * j) for j, value in enumerate(of_byte))
                        last = sum(value << (bits * j) for j, value in enumerate(of_place[whole * bits :]))
                        out.append(byte | (last >> (left * register)) % 2**left << (8 - left))
    return torch.tensor(out, dtype=torch.uint8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (17, 33, 1), (40, 70, 4), (51, 32, 3)])
def test_bytes_are_those_of_the_definition(bits, codebook, rows, columns, groups):
    codes, entries = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), CODEBOOKS[codebook](2**bits)
    packed = packing.pack(codes, bits)
    panels = panel(packed, entries, bits, rows, columns, groups)
    assert torch.equal(panels, by_definition(codes, entries, bits, groups))
    assert torch.equal(unpanel(panels, entries, bits, rows, columns, groups), packed)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize(("rows", "columns", "groups"), [(0, 5, 1), (1, 0, 1), (17, 33, 1), (40, 70, 4), (51, 32, 3)])
def test_panels_are_read_without_the_library_as_with_it(bits, codebook, rows, columns, groups, monkeypatch):
    codes, entries = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), CODEBOOKS[codebook](2**bits)
    panels = panel(packing.pack(codes, bits), entries, bits, rows, columns, groups)
    expected = unpanel(panels, entries, bits, rows, columns, groups)
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(unpanel(panels, entries, bits, rows, columns, groups), expected)
    with pytest.raises(ValueError, match="panels must have"):
        unpanel(panels.new_zeros(len(panels) + 1), entries, bits, rows, columns, groups)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 8), st.integers(0, 50), st.integers(0, 100), st.integers(1, 4), st.sampled_from(sorted(CODEBOOKS))
)
def test_there_and_back(bits, group_rows, columns, groups, codebook):
    rows, entries = group_rows * groups, CODEBOOKS[codebook](2**bits)
    packed = packing.pack(torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), bits)
    panels = panel(packed, entries, bits, rows, columns, groups)
    assert panels.numel() == panel_bytes(rows, columns, bits, groups) == native.panel_bytes(bits, rows, columns, groups)
    assert torch.equal(unpanel(panels, entries, bits, rows, columns, groups), packed)


def test_of_equal_entries_the_first_comes_back():
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    entries = (torch.arange(256) // 2 - 64).to(torch.int8)
    panels = panel(packing.pack(codes, 8), entries, 8, 16, 16)
    back = packing.unpack(unpanel(panels, entries, 8, 16, 16), 8, (16, 16))
    assert torch.equal(back, codes // 2 * 2)


def test_any_stride():
    codes, entries = torch.randint(0, 32, (20, 40), dtype=torch.uint8), CODEBOOKS["float"](32)
    packed = packing.pack(codes, 5)
    panels = panel(packed, entries, 5, 20, 40)
    apart = [torch.stack([tensor, tensor], 1)[:, 1] for tensor in (packed, entries, panels)]
    assert torch.equal(panel(apart[0], apart[1], 5, 20, 40), panels)
    assert torch.equal(unpanel(apart[2], apart[1], 5, 20, 40), packed)


def test_without_memory():
    """On the meta device, where models are made that are loaded later."""
    packed, entries = (
        torch.zeros(size, dtype=kind, device="meta") for size, kind in ((6, torch.uint8), (16, torch.float))
    )
    panels = panel(packed, entries, 4, 4, 3)
    assert panels.is_meta and panels.shape == (256,)
    assert unpanel(panels, entries, 4, 4, 3).shape == (6,)


def test_wrong_sizes():
    packed, entries = torch.zeros(6, dtype=torch.uint8), torch.zeros(16)
    with pytest.raises(ValueError, match="planes"):
        panel(packed[1:], entries, 4, 4, 3)
    with pytest.raises(ValueError, match="codebook"):
        panel(packed, entries[1:], 4, 4, 3)
    with pytest.raises(ValueError, match="panels"):
        unpanel(packed, entries, 4, 4, 3)
    with pytest.raises(ValueError, match="groups must divide"):
        panel(packed, entries, 4, 4, 3, 3)


def test_operator_registration():
    packed, entries = packing.pack(torch.randint(0, 256, (20, 7), dtype=torch.uint8), 8), CODEBOOKS["int8"](256)
    torch.library.opcheck(panel, (packed, entries, 8, 20, 7, 4))
    torch.library.opcheck(unpanel, (panel(packed, entries, 8, 20, 7, 4), entries, 8, 20, 7, 4))
