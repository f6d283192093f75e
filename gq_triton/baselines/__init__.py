"""Rival quantization methods, in the same layers, trainer and packed files as the General Quantizer.

``gq.quantize_`` takes their configurations wherever it takes a :class:`gq_triton.GQConfig`, mixed with it where it is
given a mapping. What they do after each optimizer step, they do in :meth:`gq_triton.Annealer.step`; what they add to
the loss is :func:`gq_triton.penalty`. Names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from gq_triton._lazy import lazy

if TYPE_CHECKING:
    from gq_triton.baselines.config import KMeansConfig, LSQConfig, S8BQATConfig, TorchaoConfig, UniformConfig
    from gq_triton.baselines.kmeans import KMeansQuantizer
    from gq_triton.baselines.lsq import LSQQuantizer
    from gq_triton.baselines.s8bqat import S8BQATQuantizer
    from gq_triton.baselines.torchao import TorchaoQuantizer
    from gq_triton.baselines.uniform import UniformQuantizer

QUANTIZERS = {  # by method, each in the module of its name
    "uniform": "UniformQuantizer",
    "kmeans": "KMeansQuantizer",
    "lsq": "LSQQuantizer",
    "s8bqat": "S8BQATQuantizer",
    "torchao": "TorchaoQuantizer",
}

__all__ = [
    "KMeansConfig",
    "KMeansQuantizer",
    "LSQConfig",
    "LSQQuantizer",
    "S8BQATConfig",
    "S8BQATQuantizer",
    "TorchaoConfig",
    "TorchaoQuantizer",
    "UniformConfig",
    "UniformQuantizer",
]

_MODULES = dict.fromkeys(__all__, "config") | {name: method for method, name in QUANTIZERS.items()}
__getattr__, __dir__ = lazy(__name__, _MODULES)
