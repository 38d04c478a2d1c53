"""How a policy acts in environments: from raw observations to actions, from one memory to the next."""

from collections.abc import Callable
from typing import Any

import jax

from purepg.experience import normalize
from purepg.experience.normalize import Moments
from purepg.types import Actor, Memory, Moment, Network, Obs, Params, QNetwork, State, first_memory, has_memory


def actor(
    network: Network | QNetwork, params: Params, moments: Moments | None = None, deterministic: bool = False
) -> Actor:
    """The policy's actor: raw observations to sampled actions and their log-probabilities, or to the distributions'
    modes."""
    remembers = has_memory(network)

    def apply(memory: Memory, obs: Obs) -> tuple[Any, Memory]:
        obs = normalize.apply(moments, obs)
        if not remembers:
            return network.apply(params, obs)[0], memory
        (distribution, _), memory = network.remember(params, Moment(obs, memory))  # pyright: ignore
        return distribution, memory

    def noise(key, obs):
        num_envs = jax.tree.leaves(obs)[0].shape[0]
        return jax.eval_shape(lambda: apply(first(num_envs), obs)[0]).noise(key)

    def act(noise, memory, obs):
        distribution, memory = apply(memory, obs)
        if deterministic or not hasattr(distribution, "log_prob"):
            return memory, distribution.mode(), None
        return memory, *distribution.scored(noise)

    first = first_memory(network)
    return Actor((lambda key, obs: ()) if deterministic else noise, act, first)


def evaluation_policy(network: Network | QNetwork) -> Callable[[State, bool], Actor]:
    """`Algorithm.policy` of a network."""

    def policy(state, deterministic):
        learner = state.learner
        return actor(network, learner.params, getattr(learner, "obs_moments", None), deterministic)

    return policy
