"""What a training run is: one frozen description for float training and quantization-aware training alike."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

__all__ = ["TrainConfig"]

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        epochs: passes over the training set.
        batch_size: utterances per step, over all processes together; counts where ``batch_seconds`` is 0.
        batch_seconds: most seconds of audio per step, over all processes together and padding included, which suits
            speech of varied length; 0 for batches of ``batch_size`` utterances.
        max_seconds: utterances that are longer, at their own speed, are left out; 0 for no limit.
        accumulate: micro-batches per step and process, computed one after another, their gradients added up: a step on
            the same utterances in less memory. Masks, noise and dropout are drawn anew for each micro-batch, so that
            only without them a step is the same up to rounding.
        learning_rate: AdamW's peak rate of weights.
        quantizer_learning_rate: peak rate of scales, centroids and mu; None for ``learning_rate``.
        one_bit_learning_rate: peak rate of weights of one bit, which change where they cross zero only; None for
            ``learning_rate``.
        final_learning_rate: what the cosine decay ends at, as a fraction of the peak.
        warmup: fraction of all steps in which the rate rises linearly to its peak.
        weight_decay: AdamW's, of all parameters but the quantizers': of biases and norms, too.
        clip_norm: largest norm of the whole gradient.
        precision: "float32", or "bfloat16" for products (autocast; weights, losses and sums stay float32); "auto" is
            "bfloat16" on a GPU and "float32" on a CPU, and the trainer records which.
        ctc_weight: of the auxiliary CTC loss on the encoder of a transducer.
        blank_bonus: added to the blank's logits in a transducer's loss, and not in what is decoded, which drops fewer
            words: on few transcripts the label model learns these by heart, and words that do not follow are lost.
        curriculum_epochs: first epochs, in which batches come shortest first and without SpecAugment.
        average_decay: of the moving average of all parameters, which is evaluated and returned; 0 for the last ones.
        seed: of initial weights, batches, dropout and augmentation.
        speeds: factors of speed perturbation.
        join: share of the utterances that are followed by one of their speaker, drawn from all of these.
        freq_masks, freq_width: SpecAugment: masks per utterance, and their largest width in mel bands.
        time_masks, time_fraction: SpecAugment: masks per utterance, and their largest part of it.
        feature_noise: deviation of the Gaussian noise added to normalised features.
        wake_share: of a bifocal model: share of the utterances whose first part, up to a frame drawn anew each time, is
            taken for a wake word, which is the small encoder's; the large one takes the others whole.
        hardness: first and last softmax hardness of quantization-aware training.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_every: steps between checkpoints; the last step always leaves one.
        log_every: steps between rows of the metrics file.
    """

    epochs: int = 30
    batch_size: int = 16
    batch_seconds: float = 0.0
    max_seconds: float = 0.0
    accumulate: int = 1
    learning_rate: float = 2e-3
    quantizer_learning_rate: float | None = None
    one_bit_learning_rate: float | None = None
    final_learning_rate: float = 0.02
    warmup: float = 0.1
    weight_decay: float = 1e-2
    clip_norm: float = 5.0
    precision: str = "auto"
    ctc_weight: float = 0.0
    blank_bonus: float = 0.0
    curriculum_epochs: int = 0
    average_decay: float = 0.0
    seed: int = 0
    speeds: tuple[float, ...] = (1.0,)
    join: float = 0.0
    freq_masks: int = 2
    freq_width: int = 15
    time_masks: int = 2
    time_fraction: float = 0.05
    feature_noise: float = 0.0
    wake_share: float = 0.5
    hardness: tuple[float, float] = (2.0, 16.0)
    evaluate_every: int = 5
    checkpoint_every: int = 200
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every", "checkpoint_every", "log_every"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "a positive integer")
        for name in ("learning_rate", "clip_norm"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        for name in (
            "weight_decay",
            "ctc_weight",
            "blank_bonus",
            "feature_noise",
            "curriculum_epochs",
            "seed",
            "freq_masks",
            "freq_width",
            "time_masks",
            "batch_seconds",
            "max_seconds",
        ):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, "zero or more")
        for name in ("warmup", "final_learning_rate", "average_decay", "join", "time_fraction", "wake_share"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a fraction, 0..1")
        for name in ("quantizer_learning_rate", "one_bit_learning_rate"):
            rate = getattr(self, name)
            _require(name, rate, rate is None or 0 < rate < math.inf, "a positive number or None")
        _require("precision", self.precision, self.precision in PRECISIONS, ", ".join(PRECISIONS))
        fits = not (self.join and self.batch_seconds)
        _require("join", self.join, fits, "0 with batch_seconds, which joined utterances exceed")
        _require("speeds", self.speeds, self.speeds and min(self.speeds) > 0, "positive factors")
        _require("hardness", self.hardness, len(self.hardness) == 2 and min(self.hardness) > 0, "two positive numbers")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of step 0..total-1 as a fraction of the peak: linear warm-up, then a cosine."""
        rise = max(1, round(self.warmup * total))
        if step < rise:
            return (step + 1) / rise
        progress = (step - rise) / max(1, total - 1 - rise)
        return self.final_learning_rate + (1 - self.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2

    def to_dict(self) -> dict:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def changed(self, settings: dict[str, str]) -> TrainConfig:
        """This configuration with fields set from text, as a command line gives them: ``{"speeds": "0.9,1,1.1"}``.

        Raises:
            ValueError: an unknown field, or text that is no value of it.
        """
        unknown = sorted(set(settings) - {field.name for field in fields(self)})
        if unknown:
            allowed = ", ".join(field.name for field in fields(self))
            raise ValueError(f"no training setting is called {', '.join(unknown)}; allowed: {allowed}")
        return replace(self, **{name: self._parse(name, text) for name, text in settings.items()})

    def _parse(self, name: str, text: str) -> object:
        default = getattr(TrainConfig, name)
        try:
            if isinstance(default, tuple):
                return tuple(float(part) for part in text.split(","))
            if isinstance(default, str):
                return text
            return int(text) if isinstance(default, int) else float(text)
        except ValueError as error:
            kind = {tuple: "numbers separated by commas", int: "a whole number"}.get(type(default), "a number")
            raise ValueError(f"{name} is {text!r}; {kind} needed") from error


def _require(name: str, value: object, holds: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
