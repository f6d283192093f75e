"""What a model weighs: per weight and in all, counted from the tensors that are there."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton.layers import PackedWeight, QATLayer
from gq_triton.layers.packed_weight import finite_or_none, packed_size, sqnr_db
from gq_triton.quantizer import Quantizer


@dataclass(frozen=True)
class Row:
    """One weight, or all float tensors of one module.

    Attributes:
        name: of the weight, or of the module.
        bits: code width, or the element width of float tensors.
        parameters: how many numbers of the float model it stands for.
        bytes: that it takes in memory now; a prepared weight takes its float form and its quantizer's, a packed one
            the padding of the layout that its device reads, and a dense copy where there is one.
        packed_bytes: that it takes packed, in a file; float tensors take what they take.
        sqnr_db: of the quantized weight against the float weight that it came from, in dB; None for float tensors and
            where it is not known.
        dense_bytes: of ``bytes``, those of the dense copy that :func:`gq_triton.allow_dense` made.
    """

    name: str
    bits: int
    parameters: int
    bytes: int
    packed_bytes: int
    sqnr_db: float | None
    dense_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """The rows of a model, and their sums."""

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """Numbers in the float model."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes in memory now."""
        return sum(row.bytes for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of dense copies, among those in memory now."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all tensors once packed: what a packed file holds besides its header, and non-persistent buffers."""
        return sum(row.packed_bytes for row in self.rows)

    @property
    def float32_bytes(self) -> int:
        """Bytes of the float model in float32."""
        return 4 * self.parameters

    @property
    def ratio(self) -> float:
        """How many times smaller than in float32 the packed model is."""
        return self.float32_bytes / self.packed_bytes if self.packed_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and totals as JSON-able values; an SQNR that is not finite is None, as JSON has no infinity."""
        totals = ("parameters", "bytes", "dense_bytes", "packed_bytes", "float32_bytes", "ratio")
        return {
            "rows": [{**dataclasses.asdict(row), "sqnr_db": finite_or_none(row.sqnr_db)} for row in self.rows],
            **{name: getattr(self, name) for name in totals},
        }

    def __str__(self) -> str:
        head = ("weight", "bits", "parameters", "bytes", "dense", "packed", "SQNR dB")
        body = [_cells(row) for row in self.rows]
        total = ("total", "", *_sizes(self), "")
        widths = [max(map(len, column)) for column in zip(head, total, *body, strict=True)]
        lines = [_line(cells, widths) for cells in (head, *body, total)]
        lines.append(f"float32: {self.float32_bytes:,} bytes; packed: {self.ratio:.2f} times smaller")
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module) -> Report:
    """Counts the bytes of a float, prepared or packed model; what is shared counts once.

    Persistent and other buffers count like parameters. Memory that a layer takes while it runs is not counted:
    convolutions over several taps and channels hold one decoded weight during a call, and so do recurrent layers on a
    CPU without the native library.
    """
    return Report(tuple(_rows(model)))


def _rows(model: nn.Module) -> Iterator[Row]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue  # counted with its weight
        if isinstance(module, PackedWeight):
            yield _packed_row(name.removesuffix("_packed"), module)
            continue
        quantizers = module.quantizers() if isinstance(module, QATLayer) else {}
        for weight_name, quantizer in quantizers.items():
            weight = getattr(module, weight_name)
            if _first_time(weight, seen):
                pieces = module.split(weight_name, len(weight)).values()
                packed = sum(packed_size(quantizer.config, weight[rows].shape) for rows in pieces)
                yield _prepared_row(f"{name}.{weight_name}".lstrip("."), weight, quantizer, packed)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        rest = [tensor for tensor in own if _first_time(tensor, seen)]
        if rest:
            yield _float_row(name, rest)


def _first_time(tensor: Tensor, seen: set[int]) -> bool:
    known = id(tensor) in seen
    seen.add(id(tensor))
    return not known


def _packed_row(name: str, packed: PackedWeight) -> Row:
    size = sum(buffer.nbytes for buffer in packed.buffers())
    canonical = packed_size(packed.config, packed.shape)
    dense = 0 if packed.dense is None else packed.dense.nbytes
    return Row(name, packed.config.bits, packed.shape.numel(), size, canonical, packed.sqnr_db, dense)


def _prepared_row(name: str, weight: Tensor, quantizer: Quantizer, packed: int) -> Row:
    own = [weight, *quantizer.parameters(), *quantizer.buffers()]
    was_training = quantizer.training
    quality = sqnr_db(weight, quantizer.eval()(weight))
    quantizer.train(was_training)
    return Row(name, quantizer.config.bits, weight.numel(), sum(t.nbytes for t in own), packed, quality)


def _float_row(name: str, tensors: list[Tensor]) -> Row:
    size = sum(map(_bytes, tensors))
    count = sum(tensor.numel() for tensor in tensors)
    return Row(name or "(model)", 8 * max(tensor.itemsize for tensor in tensors), count, size, size, None)


def _bytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return tensor._indices().nbytes + tensor._values().nbytes
    return tensor.nbytes


def _cells(row: Row) -> tuple[str, ...]:
    quality = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
    return row.name, str(row.bits), *_sizes(row), quality


def _sizes(of: Row | Report) -> tuple[str, ...]:
    dense = f"{of.dense_bytes:,}" if of.dense_bytes else ""
    return f"{of.parameters:,}", f"{of.bytes:,}", dense, f"{of.packed_bytes:,}"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = (cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(cells))
    return "  ".join((name, *numbers)).rstrip()
