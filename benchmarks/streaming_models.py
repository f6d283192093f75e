"""Recognizers of streaming.py, with random weights: their sizes, their precisions and their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import gq_triton as gq
from gq_triton import GQConfig
from gq_triton.files import save_json
from gq_triton.models.rnnt import RNNT, RNNTConfig
from gq_triton.speech.features import LogMel
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.tokens import WordTokenizer

VOCABULARY = 1024
TAIL_MS = 300  # of silence after the end, as the recipes of this size have
SOURCES = ("gq_triton", "kernels")  # of what makes a file

Quantization = dict[str, GQConfig]


def rnnt() -> Recognizer:
    """The preset `base`: 61 million parameters."""
    return recognizer_of(RNNT(RNNTConfig.preset("base", VOCABULARY)))


def bifocal() -> Recognizer:
    """The preset of that name: 60 million parameters, 43 of them in the large encoder and 7 in the small one."""
    return recognizer_of(RNNT(RNNTConfig.preset("bifocal", VOCABULARY)))


#: What makes each model, by name. A further one is another entry.
MODELS: dict[str, Callable[[], Recognizer]] = {"rnnt": rnnt, "bifocal": bifocal}
#: Of models with a small encoder, the end of the wake word, which that takes; in seconds from an utterance's start.
SWITCH_SECONDS = {"bifocal": 0.8}


def recognizer_of(model: RNNT) -> Recognizer:
    tokenizer = WordTokenizer([f"w{place}" for place in range(model.config.vocab_size - 2)])
    return Recognizer(LogMel(n_mels=model.config.features, tail_ms=TAIL_MS), tokenizer, model)


def uniform(bits: int, **options: str) -> Quantization:
    """Every weight at ``bits``."""
    return {"*": GQConfig(bits=bits, **options)}


def mixed(**options: str) -> Quantization:
    """The encoder's LSTMs at 1 bit, all else at 5."""
    return {"encoder.*layers.*": GQConfig(bits=1, **options), "*": GQConfig(bits=5, **options)}


INT8 = {"codebook": "int8", "activations": "int8"}
#: Quantization by precision: `gq/BITS` multiplies floats, `gq int8/BITS` integers.
PRECISIONS: dict[str, Quantization] = {
    **{f"gq/{bits}": uniform(bits) for bits in range(1, 9)},
    **{f"gq int8/{bits}": uniform(bits, **INT8) for bits in range(1, 9)},
    "gq/mixed": mixed(),
    "gq int8/mixed": mixed(**INT8),
}


@dataclass(frozen=True)
class ModelFile:
    """A recognizer's file.

    Attributes:
        path: of it.
        chunk_bytes: of the weights that each chunk needs once at least: the encoder's, of two the large one's, and the
            joint network's.
        sizes: ``subsampling``, the feature frames per frame of the encoder; ``vocab_size``, the labels with the blank;
            ``tail_samples``, of the silence that the recognizer appends.
    """

    path: Path
    chunk_bytes: int
    sizes: dict[str, int]


def model_file(model: str, precision: str | None, folder: Path) -> ModelFile:
    """The file of a model, made unless ``folder`` has it: quantizing takes a while. A precision of None is float32."""
    settings = {pattern: config.to_dict() for pattern, config in PRECISIONS[precision].items()} if precision else None
    key = hashlib.sha256(json.dumps(settings).encode() + _sources()).hexdigest()[:16]
    path = folder / f"{model}-{(precision or 'float').replace('/', '-').replace(' ', '-')}-{key}.safetensors"
    about = path.with_suffix(".json")
    if not about.is_file():
        _make(model, precision, path, about)
    return ModelFile(path, **json.loads(about.read_text()))


def _make(model: str, precision: str | None, path: Path, about: Path) -> None:
    torch.manual_seed(0)
    recognizer = MODELS[model]().eval()
    if precision:
        recognizer.prepare(PRECISIONS[precision]).convert()
    recognizer.save(path)
    rows = gq.report(recognizer.model).rows
    needed = sum(row.packed_bytes for row in rows if row.name.startswith(needed_names(recognizer.model)))
    config, tail = recognizer.model.config, recognizer.front_end.tail_samples
    sizes = {"subsampling": config.subsampling, "vocab_size": config.vocab_size, "tail_samples": tail}
    save_json(about, {"chunk_bytes": needed, "sizes": sizes})


def needed_names(model: RNNT) -> tuple[str, ...]:
    """What the names of weights begin with that every chunk after a switch needs."""
    return ("encoder.large" if model.config.small_encoder_layers else "encoder", "joint")


def _sources() -> bytes:
    """A digest of the code that makes files: what is changed makes them anew."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
