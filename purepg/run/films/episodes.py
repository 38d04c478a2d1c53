"""Whole episodes with all their states, played on the device by any policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import in_units
from purepg.experience.rollout import reset_all
from purepg.types import Act, Array, Env, Key


class Played(NamedTuple):
    """N episodes side by side. The entries after an episode's end are meaningless."""

    state: Any  # leaves [T + 1, N, ...]: before the first step, and after each
    obs: Array  # [T + 1, N, ...]
    reward: Array  # [T, N], and the flags too
    terminated: Array
    truncated: Array


class Episode(NamedTuple):
    """One whole episode of T steps, in numpy."""

    state: Any  # leaves [T + 1, ...]
    obs: np.ndarray  # [T + 1, ...]
    reward: np.ndarray  # [T]
    terminated: bool
    truncated: bool


def play(key: Key, env: Env, act: Act, num_episodes: int, max_steps: int) -> Played:
    """The episodes over which `purepg.train.evaluate` averages when it is given the same arguments. Pure."""
    k_start, k_run = jax.random.split(key)
    world = reset_all(k_start, env, num_episodes)

    def body(carry, t):
        env_state, obs = carry
        k_act, k_step = jax.random.split(jax.random.fold_in(k_run, t))
        taken = in_units(env.action_space, act(k_act, obs))
        env_state, time_step = jax.vmap(env.step)(jax.random.split(k_step, num_episodes), env_state, taken)
        return (env_state, time_step.obs), (env_state, time_step)

    first = world.env_state, world.obs
    _, (states, steps) = jax.lax.scan(body, first, jnp.arange(max_steps))
    state, obs = jax.tree.map(lambda x0, x: jnp.concatenate([x0[None], x]), first, (states, steps.obs))
    truncated = steps.truncated | ((jnp.arange(max_steps) == max_steps - 1)[:, None] & ~steps.terminated)
    return Played(state, obs, steps.reward, steps.terminated, truncated)


def split(played: Played) -> list[Episode]:
    """The single episodes, each cut at its end."""
    played = jax.device_get(played)
    found = []
    for n in range(played.reward.shape[1]):
        T = int(np.argmax(played.terminated[:, n] | played.truncated[:, n])) + 1
        state, obs = jax.tree.map(lambda x, n=n, T=T: x[: T + 1, n], (played.state, played.obs))
        ending = bool(played.terminated[T - 1, n]), bool(played.truncated[T - 1, n])
        found.append(Episode(state, obs, np.asarray(played.reward[:T, n]), *ending))
    return found
