"""How a policy acts in environments: from raw observations to actions."""

import jax

from purepg.equations.distributions import executed
from purepg.experience import normalize
from purepg.experience.normalize import Moments
from purepg.types import Act, Actor, Network, Params


def actor(network: Network, params: Params, moments: Moments | None = None) -> Actor:
    """Returns the policy's actor: raw observations to sampled actions and their log-probabilities."""

    def distribution(obs):
        return network.apply(params, normalize.apply(moments, obs))[0]

    def noise(key, obs):
        return jax.eval_shape(distribution, obs).noise(key)

    def act(noise, obs):
        return distribution(obs).scored(noise)

    return Actor(noise, act)


def evaluation_policy(network: Network, params: Params, deterministic: bool, moments: Moments | None = None) -> Act:
    """Maps raw observations to executed actions, either sampled or the distribution's mode."""

    def act(key, obs):
        distribution, _ = network.apply(params, normalize.apply(moments, obs))
        return executed(distribution.mode() if deterministic else distribution.sample(key))

    return act
