"""Config fields: numbers with ranges, choices, and the check of both.

A config is a frozen dataclass. Its floats may be tracers, so that a sweep over them is a vmap; ints, bools, strings and
tuples are static. Optional numbers are `Positive | None`, where None means off.
"""

import dataclasses
import difflib
import functools
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from purepg.spread import num_devices
from purepg.types import Array, UsageError

Config = TypeVar("Config")
Number = Array | float  # a float of a config, which a sweep traces


class Range(NamedTuple):
    """A closed interval; `above` excludes the lower end."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, x: object) -> bool:
        if not isinstance(x, int | float) or not -math.inf < x < math.inf:
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
Share = Annotated[float, Range(0.0, 1.0, above=True)]


def check(config: Config) -> Config:
    """Checks every field of a config against its declared type, range and choices.

    Traced values, such as those of a sweep within a program, have no value yet: only their shape and dtype are checked.

    Returns:
      the config. NumPy numbers and arrays without axes become Python numbers, whose dtype does not change results.
    Raises:
      UsageError: names the field, its value, what it must be, and the nearest choice.
    """
    fields = {name: (getattr(config, name), hint) for name, hint in hints(type(config)).items()}
    held = {name: _hold(name, value, hint) for name, (value, hint) in fields.items()}
    changed = {name: value for name, value in held.items() if value is not fields[name][0]}
    return dataclasses.replace(config, **changed) if changed else config  # pyright: ignore[reportArgumentType]


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raises UsageError if `value` is not one of the strings of the Literal `choices`; names the nearest."""
    if not _is_a(choices, value):
        refuse(name, value, choices)


def check_minibatches(
    num_envs: int, num_steps: int, num_minibatches: int, window: int | None = None, what: str = "num_minibatches"
) -> None:
    """Raises UsageError if a rollout's steps, or windows of them, cannot be split evenly into minibatches."""
    if window is not None and num_steps % window:
        raise UsageError(f"num_steps ({num_steps}) must be divisible by window ({window})")
    of_windows, total = (" / window", num_envs * num_steps // window) if window else ("", num_envs * num_steps)
    try:
        check_dealt(f"num_envs * num_steps{of_windows}", total, num_minibatches, what)
    except UsageError as error:
        if window != num_steps:
            raise
        why = f"window is num_steps ({num_steps}) where the network has memory, unless it is set to fewer steps"
        raise UsageError(f"{error}; {why}") from None


def check_dealt(name: str, total: int, divisor: int, what: str = "num_minibatches") -> None:
    """Raises UsageError if each device's part of `total` steps, windows or episodes is not divisible by the divisor."""
    times = f" times devices_per_agent ({num_devices()})" if num_devices() > 1 else ""
    if total % (divisor * num_devices()):
        raise UsageError(f"{name} ({total}) must be divisible by {what} ({divisor}){times}")


def check_schedules(config: Any) -> None:
    """Raises UsageError if something is annealed but `anneal_updates` is None. `run` sets it to the run's length, where
    updates do not vary in length."""
    annealed = (value for name, value in vars(config).items() if name.startswith("anneal_") and name != ANNEAL_UPDATES)
    if any(annealed) and getattr(config, ANNEAL_UPDATES) is None:
        raise UsageError("anneal_updates (None) must be a number of updates if something is annealed")


def check_standardised(
    normalize: bool | str, batch_size: int, num_minibatches: int = 1, name: str = "normalize_advantage"
) -> None:
    """Raises UsageError if a single step's weight would be standardised by itself, which makes it 0.

    `normalize` is the value of the field `name`: True or "batch", which standardises a batch, "minibatch", or off.
    """
    together = batch_size // num_minibatches if normalize == "minibatch" else batch_size
    if normalize not in (False, "off") and together == 1:
        raise UsageError(f"{name} ({normalize}) needs at least 2 steps at once: standardising one weight gives 0")


@functools.cache
def hints(config: type) -> dict[str, Any]:
    """Returns the types of a config's fields, with their annotations."""
    return get_type_hints(config, include_extras=True)


def alternatives(hint: Any) -> list[tuple[Any, Range | None]]:
    """Returns a field's type as a list of (kind, its range), with one entry per member of a union and None last."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        own = next((x for x in notes if isinstance(x, Range)), None)
        return [(kind, own or allowed) for kind, allowed in alternatives(inner)]
    if get_origin(hint) in (Union, UnionType):
        found = [kind for member in get_args(hint) for kind in alternatives(member)]
        return sorted(found, key=lambda kind: kind[0] is NoneType)
    return [(hint, None)]


def refuse(name: str, value: object, hint: Any) -> NoReturn:
    """Raises UsageError: the value does not have the type `hint`. Names what it must be, and the nearest choice."""
    kinds = dict(alternatives(hint))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.4)
    remark = f": did you mean {near[0]}?" if near else ""
    if not is_known(value) and float not in kinds:
        remark = ", with a value known before the program is traced"
    raise UsageError(f"{name} ({_shown(value)}) must be {_described(hint)}{remark}")


def _described(hint: Any) -> str:
    """Describes in words the values that a type allows."""
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "none"}
    named = []
    for kind, _ in alternatives(hint):
        if get_origin(kind) is Literal:
            named += get_args(kind)
        elif get_origin(kind) is tuple:
            named.append(f"a tuple, each entry {_described(get_args(kind)[0])}")
        else:
            named.append(words.get(kind) or f"a {getattr(kind, '__name__', kind)}")
    return " or ".join(filter(None, [", ".join(named[:-1]), named[-1]]))


def float_fields(config: Any) -> tuple[str, ...]:
    """Names the fields that can be swept inside one program: floats, and optional floats that are not None."""
    is_float = {name: float in dict(alternatives(hint)) for name, hint in hints(type(config)).items()}
    return tuple(name for name, value in vars(config).items() if is_float[name] and value is not None)


def is_known(x: object) -> bool:
    """Whether a number has a concrete value; a tracer gets one only when the program runs."""
    return not isinstance(x, Tracer)


def _hold(name: str, value: Any, hint: Any) -> Any:
    """Converts a value to its field's type. Raises UsageError if it does not have that type."""
    kinds = alternatives(hint)
    for kind, allowed in kinds:
        if get_origin(kind) is tuple and isinstance(value, tuple):
            held = tuple(_hold(f"{name}[{i}]", x, get_args(kind)[0]) for i, x in enumerate(value))
            return value if all(x is y for x, y in zip(held, value, strict=True)) else held
        if not _is_a(kind, value):
            continue
        if kind in (int, float) and is_known(value):
            try:
                value = kind(value)
            except OverflowError:  # the integer is too large for a float
                value = math.inf
            if value not in (allowed or Range(-math.inf)):
                raise UsageError(f"{name} ({value}) must be {allowed or 'a finite number'}")
        return bool(value) if kind is bool else value
    refuse(name, value, hint)


def _is_a(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return False
    is_bool = isinstance(value, bool | np.bool_)
    if kind is bool:
        return is_bool
    if kind is int:
        return isinstance(value, int | np.integer) and not is_bool
    if kind is float:
        if isinstance(value, np.ndarray | jax.Array):
            real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
            return value.shape == () and real
        return isinstance(value, int | float | np.integer | np.floating) and not is_bool
    return not isinstance(kind, type) or isinstance(value, kind)  # other annotations are not checked


def _shown(value: object) -> str:
    """Formats a value as a few words on one line."""
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array of shape {value.shape}, {value.dtype}"
    text = repr(value) if isinstance(value, str | bytes | tuple | list) else " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
