"""Training of recognizers, float and quantization-aware, in one process or several."""

from .config import TrainConfig
from .data import SpeechSet
from .trainer import Trainer

__all__ = ["SpeechSet", "TrainConfig", "Trainer"]
