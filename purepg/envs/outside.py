"""Environments that are not JAX. They are stepped on the host, many together, between compiled acting and compiled
learning (`purepg.run.outside`); a compiled program never calls them.

`suites.gymnasium` makes them of Gymnasium's environments. To bridge to something else, such as a simulator of your own,
write a class with the methods of `HostEnvs` and return `outside_env(...)`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import check_environment, example
from purepg.types import Env, Obs, ObservationSpace, Space, UsageError, is_space


class HostStep(NamedTuple):
    """One step of n environments in NumPy; leaves are `[n, ...]`, new arrays that no later step overwrites."""

    obs: Obs  # to act on next: where an episode has ended, that of the next episode if `taken` has no False for it
    reward: np.ndarray  # float32
    terminated: np.ndarray  # bool
    truncated: np.ndarray  # bool
    next_obs: Obs  # before any reset
    taken: np.ndarray  # bool; False: the action was ignored and the environment reset; only `obs` has a meaning then


class HostEnvs(Protocol):
    """n environments that are stepped together."""

    def reset(self, seeds: Sequence[int]) -> Obs:
        """Begins a new episode in each environment, from a seed of its own."""
        ...

    def step(self, action: np.ndarray) -> HostStep:
        """Takes actions `[n, ...]` in the units of the environment's action space."""
        ...

    def close(self) -> None: ...


def outside_env(
    name: str,
    make: Callable[[int], HostEnvs],
    observation_space: ObservationSpace,
    action_space: Space,
    max_episode_steps: int | None,
    render: Callable[[Any], np.ndarray] | None = None,
) -> Env:
    """An `Env` that is not JAX. Its state is empty, its `reset` returns zeros, and its `step` raises UsageError.

    Args:
      make: makes n environments.
      max_episode_steps: the time limit that the environments themselves apply.
      render: the picture, uint8 `[height, width, 3]`, of the first of those that `make` has made. None: films cannot be
        made of it.
    """

    def reset(key):
        del key
        shapes = jax.tree.map(example, observation_space, is_leaf=is_space)
        return (), jax.tree.map(jnp.zeros_like, shapes)

    def step(key, state, action):
        raise UsageError(
            f"{name} is not JAX, so that no compiled program can step it: train it by train_population, evaluate it by "
            "experiments/evaluate.py"
        )

    env = Env(reset, step, observation_space, action_space, max_episode_steps, name, outside=make, render=render)
    check_environment(env)
    return env
