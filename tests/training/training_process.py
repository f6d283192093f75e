"""One training process, alone or under torchrun: `training_process.py OUTPUT KIND [NAME=VALUE ...]`; KIND is float,
quantized or bifocal."""

import sys

import tones
import torch

import gq_triton as gq
from gq_triton.training import SpeechSet, TrainConfig, Trainer
from gq_triton.training.distributed import process_group


def main(output: str, kind: str, *settings: str) -> None:
    torch.set_num_threads(1)
    config = TrainConfig(batch_size=4, learning_rate=1e-2).changed(dict(text.split("=") for text in settings))
    spoken = tones.utterances(14)
    small = dict(small_encoder_layers=2, small_encoder_hidden=8) if kind == "bifocal" else {}
    recognizer = tones.recognizer(spoken, dropout=0.1 if config.freq_masks else 0.0, **small)
    speech = SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, progress=False)
    if kind == "quantized":
        recognizer.prepare(gq.GQConfig(bits=3))
    with process_group():
        Trainer(recognizer.model, speech, config, output).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
