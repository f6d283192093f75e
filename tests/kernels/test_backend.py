import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gq_triton.kernels import backend

ROOT = Path(__file__).resolve().parents[2]


def test_everything_works_on_the_cpu_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # importing it fails
import torch
import gq_triton.functional as F
from gq_triton.kernels import backend, budgets
weight, scale, centroids = torch.randn(3, 8, requires_grad=True), torch.ones(3), torch.linspace(-1, 1, 4)
hard = F.fake_quantize(weight, scale, centroids, mu=1.0, hardness=2.0)
hard.sum().backward()
packed = F.pack(F.encode(weight, scale, centroids, mu=1.0), 2)
values = F.codebook(centroids, mu=1.0)
x = torch.randn(2, 8)
torch.testing.assert_close(F.packed_linear(x, packed, values, scale, bits=2, in_features=8), x @ hard.detach().T)
for call in (lambda: backend.launching(weight), lambda: budgets.variants([4], ["bf16"])):
    try:
        call()
    except (RuntimeError, ModuleNotFoundError) as error:
        assert "triton is needed" in str(error), error
    else:
        raise AssertionError("no error")
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_launching_refuses_float64(kernel_device):
    with pytest.raises(TypeError, match="float64 is computed on the CPU only"):
        backend.launching(torch.zeros(1, dtype=torch.float64, device=kernel_device))


@pytest.mark.parametrize(("a", "b", "expected"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_cdiv(a, b, expected):
    assert backend.cdiv(a, b) == expected


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 4), (1000, 1024), (1024, 1024)])
def test_next_power_of_2(n, expected):
    assert backend.next_power_of_2(n) == expected
