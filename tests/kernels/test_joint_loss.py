"""The transducer loss of projections against the plain loss of all logits, in float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gq_triton.kernels import joint_loss
from gq_triton.kernels.joint_loss import joint_rnnt_loss, reference

# Of the largest loss or gradient: h and dl are rounded to the inputs' dtype.  Besides, gradients are exponentials of
# sums of as many nats as the loss has, in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}
PER_NAT = 2e-7
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in")  # the interpreter computes what kernels mask
SHAPES = [(1, 1, 0, 2, 1), (3, 5, 4, 11, 7), (2, 3, 0, 5, 3), (2, 11, 18, 131, 70)]  # B, T, U, V, J
LONG = [(1, 1, 3, 2, 4), (4, 20, 40, 300, 130), (1, 70, 3, 257, 65), (2, 4, 130, 9, 6)]
CASES = [pytest.param(*case) for case in SHAPES] + [pytest.param(*case, marks=pytest.mark.full) for case in LONG]


class Case(NamedTuple):
    encoded: Tensor
    predicted: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    blank: int

    @property
    def leaves(self) -> list[Tensor]:
        return [tensor for tensor in self[:4] if tensor is not None]

    def on(self, device) -> "Case":
        return Case(*(value.to(device) if torch.is_tensor(value) else value for value in self))


def random_case(batch, frames, labels, vocabulary, width, *, dtype=torch.float32, blank=0, bias=True, seed=0) -> Case:
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(dtype)  # noqa: E731
    targets = torch.randint(0, vocabulary - 1, (batch, labels), generator=draw)
    targets += targets >= blank
    logit_lengths = torch.randint(1, frames + 1, (batch,), generator=draw)
    target_lengths = torch.randint(0, labels + 1, (batch,), generator=draw)
    if batch:
        logit_lengths[0], target_lengths[0] = frames, labels
    weight = (3 * torch.randn(vocabulary, width, generator=draw) / width**0.5).to(dtype)
    tensors = normal(batch, frames, width), normal(batch, labels + 1, width), weight, normal(vocabulary)
    return Case(*tensors[:3], tensors[3] if bias else None, targets, logit_lengths, target_lengths, blank)


def computed_on_cpu(case, grad):
    losses, lattice = joint_loss._forward_cpu(*case)
    return losses, *joint_loss._backward_cpu(grad, *case[:-1], lattice, case.blank)


def launched(case, grad):
    losses, lattice = joint_loss._launch_forward(*case)
    return losses, *joint_loss._launch_backward(grad, *case[:-1], losses, lattice, case.blank)


@pytest.fixture(params=["cpu", "triton"])
def implementation(request):
    """(device, function): case and gradient of the losses -> losses and the gradients of the four inputs."""
    if request.param == "cpu":
        return torch.device("cpu"), computed_on_cpu
    return request.getfixturevalue("kernel_device"), launched


def expectation(case, grad):
    """What an implementation should return, in float64 on the CPU; without a bias, no last gradient."""
    case, grad = case.on("cpu"), grad.cpu()
    leaves = [leaf.double().requires_grad_() for leaf in case.leaves]
    arguments = leaves if case.bias is not None else [*leaves, None]
    losses = reference(*arguments, *case[4:7], blank=case.blank, reduction="none")
    return losses.detach(), *torch.autograd.grad(losses, leaves, grad.double())


def check(implementation, case, tolerance):
    device, function = implementation
    case = case.on(device)
    grad = torch.linspace(0.5, 2.0, len(case.encoded), dtype=torch.float32, device=device)
    found, expected = function(case, grad), expectation(case, grad)
    tolerance += PER_NAT * expected[0].max()
    for actual, ideal, like in zip(found, expected, [None, *case.leaves], strict=False):
        assert actual.dtype == (torch.float32 if like is None else like.dtype)
        assert ((actual.double().cpu() - ideal).abs() <= tolerance * (1e-3 + ideal.abs().max())).all()
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "frames", "labels", "vocabulary", "width"), CASES)
def test_matches_the_reference(implementation, dtype, batch, frames, labels, vocabulary, width):
    case = random_case(batch, frames, labels, vocabulary, width, dtype=dtype)
    check(implementation, case, TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("changes", [dict(bias=False), dict(blank=10)])
def test_without_bias_and_with_another_blank(implementation, changes):
    check(implementation, random_case(2, 5, 4, 11, 7, **changes), TOLERANCE[torch.float32])


def test_bias_may_have_its_own_dtype(implementation):
    case = random_case(2, 3, 2, 5, 4, dtype=torch.float16)
    check(implementation, case._replace(bias=case.bias.float()), TOLERANCE[torch.float16])


def test_any_stride(implementation):
    case = random_case(2, 5, 4, 11, 7)
    turned = [tensor.mT.contiguous().mT for tensor in case[:3]]
    spaced = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in case[3:7]]
    check(implementation, Case(*turned, *spaced, 0), TOLERANCE[torch.float32])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    frames=st.integers(1, 6),
    labels=st.integers(0, 5),
    vocabulary=st.integers(2, 9),
    width=st.integers(1, 6),
)
def test_public_function_equals_the_reference(seed, batch, frames, labels, vocabulary, width):
    case = random_case(batch, frames, labels, vocabulary, width, dtype=torch.float64, seed=seed)
    results = []
    for function in (joint_rnnt_loss, reference):
        leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
        losses = function(*leaves, *case[4:7], reduction="none")
        results.append([losses.detach(), *torch.autograd.grad(losses.square().sum(), leaves)])
    for actual, ideal in zip(*results, strict=True):
        torch.testing.assert_close(actual, ideal, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    *leaves, targets, logit_lengths, target_lengths, _ = random_case(2, 4, 3, 5, 3, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    labels = targets, logit_lengths, target_lengths
    assert torch.autograd.gradcheck(lambda *x: joint_rnnt_loss(*x, *labels, reduction="none"), leaves)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("padding", [1e30, torch.nan])
def test_padding_has_no_influence_and_no_gradient(implementation, padding):
    device, function = implementation
    case = random_case(3, 11, 18, 20, 7, seed=1)
    changed = case._replace(
        encoded=case.encoded.clone(), predicted=case.predicted.clone(), targets=case.targets.clone()
    )
    for b in range(3):
        changed.encoded[b, case.logit_lengths[b] :] = padding
        changed.predicted[b, case.target_lengths[b] + 1 :] = padding
        changed.targets[b, case.target_lengths[b] :] = 3
    grad = torch.ones(3, device=device)
    found = function(changed.on(device), grad)
    for actual, ideal in zip(found, function(case.on(device), grad), strict=True):
        assert torch.equal(actual, ideal)
    for b in range(3):
        assert not found[1][b, case.logit_lengths[b] :].any()
        assert not found[2][b, case.target_lengths[b] + 1 :].any()


def test_repeats_bit_for_bit(implementation):
    device, function = implementation
    case, grad = random_case(2, 9, 5, 40, 20).on(device), torch.ones(2, device=device)
    first, second = function(case, grad), function(case, grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("chunk", [1, 700, 1500])  # single frames; frames of an utterance; whole utterances
def test_blocks_do_not_change_the_result(implementation, monkeypatch, chunk):
    monkeypatch.setattr(joint_loss, "CHUNK", chunk)
    monkeypatch.setattr(joint_loss, "CPU_CHUNK", chunk)
    check(implementation, random_case(5, 6, 4, 24, 7), TOLERANCE[torch.float32])


class Largest(TorchDispatchMode):
    """Watches how many bytes the tensors have that operations return."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *[leaf.nbytes for leaf in tree_leaves(result) if torch.is_tensor(leaf)]])
        return result


def test_no_tensor_is_as_large_as_all_logits(implementation, monkeypatch):
    device, function = implementation
    monkeypatch.setattr(joint_loss, "CHUNK", 1500)
    monkeypatch.setattr(joint_loss, "CPU_CHUNK", 1500)
    case = random_case(4, 12, 9, 60, 5)
    with Largest() as plain:
        reference(*case[:7])
    with Largest() as watched:
        function(case.on(device), torch.ones(4, device=device))
    assert plain.nbytes == 4 * (4 * 12 * 10 * 60)
    assert watched.nbytes <= 4 * (4 * 5 * 12 * 10)  # the lattice


def test_not_a_number_is_not_hidden(implementation):
    device, function = implementation
    case = random_case(2, 4, 2, 5, 3)
    case.encoded[0, 1, 0] = torch.nan
    losses, encoded, predicted, weight, _ = function(case.on(device), torch.ones(2, device=device))
    assert losses[0].isnan() and losses[1].isfinite()
    assert encoded[0].isnan().any() and encoded[1].isfinite().all()
    assert predicted[0].isnan().any() and predicted[1].isfinite().all() and weight.isnan().any()


def test_extreme_logits_stay_finite(implementation):
    device, function = implementation
    case = random_case(2, 6, 3, 5, 4)
    results = function(case._replace(weight=case.weight * 1000).on(device), torch.ones(2, device=device))
    assert all(result.isfinite().all() for result in results)


def test_labels_that_the_bias_excludes(implementation):
    device, function = implementation
    case = random_case(2, 4, 3, 200, 4, blank=199)._replace(targets=torch.full((2, 3), 150))
    case.bias[:140] = -torch.inf  # the whole first block of labels
    results = function(case.on(device), torch.ones(2, device=device))
    for actual, ideal in zip(results, expectation(case, torch.ones(2)), strict=True):
        torch.testing.assert_close(actual.double().cpu(), ideal, rtol=1e-4, atol=1e-5)


def test_empty_batch(implementation):
    device, function = implementation
    case = random_case(0, 4, 3, 5, 4).on(device)
    losses, *gradients = function(case, torch.ones(0, device=device))
    assert losses.shape == (0,)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in case.leaves]
    assert not gradients[2].any() and not gradients[3].any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("vocabulary", "width"), [(5, 3), (16, 3), (5, 32), (32, 16)])
def test_alignment_changes_nothing(implementation, vocabulary, width, bias):
    device, function = implementation
    case = random_case(2, 4, 3, vocabulary, width, bias=bias).on(device)
    grad = torch.tensor([0.5, 2.0], device=device)
    leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
    aligned = joint_loss._aligned(*leaves, *([] if bias else [None]))
    assert all(size % 16 == 0 for size in aligned[2].shape)
    losses, *found = function(Case(*(x if x is None else x.detach() for x in aligned), *case[4:]), grad)
    expected, *ideals = expectation(case, grad)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    padded = [(tensor, gradient) for tensor, gradient in zip(aligned, found, strict=True) if tensor is not None]
    tensors, gradients = zip(*[pair for pair in padded if pair[0].requires_grad], strict=True)
    for actual, ideal in zip(torch.autograd.grad(tensors, leaves, gradients), ideals, strict=True):
        torch.testing.assert_close(actual.double().cpu(), ideal, rtol=1e-4, atol=1e-5)


def test_reductions_and_mixed_dtypes(device):
    case = random_case(3, 5, 2, 6, 4, dtype=torch.bfloat16).on(device)
    arguments = [*case[:2], case.weight.float().requires_grad_(), case.bias.float(), *case[4:7]]
    each = joint_rnnt_loss(*arguments, reduction="none")
    assert each.dtype == torch.float32
    torch.testing.assert_close(joint_rnnt_loss(*arguments, reduction="sum"), each.sum())
    mean = joint_rnnt_loss(*arguments)
    torch.testing.assert_close(mean, each.mean())
    mean.backward()
    assert arguments[2].grad.dtype == torch.float32


def test_operator_registration(device):
    case = random_case(2, 4, 3, 6, 5).on(device)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    torch.library.opcheck(joint_loss._loss, tuple(case))
    torch.library.opcheck(joint_loss._loss, (*leaves[:3], None, *case[4:]))
    losses, lattice = joint_loss._loss(*(x.detach() if torch.is_tensor(x) else x for x in case))
    detached = [leaf.detach() for leaf in leaves]
    arguments = torch.ones_like(losses), *detached, *case[4:7], losses, lattice, case.blank
    torch.library.opcheck(joint_loss._loss_backward, arguments)


def test_compiles_whole(device):
    case = random_case(2, 4, 3, 6, 5).on(device)
    compiled = torch.compile(joint_rnnt_loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, joint_rnnt_loss):
        leaves = [leaf.clone().requires_grad_() for leaf in case.leaves]
        results.append(torch.autograd.grad(function(*leaves, *case[4:7], reduction="sum"), leaves))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_does_not_wait_for_the_gpu():
    case = random_case(3, 20, 9, 50, 16).on("cuda")
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    joint_rnnt_loss(*leaves, *case[4:7]).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        joint_rnnt_loss(*leaves, *case[4:7]).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoded=torch.zeros(2, 3)), r"encoded is torch.float32 \(2, 3\)"),
        (dict(encoded=torch.zeros(2, 0, 4)), "T and J above 0"),
        (dict(encoded=torch.zeros(2, 3, 4, dtype=torch.long)), "encoded is torch.int64"),
        (dict(predicted=torch.zeros(2, 3, 5)), r"predicted is \(2, 3, 5\); \(2, U \+ 1, 4\)"),
        (dict(predicted=torch.zeros(2, 0, 4)), r"predicted is \(2, 0, 4\)"),
        (dict(predicted=torch.zeros(2, 3, 4).half()), "predicted is torch.float16; encoded is torch.float32"),
        (dict(weight=torch.zeros(5, 3)), r"weight is torch.float32 \(5, 3\)"),
        (dict(bias=torch.zeros(4)), r"bias is torch.float32 \(4,\)"),
        (dict(reduction="median"), "reduction is 'median'"),
        (dict(blank=5), r"blank is 5; allowed: 0\.\.4"),
        (dict(targets=torch.ones(2, 3, dtype=torch.long)), r"targets is \(2, 3\)"),
        (dict(targets=torch.full((2, 2), 5)), "targets holds values in 5..5"),
        (dict(logit_lengths=torch.tensor([0, 3])), "logit_lengths holds values in 0..3"),
        (dict(target_lengths=torch.tensor([1, 3])), "target_lengths holds values in 1..3"),
        (dict(target_lengths=torch.tensor([1])), r"target_lengths is torch.int64 \(1,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(
        encoded=torch.zeros(2, 3, 4),
        predicted=torch.zeros(2, 3, 4),
        weight=torch.zeros(5, 4),
        bias=torch.zeros(5),
        targets=torch.ones(2, 2, dtype=torch.long),
        logit_lengths=torch.tensor([3, 2]),
        target_lengths=torch.tensor([2, 1]),
    )
    with pytest.raises(ValueError, match=message):
        joint_rnnt_loss(**(arguments | change))
