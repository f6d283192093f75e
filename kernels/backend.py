"""The one place that knows whether triton is there.

Kernels are declared with `jit` from here and launched under `launching`; without triton the package imports and runs on
the CPU, and a tensor on a GPU is a clear error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["INTERPRETED", "bound", "cdiv", "jit", "launching", "next_power_of_2", "tl"]

# TRITON_INTERPRET=1: kernels run on the CPU in numpy, which has no bfloat16.
INTERPRETED: bool = triton is not None and triton.knobs.runtime.interpret


def jit(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit`, with its options, where there is triton; otherwise the function as it is, never to be called."""
    if triton is not None:
        return triton.jit(kernel, **options)
    return (lambda function: function) if kernel is None else kernel


if INTERPRETED:

    def bound(n: Any) -> int:
        """``n`` as a bound of a kernel's loop: of its array (1,) Triton 3.6 takes int(), which numpy 2.4 refuses."""
        return n.handle.data.item()

else:

    @jit
    def bound(n):
        """``n`` as a bound of a kernel's loop."""
        return n


def launching(tensor: Tensor, float64: bool = False) -> AbstractContextManager:
    """Make the device of ``tensor`` the current one for a launch (of the interpreter, for a CPU tensor); ``float64``:
    of a kernel that computes in it."""
    if triton is None:
        raise RuntimeError(f"triton is needed to quantize tensors on {tensor.device}: pip install 'gq-triton[triton]'")
    if tensor.dtype == torch.float64 and not float64:
        raise TypeError(f"float64 is computed on the CPU only, got a float64 tensor on {tensor.device}")
    return torch.cuda.device_of(tensor)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n >= 1."""
    return 1 << (n - 1).bit_length()
