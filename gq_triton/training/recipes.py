"""Settings that suit a data set; every one can be changed on the command line.

Those of `synthetic` and `an4` were found by measurement, the latter's parts one by one: pretraining on a CTC model, the
Conformer without it. Those of `librispeech` and `manifest` are a start that no full run has confirmed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from tqdm import tqdm

from gq_triton import GQConfig
from gq_triton.models import model_of, preset
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.features import LogMel
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import train_tokenizer

from .config import TrainConfig
from .distributed import is_main

__all__ = ["ALLOCATIONS", "RECIPES", "Recipe", "recipe_of"]

# Forty filters do not resolve the harmonics of a voice, so few speakers suffice to learn from; the running mean takes
# their channels out.
SMALL_SET_FRONT_END = {"n_mels": 40, "adapt_frames": 100, "tail_ms": 300}
STATISTICS_UTTERANCES = 500  # that the front end's mean and deviation are measured on


#: Widths by name pattern: uniform ones, and one whose second encoder LSTM and predictor LSTM have 1 bit.
ALLOCATIONS: dict[str, dict[str, GQConfig | None]] = {
    "8 bits": {"*": GQConfig(bits=8)},
    "5 bits": {"*": GQConfig(bits=5)},
    "4 bits": {"*": GQConfig(bits=4)},
    "2 bits": {"*": GQConfig(bits=2)},
    "1 bit": {"*": GQConfig(bits=1)},
    "mixed, LSTMs at 1 bit": {
        "encoder.layers.1": GQConfig(bits=1),
        "predictor.lstm": GQConfig(bits=1),
        "*": GQConfig(bits=4),
    },
}


@dataclass(frozen=True)
class Recipe:
    """How to train on a data set.

    Attributes:
        preset: sizes of the model, a name in ``gq_triton.models.PRESETS``.
        sizes: what is changed in them; ``{"predictor_layers": 0}`` makes it a CTC model.
        tokenizer: "word", "char" or "subword"; ``vocab_size`` counts for subwords.
        front_end: arguments of :class:`gq_triton.speech.features.LogMel`.
        train: float training on the set.
        pretrain: float training before that, on ``spoken`` utterances of synthetic voices that say the set's words
            (:func:`gq_triton.speech.synthetic.spoken_transcripts`); None for none.
        qat: quantization-aware training from the float model.
        beam_width: hypotheses kept in decoding; 1 is greedy.
        allocations: names in ``ALLOCATIONS`` that a comparison of widths takes.
    """

    preset: str
    tokenizer: str
    vocab_size: int
    front_end: Mapping[str, int]
    train: TrainConfig
    qat: TrainConfig
    pretrain: TrainConfig | None = None
    spoken: int = 5000
    sizes: Mapping[str, float] = field(default_factory=dict)
    beam_width: int = 1
    allocations: tuple[str, ...] = ("8 bits", "5 bits", "4 bits", "2 bits", "mixed, LSTMs at 1 bit")

    def untrained(self, utterances: Sequence[Utterance], seed: int) -> Recognizer:
        """A float recognizer for the sound and the transcripts of a training set, with weights drawn from ``seed``."""
        sample = utterances[:: -(-len(utterances) // STATISTICS_UTTERANCES)]
        bar = tqdm(sample, desc="statistics", unit="utt", leave=False, disable=not is_main())
        front_end = LogMel(**self.front_end).fit(utterance.load() for utterance in bar)
        tokenizer = train_tokenizer(self.tokenizer, [utterance.text for utterance in utterances], self.vocab_size)
        torch.manual_seed(seed)
        config = preset(self.preset, tokenizer.vocab_size, features=front_end.n_mels, **self.sizes)
        return Recognizer(front_end, tokenizer, model_of(config))


AN4_FLOAT = TrainConfig(
    epochs=40,
    batch_size=6,
    learning_rate=1.5e-3,
    final_learning_rate=0.0,
    warmup=0.03,
    ctc_weight=1.0,
    blank_bonus=1.0,
    average_decay=0.998,
    speeds=(0.9, 1.0, 1.1),
    join=0.4,
    freq_width=7,
    time_masks=3,
    time_fraction=0.03,
    feature_noise=0.1,
)

# Synthetic voices are no likeness of real ones, but a recognizer that knows the words from them learns real voices in a
# third of the time, and mistakes fewer words in the end.
AN4_PRETRAIN = replace(
    AN4_FLOAT, epochs=4, batch_size=12, curriculum_epochs=1, average_decay=0.99, speeds=(1.0,), join=0.0
)

AN4 = Recipe(
    preset="small",
    tokenizer="word",
    vocab_size=128,
    front_end=SMALL_SET_FRONT_END,
    pretrain=AN4_PRETRAIN,
    train=AN4_FLOAT,
    qat=replace(
        AN4_FLOAT, epochs=5, learning_rate=3e-4, one_bit_learning_rate=1e-3, ctc_weight=0.0, average_decay=0.99
    ),
    beam_width=4,
    allocations=("4 bits", "2 bits", "1 bit"),
)

LARGE_FLOAT = TrainConfig(
    epochs=60,
    batch_size=32,
    learning_rate=1e-3,
    ctc_weight=0.3,
    curriculum_epochs=1,
    speeds=(0.9, 1.0, 1.1),
    freq_width=27,
)

# SpecAugment and the share of its time masks as Gulati et al. (arXiv 2005.08100) took them for this corpus.
LIBRISPEECH_FLOAT = replace(
    LARGE_FLOAT,
    batch_seconds=2400.0,
    max_seconds=20.0,
    average_decay=0.999,
    time_masks=10,
    evaluate_every=1,
    checkpoint_every=1000,
)

RECIPES = {
    "synthetic": Recipe(
        preset="tiny",
        tokenizer="word",
        vocab_size=64,
        front_end=SMALL_SET_FRONT_END,
        train=TrainConfig(epochs=10, batch_size=12, learning_rate=3e-3, ctc_weight=0.5, curriculum_epochs=1),
        qat=TrainConfig(epochs=1, batch_size=12, learning_rate=5e-4),
    ),
    "an4": AN4,
    "librispeech": Recipe(
        preset="base",
        tokenizer="subword",
        vocab_size=512,
        front_end={"tail_ms": 300},
        train=LIBRISPEECH_FLOAT,
        qat=replace(LIBRISPEECH_FLOAT, epochs=10, learning_rate=2e-4, ctc_weight=0.0, curriculum_epochs=0),
    ),
    "manifest": Recipe(
        preset="small",
        tokenizer="subword",
        vocab_size=256,
        front_end={"tail_ms": 300},
        train=replace(LARGE_FLOAT, batch_size=16),
        qat=replace(LARGE_FLOAT, epochs=10, batch_size=16, learning_rate=3e-4, ctc_weight=0.0, curriculum_epochs=0),
    ),
}

#: What a Conformer wants where the data set's own recipe does not suit it.
CONFORMER_RECIPES = {
    "an4": replace(
        AN4,
        preset="conformer-tiny",
        pretrain=replace(AN4_PRETRAIN, learning_rate=1e-3, warmup=0.1),
        train=replace(AN4_FLOAT, learning_rate=1e-3, warmup=0.1),
    )
}


def recipe_of(data: str, architecture: str | None = None) -> Recipe:
    """How to train on a data set: the recipe of an architecture ("rnnt" or "conformer"), where it has one of its own,
    or of the data set; that of the data set by default."""
    recipes = CONFORMER_RECIPES if architecture == "conformer" else RECIPES
    return recipes.get(data, RECIPES[data])
