"""What training minimises: the transducer loss, and a CTC loss on the encoder that starts its alignments; or, of a CTC
model, that alone.

On little data a transducer spends most of its training without any alignment at all; an auxiliary CTC loss (Graves et
al., ICML 2006; as an auxiliary task for end-to-end recognizers, Kim et al., arXiv 1609.06773) gives the encoder one
within a few epochs. Its output layer belongs to training and never reaches the recognizer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gq_triton.grouping import regroup
from gq_triton.kernels.joint_loss import joint_rnnt_loss
from gq_triton.kernels.rnnt_loss import rnnt_loss
from gq_triton.layers import QATLinear
from gq_triton.models import CTC
from gq_triton.models.rnnt import Joint, Lattice

__all__ = ["CTCObjective", "TransducerObjective", "objective_of", "transducer_loss"]


def transducer_loss(
    joint: Joint,
    lattice: Lattice,
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    blank_bonus: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """The transducer loss of a lattice, without its logits in memory wherever the joint's output layer allows it.

    It does where all it takes to compute the layer is its weight: a plain ``nn.Linear``, or one whose weight alone is
    quantized. Any other layer is called, on all of the lattice at once.

    Args:
        joint: the joint network of the model that returned ``lattice``.
        lattice: see there.
        targets: ``(B, U)`` int64 labels, padded with any valid id.
        target_lengths: ``(B,)`` labels per utterance.
        blank: id of the blank label.
        blank_bonus: added to the blank's logits. What is decoded lacks it: trained with a bonus, a transducer emits
            blanks the less (the "blank penalty" of decoders, learned).
        reduction: "sum" (default), "mean" or "none", over the batch.

    Returns:
        The loss in nats, float32 (float64 for a float64 lattice).

    Raises:
        ValueError: as :func:`gq_triton.kernels.joint_loss.joint_rnnt_loss`.
    """
    labels = dict(targets=targets, logit_lengths=lattice.lengths, target_lengths=target_lengths)
    weight = _output_weight(joint.output)
    bonus = torch.zeros_like(joint.output.bias)
    bonus[blank] = blank_bonus
    if weight is None:
        logits = joint.combine(lattice.frames[:, :, None], lattice.positions[:, None]) + bonus
        return rnnt_loss(logits, **labels, blank=blank, reduction=reduction)
    projections = lattice.frames, lattice.positions, weight, joint.output.bias + bonus
    return joint_rnnt_loss(*projections, **labels, blank=blank, reduction=reduction)


def _output_weight(layer: nn.Module) -> Tensor | None:
    """The weight that ``layer`` computes with, where it does no more than apply it."""
    if type(layer) is nn.Linear:
        return layer.weight
    if type(layer) is not QATLinear or any(each.config.activations for each in layer.quantizers().values()):
        return None
    return layer.quantized("weight")


class TransducerObjective(nn.Module):
    """The training loss of a transducer.

    Args:
        model: called as :class:`gq_triton.models.RNNT` is, returns a :class:`gq_triton.models.rnnt.Lattice`.
        ctc_weight: of the auxiliary CTC loss; 0 for none.
        blank_bonus: see :func:`transducer_loss`.
    """

    def __init__(self, model: nn.Module, ctc_weight: float = 0.0, blank_bonus: float = 0.0) -> None:
        super().__init__()
        self.model, self.ctc_weight, self.blank_bonus = model, ctc_weight, blank_bonus
        self.ctc = nn.Linear(model.encoder.output_size, model.config.vocab_size) if ctc_weight else None
        regroup(self)  # the loss asks for the joint's output weight after the model's own call has ended

    def forward(
        self,
        features: Tensor,
        feature_lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        switch: Tensor | None = None,
    ) -> Tensor:
        """The loss summed over the batch, in nats; shapes as in :class:`gq_triton.training.data.Batch`, and ``switch``
        as in :meth:`gq_triton.models.rnnt.BifocalEncoder.forward`."""
        lattice = self.model(features, feature_lengths, targets, switch)
        blank = dict(blank=self.model.blank, blank_bonus=self.blank_bonus)
        loss = transducer_loss(self.model.joint, lattice, targets, target_lengths, **blank)
        if self.ctc is None:
            return loss
        ctc = ctc_loss(self.ctc(lattice.encoded), lattice.lengths, targets, target_lengths, blank=self.model.blank)
        return loss + self.ctc_weight * ctc


class CTCObjective(nn.Module):
    """The training loss of a CTC model.

    Args:
        model: called as :class:`gq_triton.models.CTC` is.
    """

    def __init__(self, model: CTC) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        features: Tensor,
        feature_lengths: Tensor,
        targets: Tensor,
        target_lengths: Tensor,
        switch: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`TransducerObjective.forward`."""
        logits, lengths = self.model(features, feature_lengths, switch)
        return ctc_loss(logits, lengths, targets, target_lengths, blank=self.model.blank)


def objective_of(
    model: nn.Module, ctc_weight: float = 0.0, blank_bonus: float = 0.0
) -> TransducerObjective | CTCObjective:
    """The training loss of a model of either kind; ``ctc_weight`` and ``blank_bonus`` are of a transducer's."""
    return CTCObjective(model) if isinstance(model, CTC) else TransducerObjective(model, ctc_weight, blank_bonus)


def ctc_loss(logits: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """The CTC loss of ``(B, T, V)`` logits, summed over the batch, in nats; 0 for more labels than frames, which have
    no alignment."""
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    labels = targets, lengths, target_lengths
    return nn.functional.ctc_loss(log_probs, *labels, blank=blank, reduction="sum", zero_infinity=True)
