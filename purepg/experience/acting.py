"""How a policy acts in environments: from raw observations to actions."""

from collections.abc import Callable

import jax

from purepg.equations.distributions import executed
from purepg.experience import normalize
from purepg.experience.normalize import Moments
from purepg.types import Act, Actor, Network, Params, QNetwork, State


def actor(network: Network, params: Params, moments: Moments | None = None) -> Actor:
    """Returns the policy's actor: raw observations to sampled actions and their log-probabilities."""

    def distribution(obs):
        return network.apply(params, normalize.apply(moments, obs))[0]

    def noise(key, obs):
        return jax.eval_shape(distribution, obs).noise(key)

    def act(noise, obs):
        return distribution(obs).scored(noise)

    return Actor(noise, act)


def evaluation_policy(network: Network | QNetwork) -> Callable[[State, bool], Act]:
    """`Algorithm.policy` of a network: raw observations to executed actions, sampled or the distribution's mode."""

    def policy(state, deterministic):
        params, moments = state.learner.params, getattr(state.learner, "obs_moments", None)

        def act(key, obs):
            distribution, _ = network.apply(params, normalize.apply(moments, obs))
            return executed(distribution.mode() if deterministic else distribution.sample(key))

        return act

    return policy
