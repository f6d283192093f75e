"""Kernels whose costs are known, for `test_aot.py`; run as a script, it prints their rooflines as JSON.

It must not be imported under the interpreter, which cannot compile.
"""

import dataclasses
import json
import sys

import triton
import triton.language as tl

from gq_triton.kernels.aot import Variant, broken_budgets, roofline
from gq_triton.kernels.parts import PARTS

BLOCK = 2048


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def copy_in_a_loop(x, out, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + i, tl.load(x + i))


@triton.jit
def strided(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + 3 * i))


@triton.jit
def transcendental(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i)
    tl.store(out + i, tl.exp(y) + tl.log2(y) + tl.log(y + 3.0) + tl.log(tl.sum(y)))


@triton.jit
def double(x, out, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + i).to(tl.float64)
    tl.store(out + i, (y * y + 1.0).to(tl.float32))


@triton.jit
def product(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + i).to(tl.bfloat16)
    tl.store(out + i, tl.dot(a, a))


@triton.jit
def hungry(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i)
    b = tl.load(x + BLOCK + i)
    total = tl.sum(a * b)  # needs all before any is stored
    tl.store(out + i, a * total + b)


def variants():
    tensors = {"x": "*fp32", "out": "*fp32", "BLOCK": BLOCK}
    sizes = {"elements": BLOCK, "read": 4, "written": 4, "wide": tuple(PARTS)}
    yield Variant("copy", copy, tensors, **sizes, allowed=dict.fromkeys(PARTS, 10))
    yield Variant("copy_in_a_loop", copy_in_a_loop, {**tensors, "n": "i32"}, **sizes)
    yield Variant("strided", strided, tensors, **sizes, allowed=dict.fromkeys(PARTS, 0.5))
    yield Variant("transcendental", transcendental, tensors, **sizes)
    yield Variant("double", double, tensors, **sizes)
    yield Variant("product", product, tensors)
    meant = {"present": dict.fromkeys(PARTS, "tensor tcgen05"), "absent": dict.fromkeys(PARTS, "shared load.*")}
    yield Variant("product_elsewhere", product, tensors, tensor_cores=True, **meant)
    yield Variant("hungry", hungry, {**tensors, "BLOCK": 4096}, warps=1)


if __name__ == "__main__":
    found = []
    for variant in variants():
        used = roofline(variant, sys.argv[1])
        found.append(dataclasses.asdict(used) | {"broken": broken_budgets(variant, used)})
    print(json.dumps(found))
