"""The transducer loss against enumeration of all alignments, finite differences, and torchaudio's."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gq_triton.kernels.rnnt_loss import rnnt_loss


def enumerated_loss(log_probs, labels, blank):
    """-log of the summed probability of every order of T blanks (the last one fixed) and U labels."""
    frames, count = log_probs.shape[0], len(labels)
    paths = []
    for label_steps in itertools.combinations(range(frames - 1 + count), count):
        t = u = 0
        score = 0.0
        for step in range(frames - 1 + count):
            if step in label_steps:
                score += log_probs[t, u, labels[u]].item()
                u += 1
            else:
                score += log_probs[t, u, blank].item()
                t += 1
        paths.append(score + log_probs[t, u, blank].item())
    largest = max(paths)
    return -(largest + math.log(sum(math.exp(path - largest) for path in paths)))


def random_case(seed, batch, frames, labels, vocabulary, blank=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, frames, labels + 1, vocabulary, generator=draw, dtype=dtype)
    targets = torch.randint(0, vocabulary - 1, (batch, labels), generator=draw)
    targets += targets >= blank
    logit_lengths = torch.randint(1, frames + 1, (batch,), generator=draw)
    target_lengths = torch.randint(0, labels + 1, (batch,), generator=draw)
    return logits, targets, logit_lengths, target_lengths


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    frames=st.integers(1, 5),
    labels=st.integers(0, 4),
    vocabulary=st.integers(2, 5),
    last_is_blank=st.booleans(),
)
def test_equals_the_sum_over_all_alignments(seed, batch, frames, labels, vocabulary, last_is_blank):
    blank = vocabulary - 1 if last_is_blank else 0
    logits, targets, logit_lengths, target_lengths = random_case(seed, batch, frames, labels, vocabulary, blank)
    losses = rnnt_loss(logits, targets, logit_lengths, target_lengths, blank=blank, reduction="none")
    for b in range(batch):
        log_probs = logits[b, : logit_lengths[b]].log_softmax(-1)
        expected = enumerated_loss(log_probs, targets[b, : target_lengths[b]].tolist(), blank)
        assert losses[b].item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("blank", [0, 3])
def test_gradcheck(blank):
    logits, targets, logit_lengths, target_lengths = random_case(1, 3, 4, 3, 4, blank)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: rnnt_loss(x, targets, logit_lengths, target_lengths, blank=blank, reduction="none"), logits
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_narrow_dtypes_agree_with_float64(dtype, tolerance):
    logits, targets, logit_lengths, target_lengths = random_case(2, 4, 30, 9, 20)
    narrow = logits.to(dtype).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    loss = rnnt_loss(narrow, targets, logit_lengths, target_lengths)
    expected = rnnt_loss(wide, targets, logit_lengths, target_lengths)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32 and narrow.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


def test_padding_has_no_influence_and_no_gradient():
    logits, targets, logit_lengths, target_lengths = random_case(3, 3, 6, 4, 5)
    changed, other_targets = logits.clone(), targets.clone()
    for b in range(3):
        changed[b, logit_lengths[b] :] = 50.0
        changed[b, :, target_lengths[b] + 1 :] = -50.0
        other_targets[b, target_lengths[b] :] = 1
    changed.requires_grad_()
    loss = rnnt_loss(changed, other_targets, logit_lengths, target_lengths, reduction="none")
    torch.testing.assert_close(loss, rnnt_loss(logits, targets, logit_lengths, target_lengths, reduction="none"))
    loss.sum().backward()
    for b in range(3):
        assert not changed.grad[b, logit_lengths[b] :].any()
        assert not changed.grad[b, :, target_lengths[b] + 1 :].any()


def test_reductions():
    case = random_case(4, 3, 5, 2, 4)
    each = rnnt_loss(*case, reduction="none")
    torch.testing.assert_close(rnnt_loss(*case, reduction="sum"), each.sum())
    torch.testing.assert_close(rnnt_loss(*case), each.mean())


def test_extreme_logits_stay_finite():
    logits, targets, logit_lengths, target_lengths = random_case(5, 2, 8, 3, 6, dtype=torch.float32)
    logits = (logits * 1000).requires_grad_()
    loss = rnnt_loss(logits, targets, logit_lengths, target_lengths)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_nan_is_not_hidden():
    logits, targets, logit_lengths, target_lengths = random_case(6, 2, 4, 2, 3)
    logits[0, 0, 0, 0] = torch.nan
    losses = rnnt_loss(logits, targets, logit_lengths, target_lengths, reduction="none")
    assert losses[0].isnan() and losses[1].isfinite()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reduction="median"), "reduction is 'median'"),
        (dict(blank=4), "blank is 4"),
        (dict(targets=torch.ones(2, 3, dtype=torch.long)), r"targets is \(2, 3\)"),
        (dict(targets=torch.full((2, 2), 4)), "targets holds values in 4..4"),
        (dict(logit_lengths=torch.tensor([0, 3])), "logit_lengths holds values in 0..3"),
        (dict(logit_lengths=torch.tensor([1.0, 2.0])), "logit_lengths is torch.float32"),
        (dict(target_lengths=torch.tensor([1, 3])), "target_lengths holds values in 1..3"),
        (dict(target_lengths=torch.tensor([1])), r"target_lengths is torch.int64 \(1,\)"),
        (dict(logits=torch.zeros(2, 3, 3)), r"logits is torch.float32 \(2, 3, 3\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(
        logits=torch.zeros(2, 3, 3, 4),
        targets=torch.ones(2, 2, dtype=torch.long),
        logit_lengths=torch.tensor([3, 2]),
        target_lengths=torch.tensor([2, 1]),
    )
    with pytest.raises(ValueError, match=message):
        rnnt_loss(**(arguments | change))


def test_equals_torchaudio():
    try:
        from torchaudio.functional import rnnt_loss as theirs
    except (ImportError, OSError) as error:
        pytest.skip(f"torchaudio does not import here: {error}")
    logits, targets, logit_lengths, target_lengths = random_case(7, 4, 12, 5, 9, dtype=torch.float32)
    logit_lengths[0], target_lengths[0] = 12, 5
    expected = theirs(logits, targets.int(), logit_lengths.int(), target_lengths.int(), blank=0, reduction="none")
    torch.testing.assert_close(
        rnnt_loss(logits, targets, logit_lengths, target_lengths, reduction="none"), expected, rtol=1e-4, atol=1e-4
    )
