import pytest
import torch

from gq_triton.kernels import native, packing
from gq_triton.kernels.layouts import LAYOUTS, codes_of, convert, layout_bytes, layout_for

CODEBOOKS = {
    "float": lambda levels: torch.linspace(-1, 1, levels),
    "int8": lambda levels: torch.linspace(-128, 127, levels).round().to(torch.int8),
    "fp8": lambda levels: torch.linspace(-256, 256, levels).to(torch.float8_e4m3fn),
}


def test_each_device_has_its_layout(cpu_kernels):
    expected = {"cpu": "panels" if cpu_kernels else "planes", "cuda": "tiles", "meta": "planes"}
    assert {name: layout_for(torch.device(name)) for name in expected} == expected


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 1, 1), (21, 45, 3), (64, 32, 4), (0, 5, 1), (3, 0, 1)])
def test_from_any_layout_to_any_other(bits, codebook, rows, columns, groups, layout, device):
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=device)
    packed, entries, shape = packing.pack(codes, bits), CODEBOOKS[codebook](2**bits).to(device), (rows, columns, groups)
    stored = convert(packed, entries, "planes", layout, bits, *shape)
    assert (stored.dtype, stored.device) == (torch.uint8, packed.device)
    assert stored.shape == (layout_bytes(layout, bits, *shape),)
    assert torch.equal(codes_of(stored, entries, layout, bits, *shape), codes)
    for target in LAYOUTS if native.available() else LAYOUTS[:2]:
        moved = convert(stored, entries, layout, target, bits, *shape)
        assert torch.equal(moved, convert(packed, entries, "planes", target, bits, *shape))
        assert (moved is stored) == (target == layout)


@pytest.mark.parametrize("name", ["tiles", "panels"])
def test_groups_divide_the_rows(name):
    with pytest.raises(ValueError, match="groups must divide the rows: got 6 rows in 4 groups"):
        layout_bytes(name, 4, 6, 5, 4)


def test_panels_without_the_library():
    if native.available():
        pytest.skip("the native library is there")
    with pytest.raises(RuntimeError, match="the native CPU kernels are not available"):
        convert(torch.zeros(6, dtype=torch.uint8), torch.zeros(16), "planes", "panels", 4, 4, 3)
