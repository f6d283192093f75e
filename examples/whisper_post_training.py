"""Quantize Whisper without training it, and compare what it generates and what it weighs.

    pip install -e ".[external]"
    python examples/whisper_post_training.py                                        # small, random weights, offline
    python examples/whisper_post_training.py --model openai/whisper-base.en --audio talk.wav --bits 8 6 5 4

For every width, prints how many times smaller the model is, the least SQNR of a weight, how often the next token is
the float model's after the same ones before, and what it generates: text, or the numbers of tokens where weights are
random. Writes the last model to --output, packed.
"""

import argparse
import copy

import torch
import transformers
from torch import Tensor, nn

import gq_triton as gq
from gq_triton.speech.audio import load_audio

SIZES = dict(d_model=128, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256)
HEADS = dict(encoder_attention_heads=4, decoder_attention_heads=4)
TOKENS = dict(vocab_size=500, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3)


def random_model() -> nn.Module:
    lists = dict(suppress_tokens=None, begin_suppress_tokens=None)
    config = transformers.WhisperConfig(**SIZES, **HEADS, **TOKENS, **lists, max_source_positions=100, init_std=0.08)
    return transformers.WhisperForConditionalGeneration(config)


@torch.no_grad()
def next_tokens(model: nn.Module, features: Tensor, tokens: Tensor) -> Tensor:
    return model(input_features=features, decoder_input_ids=tokens).logits.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or folder of a checkpoint; default: a small model with random weights")
    parser.add_argument("--audio", help="a recording of at most 30 s; default: noise")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--output", default="whisper.safetensors")
    args = parser.parse_args()
    if (args.model is None) != (args.audio is None):
        parser.error("--model and --audio go together: random weights recognize nothing")

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if args.model is None:
        model, processor, features = random_model().eval(), None, torch.randn(1, 80, 200)
    else:
        model = transformers.WhisperForConditionalGeneration.from_pretrained(args.model).eval()
        processor = transformers.WhisperProcessor.from_pretrained(args.model)
        features = processor(load_audio(args.audio).numpy(), sampling_rate=16000, return_tensors="pt").input_features

    def text(tokens: Tensor) -> str:
        return processor.decode(tokens, skip_special_tokens=True) if processor else f"{tokens[:12].tolist()} ..."

    tokens = model.generate(input_features=features, max_new_tokens=100)
    expected = next_tokens(model, features, tokens)
    print(f"float: {gq.report(model).float32_bytes:,} bytes; {text(tokens[0])}")
    for bits in args.bits:
        packed = gq.quantize_(copy.deepcopy(model), gq.GQConfig(bits=bits), step="prepare")
        gq.quantize_(packed, step="convert")
        report = gq.report(packed)
        least = min(row.sqnr_db for row in report.rows if row.sqnr_db is not None)
        alike = (next_tokens(packed, features, tokens) == expected).float().mean()
        found = text(packed.generate(input_features=features, max_new_tokens=100)[0])
        print(f"{bits} bits: {report.ratio:.2f} times smaller, {least:.1f} dB, {alike:.0%} of tokens alike; {found}")
    gq.save_packed(packed, args.output)


if __name__ == "__main__":
    main()
