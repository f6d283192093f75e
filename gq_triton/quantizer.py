"""The trainable quantizer of one weight tensor: its parameters, their initial fit, and the fake quantization.

:class:`Quantizer` is what layers, packed files, reports and annealing know of any method; :class:`WeightQuantizer` is
the General Quantizer's, and those of rival methods are in :mod:`gq_triton.baselines`. Its parameters are stored so that
the constraints hold under any finite optimizer step:

- scale = exp(log_scale) > 0, one per channel or one per tensor. An all-zero channel gets the scale 0 (an exponent
  that underflows), decodes to exact zeros and stays there: fit again once such a channel holds something.
- centroids z = -1 + 2 * cumulative sum of gaps, gaps = softmax(centroid_logits) with a floor, so they are strictly
  sorted and the ends are exactly -1 and 1. Nothing is lost by pinning the ends: the scale and mu say what they decode
  to.
- mu = exp(log_mu) where it is learned.

These few numbers are always float32, whatever the model is cast to, and are expanded in float64, so that CPU and GPU
derive the same codebook and scales.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gq_triton import functional as F
from gq_triton.config import GQConfig, WeightConfig
from gq_triton.fitting import TINY, Grid, checked_rows, coarse_scale, fit_scale, refit, sample_columns

INITIAL_HARDNESS = 2.0  # softmax sharpness before any Annealer sets it

_GAP_FLOOR = 0.01  # share of [-1, 1] that is split evenly among the gaps, whatever the logits are
_ZERO_LOG_SCALE = -200.0  # exp() of it is 0 in float32
_MAX_LOG_SCALE = 80.0  # exp() of it is finite in float32
_LOG_MU_RANGE = (-9.0, 9.0)  # mu from 1e-4 (uniform in effect) to 8e3
_MU_GRID = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 31.0, 63.0, 127.0, 255.0)
_MU_ROWS = 64  # rows that choose mu


class FixedDtypeModule(nn.Module):
    """A module whose tensors follow ``.to(device)`` but keep their dtype under ``.half()``, ``.bfloat16()``, ..."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FixedDtypeModule":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class Quantizer(FixedDtypeModule):
    """Quantizes one weight of shape (C, ...) in training, by some method.

    Args:
        config: the settings.

    Attributes:
        reuses: whether what :meth:`forward` returns may be used again by later forward passes.
        whole_weights: whether :meth:`update` or :meth:`penalty` read the weight, all of it.
        trained: whether a training forward pass ran; tells apart weights that are read behind the quantizer's back.
    """

    reuses = False
    whole_weights = False

    def __init__(self, config: WeightConfig) -> None:
        super().__init__()
        self.config = config
        self.trained = False

    @staticmethod
    def refuse(layer: nn.Module) -> str | None:
        """Returns why the method cannot quantize a weight of ``layer``, or None if it can."""
        return None

    def scale(self) -> Tensor:
        """Returns the scales, (C,) or (1,), float32, at least 0."""
        raise NotImplementedError

    def codebook(self) -> Tensor:
        """Returns the codebook as deployed, (2**bits,), float32 values within [-1, 1]."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> Tensor:
        """Returns the uint8 codes of ``weight``, same shape; a code stands for ``codebook()[code] * scale()``."""
        raise NotImplementedError

    def fit(self, weight: Tensor) -> None:
        """Fits everything to ``weight``. Deterministic.

        Raises:
            ValueError: if ``weight`` is empty, holds NaN or infinity, or its dim 0 does not fit.
        """
        raise NotImplementedError

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Returns ``weight``, (C, ...) of a floating dtype, as layers compute with it, in ``dtype`` or else the same.

        In ``eval`` that is exactly what :meth:`encode` would deploy.
        """
        raise NotImplementedError

    def schedule(self, step: int, hardness: float) -> None:
        """Sets what depends on the number of optimizer steps so far; may be called several times for one step."""

    def update(self, weight: Tensor, step: int) -> None:
        """Does what the method does after optimizer step number ``step``, from 1; called once for each."""

    def follow(self, weight: Tensor) -> None:
        """Fits what :meth:`update` derives from the weight to ``weight``, which took the weight's place."""

    def penalty(self, weight: Tensor) -> Tensor | None:
        """Returns what the method adds to the loss, (), or None."""
        return None


def quantizer_class(config: WeightConfig) -> type[Quantizer]:
    """Returns the class of a configuration's quantizers; its constructor takes what :func:`quantizer_of` takes."""
    if isinstance(config, GQConfig):
        return WeightQuantizer
    from gq_triton import baselines

    return getattr(baselines, baselines.QUANTIZERS[config.method])


def quantizer_of(config: WeightConfig, channels: int, device: torch.device | None = None) -> Quantizer:
    """Returns a quantizer, yet to be fitted, for a weight of ``channels`` rows on ``device``."""
    return quantizer_class(config)(config, channels, device)


class WeightQuantizer(Quantizer):
    """The General Quantizer of one weight of shape (C, ...), and what is learned about it.

    Args:
        config: the settings.
        channels: C, the size of the weight's dim 0.
        device: where the parameters live. Default: torch's default device.

    Attributes:
        log_scale: parameter, (C,) or (1,), float32.
        centroid_logits: parameter (buffer where centroids are fixed), (2**bits - 1,), float32.
        log_mu: parameter, (1,), float32, where mu is learned; else ``mu`` is a buffer, (1,).
        hardness: buffer, (), float32, set by :class:`gq_triton.Annealer`.
        learn_tables: whether training forward passes give centroids and mu a gradient, or zeros; set by
            :class:`gq_triton.Annealer` where ``config.centroid_interval`` asks for it.
    """

    config: GQConfig
    log_scale: Tensor
    centroid_logits: Tensor
    log_mu: Tensor
    mu: Tensor
    hardness: Tensor

    def __init__(self, config: GQConfig, channels: int, device: torch.device | None = None) -> None:
        super().__init__(config)
        scales = channels if config.granularity == "channel" else 1
        self.log_scale = nn.Parameter(torch.zeros(scales, device=device))
        self._register("centroid_logits", torch.zeros(2**config.bits - 1, device=device), config.learn_centroids)
        mu = torch.full((1,), 1.0 if config.mu is None else float(config.mu), device=device)
        self._register("log_mu" if config.learn_mu else "mu", mu.log() if config.learn_mu else mu, config.learn_mu)
        self.register_buffer("hardness", torch.tensor(INITIAL_HARDNESS, device=device))
        self.learn_tables = True
        self._cache: tuple[Tensor, int, int] | None = None  # quantized weight, weight version, updates since

    def _register(self, name: str, value: Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightQuantizer":
        self._cache = None
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def reuses(self) -> bool:  # type: ignore[override]
        return self.config.requantize_every > 1

    def scale(self) -> Tensor:
        return from_log_scale(self.log_scale)

    def centroids(self) -> Tensor:
        """Returns the companded centroids, (2**bits,), float32, strictly increasing from exactly -1 to exactly 1."""
        return _centroids(self.centroid_logits)

    def companding(self) -> Tensor:
        """Returns mu, (1,), float32, at least 0."""
        return _companding([self])

    def codebook(self) -> Tensor:
        return F.codebook(self.centroids(), mu=self.companding(), dtype=self.config.codebook)

    def forward(self, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Fake-quantizes ``weight``, (C, ...) of a floating dtype; same shape, ``dtype`` or else the same dtype.

        In ``eval`` the result is always the hard one, what :meth:`encode` would deploy. With ``requantize_every=n``, in
        training, n - 1 of n updates of the weight are answered with the last quantized weight and an identity gradient.
        (The remembered weight is not part of the state dict: a resumed run starts with a fresh one.)
        """
        if self.training and self.reuses:
            return self._quantize_periodically(weight)
        return self.remember(weight, quantize_group([self], [weight], dtype)[0])

    @torch.compiler.disable  # what it decides by changes at every step
    def _quantize_periodically(self, weight: Tensor) -> Tensor:
        if self.due(weight):
            return self.remember(weight, quantize_group([self], [weight])[0])
        assert self._cache is not None
        self._cache = (self._cache[0], weight._version, self._updates(weight))
        # Zero gradients rather than none for the quantizer's parameters: DDP waits for every parameter.
        unused = sum(_nothing_of(parameter) for parameter in self.parameters())
        return self._cache[0] + (weight - weight.detach()) + unused.to(weight.dtype)

    def due(self, weight: Tensor) -> bool:
        """Whether :meth:`forward` quantizes ``weight`` afresh, rather than reuse what it remembers."""
        if not (self.training and self.reuses):
            return True
        return self._updates(weight) in (0, self.config.requantize_every)

    def _updates(self, weight: Tensor) -> int:
        """How often the weight was updated since it was quantized."""
        if self._cache is None:
            return 0
        # An optimizer step bumps the version; several forward passes between two steps count once.
        return self._cache[2] + (weight._version != self._cache[1])

    def remember(self, weight: Tensor, quantized: Tensor) -> Tensor:
        """Takes note that ``weight`` was quantized afresh, by whomever; returns ``quantized``."""
        if self.training:
            self.trained = True
            if self.reuses:
                self._cache = (quantized.detach(), weight._version, 0)
        return quantized

    def schedule(self, step: int, hardness: float) -> None:
        self.hardness.fill_(hardness)
        self.learn_tables = step % self.config.centroid_interval == 0

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Tensor:
        return F.encode(weight, self.scale(), self.centroids(), mu=self.companding())

    @torch.no_grad()
    def fit(self, weight: Tensor) -> None:
        """Fits scales, and mu where the configuration leaves it open, to ``weight`` by least squares; resets centroids.

        mu is the best of a small grid on a sample; scales are as :func:`gq_triton.fitting.fit_scale` finds them.

        Raises:
            ValueError: if ``weight`` is empty, holds NaN or infinity, or its dim 0 does not fit.
        """
        rows = checked_rows(weight, len(self.log_scale), self.config.granularity == "tensor")
        self._cache = None
        self.centroid_logits.zero_()
        mu = self._fit_mu(sample_columns(rows)) if self.config.mu is None else float(self.config.mu)
        if self.config.learn_mu:
            self.log_mu.fill_(math.log(max(mu, 0.1)))
        else:
            self.mu.fill_(mu)
        self.log_scale.copy_(to_log_scale(fit_scale(rows, self._grid(float(self.companding())))))

    def _fit_mu(self, sample: Tensor) -> float:
        if self.config.bits == 1:
            return 0.0  # two centroids sit at the ends: mu changes nothing
        chosen = torch.linspace(0, len(sample) - 1, min(_MU_ROWS, len(sample)), device=sample.device).long()
        sample = sample[chosen].float()
        sample = sample / sample.abs().amax().clamp(min=TINY)  # squares of any finite weight now stay in range
        mean, largest = sample.abs().mean(1), sample.abs().amax(1)
        errors = []
        for mu in _MU_GRID:
            grid = self._grid(mu)
            errors.append(refit(sample, coarse_scale(sample, mean, largest, grid), grid)[1].sum())
        return _MU_GRID[int(torch.stack(errors).argmin())]

    def _grid(self, mu: float) -> Grid:
        centroids = self.centroids()
        return Grid(centroids, mu, F.codebook(centroids, mu=mu, dtype=self.config.codebook))

    def extra_repr(self) -> str:
        return f"bits={self.config.bits}, granularity={self.config.granularity!r}, forward={self.config.forward!r}"


def quantize_group(
    quantizers: Sequence[WeightQuantizer], weights: Sequence[Tensor], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Fake-quantizes each weight by its quantizer, all in one operation; the values are those of one by one.

    Args:
        quantizers: at least one; all of one configuration, mode (training or not) and ``learn_tables``.
        weights: as many, of one dtype and device.
        dtype: of the results. Default: the weights'.

    Raises:
        TypeError: if the quantizers' parameters are not float32 as they were made.
    """
    config, training = quantizers[0].config, quantizers[0].training
    log_scale = torch.cat([quantizer.log_scale for quantizer in quantizers])
    if log_scale.dtype != torch.float32:
        raise TypeError(
            f"quantizers' parameters must be float32; got {log_scale.dtype}. Where FSDP's MixedPrecisionPolicy cast "
            "them, leave its param_dtype None and train under torch.autocast: the weights are then quantized first"
        )
    logits = torch.stack([quantizer.centroid_logits for quantizer in quantizers])
    scale, mu = from_log_scale(log_scale), _companding(quantizers)
    learn_tables = quantizers[0].learn_tables
    if not learn_tables:
        scale = scale + _nothing_of(logits) + _nothing_of(mu)  # zero gradients rather than none, for DDP
    return F.fake_quantize_group(
        weights,
        scale,
        _centroids(logits),
        mu=mu,
        hardness=torch.stack([quantizer.hardness for quantizer in quantizers]),
        per_channel=config.granularity == "channel",
        forward=config.forward if training else "hard",
        codebook_dtype=config.codebook,
        straight_through=config.straight_through,
        learn_tables=learn_tables,
        dtype=dtype,
    )


def from_log_scale(log_scale: Tensor) -> Tensor:
    """Returns the scales of their logarithms, finite whatever these are."""
    return log_scale.double().clamp(max=_MAX_LOG_SCALE).exp().float()


def to_log_scale(scale: Tensor) -> Tensor:
    """The inverse of :func:`from_log_scale`, also for 0."""
    return scale.log().clamp(min=_ZERO_LOG_SCALE)


def _centroids(logits: Tensor) -> Tensor:
    """(..., K - 1) -> (..., K)."""
    logits = logits.double()
    gaps = _GAP_FLOOR / logits.shape[-1] + (1.0 - _GAP_FLOOR) * logits.softmax(-1)
    inner = 2.0 * gaps.cumsum(-1)[..., :-1] - 1.0
    end = inner.new_ones(*inner.shape[:-1], 1)
    return torch.cat([-end, inner, end], -1).float()


def _companding(quantizers: Sequence[WeightQuantizer]) -> Tensor:
    """(G,), one mu for each."""
    if quantizers[0].config.learn_mu:
        log_mu = torch.cat([quantizer.log_mu for quantizer in quantizers])
        return log_mu.double().clamp(*_LOG_MU_RANGE).exp().float()
    return torch.cat([quantizer.mu for quantizer in quantizers])


def _nothing_of(tensor: Tensor) -> Tensor:
    """Returns 0, whatever ``tensor`` holds, with a gradient of zeros for it."""
    return tensor[:0].sum()


def warn_of_bypassed(model: nn.Module, learning: bool = False) -> None:
    """Warns of quantizers that never ran in training although others did: something may read their weights directly.

    With ``learning``, only of those whose weights have a gradient: layers may be skipped at times, as by LayerDrop.
    """
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
    if not any(quantizer.trained for quantizer in quantizers.values()):
        return
    unused = [name.removesuffix("_quantizer") for name, quantizer in quantizers.items() if not quantizer.trained]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bypassed = [name for name in unused if name in parameters and parameters[name].requires_grad]
    bypassed = [name for name in bypassed if parameters[name].grad is not None or not learning]
    if bypassed:
        warnings.warn(
            f"{', '.join(bypassed)}: trained without its layer being called. If something reads this weight, it reads "
            "it unquantized: call the layer there, or leave it float by a None configuration",
            UserWarning,
            stacklevel=3,
        )
