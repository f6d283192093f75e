from dataclasses import replace

import pytest
import tones
import torch

import gq_triton as gq
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training import SpeechSet, TrainConfig
from gq_triton.training.evaluation import evaluate
from gq_triton.training.recipes import ALLOCATIONS, RECIPES
from gq_triton.training.study import (
    mean_bits,
    quantize_and_measure,
    train_from_scratch,
    train_further,
    train_recognizer,
)

CONFIG = TrainConfig(epochs=2, batch_size=6, learning_rate=1e-2, evaluate_every=1)


@pytest.fixture(scope="module")
def speech():
    spoken = tones.utterances(12)
    made = tones.recognizer(spoken)
    return SpeechSet(spoken, made.front_end, made.tokenizer, progress=False)


def test_a_trained_recognizer_is_saved_and_its_error_rate_logged(speech, tmp_path):
    recognizer = train_recognizer(
        tones.recognizer(speech.utterances), speech, CONFIG, tmp_path, held_out=speech, progress=False
    )
    saved = Recognizer.load(tmp_path / "recognizer.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), recognizer.parameters(), strict=True))
    assert not recognizer.training
    assert (tmp_path / "metrics.csv").read_text().count(",wer,") == 2


def test_quantized_training_starts_from_a_copy(speech, tmp_path):
    float_recognizer = tones.recognizer(speech.utterances)
    before = float_recognizer.model.joint.output.weight.clone()
    trained = train_further(
        float_recognizer, {"*": gq.GQConfig(bits=3)}, speech, CONFIG, tmp_path, held_out=speech, progress=False
    )
    assert (float_recognizer.stage, trained.stage) == ("float", "qat")
    assert torch.equal(float_recognizer.model.joint.output.weight, before)
    assert not torch.equal(trained.model.joint.output.weight, before)
    assert Recognizer.load(tmp_path / "recognizer.safetensors").stage == "qat"


def test_quantized_training_from_other_weights_is_another_run(speech, tmp_path):
    arguments = ({"*": gq.GQConfig(bits=3)}, speech, CONFIG, tmp_path)
    train_further(tones.recognizer(speech.utterances), *arguments, progress=False)
    with pytest.raises(ValueError, match="initial_weights"):
        train_further(tones.recognizer(speech.utterances, seed=1), *arguments, progress=False)


def test_a_row_says_what_its_file_does(speech, tmp_path, monkeypatch):
    recognizer = tones.recognizer(speech.utterances)
    allocation = {"encoder.layers.1": gq.GQConfig(bits=1), "*": gq.GQConfig(bits=4)}
    monkeypatch.setitem(ALLOCATIONS, "4 and 1", allocation)
    recipe = replace(RECIPES["synthetic"], qat=CONFIG, beam_width=2)
    row = quantize_and_measure(recognizer, "4 and 1", recipe, speech, speech, tmp_path, progress=False)
    packed = Recognizer.load(tmp_path / row.file)
    report = gq.report(packed.model)
    assert packed.stage == "packed"
    assert evaluate(packed, speech, beam_width=2, progress=False).wer == row.qat_wer
    untrained = recognizer.packed_copy(allocation)
    assert evaluate(untrained, speech, beam_width=2, progress=False).wer == row.ptq_wer
    assert (row.bytes, row.ratio) == (report.packed_bytes, report.ratio)
    assert row.bits == mean_bits(report)
    assert 1 < row.bits < 4
    assert {"name", "bits", "ptq_wer", "qat_wer", "bytes", "ratio"} <= row.to_dict().keys()


def test_training_from_scratch_starts_on_synthetic_voices(speech, tmp_path):
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
    recipe = replace(RECIPES["synthetic"], pretrain=CONFIG, spoken=12, train=CONFIG)
    trained = train_from_scratch(tones.recognizer(speech.utterances), recipe, speech, tmp_path / "a", progress=False)
    pretrained = Recognizer.load(tmp_path / "a" / "pretraining" / "recognizer.safetensors")
    alone = train_recognizer(pretrained, speech, CONFIG, tmp_path / "b", progress=False)
    weights = [made.model.joint.output.weight for made in (trained, alone)]
    assert torch.equal(*weights)
    unspoken = replace(recipe, pretrain=None)
    other = train_from_scratch(tones.recognizer(speech.utterances), unspoken, speech, tmp_path / "c", progress=False)
    assert not torch.equal(other.model.joint.output.weight, weights[0])
    assert not (tmp_path / "c" / "pretraining").exists()
