"""The vocabulary of algorithms' configs: numbers with their ranges, and the one check of them.

A config is a frozen dataclass. Its floats may be tracers, so that a sweep over them is a vmap; ints, bools, strings and
tuples are static. Optional numbers are `Positive | None`, None meaning off.
"""

import dataclasses
import math
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from purepg.types import UsageError


class Range(NamedTuple):
    """A closed interval; `above` leaves the lower end out."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, x: object) -> bool:
        if not isinstance(x, int | float) or math.isnan(x) or math.isinf(x):
            return False
        return (self.low < x if self.above else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.above else 'at least'} {self.low:g}"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:.10g}]"


ANNEAL_UPDATES = "anneal_updates"

Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0.0, above=True)]
NonNegative = Annotated[float, Range(0.0)]
UnitInterval = Annotated[float, Range(0.0, 1.0)]


def check(config: Any) -> None:
    """Holds every number of a config that is known now to its range; tracers pass.

    Raises:
      UsageError: names the field, its range and its value.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value, allowed = getattr(config, name), range_of(hint)
        if allowed is not None and isinstance(value, int | float) and value not in allowed:
            raise UsageError(f"{name} ({value}) must be {allowed}")


def check_minibatches(batch_size: int, num_minibatches: int, what: str = "num_minibatches") -> None:
    """Raises UsageError where a rollout's steps cannot be dealt out evenly."""
    if batch_size % num_minibatches:
        raise UsageError(f"num_envs * num_steps ({batch_size}) must be divisible by {what} ({num_minibatches})")


def check_schedules(config: Any) -> None:
    """Raises UsageError where something is to be annealed and no length is given; `run` gives the run's."""
    annealed = (value for name, value in vars(config).items() if name.startswith("anneal_") and name != ANNEAL_UPDATES)
    if any(annealed) and getattr(config, ANNEAL_UPDATES) is None:
        raise UsageError("anneal_updates (None) must be a number of updates where something is annealed")


def range_of(hint: Any) -> Range | None:
    """The range in a field's type, `Annotated[...]` or `Annotated[...] | None`."""
    if get_origin(hint) is Annotated:
        return next((x for x in get_args(hint)[1:] if isinstance(x, Range)), None)
    return next((r for r in map(range_of, get_args(hint)) if r is not None), None)


def float_fields(config: Any) -> tuple[str, ...]:
    """Names of the fields that may be swept inside one program: floats, and optional floats that are on."""
    return tuple(f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), float))
