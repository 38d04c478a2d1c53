"""Population-based training of a search's settings: what it needs, and which member came from which."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.pbt import Interval, Tuned, tuned
from purepg.run.outside import not_jax
from purepg.run.search import Sweep, Uniform
from purepg.run.sweep import Hyper, Program, Setting, find_field, settings_at
from purepg.types import Algorithm, Env, Key, State, UsageError


class Tuning(NamedTuple):
    """How the settings of a search are trained as one population."""

    places: Mapping[str, tuple[str, str]]  # (config, field) of each hyperparameter
    ranges: Mapping[str, Interval]
    every: int  # updates between two rounds

    def member(self, algorithm: Callable[[Hyper], Algorithm], hyper: Hyper, key: Key) -> Algorithm:
        """`purepg.pbt.tuned` of a guarded algorithm, which is a function of all its float fields."""

        def make(swept):
            chosen = {config: dict(fields) for config, fields in hyper.items()}
            for name, (config, field) in self.places.items():
                chosen[config][field] = swept[name]
            return algorithm(chosen)

        own = {name: hyper[config][field] for name, (config, field) in self.places.items()}
        return tuned(make, own, self.ranges, key, self.every)


def tuning_of(
    pbt: int, search: int | None, sweep: Sweep, programs: Sequence[Program], algorithm: Algorithm, env: Env
) -> Tuning:
    """Population-based training with a round every `pbt` environment steps, rounded down to whole updates.

    Args:
      search: the number of members.
      programs: those of the search's settings.
      algorithm: that of the first program.
    Raises:
      UsageError: the search, the algorithm or the environment does not suit it.
    """
    if search is None or search < 2:
        raise UsageError(f"pbt ({pbt}) needs --search, with at least 2 members: --search 16")
    ranges = {}
    for name, values in sweep.items():
        config, field = find_field(programs[0].configs, name)
        if not isinstance(values, Uniform) or field not in programs[0].hyper[config]:
            raise UsageError(f"pbt ({pbt}) tunes ranges of floats: sweep {name} must be one, or be left out")
        ranges[name] = Interval(values.low, values.high, values.log)
    if name := not_jax(env):
        raise UsageError(f"pbt ({pbt}) is within the compiled program, but {name} is not JAX: leave it out")
    (program,) = programs  # settings that differ in floats alone share one
    steps = algorithm.update_steps
    if steps.vary:
        raise UsageError(f"pbt ({pbt}) needs updates of one length, but they take {steps.least} to {steps.most} steps")
    every = max(1, pbt // steps.most)
    if every >= program.num_updates:
        last = steps.most * (program.num_updates - 1)
        raise UsageError(f"pbt ({pbt}) must be at most {last} environment steps, so that there is a round")
    if "episode_return" not in _metrics(algorithm):
        raise UsageError(f"pbt ({pbt}) ranks members by their episodes' returns, which this algorithm does not report")
    return Tuning({name: find_field(program.configs, name) for name in sweep}, ranges, every)


def settled(state: State, setting: Setting) -> tuple[State, Setting]:
    """The state of a member and its setting as those of an agent that is trained alone, with the member's present
    hyperparameters. Those of other agents stay as they are."""
    if not isinstance(state.guard, Tuned):
        return state, setting
    hyper = {name: float(str(np.float32(state.guard.hyper[name]))) for name in setting.hyperparameters}
    (now,) = settings_at(setting.configs, list(hyper), [list(hyper.values())])
    return state._replace(guard=state.guard.guard), now


def _metrics(algorithm: Algorithm) -> Sequence[str]:
    """The names of an algorithm's metrics."""

    def update(key):
        return algorithm.step(key, algorithm.init(key), jnp.int32(0))[1]

    return list(jax.eval_shape(update, jax.eval_shape(jax.random.key, 0)))
