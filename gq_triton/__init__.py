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
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent
if not (_ROOT / "kernels").exists() and (_ROOT.parent / "kernels" / "__init__.py").exists():
    # A source checkout keeps the kernels in a top-level folder; installed packages have them right here.
    __path__.append(str(_ROOT.parent))

from gq_triton import functional  # noqa: E402
from gq_triton.anneal import Annealer, param_groups  # noqa: E402
from gq_triton.config import GQConfig  # noqa: E402
from gq_triton.dense import allow_dense  # noqa: E402
from gq_triton.packed_file import PackedFileError, load_packed, read_metadata, save_packed  # noqa: E402
from gq_triton.quantize import quantize_  # noqa: E402
from gq_triton.quantizer import WeightQuantizer  # noqa: E402
from gq_triton.report import Report, report  # noqa: E402
from gq_triton.tuning import load_tuned  # noqa: E402

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
