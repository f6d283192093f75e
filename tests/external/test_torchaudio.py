"""Models of torchaudio, with random weights. torchaudio is a build for one version of torch and does not import beside
others."""

import pytest
import torch
from lifecycle import check_lifecycle, seeded

try:
    from torchaudio import models
except (ImportError, OSError) as error:
    pytest.skip(f"torchaudio does not import: {error}", allow_module_level=True)

LENGTHS = torch.tensor([20, 18])
TOKENS = torch.tensor([[1, 2, 3], [4, 1, 0]], dtype=torch.int32)
EXTRACTOR = dict(
    extractor_mode="group_norm",
    extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
    extractor_conv_bias=True,
    encoder_embed_dim=16,
    encoder_projection_dropout=0.0,
    encoder_pos_conv_kernel=8,
    encoder_pos_conv_groups=2,
    encoder_num_layers=2,
    encoder_num_heads=4,
    encoder_attention_dropout=0.0,
    encoder_ff_interm_features=24,
    encoder_ff_interm_dropout=0.0,
    encoder_dropout=0.0,
    encoder_layer_norm_first=False,
    encoder_layer_drop=0.0,
    aux_num_out=10,
)
EMFORMER_RNNT = dict(
    input_dim=16,
    encoding_dim=16,
    num_symbols=10,
    segment_length=8,
    right_context_length=4,
    time_reduction_input_dim=4,
    time_reduction_stride=4,
    transformer_num_heads=2,
    transformer_ffn_dim=24,
    transformer_num_layers=2,
    transformer_dropout=0.0,
    transformer_activation="gelu",
    transformer_left_context_length=8,
    transformer_max_memory_size=0,
    transformer_weight_init_scale_strategy="depthwise",
    transformer_tanh_on_mem=True,
    symbol_embedding_dim=8,
    num_lstm_layers=2,
    lstm_layer_norm=True,
    lstm_layer_norm_epsilon=1e-3,
    lstm_dropout=0.0,
)


def emformer():
    return models.Emformer(16, 4, 24, 2, segment_length=4, left_context_length=8, right_context_length=2)


def features(length=20):
    return seeded(torch.randn, 2, length, 16)


def wave():
    return seeded(torch.randn, 2, 800)


MODELS = {
    "Emformer": (emformer, lambda model: model(features(), LENGTHS - 2)[0]),
    "Emformer, streaming": (emformer, lambda model: model.infer(features(6), torch.tensor([6, 6]))[0]),
    "Conformer": (lambda: models.Conformer(16, 4, 24, 2, 5), lambda model: model(features(), LENGTHS)[0]),
    "Conformer, convolution first": (
        lambda: models.Conformer(16, 4, 24, 2, 5, use_group_norm=True, convolution_first=True),
        lambda model: model(features(), LENGTHS)[0],
    ),
    "Emformer RNN-T": (
        lambda: models.emformer_rnnt_model(**EMFORMER_RNNT),
        lambda model: model(features(), LENGTHS, TOKENS, torch.tensor([3, 2], dtype=torch.int32))[0],
    ),
    "Wav2Vec2": (lambda: models.wav2vec2_model(**EXTRACTOR), lambda model: model(wave())[0]),
    "WavLM": (  # reads the weights of its attention modules
        lambda: models.wavlm_model(**EXTRACTOR, encoder_num_buckets=32, encoder_max_distance=80),
        lambda model: model(wave())[0],
    ),
    "ConvTasNet": (  # takes views of convolutions' outputs
        lambda: models.ConvTasNet(2, 4, 16, 3, 8, 8, 2, 1),
        lambda model: model(wave()[:, None]),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_preparing_to_loading(name, tmp_path):
    build, output_of = MODELS[name]
    check_lifecycle(lambda: seeded(build), lambda model: output_of(model).square().mean(), output_of, tmp_path, 1.5)
