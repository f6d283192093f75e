"""Rival methods in the trainer of recognizers."""

import pytest
import tones
import torch

import gq_triton as gq
from gq_triton.baselines import LSQConfig, S8BQATConfig, UniformConfig
from gq_triton.training import SpeechSet, TrainConfig, Trainer

CONFIG = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, average_decay=0.8)


@pytest.fixture(scope="module")
def spoken():
    return tones.utterances(12)


@pytest.fixture(scope="module")
def speech(spoken):
    made = tones.recognizer(spoken)
    return SpeechSet(spoken, made.front_end, made.tokenizer, progress=False)


def test_the_penalty_is_part_of_what_is_trained(spoken, speech, tmp_path):
    def distance(strength):
        config = S8BQATConfig(2, strength=strength, compress_every=100)
        recognizer = tones.recognizer(spoken).prepare({"joint.*": config, "*": gq.GQConfig()})
        model = Trainer(recognizer.model, speech, CONFIG, tmp_path / str(strength), progress=False).run()
        return gq.penalty(model).item() / strength

    assert distance(10.0) < 0.7 * distance(1e-6)


@pytest.mark.parametrize("quantization", [LSQConfig(2), {"joint.*": S8BQATConfig(3), "*": UniformConfig(5)}])
def test_recognizers_keep_their_methods_in_files(spoken, tmp_path, quantization):
    recognizer = tones.recognizer(spoken).prepare(quantization).eval()
    for stage in ("qat", "packed"):
        recognizer.save(tmp_path / stage)
        loaded = type(recognizer).load(tmp_path / stage)
        assert (loaded.stage, loaded.quantization) == (stage, recognizer.quantization)
        features, lengths = torch.randn(1, 40, recognizer.model.config.features), torch.tensor([40])
        assert loaded.recognize(features, lengths) == recognizer.recognize(features, lengths)
        if stage == "qat":
            recognizer.convert()
