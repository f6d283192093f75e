"""What would it cost to train on all 960 hours of LibriSpeech, on this machine?

    python benchmarks/training_cost.py            # the full record, benchmarks/results/<device>/training_cost.json
    python benchmarks/training_cost.py --quick

Takes steps of the recipe `librispeech` by gq_triton.training's own trainer: the recipe's models, float and quantized,
its augmentation, precision and, on a GPU, its batches, of random features as long as LibriSpeech's utterances. Where a
batch does not fit into memory it is divided into micro-batches, as the setting `accumulate` does. On a CPU batches are
of an utterance or a few, so that the quantizer, which costs the same for every batch, weighs more than it would.

From the seconds of audio in a second of steps follows the time of all epochs. A worker's rate of making features, from
compressed audio and at all speeds, says how many processes it takes to keep up. One device is measured; how much less
time several take is not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import click
import harness
import numpy as np
import torch
from torch import Tensor

import gq_triton as gq
from gq_triton.models import model_of, preset
from gq_triton.models.config import architecture_of
from gq_triton.speech.audio import save_audio
from gq_triton.speech.datasets import Utterance
from gq_triton.speech.features import LogMel
from gq_triton.speech.mel import SAMPLE_RATE
from gq_triton.speech.tokens import CharTokenizer
from gq_triton.training import SpeechSet, TrainConfig, Trainer
from gq_triton.training.data import Item, item_duration
from gq_triton.training.recipes import Recipe, recipe_of

HOURS = 960.9  # 100.6, 363.6 and 496.7 of the three training parts (Panayotov et al., ICASSP 2015, table 1)
# Of 250 utterances of train-clean-100: seconds, and 512 subwords a second.
DECILES = (1.6, 5.3, 9.8, 12.3, 13.3, 14.1, 14.4, 14.8, 15.3, 15.8, 17.2)
TOKENS_PER_SECOND = 5.5
FRAMES_PER_SECOND = 100
UTTERANCES = 2000  # of the training set that stands for LibriSpeech


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        models: some of `gq_triton.models.PRESETS`.
        bits: width of all weights.
        batch_seconds: of audio per step; 0 for the recipe's.
        steps: that are timed, after one that is not.
        audio_seconds: from which a worker makes features.
    """

    models: tuple[str, ...]
    bits: int
    batch_seconds: float
    steps: int
    audio_seconds: float

    @classmethod
    def full(cls, device: torch.device) -> Plan:
        models = "base", "conformer-S", "conformer-M"
        return cls(models, 4, 0.0, 20, 300.0) if device.type == "cuda" else cls(models, 4, 24.0, 3, 100.0)

    @classmethod
    def quick(cls, device: torch.device) -> Plan:
        models = ("base",) if device.type == "cuda" else ("conformer-S",)
        return replace(cls.full(device), models=models, steps=2, audio_seconds=30.0)


class RandomSpeech:
    """A training set of noise, as long and with as many labels as LibriSpeech's utterances have."""

    def __init__(self, config: TrainConfig, features: int, vocab_size: int) -> None:
        self.features, self.vocab_size, self.speeds = features, vocab_size, config.speeds
        draw = np.random.default_rng(0)
        self.durations = np.interp(draw.uniform(0, 10, UTTERANCES), range(11), DECILES).tolist()
        self.speakers = [None] * UTTERANCES
        self.cached = True

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor]:
        seconds = item_duration(self, item)
        features = torch.randn(round(FRAMES_PER_SECOND * seconds), self.features)
        return features, torch.randint(1, self.vocab_size, (round(TOKENS_PER_SECOND * seconds),))


def run(plan: Plan, folder: Path, device: torch.device) -> Path:
    """Measures what the record in ``folder`` lacks; returns its path."""
    record = harness.Record("training_cost", asdict(plan), folder)
    record.measure_ceilings(device, lambda _: {"features_seconds_per_s": features_rate(plan.audio_seconds)})
    for case in record.missing([{"model": model} for model in plan.models]):
        recipe = recipe_of("librispeech", architecture_of(case["model"]))
        record.add(case, measure(plan, replace(recipe, preset=case["model"])))
    path = record.finish()
    for line in summary(record.content):
        click.echo(line)
    return path


def measure(plan: Plan, recipe: Recipe) -> dict[str, dict]:
    """The steps of float training and of quantization-aware training, and what all epochs of them would take."""
    results: dict[str, dict] = {}
    for name, config in (("float", recipe.train), ("gq", recipe.qat)):
        config = replace(config, batch_seconds=plan.batch_seconds or config.batch_seconds)
        with harness.failure_recorded(results, name):
            results[name] = cost(fitting(recipe, config, plan.bits if name == "gq" else None, plan.steps), config)
    return results


def cost(steps: dict, config: TrainConfig) -> dict:
    """Adds to the measured steps what a run of ``config`` on all of LibriSpeech would take."""
    played = 3600 * HOURS * sum(1 / speed for speed in config.speeds) / len(config.speeds)
    return steps | {"epochs": config.epochs, "hours": config.epochs * played / steps["seconds_per_s"] / 3600}


def fitting(recipe: Recipe, config: TrainConfig, bits: int | None, steps: int) -> dict:
    """Times steps in the fewest micro-batches that fit into the GPU's memory."""
    accumulate = config.accumulate
    while True:
        try:
            return timed(recipe, replace(config, accumulate=accumulate), bits, steps)
        except torch.OutOfMemoryError:
            if accumulate == 64:
                raise
            accumulate *= 2
            torch.cuda.empty_cache()


def timed(recipe: Recipe, config: TrainConfig, bits: int | None, steps: int) -> dict:
    """Times steps of a run of ``config``, past its curriculum."""
    config = replace(config, curriculum_epochs=0)
    features = LogMel(**recipe.front_end).n_mels
    torch.manual_seed(0)
    model = model_of(preset(recipe.preset, recipe.vocab_size, features=features, **recipe.sizes))
    if bits:
        gq.quantize_(model, gq.GQConfig(bits=bits), step="prepare")
    data = RandomSpeech(config, features, recipe.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, data, config, folder, progress=False)
        trainer.objective.train()
        batches = list(islice(trainer.batches(), steps + 1))
        trainer.update(*batches[0])
        seconds = [seconds_of(trainer, *batch) for batch in batches[1:]]
    frames = [sum(int(micro.feature_lengths.sum()) for micro in micros) for micros, _ in batches[1:]]
    return {
        "ms": harness.summary(1e3 * each for each in seconds),
        "batch_seconds": sum(frames) / steps / FRAMES_PER_SECOND,
        "seconds_per_s": sum(frames) / FRAMES_PER_SECOND / sum(seconds),
        "accumulate": config.accumulate,
        "precision": trainer.config.precision,
    }


def seconds_of(trainer: Trainer, *batch) -> float:
    """A step's, to its very end on the device."""
    started = time.perf_counter()
    loss, _ = trainer.update(*batch)
    if not np.isfinite(loss.item()):
        raise harness.Wrong(f"the loss is {loss.item()}")
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - started


def features_rate(seconds: float) -> float:
    """Seconds of audio of which one process makes features in a second, with decoding and changes of speed."""
    recipe = recipe_of("librispeech")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "noise.flac"
        noise = 0.01 * torch.randn(round(SAMPLE_RATE * DECILES[5]), generator=torch.Generator().manual_seed(0))
        save_audio(path, noise)
        utterance = Utterance("noise", path, "a", "", DECILES[5])
        front_end, tokenizer = LogMel(**recipe.front_end), CharTokenizer(["a"])
        data = SpeechSet([utterance], front_end, tokenizer, speeds=recipe.train.speeds, cached=False, progress=False)
        items = [((0, speed),) for speed in data.speeds]
        return _rate(lambda: [data[item] for item in items], sum(item_duration(data, item) for item in items), seconds)


def _rate(call: Callable[[], object], amount: float, enough: float) -> float:
    """``amount`` a second, by calls that make ``enough`` in all."""
    call()
    calls = max(1, round(enough / amount))
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return calls * amount / (time.perf_counter() - started)


def summary(content: dict) -> list[str]:
    """For people."""
    made = content["ceilings"]["features_seconds_per_s"]
    lines = []
    for entry in content["cases"]:
        for name, result in entry["results"].items():
            if "hours" in result:
                rate, hours = result["seconds_per_s"], result["hours"]
                lines.append(
                    f"{entry['case']['model']}, {name}: {rate:,.1f} s of audio a second; {result['epochs']} epochs of "
                    f"{HOURS} hours in {hours:,.0f} h ({hours / 24:,.1f} days); {rate / made:.2g} workers for features"
                )
    return lines


if __name__ == "__main__":
    harness.command(Plan, run, "Compute what training on LibriSpeech costs.")()
