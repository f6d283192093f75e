"""What every encoder checks of its input."""

from torch import Tensor

__all__ = ["require_features"]


def require_features(features: Tensor, size: int, least: int) -> None:
    """Refuses what is not ``(B, T, size)`` with at least ``least`` frames.

    Raises:
        ValueError: on another shape, or too few frames.
    """
    if features.ndim != 3 or features.shape[-1] != size:
        raise ValueError(f"features is {tuple(features.shape)}; (B, T, {size}) is needed")
    if features.shape[1] < least:
        raise ValueError(f"features has {features.shape[1]} frames; at least {least} are needed")
