"""Fields that change during a run: constant from one environment step to the next one that is named."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from purepg.config import check, float_fields, hints
from purepg.run.sweep import Configs, find_field
from purepg.run.values import parse_value
from purepg.types import Array, UpdateSteps, UsageError


class Change(NamedTuple):
    """The values of a field over time."""

    config: str
    field: str
    starts: tuple[int, ...]  # the first update of each value
    values: tuple[float, ...]

    def at(self, update: Array | int) -> Array:
        """The value in an update."""
        now = jnp.sum(update >= jnp.array(self.starts)) - 1
        return jnp.array(self.values, jnp.float32)[now]


def parse_schedule(
    texts: Sequence[str], configs: Configs, swept: Sequence[str], steps: UpdateSteps, outside: bool
) -> tuple[Change, ...]:
    """Parses `["learning_rate=0:1e-3,5000:3e-4"]`: each value holds from the first update at its environment step on.

    Args:
      swept: the names of the sweep.
      steps: the environment steps of an update.
      outside: whether the environment is not JAX.
    Raises:
      UsageError: a field is unknown, swept too or not a float, its values are wrong or in another order, or updates are
        outside of a compiled program or vary in length.
    """
    if texts and (steps.vary or outside):
        why = "an environment in JAX" if outside else "updates of one length"
        raise UsageError(f"schedule ({texts[0]}) needs {why}: leave it out")
    changes, others = [], {find_field(configs, name) for name in swept}
    for text in texts:
        name, _, entries = text.partition("=")
        config, field = find_field(configs, name)
        if field not in float_fields(configs[config]) or (config, field) in others:
            raise UsageError(f"schedule ({text}) must be of a float that is named nowhere else")
        others.add((config, field))
        pairs = [entry.partition(":") for entry in entries.split(",")]
        named, hint = f"schedule {name}", hints(type(configs[config]))[field]
        starts = [parse_value(named, int, start.strip()) for start, _, _ in pairs]
        values = [parse_value(named, hint, value.strip()) for _, _, value in pairs]
        if starts[0] != 0 or sorted(set(starts)) != starts:
            raise UsageError(f"{named} ({entries}) must be STEP:VALUE,STEP:VALUE,... from step 0 on, in this order")
        for value in values:
            check(replace(configs[config], **{field: value}))
        changes.append(Change(config, field, tuple(-(-start // steps.most) for start in starts), tuple(values)))
    return tuple(changes)


def schedule_texts(values: Mapping[str, Sequence[float]], starts: Sequence[int]) -> tuple[str, ...]:
    """Values at environment steps as `parse_schedule` reads them, those that differ from the value before."""
    texts = []
    for name, x in values.items():
        changed = [i for i in range(len(starts)) if i == 0 or x[i] != x[i - 1]]
        texts.append(f"{name}=" + ",".join(f"{int(starts[i])}:{x[i]!s}" for i in changed))
    return tuple(texts)
