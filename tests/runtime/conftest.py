"""A packed recognizer that understands tones, as a file."""

import pytest
import tones

from gq_triton import GQConfig
from gq_triton.kernels import native
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training import SpeechSet, TrainConfig, Trainer


@pytest.fixture(scope="session")
def needs_native():
    if not native.available():
        pytest.skip(f"the native kernels are not available: {native.reason()}")


@pytest.fixture(scope="session")
def spoken():
    return tones.utterances(24)


@pytest.fixture(scope="session")
def trained(spoken, tmp_path_factory) -> Recognizer:
    """A float recognizer."""
    recognizer = tones.recognizer(spoken, dropout=0.0, encoder_projection=20, predictor_layers=2)
    speech = SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, progress=False)
    config = TrainConfig(epochs=40, batch_size=6, learning_rate=1e-2, ctc_weight=0.3, freq_masks=0, time_masks=0)
    Trainer(recognizer.model, speech, config, tmp_path_factory.mktemp("run"), progress=False).run()
    return recognizer.cpu().eval()


@pytest.fixture(scope="session")
def save(trained, tmp_path_factory):
    """Packs the trained recognizer; returns the file and the packed recognizer."""

    def packed_file(quantization):
        packed = trained.packed_copy(quantization).eval()
        path = tmp_path_factory.mktemp("packed") / "model.safetensors"
        packed.save(path)
        return path, packed

    return packed_file


@pytest.fixture(scope="session")
def packed(save):
    """At 5 bits, on integers throughout."""
    return save({"*": GQConfig(bits=5, codebook="int8", activations="int8")})
