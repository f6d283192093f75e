import json

import pytest
import torch
from torch import nn

import gq_triton as gq


def prepared():
    model = nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2), nn.LayerNorm(2))
    return gq.quantize_(model, gq.GQConfig(learn_mu=True))


def hardness(model):
    (value,) = {float(m.hardness) for m in model.modules() if isinstance(m, gq.WeightQuantizer)}
    return value


def test_hardness_rises_geometrically_and_stays():
    model = prepared()
    annealer = gq.Annealer(model, total_steps=4, start=1.0, end=16.0)
    seen = [hardness(model)]
    for _ in range(6):
        annealer.step()
        seen.append(hardness(model))
    assert seen == pytest.approx([1, 2, 4, 8, 16, 16, 16])
    assert annealer.hardness == 16


def test_state_goes_through_json_and_sets_the_model():
    annealer = gq.Annealer(prepared(), 10, start=1.0, end=9.0)
    for _ in range(3):
        annealer.step()
    state = json.loads(json.dumps(annealer.state_dict()))
    model = prepared()
    resumed = gq.Annealer(model, 5)
    resumed.load_state_dict(state)
    assert resumed.hardness == annealer.hardness == pytest.approx(9**0.3)
    assert hardness(model) == pytest.approx(9**0.3)
    resumed.step()
    annealer.step()
    assert resumed.state_dict() == annealer.state_dict()


def test_tables_learn_at_every_nth_step_also_after_resuming():
    def learning(model):
        return [m.learn_tables for m in model.modules() if isinstance(m, gq.WeightQuantizer)]

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    gq.quantize_(model, {"0": gq.GQConfig(centroid_interval=3), "1": gq.GQConfig()})
    annealer = gq.Annealer(model, 10)
    seen = [learning(model)]
    for _ in range(6):
        annealer.step()
        seen.append(learning(model))
    assert seen == [[step % 3 == 0, True] for step in range(7)]
    annealer.step()
    gq.Annealer(model, 10).load_state_dict(annealer.state_dict())
    assert learning(model) == [False, True]


@pytest.mark.parametrize(
    ("name", "value"),
    [("total_steps", 0), ("total_steps", 2.5), ("start", 0.0), ("start", float("nan")), ("end", -1.0)],
)
def test_bad_schedules(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        gq.Annealer(prepared(), **{"total_steps": 3, name: value})


def test_models_without_quantizers():
    with pytest.raises(ValueError, match="no quantizer to anneal"):
        gq.Annealer(nn.Linear(2, 2), 3)


def test_quantizers_are_not_decayed():
    model = prepared()
    model[0].bias.requires_grad_(False)
    weights, quantizers = gq.param_groups(model, lr=0.1, weight_decay=0.2, quantizer_lr=0.3)
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.2)
    assert (quantizers["lr"], quantizers["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in quantizers["params"]} == {n for n in names.values() if "_quantizer." in n}
    grouped = [names[id(p)] for p in weights["params"] + quantizers["params"]]
    assert sorted(grouped) == sorted(set(names.values()) - {"0.bias"})
    torch.optim.AdamW([weights, quantizers])


def test_weights_of_one_bit_have_a_rate_of_their_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gq.quantize_(model, {"0": gq.GQConfig(bits=1), "*": gq.GQConfig(bits=2)}, step="prepare")
    rest, one_bit, quantizers = gq.param_groups(model, lr=0.1, weight_decay=0.2, one_bit_lr=0.4)
    assert [id(parameter) for parameter in one_bit["params"]] == [id(model[0].weight)]
    assert (one_bit["lr"], one_bit["weight_decay"]) == (0.4, 0.2)
    assert (rest["lr"], quantizers["lr"]) == (0.1, 0.1)
    assert len(rest["params"]) == 3  # a weight and two biases
    assert gq.param_groups(model, lr=0.1, weight_decay=0.2)[1]["lr"] == 0.1


def test_groups_of_a_float_model_and_the_default_rate():
    (only,) = gq.param_groups(nn.Linear(2, 2), lr=0.1, weight_decay=0.2)
    assert len(only["params"]) == 2
    assert gq.param_groups(prepared(), lr=0.1, weight_decay=0.2)[1]["lr"] == 0.1
