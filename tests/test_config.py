import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gq_triton import GQConfig


def test_defaults():
    config = GQConfig()
    assert (config.bits, config.mu, config.granularity, config.forward) == (4, None, "channel", "hard")
    assert (config.codebook, config.activations) == ("float", None)
    assert (config.requantize_every, config.centroid_interval) == (1, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bits", 0),
        ("bits", 9),
        ("bits", 4.0),
        ("bits", True),
        ("bits", "4"),
        ("mu", -1.0),
        ("mu", math.nan),
        ("mu", math.inf),
        ("mu", "auto"),
        ("mu", 8001.0),  # float32 and the kernels still have room
        ("mu", 10**400),
        ("learn_mu", 1),
        ("granularity", "row"),
        ("forward", "straight"),
        ("learn_centroids", None),
        ("codebook", None),
        ("codebook", "int4"),
        ("activations", "float"),
        ("straight_through", 1.5),
        ("straight_through", -0.1),
        ("requantize_every", 0),
        ("requantize_every", 1.5),
        ("centroid_interval", 0),
        ("centroid_interval", True),
    ],
)
def test_bad_values_are_named_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*; got "):
        GQConfig(**{name: value})


def test_learned_mu_cannot_start_at_zero():
    with pytest.raises(ValueError, match="^mu must be above 0"):
        GQConfig(mu=0.0, learn_mu=True)


CONFIGS = st.builds(
    GQConfig,
    bits=st.integers(1, 8),
    mu=st.none() | st.floats(1e-3, 300.0),
    learn_mu=st.booleans(),
    granularity=st.sampled_from(["channel", "tensor"]),
    forward=st.sampled_from(["hard", "soft"]),
    learn_centroids=st.booleans(),
    codebook=st.sampled_from(["float", "int8", "fp8"]),
    activations=st.sampled_from([None, "int8", "fp8"]),
    straight_through=st.floats(0.0, 1.0),
    requantize_every=st.integers(1, 100),
    centroid_interval=st.integers(1, 100),
)


@given(CONFIGS)
def test_round_trip_through_a_dict(config):
    assert GQConfig.from_dict(config.to_dict()) == config


def test_from_dict_fills_in_defaults():
    assert GQConfig.from_dict({"bits": 2}) == GQConfig(bits=2)


@pytest.mark.parametrize("settings", [None, 4, [("bits", 4)], {"bit": 4}, {"bits": 12}])
def test_from_dict_refuses(settings):
    with pytest.raises(ValueError, match="must be|unknown names"):
        GQConfig.from_dict(settings)
