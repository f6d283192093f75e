"""Word error rates and losses of a recognizer on a set of utterances."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from gq_triton.models.rnnt import BifocalEncoder
from gq_triton.speech.metrics import bootstrap_interval, wer
from gq_triton.speech.recognizer import Recognizer

from .data import SpeechSet
from .objective import objective_of

__all__ = ["Evaluation", "evaluate", "loss_per_token"]


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        wer: word error rate, a fraction.
        interval: its 95 % bootstrap interval, drawn over speakers where several are known, else over utterances.
        utterances, words: of the references.
        seconds: spent on decoding; ``audio_seconds``: length of what was decoded.
        hypotheses: texts, in the set's order.
    """

    wer: float
    interval: tuple[float, float]
    utterances: int
    words: int
    seconds: float
    audio_seconds: float
    hypotheses: list[str]

    def to_dict(self) -> dict:
        """Everything but the hypotheses, JSON-able."""
        return {
            "wer": self.wer,
            "interval": list(self.interval),
            "utterances": self.utterances,
            "words": self.words,
            "seconds": self.seconds,
            "audio_seconds": self.audio_seconds,
        }


def evaluate(
    recognizer: Recognizer, data: SpeechSet, *, beam_width: int = 1, batch_size: int = 32, progress: bool = True
) -> Evaluation:
    """Transcribes every utterance and compares; a prepared recognizer is measured as it would be deployed, packed."""
    if recognizer.stage == "qat":
        recognizer = recognizer.packed_copy()
    hypotheses = [""] * len(data)
    bar = tqdm(total=len(data), desc="recognizing", unit="utt", leave=False, disable=not progress)
    started = time.perf_counter()
    for indices, batch in data.in_order(batch_size):
        texts = recognizer.recognize(batch.features, batch.feature_lengths, beam_width=beam_width)
        for index, text in zip(indices, texts, strict=True):
            hypotheses[index] = text
        bar.update(len(indices))
    seconds = time.perf_counter() - started
    bar.close()
    speakers = [utterance.speaker for utterance in data.utterances]
    several = all(speakers) and len(set(speakers)) > 1  # resampling a single one would always give the same
    return Evaluation(
        wer=wer(data.texts, hypotheses),
        interval=bootstrap_interval(data.texts, hypotheses, groups=speakers if several else None),
        utterances=len(data),
        words=sum(len(text.split()) for text in data.texts),
        seconds=seconds,
        audio_seconds=sum(data.durations),
        hypotheses=hypotheses,
    )


@torch.inference_mode()
def loss_per_token(recognizer: Recognizer, data: SpeechSet, *, batch_size: int = 16) -> float:
    """The transducer or CTC loss of the transcripts, in nats per token, without dropout and augmentation; of a packed
    recognizer that of its packed weights. It tells small changes of a model that change no word. Of a bifocal model it
    is the mean of both encoders'."""
    objective = objective_of(recognizer.model)
    bifocal = isinstance(recognizer.model.encoder, BifocalEncoder)
    total, tokens = 0.0, 0
    for _, batch in data.in_order(batch_size):
        batch = batch.to(recognizer.device)
        tensors = batch.features, batch.feature_lengths, batch.targets, batch.target_lengths
        for switch in (None, batch.feature_lengths) if bifocal else (None,):
            total += objective(*tensors, switch).item()
            tokens += int(batch.target_lengths.sum())
    return total / max(tokens, 1)
