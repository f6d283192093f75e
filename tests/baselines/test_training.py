"""Rival methods in the trainer of recognizers."""

import pytest
import tones
import torch

import gq_triton as gq
from gq_triton.baselines import KMeansConfig, LSQConfig, S8BQATConfig, UniformConfig
from gq_triton.training import SpeechSet, TrainConfig, Trainer

CONFIG = TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, average_decay=0.8, checkpoint_every=2)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module")
def spoken():
    return tones.utterances(12)


@pytest.fixture(scope="module")
def speech(spoken):
    made = tones.recognizer(spoken)
    return SpeechSet(spoken, made.front_end, made.tokenizer, progress=False)


@pytest.mark.parametrize("quantization", [UniformConfig(2), KMeansConfig(2), LSQConfig(2), S8BQATConfig(2)])
def test_a_killed_run_ends_with_the_same_weights(spoken, speech, tmp_path, monkeypatch, quantization):
    if isinstance(quantization, S8BQATConfig):
        quantization = S8BQATConfig(2, compress_every=3)

    def trainer(folder):
        model = tones.recognizer(spoken).prepare(quantization).model
        return Trainer(model, speech, CONFIG, tmp_path / folder, progress=False)

    whole = trainer("whole").run()
    step = gq.Annealer.step

    def step_until_killed(annealer):
        if annealer.steps == 3:
            raise Killed
        step(annealer)

    with monkeypatch.context() as patch:
        patch.setattr(gq.Annealer, "step", step_until_killed)
        with pytest.raises(Killed):
            trainer("broken").run()
    torch.manual_seed(1234)
    resumed = trainer("broken").run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


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
