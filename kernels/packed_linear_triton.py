"""Triton kernels of the packed linear layer: codes are decoded in registers, between the load and the tensor core.

Mathematics and operator: `gq_triton.kernels.packed_linear`; decoding: `gq_triton.kernels.decode`.  With entries e of
the codebook, which stand for u e (u = 1, 1/127 or 1/256), scales s of the rows and q of the tokens, if those are bytes,

    y[m, n] = epilogue(s[n] u q[m] sum_k x[m, k] e[code[n, k]] + b[n])

Few tokens (`_gemv_kernel`): weights are the first operand, of 16 rows, and tokens the second, of 8: a lane multiplies
straight from its 16-byte load of codes, no weight passes through shared memory.  The columns are split over the warps
of a program, so that even a small weight occupies the device in one launch, and their sums are added in a fixed order.
Where many programs would read the inputs of a large weight again and again, columns are split over programs as well,
and a second launch adds their sums, in a fixed order too.

Many tokens (`_gemm_kernel`): tokens are the first operand, and a tile of weights, decoded once for up to 128 tokens,
goes through shared memory as the second.

Which of the two, and in which shape, `plan` tells from the sizes alone; nothing is tuned when a layer first runs.  A
table of plans measured on a device takes precedence (`use_tuned`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from gq_triton.kernels import activations as activation_kernels
from gq_triton.kernels.backend import INTERPRETED, bound, cdiv, jit, launching, next_power_of_2, tl, triton
from gq_triton.kernels.decode import decoded, load_tables, multiply, natural, way_of
from gq_triton.kernels.tables import as_stored
from gq_triton.kernels.tiles import as_words, step_columns

__all__ = [
    "FORMS",
    "OPERANDS",
    "Plan",
    "candidates",
    "launch",
    "multiplies_bytes",
    "plan",
    "specialization",
    "tuned_key",
    "use_tuned",
]

FORMS = {torch.float32: "float", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
OPERANDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


# --- epilogue ---------------------------------------------------------------------------------------------------------


@jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))


@jit
def tanh(x):
    small = tl.exp2(tl.abs(x) * -2.8853900817779268)
    y = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -y, y)


@jit
def _activate(y, EPILOGUE: tl.constexpr):
    if EPILOGUE == "relu":
        y = tl.where(y < 0.0, 0.0, y)
    elif EPILOGUE == "silu":
        y = y * sigmoid(y)
    elif EPILOGUE == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif EPILOGUE == "tanh":
        y = tanh(y)
    elif EPILOGUE == "sigmoid":
        y = sigmoid(y)
    return y


@jit
def _own_rows(begin, rows, R: tl.constexpr, EPILOGUE: tl.constexpr):
    """The R rows of a program from ``begin`` on, ``rows`` where there are no more; for "glu", half of them from the
    second half."""
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    width = rows // HALVES
    place = tl.arange(0, R)
    own = begin + place % (R // HALVES)
    return tl.where(own < width, own + place // (R // HALVES) * width, rows)


@jit
def _finish(
    y,  # (T, R) float32
    token,  # (T,)
    begin,  # first row of the weight; for "glu", of each half
    token_scale,
    scale,
    bias,
    out,
    tokens,
    rows,
    scale_stride,
    OPERAND: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    R: tl.constexpr,
):
    """Scales, bias, epilogue and store of a program's sums."""
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    width = rows // HALVES
    row = _own_rows(begin, rows, R, EPILOGUE)
    inside = row < rows
    y *= (tl.load(scale + row * scale_stride, mask=inside, other=0.0) * UNIT)[None, :]
    if OPERAND == "byte":
        y *= tl.load(token_scale + token, mask=token < tokens, other=0.0)[:, None]
    if HAS_BIAS:
        y += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "glu":
        values, gates = tl.split(tl.permute(tl.reshape(y, (y.shape[0], 2, R // 2)), (0, 2, 1)))
        y = values * sigmoid(gates)
    else:
        y = _activate(y, EPILOGUE)
    own = begin + tl.arange(0, R // HALVES)
    mask = (token < tokens)[:, None] & (own < width)[None, :]
    tl.store(out + token.to(tl.int64)[:, None] * width + own[None, :], y.to(out.dtype.element_ty), mask=mask)


@jit
def _row_blocks(part, blocks, NB: tl.constexpr, EPILOGUE: tl.constexpr):
    """The NB row blocks of part ``part`` of a weight; for "glu", half of them from its second half."""
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    index = tl.arange(0, NB)
    return part * (NB // HALVES) + index % (NB // HALVES) + index // (NB // HALVES) * (blocks // HALVES)


# --- few tokens -------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["tokens", "scale_stride"])
def _gemv_kernel(
    x,  # (tokens, columns), contiguous
    token_scale,  # (tokens,) float32, if x is bytes
    tiles,
    codebook,
    scale,
    bias,
    out,  # (tokens, rows), for "glu" (tokens, rows / 2)
    tokens,
    rows,
    columns,
    scale_stride,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    RB: tl.constexpr,
    WN: tl.constexpr,
    WK: tl.constexpr,
    MB: tl.constexpr,
    PARTS: tl.constexpr,
):
    """16 RB rows in each of WN warps for 8 MB tokens, the columns split over WK warps, and over PARTS programs."""
    R: tl.constexpr = 16 * RB * WN
    blocks = tl.cdiv(rows, 16)
    first = tl.program_id(1) * (8 * MB)
    block = _row_blocks(tl.program_id(0), blocks, RB * WN, EPILOGUE)
    block = tl.reshape(tl.trans(tl.reshape(block, (WN, RB))), (RB * WN,))
    y = multiply(
        x,
        first,
        tokens,
        columns,
        tiles,
        block,
        blocks,
        codebook,
        BITS,
        FORM,
        OPERAND,
        WAY,
        ASM,
        PRECISION,
        EXACT,
        RB,
        WN,
        WK,
        MB,
        tl.program_id(2),
        PARTS,
    )
    y = tl.trans(tl.reshape(y, (R, 8 * MB)))
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    begin = tl.program_id(0) * (R // HALVES)
    token = first + tl.arange(0, 8 * MB)
    if PARTS == 1:
        _finish(
            y,
            token,
            begin,
            token_scale,
            scale,
            bias,
            out,
            tokens,
            rows,
            scale_stride,
            OPERAND,
            UNIT,
            HAS_BIAS,
            EPILOGUE,
            R,
        )
    else:  # `out` is (PARTS, tokens, rows), float32
        row = _own_rows(begin, rows, R, EPILOGUE)
        mask = (token < tokens)[:, None] & (row < rows)[None, :]
        place = (tl.program_id(2) * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(out + place, y, mask=mask)


@jit(do_not_specialize=["tokens", "scale_stride"])
def _sum_kernel(
    parts,  # (PARTS, tokens, rows) float32
    token_scale,
    scale,
    bias,
    out,
    tokens,
    rows,
    scale_stride,
    OPERAND: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
):
    """R rows of T tokens, of which `_gemv_kernel` left sums over parts of the columns."""
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    token = tl.program_id(1) * T + tl.arange(0, T)
    begin = tl.program_id(0) * (R // HALVES)
    row = _own_rows(begin, rows, R, EPILOGUE)
    mask = (token < tokens)[:, None] & (row < rows)[None, :]
    y = tl.zeros((T, R), tl.float32)
    for part in tl.static_range(PARTS):
        place = (part * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
        y += tl.load(parts + place, mask=mask, other=0.0)
    _finish(
        y,
        token,
        begin,
        token_scale,
        scale,
        bias,
        out,
        tokens,
        rows,
        scale_stride,
        OPERAND,
        UNIT,
        HAS_BIAS,
        EPILOGUE,
        R,
    )


# --- many tokens ------------------------------------------------------------------------------------------------------


@jit(do_not_specialize=["tokens", "scale_stride"])
def _gemm_kernel(
    x,  # (tokens, columns), contiguous
    token_scale,  # (tokens,) float32, if x is bytes
    tiles,
    codebook,
    scale,
    bias,
    out,  # (tokens, rows), for "glu" (tokens, rows / 2)
    tokens,
    rows,
    columns,
    scale_stride,
    BITS: tl.constexpr,
    FORM: tl.constexpr,
    OPERAND: tl.constexpr,
    WAY: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """BM tokens by BN rows. Programs that follow one another share their tokens, which are more bytes than codes."""
    SUBS: tl.constexpr = 1 if BITS % 4 == 0 else (2 if BITS % 2 == 0 else 4)
    INTEGER: tl.constexpr = OPERAND == "byte" and FORM == "int8" and not EXACT
    # Hopper's products of e4m3 add with fewer bits than float32 has; so many columns go together, then to float32.
    COARSE: tl.constexpr = 64 if OPERAND == "byte" and FORM == "fp8" and not EXACT else None
    blocks = tl.cdiv(rows, 16)
    across = tl.cdiv(rows, BN)
    part, begin = tl.program_id(0) % across, tl.program_id(0) // across * BM
    block = _row_blocks(part, blocks, BN // 16, EPILOGUE)
    token = begin + tl.arange(0, BM)
    at = tl.arange(0, 64)
    source = x + token.to(tl.int64)[:, None] * columns + at[None, :]
    tables = load_tables(codebook, BITS, FORM, OPERAND, WAY, ASM)
    total = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    steps = tl.cdiv(columns, 64 * SUBS)
    for step in range(0, bound(steps)):
        for SUB in tl.static_range(SUBS):
            column = (step * SUBS + SUB) * 64
            inside = (token < tokens)[:, None] & (column + at < columns)[None, :]
            inputs = tl.load(source + column, mask=inside, other=0.0)
            if EXACT:
                inputs = inputs.to(tl.float32)
            words = decoded(
                tiles, block, blocks, block * 0, step, steps, codebook, tables, SUB, BITS, FORM, OPERAND, WAY, ASM
            )
            weights = natural(words, BN // 16, FORM, OPERAND, EXACT)
            weights = tl.trans(weights)
            total = tl.dot(inputs, weights, total, PRECISION, max_num_imprecise_acc=COARSE, out_dtype=total.dtype)
    HALVES: tl.constexpr = 2 if EPILOGUE == "glu" else 1
    _finish(
        total.to(tl.float32),
        token,
        part * (BN // HALVES),
        token_scale,
        scale,
        bias,
        out,
        tokens,
        rows,
        scale_stride,
        OPERAND,
        UNIT,
        HAS_BIAS,
        EPILOGUE,
        BN,
    )


# --- plans ------------------------------------------------------------------------------------------------------------


FEW = 64  # tokens, up to which weights are multiplied in the lanes that loaded them
LARGE = 1 << 24  # weights, from which inputs that programs read in common cost more than one launch more
SUMS = 64  # row blocks times blocks of 8 tokens times warps of a program, at most: its sums take 512 bytes each


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product runs.

    Attributes:
        kernel: "gemv" or "gemm".
        rows: of the weight in one program.
        tokens: in one program.
        warps: of one program.
        stages: of the pipeline of loads, or as many as shared memory has room for.
        parts: into which the columns are split, a program each; a second launch adds them.
    """

    kernel: str
    rows: int
    tokens: int
    warps: int
    stages: int
    parts: int = 1

    @property
    def row_warps(self) -> int:
        """Warps of "gemv" that take rows of their own, up to 64 each; the others share their columns."""
        return max(1, self.rows // 64)

    def fitting_stages(self, bits: int, operand: str, shared: int) -> int:
        """How many of its stages fit into ``shared`` bytes of shared memory."""
        size, columns = {"fp32": 4, "byte": 1}.get(operand, 2), step_columns(bits)
        if self.kernel == "gemm":
            inputs, codes = self.tokens * columns * size, self.rows * columns * bits // 8
            needed = [n * inputs + (n - 1) * codes + self.rows * 64 * size for n in range(1, self.stages + 1)]
        else:  # every warp has its own, in each of two turns of the loop
            inputs, codes = self.tokens * columns * size, self.rows // self.row_warps * columns * bits // 8
            needed = [2 * (n - 1) * self.warps * (inputs + codes) for n in range(1, self.stages + 1)]
        return max(1, sum(count <= shared for count in needed))


def plan(
    tokens: int, rows: int, columns: int, bits: int, processors: int, operand: str = "bf16", wide: bool = True
) -> Plan:
    """The plan for a product of ``tokens`` with a weight (rows, columns), on a device of so many multiprocessors.

    Up to `FEW` tokens, few to a program, with as many row blocks as leave three of four multiprocessors a program, and
    as many warps as there are steps of columns.  Large weights with more than 8 tokens are split the other way, since
    every program reads its tokens: many rows to a program, and parts of the columns.  Above `FEW`, the largest tiles
    that leave every multiprocessor one, but for operands whose sums take too many registers. ``wide`` says whether
    tensor cores take operands from shared memory, which leaves registers for 256 rows.
    """
    if tokens > FEW:
        tiles = [(128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4)]
        tiles = tiles[{"fp32": 3, "fp8": 1}.get(operand, 0 if wide else 1) :]
        fit = [tile for tile in tiles if cdiv(tokens, tile[0]) * cdiv(rows, tile[1]) >= processors]
        tokens_of, rows_of, warps = fit[0] if fit else tiles[-1]
        return Plan("gemm", rows_of, tokens_of, warps, 3)
    mb = min(4, next_power_of_2(cdiv(tokens, 8)))
    steps = next_power_of_2(max(1, cdiv(columns, step_columns(bits))))
    if mb > 1 and rows * columns >= LARGE:
        parts = min(max(1, steps // 4), next_power_of_2(max(1, processors // cdiv(rows, 256))))
        return Plan("gemv", 256, 8 * mb, 8, 3, parts)
    rb = next((rb for rb in (4, 2) if 4 * cdiv(rows, 16 * rb) >= 3 * processors), 1)
    most = 16 if bits in (1, 2, 4) else 8  # others take more registers than 16 warps have
    return Plan("gemv", 16 * rb, 8 * mb, min(most, steps, SUMS // (rb * mb)), 1)


def candidates(tokens: int, rows: int, columns: int, bits: int) -> list[Plan]:
    """The plans that are worth measuring for a product."""
    steps = next_power_of_2(max(1, cdiv(columns, step_columns(bits))))
    few = [
        Plan("gemv", 16 * rb, 8 * mb, warps, stages)
        for rb, mb, warps, stages in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 4, 8, 16), (1, 3))
        if warps <= min(steps, SUMS // (rb * mb)) and (mb == 1 or 4 * mb < tokens)
    ]
    few += [
        Plan("gemv", rows_of, 8 * mb, 8, 3, parts)
        for rows_of, mb, parts in itertools.product((128, 256), (1, 2, 4), (2, 4, 8, 16))
        if parts <= steps // 4 and (mb == 1 or 4 * mb < tokens)
    ]
    many = [
        Plan("gemm", rows_of, tokens_of, warps, stages)
        for rows_of, tokens_of, warps, stages in itertools.product((64, 128, 256), (64, 128), (4, 8), (3, 4))
        if rows_of * tokens_of <= 4096 * warps
    ]
    return (few if tokens <= 4 * FEW else []) + (many if tokens > FEW // 4 else [])


_TUNED: dict[tuple[str, int, int, int, int, str], Plan] = {}


def tuned_key(device: torch.device, tokens: int, rows: int, columns: int, bits: int, operand: str) -> tuple:
    """Under which a measured plan is kept: numbers of tokens are taken up to a power of two."""
    return torch.cuda.get_device_name(device), next_power_of_2(tokens), rows, columns, bits, operand


def use_tuned(plans: dict[tuple, Plan]) -> None:
    """Prefer these plans, by `tuned_key`, to those of `plan`; replaces what an earlier call gave."""
    _TUNED.clear()
    _TUNED.update(plans)
    _chosen_plan.cache_clear()


@functools.lru_cache(1 << 12)  # a call of a small layer takes no longer than this takes
def _chosen_plan(tokens: int, rows: int, columns: int, bits: int, operand: str, device: torch.device) -> Plan:
    key = tuned_key(device, tokens, rows, columns, bits, operand) if _TUNED else None
    return _TUNED.get(key) or plan(tokens, rows, columns, bits, processors(device), operand, _wide(device))


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of ``device``; under the interpreter, a few."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(1 << 12)
def _fitted(chosen: Plan, bits: int, operand: str, device: torch.device) -> Plan:
    return dataclasses.replace(chosen, stages=chosen.fitting_stages(bits, operand, _shared_memory(device)))


def _wide(device: torch.device) -> bool:
    return NVIDIA and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of it, less what the compiler may want for itself."""
    if INTERPRETED:
        return 0
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"] - 2048


# --- launcher ---------------------------------------------------------------------------------------------------------

NVIDIA = not INTERPRETED and torch.version.hip is None
PERMUTES = NVIDIA or INTERPRETED
INTEGER_COLUMNS = (2**31 - 1) // (127 * 128)  # of int8 products, the largest of either sign
SUM_TILE = 256, 4  # rows and tokens of a program of `_sum_kernel`


def launch(
    x: Tensor,
    tiles: Tensor,
    codebook: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: int,
    epilogue: str,
    activations: str,
    chosen: Plan | None = None,
) -> Tensor:
    """The packed linear layer on a GPU; arguments as of `gq_triton.kernels.packed_linear.packed_linear`, with ``tiles``
    in the tiled layout; ``chosen`` is for measuring plans. Default: the tuned plan, or `plan`'s."""
    rows, columns = scale.numel(), x.shape[-1]
    if epilogue == "glu" and rows % 32:  # a row block would be of both halves
        return torch.nn.functional.glu(launch(x, tiles, codebook, scale, bias, bits, "none", activations, chosen))
    out = torch.empty(*x.shape[:-1], rows // 2 if epilogue == "glu" else rows, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    tokens = out.numel() // out.shape[-1]
    form, operand, token_scale = FORMS[codebook.dtype], OPERANDS[x.dtype], scale
    x = x.contiguous()
    if activations != "none" and multiplies_bytes(activations, form, tokens, columns, x.device):
        x, token_scale = activation_kernels.quantize_tokens(x, activations)
        operand = "byte"
    elif activations != "none":
        x = activation_kernels.quantize_activations(x, activations)
    kind = "fp8" if operand == "byte" and form == "fp8" else operand
    chosen = _fitted(chosen or _chosen_plan(tokens, rows, columns, bits, kind, x.device), bits, operand, x.device)
    tensors = (
        x.view(tokens, columns),
        token_scale,
        as_words(tiles),
        as_stored(codebook),
        scale,
        scale if bias is None else bias.contiguous(),
        out,
    )
    shape = specialization(bits, form, operand) | {"HAS_BIAS": bias is not None, "EPILOGUE": epilogue}
    sizes = tokens, rows, columns, scale.stride(0)
    with launching(x):
        if chosen.kernel == "gemv":
            _launch_gemv(tensors, sizes, shape, chosen)
        else:
            grid = (cdiv(rows, chosen.rows) * cdiv(tokens, chosen.tokens),)
            shape["WAY"] = shape["WAY"].replace("sign", "permute" if PERMUTES else "gather")
            tile = {"BM": chosen.tokens, "BN": chosen.rows}
            _gemm_kernel[grid](*tensors, *sizes, **shape, **tile, num_warps=chosen.warps, num_stages=chosen.stages)
    return out


def _launch_gemv(tensors: tuple, sizes: tuple[int, ...], shape: dict[str, Any], chosen: Plan) -> None:
    *inputs, out = tensors
    tokens, rows, _, scale_stride = sizes
    own = max(chosen.rows, 32) if shape["EPILOGUE"] == "glu" else chosen.rows  # a row block of each half at least
    split = {"WN": chosen.row_warps, "WK": chosen.warps // chosen.row_warps, "PARTS": chosen.parts}
    tile = {"RB": own // 16 // chosen.row_warps, "MB": chosen.tokens // 8} | split
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    target = out
    if chosen.parts > 1:
        target = torch.empty(chosen.parts, tokens, rows, dtype=torch.float32, device=out.device)
    grid = cdiv(rows, own), cdiv(tokens, chosen.tokens), chosen.parts
    _gemv_kernel[grid](*inputs, target, *sizes, **shape, **tile, **options)
    if chosen.parts > 1:
        _, token_scale, _, _, scale, bias = inputs
        kept = {name: shape[name] for name in ("OPERAND", "UNIT", "HAS_BIAS", "EPILOGUE")}
        tile = {"R": SUM_TILE[0], "T": SUM_TILE[1], "PARTS": chosen.parts}
        grid = cdiv(rows, SUM_TILE[0]), cdiv(tokens, SUM_TILE[1])
        _sum_kernel[grid](target, token_scale, scale, bias, out, tokens, rows, scale_stride, **kept, **tile)


def multiplies_bytes(activations: str, form: str, tokens: int, columns: int, device: torch.device) -> bool:
    """Whether 8-bit activations are multiplied as such.

    That takes a codebook of their kind; for int8, no more columns than a sum of integers has room for; for e4m3, a part
    that can, and many tokens: the instruction for few of them converts both to 16 bits.
    """
    if activations != form:
        return False
    if form == "int8":
        return columns <= INTEGER_COLUMNS
    return tokens > FEW and (INTERPRETED or _wide(device))


def specialization(
    bits: int, form: str, operand: str, *, permutes: bool = PERMUTES, asm: bool = NVIDIA
) -> dict[str, Any]:
    """Compile-time arguments that follow from the data."""
    return {
        "BITS": bits,
        "FORM": form,
        "OPERAND": operand,
        "WAY": way_of(bits, operand, permutes),
        "ASM": asm,
        "PRECISION": "tf32x3" if asm else "ieee",
        "EXACT": INTERPRETED,
        "UNIT": {"float": 1.0, "int8": 1 / 127, "fp8": 1 / 256}[form],
    }
