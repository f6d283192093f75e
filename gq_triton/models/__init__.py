"""Reference recognizers in plain torch layers."""

from .rnnt import RNNT, RNNT_PRESETS, RNNTConfig

__all__ = ["RNNT", "RNNT_PRESETS", "RNNTConfig"]
