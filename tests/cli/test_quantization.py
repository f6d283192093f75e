import pytest

from gq_triton.baselines import KMeansConfig, LSQConfig
from gq_triton.speech.recognizer import Recognizer


def test_a_rival_method_trains_and_is_converted_and_reported(gq_triton, run, manifest, tmp_path):
    options = ("--method", "lsq", "--bits", 3, "--layer", "joint.*=8", "--activations", "int8")
    data = ("--data", "manifest", "--root", manifest, "--set", "epochs=1", "--set", "speeds=1")
    gq_triton.succeeds("qat", run, *options, *data, "--output", tmp_path / "qat")
    gq_triton.succeeds("convert", tmp_path / "qat", "--output", tmp_path / "packed")
    expected = {"joint.*": LSQConfig(8, activations="int8"), "*": LSQConfig(3, activations="int8")}
    assert Recognizer.load(tmp_path / "packed").quantization == expected
    rows = gq_triton.json("report", tmp_path / "packed")["rows"]
    assert {row["bits"] for row in rows if row["sqnr_db"] is not None} == {3, 8}


def test_a_rival_method_quantizes_without_training(gq_triton, run, tmp_path):
    gq_triton.succeeds("convert", run, "--method", "kmeans", "--bits", 2, "--output", tmp_path / "packed")
    assert Recognizer.load(tmp_path / "packed").quantization == {"*": KMeansConfig(2)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lsq", "--granularity", "tensor"), "--granularity tensor does not go with --method lsq"),
        (("--method", "torchao", "--codebook", "int8"), "--codebook int8 does not go with --method torchao"),
        (("--method", "torchao", "--bits", "3"), "bits must be one of 4, 8; got 3"),
        (("--method", "torchao"), "torchao fake-quantizes linear layers"),
        (("--method", "awq"), "'awq' is not one of 'gq', 'uniform', 'kmeans', 'lsq', 's8bqat', 'torchao'"),
    ],
)
def test_what_does_not_go_with_a_method_is_named(gq_triton, run, tmp_path, options, message):
    error = gq_triton.fails("convert", run, "--bits", 4, *options, "--output", tmp_path / "packed")
    assert message in error
    assert not (tmp_path / "packed").exists()


def test_a_model_keeps_the_method_it_was_trained_by(gq_triton, qat_run, tmp_path):
    error = gq_triton.fails("convert", qat_run, "--method", "gq", "--output", tmp_path / "packed")
    assert "--method does not go with it" in error
