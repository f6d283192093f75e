"""Speech models of Hugging Face transformers: small ones with random weights, which need no network."""

import os

import pytest
import torch
from lifecycle import FOUR_BITS, check_lifecycle, seeded
from quantized import same
from torch import nn

import gq_triton as gq

os.environ.setdefault("HF_HUB_OFFLINE", "1")
tf = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[external]'")

WAV2VEC2 = dict(
    vocab_size=20,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    mask_time_prob=0.2,
    mask_time_length=4,
    ctc_zero_infinity=True,
)
ENCODER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
DECODER = dict(vocab_size=40, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, pad_token_id=0)
SEQUENCES = dict(
    **DECODER,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)


def waves(length=1600):
    return dict(input_values=torch.randn(2, length), labels=torch.randint(4, 20, (2, 5)))


def features(*shape):
    return dict(input_features=torch.randn(2, *shape), labels=torch.randint(4, 19, (2, 5)))


def masked(*shape):
    return dict(features(*shape), attention_mask=torch.ones(2, shape[0], dtype=torch.long))


def wav2vec2(name, **options):
    return lambda: getattr(tf, f"{name}ForCTC")(getattr(tf, f"{name}Config")(**{**WAV2VEC2, **options})), waves


def whisper(**options):
    sizes = dict(num_mel_bins=16, max_source_positions=20, max_target_positions=24)
    options = dict(sizes, suppress_tokens=[], begin_suppress_tokens=[], **options)
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SEQUENCES, **options))


def moonshine(**options):
    sizes = dict(hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2)
    heads = dict(encoder_num_attention_heads=4, decoder_num_attention_heads=4)
    return tf.MoonshineForConditionalGeneration(tf.MoonshineConfig(**sizes, **heads, **DECODER, **options))


def moonshine_streaming():
    windows = dict(num_key_value_heads=4, sliding_windows=[[4, 1], [4, 0]])
    config = dict(**ENCODER, **DECODER, num_key_value_heads=4, encoder_config=dict(ENCODER, **windows))
    return tf.MoonshineStreamingForConditionalGeneration(tf.MoonshineStreamingConfig(**config))


def fast_conformer(name):
    encoder = dict(ENCODER, num_mel_bins=16, subsampling_conv_channels=8)
    config = getattr(tf, f"{name}CTCConfig")(vocab_size=20, pad_token_id=0, encoder_config=encoder)
    return getattr(tf, f"{name}ForCTC")(config)


def wav2vec2_bert():
    positions = dict(left_max_position_embeddings=8, right_max_position_embeddings=8)
    config = tf.Wav2Vec2BertConfig(vocab_size=20, **ENCODER, feature_projection_input_dim=16, **positions)
    return tf.Wav2Vec2BertForCTC(config)


def speech_to_text():
    sizes = dict(input_feat_per_channel=16, conv_channels=32, max_source_positions=100, max_target_positions=40)
    return tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**SEQUENCES, **sizes))


def seamless():
    speech = dict(speech_encoder_layers=2, speech_encoder_attention_heads=4, speech_encoder_intermediate_size=48)
    sizes = dict(hidden_size=32, feature_projection_input_dim=16, num_adapter_layers=1, max_position_embeddings=64)
    positions = dict(left_max_position_embeddings=8, right_max_position_embeddings=4)
    options = {name: value for name, value in SEQUENCES.items() if name != "d_model"}
    return tf.SeamlessM4Tv2ForSpeechToText(tf.SeamlessM4Tv2Config(**options, **sizes, **positions, **speech))


def speecht5():
    extractor = {name: value for name, value in WAV2VEC2.items() if "conv" in name or name.endswith("extract_layers")}
    options = {name: value for name, value in SEQUENCES.items() if name != "d_model"}
    lengths = dict(max_speech_positions=200, max_text_positions=40, mask_time_length=2)
    return tf.SpeechT5ForSpeechToText(tf.SpeechT5Config(**options, **extractor, **lengths, hidden_size=32))


MODELS = {
    "Wav2Vec2Conformer, relative": wav2vec2(
        "Wav2Vec2Conformer", position_embeddings_type="relative", max_source_positions=100
    ),
    "Wav2Vec2Conformer, rotary": wav2vec2("Wav2Vec2Conformer", position_embeddings_type="rotary"),
    "Wav2Vec2": wav2vec2("Wav2Vec2"),
    "WavLM": wav2vec2("WavLM"),
    "Whisper": (whisper, lambda: features(16, 40)),
    "Moonshine": (moonshine, lambda: waves(4000)),
    "Parakeet": (lambda: fast_conformer("Parakeet"), lambda: masked(60, 16)),
}
MORE_MODELS = {
    "Wav2Vec2, stable": wav2vec2("Wav2Vec2", do_stable_layer_norm=True, feat_extract_norm="layer", add_adapter=True),
    "Hubert": wav2vec2("Hubert"),
    "UniSpeech": wav2vec2("UniSpeech"),
    "UniSpeechSat": wav2vec2("UniSpeechSat"),
    "SEW": wav2vec2("SEW"),
    "SEWD": wav2vec2("SEWD"),
    "Data2VecAudio": wav2vec2("Data2VecAudio", num_conv_pos_embeddings=3, conv_pos_kernel_size=5),
    "Wav2Vec2Bert": (wav2vec2_bert, lambda: features(30, 16)),
    "Lasr": (lambda: fast_conformer("Lasr"), lambda: masked(80, 16)),
    "Speech2Text": (speech_to_text, lambda: features(40, 16)),
    "SpeechT5": (speecht5, waves),
    "SeamlessM4Tv2": (seamless, lambda: features(40, 16)),
    "MoonshineStreaming": (moonshine_streaming, lambda: waves(4000)),
}
EVERY_MODEL = [*MODELS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE_MODELS)]


def made(name):
    """A function that builds the model, with the same weights at each call, and a batch."""
    build, batch = {**MODELS, **MORE_MODELS}[name]
    return lambda: seeded(build), batch()


def loss(batch):
    return lambda model: model(**batch).loss


def logits(batch):
    return lambda model: model(**batch).logits


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_a_model_from_preparing_to_loading(name, tmp_path):
    build, batch = made(name)
    loaded = check_lifecycle(build, loss(batch), logits(batch), tmp_path)
    with torch.no_grad():
        expected = seeded(logits(batch), loaded)
        batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
        model = gq.load_packed(build().eval().to(torch.bfloat16), tmp_path / "model.safetensors")
        rounded = seeded(logits(batch), model).float()
    assert (rounded - expected).norm() < 0.1 * expected.norm()


# --- generation


def generated(model, **options):
    """Four tokens for each of two utterances, and the scores of each token."""
    inputs = seeded(lambda: features(16, 40) if isinstance(model, tf.WhisperForConditionalGeneration) else waves(4000))
    del inputs["labels"]
    options = dict(max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_scores=True, **options)
    found = model.generate(**inputs, **options)
    return found.sequences, torch.stack(found.scores)


@pytest.mark.parametrize("build", [whisper, moonshine])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_packed_models_generate_what_prepared_ones_do(build, options):
    model = gq.quantize_(seeded(build).eval(), FOUR_BITS)
    tokens, scores = generated(model, **options)
    packed_tokens, packed_scores = generated(gq.quantize_(model, step="convert"), **options)
    assert torch.equal(packed_tokens, tokens)
    same(packed_scores, scores, atol=1e-5)


def test_shared_input_and_output_embeddings_are_packed_once():
    model = gq.quantize_(seeded(whisper), FOUR_BITS)
    decoder = model.model.decoder
    assert model.proj_out.weight is decoder.embed_tokens.weight
    assert model.proj_out.weight_quantizer is decoder.embed_tokens.weight_quantizer
    gq.quantize_(model, step="convert")
    assert model.proj_out.weight_packed is decoder.embed_tokens.weight_packed
    names = [row.name for row in gq.report(model).rows]
    assert "model.decoder.embed_tokens.weight" in names and "proj_out.weight" not in names


def test_patterns_that_part_shared_embeddings_are_refused():
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is shared with proj_out\.weight"):
        gq.quantize_(seeded(whisper), {"model.decoder.*": FOUR_BITS})


# --- options of transformers


@pytest.mark.parametrize("name", ["Whisper", "Wav2Vec2Conformer, rotary"])
def test_attention_implementations_agree(name):
    build, batch = made(name)
    model = gq.quantize_(build().eval(), FOUR_BITS)
    outputs = []
    for step in ("prepared", "packed"):
        if step == "packed":
            gq.quantize_(model, step="convert")
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            with torch.no_grad():
                outputs.append(model(**batch).logits)
    for output in outputs[1:]:
        same(output, outputs[0], atol=1e-5)


@pytest.mark.parametrize("name", ["Wav2Vec2", "Whisper"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    build, batch = made(name)
    gradients = []
    for checkpointing in (False, True):
        model = gq.quantize_(build().train(), FOUR_BITS)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        seeded(loss(batch), model).backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][key] is None), key
        if gradient is not None:
            same(gradients[1][key], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


def test_the_embedding_of_masked_frames_is_trained():
    build, batch = made("Wav2Vec2")
    model = gq.quantize_(build().train(), FOUR_BITS)
    seeded(loss(batch), model).backward()
    assert model.wav2vec2.masked_spec_embed.grad.any()


@pytest.mark.full
@pytest.mark.parametrize("name", ["WavLM", "Whisper"])
def test_compiled(name):
    build, batch = made(name)
    model = gq.quantize_(build().eval(), FOUR_BITS)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        same(compiled(**batch).logits, model(**batch).logits)


def test_float_models_are_saved_and_loaded_as_before(tmp_path):
    build, batch = made("Wav2Vec2")
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    for each in (model, loaded):
        gq.quantize_(each, FOUR_BITS)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)


def test_the_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

    class Annealing(tf.TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.annealer = gq.Annealer(model, state.max_steps)

        def on_optimizer_step(self, *_, **__):
            self.annealer.step()

    build, batch = made("Whisper")
    model = gq.quantize_(build(), FOUR_BITS)
    settings = dict(max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_steps=3)
    args = tf.TrainingArguments(str(tmp_path), **settings, report_to=[], use_cpu=True, disable_tqdm=True)
    optimizer = torch.optim.AdamW(gq.param_groups(model, lr=1e-3, weight_decay=1e-2))
    data = [{key: value[index % 2] for key, value in batch.items()} for index in range(6)]
    callback = Annealing()
    trainer = tf.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert callback.annealer.steps == 3
    resumed = gq.quantize_(build(), FOUR_BITS)
    trainer = tf.Trainer(resumed, args, train_dataset=data)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    with torch.no_grad():
        assert torch.equal(resumed.eval()(**batch).logits, model.eval()(**batch).logits)
