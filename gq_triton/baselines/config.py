"""Settings of the rival methods; what they do is in the modules of the same names.

No torch here: programs that run a packed model without it read its settings too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from gq_triton.config import (
    ActivationDtype,
    CodebookDtype,
    Granularity,
    WeightConfig,
    check_choice,
    check_integer,
    check_number,
)

__all__ = ["BASELINES", "BaselineConfig", "KMeansConfig", "LSQConfig", "S8BQATConfig", "TorchaoConfig", "UniformConfig"]


@dataclass(frozen=True)
class BaselineConfig(WeightConfig):
    """What all methods but torchao's have: levels with a scale per channel."""

    granularity: ClassVar[Granularity] = "channel"
    bits: int = 4
    codebook: CodebookDtype = "float"
    activations: ActivationDtype | None = None

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        check_choice("codebook", self.codebook, ("float", "int8", "fp8"))
        check_choice("activations", self.activations, (None, "int8", "fp8"))


@dataclass(frozen=True)
class UniformConfig(BaselineConfig):
    """Settings of straight-through training on a uniform grid (:mod:`gq_triton.baselines.uniform`).

    Args:
        bits, codebook, activations: as :class:`gq_triton.GQConfig` has them; defaults 4, ``"float"`` and None.

    Raises:
        ValueError: for a value that is not allowed.
    """

    method: ClassVar[str] = "uniform"


@dataclass(frozen=True)
class KMeansConfig(BaselineConfig):
    """Settings of a Lloyd-Max codebook per tensor (:mod:`gq_triton.baselines.kmeans`).

    Args:
        bits, codebook, activations: as :class:`gq_triton.GQConfig` has them; defaults 4, ``"float"`` and None.

    Raises:
        ValueError: for a value that is not allowed.
    """

    method: ClassVar[str] = "kmeans"


@dataclass(frozen=True)
class LSQConfig(BaselineConfig):
    """Settings of Learned Step Size Quantization (:mod:`gq_triton.baselines.lsq`).

    Args:
        bits, codebook, activations: as :class:`gq_triton.GQConfig` has them; defaults 4, ``"float"`` and None.
        init: where steps start: ``"error"`` (default), at the least squared error, or ``"magnitude"``, at the paper's
            2 mean|w| / sqrt(Qp).

    Raises:
        ValueError: for a value that is not allowed.
    """

    method: ClassVar[str] = "lsq"
    init: Literal["error", "magnitude"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, ("error", "magnitude"))


@dataclass(frozen=True)
class S8BQATConfig(BaselineConfig):
    """Settings of regularized training with periodic hard compression (:mod:`gq_triton.baselines.s8bqat`).

    Args:
        bits, codebook, activations: as :class:`gq_triton.GQConfig` has them; defaults 4, ``"float"`` and None.
        strength: factor of the regularizer in the loss, 0 to 1e6. Default 1.
        compress_every: optimizer steps from one hard compression to the next, at least 1. Default 50.

    Raises:
        ValueError: for a value that is not allowed.
    """

    method: ClassVar[str] = "s8bqat"
    strength: float = 1.0
    compress_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, 0.0, 1e6)
        check_integer("compress_every", self.compress_every, 1, math.inf)


@dataclass(frozen=True)
class TorchaoConfig(WeightConfig):
    """Settings of torchao's fake quantizer (:mod:`gq_triton.baselines.torchao`), for linear layers.

    Args:
        bits: 4 or 8. Default 4.
        activations: as :class:`gq_triton.GQConfig` has it; default None.

    Raises:
        ValueError: for a value that is not allowed.
    """

    method: ClassVar[str] = "torchao"
    granularity: ClassVar[Granularity] = "channel"
    codebook: ClassVar[CodebookDtype] = "float"
    bits: int = 4
    activations: ActivationDtype | None = None

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, (4, 8))
        check_choice("activations", self.activations, (None, "int8", "fp8"))


BASELINES: dict[str, type[WeightConfig]] = {
    config.method: config for config in (UniformConfig, KMeansConfig, LSQConfig, S8BQATConfig, TorchaoConfig)
}
