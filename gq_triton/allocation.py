"""Which width for which weight: sensitivities measured one by one, and the best choice of widths within a budget.

The *sensitivity* of a weight at a width is the change of the loss where this weight alone is quantized, without
training. The choice minimises the sum of these changes over all weights, subject to the bytes of the packed model: a
multiple-choice knapsack problem, which is solved exactly. That the changes add up is an assumption;
:func:`quantized_loss` measures what the chosen widths do together. Training takes most of a change back: sensitivities
tell which weights bear few bits, not what the trained model will lose.

On the data at hand a narrow width may do better than a wider one, by luck, and a choice among many would run after such
luck. So a width is charged the largest change of all widths that are no narrower: never less than a wider one.

The solver extends partial choices weight by weight, and keeps those that no other equals in both bytes and loss. The
price of a byte, from the Lagrangian relaxation, bounds from below what each can still come to; those that cannot reach
the best choice known are dropped (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Hundreds of
weights take fractions of a second. Where loss is proportional to bytes throughout, the bound tells nothing apart, and
there may be as many partial choices as different sums of bytes.
"""

from __future__ import annotations

import glob
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from gq_triton.config import GQConfig, WeightConfig, config_from_dict
from gq_triton.files import save_json
from gq_triton.layers import weight_norm
from gq_triton.layers.packed_weight import packed_size
from gq_triton.quantize import Target, fit_quantizer, select
from gq_triton.reporting import report

__all__ = ["WIDTHS", "Allocation", "Sensitivity", "Unit", "allocate", "quantized_loss", "sensitivity"]

WIDTHS = (1, 2, 3, 4, 5, 8)
FORMAT, VERSION = "gq_triton sensitivity", 1
TOLERANCE = 1e-4  # relative, between two evaluations of one loss: sums in another order differ by far less

Loss = Callable[[Any], float]
Configs = WeightConfig | Mapping[str, WeightConfig | None]


@dataclass(frozen=True)
class Unit:
    """What is given one width: a weight, such as ``encoder.weight_ih_l0`` with all gates of an LSTM.

    Attributes:
        names: full names of the weight; several where layers share it.
        config: its settings; widths replace their ``bits``.
        bytes: that it takes packed, at 1, 2, ..., 8 bits, as :func:`gq_triton.report` counts them.
        losses: of the model with this weight alone quantized, by width.
    """

    names: tuple[str, ...]
    config: WeightConfig
    bytes: tuple[int, ...]
    losses: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-able values, the inverse of :meth:`from_dict`."""
        losses = {str(bits): loss for bits, loss in self.losses.items()}
        return dict(names=list(self.names), config=self.config.to_dict(), bytes=list(self.bytes), losses=losses)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Unit:
        """Reads :meth:`to_dict`'s result; raises ValueError, TypeError, KeyError or AttributeError on anything else."""
        losses = {int(bits): float(loss) for bits, loss in values["losses"].items()}
        sizes = tuple(int(size) for size in values["bytes"])
        if len(sizes) != 8 or not set(losses) <= set(range(1, 9)) or not all(map(math.isfinite, losses.values())):
            raise ValueError(f"{values['names']} must have 8 sizes, and finite losses at 1 to 8 bits")
        return cls(tuple(map(str, values["names"])), config_from_dict(values["config"]), sizes, losses)


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured.

    Attributes:
        loss: of the float model.
        other_bytes: what stays float takes, such as biases.
        units: in the order of the model.
    """

    loss: float
    other_bytes: int
    units: tuple[Unit, ...]

    def bytes_at(self, bits: float) -> int:
        """Returns the bytes of the packed model with one width, 1 to 8, for every weight; of a width between two
        integers, those between theirs.

        Raises:
            ValueError: if ``bits`` is not from 1 to 8.
        """
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be from 1 to 8; got {bits!r}")
        totals = np.sum([unit.bytes for unit in self.units], axis=0)
        return self.other_bytes + int(np.interp(bits, range(1, 9), totals))

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON-able values, the inverse of :meth:`from_dict`."""
        values = {"loss": self.loss, "other_bytes": self.other_bytes, "units": [unit.to_dict() for unit in self.units]}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Reads :meth:`to_dict`'s result.

        Raises:
            ValueError: it is something else.
        """
        try:
            if (values["format"], values["version"]) != (FORMAT, VERSION):
                raise ValueError(f"they say {values['format']!r}, version {values['version']!r}")
            units = tuple(Unit.from_dict(unit) for unit in values["units"])
            return cls(float(values["loss"]), int(values["other_bytes"]), units)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"these are no sensitivities that this version reads: {error!r}") from error


@dataclass(frozen=True)
class Allocation:
    """What :func:`allocate` chose.

    Attributes:
        bits: width of each unit, by its first name.
        config: the same as :func:`gq_triton.quantize_` takes it; what it does not name stays float.
        bytes: of the packed model.
        change: of the loss, predicted: the sum of what the widths are charged.
    """

    bits: dict[str, int]
    config: dict[str, WeightConfig]
    bytes: int
    change: float


# --- measuring


def sensitivity(
    model: nn.Module,
    loss: Loss,
    config: Configs | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    file: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures the loss of a float model with each weight alone quantized, at each width, without training.

    Weights are quantized in place and put back, bit for bit; the model is not copied, and is in evaluation mode
    meanwhile. Activations stay float.

    Args:
        model: the whole model, as for :func:`gq_triton.quantize_`.
        loss: called with the model, without gradients, returns the loss: always of the same data. It tells most as a
            mean per token of data that the model was not trained on.
        config: which weights, and their settings but for ``bits``, as :func:`gq_triton.quantize_` takes them. Default:
            ``GQConfig()``, all weights.
        widths: to measure, integers from 1 to 8.
        file: JSON, written after each measurement. One that exists is gone on with: what it holds is not measured
            again, be it of a run that was killed or of other widths.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if an argument is not as described; ``config`` selects no weight, or one that cannot be quantized;
            the loss is not finite, or differs from call to call; or ``file`` is damaged, or was measured on another
            model, on other data or with other settings.

    Warns:
        UserWarning: naming weights that the loss does not depend on.
    """
    selected = select(model, GQConfig() if config is None else config)
    if not selected:
        raise ValueError("config must select a weight that can be quantized; it selects none of the model's")
    widths = _checked_widths(widths)
    jobs = [(targets[0][0], replace(targets[0][1], bits=bits)) for targets in selected for bits in widths]
    with _evaluating(model):
        found = _resumed(_unmeasured(model, loss, selected), file)
        units = {unit.names[0]: unit for unit in found.units}
        missing = [(target, each) for target, each in jobs if each.bits not in units[target.name].losses]
        silent = not (progress and missing)
        for target, each in tqdm(missing, desc="sensitivity", unit="loss", leave=False, disable=silent):
            with _quantized([(target, each)]):
                units[target.name].losses[each.bits] = _measured(model, loss, f"{target.name} at {each.bits} bits")
            if file is not None:
                save_json(file, found.to_dict())
    _warn_of_unused(found)
    measured = [replace(unit, losses={bits: unit.losses[bits] for bits in widths}) for unit in found.units]
    return replace(found, units=tuple(measured))


def quantized_loss(model: nn.Module, loss: Loss, config: Configs) -> float:
    """Measures the loss of a float model with all weights quantized at once, without training, as
    :func:`sensitivity` does with one; less the float model's it is the change that an :class:`Allocation` predicts.

    Args:
        model, loss: as there.
        config: as :func:`gq_triton.quantize_` takes it.

    Raises:
        ValueError: a weight cannot be quantized, or the loss is not finite.
    """
    with _evaluating(model), _quantized([targets[0] for targets in select(model, config)]):
        return _measured(model, loss, "these widths")


def _checked_widths(widths: Sequence[int]) -> list[int]:
    if not widths or not all(type(bits) is int and 1 <= bits <= 8 for bits in widths):
        raise ValueError(f"widths must be integers from 1 to 8, one at least; got {widths!r}")
    return sorted(set(widths))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quantized(chosen: Sequence[tuple[Target, WeightConfig]]) -> Iterator[None]:
    """The weights have their quantized values meanwhile."""
    values = [fit_quantizer(target, config).eval()(_weight(target)) for target, config in chosen]
    parameters = [parameter for target, _ in chosen for parameter in target.parameters.values()]
    originals = [parameter.clone() for parameter in parameters]
    try:
        for (target, _), value in zip(chosen, values, strict=True):
            _assign(target, value)
        yield
    finally:
        for parameter, original in zip(parameters, originals, strict=True):
            parameter.copy_(original)


def _assign(target: Target, value: Tensor) -> None:
    *norm, weight = target.parameters.values()
    if norm:
        weight_norm.assign(*norm, weight, value)
    else:
        weight.copy_(value)


def _weight(target: Target) -> Tensor:
    assert target.weight is not None  # or it would not have been selected
    return target.weight


def _measured(model: nn.Module, loss: Loss, what: str) -> float:
    value = float(loss(model))
    if not math.isfinite(value):
        raise ValueError(f"loss must be finite; it is {value} with {what}")
    return value


def _unmeasured(model: nn.Module, loss: Loss, selected: Sequence[Sequence[tuple[Target, WeightConfig]]]) -> Sensitivity:
    """The float model's loss and the units, without losses."""
    first, second = (_measured(model, loss, "float weights") for _ in range(2))
    if not math.isclose(first, second, rel_tol=TOLERANCE):
        raise ValueError(f"loss must not change from call to call; it was {first} and then {second}")
    replaced = [parameter for (target, _), *_ in selected for parameter in target.parameters.values()]
    other = report(model).packed_bytes - sum(parameter.nbytes for parameter in replaced)
    return Sensitivity(first, other, tuple(_unit(targets) for targets in selected))


def _unit(targets: Sequence[tuple[Target, WeightConfig]]) -> Unit:
    target, config = targets[0]
    weight = _weight(target)
    pieces = [weight[rows].shape for rows in target.pieces(len(weight)).values()]
    settings = [GQConfig(bits=n, granularity=config.granularity, codebook=config.codebook) for n in range(1, 9)]
    sizes = tuple(sum(packed_size(each, shape) for shape in pieces) for each in settings)
    return Unit(tuple(each.name for each, _ in targets), config, sizes, {})


def _resumed(fresh: Sensitivity, file: str | Path | None) -> Sensitivity:
    """``fresh``, or what ``file`` holds of the same."""
    if file is None or not Path(file).is_file():
        return fresh
    try:
        found = Sensitivity.from_dict(json.loads(Path(file).read_text()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be gone on with: {error}") from error
    known = {"weights": [replace(unit, losses={}) for unit in found.units], "bytes": found.other_bytes}
    if known != {"weights": list(fresh.units), "bytes": fresh.other_bytes}:
        raise ValueError(f"{file} has measurements of another model or with other settings: choose another file")
    if not math.isclose(found.loss, fresh.loss, rel_tol=TOLERANCE):
        raise ValueError(
            f"{file} has measurements of another model or on other data, where the float loss was {found.loss}; here "
            f"it is {fresh.loss}: choose another file"
        )
    return found


def _warn_of_unused(found: Sensitivity) -> None:
    unused = [unit.names[0] for unit in found.units if set(unit.losses.values()) == {found.loss}]
    if unused:
        warnings.warn(
            f"the loss does not depend on {', '.join(unused)}, which is thus taken to bear any width: give a loss that "
            "does, or leave it out of config",
            UserWarning,
            stacklevel=3,
        )


# --- choosing


def allocate(sensitivity: Sensitivity, max_bytes: int) -> Allocation:
    """Chooses a width for each weight: those with the least sum of loss changes in at most ``max_bytes``.

    Args:
        sensitivity: of all weights at the same widths.
        max_bytes: of the packed model with all its tensors, as ``gq_triton.report(model).packed_bytes`` counts them.

    Raises:
        ValueError: the model does not fit, or some measurements are missing.
    """
    units = sensitivity.units
    widths = sorted({bits for unit in units for bits in unit.losses})
    if not widths or not all(unit.losses.keys() >= set(widths) for unit in units):
        raise ValueError("sensitivity must have the losses of all weights at the same widths; some are missing")
    changes = np.array([[unit.losses[bits] - sensitivity.loss for bits in widths] for unit in units])
    charged = np.maximum.accumulate(changes[:, ::-1], axis=1)[:, ::-1]
    sizes = np.array([[unit.bytes[bits - 1] for bits in widths] for unit in units])
    least = sensitivity.other_bytes + int(sizes.min(1).sum())
    if max_bytes < least:
        raise ValueError(
            f"max_bytes is {max_bytes:,}; the model takes {least:,} with every weight at its narrowest width, of which "
            f"{sensitivity.other_bytes:,} stay float"
        )
    choice = _knapsack(charged, sizes, max_bytes - sensitivity.other_bytes)
    chosen = [widths[index] for index in choice]
    rows = np.arange(len(units))
    return Allocation(
        bits={unit.names[0]: bits for unit, bits in zip(units, chosen, strict=True)},
        config={
            glob.escape(name): replace(unit.config, bits=bits)
            for unit, bits in zip(units, chosen, strict=True)
            for name in unit.names
        },
        bytes=sensitivity.other_bytes + int(sizes[rows, choice].sum()),
        change=float(charged[rows, choice].sum()),
    )


def _knapsack(losses: np.ndarray, sizes: np.ndarray, limit: int) -> list[int]:
    """The column for each row of ``losses`` and ``sizes``, (U, W), with the least sum of losses among those whose sizes
    sum to ``limit`` or less; there must be one."""
    price = _price(losses, sizes, limit)
    best = _good_choice(losses, sizes, limit, price)
    best += 1e-12 * (np.abs(losses).sum() + price * limit)  # rounding must not cost the best choice its place
    smallest, cheapest = (_sums_of_rest(values.min(1)) for values in (sizes, losses + price * sizes))
    size, loss = np.zeros(1, np.int64), np.zeros(1)
    kept = []
    for row in range(len(losses)):
        size, loss = np.add.outer(size, sizes[row]).ravel(), np.add.outer(loss, losses[row]).ravel()
        bound = loss + cheapest[row] + price * (size - limit)
        alive = np.flatnonzero((size + smallest[row] <= limit) & (bound <= best))
        order = alive[np.lexsort((loss[alive], size[alive]))]
        before = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
        kept.append(order[loss[order] < before])
        size, loss = size[kept[-1]], loss[kept[-1]]
    state, choice = len(loss) - 1, []  # of those that are left the largest has the least loss
    for order in reversed(kept):
        state, column = divmod(int(order[state]), losses.shape[1])
        choice.append(column)
    return choice[::-1]


def _sums_of_rest(values: np.ndarray) -> np.ndarray:
    """For each place the sum of what comes after it."""
    return np.append(values[::-1].cumsum()[::-1][1:], 0)


def _relaxed(losses: np.ndarray, sizes: np.ndarray, price: float) -> np.ndarray:
    """The column for each row where bytes cost ``price`` and are not limited; the smallest of several."""
    return (losses + price * sizes).argmin(1)


def _total(values: np.ndarray, choice: np.ndarray) -> Any:
    return values[np.arange(len(values)), choice].sum()


def _price(losses: np.ndarray, sizes: np.ndarray, limit: int) -> float:
    """The lowest price of a byte at which the relaxed choice is within ``limit``."""

    def fits(price: float) -> bool:
        return bool(_total(sizes, _relaxed(losses, sizes, price)) <= limit)

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not fits(high):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _good_choice(losses: np.ndarray, sizes: np.ndarray, limit: int, price: float) -> float:
    """The loss of the relaxed choice after the bytes that it leaves have gone where they help most, one by one."""
    choice = _relaxed(losses, sizes, price)
    rows = np.arange(len(losses))
    while True:
        room = limit - _total(sizes, choice)
        gain = losses[rows, choice][:, None] - losses
        gain[sizes - sizes[rows, choice][:, None] > room] = 0.0
        row, column = np.unravel_index(gain.argmax(), gain.shape)
        if gain[row, column] <= 0:
            return float(_total(losses, choice))
        choice[row] = column
