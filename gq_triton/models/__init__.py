"""Reference recognizers in plain torch layers."""

from typing import TYPE_CHECKING

from gq_triton._lazy import lazy

if TYPE_CHECKING:
    from .config import RNNT_PRESETS, RNNTConfig
    from .rnnt import RNNT

__all__ = ["RNNT", "RNNT_PRESETS", "RNNTConfig"]

__getattr__, __dir__ = lazy(__name__, {"RNNT": "rnnt", "RNNT_PRESETS": "config", "RNNTConfig": "config"})
