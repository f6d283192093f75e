"""The recognizer that comes with the package."""

import pytest
import torch

from gq_triton.pretrained import AN4
from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import an4
from gq_triton.speech.metrics import wer
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.synthetic import synthesize

SPOKEN = {
    "one. two. three.": "ONE TWO THREE",
    "seven. nine. zero. four.": "SEVEN NINE ZERO FOUR",
    "k. m. x. y.": "K M X Y",
}


@pytest.fixture(scope="module")
def recordings():
    """Each of the texts between moments of silence, as recordings have them."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
    return [0.3 * torch.nn.functional.pad(synthesize(text, "en-us+m1", rate=150), (4800, 4800)) for text in SPOKEN]


def test_it_is_packed_and_small():
    assert AN4.stat().st_size < 1e6
    assert Recognizer.load(AN4).stage == "packed"


def test_it_understands_a_voice_that_spells_and_counts(recordings):
    recognizer = Recognizer.load(AN4)
    assert wer(list(SPOKEN.values()), [recognizer.transcribe(samples) for samples in recordings]) < 0.1


def test_it_understands_speakers_it_never_heard(an4_root):
    recognizer, spoken = Recognizer.load(AN4), an4(an4_root, "test")[::3]
    heard = [recognizer.transcribe(utterance.load()) for utterance in spoken]
    assert wer([utterance.text for utterance in spoken], heard) < 0.2


def test_transcribe_takes_it_where_no_model_is_given(gq_triton, recordings, tmp_path):
    file = tmp_path / "recording.wav"
    save_audio(file, recordings[0])
    assert gq_triton.succeeds("transcribe", file).strip() == "ONE TWO THREE"
