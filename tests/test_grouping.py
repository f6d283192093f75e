"""Every case compares with the same quantizers called one by one: values bit for bit, and all gradients."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from quantized import Operations, convert, ungrouped
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import gq_triton as gq
from gq_triton import grouping


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Stack(nn.Module):
    """Blocks behind a linear layer; ``run`` is how a block is called."""

    def __init__(self, run=lambda block, x: block(x), blocks=3):
        super().__init__()
        self.run = run
        self.inlet = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.outlet = nn.Linear(6, 4)

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            x = self.run(block, x)
        return self.outlet(x)


class Zoo(nn.Module):
    """Every kind of layer, and an output layer tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 4, 2, bidirectional=True, proj_size=3)
        self.gru = nn.GRU(6, 6)
        self.conv2 = nn.Conv2d(1, 1, 3, padding=1)
        self.output = nn.Linear(6, 9, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        x = self.gru(self.lstm(x)[0])[0]
        return self.output(self.conv2(x[:, None])[:, 0])


X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
INDEX = torch.arange(8).view(2, 4)


def prepared(model, **options):
    gq.quantize_(model, gq.GQConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model, reference):
    """Up to the order of summation: a shared weight's gradients are added before its quantizer or after."""
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        size = 0.0 if expected[name] is None else float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-4, atol=1e-6 + 1e-5 * size, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(model, x=X, steps=2, forward=lambda model, x: model(x)):
    """Some optimizer steps, together with those of the ungrouped copy; returns the counts of the last."""
    reference = ungrouped(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, reference)]
    for _ in range(steps):
        with Operations() as operations:
            output = forward(model, x)
            output.square().sum().backward()
        expected = forward(reference, x)
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        assert_same_gradients(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not grouping._thread.scopes
    return operations.counts


def launches(counts):
    return counts["fake_quantize"], counts["fake_quantize_backward"]


# --- one operation for many weights


def test_a_model_is_quantized_in_one_operation():
    assert launches(assert_same(prepared(Stack()))) == (1, 1)
    assert launches(assert_same(ungrouped(prepared(Stack())))) == (8, 8)


def test_operations_do_not_grow_with_the_number_of_layers():
    def quantization(blocks):
        counts = []
        for model in (prepared(Stack(blocks=blocks)), Stack(blocks=blocks)):
            with Operations() as operations:
                model(X).sum().backward()
            counts.append(operations.counts.total())
        return counts[0] - counts[1]

    assert quantization(2) == quantization(12) < 60


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forward": "soft", "bits": 3},
        {"granularity": "tensor", "learn_mu": True, "bits": 2},
        {"learn_centroids": False, "codebook": "int8", "straight_through": 0.0},
    ],
)
def test_all_kinds_of_layers(options, device):
    model = prepared(Zoo().to(device), **options)
    assert launches(assert_same(model, INDEX.to(device))) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    x = X.to(dtype)
    assert launches(assert_same(prepared(Stack().to(dtype)), x, steps=1)) == (1, 1)


def test_what_differs_is_not_grouped_together():
    model = Stack()
    gq.quantize_(model, {"inlet": gq.GQConfig(bits=2), "blocks.0*": gq.GQConfig(bits=3), "*": gq.GQConfig()})
    model.blocks[1].double().requires_grad_(False)
    model.blocks[2].eval()
    model.run = lambda block, x: block(x.to(block.first.weight.dtype)).float()
    # inlet | blocks.0 | blocks.1, frozen and float64 | blocks.2, in eval | outlet
    assert launches(assert_same(model))[0] == 5


def test_a_group_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 72)
    # weights of 30, 36, 36, 36, 36, 36, 36 and 24 numbers
    assert launches(assert_same(prepared(Stack()))) == (4, 4)
    monkeypatch.setattr(grouping, "GROUP_BYTES", 1)
    assert launches(assert_same(prepared(Stack()))) == (8, 8)


# --- autograd


def test_gradients_of_a_group_arrive_before_earlier_layers_run_backward(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 72)  # a block
    model = prepared(nn.Sequential(Block(), Block(), Block()))
    order = []
    for index, block in enumerate(model):
        for layer in (block.first, block.second):
            layer.register_full_backward_hook(lambda *_, index=index: order.append(f"layer of {index}"))
            for parameter in (layer.weight, *layer.weight_quantizer.parameters()):
                parameter.register_post_accumulate_grad_hook(
                    lambda _, index=index: order.append(f"gradient of {index}")
                )
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    blocks = [int(event[-1]) for event in order]
    assert blocks == sorted(blocks, reverse=True)
    assert order.count("gradient of 2") == 6


def test_gradient_accumulation():
    model = prepared(Stack())
    reference = ungrouped(model)
    for micro_batch in torch.randn(3, 2, 5):
        for each in (model, reference):
            each(micro_batch).square().sum().backward()
    assert_same_gradients(model, reference)
    losses = [sum(each(x).square().sum() for x in torch.randn(2, 2, 5).fill_(0.5)) for each in (model, reference)]
    for loss in losses:
        loss.backward()
    assert_same_gradients(model, reference)


class TwoSteps(nn.Module):
    """Runs backward between its forward passes, and maybe updates something, all within one call."""

    def __init__(self, update):
        super().__init__()
        self.inner, self.update = Stack(), update

    def forward(self, x):
        self.inner(x).square().sum().backward()
        self.update(self.inner)
        return self.inner(x)


def change(name):
    def update(model):
        with torch.no_grad():
            state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            state[name].mul_(1.5)

    return update


@pytest.mark.parametrize(
    "update",
    [
        lambda model: None,
        change("blocks.1.first.weight"),
        change("blocks.1.first.weight_quantizer.log_scale"),
        change("blocks.1.first.weight_quantizer.centroid_logits"),
        change("blocks.1.first.weight_quantizer.hardness"),
        lambda model: model.blocks[1].eval(),
        lambda model: setattr(model.outlet, "weight", nn.Parameter(model.outlet._parameters["weight"].detach() * 2)),
    ],
)
def test_backward_and_updates_within_a_call(update):
    assert_same(prepared(TwoSteps(update), forward="soft"), steps=1)


@pytest.mark.parametrize("update", [change("first.weight"), change("first.weight_quantizer.log_scale")])
def test_updates_without_backward_within_a_call(update):
    class Updating(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            before = self.block(x).detach()
            update(self.block)
            return self.block(x) + before

    model, x = prepared(Updating()), torch.randn(2, 6)
    assert_same(copy.deepcopy(model), x, steps=1)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), ungrouped(model)(x))


def test_a_second_order_gradient_builds_on_the_retained_graph():
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack()

        def forward(self, x):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.stack(x).sum(), x, create_graph=True)
            return self.stack(x).sum() + slope.square().sum()

    assert_same(prepared(Penalty()), steps=1)


def test_no_grad_and_inference_mode_within_a_call():
    class Teacher(nn.Module):
        def __init__(self, context):
            super().__init__()
            self.stack, self.context = Stack(), context

        def forward(self, x):
            with self.context():
                target = self.stack(x)
            return self.stack(x) - target.clone()

    for context in (torch.no_grad, torch.inference_mode):
        counts = assert_same(prepared(Teacher(context)))
        assert launches(counts) == (2, 1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation(context):
    model = prepared(Stack()).eval()
    reference = ungrouped(model)
    with context(), Operations() as operations:
        assert torch.equal(model(X), reference(X))
    assert launches(operations.counts) == (1 + 8, 0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_buffers_made_in_inference_mode(context):
    model = prepared(Stack()).eval()
    with torch.inference_mode():
        for block in model.blocks:
            block.first.weight_quantizer.hardness = torch.tensor(3.0)
    with context():
        assert torch.equal(model(X), ungrouped(model)(X))


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = prepared(Stack()).eval()
        assert torch.equal(model(X), ungrouped(model)(X))


# --- changes within a call


class Changing(nn.Module):
    """Changes its stack after the first block ran, and undoes that after the call."""

    def __init__(self, change, undo):
        super().__init__()
        self.stack, self.change, self.undo = Stack(), change, undo

    def forward(self, x):
        x = self.stack.blocks[0](self.stack.inlet(x))
        self.change(self.stack)
        x = self.stack.blocks[2](self.stack.blocks[1](x))
        x = self.stack.outlet(x.to(self.stack.outlet.bias.dtype))
        self.undo(self.stack)
        return x


def setting(path, name, change):
    """A change and its undoing: replaces attribute ``name`` at ``path`` by ``change`` of it."""
    original = []

    def do(stack):
        part = stack.get_submodule(path)
        original.append(getattr(part, name))
        setattr(part, name, change(original[-1]))

    return do, lambda stack: setattr(stack.get_submodule(path), name, original.pop())


@pytest.mark.parametrize("size", [4 * 72, grouping.GROUP_BYTES])  # whether the change comes before the group's turn
@pytest.mark.parametrize(
    "path, name, change",
    [
        ("blocks.2.second.weight_quantizer", "hardness", lambda _: torch.tensor(20.0)),
        ("blocks.2.second.weight_quantizer", "training", lambda _: False),
        ("blocks.2.first.weight_quantizer", "training", lambda _: False),
        ("blocks.2.second.weight_quantizer", "learn_tables", lambda _: False),
    ],
)
def test_quantizers_changed_within_a_call(path, name, change, size, monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", size)
    assert_same(prepared(Changing(*setting(path, name, change)), forward="soft"), steps=1)


def test_parameters_replaced_within_a_call():
    do, undo = setting("blocks.2.second.weight_quantizer", "log_scale", lambda old: new)
    model = prepared(Changing(do, undo))
    old = model.stack.blocks[2].second.weight_quantizer.log_scale
    new = nn.Parameter(old.detach() + 0.5)
    torch._C._autograd._unsafe_set_version_counter((new,), (old._version,))
    with torch.no_grad():
        torch.testing.assert_close(model(X), ungrouped(model)(X))


@pytest.mark.parametrize("size", [4 * 72, grouping.GROUP_BYTES])
@pytest.mark.parametrize("name, at_first", [("weight", False), ("weight", True), ("weight_quantizer", False)])
def test_requires_grad_toggled_within_a_call(size, name, at_first, monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", size)

    def toggle(learned):
        return lambda stack: members(stack.blocks[2].second)[name].requires_grad_(learned)

    def members(layer):
        return {**dict(layer.named_parameters()), **dict(layer.named_children())}

    model = Changing(toggle(not at_first), toggle(at_first))
    toggle(at_first)(prepared(model).stack)
    assert_same(model, steps=1)


def test_a_dtype_changed_within_a_call(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 72)
    model = prepared(Changing(lambda stack: stack.outlet.double(), lambda stack: stack.outlet.float()))
    with torch.no_grad():
        torch.testing.assert_close(model(X), ungrouped(model)(X))


def test_frozen_layers_need_no_gradient_for_the_sake_of_others():
    model = prepared(Stack())
    model.inlet.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model.blocks[1].first.weight.requires_grad_(False)  # its quantizer learns
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, output: seen.append(output.requires_grad))
    model(X)
    assert seen == [False]
    assert_same(model.blocks[1], torch.randn(2, 6))


@pytest.mark.parametrize("compute", [nn.utils.parametrizations.spectral_norm, None])
def test_weights_that_are_computed_after_preparing(compute):
    model = prepared(Stack())
    reference = ungrouped(model)
    for each in (model, reference):
        layer = each.blocks[1].first
        torch.manual_seed(0)
        compute(layer) if compute else prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(3):
        outputs = [each(X) for each in (model, reference)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        assert_same_gradients(model, reference)


def test_hooks_that_change_the_weight_before_each_call():
    def shrink(layer, args):
        with torch.no_grad():
            layer.weight.mul_(0.9)

    model = prepared(Stack())
    reference = ungrouped(model)
    for each in (model, reference):
        for block in each.blocks:
            block.second.register_forward_pre_hook(shrink)
        each(X).square().sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda stack, x: torch.func.grad(lambda x: stack(x).square().sum())(x),
        lambda stack, x: torch.func.jvp(stack, (x,), (torch.ones_like(x),))[1],
        lambda stack, x: torch.func.vmap(torch.func.jacrev(stack))(x),
        lambda stack, x: torch.func.vmap(stack)(x),
    ],
)
def test_function_transforms_within_a_call(transformed):
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Stack()

        def forward(self, x):
            return transformed(self.stack, x).square().sum() + self.stack(x)

    assert_same(prepared(Penalty()), steps=1)


def test_each_cuda_stream_quantizes_for_itself(monkeypatch):
    stream = [0]
    monkeypatch.setattr(grouping, "_stream", lambda tensor: stream[0])
    change = lambda stack: stream.append(stream.pop() + 1)  # noqa: E731
    assert launches(assert_same(prepared(Changing(change, change)), steps=1))[0] == 1 + 5


# --- activation checkpointing


def in_region(**options):
    return lambda block, x: checkpoint(block, x, **options)


def by_layer(block, x):
    x = checkpoint(block.first, x, use_reentrant=False)
    return checkpoint(block.second, x, use_reentrant=True)


def nested(block, x):
    def region(x):
        return checkpoint(block, block.first(x), use_reentrant=False) + block.second(x)

    return checkpoint(region, x, use_reentrant=False)


def nested_kinds(block, x):
    return checkpoint(lambda x: checkpoint(block, x, use_reentrant=False), x, use_reentrant=True)


@pytest.mark.parametrize(
    "run",
    [
        in_region(use_reentrant=False),
        in_region(use_reentrant=True),
        in_region(use_reentrant=False, early_stop=False),
        by_layer,
        nested,
        nested_kinds,
    ],
)
@pytest.mark.parametrize("bits", [1, 4])
def test_checkpointing(run, bits):
    assert_same(prepared(Stack(run), bits=bits))


def test_checkpointed_blocks_are_groups_in_forward_and_recomputation(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 30)  # inlet and outlet do not draw blocks into their groups
    model = prepared(Stack(in_region(use_reentrant=False)))
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 72)
    counts = assert_same(model)
    # inlet with a block's weight, outlet with one; three blocks in forward, again in the recomputation
    assert launches(counts) == (2 + 3 + 3, 2 + 3)


def test_a_checkpointed_model_and_checkpointing_in_sequence():
    assert launches(
        assert_same(prepared(Stack()), forward=lambda model, x: checkpoint(model, x, use_reentrant=False))
    ) == (2, 1)
    model = prepared(nn.Sequential(*(Block() for _ in range(4))))
    sequential = torch.utils.checkpoint.checkpoint_sequential
    x = torch.randn(2, 6, requires_grad=True)
    for reentrant in (False, True):
        assert_same(model, x, forward=lambda model, x, r=reentrant: sequential(model, 2, x, use_reentrant=r))


def test_saved_tensors_on_the_cpu():
    def offloaded(block, x):
        with torch.autograd.graph.save_on_cpu():
            return block(x)

    assert_same(prepared(Stack(offloaded)))


def test_selective_checkpointing():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, op, *args, **kwargs):
        saved = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    assert_same(prepared(Stack(in_region(use_reentrant=False, context_fn=contexts))))


# --- sharing, parts


def test_shared_layers_and_shared_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.blocks[1].first = self.blocks[0].first
            self.blocks[1].second.weight = self.blocks[0].second.weight

        def forward(self, x):
            for block in (*self.blocks, *self.blocks):
                x = block(x)
            return x

    assert launches(assert_same(prepared(Shared()), torch.randn(2, 6))) == (1, 1)


def test_a_weight_that_was_untied_is_quantized_as_it_is():
    model = prepared(Zoo())
    model.output.weight = nn.Parameter(1.5 * model.output.weight.detach())
    assert model.output.weight_quantizer is model.embedding.weight_quantizer
    assert_same(model, INDEX)


def test_a_weight_that_is_used_twice_is_quantized_once():
    model = prepared(Stack())
    assert launches(assert_same(model, forward=lambda model, x: model(x) + model(x + 1))) == (2, 2)
    twice = prepared(nn.Sequential(Block(), Block()))
    twice.append(twice[0])
    assert launches(assert_same(twice, torch.randn(2, 6))) == (1, 1)


def test_parts_called_alone():
    model = prepared(Stack())
    x = torch.randn(2, 6)
    assert launches(assert_same(model.blocks[1], x)) == (1, 1)
    assert launches(assert_same(model.blocks[1].first, x)) == (1, 1)
    assert launches(assert_same(model)) == (1, 1)
    with torch.no_grad():
        model.blocks[1].first.weight.mul_(2)
    assert_same(model.blocks[1], x)


def test_a_module_from_elsewhere_called_within():
    class Guest(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Block()
            self.guests = [prepared(Block())]

        def forward(self, x):
            return self.own(self.guests[0](self.own(x)))

    model = gq.quantize_(Guest(), gq.GQConfig())
    assert launches(assert_same(model, torch.randn(2, 6))) == (2, 2)


def test_layers_that_are_not_called():
    class Skipping(Stack):
        def forward(self, x):
            return self.outlet(self.blocks[2](self.inlet(x)))

    model = prepared(Skipping())
    reference = ungrouped(model)
    for each in (model, reference):
        each(X).square().sum().backward()
    skipped = {name for name, gradient in gradients(reference).items() if gradient is None}
    assert skipped
    for name, gradient in gradients(model).items():
        if name not in skipped:
            torch.testing.assert_close(gradient, gradients(reference)[name])
        elif "_quantizer." in name:
            assert not gradient.any()  # they share the operation with others
        else:
            assert gradient is None


def test_recursive_modules():
    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, depth=2):
            x = self.block(x)
            return self.block(self(x, depth - 1)) if depth else x

    assert_same(prepared(Tree()), torch.randn(2, 6))


# --- requantize_every, centroid_interval


@pytest.mark.parametrize("run", [Stack().run, in_region(use_reentrant=False), in_region(use_reentrant=True)])
def test_requantization_interval(run):
    model = prepared(Stack(run), requantize_every=3)
    reference = ungrouped(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, reference)]
    for _ in range(8):
        for micro_batch in torch.randn(2, 3, 5):
            outputs = [each(micro_batch) for each in (model, reference)]
            torch.testing.assert_close(*outputs)
            for output in outputs:
                output.square().sum().backward()
        assert_same_gradients(model, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_launches_between_requantizations():
    model = prepared(Stack(), requantize_every=2)
    found = [launches(assert_same(model, steps=1)) for _ in range(4)]
    assert found == [(1, 1), (0, 0), (1, 1), (0, 0)]


@pytest.mark.parametrize("learn_mu", [False, True])
def test_centroids_learn_at_every_nth_step(learn_mu):
    model = prepared(Stack(), centroid_interval=3, learn_mu=learn_mu)
    annealer = gq.Annealer(model, 10)
    learned = [name for name, _ in model.named_parameters() if name.endswith(("centroid_logits", "log_mu"))]
    every_step = gradients_of_twin = None
    for step in range(7):
        every_step = copy.deepcopy(model)
        for module in every_step.modules():
            if isinstance(module, gq.WeightQuantizer):
                module.learn_tables = True
        model.zero_grad()
        model(X).square().sum().backward()
        every_step.zero_grad()
        every_step(X).square().sum().backward()
        gradients_of_twin = gradients(every_step)
        for name, gradient in gradients(model).items():
            if name in learned and step % 3:
                assert torch.equal(gradient, torch.zeros_like(gradient)), name
            else:
                torch.testing.assert_close(gradient, gradients_of_twin[name])
        annealer.step()


# --- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alone", [False, True])
def test_autocast_weights_are_the_casts_of_float32_ones(dtype, alone, monkeypatch):
    model = prepared(Zoo())
    model = ungrouped(model) if alone else model
    seen = {}
    original = grouping.quantized

    def spy(layer, name):
        seen[type(layer).__name__, name] = value = original(layer, name)
        return value

    monkeypatch.setattr(grouping, "quantized", spy)
    with torch.autocast("cpu", dtype):
        model(INDEX)
    casts = {key: value for key, value in seen.items() if value.dtype == dtype}
    assert {key[0] for key in casts} >= {"QATConv1d", "QATConv2d", "QATMultiheadAttention"}
    assert {key[0] for key in seen if key not in casts} >= {"QATEmbedding", "QATLSTM", "QATGRU"}
    layers = {type(module).__name__: module for module in model.modules()}
    for (kind, name), value in seen.items():
        if kind != "QATLinear":  # two of them
            weight = getattr(layers[kind], name)
            assert torch.equal(value, getattr(layers[kind], f"{name}_quantizer")(weight).to(value.dtype))


def test_autocast_steps():
    model = prepared(Stack())
    with torch.autocast("cpu", torch.bfloat16):
        counts = assert_same(model)
        assert launches(counts) == (1, 1)
        assert_same(prepared(Zoo()), INDEX)
    reference = ungrouped(model)
    for module in reference.modules():
        if isinstance(module, nn.Linear):
            module.autocasts = False  # autocast casts the float32 weight
    outputs = []
    for each in (model, reference):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(each(X))
        outputs[-1].float().square().sum().backward()
    assert torch.equal(*outputs)
    assert_same_gradients(model, reference)


def test_autocast_off_within_a_call():
    class Mixed(Stack):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.inlet(x)
                for block in self.blocks:
                    x = block(x)
                with torch.autocast("cpu", enabled=False):
                    return self.outlet(x.float())

    assert_same(prepared(Mixed()))


def test_a_weight_shared_with_an_embedding_stays_float32_under_autocast():
    model = prepared(Zoo())
    with torch.autocast("cpu", torch.bfloat16), Operations() as operations:
        model(INDEX)
    assert operations.counts["fake_quantize"] == 2  # float32 and bfloat16


# --- torch.compile


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_models(backend):
    model = prepared(Stack(blocks=1))
    reference = ungrouped(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        output, expected = compiled(X), reference(X)
        torch.testing.assert_close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        assert_same_gradients(model, reference)


def test_compiled_parts_of_an_eager_model():
    model = prepared(Stack())
    reference = ungrouped(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for each in (model, reference):
            each(X).square().sum().backward()
        assert_same_gradients(model, reference)


def test_compiled_models_with_checkpointing():
    model = prepared(Stack(in_region(use_reentrant=False), blocks=1))
    reference = ungrouped(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(X).square().sum().backward()
        reference(X).square().sum().backward()
        assert_same_gradients(model, reference)


# --- the scope's life


def test_nothing_is_kept_after_a_call():
    model = prepared(Stack())
    model(X)
    with torch.no_grad():
        made = []
        handle = model.outlet.register_forward_hook(lambda *_: made.append(weakref.ref(_quantized(model.outlet))))
        model(X)
        handle.remove()
    gc.collect()
    assert made[0]() is None
    assert not grouping._thread.scopes


def _quantized(layer):
    return grouping.quantized(layer, "weight")


def test_without_autograd_no_more_than_a_group_is_kept(monkeypatch):
    monkeypatch.setattr(grouping, "GROUP_BYTES", 4 * 72)  # a block
    model = prepared(nn.Sequential(Block(), Block(), Block())).eval()
    alive = weakref.WeakSet()
    original = grouping.quantize_group

    def spy(*args):
        values = original(*args)
        alive.update(values)
        return values

    monkeypatch.setattr(grouping, "quantize_group", spy)
    numbers = []
    for block in model:
        block.register_forward_hook(lambda *_: numbers.append(len(alive)))
    with torch.no_grad():
        model(torch.randn(2, 6))
    assert numbers == [0, 0, 0]
    model(torch.randn(2, 6))
    assert numbers[3:] == [2, 4, 6]  # the graph has them


def test_graphs_are_freed_without_the_garbage_collector():
    model = prepared(Stack())
    seen = []
    model.outlet.register_forward_hook(lambda *_: seen.append(weakref.ref(_quantized(model.outlet))))
    gc.disable()
    try:
        model(X).sum().backward()
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exceptions_leave_no_scope_that_later_calls_would_use(error):
    model = prepared(Stack())
    reference = ungrouped(model)

    def fail(*_):
        raise error

    for part in (model.blocks[1].second, model.outlet):
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            handle = register(fail)
            with pytest.raises(error):
                model(X)
            handle.remove()
            if error is ValueError:
                assert not grouping._thread.scopes
            with torch.no_grad():
                for each in (model, reference):
                    each.inlet.weight.add_(0.1)
            assert torch.equal(model(X), reference(X))
            assert not grouping._thread.scopes


def test_threads_do_not_see_each_others_scopes():
    model = prepared(Stack())
    reference = ungrouped(model)
    expected = reference(X)
    barrier, failures = threading.Barrier(4), []

    def work(train):
        barrier.wait()
        for _ in range(10):
            with torch.set_grad_enabled(train):
                output = model(X)
            if not torch.equal(output, expected) or output.requires_grad != train:
                failures.append(train)

    threads = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- hooks


def hooked(model):
    return {name for name, module in model.named_modules() if grouping.open_scope in module._forward_pre_hooks.values()}


def test_only_modules_with_several_quantizers_have_hooks():
    model = prepared(Zoo())
    assert hooked(model) == {"", "attention", "lstm", "gru"}
    assert hooked(prepared(Stack(blocks=2))) == {"", "blocks", "blocks.0", "blocks.1"}
    assert not hooked(prepared(nn.Linear(3, 3)))


def test_preparing_again_or_in_parts_adds_no_second_hook():
    model = Stack(blocks=1)
    gq.quantize_(model.blocks[0], gq.GQConfig())
    gq.quantize_(model, {"inlet": gq.GQConfig()})
    gq.quantize_(model, {"outlet": gq.GQConfig()})
    for module in model.modules():
        assert len(module._forward_pre_hooks) == len(module._forward_hooks) <= 1
    assert launches(assert_same(model)) == (3, 3)  # three configurations


def test_convert_removes_the_hooks():
    model = prepared(Stack(blocks=2))
    others = [model.register_forward_hook(lambda *_: None), model.register_forward_pre_hook(lambda *_: None)]
    gq.quantize_(model.blocks[0], step="convert")
    assert hooked(model) == {"", "blocks", "blocks.1"}
    gq.quantize_(model, step="convert")
    assert not hooked(model)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    for handle in others:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks_always_called for module in model.modules())


def test_copies_and_pickles_group_on_their_own():
    model = prepared(Stack(in_stack))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            twin.inlet.weight.add_(1.0)
        assert launches(assert_same(twin)) == (1, 1)
    assert launches(assert_same(model)) == (1, 1)
    assert launches(assert_same(model.double(), X.double())) == (1, 1)
    torch.testing.assert_close(convert(model.float())(X), model.eval()(X))


def in_stack(block, x):
    return block(x)
