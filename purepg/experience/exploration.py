"""Exploration during training, for algorithms with a deterministic or squashed policy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.envs.contract import legal_actions
from purepg.equations.distributions import Categorical, executed
from purepg.experience.acting import step
from purepg.lanes import select
from purepg.types import (
    Action,
    Actor,
    Array,
    Box,
    Discrete,
    Env,
    Key,
    Memory,
    MultiDiscrete,
    Obs,
    Params,
    QNetwork,
    first_memory,
    moment,
    no_memory,
)


class Exploration(NamedTuple):
    """How an algorithm acts during training.

    Attributes:
      noise: `noise(key, obs)` draws one step's random numbers; only the shapes of `obs` are read.
      carry: `carry(before, fresh, starts)` combines the last step's noise with a fresh one; `starts` `[N]` marks new
        episodes.
      act: `act(params, noise, memory, obs)` returns (memory, executed actions) for normalised observations.
      memory: `memory(num_envs)`, what the policy remembers before an episode's first step.
    """

    noise: Callable[[Key, Obs], Any]
    carry: Callable[[Any, Any, Array], Any]
    act: Callable[[Params, Any, Memory, Obs], tuple[Memory, Action]]
    memory: Callable[[int], Memory] = no_memory


def own_samples(network: QNetwork) -> Exploration:
    """Explores by sampling a stochastic policy."""

    first = first_memory(network)

    def noise(key, obs):
        memory = first(jax.tree.leaves(obs)[0].shape[0])
        params = jax.eval_shape(network.init, key, moment(obs, memory))
        return jax.eval_shape(partial(step, network), params, memory, obs)[1].noise(key)

    def act(params, noise, memory, obs):
        memory, distribution = step(network, params, memory, obs)
        return memory, executed(distribution.transform(noise))

    return Exploration(noise, lambda before, fresh, starts: fresh, act, first)


def gaussian_noise(network: QNetwork, env: Env, std: Array | float, correlation: Array | float) -> Exploration:
    """Explores with mu(s) + std * noise, clipped where the space has bounds.

    `correlation` is that of successive noises within an episode. An Ornstein-Uhlenbeck process with rate theta and time
    step dt has 1 - theta * dt; here it starts in its stationary distribution.
    """
    space = env.action_space
    assert isinstance(space, Box)  # `require` has checked it

    def noise(key, obs):
        return jax.random.normal(key, (jax.tree.leaves(obs)[0].shape[0], *space.shape))

    def carry(before, fresh, starts):
        later = correlation * before + jnp.sqrt(1 - jnp.square(correlation)) * fresh
        return select(starts, fresh, later)

    def act(params, noise, memory, obs):
        memory, distribution = step(network, params, memory, obs)
        return memory, within_bounds(env, distribution.mode() + std * noise)

    return Exploration(noise, carry, act, first_memory(network))


def within_bounds(env: Env, action: Action) -> Action:
    """Clips canonical actions to [-1, 1] if the space is bounded."""
    bounded = isinstance(env.action_space, Box) and env.action_space.bounded
    return jnp.clip(action, -1, 1) if bounded else action


def random_actor(env: Env) -> Actor:
    """Acts as `random_action` does, or uniformly over the legal actions where observations say which those are."""

    def masked(obs):
        mask = legal_actions(env.observation_space, obs)
        return None if mask is None else Categorical(jnp.where(mask, 0.0, -jnp.inf))

    def noise(key, obs):
        if (uniform := jax.eval_shape(masked, obs)) is not None:
            return uniform.noise(key)
        return random_action(key, env, jax.tree.leaves(obs)[0].shape[0])

    def act(noise, memory, obs):
        uniform = masked(obs)
        return memory, (noise if uniform is None else uniform.transform(noise)), None

    return Actor(noise, act)


def random_action(key: Key, env: Env, num_envs: int) -> Action:
    """Draws uniform actions `[N, ...]`, or standard normal ones if the space is unbounded."""
    space = env.action_space
    if isinstance(space, Discrete):
        return jax.random.randint(key, (num_envs,), 0, space.n)
    if isinstance(space, MultiDiscrete):
        return jax.random.randint(key, (num_envs, len(space.sizes)), 0, jnp.array(space.sizes))
    shape = num_envs, *space.shape
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) if space.bounded else jax.random.normal(key, shape)
