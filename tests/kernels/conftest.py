"""Fixtures of the kernel tests."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from panels import using
from torch import Tensor

from gq_triton.kernels import backend, native, tables


class Quantizer(NamedTuple):
    """A random quantizer problem in float64."""

    weight: Tensor
    scale: Tensor
    centroids: Tensor
    mu: Tensor
    hardness: Tensor

    def table(self, dtype: torch.dtype = torch.float32, codebook: str | None = None) -> Tensor:
        centroids, mu = self.centroids.to(dtype), self.mu.to(dtype)
        return tables.build_tables(centroids[None], mu[None], self.hardness[None], codebook, dtype)[0]


@pytest.fixture
def make_quantizer() -> Callable[..., Quantizer]:
    def make(bits, shape=(5, 70), *, per_channel=True, mu=2.0, hardness=3.0, limit=1.0):
        """Uneven sorted centroids within [-limit, limit]; about a quarter of the weights lies beyond the scale."""
        generator = torch.Generator().manual_seed(bits)
        random = {"generator": generator, "dtype": torch.float64}
        levels = 2**bits
        centroids = torch.linspace(-limit, limit, levels, dtype=torch.float64)
        centroids[1:-1] += (torch.rand(levels - 2, **random) - 0.5) * limit / levels
        scale = torch.rand(shape[0] if per_channel else 1, **random) + 0.5
        weight = torch.randn(shape, **random)
        mu, hardness = torch.tensor([mu, hardness], dtype=torch.float64)
        return Quantizer(weight, scale, centroids, mu, hardness)

    return make


@pytest.fixture
def kernel_device() -> torch.device:
    """Where Triton kernels can be launched: a GPU, or else the CPU under Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not backend.INTERPRETED:
        pytest.skip("no GPU, and triton is missing or was imported without TRITON_INTERPRET=1")
    return torch.device("cpu")


@pytest.fixture(params=["native", "torch", "triton"])
def kernels(request, monkeypatch) -> str:
    """Each implementation of a packed operator that this machine has."""
    if request.param == "triton":
        request.getfixturevalue("kernel_device")
    if request.param == "native" and not native.available():
        pytest.skip(f"no native library: {native.reason()}")
    if request.param == "torch":
        monkeypatch.setattr(native, "available", lambda: False)
    return request.param


@pytest.fixture(params=native.isas())
def isa(request):
    """Each instruction set of native kernels that this processor has."""
    with using(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor from `torch.empty` starts as NaN (or the largest integer), so a slot never written shows."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch's references raise on a GPU then
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def set_default_dtype():
    """Sets torch's default dtype until the test ends."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)
