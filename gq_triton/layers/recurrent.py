"""Quantized twins of ``nn.LSTM`` and ``nn.GRU``, with their whole surface.

Each of ``weight_ih_l0``, ``weight_hh_l0``, ``weight_hr_l0``, ``..._reverse``, ... has its own quantizer, or none.
Where a weight's configuration asks for it, a packed layer quantizes what that weight multiplies: ``weight_ih`` the
layer's input, ``weight_hh`` the hidden state and ``weight_hr`` what is projected, the latter two at every step.

In training, torch's own recurrent kernels run on quantized weights. They hide all activations but the input of the
first layer: only there, where ``weight_ih_l0`` asks for it, does training see the rounding. cuDNN copies weights that
do not lie in one piece, as freshly quantized ones never do, and says so once; flatten_parameters, as it advises, would
make the same copy.

Packed layers run one operator per layer and direction; where a weight of it is left float, the packed ones are decoded
and torch's kernel runs or, with quantized activations, a loop over the steps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.rnn import PackedSequence

from gq_triton import functional as F
from gq_triton.kernels.packed_recurrent import recurrent
from gq_triton.layers.base import PackedLayer, QATLayer, QuantizableLayer
from gq_triton.layers.packed_weight import PackedWeight


class _Recurrent(QuantizableLayer):
    _flat_weights_names: list[str]

    @staticmethod
    def weight_names(layer: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))

    @staticmethod
    def row_groups(layer: nn.Module, name: str) -> int:
        gates = 4 if layer.mode == "LSTM" else 3
        return 1 if name.startswith("weight_hr") else gates


class _QATRecurrent(_Recurrent, QATLayer):
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Takes and returns what the torch layer does."""
        # nn.LSTM computes with the list _flat_weights. A shallow copy gets its own, so that the layer itself is
        # left alone, also when several threads share it. (Not by copy.copy: FSDP gives its units a class that refuses.)
        runner = object.__new__(type(self))
        runner.__setstate__(self.__getstate__())
        runner._flat_weights = [self.quantized(name) for name in self._flat_weights_names]
        return super(_QATRecurrent, runner).forward(self._first_input(input), hx)

    def _first_input(self, input: Tensor | PackedSequence) -> Tensor | PackedSequence:
        if isinstance(input, PackedSequence):
            return input._replace(data=self.quantized_input(input.data, "weight_ih_l0"))
        return self.quantized_input(input, "weight_ih_l0")


class _PackedRecurrent(_Recurrent, PackedLayer, nn.RNNBase):
    # Not an nn.LSTM or nn.GRU: torch.compile breaks the graph at each of those.

    uses_dense = False
    readable = False  # nn.RNNBase would keep what it reads

    def attach(self, name: str, pieces: dict[str, PackedWeight]) -> None:
        super().attach(name, pieces)
        self._init_flat_weights()  # the list of weights that nn.RNNBase keeps still held the float one

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Takes and returns what the torch layer does."""
        lstm = self.mode == "LSTM"
        states = None if hx is None else list(hx) if lstm else [hx]
        run = self._run_packed if isinstance(input, PackedSequence) else self._run_padded
        output, last = run(input, states)
        return output, tuple(last) if lstm else last[0]

    def _run_packed(self, input: PackedSequence, states: list[Tensor] | None) -> tuple[PackedSequence, list[Tensor]]:
        x, batch_sizes, order, back = input
        if x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
        if states is not None and order is not None:
            states = [state.index_select(1, order) for state in states]
        output, last = self._run(x, batch_sizes, self._checked(x, int(batch_sizes[0]), states))
        if back is not None:
            last = [state.index_select(1, back) for state in last]
        return PackedSequence(output, batch_sizes, order, back), last

    def _run_padded(self, x: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if x.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if states is not None and any(state.dim() != x.dim() for state in states):
            kind = "batched" if x.dim() == 3 else "unbatched"
            found = ", ".join(f"{state.dim()}-D" for state in states)
            raise RuntimeError(f"For {kind} {x.dim()}-D input, hx should also be {x.dim()}-D but got {found}")
        batch_dim = 0 if self.batch_first else 1
        if x.dim() == 2:
            states = None if states is None else [state.unsqueeze(1) for state in states]
            output, last = self._run_padded(x.unsqueeze(batch_dim), states)
            return output.squeeze(batch_dim), [state.squeeze(1) for state in last]
        states = self._checked(x, x.shape[batch_dim], states)
        output, last = self._run(x.transpose(0, 1 - batch_dim), None, states)
        return output.transpose(0, 1 - batch_dim), last

    def _checked(self, x: Tensor, batch: int, states: list[Tensor] | None) -> list[Tensor]:
        """Returns the first states, zeros for None, after the checks that ``nn.LSTM`` makes."""
        weight = self._modules.get("weight_ih_l0_packed") or self.weight_ih_l0
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        sizes = [self.proj_size or self.hidden_size, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        shapes = [(self.num_layers * (2 if self.bidirectional else 1), batch, size) for size in sizes]
        if states is None:
            return [x.new_zeros(shape) for shape in shapes]
        for index, (state, shape) in enumerate(zip(states, shapes, strict=True)):
            name = f"hidden[{index}]" if len(shapes) == 2 else "hidden"
            self.check_hidden_size(state, shape, f"Expected {name} size {{}}, got {{}}")
        return [state.to(x.dtype) for state in states] if autocast else states

    def _run(self, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Runs all layers, on (T, B, K), or on (N, K) with ``batch_sizes``."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        finals: list[list[Tensor]] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in directions:
                first = [state[len(finals)] for state in states]
                output, *last = self._run_direction(x, batch_sizes, first, f"l{layer}{direction}")
                outputs.append(output)
                finals.append(last)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.training and self.dropout and layer < self.num_layers - 1:
                x = dropout(x, self.dropout)
        one = len(finals) == 1  # as in streaming, where a launch to copy the state would weigh
        return x, [last[0].unsqueeze(0) if one else torch.stack(last) for last in zip(*finals, strict=True)]

    def _run_direction(self, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor], end: str) -> list[Tensor]:
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        names = [f"weight_{kind}_{end}" for kind in kinds]
        biases = [getattr(self, f"bias_{kind}_{end}") for kind in kinds[:2]] if self.bias else []
        reverse = end.endswith("_reverse")
        packed = [self._modules.get(f"{name}_packed") for name in names]
        activations = [None if weight is None else weight.config.activations for weight in packed]
        if None in packed:
            decoded = [self.decoded(name) for name in names]
            kinds = [kind or "none" for kind in activations]
            return recurrent(x, batch_sizes, states, decoded, biases, reverse, kinds)
        return F.packed_recurrent(
            x,
            states,
            [(weight.codes, weight.codebook, weight.scale) for weight in packed],
            biases,
            bits=[weight.config.bits for weight in packed],
            activations=activations,
            batch_sizes=batch_sizes,
            reverse=reverse,
            layout=packed[0].layout,
        )


class QATLSTM(_QATRecurrent, nn.LSTM):
    """``nn.LSTM`` that computes with quantized weights."""


class PackedLSTM(_PackedRecurrent):
    """An ``nn.LSTM``, made by converting one, that computes from packed codes. Differentiable in all but the codes."""


class QATGRU(_QATRecurrent, nn.GRU):
    """``nn.GRU`` that computes with quantized weights."""


class PackedGRU(_PackedRecurrent):
    """An ``nn.GRU``, made by converting one, that computes from packed codes. Differentiable in all but the codes."""
