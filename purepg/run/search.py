"""The settings of a search: Sobol points over ranges of numbers and lists of values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from purepg.config import alternatives, check, hints
from purepg.run.sweep import Configs, Setting, find_field, grid, settings_at
from purepg.types import UsageError

DIGITS = 5  # significant ones of a float that is drawn, or of its range's width where that is finer


@dataclass(frozen=True)
class Uniform:
    """A range of numbers, uniform on a linear or on a logarithmic scale. It includes both ends, of integers too.

    Raises:
      UsageError: `low` is not below `high`, or not above 0 on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise UsageError(f"the range {self} must have a low end below its high end")
        if self.log and self.low <= 0:
            raise UsageError(f"the range {self} must have a low end above 0, as its scale is logarithmic")

    def __str__(self) -> str:
        return f"{'log:' if self.log else ''}{self.low}..{self.high}"

    def at(self, u: float, whole: bool) -> float:
        """The number at the quantile `u`: a float, rounded to `DIGITS`, or, if `whole`, an integer.

            linear: low + u (high - low)    logarithmic: low (high / low)^u    with u in [0, 1)

        Integers are rounded down, in a range that ends at high + 1.
        """
        low, width = self.low, self.high + whole - self.low
        x = low * ((low + width) / low) ** u if self.log else low + u * width
        return min(math.floor(x), self.high) if whole else self.rounded(x)

    def rounded(self, x: float) -> float:
        """A number of the range, rounded to `DIGITS`."""
        width = self.high - self.low
        scale = min(x, width) if self.log else width
        return min(max(round(x, DIGITS - 1 - math.floor(math.log10(scale))), self.low), self.high)


Values = Sequence[Any] | Uniform  # of one field
Sweep = Mapping[str, Values]


def settings_of(
    configs: Configs, sweep: Sweep, number: int | None, seed: int, first: int | None = None
) -> list[Setting]:
    """The settings of a sweep: the grid of its lists, or `number` that `draw` finds, or the `first` of these."""
    if number is not None:
        return draw(configs, sweep, number, seed)[:first]
    lists = {}
    for name, values in sweep.items():
        if isinstance(values, Uniform):
            raise UsageError(f"sweep {name} ({values}) is a range: say by --search how many settings to draw from it")
        lists[name] = values
    return grid(configs, lists)


def draw(configs: Configs, sweep: Sweep, number: int, seed: int) -> list[Setting]:
    """Distinct settings at the first points of a scrambled Sobol sequence (`scipy.stats.qmc.Sobol`), which fill the
    ranges more evenly than random points. Each value of a list is as likely as the others.

    Raises:
      UsageError: nothing is swept, a range does not suit its field, or there are fewer settings than `number`.
    """
    from scipy.stats import qmc

    if not sweep:
        raise UsageError(f"search ({number}) needs a sweep, such as --sweep learning_rate=log:1e-4..1e-2")
    kinds = [takes_integers(configs, name, values) for name, values in sweep.items()]
    possible = math.prod(map(_size, sweep.values(), kinds))
    if number > possible:
        raise UsageError(f"search ({number}) must be at most {possible:.0f}, the number of settings that differ")
    num_bits, found = math.ceil(math.log2(number)), {}
    while len(found) < number:  # points that differ may agree in all integers and choices
        points = qmc.Sobol(len(sweep), rng=seed).random_base2(num_bits)
        found = dict.fromkeys(tuple(map(_value, sweep.values(), kinds, point.tolist())) for point in points)
        num_bits += 1
    return settings_at(configs, list(sweep), list(found)[:number])


def takes_integers(configs: Configs, name: str, values: Values) -> bool:
    """Whether a field's values are integers in a range. Raises UsageError if the range does not suit the field."""
    config, field = find_field(configs, name)
    if not isinstance(values, Uniform):
        if isinstance(values, str) or not np.iterable(values) or not len(values):
            raise UsageError(f"sweep {name} ({values}) must be a range or a list of values")
        return False
    kinds = dict(alternatives(hints(type(configs[config]))[field]))
    if not {int, float} & kinds.keys():
        raise UsageError(f"sweep {name} ({values}) must be a list of values, as ranges are for numbers")
    for end in (values.low, values.high):
        try:
            check(replace(configs[config], **{field: end}))
        except UsageError as error:
            raise UsageError(f"sweep {name} ({values}): {error}") from None
    return float not in kinds


def _size(values: Values, whole: bool) -> float:
    """How many values differ."""
    if isinstance(values, Uniform):
        return values.high - values.low + 1 if whole else math.inf
    return len(set(values))


def _value(values: Values, whole: bool, u: float) -> Any:
    return values.at(u, whole) if isinstance(values, Uniform) else values[int(u * len(values))]


def rungs(total_steps: int, factor: int, first: int | None, number: int, least: int) -> list[int]:
    """The environment steps of an agent at the end of each rung of successive halving: each `factor` times those of the
    rung before, the last `total_steps`.

    Args:
      factor: of n settings, ceil(n / factor) go on after a rung.
      first: the first rung. None: as short as leaves one setting for the last.
      number: of settings.
      least: what one update may take.
    Raises:
      UsageError: the first rung is too short for an update, or not shorter than the run, or there is a single setting.
    """
    if number == 1:
        raise UsageError(f"halve ({factor}) needs several settings, as of a search or a sweep")
    halvings = 0
    while number > 1:
        number, halvings = math.ceil(number / factor), halvings + 1
    shortest = first or total_steps // factor**halvings
    if not least <= shortest < total_steps:
        named = f"first_rung ({first})" if first else f"the first rung, total_steps / {factor}^{halvings} ({shortest}),"
        raise UsageError(f"{named} must be at least {least}, what one update may take, and below total_steps")
    steps = [shortest * factor**i for i in range(halvings)]
    return [*(x for x in steps if x < total_steps), total_steps]
