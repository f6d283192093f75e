"""How one weight tensor is quantized."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

Granularity = Literal["channel", "tensor"]
Forward = Literal["hard", "soft"]
CodebookDtype = Literal["float", "int8", "fp8"]
ActivationDtype = Literal["int8", "fp8"]
Config = TypeVar("Config", bound="WeightConfig")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_integer(name: str, value: object, low: int, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limits = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} must be an integer {limits}; got {value!r}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} must be a number from {low} to {high}; got {value!r}")


class WeightConfig:
    """What the settings of all methods have in common: a frozen dataclass for one weight, with ``bits``,
    ``granularity``, ``codebook`` and ``activations`` as :class:`GQConfig` has them."""

    method: ClassVar[str]  # its name in files and on the command line
    bits: int
    granularity: Granularity
    codebook: CodebookDtype
    activations: ActivationDtype | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the method and its settings as JSON-able values; :func:`config_from_dict` is the inverse."""
        return {"method": self.method, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[Config], settings: Mapping[str, Any]) -> Config:
        """Builds a configuration from :meth:`to_dict`'s result; missing settings take their defaults.

        Raises:
            ValueError: if ``settings`` is not a mapping, has an unknown name or another method's, or a value is not
                allowed.
        """
        values = _settings(settings)
        if values.pop("method", cls.method) != cls.method:
            raise ValueError(f"method must be {cls.method!r}; got {settings['method']!r}")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"settings has unknown names {unknown}; allowed are {sorted(known)}")
        return cls(**values)


@dataclass(frozen=True)
class GQConfig(WeightConfig):
    """Settings of the General Quantizer for one weight.

    Args:
        bits: width of a code, 1 to 8; the codebook has ``2**bits`` entries. Default 4.
        mu: companding strength, 0 (uniform) to 8000. None (default): the value with the least squared error
            among a small grid, found per tensor when the model is prepared.
        learn_mu: train mu together with the weights. Default False.
        granularity: one scale per output channel (dim 0 of the weight; ``"channel"``, default) or per ``"tensor"``.
        forward: ``"hard"`` (default) computes with the nearest centroid and back-propagates the soft assignment's
            derivative; ``"soft"`` computes with the soft assignment itself, and with the nearest centroid in ``eval``.
        learn_centroids: train the centroids (default True) or keep them uniform in companded space.
        codebook: deployed type of the codebook's entries, ``"float"`` (float32, default), ``"int8"`` or ``"fp8"``
            (e4m3); training sees the rounding.
        activations: None (default), or ``"int8"`` or ``"fp8"``: what the weight multiplies is quantized per token,
            dynamically. In a recurrent layer that is its input, and at every step the hidden state and what is
            projected; training sees the rounding of the first layer's input only.
        straight_through: share, 0 to 1, of the straight-through gradient mixed into the soft derivative, so that
            weights keep moving when the assignment is nearly hard. Default 0.1.
        requantize_every: in training, quantize afresh at every n-th update of the weight and reuse the result, with a
            straight-through gradient, in between. Default 1: at every forward pass. Updates are told by
            the weight's version, which fused optimizers and FSDP leave alone: with these, too, every pass quantizes.
            The result is no part of a checkpoint: a run resumed at a step that is no multiple of n quantizes at other
            steps than one that was not interrupted, and ends with other weights.
        centroid_interval: centroids and mu get their gradient, which costs about as much again as the weights',
            at every n-th step, as :class:`gq_triton.Annealer` counts them, and zeros in between. Default 1: at every
            step, as without an annealer.

    Raises:
        ValueError: for a value outside of what is listed above.
    """

    method: ClassVar[str] = "gq"
    bits: int = 4
    mu: float | None = None
    learn_mu: bool = False
    granularity: Granularity = "channel"
    forward: Forward = "hard"
    learn_centroids: bool = True
    codebook: CodebookDtype = "float"
    activations: ActivationDtype | None = None
    straight_through: float = 0.1
    requantize_every: int = 1
    centroid_interval: int = 1

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 8)
        if self.mu is not None:
            check_number("mu", self.mu, 0.0, 8000.0)  # what a learned mu can reach
        check_flag("learn_mu", self.learn_mu)
        if self.learn_mu and self.mu == 0:
            raise ValueError("mu must be above 0, or None, where learn_mu is True: mu is learned as a logarithm; got 0")
        check_choice("granularity", self.granularity, ("channel", "tensor"))
        check_choice("forward", self.forward, ("hard", "soft"))
        check_flag("learn_centroids", self.learn_centroids)
        check_choice("codebook", self.codebook, ("float", "int8", "fp8"))
        check_choice("activations", self.activations, (None, "int8", "fp8"))
        check_number("straight_through", self.straight_through, 0.0, 1.0)
        check_integer("requantize_every", self.requantize_every, 1, math.inf)
        check_integer("centroid_interval", self.centroid_interval, 1, math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as JSON-able values, the inverse of :meth:`from_dict`, without the method's name."""
        return dataclasses.asdict(self)


def config_class(method: str) -> type[WeightConfig]:
    """Returns the class of a method's configurations.

    Raises:
        ValueError: there is no such method.
    """
    from gq_triton.baselines.config import BASELINES

    classes: dict[str, type[WeightConfig]] = {"gq": GQConfig, **BASELINES}
    check_choice("method", method, tuple(classes))
    return classes[method]


def config_from_dict(settings: Mapping[str, Any]) -> WeightConfig:
    """Builds the configuration of any method from its ``to_dict``; ``method`` is "gq" where it is missing.

    Raises:
        ValueError: if ``settings`` is not a mapping, has an unknown method or name, or a value is not allowed.
    """
    return config_class(_settings(settings).get("method", "gq")).from_dict(settings)


def _settings(settings: object) -> dict[str, Any]:
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings must be a mapping of setting names to values; got {type(settings).__name__}")
    return dict(settings)
