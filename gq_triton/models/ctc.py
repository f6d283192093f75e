"""Recognizers with connectionist temporal classification (Graves et al., ICML 2006): an encoder and no label model."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ConformerConfig, RNNTConfig
from .rnnt import RNNT, encode, encoder_of

__all__ = ["CTC", "model_of"]


class CTC(nn.Module):
    """An encoder, and a label or the blank for each of its frames.

    Args:
        config: sizes, with ``predictor_layers`` 0; what else they say of a predictor and a joint network is not used.

    Raises:
        ValueError: ``config`` has a predictor.
    """

    blank = 0

    def __init__(self, config: RNNTConfig | ConformerConfig) -> None:
        super().__init__()
        if config.predictor_layers:
            raise ValueError(f"predictor_layers is {config.predictor_layers}; a CTC model has none")
        self.config = config
        self.encoder = encoder_of(config)
        self.output = nn.Linear(self.encoder.output_size, config.vocab_size)

    def forward(self, features: Tensor, feature_lengths: Tensor, switch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(B, T', vocab_size)``, and how many frames of each utterance are valid, ``(B,)``.

        Args:
            features: ``(B, T, features)``.
            feature_lengths: ``(B,)`` valid frames.
            switch: ``(B,)`` frames at which wake words end; for a bifocal encoder only.

        Raises:
            ValueError: a switch for another encoder, or what the encoder refuses.
        """
        encoded, lengths = encode(self.encoder, features, feature_lengths, switch)
        return self.output(encoded), lengths


def model_of(config: RNNTConfig | ConformerConfig) -> RNNT | CTC:
    """The model that ``config`` describes: a transducer, or a :class:`CTC` where it has no predictor."""
    return RNNT(config) if config.predictor_layers else CTC(config)
