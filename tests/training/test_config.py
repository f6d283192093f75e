import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_triton.training import TrainConfig


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_the_rate_rises_once_and_falls_once(steps, warmup, final):
    config = TrainConfig(warmup=warmup, final_learning_rate=final)
    rates = [config.rate(step, steps) for step in range(steps)]
    peak = rates.index(max(rates))
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_the_rate_at_its_landmarks():
    config = TrainConfig(warmup=0.1, final_learning_rate=0.05)
    assert config.rate(0, 100) == pytest.approx(0.1)
    assert config.rate(9, 100) == pytest.approx(1.0)
    assert config.rate(10, 100) == pytest.approx(1.0)
    assert config.rate(99, 100) == pytest.approx(0.05)


def test_settings_are_read_from_text():
    changed = TrainConfig().changed({"epochs": "7", "learning_rate": "1e-3", "speeds": "0.9,1", "warmup": "0"})
    assert (changed.epochs, changed.learning_rate, changed.speeds, changed.warmup) == (7, 1e-3, (0.9, 1.0), 0.0)
    assert changed.changed({"quantizer_learning_rate": "0.01"}).quantizer_learning_rate == 0.01
    assert changed.changed({"batch_seconds": "400", "precision": "bfloat16"}).precision == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": "3"}, "epoch; allowed: epochs, "),
        ({"epochs": "three"}, "epochs is 'three'"),
        ({"epochs": "1.5"}, "epochs is '1.5'; a whole number"),
        ({"warmup": "some"}, "warmup is 'some'; a number"),
        ({"speeds": "1;2"}, "separated by commas"),
        ({"epochs": "0"}, "epochs is 0"),
        ({"learning_rate": "nan"}, "learning_rate is nan"),
        ({"learning_rate": "-1"}, "learning_rate is -1"),
        ({"warmup": "2"}, "warmup is 2.0; allowed: a fraction"),
        ({"weight_decay": "-0.1"}, "weight_decay is -0.1"),
        ({"quantizer_learning_rate": "0"}, "quantizer_learning_rate is 0"),
        ({"speeds": "0,1"}, "speeds"),
        ({"hardness": "4"}, "hardness"),
        ({"accumulate": "0"}, "accumulate is 0"),
        ({"batch_seconds": "-1"}, "batch_seconds is -1"),
        ({"max_seconds": "inf"}, "max_seconds is inf"),
        ({"precision": "float16"}, "precision is float16; allowed: auto, float32, bfloat16"),
        ({"join": "0.1", "batch_seconds": "300"}, "join is 0.1; allowed: 0 with batch_seconds"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().changed(settings)


def test_a_configuration_is_json():
    assert json.loads(json.dumps(TrainConfig().to_dict()))["speeds"] == [1.0]
