"""How a policy acts in environments: from raw observations to actions, from one memory to the next."""

from collections.abc import Callable
from typing import Any

import jax

from purepg.experience import normalize
from purepg.experience.normalize import Moments
from purepg.types import Actor, Memory, Moment, Network, Obs, Params, QNetwork, State, first_memory, has_memory


def step(network: Network | QNetwork, params: Params, memory: Memory, obs: Obs) -> tuple[Memory, Any]:
    """(the memory after it, the policy's distribution) of one observation `[N, ...]`, normalised."""
    if not has_memory(network):
        return memory, network.apply(params, obs)[0]
    (distribution, _), memory = network.remember(params, Moment(obs, memory))  # pyright: ignore
    return memory, distribution


def actor(
    network: Network | QNetwork, params: Params, moments: Moments | None = None, deterministic: bool = False
) -> Actor:
    """The policy's actor: raw observations to sampled actions and their log-probabilities, or to the distributions'
    modes. That of a language model also responds as a whole."""
    first, of_prompts = first_memory(network), getattr(network, "respond", None)

    def noise(key, obs):
        num_envs = jax.tree.leaves(obs)[0].shape[0]
        return jax.eval_shape(lambda: step(network, params, first(num_envs), obs)[1]).noise(key)

    def act(noise, memory, obs):
        memory, distribution = step(network, params, memory, normalize.apply(moments, obs))
        if deterministic or not hasattr(distribution, "log_prob"):
            return memory, distribution.mode(), None
        return memory, *distribution.scored(noise)

    respond = of_prompts and (lambda key, obs: of_prompts(key, params, obs, deterministic))
    return Actor((lambda key, obs: ()) if deterministic else noise, act, first, respond)


def evaluation_policy(network: Network | QNetwork) -> Callable[[State, bool], Actor]:
    """`Algorithm.policy` of a network."""

    def policy(state, deterministic):
        learner = state.learner
        return actor(network, learner.params, getattr(learner, "obs_moments", None), deterministic)

    return policy
