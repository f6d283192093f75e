"""Streaming recognizers on torch, for streaming_worker.py: packed ones, and peers made from a float one."""

from __future__ import annotations

import numpy as np
import torch
from streaming_schedule import BLANK, forced_labels
from torch import Tensor, nn

import gq_triton as gq
from gq_triton.speech.decoding import GreedyDecoder
from gq_triton.speech.recognizer import Recognizer
from gq_triton.speech.streaming import StreamingRecognizer


class OnTorch:
    """The recognizer of a variant; see ``streaming_worker.Streaming``."""

    def __init__(self, variant: dict) -> None:
        torch.set_num_threads(variant["threads"])
        recognizer = Recognizer.load(variant["file"])
        recognizer.model, self.weight_bytes = PEERS.get(variant["name"], as_loaded)(recognizer.model)
        self.switch_seconds = variant.get("switch_seconds")
        self.streaming = StreamingRecognizer(recognizer, chunk_ms=variant["chunk_ms"])
        self.decoder = self.streaming.decoder = ForcedDecoder(recognizer.model, variant)

    @property
    def logits(self) -> np.ndarray:
        return self.decoder.logits.float().numpy()

    def restart(self) -> None:
        self.streaming.reset()
        if self.switch_seconds is not None:
            self.streaming.switch_at(self.switch_seconds)

    def push(self, samples: np.ndarray) -> int:
        return len(self.streaming.push(torch.from_numpy(samples)).ids)

    def finish(self) -> int:
        return len(self.streaming.finish().ids)


class ForcedDecoder(GreedyDecoder):
    """Evaluates all that a greedy search does, and takes the labels of the schedule."""

    logits: Tensor

    def __init__(self, model: nn.Module, variant: dict) -> None:
        super().__init__(model)
        self.variant = variant

    def choose(self, logits: Tensor, frames: list[int], counts: list[int]) -> list[list[int]]:
        super().choose(logits, frames, counts)
        labels = forced_labels(frames[0], logits.shape[1], counts[0], self.variant)
        emitted = [place for place, label in enumerate(labels) if label != BLANK]
        if emitted:
            self.logits = logits[0, emitted[0]]
        return [labels]


def as_loaded(model: nn.Module) -> tuple[nn.Module, int]:
    """As it is, with the bytes of its weights."""
    return model, gq.report(model).bytes


def fp32(model: nn.Module) -> tuple[nn.Module, int]:
    """As it is, but without oneDNN, which makes its own layout of an LSTM's weights anew at every call: on chunks this
    short that takes several times as long as what it is for."""
    torch.backends.mkldnn.set_flags(_enabled=False)
    return as_loaded(model)


def bf16(model: nn.Module) -> tuple[nn.Module, int]:
    """All in bfloat16, features too."""
    torch.backends.mkldnn.set_flags(_enabled=False)
    encoder = model.bfloat16().encoder
    stream, initial_state = encoder.stream, encoder.initial_state
    encoder.stream = lambda features, state: stream(features.bfloat16(), state)
    encoder.initial_state = lambda features, *switch: initial_state(features.bfloat16(), *switch)
    return as_loaded(model)


def dynamic_int8(model: nn.Module) -> tuple[nn.Module, int]:
    """torch's own: LSTM and linear layers, whose matrices have a byte for each weight then, counted on paper."""
    layers = [module for module in model.modules() if isinstance(module, (nn.LSTM, nn.Linear))]
    matrices = sum(tensor.numel() for layer in layers for tensor in layer.parameters() if tensor.dim() == 2)
    size = gq.report(model).bytes - 3 * matrices
    model = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    model.joint.register_buffer("somewhere", torch.zeros(0))  # where decoders look for the device: no other is left
    return model, size


PEERS = {"torch fp32": fp32, "torch bf16": bf16, "torch int8": dynamic_int8}
