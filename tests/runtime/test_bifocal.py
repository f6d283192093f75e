"""Packed bifocal recognizers without torch, beside the same with torch."""

import math

import numpy as np
import pytest
import tones
import torch

from gq_triton import GQConfig
from gq_triton.runtime import Runner
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import StreamingRecognizer

pytestmark = pytest.mark.usefixtures("needs_native")

SWITCHES = [0, 0.07, 0.08, 0.3, 0.48, 5, math.inf]  # within and between encoder frames of 80 ms and chunks


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Recognizer, Runner]:
    """Untrained, but talkative; in floats, whose sums differ in their last digits only."""
    recognizer = tones.recognizer(tones.utterances(4), small_encoder_layers=2, small_encoder_hidden=12)
    with torch.no_grad():
        for parameter in recognizer.model.parameters():
            parameter.mul_(4)
        recognizer.model.joint.output.bias[0] += 2
    recognizer = recognizer.packed_copy(GQConfig(bits=6)).eval()
    path = tmp_path_factory.mktemp("bifocal") / "model.safetensors"
    recognizer.save(path)
    return recognizer, Runner.load(path)


@pytest.fixture(scope="module")
def wave():
    return tones.utterances(1, seed=1)[0].load()


def texts(stream, wave, switch, sizes) -> list[str]:
    """After each push and at the end."""
    stream.reset()
    stream.switch_at(switch)
    found = [stream.push(part) for part in wave.split(sizes)] + [stream.finish()]
    return [getattr(result, "text", result) for result in found]


class OnNumpy:
    """A stream that takes tensors."""

    def __init__(self, stream):
        self.reset, self.switch_at, self.finish = stream.reset, stream.switch_at, stream.finish
        self.push = lambda part: stream.push(part.numpy())


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 40])
def test_encoders_give_what_torch_s_give(packed, chunk):
    recognizer, runner = packed
    features = torch.randn(1, 40, 80)
    for switch in (0, 7, 8, 24, 39, 40, 1000):
        with torch.inference_mode():
            expected, _ = recognizer.model.encoder(features, torch.tensor([40]), torch.tensor([switch]))
        state, parts = runner.model.encoder.start(switch // 8), []
        for part in features[0].split(chunk):
            encoded, state = runner.model.encoder.stream(part.numpy(), state)
            parts.append(encoded)
        np.testing.assert_allclose(np.concatenate(parts), expected[0].numpy(), rtol=1e-3, atol=1e-4)
        assert state.left == max(0, switch // 8 - 5)


def test_streams_give_what_torch_streams_give(packed, wave):
    recognizer, runner = packed
    expected, found = StreamingRecognizer(recognizer), OnNumpy(runner.stream())
    ends = set()
    for switch in SWITCHES:
        heard = texts(found, wave, switch, 1700)
        assert heard == texts(expected, wave, switch, 1700)
        ends.add(heard[-1])
    assert len(ends) > 2


def test_without_a_switch_the_large_encoder_takes_all(packed, wave):
    recognizer, runner = packed
    assert (
        runner.transcribe(wave.numpy())
        == recognizer.transcribe(wave)
        == texts(OnNumpy(runner.stream()), wave, 0, 9999)[-1]
    )


def test_the_end_of_a_wake_word_may_become_known_later(packed, wave):
    stream = packed[1].stream()
    for told, same in [(0.4, 0.4), (0.1, 0.24), (math.inf, 9)]:  # 0.24 s have been encoded by then
        expected = texts(OnNumpy(stream), wave, same, 9999)[-1]
        stream.reset()
        stream.switch_at(math.inf)
        stream.push(wave[:5000].numpy())
        stream.switch_at(told)
        stream.push(wave[5000:].numpy())
        assert stream.finish() == expected


def test_switches_that_cannot_be_are_refused(packed, wave):
    stream = packed[1].stream()
    for seconds in (-0.1, math.nan, "1", None, True):
        with pytest.raises(ValueError, match="seconds must be a number from 0 on, got"):
            stream.switch_at(seconds)
    stream.push(wave[:9000].numpy())
    with pytest.raises(ValueError, match="has switched already"):
        stream.switch_at(5)
    stream.finish()
    with pytest.raises(ValueError, match="has finished"):
        stream.switch_at(5)


def test_models_without_a_small_encoder_do_not_switch(tmp_path):
    tones.recognizer(tones.utterances(2)).packed_copy(GQConfig(bits=4)).save(tmp_path / "m")
    with pytest.raises(ValueError, match="small_encoder_layers is 0"):
        Runner.load(tmp_path / "m").stream().switch_at(0.5)
