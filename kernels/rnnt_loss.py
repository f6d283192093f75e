"""The transducer (RNN-T) loss.

Mathematics (Graves, "Sequence transduction with recurrent neural networks", arXiv 1211.3711, section 2.4).  For
encoder frames t = 0..T-1 and emitted labels u = 0..U, the joint network gives p(k | t, u).  An alignment walks from
(0, 0) to (T, U): a blank moves to (t+1, u), label y_{u+1} to (t, u+1); the last step is the blank leaving (T-1, U).

    alpha(t, u) = log sum of all prefixes that reach (t, u)        alpha(0, 0) = 0
    beta(t, u)  = log sum of all suffixes from (t, u) to the end   beta(T, U) = 0

log P(y | x) = beta(0, 0), and the posterior of taking an edge is exp(alpha + edge + beta_next - log P).  The gradient
of -log P in the logits of node (t, u) is softmax * (sum of the node's edge posteriors) minus the posterior of each
edge's own label.

All nodes of one anti-diagonal n = t + u depend only on the previous one, so the lattice is swept in T + U steps, each
vectorised over batch and labels.  Node (t, u) is stored at ``[n, b, u]``; edges that leave the lattice of a shorter
utterance are -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rnnt_loss"]

NEGLIGIBLE = 2.0**-64  # of the 1 that the posteriors of each frame's blanks add up to


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of the targets, summed over all alignments (arXiv 1211.3711).

    Args:
        logits: ``(B, T, U + 1, V)`` unnormalised joint outputs, any floating dtype; the lattice is computed in float32
            (float64 for float64).
        targets: ``(B, U)`` int64 labels, padded with any valid id.
        logit_lengths: ``(B,)`` frames per utterance, 1..T.
        target_lengths: ``(B,)`` labels per utterance, 0..U.
        blank: id of the blank label.
        reduction: ``"mean"`` (over the batch), ``"sum"`` or ``"none"`` (a ``(B,)`` tensor).

    Returns:
        The loss, in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: on inconsistent shapes or an unknown reduction; on CPU also on lengths or labels out of range.
    """
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)}; a floating (B, T, U + 1, V) tensor is needed"
        )
    check_labels(logits.shape, targets, logit_lengths, target_lengths, blank)
    device = logits.device
    losses = _RNNTLoss.apply(logits, targets.to(device), logit_lengths.to(device), target_lengths.to(device), blank)
    return reduce(losses, reduction)


def check_labels(
    shape: tuple[int, ...], targets: Tensor, logit_lengths: Tensor, target_lengths: Tensor, blank: int
) -> None:
    """Refuse what does not go with logits of ``shape`` (B, T, U + 1, V); values are checked on the CPU only, where
    reading them costs no synchronisation, and not while compiling."""
    batch, frames, rows, vocabulary = shape
    if targets.shape != (batch, rows - 1):
        raise ValueError(f"targets is {tuple(targets.shape)}; logits {tuple(shape)} need {(batch, rows - 1)}")
    if not 0 <= blank < vocabulary:
        raise ValueError(f"blank is {blank}; allowed: 0..{vocabulary - 1}")
    for name, lengths in (("logit_lengths", logit_lengths), ("target_lengths", target_lengths)):
        if lengths.shape != (batch,) or lengths.is_floating_point():
            raise ValueError(
                f"{name} is {lengths.dtype} {tuple(lengths.shape)}; an integer ({batch},) tensor is needed"
            )
    _check_range("logit_lengths", logit_lengths, 1, frames)
    _check_range("target_lengths", target_lengths, 0, rows - 1)
    _check_range("targets", targets, 0, vocabulary - 1)


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = int(values.min()), int(values.max())
    if smallest < low or largest > high:
        raise ValueError(f"{name} holds values in {smallest}..{largest}; allowed: {low}..{high}")


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """The ``(B,)`` losses as ``reduction`` ("mean", "sum" or "none") says."""
    reductions = {"mean": torch.mean, "sum": torch.sum, "none": lambda each: each}
    if reduction not in reductions:
        raise ValueError(f"reduction is {reduction!r}; allowed: 'mean', 'sum', 'none'")
    return reductions[reduction](losses)


class _RNNTLoss(torch.autograd.Function):
    """The loss per utterance with its gradient in closed form: nothing of size T x U x V but the logits is saved."""

    @staticmethod
    def forward(ctx, logits, targets, logit_lengths, target_lengths, blank):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        normalizer = wide.logsumexp(-1)
        labels = torch.cat([targets, targets.new_full((targets.shape[0], 1), blank)], 1)[:, None, :, None]
        labels = labels.expand(*logits.shape[:3], 1)
        edges = mask_edges(
            wide[..., blank] - normalizer,
            wide.gather(-1, labels)[..., 0] - normalizer,
            logit_lengths,
            target_lengths,
        )
        sums = lattice_sums(*edges, logit_lengths, target_lengths)
        ctx.save_for_backward(logits, normalizer, labels, *edges, *sums, logit_lengths, target_lengths)
        ctx.blank = blank
        return -sums[1][:, 0, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        logits, normalizer, labels, *lattice = ctx.saved_tensors
        through_blank, through_label = (p * grad_losses[:, None, None] for p in posteriors(*lattice))
        grad = (logits - normalizer[..., None]).exp_().mul_((through_blank + through_label)[..., None])
        grad[..., ctx.blank] -= through_blank
        grad.scatter_add_(-1, labels, -through_label[..., None].to(grad.dtype))
        return grad.to(logits.dtype), None, None, None, None


# --- lattice: (B, T, U + 1) by frame ----------------------------------------------------------------------------------


def mask_edges(
    blank_edge: Tensor, label_edge: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the two edges of every node, -inf where the edge leaves the utterance's own lattice."""
    _, frames, rows = blank_edge.shape
    t = torch.arange(frames, device=blank_edge.device)[None, :, None]
    u = torch.arange(rows, device=blank_edge.device)[None, None, :]
    length, labels = logit_lengths[:, None, None], target_lengths[:, None, None]
    inside = (t < length) & (u <= labels)
    return blank_edge.masked_fill(~inside, -torch.inf), label_edge.masked_fill(~inside | (u == labels), -torch.inf)


def lattice_sums(
    blank_edge: Tensor, label_edge: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """(alpha, beta) of every node, -inf outside of the utterances; the losses are ``-beta[:, 0, 0]``."""
    frames = blank_edge.shape[1]
    blank_skew, label_skew = _skew(blank_edge), _skew(label_edge)
    alpha = _forward_sums(blank_skew, label_skew)
    beta = _backward_sums(blank_skew, label_skew, logit_lengths, target_lengths)
    return _unskew(alpha, frames), _unskew(beta, frames)


def posteriors(
    blank_edge: Tensor, label_edge: Tensor, alpha: Tensor, beta: Tensor, logit_lengths: Tensor, target_lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Probability, given the targets, that the alignment takes each node's blank edge and its label edge.

    Negligible ones are 0: no sum would notice them, and denormal numbers would slow down whatever is done with them.
    """
    pad, threshold = torch.nn.functional.pad, torch.nn.functional.threshold
    after_blank = pad(beta[:, 1:], (0, 0, 0, 1), value=-torch.inf)
    after_blank[torch.arange(len(beta), device=beta.device), logit_lengths - 1, target_lengths] = 0
    after_label = pad(beta[:, :, 1:], (0, 1), value=-torch.inf)
    arrival = alpha - beta[:, :1, :1]
    through_blank, through_label = (
        (arrival + blank_edge + after_blank).exp(),
        (arrival + label_edge + after_label).exp(),
    )
    return threshold(through_blank, NEGLIGIBLE, 0.0), threshold(through_label, NEGLIGIBLE, 0.0)


def _skew(edges: Tensor) -> Tensor:
    """``(B, T, U + 1)`` by frame -> ``(T + U, B, U + 1)`` by anti-diagonal, -inf outside."""
    _, frames, rows = edges.shape
    u = torch.arange(rows, device=edges.device)
    t = torch.arange(frames + rows - 1, device=edges.device)[:, None] - u
    outside = (t < 0) | (t >= frames)
    skewed = edges[:, t.clamp(0, frames - 1), u].masked_fill(outside, -torch.inf)
    return skewed.transpose(0, 1).contiguous()


def _unskew(diagonals: Tensor, frames: int) -> Tensor:
    """The inverse of :func:`_skew` for the nodes inside."""
    rows = diagonals.shape[-1]
    u = torch.arange(rows, device=diagonals.device)
    t = torch.arange(frames, device=diagonals.device)[:, None]
    return diagonals.transpose(0, 1)[:, t + u, u]


def _forward_sums(blank_skew: Tensor, label_skew: Tensor) -> Tensor:
    """alpha, ``(T + U, B, U + 1)`` by anti-diagonal."""
    alpha = torch.full_like(blank_skew, -torch.inf)
    alpha[0, :, 0] = 0
    for n in range(1, alpha.shape[0]):
        alpha[n] = alpha[n - 1] + blank_skew[n - 1]
        step = alpha[n - 1, :, :-1] + label_skew[n - 1, :, :-1]
        alpha[n, :, 1:] = torch.logaddexp(alpha[n, :, 1:], step)
    return alpha


def _backward_sums(blank_skew: Tensor, label_skew: Tensor, logit_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """beta, ``(T + U + 1, B, U + 1)`` by anti-diagonal; each utterance starts at its own end node (T, U)."""
    diagonals, batch, rows = blank_skew.shape
    beta = blank_skew.new_full((diagonals + 1, batch, rows), -torch.inf)
    beta[logit_lengths + target_lengths, torch.arange(batch, device=beta.device), target_lengths] = 0
    for n in range(diagonals - 1, -1, -1):
        through = blank_skew[n] + beta[n + 1]
        step = label_skew[n, :, :-1] + beta[n + 1, :, 1:]
        through[:, :-1] = torch.logaddexp(through[:, :-1], step)
        beta[n] = torch.logaddexp(beta[n], through)
    return beta
