import json

import pytest
from torch import nn

import gq_triton as gq
from gq_triton.baselines.config import BASELINES, KMeansConfig, LSQConfig, S8BQATConfig, TorchaoConfig, UniformConfig

CONFIGS = [
    UniformConfig(bits=8, codebook="int8", activations="int8"),
    KMeansConfig(bits=1),
    LSQConfig(bits=2, codebook="fp8", init="magnitude"),
    S8BQATConfig(strength=0.0, compress_every=7),
    TorchaoConfig(bits=8, activations="fp8"),
    gq.GQConfig(bits=3, granularity="tensor"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_json(config):
    assert gq.config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_method_has_a_name():
    assert list(BASELINES) == ["uniform", "kmeans", "lsq", "s8bqat", "torchao"]
    assert [BASELINES[name]().to_dict()["method"] for name in BASELINES] == list(BASELINES)


def test_dicts_without_a_method_are_the_general_quantizers():
    assert gq.config_from_dict({"bits": 2}) == gq.config_from_dict({"method": "gq", "bits": 2}) == gq.GQConfig(bits=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "gptq"}, "method must be one of 'gq', 'uniform', 'kmeans', 'lsq', 's8bqat', 'torchao'; got 'gptq'"),
        ({"method": ["lsq"]}, "method must be one of"),
        (
            {"method": "lsq", "mu": 1.0},
            r"unknown names \['mu'\]; allowed are \['activations', 'bits', 'codebook', 'init'\]",
        ),
        ({"method": "uniform", "granularity": "tensor"}, "unknown names"),
        ({"method": "uniform", "bits": 9}, "bits must be an integer from 1 to 8; got 9"),
        ({"method": "kmeans", "codebook": "int4"}, "codebook must be one of"),
        ({"method": "lsq", "activations": "float"}, "activations must be one of"),
        ({"method": "lsq", "init": "zeros"}, "init must be one of 'error', 'magnitude'; got 'zeros'"),
        ({"method": "s8bqat", "strength": -1.0}, "strength must be a number from 0.0"),
        ({"method": "s8bqat", "compress_every": 0}, "compress_every must be an integer of at least 1"),
        ({"method": "torchao", "bits": 2}, "bits must be one of 4, 8; got 2"),
        ("lsq", "must be a mapping"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        gq.config_from_dict(settings)


def test_another_methods_settings_are_refused():
    with pytest.raises(ValueError, match="method must be 'lsq'; got 'kmeans'"):
        LSQConfig.from_dict(KMeansConfig().to_dict())


@pytest.mark.parametrize("config", ["lsq", {"*": {"method": "lsq"}}, {}, None])
def test_only_configurations_quantize(config):
    with pytest.raises(ValueError, match="config must"):
        gq.quantize_(nn.Linear(2, 2), config)
