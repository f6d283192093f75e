"""OpenAI's Whisper, small and with random weights: its layers are subclasses, and its output reads an embedding."""

import pytest
import torch
from lifecycle import check_lifecycle, seeded
from torch import nn

whisper = pytest.importorskip("whisper.model", reason="openai-whisper is not installed")


def build():
    text, audio = dict(n_text_ctx=16, n_text_state=32, n_text_head=2), dict(n_audio_ctx=20, n_audio_state=32)
    layers = dict(n_audio_layer=2, n_text_layer=2, n_audio_head=2, n_mels=16, n_vocab=50)
    model = seeded(lambda: whisper.Whisper(whisper.ModelDimensions(**text, **audio, **layers)))
    seeded(nn.init.normal_, model.decoder.positional_embedding)  # which is left as memory happens to be
    return model


def logits(model):
    mel, tokens = torch.randn(2, 16, 40), torch.randint(50, (2, 6))
    return model(mel, tokens)


def loss(model):
    return nn.functional.cross_entropy(logits(model).flatten(0, 1), torch.randint(50, (12,)))


def test_the_model_from_preparing_to_loading(tmp_path):
    loaded = check_lifecycle(build, loss, logits, tmp_path)
    assert {type(layer).__name__ for layer in loaded.modules()} >= {"PackedLinear", "PackedConv1d", "PackedEmbedding"}
    assert isinstance(loaded.encoder.conv1, whisper.Conv1d)
