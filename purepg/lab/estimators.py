"""Estimates of the policy gradient from experience, for any weight of grad log pi.

As in any algorithm, experience comes from `episodes` or `rollout`, the weight from `equations.advantages` and the
gradient from `equations.losses`. `update_of` gets the estimate from an algorithm's own update.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from purepg.equations.distributions import Categorical, DiagGaussian
from purepg.equations.losses import policy_gradient
from purepg.experience.acting import actor
from purepg.experience.rollout import episodes, reset_all, rollout
from purepg.optimize import with_params
from purepg.types import Algorithm, Array, Env, Key, Network, Obs, Params, State, Transition, first_memory


class WithCritic(NamedTuple):
    """A network without a critic, combined with a fixed table of values."""

    policy: Network  # its `apply` returns a distribution
    value: Array  # [S]

    def init(self, key: Key, obs: Obs) -> Params:
        return self.policy.init(key, obs)

    def apply(self, params: Params, obs: Obs) -> tuple[Categorical | DiagGaussian, Array]:
        return self.policy.apply(params, obs), jnp.asarray(self.value, jnp.float32)[obs]


class Experience(NamedTuple):
    """Episodes, or rollouts from freshly reset environments; leaves are `[T, N, ...]`."""

    trajectory: Transition
    mask: Array


def episode_experience(
    key: Key, env: Env, network: Network, params: Params, num_episodes: int, max_steps: int
) -> Experience:
    """Runs N whole episodes."""
    return Experience(*episodes(key, env, actor(network, params), num_episodes, max_steps)[:2])


def rollout_experience(
    key: Key, env: Env, network: Network, params: Params, num_envs: int, num_steps: int
) -> Experience:
    """Takes `num_steps` steps in N freshly reset environments; every step is in the mask."""
    k_start, k_rollout = jax.random.split(key)
    world = reset_all(k_start, env, num_envs, first_memory(network))
    _, trajectory, _ = rollout(k_rollout, env, actor(network, params), world, num_steps)
    return Experience(trajectory, jnp.ones_like(trajectory.terminated))


def ascent(
    network: Network,
    params: Params,
    experience: Experience,
    weight: Array,
    loss: Callable[[Array, Array], Array] = policy_gradient,
) -> Params:
    """1/N sum_i sum_t grad log pi(a_it|s_it) * weight_it, for `weight` `[T, N]`: minus the gradient of `loss(log_prob,
    weight)`, `[T, N]`, summed over the mask and divided by N."""
    trajectory, mask = experience

    def total(params):
        distribution, _ = network.apply(params, trajectory.obs)
        return jnp.sum(loss(distribution.log_prob(trajectory.action), weight), where=mask) / mask.shape[1]

    return jax.tree.map(jnp.negative, jax.grad(total)(params))


def update_of(algorithm: Algorithm, params: Params, learning_rate: float) -> Callable[[Key], Params]:
    """Returns an estimator that runs one update of an algorithm: (new parameters - parameters) / learning rate.

    The algorithm must take one plain gradient step per update (`optimizer="sgd"`, no `max_grad_norm`) and keep its
    parameters in `learner.params`. If it trains a critic, the critic's step is part of the estimate.
    """

    def estimate(key: Key) -> Params:
        k_init, k_step = jax.random.split(key)
        learner, world, _ = algorithm.init(k_init)
        state, _ = algorithm.step(k_step, State(with_params(learner, params), world), jnp.int32(0))
        return jax.tree.map(lambda new, old: (new - old) / learning_rate, state.learner.params, params)

    return estimate
