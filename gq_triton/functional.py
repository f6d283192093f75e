"""The quantizer and its packed operations as pure functions, the same on every device.

Shapes: a weight has C channels along its first dimension; a scale is one per channel, ``(C,)``, or one for the tensor,
``(1,)``; ``centroids`` are K = 2**bits sorted values in companded space. The mathematics is in the modules of
`gq_triton.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gq_triton.kernels import activations as _activations
from gq_triton.kernels import fake_quantize as _fake_quantize
from gq_triton.kernels import layouts as _layouts
from gq_triton.kernels import packed_conv as _packed_conv
from gq_triton.kernels import packed_embedding as _packed_embedding
from gq_triton.kernels import packed_linear as _packed_linear
from gq_triton.kernels import packed_recurrent as _packed_recurrent
from gq_triton.kernels import packing as _packing
from gq_triton.kernels import panels as _panels
from gq_triton.kernels import tables as _tables
from gq_triton.kernels import tiles as _tiles

__all__ = [
    "codebook",
    "decode",
    "encode",
    "fake_quantize",
    "fake_quantize_group",
    "pack",
    "packed_depthwise_conv1d",
    "packed_embedding",
    "packed_linear",
    "packed_recurrent",
    "panel",
    "quantize_activations",
    "tile",
    "unpack",
    "unpanel",
    "untile",
]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
_LEVELS = tuple(2**bits for bits in range(1, 9))
_EPILOGUES = tuple(name for name in _packed_linear.EPILOGUES if name != "none")


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    centroids: Tensor,
    *,
    mu: float | Tensor,
    hardness: float | Tensor,
    forward: str = "hard",
    codebook_dtype: str | None = None,
    straight_through: float = 0.0,
) -> Tensor:
    """General Quantizer (arXiv 2210.09188, section 2): replace each weight by a mixture of centroids, or by the nearest
    one.

    Args:
        weight: ``(C, ...)``, float32, bfloat16, float16 or float64; float64 is computed in float64, all else in
        float32.
        scale: ``(C,)`` or ``(1,)``, >= 0; a channel of scale 0 gives zeros, and so does a subnormal scale.
        centroids: ``(K,)``, sorted, within [-1, 1], K = 2, 4, .., 256.
        mu: companding, >= 0 (0 is uniform); a number or a tensor of one element, which may require a gradient.
        hardness: a of ``softmax(-a |y - z| / D)``, finite and >= 0; a number or a tensor of one element.
        forward: ``"hard"`` computes the nearest centroid and differentiates the mixture, ``"soft"`` computes the
        mixture.
        codebook_dtype: dtype to which the codebook is snapped: ``"float"`` or None (not at all), ``"int8"``, ``"fp8"``
        (e4m3).
        straight_through: share of the identity, 0 to 1, in the gradient of the weight.

    Returns:
        The quantized weight, contiguous, in the weight's shape and dtype. Hard values are ``float32(scale) *
        float32(c)``, then cast. A weight that is not finite gives NaN at its place. Gradients reach weight, scale,
        centroids and mu; a weight beyond the outer centroids receives the derivative of the border.

    Raises:
        TypeError, ValueError: on a wrong dtype, shape or option; on the CPU also on a negative scale or unsorted
        centroids.
    """
    _check_quantizer(weight, scale, centroids, mu)
    (quantized,) = fake_quantize_group(
        [weight],
        scale,
        centroids.unsqueeze(0),
        mu=_scalar("mu", mu, weight.device).reshape(1),
        hardness=_scalar("hardness", hardness, weight.device).reshape(1),
        per_channel=scale.numel() == weight.shape[0],
        forward=forward,
        codebook_dtype=codebook_dtype,
        straight_through=straight_through,
    )
    return quantized


def fake_quantize_group(
    weights: Sequence[Tensor],
    scale: Tensor,
    centroids: Tensor,
    *,
    mu: Tensor,
    hardness: Tensor,
    per_channel: bool,
    forward: str = "hard",
    codebook_dtype: str | None = None,
    straight_through: float = 0.0,
    learn_tables: bool = True,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`fake_quantize` of a group of G weights at once: a model has hundreds, and launching costs more than computing.

    Args:
        weights: G tensors ``(C_i, ...)`` of one dtype and device; options as in `fake_quantize` hold for all.
        scale: the weights' scales in a row, ``(C_1 + ... + C_G,)``; or ``(G,)``, one for each weight.
        centroids: ``(G, K)``, one grid for each weight.
        mu, hardness: ``(G,)``.
        per_channel: whether ``scale`` has an entry for each channel or for each weight.
        learn_tables: whether centroids and mu get a gradient, which costs about as much again as the weights'.
        dtype: of the results, as cast from the weights' dtype or, for 16-bit weights, float32. Default: the weights'.

    Returns:
        The G quantized weights. A weight whose result is not used receives no gradient.

    Raises:
        TypeError, ValueError: as `fake_quantize`.
    """
    weights = list(weights)
    _check_group(weights, scale, centroids, mu, hardness, per_channel)
    _check_option("forward", forward, ("hard", "soft"))
    _check_option("codebook_dtype", codebook_dtype, (None, "float", "int8", "fp8"))
    _check_option("dtype", dtype, (None, *_FLOATS))
    if not 0 <= straight_through <= 1:
        raise ValueError(f"straight_through must lie in [0, 1], got {straight_through}")
    if not weights:
        return []
    work = _work_dtype(weights[0])
    if not learn_tables:
        centroids, mu = centroids.detach(), mu.detach()
    tables = _tables.build_tables(centroids, mu, hardness, codebook_dtype, work)
    options = per_channel, forward == "soft", float(straight_through), tables.requires_grad, dtype
    return _fake_quantize.fake_quantize(weights, _flushed(scale, work), tables, *options)


def encode(weight: Tensor, scale: Tensor, centroids: Tensor, *, mu: float | Tensor) -> Tensor:
    """Codes (uint8, shape of ``weight``) of the nearest centroids: those of `fake_quantize`, arguments as there.

    Raises:
        TypeError, ValueError: as `fake_quantize`, on every device; ValueError where a weight is not finite.
    """
    _check_quantizer(weight, scale, centroids, mu)
    if bool((scale < 0).any()):
        raise ValueError(f"scale must not be negative, but its smallest entry is {scale.min().item():g}")
    if bool((centroids.diff() < 0).any()):
        raise ValueError("centroids must be sorted in ascending order")
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"weight must be finite to be encoded, but {bad} of its {weight.numel()} entries are not")
    work = _work_dtype(weight)
    borders = _tables.thresholds(centroids, _scalar("mu", mu, weight.device)).to(work)
    return _fake_quantize.encode(weight, _flushed(scale, work), borders)


def codebook(centroids: Tensor, *, mu: float | Tensor, dtype: str | None = None) -> Tensor:
    """Deployed codebook values (K,), float32, of ``centroids`` (K,); ``dtype`` is None, "float", "int8" or "fp8"."""
    _check_centroids(centroids)
    _check_option("dtype", dtype, (None, "float", "int8", "fp8"))
    return _tables.codebook(centroids, _scalar("mu", mu, centroids.device), dtype).float()


def decode(codes: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """``scale[c] * codebook[code]``, float32, one product: ``codes`` (C, ...) uint8, ``scale`` (C,) or (1,),
    ``codebook`` (K,).

    Equals the hard `fake_quantize` of the encoded weight bit for bit.
    """
    _check_dtype("codes", codes, torch.uint8)
    _check_scale(scale, codes, "codes")
    column = _flushed(scale, torch.float32).reshape(-1, *[1] * (codes.dim() - 1))
    units = _values(codebook).index_select(0, codes.reshape(-1).int()).view(codes.shape)
    return column * units + 0.0  # -0 becomes +0, as in fake_quantize


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` (any shape, uint8, < 2**bits) into bit planes, 1-D uint8; layout in `kernels.packing`."""
    _check_bits(bits)
    _check_dtype("codes", codes, torch.uint8)
    if bits < 8 and codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes must be below {2**bits} for {bits} bits, got {int(codes.max())}")
    return _packing.pack(codes, bits)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes (uint8, ``shape``) of a tensor made by `pack`."""
    _check_packed(packed, bits, math.prod(shape))
    return _packing.unpack(packed, bits, tuple(shape))


def tile(packed: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """Codes made by `pack` in the layout that a GPU's kernels want (`kernels.tiles`), 1-D uint8, on the same device.

    Args:
        packed: uint8, the codes of a ``(rows, columns)`` weight.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight; of one with more dimensions, the first and all others.
        groups: into how many equal groups the rows fall; each is padded to 16 rows by itself.

    Raises:
        TypeError, ValueError: on a wrong dtype or size, or where ``groups`` does not divide ``rows``.
    """
    _check_packed(packed, bits, rows * columns)
    return _tiles.tile(packed, bits, rows, columns, groups)


def untile(tiles: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The packed codes, 1-D uint8, of a tensor made by `tile` with the same other arguments."""
    _check_bits(bits)
    _check_bytes("tiles", tiles, bits, rows * columns, _tiles.tiled_bytes(rows, columns, bits, groups))
    return _tiles.untile(tiles, bits, rows, columns, groups)


def panel(planes: Tensor, codebook: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """Codes made by `pack` in the layout that native CPU kernels want (`kernels.panels`), 1-D uint8, same device.

    Args:
        planes: uint8, the codes of a ``(rows, columns)`` weight.
        codebook: ``(2**bits,)``, as in `packed_linear`: of 8 bits, panels hold the entries of an int8 codebook.
        bits: width of a code, 1 to 8.
        rows, columns: of the weight; of one with more dimensions, the first and all others.
        groups: into how many equal groups the rows fall; each is padded to 16 rows by itself.

    Raises:
        TypeError, ValueError: on a wrong dtype or size, or where ``groups`` does not divide ``rows``.
        RuntimeError: where there is no native library, in which case no CPU kernel wants panels.
    """
    _check_bits(bits)
    _check_bytes("planes", planes, bits, rows * columns, _packing.packed_bytes(rows * columns, bits))
    _check_codebook(codebook, bits)
    return _panels.panel(planes, codebook, bits, rows, columns, groups)


def unpanel(panels: Tensor, codebook: Tensor, bits: int, rows: int, columns: int, groups: int = 1) -> Tensor:
    """The packed codes, 1-D uint8, of a tensor made by `panel` with the same other arguments.

    Of several codes with equal entries in an int8 codebook of 8 bits it is the first.
    """
    _check_bits(bits)
    _check_bytes("panels", panels, bits, rows * columns, _layouts.layout_bytes("panels", bits, rows, columns, groups))
    _check_codebook(codebook, bits)
    return _panels.unpanel(panels, codebook, bits, rows, columns, groups)


def quantize_activations(x: Tensor, dtype: str) -> Tensor:
    """Fake-quantize ``x`` (..., features) to ``dtype`` ("int8" or "fp8") with one dynamic scale per token, max|x| / 127
    or / 448.

    The gradient passes straight through. A token that is not finite becomes NaN.
    """
    _check_option("dtype", dtype, tuple(_activations.LIMITS))
    _check_dtype("x", x, *_FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension")
    return _activations.quantize_activations(x, dtype)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    in_features: int,
    out_features: int | None = None,
    activations: str | None = None,
    epilogue: str | None = None,
    layout: str = "planes",
) -> Tensor:
    """``epilogue(x @ (scale[:, None] * codebook[codes]).T + bias)`` without ever forming the float weight.

    Args:
        x: ``(..., in_features)``, float32, bfloat16 or float16; sums are taken in float32.
        packed: uint8, the packed codes of the ``(out_features, in_features)`` weight.
        codebook: ``(2**bits,)`` float32 values, or as deployed: int8 (value q / 127) or float8_e4m3fn (value q / 256).
        scale: ``(out_features,)`` or ``(1,)`` float32.
        bias: ``(out_features,)``, float32, bfloat16 or float16, or None.
        bits: width of a code, 1 to 8.
        in_features: columns of the weight.
        out_features: rows of the weight; may be left out where ``scale`` or ``bias`` has one entry per row.
        activations: None, ``"int8"`` or ``"fp8"``: how `quantize_activations` treats ``x`` first. On a GPU, 8-bit
            activations and a codebook of the same kind are multiplied as such; on a CPU, int8 ones are.
        epilogue: None, ``"relu"``, ``"silu"``, ``"gelu"``, ``"tanh"``, ``"sigmoid"``, or ``"glu"``, which makes one
            output of rows n and n + out_features / 2: the first times the sigmoid of the second.
        layout: of ``packed``: ``"planes"`` from `pack`, ``"tiles"`` from `tile`, as a GPU wants it, or ``"panels"``
            from `panel`, as a CPU does where there is the native library. Every device takes any, but converts the
            others in each call.

    Returns:
        ``(..., out_features)``, or half of it for ``"glu"``, in the dtype of ``x``. Gradients reach ``x``, ``bias``,
        ``scale`` and a float32 ``codebook``, once: they cannot be differentiated again. They pass straight through the
        rounding of activations.

    Raises:
        TypeError, ValueError: on a wrong dtype or device, a shape that does not fit, or an unknown option.
    """
    _check_dtype("x", x, *_COMPUTED)
    _check_option("activations", activations, (None, *_activations.LIMITS))
    _check_option("epilogue", epilogue, (None, *_EPILOGUES))
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have in_features = {in_features} as its last dimension, got shape {tuple(x.shape)}")
    out_features = out_features or _row_count(scale, bias)
    if epilogue == "glu" and out_features % 2:
        raise ValueError(f"out_features must be even for the epilogue 'glu', which halves them, got {out_features}")
    if bias is not None:
        _check_dtype("bias", bias, *_COMPUTED)
        if bias.shape != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")
    scale = _check_weight(packed, codebook, scale, bits, out_features, in_features, layout)
    _check_devices(x, packed=packed, codebook=codebook, scale=scale, bias=bias)
    options = bits, epilogue or "none", activations or "none", layout
    return _packed_linear.packed_linear(x, packed, codebook, scale, bias, *options)


def packed_depthwise_conv1d(
    x: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int,
    kernel_size: int,
    out_channels: int | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    layout: str = "planes",
) -> Tensor:
    """``nn.Conv1d`` with one group per channel on packed weights, padded with zeros.

    Args:
        x: ``(B, C, T)`` or ``(C, T)``, float32, bfloat16 or float16, any stride; sums are taken in float32.
        packed: uint8, the packed codes of the ``(out_channels, 1, kernel_size)`` weight.
        codebook, bits, layout: as in `packed_linear`.
        scale: ``(out_channels,)`` or ``(1,)`` float32.
        bias: ``(out_channels,)``, float32, bfloat16 or float16, or None.
        kernel_size, stride, padding, dilation: in steps of time; the padding is on either side.
        out_channels: a multiple of C; may be left out where ``scale`` or ``bias`` has one entry per channel.

    Returns:
        ``(B, out_channels, T')`` or ``(out_channels, T')`` in the dtype of ``x``, with channels adjacent in memory
        where they are in ``x``; T' is ``(T + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1``. Gradients
        reach ``x``, ``bias``, ``scale`` and a float32 ``codebook``.

    Raises:
        TypeError, ValueError: on a wrong dtype or device, a shape that does not fit, or an option out of range.
    """
    _check_dtype("x", x, *_COMPUTED)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must have shape (B, C, T) or (C, T), got {tuple(x.shape)}")
    least = {"kernel_size": (kernel_size, 1), "stride": (stride, 1), "dilation": (dilation, 1), "padding": (padding, 0)}
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    channels, length = x.shape[-2:]
    if length + 2 * padding <= dilation * (kernel_size - 1):
        raise ValueError(
            f"x must be at least {dilation * (kernel_size - 1) + 1 - 2 * padding} long in time for a kernel of "
            f"{kernel_size} taps, dilation {dilation} and padding {padding}, got {length}"
        )
    out_channels = out_channels or _row_count(scale, bias)
    if channels < 1 or out_channels % channels:
        raise ValueError(f"out_channels must be a multiple of the {channels} channels of x, got {out_channels}")
    if bias is not None:
        _check_dtype("bias", bias, *_COMPUTED)
        if bias.shape != (out_channels,):
            raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    scale = _check_weight(packed, codebook, scale, bits, out_channels, kernel_size, layout)
    _check_devices(x, packed=packed, codebook=codebook, scale=scale, bias=bias)
    sequences = x if x.dim() == 3 else x.unsqueeze(0)
    options = bits, kernel_size, stride, padding, dilation, layout
    y = _packed_conv.packed_depthwise_conv1d(sequences, packed, codebook, scale, bias, *options)
    return y if x.dim() == 3 else y.squeeze(0)


def packed_embedding(
    indices: Tensor,
    packed: Tensor,
    codebook: Tensor,
    scale: Tensor,
    *,
    bits: int,
    embedding_dim: int,
    num_embeddings: int | None = None,
    layout: str = "planes",
    groups: int = 1,
) -> Tensor:
    """Rows ``indices`` of the packed table: ``scale[i] * codebook[codes[i]]``, ``(..., embedding_dim)`` float32.

    Args:
        indices: any shape, int32 or int64. One out of range raises IndexError on the CPU and gives NaN on a GPU.
        packed: uint8, the packed codes of the ``(num_embeddings, embedding_dim)`` table.
        codebook, bits, layout: as in `packed_linear`.
        scale: ``(num_embeddings,)`` or ``(1,)`` float32.
        embedding_dim: entries of a row.
        num_embeddings: rows of the table; may be left out where ``scale`` has one entry per row.
        groups: of rows, as given to `tile` or `panel`.

    Raises:
        TypeError, ValueError: on a wrong dtype, a shape that does not fit, or an unknown option.
    """
    _check_dtype("indices", indices, torch.int32, torch.int64)
    num_embeddings = num_embeddings or _row_count(scale, None)
    scale = _check_weight(packed, codebook, scale, bits, num_embeddings, embedding_dim, layout, groups)
    return _packed_embedding.packed_embedding(indices, packed, codebook, scale, bits, embedding_dim, layout, groups)


def packed_recurrent(
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor, Tensor]],
    biases: Sequence[Tensor] = (),
    *,
    bits: Sequence[int],
    activations: Sequence[str | None] = (),
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    layout: str = "planes",
) -> list[Tensor]:
    """One layer of an LSTM or GRU in one direction, on packed weights; with the gates in ``nn.LSTM``'s order.

    Args:
        x: ``(T, B, K)``, or ``(N, K)`` with ``batch_sizes``; float32, bfloat16 or float16; T at least 1.
        states: the first states in the dtype of ``x``: ``[h, c]``, ``(B, P)`` and ``(B, H)``, of an LSTM; ``[h]``,
            ``(B, H)``, of a GRU. P is H but for an LSTM with a projection.
        weights: codes, codebook and scale, as in `packed_linear`, of weight_ih ``(G H, K)``, of weight_hh ``(G H, P)``
            and, with a projection, of weight_hr ``(P, H)``; G is 4 for an LSTM and 3 for a GRU.
        biases: bias_ih and bias_hh, ``(G H,)``, float32, bfloat16 or float16; or none.
        bits: width of a code, 1 to 8, of each weight.
        activations: None, ``"int8"`` or ``"fp8"``, for each weight: how `quantize_activations` treats first what it
            multiplies, which is ``x``; h, at every step; and what is projected, at every step. Default: none of it.
        batch_sizes: ``(T,)`` int64 on the CPU, the number of sequences at each step, as in torch's PackedSequence.
        reverse: whether time runs backwards; the output stays in the order of ``x``.
        layout: as in `packed_linear`; G groups of rows in weight_ih and weight_hh, one in weight_hr.

    Returns:
        The hidden states of all steps, ``(T, B, P)`` or ``(N, P)``, and the last states, in the dtype of ``x``.
        Gradients reach ``x``, ``states``, ``biases``, scales and float32 codebooks.

    Raises:
        TypeError, ValueError: on a wrong dtype or device, or a shape that does not fit.
    """
    _check_dtype("x", x, *_COMPUTED)
    if x.dim() != (3 if batch_sizes is None else 2) or x.shape[0] == 0:
        expected = "(T, B, K) with T > 0, or (N, K) with batch_sizes"
        raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
    batch = x.shape[1] if batch_sizes is None else _check_batch_sizes(batch_sizes, x.shape[0])
    _check_states(states, batch, x.dtype)
    shapes = _packed_recurrent.weight_shapes(x.shape[-1], list(states))
    fewest = 2 if states[0].shape == states[-1].shape else 3
    if len(weights) != len(bits) or not fewest <= len(weights) <= len(states) + 1:
        raise ValueError(
            "weights and bits must be those of weight_ih, weight_hh and, with a projection, weight_hr, for states of "
            f"sizes {[state.shape[1] for state in states]}; got {len(weights)} and {len(bits)}"
        )
    kinds = [kind or "none" for kind in activations] or ["none"] * len(weights)
    for kind in kinds:
        _check_option("activations", kind, ("none", *_activations.LIMITS))
    if len(kinds) != len(weights):
        raise ValueError(f"activations must be given for each of {len(weights)} weights or for none, got {len(kinds)}")
    flat = []
    for (codes, codebook, scale), width, (rows, columns, groups) in zip(weights, bits, shapes, strict=False):
        flat += [codes, codebook, _check_weight(codes, codebook, scale, width, rows, columns, layout, groups)]
    _check_biases(biases, shapes[0][0])
    if any(tensor.device != x.device for tensor in (*states, *flat, *biases)):  # names cost more than the question
        for name, tensors in (("states", states), ("weights", flat), ("biases", biases)):
            _check_devices(x, **{f"{name}[{index}]": tensor for index, tensor in enumerate(tensors)})
    packed = flat, list(bits), kinds, list(biases), reverse, layout
    return _packed_recurrent.packed_recurrent(x, batch_sizes, list(states), *packed)


# --- validation -------------------------------------------------------------------------------------------------------


def _check_option(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def _check_quantizer(weight: Tensor, scale: Tensor, centroids: Tensor, mu: float | Tensor) -> None:
    _check_dtype("weight", weight, *_FLOATS)
    if weight.dim() == 0:
        raise ValueError("weight must have at least one dimension")
    _check_scale(scale, weight, "weight")
    _check_centroids(centroids)
    tensors = {"scale": scale, "centroids": centroids}
    if isinstance(mu, Tensor):
        tensors["mu"] = mu
    for name, tensor in tensors.items():
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the weight's device, {weight.device}, but is on {tensor.device}")


def _check_group(
    weights: Sequence[Tensor], scale: Tensor, centroids: Tensor, mu: Tensor, hardness: Tensor, per_channel: bool
) -> None:
    group = len(weights)
    for weight in weights:
        _check_dtype("weights", weight, *_FLOATS)
        if weight.dim() == 0:
            raise ValueError("weights must have at least one dimension each")
        if (weight.dtype, weight.device) != (weights[0].dtype, weights[0].device):
            raise ValueError(
                f"weights must have one dtype and device, got {weights[0].dtype} on {weights[0].device} "
                f"and {weight.dtype} on {weight.device}"
            )
    scales = sum(weight.shape[0] for weight in weights) if per_channel else group
    expected = {"scale": (scale, (scales,)), "mu": (mu, (group,)), "hardness": (hardness, (group,))}
    for name, (tensor, shape) in expected.items():
        _check_dtype(name, tensor, *_FLOATS)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} for {group} weights, got {tuple(tensor.shape)}")
    _check_dtype("centroids", centroids, *_FLOATS)
    for name, tensor in {"scale": scale, "mu": mu, "hardness": hardness, "centroids": centroids}.items():
        if weights and tensor.device != weights[0].device:
            raise ValueError(f"{name} must be on the weights' device, {weights[0].device}, but is on {tensor.device}")
    if centroids.shape[:-1] != (group,) or centroids.shape[-1] not in _LEVELS:
        raise ValueError(
            f"centroids must have shape ({group}, K) with K a power of two, 2 to 256, got {tuple(centroids.shape)}"
        )


def _check_scale(scale: Tensor, rows: Tensor, name: str) -> None:
    _check_dtype("scale", scale, *_FLOATS)
    if scale.dim() != 1 or scale.numel() not in (1, rows.shape[0]):
        allowed = f"({rows.shape[0]},), the first dimension of {name}, or (1,)"
        raise ValueError(f"scale must have shape {allowed}, got {tuple(scale.shape)}")


def _check_centroids(centroids: Tensor) -> None:
    _check_dtype("centroids", centroids, *_FLOATS)
    if centroids.dim() != 1 or centroids.numel() not in _LEVELS:
        raise ValueError(
            f"centroids must have shape (K,) with K a power of two, 2 to 256, got {tuple(centroids.shape)}"
        )


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")


def _check_packed(packed: Tensor, bits: int, count: int) -> None:
    _check_bits(bits)
    _check_bytes("packed", packed, bits, count, _packing.packed_bytes(count, bits))


def _check_weight(
    packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, rows: int, columns: int, layout: str, groups: int = 1
) -> Tensor:
    """The scale with one entry per row, of a packed weight whose parts fit together."""
    _check_option("layout", layout, _layouts.LAYOUTS)
    scale = _expand_scale(scale, rows)
    _check_bits(bits)
    expected = _layouts.layout_bytes(layout, bits, rows, columns, groups)
    _check_bytes("packed", packed, bits, rows * columns, expected)
    _check_codebook(codebook, bits)
    if codebook.requires_grad and codebook.dtype != torch.float32:
        raise TypeError(f"codebook must have dtype torch.float32 to receive a gradient, got {codebook.dtype}")
    return scale


def _check_codebook(codebook: Tensor, bits: int) -> None:
    _check_dtype("codebook", codebook, torch.float32, *_tables.CODEBOOK_SCALES)
    if codebook.shape != (2**bits,):
        raise ValueError(f"codebook must have shape ({2**bits},) for {bits} bits, got {tuple(codebook.shape)}")


def _check_bytes(name: str, tensor: Tensor, bits: int, count: int, expected: int) -> None:
    _check_dtype(name, tensor, torch.uint8)
    if tensor.shape != (expected,):
        raise ValueError(
            f"{name} must have shape ({expected},) for {count} codes of {bits} bits, got {tuple(tensor.shape)}"
        )


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> int:
    """The number of sequences."""
    _check_dtype("batch_sizes", batch_sizes, torch.int64)
    sizes = batch_sizes.tolist() if batch_sizes.dim() == 1 and not batch_sizes.is_cuda else [0]
    if sizes != sorted(sizes, reverse=True) or sum(sizes) != rows or sizes[-1] < 1:
        raise ValueError(
            f"batch_sizes must be positive and falling numbers on the CPU, of sum {rows}, the rows of x; "
            f"got {batch_sizes}"
        )
    return sizes[0]


def _check_states(states: Sequence[Tensor], batch: int, dtype: torch.dtype) -> None:
    if len(states) not in (1, 2):
        raise ValueError(f"states must be [h] of a GRU or [h, c] of an LSTM, got {len(states)} tensors")
    for index, state in enumerate(states):
        _check_dtype(f"states[{index}]", state, dtype)
        if state.dim() != 2 or state.shape[0] != batch:
            raise ValueError(f"states[{index}] must have shape ({batch}, size), got {tuple(state.shape)}")


def _check_biases(biases: Sequence[Tensor], rows: int) -> None:
    if len(biases) not in (0, 2):
        raise ValueError(f"biases must be bias_ih and bias_hh, or none; got {len(biases)} tensors")
    for index, bias in enumerate(biases):
        _check_dtype(f"biases[{index}]", bias, *_COMPUTED)
        if bias.shape != (rows,):
            raise ValueError(f"biases[{index}] must have shape ({rows},), got {tuple(bias.shape)}")


def _check_devices(x: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, but is on {tensor.device}")


def _values(codebook: Tensor) -> Tensor:
    """A stored codebook as float32 values."""
    _check_dtype("codebook", codebook, torch.float32, *_tables.CODEBOOK_SCALES)
    return _tables.stored_values(codebook)


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor on ``device``; a number is filled in there, so nothing waits for a copy."""
    if not isinstance(value, Tensor):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    return value.reshape(())


def _flushed(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale in ``dtype``, 0 where it is subnormal: products with such a scale keep too few bits to be compared."""
    scale = scale.to(dtype)
    return torch.where(scale.abs() < torch.finfo(dtype).tiny, 0.0, scale)


def _row_count(scale: Tensor, bias: Tensor | None) -> int:
    _check_dtype("scale", scale, torch.float32)
    return max(scale.numel(), 0 if bias is None else bias.numel())


def _expand_scale(scale: Tensor, rows: int) -> Tensor:
    _check_dtype("scale", scale, torch.float32)
    if scale.dim() != 1 or scale.numel() not in (1, rows):
        raise ValueError(f"scale must have shape ({rows},) or (1,), got {tuple(scale.shape)}")
    return scale if len(scale) == rows else scale.expand(rows)
