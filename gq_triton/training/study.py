"""Training of recognizers, and the comparison of one float recognizer quantized in several ways."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

import gq_triton as gq
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.synthetic import spoken_transcripts

from .config import TrainConfig
from .data import SpeechSet
from .distributed import is_main, training_device
from .evaluation import evaluate
from .recipes import ALLOCATIONS, Recipe
from .trainer import Trainer

__all__ = ["Row", "mean_bits", "quantize_and_measure", "train_from_scratch", "train_further", "train_recognizer"]

Allocation = Mapping[str, gq.WeightConfig | None]


@dataclass(frozen=True)
class Row:
    """One quantized model. Both error rates are of packed models, decoded from their packed weights.

    Attributes:
        name: of the allocation.
        bits: mean over all quantized weights.
        ptq_wer, ptq_interval: word error rate after post-training quantization, with its 95 % interval.
        qat_wer, qat_interval: the same after quantization-aware training.
        bytes: of the packed model, as in a file.
        ratio: how many times smaller than the float32 model.
        file: the packed recognizer, relative to the output folder.
    """

    name: str
    bits: float
    ptq_wer: float
    ptq_interval: tuple[float, float]
    qat_wer: float
    qat_interval: tuple[float, float]
    bytes: int
    ratio: float
    file: str

    def to_dict(self) -> dict:
        return asdict(self)


def train_recognizer(
    recognizer: Recognizer,
    data: SpeechSet,
    config: TrainConfig,
    output: Path,
    *,
    held_out: SpeechSet | None = None,
    description: dict | None = None,
    **options,
) -> Recognizer:
    """Trains a float or prepared recognizer in place and saves it as ``output/recognizer.safetensors``.

    Args:
        recognizer: its model moves to this process's GPU, where there is one.
        data: the training set.
        config: the run.
        output: folder of the run; an interrupted one goes on from its checkpoint.
        held_out: utterances whose word error rate is measured meanwhile, not trained on.
        description: what else tells this run from others.
        options: ``parallel``, ``overwrite``, ``progress`` and ``tensorboard`` of :class:`Trainer`.
    """

    def measure() -> dict[str, float]:
        return {"wer": evaluate(recognizer, held_out, progress=False).wer}

    trainer = Trainer(
        recognizer.model,
        data,
        config,
        output,
        description={"data": data.digest(), **recognizer.description(), **(description or {})},
        evaluate=measure if held_out else None,
        **options,
    )
    trainer.run()
    recognizer.eval()
    if is_main():
        recognizer.save(Path(output) / "recognizer.safetensors")
    return recognizer


def train_from_scratch(
    recognizer: Recognizer, recipe: Recipe, data: SpeechSet, output: Path, *, progress: bool = True, **options
) -> Recognizer:
    """Trains a new float recognizer as a recipe says, on synthetic voices first where it asks for them.

    Args:
        recognizer: as :meth:`Recipe.untrained` gives it.
        recipe: how to train.
        data: the training set.
        output: folder of the run, and of a run ``pretraining`` in it.
        progress, options: of :func:`train_recognizer`.

    Raises:
        ModuleNotFoundError: synthetic voices are asked for, and espeakng-loader is not installed.
    """
    if recipe.pretrain is not None:
        seed = recipe.train.seed
        spoken = spoken_transcripts(data.texts, recipe.spoken, seed=seed)
        voices = SpeechSet(spoken, recognizer.front_end, recognizer.tokenizer, progress=progress and is_main())
        again = {name: value for name, value in options.items() if name != "held_out"}
        config = replace(recipe.pretrain, seed=seed)
        train_recognizer(recognizer, voices, config, output / "pretraining", progress=progress, **again)
    description = {"initial_weights": _digest(recognizer.model.state_dict())}
    options |= {"progress": progress, "description": description}
    return train_recognizer(recognizer, data, recipe.train, output, **options)


def train_further(
    recognizer: Recognizer, allocation: Allocation | None, data: SpeechSet, config: TrainConfig, output: Path, **options
) -> Recognizer:
    """A copy of a float recognizer, prepared where there is an allocation, trained by :func:`train_recognizer`, which
    the options go to."""
    trained = copy.deepcopy(recognizer)
    if allocation is not None:
        trained.prepare(allocation)
    description = {"initial_weights": _digest(recognizer.model.state_dict())}
    return train_recognizer(trained, data, config, output, description=description, **options)


def quantize_and_measure(
    recognizer: Recognizer,
    name: str,
    recipe: Recipe,
    train: SpeechSet,
    test: SpeechSet,
    output: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Row:
    """Quantizes a float recognizer with and without training, and measures both through their packed weights.

    Args:
        recognizer: the float one, left as it is.
        name: of an allocation in ``ALLOCATIONS``; also names the folder of the run.
        recipe: says how to train and to decode.
        train, test: utterances to train on and to measure on.
        output: folder for the run and the packed recognizer.
        overwrite: begin anew where the folder of the run holds another.
        progress: whether to show progress bars.
    """
    allocation = ALLOCATIONS[name]
    decoding = {"beam_width": recipe.beam_width, "progress": progress}
    untrained = evaluate(recognizer.packed_copy(allocation), test, **decoding)
    slug = re.sub(r"\W+", "-", name)
    options = {"overwrite": overwrite, "progress": progress}
    trained = train_further(recognizer, allocation, train, recipe.qat, output / slug, **options).convert()
    path = output / f"{slug}.safetensors"
    trained.save(path)
    deployed = Recognizer.load(path)
    deployed.model.to(training_device())
    measured = evaluate(deployed, test, **decoding)
    report = gq.report(deployed.model)
    return Row(
        name=name,
        bits=mean_bits(report),
        ptq_wer=untrained.wer,
        ptq_interval=untrained.interval,
        qat_wer=measured.wer,
        qat_interval=measured.interval,
        bytes=report.packed_bytes,
        ratio=report.ratio,
        file=path.name,
    )


def mean_bits(report: gq.Report) -> float:
    """Mean width over the quantized weights of a packed model."""
    packed = [row for row in report.rows if row.bits <= 8]
    return sum(row.bits * row.parameters for row in packed) / sum(row.parameters for row in packed)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
