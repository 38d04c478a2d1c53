"""Environments made of another: with a time limit, or with each action repeated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.types import Array, Env, UsageError


class Counted(NamedTuple):
    """An environment's state, and the number of steps of its episode."""

    inner: Any
    t: Array


def time_limited(env: Env, max_episode_steps: int) -> Env:
    """Truncates episodes after `max_episode_steps` steps, or where the environment itself does, if that is earlier."""
    limit = positive_count("max_episode_steps", max_episode_steps)
    _refuse_outside(env, "max_episode_steps", limit)

    def reset(key):
        state, obs = env.reset(key)
        return Counted(state, jnp.int32(0)), obs

    def step(key, state, action):
        inner, time_step = env.step(key, state.inner, action)
        t = state.t + 1
        return Counted(inner, t), time_step._replace(truncated=time_step.truncated | (t >= limit))

    shorter = limit if env.max_episode_steps is None else min(limit, env.max_episode_steps)
    held_out = env.held_out and time_limited(env.held_out, limit)
    render = env.render and (lambda state, render=env.render: render(state.inner))
    return env._replace(reset=reset, step=step, max_episode_steps=shorter, held_out=held_out, render=render)


def repeated(env: Env, times: int) -> Env:
    """Takes each action up to `times` times, until the episode ends, and adds the rewards. A step, and with it every
    count of steps and the discount, is that of the policy."""
    k = positive_count("action_repeat", times)
    _refuse_outside(env, "action_repeat", k)
    if env.task is not None:
        raise UsageError(f"action_repeat ({k}) must be 1 on {env.name}, whose actions are tokens")

    def step(key, state, action):
        keys = jax.random.split(key, k)
        state, first = env.step(keys[0], state, action)

        def again(carry, key):
            state, so_far = carry
            new_state, new = env.step(key, state, action)
            new = new._replace(reward=so_far.reward + new.reward)
            ended = so_far.terminated | so_far.truncated
            return jax.tree.map(lambda old, new: jnp.where(ended, old, new), carry, (new_state, new)), None

        return jax.lax.scan(again, (state, first), keys[1:])[0]

    limit = env.max_episode_steps and -(-env.max_episode_steps // k)
    return env._replace(step=step, max_episode_steps=limit, held_out=env.held_out and repeated(env.held_out, k))


def own_state(state: Any) -> Any:
    """The state of the environment itself, without the counts of time limits around it."""
    while isinstance(state, Counted):
        state = state.inner
    return state


def _refuse_outside(env: Env, name: str, value: int) -> None:
    if env.outside is not None:
        raise UsageError(f"{name} ({value}) cannot be set on {env.name}, which is not JAX: wrap it in its own suite")


def positive_count(name: str, value: Any) -> int:
    """The value. Raises UsageError if it is no positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} ({value}) must be a positive whole number")
    return value
