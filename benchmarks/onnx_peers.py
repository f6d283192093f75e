"""onnxruntime's layers on quantized weights, as peers on a CPU.

A graph is built of the operators themselves, several nodes on one input, so that what a run costs the caller weighs as
little as it does in a model. Each node has weights in memory of its own: onnxruntime keeps equal weights but once, so
in each node's a few differ, by a unit, from what they are in the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Unavailable
from torch import Tensor, nn

BLOCK = 128  # columns that share a scale in MatMulNBits
INTEGER_PRODUCT = 4  # MatMulNBits' accuracy_level: activations are quantized to 8 bits, by far its fastest way
NODES = 16  # of a graph, at most: a file of one may not be larger than 2 GB


class OnnxLayer(NamedTuple):
    """One of onnxruntime's own operators, com.microsoft, with its constant operands.

    Attributes:
        operator: its name.
        operands: what follows the input; None leaves one out.
        options: its attributes.
        weight_bytes: what it reads of the weights, scales included.
        dimensions: of the input, and of the output.
        matrices: how many of the operands, from the first on, are codes of weights.
    """

    operator: str
    operands: tuple[np.ndarray | None, ...]
    options: dict[str, Any]
    weight_bytes: int
    dimensions: tuple[int, int]
    matrices: int = 1

    def copies(self, count: int, threads: int) -> list[Callable[[Tensor], list[Tensor]]]:
        """Calls that together compute ``count`` layers on an input; each returns the outputs of some."""
        sizes = [min(NODES, count - start) for start in range(0, count, NODES)]
        return [_session(self, size, threads) for size in sizes]


def _session(layer: OnnxLayer, count: int, threads: int) -> Callable[[Tensor], list[Tensor]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"onnxruntime does not import: {error}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it cannot do it raises
    session = onnxruntime.InferenceSession(_graph(layer, count), options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(out) for out in session.run(None, {"x": x.numpy()})]


def _graph(layer: OnnxLayer, count: int) -> bytes:
    """A model file of ``count`` nodes on one input."""
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Unavailable(f"onnx does not import: {error}") from error
    nodes, constants, outputs = [], [], []
    input_rank, output_rank = layer.dimensions
    for index in range(count):
        codes, others = layer.operands[: layer.matrices], layer.operands[layer.matrices :]
        operands = *(_distinct(matrix, index) for matrix in codes), *others
        parts = {f"{place}.{index}": part for place, part in enumerate(operands)}
        constants += [numpy_helper.from_array(part, name) for name, part in parts.items() if part is not None]
        names = ["" if part is None else name for name, part in parts.items()]
        outputs.append(helper.make_tensor_value_info(f"y.{index}", TensorProto.FLOAT, [None] * output_rank))
        options = {"domain": "com.microsoft", **layer.options}
        nodes.append(helper.make_node(layer.operator, ["x", *names], [f"y.{index}"], **options))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * input_rank)
    operators = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "layers", [x], outputs, constants)
    return helper.make_model(graph, opset_imports=operators, ir_version=9).SerializeToString()


def _distinct(codes: np.ndarray, index: int) -> np.ndarray:
    """A copy of a weight's codes in which the lowest bits of the first ``index`` bytes are the other ones."""
    codes = codes.copy()
    codes.reshape(-1)[:index] ^= 1
    return codes


def int8(weight: Tensor) -> OnnxLayer:
    """8-bit weights (N, K), a scale per output, and activations quantized to 8 bits in the call, all tokens alike."""
    units, scale = _integers(weight)
    operands = np.ascontiguousarray(units.T), scale
    return OnnxLayer("DynamicQuantizeMatMul", operands, {}, _bytes(operands), (2, 2))


def nbits(weight: Tensor, bits: int) -> OnnxLayer:
    """2-, 4- or 8-bit weights (N, K), a scale for each block of columns."""
    rows, columns = weight.shape
    blocks = nn.functional.pad(weight, (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    middle = 2 ** (bits - 1)
    scale = blocks.abs().amax(2).clamp(min=1e-30) / middle
    codes = (blocks / scale.unsqueeze(2)).round().add(middle).clamp(0, 2 * middle - 1).to(torch.uint8)
    fields = codes.view(rows, -1, BLOCK * bits // 8, 8 // bits)
    packed = torch.zeros_like(fields[..., 0])
    for place in range(8 // bits):
        packed |= fields[..., place] << (place * bits)
    operands = packed.numpy(), scale.flatten().numpy()
    options = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": INTEGER_PRODUCT}
    return OnnxLayer("MatMulNBits", operands, options, _bytes(operands), (2, 2))


def lstm_int8(lstm: nn.LSTM) -> OnnxLayer:
    """An ``nn.LSTM`` of one layer with 8-bit weights; inputs and hidden states are quantized in the call."""
    order = [0, 3, 1, 2]  # ONNX has the gates as input, output, forget, cell
    weights, scales, zeros = [], [], []
    for name in ("weight_ih_l0", "weight_hh_l0"):
        units, scale = _integers(_reordered(getattr(lstm, name), order))
        weights.append(np.ascontiguousarray(units.T)[None])
        scales.append(scale[None])
        zeros.append(np.zeros_like(scale[None], dtype=np.int8))
    bias = torch.cat([_reordered(getattr(lstm, name), order) for name in ("bias_ih_l0", "bias_hh_l0")])
    operands = (*weights, bias[None].numpy(), None, None, None, None, scales[0], zeros[0], scales[1], zeros[1])
    count = _bytes([*weights, *scales])
    return OnnxLayer("DynamicQuantizeLSTM", operands, {"hidden_size": lstm.hidden_size}, count, (3, 4), matrices=2)


def _reordered(rows: Tensor, order: list[int]) -> Tensor:
    gates = rows.detach().chunk(len(order))
    return torch.cat([gates[gate] for gate in order])


def _integers(weight: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Integers of 8 bits (N, K), and a scale for each row."""
    scale = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / scale.unsqueeze(1)).round().to(torch.int8).numpy(), scale.numpy()


def _bytes(arrays: Any) -> int:
    return sum(array.nbytes for array in arrays)
