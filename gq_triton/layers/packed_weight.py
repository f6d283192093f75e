"""A quantized weight as it is deployed: packed codes, a codebook, scales. No float weight is held.

Files, state dicts and pickles have codes as bit planes (:mod:`gq_triton.kernels.packing`); in memory a weight holds the
layout that the kernels of its device read (:mod:`gq_triton.kernels.layouts`), and it alone. It is converted where it
moves from one device to another; state dicts are the same wherever it is.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.config import WeightConfig
from gq_triton.kernels.layouts import convert, layout_for
from gq_triton.kernels.packing import packed_bytes
from gq_triton.kernels.tables import CODEBOOK_SCALES
from gq_triton.quantizer import FixedDtypeModule, Quantizer

_CODEBOOK_DTYPES = {"float": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PackedWeight(FixedDtypeModule):
    """The packed form of a weight of shape (C, ...).

    Args:
        config: the settings that it was quantized with.
        shape: of the weight.
        dtype: of the weight; the layer's computations happen in it, and it follows ``.half()``, ``.to(dtype)``, ...
        device: where the buffers live. Default: torch's default device.
        groups: how many equal groups the rows form, such as the gates of an LSTM; layouts may pad each by itself.

    Attributes:
        codes: buffer, uint8, 1-D. Of 8 bits with an int8 codebook, panels hold its entries themselves: then the
            codebook is to be changed by loading a state dict, not in place.
        layout: of the codes, one of :data:`gq_triton.kernels.layouts.LAYOUTS`.
        codebook: buffer, (2**bits,), in the configuration's codebook dtype: int8 q is q / 127, fp8 q is q / 256.
        scale: buffer, (C,) or (1,), float32.
        dense: buffer, the decoded weight, of ``shape`` and ``dtype``, or None; see :func:`gq_triton.allow_dense`.
        sqnr_db: signal to quantization noise ratio against the weight that was packed, in dB, where known.
    """

    codes: Tensor
    codebook: Tensor
    scale: Tensor
    dense: Tensor | None

    def __init__(
        self,
        config: WeightConfig,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.groups = groups
        self.layout = "planes"
        self.sqnr_db: float | None = None
        for name, (size, kind) in packed_layout(config, shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))
        self.register_buffer("dense", None, persistent=False)
        self._like = torch.empty(0, dtype=dtype, device=device)  # carries the dtype through .to()
        self._follow_device()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        dense, self.dense = self.dense, None
        self._like = fn(self._like.new_empty(0, device=self.codes.device))  # which load_state_dict may have assigned
        super()._apply(fn, recurse)
        self._follow_device()
        self.keep_dense(dense is not None)
        return self

    def keep_dense(self, keep: bool) -> None:
        """Makes, or drops, the decoded weight beside the packed one. It is made anew where this one moves or changes,
        unless its buffers are changed in place."""
        self.dense = self.decode().detach() if keep else None

    def _follow_device(self) -> None:
        """Converts the codes to the layout of the device that they are on now."""
        if self.codebook.device != self.codes.device:
            return  # assign=True has brought but one of them so far
        layout = layout_for(self.codes.device)
        self.codes = self._convert(self.codes, self.codebook, self.layout, layout)
        self.layout = layout

    def _convert(self, codes: Tensor, codebook: Tensor, source: str, target: str) -> Tensor:
        return convert(codes, codebook, source, target, self.config.bits, *_matrix(self.shape), self.groups)

    def bit_planes(self) -> Tensor:
        """Returns the codes as files have them, uint8, 1-D: :func:`gq_triton.functional.pack`."""
        return self._convert(self.codes, self.codebook, self.layout, "planes")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "planes":
            destination[f"{prefix}codes"] = self.bit_planes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, codebook = (state_dict.get(f"{prefix}{name}") for name in ("codes", "codebook"))
        entries = self.layout == "panels" and self.codebook.dtype == torch.int8 and self.config.bits == 8
        half = entries and (codes is None) != (codebook is None)
        if half:
            self.codes, self.layout = self.bit_planes(), "planes"  # what is to come with the other half is not known
        if codes is not None and self.layout != "planes":
            *_, errors = args
            try:
                state_dict = {**state_dict, f"{prefix}codes": self._loaded(codes, codebook)}
            except ValueError as error:
                errors.append(f"size mismatch for {prefix}codes: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if not half:
            self._follow_device()  # assign=True may have changed it
        self.keep_dense(self.dense is not None)

    def _loaded(self, codes: Tensor, codebook: Tensor | None) -> Tensor:
        """Returns bit planes that come with a codebook, or without, in this weight's layout."""
        codebook = self.codebook if codebook is None else codebook.to(self.codebook.dtype)
        return self._convert(codes, codebook, "planes", self.layout)

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, "codes": self.bit_planes()}
        return {**super().__getstate__(), "_buffers": buffers, "layout": "planes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_device()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self._like.dtype

    @classmethod
    @torch.no_grad()
    def from_quantizer(
        cls, quantizer: Quantizer, weight: Tensor, rows: slice = slice(None), groups: int = 1
    ) -> "PackedWeight":
        """Packs ``rows`` of ``weight``, exactly as ``quantizer`` in ``eval`` quantizes it.

        Raises:
            ValueError: if ``weight`` holds NaN or infinity, or is float64, which decoded weights never are.
        """
        if weight.dtype == torch.float64:
            raise ValueError("weight is torch.float64, which cannot be packed: call model.float() first")
        config, part = quantizer.config, weight[rows]
        packed = cls(config, part.shape, weight.dtype, weight.device, groups)
        codes, scale = quantizer.encode(weight)[rows], quantizer.scale()  # in this order: a scale may follow the weight
        codebook = quantizer.codebook() * CODEBOOK_SCALES.get(packed.codebook.dtype, 1.0)
        if config.codebook == "int8":  # the first of equal entries, as which panels of 8 bits return to planes
            codebook = codebook.round()
            codes = torch.searchsorted(codebook, codebook).to(torch.uint8)[codes.int()]
        scale = scale if len(scale) == 1 else scale[rows]
        packed.load_state_dict({"codes": F.pack(codes, config.bits), "codebook": codebook, "scale": scale})
        packed.sqnr_db = sqnr_db(part, packed.decode())
        return packed

    def decode(self) -> Tensor:
        """Returns the float weight, of the packed weight's ``shape`` and ``dtype``: scale times codebook entry."""
        if self.layout == "planes":
            codes = F.unpack(self.codes, self.config.bits, self.shape)
            return F.decode(codes, self.scale, self.codebook).to(self.dtype)
        rows, columns = _matrix(self.shape)
        weight = F.packed_embedding(
            torch.arange(rows, device=self.codes.device),
            self.codes,
            self.codebook,
            self.scale,
            bits=self.config.bits,
            embedding_dim=columns,
            num_embeddings=rows,
            layout=self.layout,
            groups=self.groups,
        )
        return weight.view(self.shape).to(self.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, shape={tuple(self.shape)}, codebook={self.config.codebook!r}"


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Returns rows and columns of a weight seen as a matrix."""
    return shape[0], shape[1:].numel()


def packed_layout(config: WeightConfig, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of each of a packed weight's tensors in a state dict, by name."""
    return {
        "codes": ((packed_bytes(shape.numel(), config.bits),), torch.uint8),
        "codebook": ((2**config.bits,), _CODEBOOK_DTYPES[config.codebook]),
        "scale": ((shape[0] if config.granularity == "channel" else 1,), torch.float32),
    }


def packed_size(config: WeightConfig, shape: torch.Size) -> int:
    """Returns the bytes of a packed weight's tensors in a state dict."""
    return sum(dtype.itemsize * size[0] for size, dtype in packed_layout(config, shape).values())


def finite_or_none(value: object) -> float | None:
    """Returns ``value`` if it is a finite number, which JSON can hold, else None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None


def sqnr_db(weight: Tensor, quantized: Tensor) -> float:
    """Returns 10 log10(|weight|^2 / |weight - quantized|^2): infinite where they are equal."""
    weight = weight.detach().double()  # squares of small and large float32 weights do not fit in float32
    noise = (weight - quantized.detach().double()).square().sum()
    return float("inf") if noise == 0 else float(10.0 * torch.log10(weight.square().sum() / noise))
