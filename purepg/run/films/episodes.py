"""Whole episodes with all their states, played on the device by any policy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import in_units
from purepg.experience.rollout import reset_all
from purepg.types import Act, Env, Key


class Episode(NamedTuple):
    """One whole episode of T steps; or N side by side, whose entries after an episode's end are meaningless."""

    state: Any  # leaves [T + 1, ...] or [T + 1, N, ...]: before the first step, and after each
    obs: Any  # [T + 1, ...] or [T + 1, N, ...]
    reward: Any  # [T] or [T, N]
    terminated: Any  # of one episode: whether it ended so; of N: [T, N]
    truncated: Any


def play(key: Key, env: Env, act: Act, num_episodes: int, max_steps: int) -> Episode:
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
    return Episode(state, obs, steps.reward, steps.terminated, truncated)


def split(played: Episode) -> list[Episode]:
    """The single episodes in numpy, each cut at its end."""
    states, all_obs, reward, terminated, truncated = jax.device_get(played)
    found = []
    for n, last in enumerate(np.argmax(terminated | truncated, axis=0)):
        state, obs = jax.tree.map(lambda x, n=n, last=last: x[: last + 2, n], (states, all_obs))
        ending = bool(terminated[last, n]), bool(truncated[last, n])
        found.append(Episode(state, obs, reward[: last + 1, n], *ending))
    return found
