"""A quantized weight as it is deployed: packed codes, a codebook, scales. No float weight is held."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gq_triton import functional as F
from gq_triton.config import GQConfig
from gq_triton.kernels.packing import packed_bytes
from gq_triton.kernels.tables import CODEBOOK_SCALES
from gq_triton.quantizer import FixedDtypeModule, WeightQuantizer

_CODEBOOK_DTYPES = {"float": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


class PackedWeight(FixedDtypeModule):
    """The packed form of a weight of shape (C, ...).

    Args:
        config: the settings that it was quantized with.
        shape: of the weight.
        dtype: of the weight; the layer's computations happen in it, and it follows ``.half()``, ``.to(dtype)``, ...
        device: where the buffers live. Default: torch's default device.

    Attributes:
        codes: buffer, uint8, 1-D; the codes as bit planes, see :func:`gq_triton.functional.pack`.
        codebook: buffer, (2**bits,), in the configuration's codebook dtype: int8 q is q / 127, fp8 q is q / 256.
        scale: buffer, (C,) or (1,), float32.
        sqnr_db: signal to quantization noise ratio against the weight that was packed, in dB, where known.
    """

    codes: Tensor
    codebook: Tensor
    scale: Tensor

    def __init__(
        self, config: GQConfig, shape: torch.Size, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.sqnr_db: float | None = None
        for name, (size, kind) in packed_layout(config, shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=kind, device=device))
        self._like = torch.empty(0, dtype=dtype, device=device)  # carries dtype and device through .to()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        self._like = fn(self._like)
        super()._apply(fn, recurse)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self._like.dtype

    @classmethod
    @torch.no_grad()
    def from_quantizer(cls, quantizer: WeightQuantizer, weight: Tensor, rows: slice = slice(None)) -> "PackedWeight":
        """Packs ``rows`` of ``weight``, exactly as ``quantizer`` in ``eval`` quantizes it.

        Raises:
            ValueError: if ``weight`` holds NaN or infinity, or is float64, which decoded weights never are.
        """
        if weight.dtype == torch.float64:
            raise ValueError("weight is torch.float64, which cannot be packed: call model.float() first")
        config, part = quantizer.config, weight[rows]
        packed = cls(config, part.shape, weight.dtype, weight.device)
        scale = quantizer.scale()
        packed.codes.copy_(F.pack(quantizer.encode(weight)[rows], config.bits))
        packed.scale.copy_(scale if len(scale) == 1 else scale[rows])
        entries = quantizer.codebook() * CODEBOOK_SCALES.get(packed.codebook.dtype, 1.0)
        packed.codebook.copy_(entries.round() if config.codebook == "int8" else entries)
        packed.sqnr_db = sqnr_db(part, packed.decode())
        return packed

    def decode(self) -> Tensor:
        """Returns the float weight, of the packed weight's ``shape`` and ``dtype``: scale times codebook entry."""
        codes = F.unpack(self.codes, self.config.bits, self.shape)
        return F.decode(codes, self.scale, self.codebook).to(self.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, shape={tuple(self.shape)}, codebook={self.config.codebook!r}"


def packed_layout(config: GQConfig, shape: torch.Size) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape and dtype of each of a packed weight's buffers, by name."""
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
