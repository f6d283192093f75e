"""Quantized twins of ``nn.LSTM`` and ``nn.GRU``, with their whole surface; they run torch's own recurrent kernels.

Each of ``weight_ih_l0``, ``weight_hh_l0``, ``weight_hr_l0``, ``..._reverse``, ... has its own quantizer, or none.
Activations, where ``weight_ih_l0`` asks for it, are quantized at the input of the first layer only: the hidden states
and the inputs of the layers above never leave torch's kernel. Packed layers decode their weights once per call.

cuDNN copies weights that do not lie in one piece, as freshly quantized ones never do, and says so once. Calling
flatten_parameters, as it advises, would make the same copy.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gq_triton.layers.base import PackedLayer, QATLayer, QuantizableLayer
from gq_triton.layers.packed_weight import PackedWeight


class _Recurrent(QuantizableLayer):
    _flat_weights_names: list[str]

    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))

    def _run(self, input: Tensor | PackedSequence, hx: Any, weights: list[Tensor]) -> Any:
        # nn.LSTM computes with the list _flat_weights. A shallow copy gets its own, so that the layer itself is
        # left alone, also when several threads share it.
        runner = copy.copy(self)
        runner._flat_weights = weights
        return super(_Recurrent, runner).forward(self._first_input(input), hx)

    def _first_input(self, input: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(input, PackedSequence):
            return input._replace(data=self.quantized_input(input.data, "weight_ih_l0"))
        return self.quantized_input(input, "weight_ih_l0")


class _QATRecurrent(_Recurrent, QATLayer):
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Takes and returns what the torch layer does."""
        return self._run(input, hx, [self.quantized(name) for name in self._flat_weights_names])


class _PackedRecurrent(_Recurrent, PackedLayer):
    def attach(self, name: str, pieces: dict[str, PackedWeight]) -> None:
        super().attach(name, pieces)
        self._init_flat_weights()  # the list of weights that nn.LSTM keeps still held the float one

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Takes and returns what the torch layer does."""
        return self._run(input, hx, [self.decoded(name) for name in self._flat_weights_names])


class QATLSTM(_QATRecurrent, nn.LSTM):
    """``nn.LSTM`` that computes with quantized weights."""


class PackedLSTM(_PackedRecurrent, nn.LSTM):
    """``nn.LSTM`` that holds its weights packed."""


class QATGRU(_QATRecurrent, nn.GRU):
    """``nn.GRU`` that computes with quantized weights."""


class PackedGRU(_PackedRecurrent, nn.GRU):
    """``nn.GRU`` that holds its weights packed."""
