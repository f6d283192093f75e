"""The transducer loss from the joint network's projections, without the B x T x U x V tensor of logits.

Mathematics.  For frame t of the encoder's projection e and position u of the predictor's projection p, a joint network
with output weight W (V, J) and bias b gives node (t, u) of the lattice

    h = tanh(e_t + p_u)        l_v = sum_j h_j W_vj + b_v        log p(v | t, u) = l_v - log sum_k exp l_k

The lattice needs no more of them than the log-probabilities of the node's blank edge and label edge; the recursions of
alpha and beta, log P and the posteriors of the edges are those of `gq_triton.kernels.rnnt_loss`.  With m the sum of the
posteriors of the node's two edges, scaled by the incoming gradient,

    dl_v = m p(v | t, u) - (posterior of each edge, at its own label)
    dz = (sum_v dl_v W_vj) (1 - h_j^2)        de_t = sum_u dz        dp_u = sum_t dz
    dW = sum over the nodes of dl h^T         db = sum over the nodes of dl

Saved for the backward pass are the inputs and five float32 numbers a node: normalizer, the two edges, alpha, beta.

CUDA.  The nodes are walked in blocks of whole utterances, or of some frames of one, of at most `CHUNK` numbers.

1. `_hidden_kernel` writes a block's h, so that every tanh is taken once; 0 outside of the utterances' lengths.
2. `_edges_kernel` multiplies a tile of h with W, label block by label block, and keeps a running log-sum-exp.
3. `_lattice_kernel` computes alpha and beta of all utterances at once.  Along u the recursion of a frame,
   x_u = logaddexp(b_u, a_u + x_{u-1}), is an associative scan over the pairs (a, b); a program walks the frames of one
   utterance, in one direction, and keeps the previous frame in registers.
4. Backward, `_logit_grad_kernel` forms the logits of a block again, of those tiles that alignments pass through with
   more than negligible probability, and writes dl; the rest is matrix products.

The CPU does the same in blocks that fit its caches, each utterance at its own lengths, and backward in the band of
labels that alignments pass through.  Sums run in a fixed order: the same inputs give the same bits.  Frames and labels
beyond an utterance's lengths are not read, whatever they hold.

Floor.  With N = sum of T_b (U_b + 1) nodes, 2 N J V operations forward and 6 N J V backward, a third of these to form
the logits again.  A node's h and dl are written once and read once or twice, 2 (J + V) bytes each time in 16 bits,
through the second-level cache where a block fits it; all else, 20 bytes a node and the inputs, is small beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gq_triton.kernels.backend import INTERPRETED, bound, cdiv, jit, launching, next_power_of_2, tl
from gq_triton.kernels.rnnt_loss import NEGLIGIBLE, check_labels, lattice_sums, posteriors, reduce, rnnt_loss

__all__ = ["joint_rnnt_loss", "reference"]

CHUNK = 1 << 25  # numbers of a block's h or dl on a GPU: 64 MiB in 16 bits
CPU_CHUNK = 1 << 18  # and on the CPU
ALIGN = 16  # numbers that J and V are made multiples of, or a GPU would load them one by one
NORMALIZER, BLANK, LABEL, ALPHA, BETA = range(5)  # planes of an utterance's lattice


def joint_rnnt_loss(
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """Transducer loss of the logits ``tanh(encoded[:, :, None] + predicted[:, None]) @ weight.T + bias``.

    Equals :func:`gq_triton.kernels.rnnt_loss.rnnt_loss` (arXiv 1211.3711) of those logits, which exist only in blocks
    of bounded size. Differentiable once, in ``encoded``, ``predicted``, ``weight`` and ``bias``.

    Args:
        encoded: ``(B, T, J)``, the joint network's projection of the encoder's frames, any floating dtype (no float64
            on CUDA). Products are computed in it; on CUDA float32 products follow
            ``torch.backends.cuda.matmul.fp32_precision``.
        predicted: ``(B, U + 1, J)``, its projection of the predictor's outputs, in the dtype of ``encoded``.
        weight: ``(V, J)``, of the output layer, any floating dtype.
        bias: ``(V,)`` or None, any floating dtype.
        targets: ``(B, U)`` int64 labels, padded with any valid id.
        logit_lengths: ``(B,)`` frames per utterance, 1..T.
        target_lengths: ``(B,)`` labels per utterance, 0..U.
        blank: id of the blank label. Default 0.
        reduction: ``"mean"`` (over the batch, default), ``"sum"`` or ``"none"`` (a ``(B,)`` tensor).

    Returns:
        The loss, in nats, float32 (float64 for float64 projections).

    Raises:
        ValueError: on inconsistent shapes or dtypes or an unknown reduction; for tensors on the CPU also on lengths or
            labels out of range.
    """
    _check_projections(encoded, predicted, weight, bias)
    shape = (*encoded.shape[:2], predicted.shape[1], weight.shape[0])
    check_labels(shape, targets, logit_lengths, target_lengths, blank)
    labels = [tensor.to(encoded.device) for tensor in (targets, logit_lengths, target_lengths)]
    joint = encoded, predicted, weight.to(encoded.dtype), bias
    losses, _ = _loss(*(_aligned(*joint) if encoded.is_cuda else joint), *labels, blank)
    return reduce(losses, reduction)


def _aligned(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same joint network with J and V made multiples of 16, by zeros and labels of probability 0."""
    columns, rows = -weight.shape[1] % ALIGN, -weight.shape[0] % ALIGN
    pad = torch.nn.functional.pad
    if rows:
        bias = pad(weight.new_zeros(len(weight)) if bias is None else bias, (0, rows), value=-torch.inf)
    if columns or rows:
        weight = pad(weight, (0, columns, 0, rows))
    if columns:
        encoded, predicted = pad(encoded, (0, columns)), pad(predicted, (0, columns))
    return encoded, predicted, weight, bias


def _check_projections(encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if encoded.ndim != 3 or 0 in encoded.shape[1:] or not encoded.is_floating_point():
        raise ValueError(
            f"encoded is {encoded.dtype} {tuple(encoded.shape)}; a floating (B, T, J) tensor is needed, T and J above 0"
        )
    batch, _, width = encoded.shape
    if predicted.ndim != 3 or predicted.shape[::2] != (batch, width) or not predicted.shape[1]:
        raise ValueError(f"predicted is {tuple(predicted.shape)}; ({batch}, U + 1, {width}) is needed")
    if predicted.dtype != encoded.dtype:
        raise ValueError(f"predicted is {predicted.dtype}; encoded is {encoded.dtype}, and both must be the same")
    if weight.ndim != 2 or weight.shape[1] != width or not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; a floating (V, {width}) tensor is needed")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}; a floating ({len(weight)},) tensor is needed")


# --- reference --------------------------------------------------------------------------------------------------------


def reference(
    encoded: Tensor, predicted: Tensor, weight: Tensor, bias: Tensor | None, *labels: Tensor, **options
) -> Tensor:
    """The definition, with all logits in memory, in the dtype it is given; arguments as those of `joint_rnnt_loss`."""
    hidden = torch.tanh(encoded[:, :, None] + predicted[:, None])
    return rnnt_loss(torch.nn.functional.linear(hidden, weight, bias), *labels, **options)


# --- gradients of one block of nodes ----------------------------------------------------------------------------------


class _Gradients(NamedTuple):
    """Where gradients are added up, in float32 (float64); those of ``encoded`` come once, in its own dtype."""

    encoded: Tensor
    predicted: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def zeros(cls, encoded: Tensor, predicted: Tensor, weight: Tensor) -> _Gradients:
        wide = _wide(encoded.dtype)
        sums = (torch.zeros(like.shape, dtype=wide, device=like.device) for like in (predicted, weight, weight[:, 0]))
        return cls(torch.zeros(encoded.shape, dtype=encoded.dtype, device=encoded.device), *sums)

    def add(
        self, utterances: slice, frames: slice, rows: slice, hidden: Tensor, dlogits: Tensor, weight: Tensor
    ) -> None:
        """Add what the nodes (utterances, frames, rows) with h (B', T', U', J) and dl (..., V) give."""
        flat = dlogits.flatten(0, 2)
        dhidden = torch.mm(flat, weight).view(hidden.shape)
        dz = torch.ops.aten.tanh_backward(dhidden, hidden)
        self.encoded[utterances, frames] = dz.sum(2)
        self.predicted[utterances, rows] += dz.sum(1, dtype=self.predicted.dtype)
        self.weight.add_(torch.mm(flat.t(), hidden.flatten(0, 2)))
        self.bias.add_(flat.sum(0, dtype=self.bias.dtype))

    def narrow(self, *likes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums of ``predicted``, ``weight`` and ``bias`` in the dtypes of ``likes``."""
        return self.encoded, *(total.to(like.dtype) for total, like in zip(self[1:], likes, strict=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- CPU --------------------------------------------------------------------------------------------------------------


def _blocks_cpu(weight: Tensor, logit_lengths: Tensor, target_lengths: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(utterance, frames, labels) of blocks of nodes that hold all within the lengths."""
    lengths = zip(logit_lengths.tolist(), target_lengths.tolist(), strict=True)
    for utterance, (length, labels) in enumerate(lengths):
        step = max(1, CPU_CHUNK // ((labels + 1) * max(weight.shape)))
        for start in range(0, length, step):
            yield utterance, slice(start, min(start + step, length)), labels


def _hidden_cpu(encoded: Tensor, predicted: Tensor) -> Tensor:
    """h (T', U', J) of (T', J) and (U', J)."""
    return torch.add(encoded[:, None], predicted).tanh_()


def _logits_cpu(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    narrow = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
    return narrow.to(_wide(narrow.dtype))


def _forward_cpu(
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor]:
    shape = (len(encoded), 5, encoded.shape[1], predicted.shape[1])
    lattice = torch.full(shape, -torch.inf, dtype=_wide(encoded.dtype))
    for b, frames, count in _blocks_cpu(weight, logit_lengths, target_lengths):
        logits = _logits_cpu(_hidden_cpu(encoded[b, frames], predicted[b, : count + 1]), weight, bias)
        normalizer = logits.logsumexp(-1)
        labels = targets[b, :count].expand(len(logits), count)[..., None]
        lattice[b, NORMALIZER, frames, : count + 1] = normalizer
        lattice[b, BLANK, frames, : count + 1] = logits[..., blank] - normalizer
        lattice[b, LABEL, frames, :count] = logits[:, :count].gather(-1, labels)[..., 0] - normalizer[:, :count]
    sums = lattice_sums(lattice[:, BLANK], lattice[:, LABEL], logit_lengths, target_lengths)
    lattice[:, ALPHA], lattice[:, BETA] = sums
    return -lattice[:, BETA, 0, 0], lattice


def _backward_cpu(
    grad: Tensor,
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    lattice: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normalizer, *sums = lattice.unbind(1)
    through_blank, through_label = (p * grad[:, None, None] for p in posteriors(*sums, logit_lengths, target_lengths))
    mass = through_blank + through_label
    targets = torch.nn.functional.pad(targets, (0, 1))  # the last node's label edge has no mass
    gradients = _Gradients.zeros(encoded, predicted, weight)
    for b, frames, _ in _blocks_cpu(weight, logit_lengths, target_lengths):
        rows = _support(mass[b, frames])
        here, labels = (b, frames, rows), targets[b, rows, None]
        hidden = _hidden_cpu(encoded[b, frames], predicted[b, rows])
        dlogits = _logits_cpu(hidden, weight, bias).sub_(normalizer[here][..., None]).exp_().mul_(mass[here][..., None])
        dlogits[..., blank] -= through_blank[here]
        dlogits.scatter_add_(-1, labels.expand(len(hidden), -1, 1), -through_label[here][..., None])
        gradients.add(slice(b, b + 1), frames, rows, hidden[None], dlogits[None].to(weight.dtype), weight)
    return gradients.narrow(predicted, weight, weight if bias is None else bias)


def _support(mass: Tensor) -> slice:
    """The labels that have mass in (T', U'): alignments that matter keep to a band of the lattice."""
    rows = mass.ne(0).any(0).nonzero()
    return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)


# --- Triton -----------------------------------------------------------------------------------------------------------
# A block is `utterances` x `frames` x `rows` nodes, where rows = U + 1; a tile is N = FRAMES x ROWS nodes of it.  The
# lattice is (B, 5, all frames, rows), its planes in the order above.  What lies outside of the lengths is never read.

# A batch's own sizes, for which nothing is compiled anew.
_VARYING = ("first_utterance", "first_frame", "frames", "all_frames", "rows")


@jit
def _tile(tile, frames, rows, FRAMES: tl.constexpr, ROWS: tl.constexpr):
    """(utterance, first frame, first label) of a tile, counted within its block."""
    across, down = tl.cdiv(rows, ROWS), tl.cdiv(frames, FRAMES)
    return tile // (across * down), tile // across % down * FRAMES, tile % across * ROWS


@jit
def _nodes(top, left, FRAMES: tl.constexpr, ROWS: tl.constexpr):
    """(frames, labels) of the nodes of a tile, (N,) each."""
    index = tl.arange(0, FRAMES * ROWS)
    return top + index // ROWS, left + index % ROWS


@jit
def _lengths(logit_lengths, target_lengths, utterance, all_frames, rows):
    """(frames, labels) of an utterance, never more than the tensors hold."""
    length = tl.minimum(tl.load(logit_lengths + utterance), all_frames).to(tl.int32)
    return length, tl.minimum(tl.load(target_lengths + utterance), rows - 1).to(tl.int32)


@jit(do_not_specialize=_VARYING)
def _hidden_kernel(
    encoded,  # (B, all frames, width)
    predicted,  # (B, rows, width)
    logit_lengths,
    target_lengths,
    hidden,  # (utterances, frames, rows, width)
    first_utterance,
    first_frame,
    frames,
    all_frames,
    rows,
    width,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """h of a tile, 0 outside of the lengths."""
    utterance, top, left = _tile(tl.program_id(0).to(tl.int64), frames, rows, FRAMES, ROWS)
    b = first_utterance + utterance
    length, labels = _lengths(logit_lengths, target_lengths, b, all_frames, rows)
    t, u = top + tl.arange(0, FRAMES), left + tl.arange(0, ROWS)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_t, in_u = first_frame + t < length, u <= labels
    row = b * all_frames + first_frame + t
    e = tl.load(encoded + row[:, None] * width + j[None, :], mask=in_t[:, None] & (j < width)[None, :], other=0.0)
    row = b * rows + u
    p = tl.load(predicted + row[:, None] * width + j[None, :], mask=in_u[:, None] & (j < width)[None, :], other=0.0)
    z = e.to(tl.float32)[:, None, :] + p.to(tl.float32)[None, :, :]
    h = tl.where((in_t[:, None] & in_u[None, :])[:, :, None], 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0), 0.0)
    node = (utterance * frames + t)[:, None] * rows + u[None, :]
    there = ((t < frames)[:, None] & (u < rows)[None, :])[:, :, None] & (j < width)[None, None, :]
    tl.store(hidden + node[:, :, None] * width + j[None, None, :], h.to(hidden.dtype.element_ty), mask=there)


@jit
def _logits(
    hidden,
    weight,
    bias,
    node,
    inside,
    label,  # (BLOCK_V,)
    depth,  # how many of the width to sum over
    width,
    vocabulary,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """(N, BLOCK_V) float32 logits of nodes (N,), -inf beyond the vocabulary; those of nodes not inside are b."""
    total = tl.zeros((node.shape[0], label.shape[0]), tl.float32)
    j = tl.arange(0, BLOCK_J)
    hidden += node[:, None] * width + j[None, :]
    weight += label.to(tl.int64)[None, :] * width + j[:, None]
    for start in range(0, bound(depth), BLOCK_J):
        here = j < width - start
        h = tl.load(hidden + start, mask=inside[:, None] & here[None, :], other=0.0)
        w = tl.load(weight + start, mask=(label < vocabulary)[None, :] & here[:, None], other=0.0)
        total = tl.dot(h.to(OPERAND), w.to(OPERAND), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + label, mask=label < vocabulary, other=0.0).to(tl.float32)[None, :]
    return tl.where((label < vocabulary)[None, :], total, float("-inf"))


@jit(do_not_specialize=_VARYING)
def _edges_kernel(
    hidden,  # (utterances, frames, rows, width)
    weight,  # (vocabulary, width)
    bias,
    targets,  # (B, rows - 1)
    logit_lengths,
    target_lengths,
    lattice,
    first_utterance,
    first_frame,
    frames,
    all_frames,
    rows,
    width,
    vocabulary,
    blank,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Normalizer and edges of a tile of nodes, by a log-sum-exp that runs over the blocks of labels."""
    utterance, top, left = _tile(tl.program_id(0).to(tl.int64), frames, rows, FRAMES, ROWS)
    b = first_utterance + utterance
    length, labels = _lengths(logit_lengths, target_lengths, b, all_frames, rows)
    t, u = _nodes(top, left, FRAMES, ROWS)
    node = (utterance * frames + t) * rows + u
    inside = (t < frames) & (first_frame + t < length) & (u <= labels)
    target = tl.load(targets + b * (rows - 1) + u, mask=u < labels, other=-1)
    largest = tl.full((FRAMES * ROWS,), -3e38, tl.float32)  # finite: exp(-inf - largest) is 0, never NaN
    total = tl.zeros((FRAMES * ROWS,), tl.float32)
    to_blank = tl.zeros((FRAMES * ROWS,), tl.float32)
    to_label = tl.zeros((FRAMES * ROWS,), tl.float32)
    end = tl.where((first_frame + top < length) & (left <= labels), vocabulary, 0)  # nothing to do for a tile outside
    for start in tl.range(0, bound(end), BLOCK_V, num_stages=1):
        label = start + tl.arange(0, BLOCK_V)
        logits = _logits(
            hidden, weight, bias, node, inside, label, width, width, vocabulary, HAS_BIAS, OPERAND, PRECISION, BLOCK_J
        )
        to_blank += tl.sum(tl.where((label == blank)[None, :], logits, 0.0), 1)
        to_label += tl.sum(tl.where(label[None, :] == target[:, None], logits, 0.0), 1)
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        largest = larger
    normalizer = largest + tl.log(total)
    plane = all_frames * rows
    place = lattice + b * 5 * plane + (first_frame + t) * rows + u
    tl.store(place, normalizer, mask=inside)
    tl.store(place + plane, to_blank - normalizer, mask=inside)
    tl.store(place + 2 * plane, to_label - normalizer, mask=inside)


@jit
def _logaddexp(x, y):
    """log(e^x + e^y): -inf for two -inf, NaN where either is NaN."""
    high, low = tl.where(x > y, x, y), tl.where(x > y, y, x)
    return high + tl.log(1.0 + tl.exp(low - tl.maximum(high, -3e38)))


@jit
def _follow(step1, value1, step2, value2):
    """x -> logaddexp(value, step + x), first 1, then 2, as one such map."""
    return step1 + step2, _logaddexp(value2, step2 + value1)


@jit
def _load_edges(lattice, plane, rows, frame, node, step, place, last):
    """(blank edges of the nodes, label edges that lead to them from the place before) of a frame, -inf beyond last."""
    start, none = lattice + frame.to(tl.int64) * rows, float("-inf")
    blanks = tl.load(start + plane + node, mask=place <= last, other=none)
    return blanks, tl.load(start + 2 * plane + step, mask=(place >= 1) & (place <= last), other=none)


@jit(do_not_specialize=_VARYING)
def _lattice_kernel(lattice, losses, logit_lengths, target_lengths, all_frames, rows, BLOCK: tl.constexpr):
    """alpha (program (b, 0)) or beta (program (b, 1)) of utterance b, and its loss.

    beta is alpha of the lattice turned round: place i stands for label U - i, and frames are walked from the last.
    """
    b, reverse = tl.program_id(0).to(tl.int64), tl.program_id(1) == 1
    length, labels = _lengths(logit_lengths, target_lengths, b, all_frames, rows)
    plane = all_frames * rows
    lattice += b * 5 * plane
    out = lattice + tl.where(reverse, 4, 3) * plane
    place = tl.arange(0, BLOCK)
    node = tl.where(reverse, labels - place, place)
    step = tl.where(reverse, labels - place, place - 1)
    first, onward = tl.where(reverse, length - 1, 0), tl.where(reverse, -1, 1)
    row = tl.where(place == 0, 0.0, float("-inf"))
    last = tl.where(length > 0, labels, -1)
    blanks, along = _load_edges(lattice, plane, rows, first, node, step, place, last)
    for count in range(0, bound(length)):
        frame = first + count * onward
        # The next frame's edges are on their way while this one's recursion runs.
        last = tl.where(count + 1 < length, labels, -1)
        ahead = _load_edges(lattice, plane, rows, frame + onward, node, step, place, last)
        entering = tl.where(reverse, row + blanks, row)
        _, reached = tl.associative_scan((along, entering), 0, _follow)
        tl.store(out + frame.to(tl.int64) * rows + node, reached, mask=place <= labels)
        row = tl.where(reverse, reached, reached + blanks)
        blanks, along = ahead
    if reverse:
        tl.store(losses + b, -tl.sum(tl.where(place == labels, row, 0.0), 0))


@jit
def _edge_posteriors(lattice, loss, grad, plane, frame, u, length, labels, rows, inside, LEAST: tl.constexpr):
    """Posteriors of the blank and the label edge times the incoming gradient, of nodes; 0 outside or negligible."""
    none = float("-inf")
    place = frame * rows + u
    beta = lattice + 4 * plane + place
    last = frame == length - 1
    after_blank = tl.load(beta + rows, mask=inside & (frame < length - 1), other=none)
    after_blank = tl.where(last & (u == labels), 0.0, after_blank)
    after_label = tl.load(beta + 1, mask=inside & (u < labels), other=none)
    arrival = tl.load(lattice + 3 * plane + place, mask=inside, other=none) + loss
    through_blank = tl.exp(arrival + tl.load(lattice + plane + place, mask=inside, other=none) + after_blank)
    label_edge = tl.load(lattice + 2 * plane + place, mask=inside & (u < labels), other=none)
    through_label = tl.exp(arrival + label_edge + after_label)
    through_blank = tl.where(through_blank <= LEAST, 0.0, through_blank * grad)
    return through_blank, tl.where(through_label <= LEAST, 0.0, through_label * grad)


@jit(do_not_specialize=_VARYING)
def _logit_grad_kernel(
    hidden,  # (utterances, frames, rows, width)
    weight,  # (vocabulary, width)
    bias,
    targets,  # (B, rows - 1)
    logit_lengths,
    target_lengths,
    lattice,
    losses,
    grad,  # (B,)
    dlogits,  # (utterances, frames, rows, vocabulary)
    first_utterance,
    first_frame,
    frames,
    all_frames,
    rows,
    width,
    vocabulary,
    blank,
    LEAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """dl of a tile of nodes and a block of labels, 0 outside of the lengths."""
    across = tl.cdiv(vocabulary, BLOCK_V)
    program = tl.program_id(0).to(tl.int64)
    utterance, top, left = _tile(program // across, frames, rows, FRAMES, ROWS)
    b = first_utterance + utterance
    length, labels = _lengths(logit_lengths, target_lengths, b, all_frames, rows)
    t, u = _nodes(top, left, FRAMES, ROWS)
    node, frame = (utterance * frames + t) * rows + u, first_frame + t
    inside = (t < frames) & (frame < length) & (u <= labels)
    label = (program % across).to(tl.int32) * BLOCK_V + tl.arange(0, BLOCK_V)
    plane = all_frames * rows
    lattice += b * 5 * plane
    loss, scale = tl.load(losses + b), tl.load(grad + b)
    through_blank, through_label = _edge_posteriors(
        lattice, loss, scale, plane, frame, u, length, labels, rows, inside, LEAST
    )
    mass = through_blank + through_label
    depth = tl.where(tl.max((mass != 0.0).to(tl.int32), 0) == 1, width, 0)  # nothing to do for a tile without mass
    logits = _logits(
        hidden, weight, bias, node, inside, label, depth, width, vocabulary, HAS_BIAS, OPERAND, PRECISION, BLOCK_J
    )
    normalizer = tl.load(lattice + frame * rows + u, mask=inside, other=0.0)
    target = tl.load(targets + b * (rows - 1) + u, mask=u < labels, other=-1)
    gradient = tl.where((mass != 0.0)[:, None], tl.exp(logits - normalizer[:, None]) * mass[:, None], 0.0)
    gradient -= tl.where((label == blank)[None, :], through_blank[:, None], 0.0)
    gradient -= tl.where(label[None, :] == target[:, None], through_label[:, None], 0.0)
    there = ((t < frames) & (u < rows))[:, None] & (label < vocabulary)[None, :]
    out = dlogits + node[:, None] * vocabulary + label[None, :]
    tl.store(out, gradient.to(dlogits.dtype.element_ty), mask=there)


# --- launchers --------------------------------------------------------------------------------------------------------

HIDDEN_TILE = (2, 16, 64)  # FRAMES, ROWS, BLOCK_J of `_hidden_kernel`
_OPERANDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Tile(NamedTuple):
    """A tile of the two products, and its warps."""

    frames: int
    rows: int
    labels: int
    depth: int
    warps: int


def choose_tile(dtype: torch.dtype) -> Tile:
    """The tile that fits the registers; float32 products, perhaps outside tensor cores, take more of them."""
    return Tile(4, 16, 64, 16, 4) if dtype == torch.float32 else Tile(8, 16, 128, 64, 8)


def lattice_warps(block: int) -> int:
    """A scan within one warp needs no barrier; longer rows need the registers of several."""
    return max(1, min(16, block // 256))


def _blocks(batch: int, frames: int, rows: int, width: int) -> Iterator[tuple[slice, slice]]:
    """(utterances, frames) of blocks of at most `CHUNK` numbers, ``width`` of them a node; one frame at least."""
    step = max(1, min(frames, CHUNK // (rows * width)))
    many = max(1, CHUNK // (frames * rows * width))
    for b in range(0, batch, many):
        for t in range(0, frames, step):
            yield slice(b, min(b + many, batch)), slice(t, min(t + step, frames))


class _Launcher:
    """The arguments that the kernels share, and their launches on a block of nodes."""

    def __init__(
        self,
        encoded: Tensor,
        predicted: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_lengths: Tensor,
        target_lengths: Tensor,
        blank: int,
    ) -> None:
        self.encoded, self.predicted, self.weight = (x.contiguous() for x in (encoded, predicted, weight))
        self.bias = self.weight if bias is None else bias.contiguous()
        self.targets = targets.contiguous()
        self.lengths = logit_lengths.contiguous(), target_lengths.contiguous()
        (self.batch, self.frames, self.width), self.rows = encoded.shape, predicted.shape[1]
        self.vocabulary, self.blank = len(weight), blank
        self.tile = choose_tile(encoded.dtype)
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
        operand = tl.float32 if INTERPRETED else getattr(tl, _OPERANDS[encoded.dtype])  # numpy has no bfloat16
        self.options = bias is not None, operand, "ieee" if exact else "tf32", *self.tile[:4]

    def hidden(self, utterances: slice, frames: slice) -> Tensor:
        """h (B', T', rows, J) of a block."""
        shape = utterances.stop - utterances.start, frames.stop - frames.start, self.rows, self.width
        hidden = self.encoded.new_empty(shape)
        grid = self._tiles(shape, *HIDDEN_TILE[:2]), cdiv(self.width, HIDDEN_TILE[2])
        sizes = utterances.start, frames.start, shape[1], self.frames, self.rows, self.width
        _hidden_kernel[grid](self.encoded, self.predicted, *self.lengths, hidden, *sizes, *HIDDEN_TILE)
        return hidden

    def edges(self, utterances: slice, frames: slice, lattice: Tensor) -> None:
        """Write normalizer and edges of a block."""
        hidden = self.hidden(utterances, frames)
        _edges_kernel[(self._tiles(hidden.shape, *self.tile[:2]),)](
            *self._inputs(hidden),
            lattice,
            *self._sizes(utterances, frames),
            *self.options,
            num_warps=self.tile.warps,
        )

    def logit_gradients(
        self, utterances: slice, frames: slice, lattice: Tensor, losses: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h and dl (B', T', rows, V) of a block."""
        hidden = self.hidden(utterances, frames)
        dlogits = hidden.new_empty(*hidden.shape[:3], self.vocabulary)
        programs = self._tiles(hidden.shape, *self.tile[:2]) * cdiv(self.vocabulary, self.tile.labels)
        _logit_grad_kernel[(programs,)](
            *self._inputs(hidden),
            lattice,
            losses,
            grad,
            dlogits,
            *self._sizes(utterances, frames),
            NEGLIGIBLE,
            *self.options,
            num_warps=self.tile.warps,
        )
        return hidden, dlogits

    def _inputs(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return hidden, self.weight, self.bias, self.targets, *self.lengths

    def _sizes(self, utterances: slice, frames: slice) -> tuple[int, ...]:
        block = utterances.start, frames.start, frames.stop - frames.start
        return *block, self.frames, self.rows, self.width, self.vocabulary, self.blank

    @staticmethod
    def _tiles(shape: tuple[int, ...], frames: int, rows: int) -> int:
        return shape[0] * cdiv(shape[1], frames) * cdiv(shape[2], rows)


def _launch_forward(
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor]:
    joint = _Launcher(encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, blank)
    losses = encoded.new_empty(joint.batch, dtype=torch.float32)
    lattice = encoded.new_empty(joint.batch, 5, joint.frames, joint.rows, dtype=torch.float32)
    if not joint.batch:
        return losses, lattice
    block = next_power_of_2(joint.rows)
    with launching(encoded):
        for utterances, frames in _blocks(joint.batch, joint.frames, joint.rows, joint.width):
            joint.edges(utterances, frames, lattice)
        _lattice_kernel[(joint.batch, 2)](
            lattice,
            losses,
            *joint.lengths,
            joint.frames,
            joint.rows,
            block,
            num_warps=lattice_warps(block),
        )
    return losses, lattice


def _launch_backward(
    grad: Tensor,
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    losses: Tensor,
    lattice: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    joint = _Launcher(encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, blank)
    gradients = _Gradients.zeros(encoded, predicted, weight)
    width = max(joint.width, joint.vocabulary)
    with launching(encoded):
        for utterances, frames in _blocks(joint.batch, joint.frames, joint.rows, width):
            # Not named, so that a block is freed before the next.
            gradients.add(
                utterances,
                frames,
                slice(joint.rows),
                *joint.logit_gradients(utterances, frames, lattice, losses, grad.contiguous()),
                joint.weight,
            )
    return gradients.narrow(predicted, weight, weight if bias is None else bias)


# --- operators --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gq_triton::joint_rnnt_loss", mutates_args=(), device_types="cpu")
def _loss(
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) and the lattice (B, 5, T, U + 1) that the backward pass needs, both float32 (float64)."""
    return _forward_cpu(encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, blank)


_loss.register_kernel("cuda")(_launch_forward)


@_loss.register_fake
def _(encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, blank):
    wide = _wide(encoded.dtype)
    batch, frames, _ = encoded.shape
    return encoded.new_empty(batch, dtype=wide), encoded.new_empty(batch, 5, frames, predicted.shape[1], dtype=wide)


@torch.library.custom_op("gq_triton::joint_rnnt_loss_backward", mutates_args=(), device_types="cpu")
def _loss_backward(
    grad: Tensor,
    encoded: Tensor,
    predicted: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    losses: Tensor,
    lattice: Tensor,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of encoded, predicted, weight and bias (also where there is none), each in its dtype."""
    return _backward_cpu(grad, encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, lattice, blank)


_loss_backward.register_kernel("cuda")(_launch_backward)


@_loss_backward.register_fake
def _(grad, encoded, predicted, weight, bias, targets, logit_lengths, target_lengths, losses, lattice, blank):
    dbias = weight.new_empty(len(weight)) if bias is None else bias.new_empty(bias.shape)
    return encoded.new_empty(encoded.shape), predicted.new_empty(predicted.shape), weight.new_empty(weight.shape), dbias


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.blank = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, _):
    gradients = _loss_backward(grad, *ctx.saved_tensors, ctx.blank)
    return *gradients[:3], gradients[3] if ctx.needs_input_grad[3] else None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup_context)
