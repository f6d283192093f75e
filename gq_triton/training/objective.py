"""What training minimises: the transducer loss, and a CTC loss on the encoder that starts its alignments.

On little data a transducer spends most of its training without any alignment at all; an auxiliary CTC loss (Graves et
al., ICML 2006; as an auxiliary task for end-to-end recognizers, Kim et al., arXiv 1609.06773) gives the encoder one
within a few epochs. Its output layer belongs to training and never reaches the recognizer.
"""

from __future__ import annotations

from torch import Tensor, nn

from gq_triton.kernels.rnnt_loss import rnnt_loss

__all__ = ["TransducerObjective"]


class TransducerObjective(nn.Module):
    """The training loss of a transducer.

    Args:
        model: called as ``model(features, feature_lengths, targets)``, returns a
            :class:`gq_triton.models.rnnt.Lattice`.
        ctc_weight: of the auxiliary CTC loss; 0 for none.
    """

    def __init__(self, model: nn.Module, ctc_weight: float) -> None:
        super().__init__()
        self.model, self.ctc_weight = model, ctc_weight
        self.ctc = nn.Linear(model.encoder.output_size, model.config.vocab_size) if ctc_weight else None

    def forward(self, features: Tensor, feature_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """The loss summed over the batch, in nats; shapes as in :class:`gq_triton.training.data.Batch`."""
        logits, lengths, encoded = self.model(features, feature_lengths, targets)
        loss = rnnt_loss(logits, targets, lengths, target_lengths, blank=self.model.blank, reduction="sum")
        if self.ctc is None:
            return loss
        log_probs = self.ctc(encoded).float().log_softmax(-1).transpose(0, 1)
        ctc = nn.functional.ctc_loss(
            log_probs,
            targets,
            lengths,
            target_lengths,
            blank=self.model.blank,
            reduction="sum",
            zero_infinity=True,  # more labels than frames: CTC has no alignment, the transducer has
        )
        return loss + self.ctc_weight * ctc
