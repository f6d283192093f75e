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
    from gq_triton import baselines, functional
    from gq_triton.allocation import Allocation, Sensitivity, allocate, quantized_loss, sensitivity
    from gq_triton.anneal import Annealer, param_groups, penalty
    from gq_triton.config import GQConfig, WeightConfig, config_from_dict
    from gq_triton.config_file import load_config, save_config
    from gq_triton.dense import allow_dense
    from gq_triton.packed_file import PackedFileError, load_packed, read_metadata, save_packed
    from gq_triton.quantize import quantize_
    from gq_triton.quantizer import WeightQuantizer
    from gq_triton.reporting import Report, report
    from gq_triton.tuning import load_tuned

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Annealer",
    "GQConfig",
    "PackedFileError",
    "Report",
    "Sensitivity",
    "WeightConfig",
    "WeightQuantizer",
    "allocate",
    "allow_dense",
    "baselines",
    "config_from_dict",
    "functional",
    "load_config",
    "load_packed",
    "load_tuned",
    "param_groups",
    "penalty",
    "quantize_",
    "quantized_loss",
    "read_metadata",
    "report",
    "save_config",
    "save_packed",
    "sensitivity",
]

_MODULES = {
    "Allocation": "allocation",
    "Annealer": "anneal",
    "GQConfig": "config",
    "PackedFileError": "packed_file",
    "Report": "reporting",
    "Sensitivity": "allocation",
    "WeightConfig": "config",
    "WeightQuantizer": "quantizer",
    "allocate": "allocation",
    "allow_dense": "dense",
    "baselines": "baselines",
    "config_from_dict": "config",
    "functional": "functional",
    "load_config": "config_file",
    "load_packed": "packed_file",
    "load_tuned": "tuning",
    "param_groups": "anneal",
    "penalty": "anneal",
    "quantize_": "quantize",
    "quantized_loss": "allocation",
    "read_metadata": "packed_file",
    "report": "reporting",
    "save_config": "config_file",
    "save_packed": "packed_file",
    "sensitivity": "allocation",
}
__getattr__, __dir__ = lazy(__name__, _MODULES)
