"""Reference recognizers in plain torch layers."""

from typing import TYPE_CHECKING

from gq_triton._lazy import lazy

if TYPE_CHECKING:
    from .config import CONFORMER_PRESETS, PRESETS, RNNT_PRESETS, ConformerConfig, RNNTConfig, preset
    from .ctc import CTC, model_of
    from .rnnt import RNNT

_SIZES = ("CONFORMER_PRESETS", "PRESETS", "RNNT_PRESETS", "ConformerConfig", "RNNTConfig", "preset")
__all__ = [
    "CONFORMER_PRESETS",
    "CTC",
    "PRESETS",
    "RNNT",
    "RNNT_PRESETS",
    "ConformerConfig",
    "RNNTConfig",
    "model_of",
    "preset",
]

_MODULES = {"CTC": "ctc", "RNNT": "rnnt", "model_of": "ctc", **dict.fromkeys(_SIZES, "config")}
__getattr__, __dir__ = lazy(__name__, _MODULES)
