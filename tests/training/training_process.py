"""Training runs in one process, alone or under torchrun:

    training_process.py OUTPUT KIND PARALLEL [NAME=VALUE ...] [-- OUTPUT KIND PARALLEL [NAME=VALUE ...]] ...

KIND is float, quantized, conformer (quantized, too) or bifocal; `stop=N` among the settings ends a run before its step
N. A run leaves its model as process R has it at the end in OUTPUT/model-R.pt.
"""

import sys
from contextlib import suppress
from itertools import groupby

import tones
import torch

import gq_triton as gq
from gq_triton.models import ConformerConfig, model_of
from gq_triton.speech.recognizer import Recognizer
from gq_triton.training import SpeechSet, TrainConfig, Trainer
from gq_triton.training.distributed import process_group, rank


class Stopped(Exception):
    """Stands for the end of all processes."""


def train(output: str, kind: str, parallel: str, *settings: str) -> None:
    changes = dict(text.split("=") for text in settings)
    stop = int(changes.pop("stop", -1))
    config = TrainConfig(batch_size=4, learning_rate=1e-2).changed(changes)
    recognizer, speech = recognizer_and_speech(kind, dropout=0.1 if config.freq_masks else 0.0)

    def evaluate() -> dict[str, float]:
        norms = [parameter.norm() ** 2 for parameter in recognizer.model.parameters()]
        return {"norm": torch.stack(norms).sum().sqrt().item()}

    trainer = Trainer(recognizer.model, speech, config, output, evaluate=evaluate, parallel=parallel)
    update = trainer.update

    def update_or_stop(*arguments):
        if trainer.step == stop:
            raise Stopped
        return update(*arguments)

    trainer.update = update_or_stop
    with suppress(Stopped):
        torch.save(trainer.run().state_dict(), f"{output}/model-{rank()}.pt")


def recognizer_and_speech(kind: str, dropout: float) -> tuple[Recognizer, SpeechSet]:
    spoken = tones.utterances(14)
    small = dict(small_encoder_layers=2, small_encoder_hidden=8) if kind == "bifocal" else {}
    recognizer = tones.recognizer(spoken, dropout=dropout, **small)
    if kind == "conformer":
        sizes = dict(encoder_layers=1, encoder_size=32, channels=4, dropout=dropout)
        recognizer.model = model_of(ConformerConfig.preset("tiny", recognizer.tokenizer.vocab_size, **sizes))
    if kind in ("quantized", "conformer"):
        recognizer.prepare(gq.GQConfig(bits=3))
    return recognizer, SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, progress=False)


def main(*arguments: str) -> None:
    torch.set_num_threads(1)
    runs = [list(run) for separator, run in groupby(arguments, lambda text: text == "--") if not separator]
    with process_group():
        for run in runs:
            train(*run)


if __name__ == "__main__":
    main(*sys.argv[1:])
