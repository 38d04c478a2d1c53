"""What every adapter of a suite needs: our clock, and states and observations of one dtype."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import check_environment, example
from purepg.envs.wrappers import UnknownParameterError, time_limited
from purepg.types import (
    Array,
    Box,
    Env,
    ObservationSpace,
    Space,
    TimeStep,
    UsageError,
    is_space,
)

CLOCK = "max_episode_steps"  # the parameter of every suite that sets our clock

# State, observation, reward, terminated, and numbers of the episode so far.
Step = tuple[Any, Any, Any, Any, dict[str, Any]]


def suite_env(
    name: str,
    reset: Callable[[Array], tuple[Any, Any]],
    step: Callable[[Array, Any, Any], Step],
    observation_space: ObservationSpace,
    action_space: Space,
    max_episode_steps: int,
    **others: Any,
) -> Env:
    """An environment of a suite, truncated by our clock.

    Observations are cast to their spaces' dtypes, and a reset's state to the dtypes of a step's, from which suites'
    resets differ by Python numbers.

    Args:
      reset: `reset(key)` returns a state and an observation. Keys are raw uint32 arrays, as all suites take them, so
        that a state holds no typed key.
      step: the suite's step that never resets, with its own clock switched off.
      max_episode_steps: our clock, at least 1.
      others: other fields of `Env`; `render` takes the suite's state.
    Raises:
      UsageError: `max_episode_steps` is no positive whole number, or the environment breaks the contract of `Env`.
    """
    raw_key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    first, _ = jax.eval_shape(reset, raw_key)
    like = jax.eval_shape(lambda *x: step(*x)[0], raw_key, first, example(action_space))

    def cast_obs(obs):
        return jax.tree.map(
            lambda space, x: jnp.asarray(x, example(space).dtype), observation_space, obs, is_leaf=is_space
        )

    def cast(state):
        return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), state, like)

    def our_reset(key):
        state, obs = reset(jax.random.key_data(key))
        return cast(state), cast_obs(obs)

    def our_step(key, state, action):
        state, obs, reward, terminated, info = step(jax.random.key_data(key), state, action)
        info = {name: jnp.asarray(x, jnp.float32) for name, x in info.items()}
        reward, terminated = jnp.asarray(reward, jnp.float32), jnp.asarray(terminated, bool)
        return cast(state), TimeStep(cast_obs(obs), reward, terminated, jnp.bool_(False), info)

    endless = Env(our_reset, our_step, observation_space, action_space, None, name, **others)
    made = time_limited(endless, max_episode_steps)
    check_environment(made)
    return made


def box(shape: Iterable[int], dtype: Any = np.float32, low: float = -np.inf, high: float = np.inf) -> Box:
    """A Box with the same bounds everywhere."""
    return Box(np.full(tuple(shape), low, dtype), np.full(tuple(shape), high, dtype), dtype)


def require(suite: str, *packages: str) -> Any:
    """The first of a suite's packages. Raises UsageError, with the command to install them, where one is missing."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = suite.replace("_", "-")  # as pip knows it
        raise UsageError(f'{suite} needs {", ".join(missing)}, not installed here: pip install -e ".[{extra}]"')
    return importlib.import_module(packages[0])


def chosen(name: str, params: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The `params`, and the defaults of those not given. Raises UsageError for an unknown name or another type."""
    if unknown := [key for key in params if key not in defaults]:
        raise UnknownParameterError(name, unknown, (*defaults, CLOCK))
    for key, value in params.items():
        kind = type(defaults[key])
        if not (isinstance(value, kind) or (kind is float and isinstance(value, int))) or isinstance(value, bool) != (
            kind is bool
        ):
            raise UsageError(f"{name}'s {key} ({value!r}) must be of type {kind.__name__}")
    return defaults | dict(params)


def with_limit(name: str, params: Mapping[str, Any], default: int) -> tuple[dict[str, Any], int]:
    """The suite's own parameters among `params`, and the steps of our clock. Raises UsageError as `chosen` does."""
    own = {key: value for key, value in params.items() if key != CLOCK}
    clock = {key: value for key, value in params.items() if key == CLOCK}
    return own, chosen(name, clock, **{CLOCK: default})[CLOCK]


def with_fields(name: str, default: Any, params: Mapping[str, Any], hidden: str) -> Any:
    """A dataclass of parameters with some replaced, of which `hidden` is none. Raises UsageError as `chosen` does."""
    known = {field.name: getattr(default, field.name) for field in fields(default) if field.name != hidden}
    given = chosen(name, params, **known)
    return replace(default, **{key: type(known[key])(given[key]) for key in params})
