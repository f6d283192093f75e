import copy
import functools
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantized import convert
from torch import nn

import gq_triton as gq
from gq_triton import allocation
from gq_triton.allocation import Sensitivity, Unit
from gq_triton.models import CTC, RNNT, ConformerConfig, RNNTConfig

CONFIG = gq.GQConfig(mu=1.0)  # quickly fitted
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


class Model(nn.Module):
    """Layers of several kinds, with dropout, batch statistics and a tied weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 12)
        self.lstm = nn.LSTM(12, 12, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 8)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x, _ = self.lstm(self.embedding(tokens))
        x = x + self.attention(x, x, x)[0]
        return self.head(self.dropout(self.norm(self.conv(x.mT))).mT)


def loss(model):
    return nn.functional.cross_entropy(model(TOKENS).mT, TOKENS.flip(1)).item()


def measured(model, config=CONFIG, widths=(1, 3, 8), **options):
    return gq.sensitivity(model, loss, config, widths=widths, progress=False, **options)


class Counted:
    """A loss that counts its calls, and is interrupted at one of them."""

    def __init__(self, interrupt_at=None):
        self.calls, self.interrupt_at = 0, interrupt_at

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return loss(model)


def snapshot(model):
    modes = {name: module.training for name, module in model.named_modules()}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, modes


def assert_unchanged(model, before):
    tensors, modes = snapshot(model)
    assert modes == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)


# --- measuring


@pytest.mark.parametrize("config", [CONFIG, gq.GQConfig(mu=0.0, codebook="int8", granularity="tensor")])
def test_a_loss_is_that_of_a_model_prepared_in_this_weight_alone(config):
    model = Model()
    found = measured(model, config)
    assert found.loss == loss(copy.deepcopy(model).eval())
    names = [name for unit in found.units for name in unit.names]
    weights = [name for name, _ in model.named_parameters(remove_duplicate=False) if "weight" in name]
    assert sorted(names) == sorted(set(weights) - {"norm.weight"})
    for unit, bits in itertools.product(found.units, (1, 3, 8)):
        alone = gq.quantize_(copy.deepcopy(model), dict.fromkeys(unit.names, replace(config, bits=bits)))
        assert unit.losses[bits] == pytest.approx(loss(alone.eval()), rel=1e-6)


def test_a_model_is_left_as_it_was():
    model = Model()
    model.norm.eval()
    model(TOKENS).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    before = snapshot(model)
    found = measured(model)
    assert_unchanged(model, before)
    gq.quantized_loss(model, loss, gq.allocate(found, found.bytes_at(2)).config)
    assert_unchanged(model, before)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("call", [1, 3, 7])
def test_a_model_is_left_as_it_was_by_a_run_that_is_interrupted(call):
    model = Model()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        gq.sensitivity(model, Counted(call), CONFIG, progress=False)
    assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt):
        gq.quantized_loss(model, Counted(1), CONFIG)
    assert_unchanged(model, before)


def test_the_joint_loss_is_that_of_the_prepared_model():
    model = Model()
    config = {"lstm": gq.GQConfig(bits=1), "conv": None, "*": replace(CONFIG, bits=3)}
    prepared = gq.quantize_(copy.deepcopy(model), config).eval()
    assert gq.quantized_loss(model, loss, config) == pytest.approx(loss(prepared), rel=1e-6)


def test_patterns_leave_weights_float():
    found = measured(Model(), {"lstm": None, "attention": gq.GQConfig(mu=0), "*": CONFIG}, widths=(2,))
    configs = {unit.names[0]: unit.config for unit in found.units}
    assert not any(name.startswith("lstm") for name in configs)
    assert [configs[f"attention.{name}"].mu for name in ("in_proj_weight", "out_proj.weight")] == [0, 0]
    assert configs["conv.weight"] == CONFIG


def test_other_methods_have_sensitivities_too():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = {"0": gq.baselines.UniformConfig(), "1": gq.baselines.KMeansConfig()}

    def squares(model):
        return model(torch.eye(6)).square().sum()

    found = gq.sensitivity(model, squares, config, widths=(2, 4), progress=False)
    chosen = gq.allocate(found, found.bytes_at(3))
    assert [type(each) for each in chosen.config.values()] == [type(each) for each in config.values()]
    assert gq.report(convert(gq.quantize_(model, chosen.config))).packed_bytes == chosen.bytes


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("normalize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_normalized_layers_have_them_too(normalize, dim):
    model = nn.Sequential(normalize(nn.Linear(5, 4), dim=dim), nn.Linear(4, 1))

    def squares(model):
        return model(torch.eye(5)).square().sum()

    before = snapshot(model)
    found = gq.sensitivity(model, squares, CONFIG, widths=(1, 4), progress=False)
    assert_unchanged(model, before)
    for bits in (1, 4):
        prepared = gq.quantize_(copy.deepcopy(model), {"0": replace(CONFIG, bits=bits)})
        assert found.units[0].losses[bits] == pytest.approx(squares(prepared.eval()).item(), rel=1e-5)
    chosen = gq.allocate(found, found.bytes_at(4))
    assert gq.report(convert(gq.quantize_(model, chosen.config))).packed_bytes == chosen.bytes


def test_a_lone_layer_is_a_model():
    layer = nn.Linear(4, 4)
    found = gq.sensitivity(layer, lambda layer: layer(torch.ones(4)).square().sum(), widths=(2,), progress=False)
    assert [unit.names for unit in found.units] == [("weight",)]
    chosen = gq.allocate(found, found.bytes_at(2))
    assert gq.report(gq.quantize_(layer, chosen.config)).packed_bytes == chosen.bytes


def test_names_with_wildcards_in_them():
    model = nn.Sequential()
    model.add_module("a[0]", nn.Linear(4, 4))
    model.add_module("a0", nn.Linear(4, 4))
    found = gq.sensitivity(model, lambda model: model(torch.ones(4)).square().sum(), widths=(1, 8), progress=False)
    chosen = gq.allocate(found, found.bytes_at(5))
    gq.quantize_(model, chosen.config)
    assert {row.name: row.bits for row in gq.report(model).rows if row.sqnr_db is not None} == chosen.bits


def test_weights_that_the_loss_does_not_depend_on_are_named():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    with pytest.warns(UserWarning, match="does not depend on other.weight, which"):
        gq.sensitivity(model, lambda model: model["used"](torch.ones(3)).sum(), widths=(1, 2), progress=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(widths=()), "widths must be integers from 1 to 8, one at least; got \\(\\)"),
        (dict(widths=(4, 9)), "widths must be integers"),
        (dict(widths=(2.0,)), "widths must be integers"),
        (dict(config={"conv": None}), "it selects none"),
        (dict(config=4), "config must be"),
        (dict(loss=lambda model: math.nan), "loss must be finite; it is nan with float weights"),
        (dict(loss=itertools.count().__next__), "loss must not change from call to call; it was 0.0 and then 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model = Model()
    before = snapshot(model)
    if "loss" in arguments:
        value = arguments["loss"]
        arguments = {"loss": (lambda model: value()) if "method-wrapper" in str(type(value)) else value}
    with pytest.raises(ValueError, match=message):
        gq.sensitivity(model, **{"loss": loss, "progress": False, **arguments})
    assert_unchanged(model, before)


def test_a_loss_that_a_width_breaks_is_named():
    float_weight = (model := nn.Linear(3, 2)).weight.detach().clone()

    def broken(model):
        return 1.0 if torch.equal(model.weight, float_weight) else math.inf

    with pytest.raises(ValueError, match="loss must be finite; it is inf with weight at 2 bits"):
        gq.sensitivity(model, broken, widths=(2, 4), progress=False)
    with pytest.raises(ValueError, match="it is inf with these widths"):
        gq.quantized_loss(model, broken, gq.GQConfig())


def test_a_prepared_model_is_refused():
    with pytest.raises(ValueError, match="it is prepared already"):
        measured(gq.quantize_(Model(), gq.GQConfig()))


# --- files


def test_a_killed_run_goes_on(tmp_path):
    model, file = Model(), tmp_path / "new" / "found.json"
    whole = measured(model)
    with pytest.raises(KeyboardInterrupt):
        gq.sensitivity(model, Counted(8), CONFIG, widths=(1, 3, 8), file=file, progress=False)
    there = Sensitivity.from_dict(json.loads(file.read_text()))
    assert sum(len(unit.losses) for unit in there.units) == 5
    counted = Counted()
    assert gq.sensitivity(model, counted, CONFIG, widths=(1, 3, 8), file=file, progress=False) == whole
    assert counted.calls == 2 + 3 * len(whole.units) - 5
    assert Sensitivity.from_dict(json.loads(file.read_text())) == whole


def test_other_widths_join_those_that_a_file_has(tmp_path):
    model, file = Model(), tmp_path / "found.json"
    measured(model, widths=(1, 8), file=file)
    counted = Counted()
    found = gq.sensitivity(model, counted, CONFIG, widths=(2, 8), file=file, progress=False)
    assert counted.calls == 2 + len(found.units)
    assert found == measured(model, widths=(2, 8))
    there = Sensitivity.from_dict(json.loads(file.read_text()))
    assert {tuple(sorted(unit.losses)) for unit in there.units} == {(1, 2, 8)}


def test_a_file_of_something_else_is_left_alone(tmp_path):
    model, file = Model(), tmp_path / "found.json"
    measured(model, widths=(8,), file=file)
    text = file.read_text()
    for config in (gq.GQConfig(mu=0), replace(CONFIG, granularity="tensor"), {"conv": None, "*": CONFIG}):
        with pytest.raises(ValueError, match="found.json has measurements of another model or with other settings"):
            measured(model, config, file=file)
    nn.init.normal_(model.conv.weight)
    with pytest.raises(ValueError, match="another model or on other data, where the float loss was"):
        measured(model, file=file)
    assert file.read_text() == text


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: "{" * 10_000,
        lambda values: b"\xff",
        lambda values: [],
        lambda values: {**values, "version": 2},
        lambda values: {**values, "units": [{}]},
        lambda values: {**values, "units": [{**values["units"][0], "losses": {"9": 1.0}}]},
        lambda values: {**values, "units": [{**values["units"][0], "losses": {"2": math.nan}}]},
        lambda values: {**values, "units": [{**values["units"][0], "bytes": [1]}]},
        lambda values: {**values, "units": [{**values["units"][0], "config": {"bits": 9}}]},
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    model, file = Model(), tmp_path / "found.json"
    values = damage(measured(model, widths=(8,)).to_dict())
    file.write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    if isinstance(values, str):
        file.write_text(values)
    with pytest.raises(ValueError, match="found.json cannot be gone on with"):
        measured(model, file=file)


# --- bytes


@pytest.mark.parametrize("config", [CONFIG, gq.GQConfig(mu=0.0, codebook="int8", granularity="tensor")])
def test_bytes_are_those_of_the_packed_model(config):
    model = Model()
    found = measured(model, config, widths=(1, 2, 5, 8))
    for bits in (1, 5, 8):
        uniform = gq.quantize_(copy.deepcopy(model), replace(config, bits=bits))
        assert found.bytes_at(bits) == gq.report(convert(uniform)).packed_bytes
    for budget in np.linspace(found.bytes_at(1), found.bytes_at(8), 7).astype(int):
        chosen = gq.allocate(found, int(budget))
        prepared = gq.quantize_(copy.deepcopy(model), chosen.config)
        assert chosen.bytes == gq.report(convert(prepared)).packed_bytes <= budget
        widths = {row.name: row.bits for row in gq.report(prepared).rows if row.sqnr_db is not None}
        assert widths == chosen.bits


def test_bytes_between_two_widths_lie_between_theirs():
    found = measured(Model(), widths=(8,))
    at = [found.bytes_at(bits) for bits in (3, 3.25, 3.5, 4)]
    assert at == sorted(set(at))
    assert at[2] - at[0] == pytest.approx((at[3] - at[0]) / 2, abs=1)
    for bits in (0.9, 8.5, math.nan):
        with pytest.raises(ValueError, match="bits must be from 1 to 8"):
            found.bytes_at(bits)


SIZES = dict(features=5, predictor_embedding=6, predictor_hidden=8, joint=8, dropout=0.1)
RECURRENT = RNNTConfig(7, stack=2, encoder_layers=2, encoder_hidden=8, reduce_after=0, **SIZES)
CONFORMER = ConformerConfig(7, channels=4, encoder_layers=1, encoder_size=8, heads=2, kernel=3, **SIZES)


@pytest.mark.parametrize(
    "make", [lambda: RNNT(RECURRENT), lambda: RNNT(CONFORMER), lambda: CTC(replace(CONFORMER, predictor_layers=0))]
)
def test_recognizers(make):
    model = make()
    features, lengths, labels = torch.randn(2, 24, 5), torch.tensor([24, 17]), torch.tensor([[1, 2], [3, 4]])

    def squares(model):
        if isinstance(model, CTC):
            return model(features, lengths)[0].square().mean()
        lattice = model(features, lengths, labels)
        return model.joint.combine(lattice.frames[:, :, None], lattice.positions[:, None]).square().mean()

    before = snapshot(model)
    found = gq.sensitivity(model, squares, CONFIG, widths=(1, 4), progress=False)
    assert_unchanged(model, before)
    chosen = gq.allocate(found, (found.bytes_at(1) + found.bytes_at(4)) // 2)
    assert set(chosen.bits.values()) == {1, 4}
    report = gq.report(gq.quantize_(gq.quantize_(model, chosen.config), step="convert"))
    assert report.packed_bytes == chosen.bytes
    everything = gq.report(gq.quantize_(gq.quantize_(make(), replace(CONFIG, bits=1)), step="convert"))
    assert everything.packed_bytes == found.bytes_at(1)


# --- choosing


def of_table(losses, sizes, other=10, loss=0.0):
    """Sensitivities of units with given losses, {width: loss}, and bytes per bit."""
    return Sensitivity(
        loss,
        other,
        tuple(
            Unit((f"w{i}",), gq.GQConfig(), tuple(size * bits for bits in range(1, 9)), each)
            for i, (each, size) in enumerate(zip(losses, sizes, strict=True))
        ),
    )


def brute_force(losses, sizes, limit):
    """The least sum of losses, by trying everything."""
    sums, totals = (functools.reduce(np.add.outer, values) for values in (losses, sizes))
    return sums[totals <= limit].min()


def by_dynamic_programming(losses, sizes, limit):
    """The least sum of losses, for every number of bytes up to ``limit`` in turn."""
    best = np.zeros(limit + 1)
    for loss, size in zip(losses, sizes, strict=True):
        options = [np.append(np.full(min(s, limit + 1), np.inf), best)[: limit + 1] + x for x, s in zip(loss, size)]  # noqa: B905
        best = np.min(options, axis=0)
    return best[limit]


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    # Few different numbers, so that ties and sums that just fit are common.
    loss = st.integers(-3, 9).map(float) | st.floats(-1e3, 1e3, allow_subnormal=False)
    table = st.lists(st.lists(loss, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    losses = np.array(draw(table))
    size = st.integers(1, 12) | st.integers(1, 10**9)
    sizes = np.array(draw(st.lists(st.lists(size, min_size=columns, max_size=columns), min_size=rows, max_size=rows)))
    limit = draw(st.integers(int(sizes.min(1).sum()), int(sizes.max(1).sum())))
    return losses, sizes, limit


ROUNDED = (  # the bound of the best choice comes out above its loss, by rounding
    np.array([[0.0, 0.0]] * 4 + [[1.9170692, 0.0]]),
    np.array([[1, 1], [1, 1], [2, 2], [23701, 23701], [1, 2]]),
    23706,
)


@settings(max_examples=100, deadline=None)
@given(problems())
@example(ROUNDED)
def test_no_choice_is_better(problem):
    losses, sizes, limit = problem
    choice = allocation._knapsack(losses, sizes, limit)
    rows = range(len(losses))
    assert sizes[rows, choice].sum() <= limit
    assert losses[rows, choice].sum() == pytest.approx(brute_force(*problem), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_is_better_among_many_weights(seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 20, 40)
    sizes = counts[:, None] * np.arange(1, 9)
    losses = draw.lognormal(0, 2, (40, 1)) * 4.0 ** -np.arange(1, 9) * draw.lognormal(0, 0.3, (40, 8))
    limit = int(counts.sum() * draw.uniform(1.2, 5))
    choice = allocation._knapsack(losses, sizes, limit)
    assert sizes[range(40), choice].sum() <= limit
    best = by_dynamic_programming(losses, sizes, limit)
    assert losses[range(40), choice].sum() == pytest.approx(best, rel=1e-12)


def test_a_large_model_is_quick():
    draw = np.random.default_rng(0)
    table = draw.lognormal(0, 2, (300, 1)) * 4.0 ** -np.arange(1, 9) * draw.lognormal(0, 0.3, (300, 8))
    losses = [dict(enumerate(row, start=1)) for row in table.tolist()]
    found = of_table(losses, draw.integers(1000, 100_000, 300).tolist())
    chosen = gq.allocate(found, found.bytes_at(3))
    assert len(chosen.bits) == 300
    assert 0.999 * found.bytes_at(3) < chosen.bytes <= found.bytes_at(3)
    assert chosen.change < sum(each[3] for each in losses)


def test_the_bytes_go_where_they_help():
    found = of_table([{1: 0.1, 4: 0.0}, {1: 5.0, 4: 0.0}, {1: 0.2, 4: 0.1}], [100, 100, 100])
    chosen = gq.allocate(found, 10 + 600)
    assert chosen.bits == {"w0": 1, "w1": 4, "w2": 1}
    assert (chosen.bytes, chosen.change) == (610, pytest.approx(0.3))
    assert chosen.config == {name: gq.GQConfig(bits=bits) for name, bits in chosen.bits.items()}


def test_luck_of_a_narrow_width_is_not_believed():
    found = of_table([{1: 1.5, 2: 0.9, 4: 1.1, 8: 1.0}], [100], loss=1.0)
    for bits, charged in ((1, 0.5), (2, 0.1), (8, 0.0)):
        chosen = gq.allocate(found, 10 + 100 * bits)
        assert chosen.bits == {"w0": bits}
        assert chosen.change == pytest.approx(charged)
    assert gq.allocate(found, 10 + 400).bits == {"w0": 2}  # 4 bits cost more bytes and no less loss


def test_a_budget_that_cannot_be_met_tells_the_least():
    found = of_table([{2: 0.1, 4: 0.0}] * 3, [1000, 500, 500])
    with pytest.raises(ValueError, match="max_bytes is 4,009; the model takes 4,010 with every weight at its narrow"):
        gq.allocate(found, 4009)
    assert set(gq.allocate(found, 4010).bits.values()) == {2}
    assert set(gq.allocate(found, 10**12).bits.values()) == {4}


@pytest.mark.parametrize("losses", [[{1: 0.0}, {1: 0.0, 2: 0.0}], [{}, {}], [{1: 0.0}, {2: 0.0}]])
def test_missing_measurements_are_told(losses):
    with pytest.raises(ValueError, match="some are missing"):
        gq.allocate(of_table(losses, [1, 1]), 10**6)


def test_sensitivities_survive_json():
    found = measured(Model(), {"conv": gq.GQConfig(activations="int8"), "*": CONFIG}, widths=(2, 8))
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found
