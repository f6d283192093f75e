"""Quantize a wav2vec 2.0 Conformer of Hugging Face to 4 bits and train it so, with CTC.

    pip install -e ".[external]"
    python examples/wav2vec2_conformer.py               # small, from random weights, on tones, offline
    python examples/wav2vec2_conformer.py --model facebook/wav2vec2-conformer-rope-large-960h-ft --audio FOLDER

FOLDER has recordings (talk.wav) beside their transcripts (talk.txt). Prints how many letters of them are wrong, float,
quantized, and after training (which wants a small --lr, 1e-5, where weights are not random), and the size of every
weight; writes the packed model to --output.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as tf

import gq_triton as gq
from gq_triton.speech.audio import load_audio
from gq_triton.speech.metrics import cer

LETTERS = "abcdefgh"  # of the language of tones
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=10)
EXTRACTOR = dict(conv_dim=(32, 32, 32), conv_kernel=(10, 8, 4), conv_stride=(8, 8, 5), num_feat_extract_layers=3)
OTHERS = dict(position_embeddings_type="rotary", conv_depthwise_kernel_size=7, layerdrop=0.0, mask_time_prob=0.0)


def tones() -> list[tuple[np.ndarray, str]]:
    """Recordings (16 kHz) of four letters each, which are pitches, and their transcripts."""
    letters, time = np.random.default_rng(0).integers(len(LETTERS), size=(16, 4)), np.arange(2000) / 16000
    waves = np.sin(2 * np.pi * 300 * 1.4 ** letters[..., None] * time) * np.sin(np.pi * 8 * time)
    return [(wave.ravel(), "".join(LETTERS[i] for i in row)) for wave, row in zip(waves, letters, strict=True)]


def random_model() -> tuple[torch.nn.Module, tf.Wav2Vec2Processor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps({token: i for i, token in enumerate(["<pad>", *LETTERS, "<unk>"])}))
        tokenizer = tf.Wav2Vec2CTCTokenizer(str(path), bos_token=None, eos_token=None)
    model = tf.Wav2Vec2ConformerForCTC(tf.Wav2Vec2ConformerConfig(**SIZES, **EXTRACTOR, **OTHERS))
    return model, tf.Wav2Vec2Processor(tf.Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a checkpoint; default: a small model with random weights")
    parser.add_argument("--audio", type=Path, help="folder of recordings and transcripts; default: tones")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", default="wav2vec2_conformer.safetensors")
    args = parser.parse_args()

    torch.manual_seed(0)
    model, processor = random_model()
    if args.model is not None:
        model = tf.Wav2Vec2ConformerForCTC.from_pretrained(args.model)
        processor = tf.Wav2Vec2Processor.from_pretrained(args.model)
    model.config.ctc_loss_reduction, model.config.ctc_zero_infinity = "mean", True
    model.wav2vec2_conformer.encoder.pos_conv_embed = torch.nn.Identity()  # never called, and large
    paths = sorted(args.audio.glob("*.wav")) if args.audio else []
    spoken = [(load_audio(path).numpy(), path.with_suffix(".txt").read_text().strip()) for path in paths] or tones()
    waves, texts = map(list, zip(*spoken, strict=True))
    audio = processor(waves, sampling_rate=16000, padding=True, return_tensors="pt")
    words = processor.tokenizer(texts, padding=True, return_tensors="pt")
    batch = {**audio, "labels": words.input_ids.masked_fill(words.attention_mask == 0, -100)}

    def report(kind: str) -> None:
        with torch.no_grad():
            found = processor.batch_decode(model.eval()(**audio).logits.argmax(-1))
        print(f"{kind}: {cer(texts, found):.1%} of letters wrong, such as {found[0]!r} for {texts[0]!r}")

    report("float")
    gq.quantize_(model, gq.GQConfig(bits=4), step="prepare")
    report("quantized")
    optimizer = torch.optim.AdamW(gq.param_groups(model.train(), lr=args.lr, weight_decay=1e-2))
    annealer = gq.Annealer(model, total_steps=args.steps)
    for _ in range(args.steps):
        rows = torch.randperm(len(texts))[:8]
        optimizer.zero_grad()
        model(**{name: values[rows] for name, values in batch.items()}).loss.backward()
        optimizer.step()
        annealer.step()
    gq.quantize_(model, step="convert")
    report("trained and packed")
    print(gq.report(model))
    gq.save_packed(model, args.output)


if __name__ == "__main__":
    main()
