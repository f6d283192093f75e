"""General Quantizer (GQ): 1- to 8-bit quantization-aware training and packed low-bit inference for PyTorch.

The method is that of Zhen et al., "Sub-8-bit quantization for on-device speech recognition: a regularization-free
approach", SLT 2022 (arXiv 2210.09188). Typical use::

    import gq_triton as gq

    gq.quantize_(model, gq.GQConfig(bits=4), step="prepare")
    optimizer = torch.optim.AdamW(gq.param_groups(model, lr=1e-3, weight_decay=1e-2))
    annealer = gq.Annealer(model, total_steps=1000)
    ...  # train; call annealer.step() after each optimizer.step()
    gq.quantize_(model, step="convert")
    print(gq.report(model))
    gq.save_packed(model, "model.safetensors")

Importing this package imports neither torch nor anything else of its own: each name is loaded when it is first used.
Programs that run exported graphs, which know its operators by name (``torch.ops.gq_triton``), import
:mod:`gq_triton.functional`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from gq_triton._lazy import lazy

_ROOT = Path(__file__).resolve().parent
if not (_ROOT / "kernels").exists() and (_ROOT.parent / "kernels" / "__init__.py").exists():
    # A source checkout keeps the kernels in a top-level folder; installed packages have them right here.
    __path__.append(str(_ROOT.parent))

if TYPE_CHECKING:
    from gq_triton import functional
    from gq_triton.anneal import Annealer, param_groups
    from gq_triton.config import GQConfig
    from gq_triton.dense import allow_dense
    from gq_triton.packed_file import PackedFileError, load_packed, read_metadata, save_packed
    from gq_triton.quantize import quantize_
    from gq_triton.quantizer import WeightQuantizer
    from gq_triton.reporting import Report, report
    from gq_triton.tuning import load_tuned

__version__ = "0.1.0"

__all__ = [
    "Annealer",
    "GQConfig",
    "PackedFileError",
    "Report",
    "WeightQuantizer",
    "allow_dense",
    "functional",
    "load_packed",
    "load_tuned",
    "param_groups",
    "quantize_",
    "read_metadata",
    "report",
    "save_packed",
]

_MODULES = {
    "Annealer": "anneal",
    "GQConfig": "config",
    "PackedFileError": "packed_file",
    "Report": "reporting",
    "WeightQuantizer": "quantizer",
    "allow_dense": "dense",
    "functional": "functional",
    "load_packed": "packed_file",
    "load_tuned": "tuning",
    "param_groups": "anneal",
    "quantize_": "quantize",
    "read_metadata": "packed_file",
    "report": "reporting",
    "save_packed": "packed_file",
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
