"""A quantized weight as it is deployed: packed codes, a codebook, scales. No float weight is held.

Codes have two layouts. Files, state dicts and the CPU have bit planes (:mod:`gq_triton.kernels.packing`); a weight on a
GPU holds the tiles that kernels read there (:mod:`gq_triton.kernels.tiles`), and them alone. It is converted where it
moves from one device to another; state dicts are the same wherever it is.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.config import GQConfig
from gq_triton.kernels.packing import packed_bytes
from gq_triton.kernels.tables import CODEBOOK_SCALES
from gq_triton.kernels.tiles import tile, untile
from gq_triton.quantizer import FixedDtypeModule, WeightQuantizer

_CODEBOOK_DTYPES = {"float": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PackedWeight(FixedDtypeModule):
    """The packed form of a weight of shape (C, ...).

    Args:
        config: the settings that it was quantized with.
        shape: of the weight.
        dtype: of the weight; the layer's computations happen in it, and it follows ``.half()``, ``.to(dtype)``, ...
        device: where the buffers live. Default: torch's default device.
        groups: how many equal groups the rows form, such as the gates of an LSTM; tiles pad each by itself.

    Attributes:
        codes: buffer, uint8, 1-D; the codes, in tiles or else in bit planes.
        tiled: which of the two it is.
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
        config: GQConfig,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.groups = groups
        self.tiled = False
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
        tiled = wants_tiles(self.codes.device)
        if tiled != self.tiled:
            self.codes = self._to_tiles(self.codes) if tiled else self.bit_planes()
            self.tiled = tiled

    def _to_tiles(self, bit_planes: Tensor) -> Tensor:
        return tile(bit_planes, self.config.bits, *_matrix(self.shape), self.groups)

    def bit_planes(self) -> Tensor:
        """Returns the codes as files have them, uint8, 1-D: :func:`gq_triton.functional.pack`."""
        return untile(self.codes, self.config.bits, *_matrix(self.shape), self.groups) if self.tiled else self.codes

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled:
            destination[f"{prefix}codes"] = self.bit_planes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name = f"{prefix}codes"
        if self.tiled and name in state_dict:
            *_, errors = args
            try:
                state_dict = {**state_dict, name: self._to_tiles(state_dict[name])}
            except ValueError as error:
                errors.append(f"size mismatch for {name}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._follow_device()  # assign=True may have changed it
        self.keep_dense(self.dense is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self._like.dtype

    @classmethod
    @torch.no_grad()
    def from_quantizer(
        cls, quantizer: WeightQuantizer, weight: Tensor, rows: slice = slice(None), groups: int = 1
    ) -> "PackedWeight":
        """Packs ``rows`` of ``weight``, exactly as ``quantizer`` in ``eval`` quantizes it.

        Raises:
            ValueError: if ``weight`` holds NaN or infinity, or is float64, which decoded weights never are.
        """
        if weight.dtype == torch.float64:
            raise ValueError("weight is torch.float64, which cannot be packed: call model.float() first")
        config, part = quantizer.config, weight[rows]
        packed = cls(config, part.shape, weight.dtype, weight.device, groups)
        scale, codebook = quantizer.scale(), quantizer.codebook()
        codebook = codebook * CODEBOOK_SCALES.get(packed.codebook.dtype, 1.0)
        buffers = {
            "codes": F.pack(quantizer.encode(weight)[rows], config.bits),
            "codebook": codebook.round() if config.codebook == "int8" else codebook,
            "scale": scale if len(scale) == 1 else scale[rows],
        }
        packed.load_state_dict(buffers)
        packed.sqnr_db = sqnr_db(part, packed.decode())
        return packed

    def decode(self) -> Tensor:
        """Returns the float weight, of the packed weight's ``shape`` and ``dtype``: scale times codebook entry."""
        if not self.tiled:
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
            tiled=True,
            groups=self.groups,
        )
        return weight.view(self.shape).to(self.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, shape={tuple(self.shape)}, codebook={self.config.codebook!r}"


def wants_tiles(device: torch.device) -> bool:
    """Returns whether the kernels of ``device`` read tiles."""
    return device.type == "cuda"


def _matrix(shape: torch.Size) -> tuple[int, int]:
    """Returns rows and columns of a weight seen as a matrix."""
    return shape[0], shape[1:].numel()


def packed_layout(config: GQConfig, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of each of a packed weight's tensors in a state dict, by name."""
    return {
        "codes": ((packed_bytes(shape.numel(), config.bits),), torch.uint8),
        "codebook": ((2**config.bits,), _CODEBOOK_DTYPES[config.codebook]),
        "scale": ((shape[0] if config.granularity == "channel" else 1,), torch.float32),
    }


def finite_or_none(value: object) -> float | None:
    """Returns ``value`` if it is a finite number, which JSON can hold, else None."""
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None


def sqnr_db(weight: Tensor, quantized: Tensor) -> float:
    """Returns 10 log10(|weight|^2 / |weight - quantized|^2): infinite where they are equal."""
    weight = weight.detach().double()  # squares of small and large float32 weights do not fit in float32
    noise = (weight - quantized.detach().double()).square().sum()
    return float("inf") if noise == 0 else float(10.0 * torch.log10(weight.square().sum() / noise))
