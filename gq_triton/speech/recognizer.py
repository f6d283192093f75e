"""A recognizer in one piece: front end, tokenizer and model, float, prepared or packed, in one file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import gq_triton as gq
from gq_triton.files import load_tensors, read_state, save_tensors
from gq_triton.layers import QATLayer
from gq_triton.models.config import TransducerConfig, config_from_dict
from gq_triton.models.ctc import CTC, model_of
from gq_triton.models.rnnt import RNNT
from gq_triton.packed_header import RECOGNIZER_FORMAT

from .audio import load_audio
from .decoding import beam, greedy
from .features import LogMel
from .tokens import Tokenizer, tokenizer_from_dict

__all__ = ["Recognizer"]

STAGES = ("float", "qat", "packed")
MALFORMED = (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)  # of wrong descriptions
Quantization = gq.WeightConfig | Mapping[str, gq.WeightConfig | None]


class Recognizer(nn.Module):
    """Speech to text.

    Args:
        front_end: waveforms to features.
        tokenizer: token ids to text.
        model: a float transducer or CTC model; :meth:`prepare` and :meth:`convert` quantize it in place.

    Raises:
        ValueError: the model takes other features than the front end's, or emits other ids than the tokenizer's.

    Attributes:
        stage: "float", "qat" or "packed".
        quantization: what :meth:`prepare` was given, by name pattern; None for a float model.
    """

    def __init__(self, front_end: LogMel, tokenizer: Tokenizer, model: RNNT | CTC) -> None:
        super().__init__()
        _require_fit(front_end, tokenizer, model.config)
        self.front_end, self.tokenizer, self.model = front_end, tokenizer, model
        self.stage = "float"
        self.quantization: dict[str, gq.WeightConfig | None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(chain(self.model.parameters(), self.model.buffers())).device

    def prepare(self, quantization: Quantization) -> Recognizer:
        """Makes the model's layers quantization-aware, in place; returns itself.

        Args:
            quantization: one configuration for every layer, or one per name pattern (None keeps a layer float).

        Raises:
            ValueError: no layer is to be quantized.
        """
        patterns = {"*": quantization} if isinstance(quantization, gq.WeightConfig) else dict(quantization)
        gq.quantize_(self.model, patterns, step="prepare")
        if not any(isinstance(module, QATLayer) for module in self.model.modules()):
            raise ValueError(f"quantization quantizes no layer of the model: its patterns are {', '.join(patterns)}")
        self.stage, self.quantization = "qat", patterns
        return self

    def convert(self) -> Recognizer:
        """Packs the weights of a prepared model, in place; returns itself."""
        gq.quantize_(self.model, step="convert")
        self.stage = "packed"
        return self

    def packed_copy(self, quantization: Quantization | None = None) -> Recognizer:
        """A packed copy of a prepared recognizer, or of a float one: post-training quantization by ``quantization``."""
        clone = copy.deepcopy(self)
        if quantization is not None:
            clone.prepare(quantization)
        return clone.convert()

    @torch.inference_mode()
    def recognize(self, features: Tensor, lengths: Tensor, *, beam_width: int = 1) -> list[str]:
        """Texts of a padded batch of features ``(B, T, n_mels)`` with ``lengths`` ``(B,)``; a beam of 1 is greedy.

        What is shorter than one frame of the encoder has an empty text.
        """
        if features.shape[1] < self.model.config.subsampling:
            return [""] * features.shape[0]
        features, lengths = features.to(self.device), lengths.to(self.device)
        if beam_width == 1:
            ids = greedy(self.model, features, lengths)
        else:
            ids = beam(self.model, features, lengths, width=beam_width)
        return [self.tokenizer.decode(row) for row in ids]

    @torch.inference_mode()
    def transcribe(self, audio: str | Path | Tensor, *, beam_width: int = 1) -> str:
        """The text of one recording.

        Args:
            audio: a file of any rate that soundfile reads, or a waveform ``(n,)``, float32 at 16 kHz.
            beam_width: hypotheses kept in beam search; 1 is greedy decoding.

        Returns:
            the text; empty for a recording shorter than one frame of the encoder.

        Raises:
            FileNotFoundError, ValueError: the audio cannot be read.
        """
        waveform = audio if isinstance(audio, Tensor) else load_audio(audio)
        waveform = waveform.to(self.front_end.mean.device)
        features, lengths = self.front_end(waveform[None], torch.tensor([len(waveform)], device=waveform.device))
        return self.recognize(features, lengths, beam_width=beam_width)[0]

    def save(self, path: str | Path) -> None:
        """Writes one self-contained file, atomically; :meth:`load` reads it back at the same stage."""
        if self.stage == "packed":
            gq.save_packed(self, path, metadata={"state": json.dumps(self.description())})
        else:
            save_tensors(path, self.state_dict(), self.description())

    @classmethod
    def load(cls, path: str | Path) -> Recognizer:
        """Reads a recognizer that :meth:`save` wrote, float, prepared or packed, to the CPU, in evaluation mode.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no recognizer, or it is damaged.
        """
        description = read_state(path)
        if description.get("format") != RECOGNIZER_FORMAT:
            raise ValueError(f"{path} is no recognizer that this version reads: format {description.get('format')!r}")
        try:
            return cls._from_file(Path(path), description).eval()
        except MALFORMED as error:
            raise ValueError(f"{path} is damaged, its description and its tensors do not fit: {error}") from error

    @classmethod
    def _from_file(cls, path: Path, description: dict) -> Recognizer:
        recognizer = cls._from_description(description, path.stat().st_size)
        if recognizer.stage == "packed":
            gq.load_packed(recognizer, path)
        else:
            recognizer.load_state_dict(load_tensors(path)[0])
        return recognizer

    def description(self) -> dict:
        """All but the weights, JSON-able."""
        # Pairs, not an object: the first pattern that matches wins, so their order counts.
        quantization = self.quantization and [
            [pattern, config and config.to_dict()] for pattern, config in self.quantization.items()
        ]
        return {
            "format": RECOGNIZER_FORMAT,
            "stage": self.stage,
            "front_end": self.front_end.to_dict(),
            "tokenizer": self.tokenizer.to_dict(),
            "model": self.model.config.to_dict(),
            "quantization": quantization,
        }

    @classmethod
    def _from_description(cls, description: dict, file_bytes: int) -> Recognizer:
        """A recognizer without its weights, prepared where it was; a packed one is left float."""
        config = config_from_dict(description["model"])
        _require_room(config, file_bytes)
        front_end = LogMel.from_dict(description["front_end"])
        recognizer = cls(front_end, tokenizer_from_dict(description["tokenizer"]), model_of(config))
        stage, quantization = description["stage"], description["quantization"]
        if stage not in STAGES or (stage == "float") != (quantization is None):
            raise ValueError(f"stage is {stage!r} with quantization {quantization!r}")
        patterns = quantization and {
            pattern: config and gq.config_from_dict(config) for pattern, config in quantization
        }
        if stage == "qat":
            recognizer.prepare(patterns)
        recognizer.stage, recognizer.quantization = stage, patterns
        return recognizer


def _require_fit(front_end: LogMel, tokenizer: Tokenizer, config: TransducerConfig) -> None:
    if front_end.n_mels != config.features:
        raise ValueError(f"front_end gives {front_end.n_mels} values a frame, model takes {config.features}")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} ids, model emits {config.vocab_size}")


def _require_room(config: TransducerConfig, file_bytes: int) -> None:
    """Refuses a description of more weights than a file has bits, before memory is taken for them."""
    if config.layers > file_bytes:  # their weights alone could not even be counted in reasonable time
        raise ValueError(f"a model of {config.layers} layers is described, in a file of {file_bytes} bytes")
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in model_of(config).parameters())
    if weights > 8 * file_bytes:
        raise ValueError(f"a model of {weights} weights is described, in a file of {file_bytes} bytes")
