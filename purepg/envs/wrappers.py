"""Environments made of another: with a time limit, with each action repeated, with less or with more to observe."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import canonical
from purepg.types import Action, Array, Box, Discrete, Env, MultiDiscrete, Space, UsageError, is_image

PREVIOUS = ("previous_action", "previous_reward")  # the entries that `with_previous` adds to an observation


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
    _refuse_tokens(env, "action_repeat", k)

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


def partially_observed(env: Env, entries: str | int | Sequence[int]) -> Env:
    """Keeps only some entries of a Box observation, as a vector in the order given: what else there is stays hidden.

    Args:
      entries: indices into the flattened observation, such as `(0, 2)`, or text with ranges that include both ends:
        `"0,2"`, `"0-4,45-49"`.
    Raises:
      UsageError: the observation is no Box, or `entries` is malformed, out of range or names an entry twice.
    """
    space = env.observation_space
    _refuse_outside(env, "observed", entries)
    _refuse_tokens(env, "observed", entries)
    if not isinstance(space, Box):
        raise UsageError(f"observed ({entries}) needs a Box to choose from, which {env.name}'s observation is not")
    kept = _indices(entries, space.low.size, env.name)

    def part(obs):
        return obs.reshape(-1)[kept]

    held_out = env.held_out and partially_observed(env.held_out, entries)
    return _seen_as(env, part, Box(part(space.low), part(space.high), space.dtype), held_out)


def average_pooled(env: Env, size: int) -> Env:
    """Replaces squares of `size` x `size` pixels of an image by their means, channel by channel: a smaller image, which
    convolutions take less time for. uint8 images are rounded to whole numbers, and bool ones become float32 in [0, 1].

    Raises:
      UsageError: the observation is no image `[height, width, channels]`, or `size` does not divide height and width.
    """
    k = positive_count("average_pool", size)
    _refuse_outside(env, "average_pool", k)
    _refuse_tokens(env, "average_pool", k)
    space = env.observation_space
    if not is_image(space):
        raise UsageError(f"average_pool ({k}) needs an image to reduce, which {env.name}'s observation is not")
    height, width, channels = space.shape
    if height % k or width % k:
        raise UsageError(f"average_pool ({k}) must divide {height} and {width}, the size of {env.name}'s image")
    dtype = np.dtype(np.float32 if np.dtype(space.dtype) == bool else space.dtype)

    def pooled(image):
        means = image.reshape(height // k, k, width // k, k, channels).mean((1, 3), dtype=np.float32)
        return (means.round() if np.issubdtype(dtype, np.integer) else means).astype(dtype)

    held_out = env.held_out and average_pooled(env.held_out, k)
    return _seen_as(env, pooled, Box(pooled(space.low), pooled(space.high), dtype), held_out)


def _seen_as(env: Env, seen: Callable[[Any], Any], space: Box, held_out: Env | None) -> Env:
    """The environment whose observations are `seen(obs)`."""

    def reset(key):
        state, obs = env.reset(key)
        return state, seen(obs)

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(obs=seen(time_step.obs))

    return env._replace(reset=reset, step=step, observation_space=space, held_out=held_out, describe=None)


def _indices(entries: Any, size: int, name: str) -> np.ndarray:
    """The indices in `(0, 2)` or `"0-4,45-49"`, all below `size`."""
    parts = entries.split(",") if isinstance(entries, str) else map(str, np.ravel(entries))
    ranges = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in parts]
    if any(found and int(found[2] or found[1]) >= size for found in ranges):
        raise UsageError(f"observed ({entries}) must be below {size}, the entries that {name} observes")
    kept = [list(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else [] for found in ranges]
    flat = [i for indices in kept for i in indices]
    if not kept or not all(kept) or len(set(flat)) < len(flat):
        raise UsageError(f"observed ({entries}) must be entries such as 0,2 or 0-4,45-49, each named once")
    return np.array(flat)


def with_previous(env: Env, on: bool = True) -> Env:
    """Adds the previous action and the previous reward to the observation, as policies with memory read them (Duan et
    al. 2016, RL^2; Kapturowski et al. 2019, R2D2).

    The observation becomes a dict of `obs`, `previous_action` and `previous_reward`; one that is a dict already keeps
    its entries and gets two more. The action is as the policy took it: canonical in [-1, 1] where a Box is bounded,
    after clipping. The reward is that of the environment, neither scaled nor clipped. At an episode's first step the
    reward is 0 and the action is none: n among n Discrete actions, whose leaf is Discrete(n + 1), likewise for each
    entry of a MultiDiscrete action, and zeros in a Box.

    `normalize_obs` standardises the reward and a Box's action like any other leaf in a Box, and leaves a Discrete
    action as it is.

    Raises:
      UsageError: `on` is neither true nor false, the environment is one of tokens or not JAX, or its observation has
        such entries already.
    """
    if not isinstance(on, bool):
        raise UsageError(f"previous ({on}) must be true or false")
    if not on:
        return env
    _refuse_outside(env, "previous", on)
    _refuse_tokens(env, "previous", on)
    space = env.observation_space
    is_dict = isinstance(space, Mapping)
    if is_dict and (taken := [name for name in PREVIOUS if name in space]):
        raise UsageError(f"previous ({on}) must be off: {env.name} observes {' and '.join(taken)} already")
    action_space, none, noted = _previous_action(env.action_space)

    def told(obs, action, reward):
        return {**(obs if is_dict else {"obs": obs}), **dict(zip(PREVIOUS, (action, reward), strict=True))}

    def reset(key):
        state, obs = env.reset(key)
        return state, told(obs, jnp.asarray(none), jnp.float32(0))

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        obs = told(time_step.obs, noted(action), jnp.asarray(time_step.reward, jnp.float32))
        return state, time_step._replace(obs=obs)

    def describe(obs):
        assert env.describe is not None
        return env.describe({name: x for name, x in obs.items() if name not in PREVIOUS} if is_dict else obs["obs"])

    any_reward = Box(np.array(-np.inf, np.float32), np.array(np.inf, np.float32))
    return env._replace(
        reset=reset,
        step=step,
        observation_space=told(space, action_space, any_reward),
        held_out=env.held_out and with_previous(env.held_out),
        describe=env.describe and describe,
    )


def _previous_action(space: Space) -> tuple[Space, np.ndarray, Callable[[Action], Array]]:
    """The space of a previous action, its value where there is none, and the map of an action in `space` to it."""
    match space:
        case Discrete(n):
            return Discrete(n + 1), np.array(n, np.int32), lambda action: jnp.asarray(action, jnp.int32)
        case MultiDiscrete(sizes):
            more = MultiDiscrete(tuple(n + 1 for n in sizes))
            return more, np.array(sizes, np.int32), lambda action: jnp.asarray(action, jnp.int32)
    zeros = np.zeros(space.shape, space.dtype)
    own = Box(zeros - 1, zeros + 1, space.dtype) if space.bounded else space
    return own, zeros, lambda action: canonical(space, action)


def own_state(state: Any) -> Any:
    """The state of the environment itself, without the counts of time limits around it."""
    while isinstance(state, Counted):
        state = state.inner
    return state


def _refuse_outside(env: Env, name: str, value: Any) -> None:
    if env.outside is not None:
        raise UsageError(f"{name} ({value}) cannot be set on {env.name}, which is not JAX: wrap it in its own suite")


def _refuse_tokens(env: Env, name: str, value: Any) -> None:
    if env.task is not None:
        raise UsageError(f"{name} ({value}) cannot be set on {env.name}, whose observations and actions are tokens")


class UnknownParameterError(UsageError):
    """An environment has no such parameters. Lists those that it has, and names the nearest."""

    def __init__(self, name: str, unknown: Sequence[str], known: Sequence[str]):
        self.name, self.unknown, self.known = name, unknown, tuple(dict.fromkeys(known))
        near = difflib.get_close_matches(unknown[0], self.known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        listed = ", ".join(self.known)
        super().__init__(f"{name} has no parameter {', '.join(map(repr, unknown))}; it has {listed}{hint}")


def positive_count(name: str, value: Any) -> int:
    """The value. Raises UsageError if it is no positive whole number, or none that an int32 holds."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} ({value}) must be a positive whole number")
    if value > (largest := np.iinfo(np.int32).max):
        raise UsageError(f"{name} ({value}) must be at most {largest}")
    return value
