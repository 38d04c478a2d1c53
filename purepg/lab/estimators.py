"""From experience to an estimate of the policy gradient, for any weight of grad log pi.

Experience comes from `episodes` or `rollout`, the weight from `advantages.py`, the gradient from `losses.py`, as in any
algorithm; `update_of` takes the estimate from an algorithm itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from purepg.equations.distributions import Categorical, DiagGaussian
from purepg.equations.losses import policy_gradient
from purepg.experience.acting import actor
from purepg.experience.rollout import episodes, rollout, start
from purepg.optimize import with_params
from purepg.types import Algorithm, Array, Env, Key, Network, Obs, Params, State, Transition


class WithCritic(NamedTuple):
    """A network that has no critic of its own, beside a table of values that does not learn.

    Attributes:
      policy: its `apply` gives a distribution.
      value: `[S]`.
    """

    policy: Network
    value: Array

    def init(self, key: Key, obs: Obs) -> Params:
        return self.policy.init(key, obs)

    def apply(self, params: Params, obs: Obs) -> tuple[Categorical | DiagGaussian, Array]:
        return self.policy.apply(params, obs), jnp.asarray(self.value, jnp.float32)[obs]


class Experience(NamedTuple):
    """Episodes or rollouts from the start; leaves are `[T, N, ...]`."""

    trajectory: Transition
    mask: Array


def episode_experience(
    key: Key, env: Env, network: Network, params: Params, num_episodes: int, max_steps: int
) -> Experience:
    """N whole episodes."""
    trajectory, mask, _ = episodes(key, env, actor(network, params), num_episodes, max_steps)
    return Experience(trajectory, mask)


def rollout_experience(
    key: Key, env: Env, network: Network, params: Params, num_envs: int, num_steps: int
) -> Experience:
    """`num_steps` steps of N environments that were just reset; every step counts."""
    k_start, k_rollout = jax.random.split(key)
    world = start(k_start, env, num_envs)
    _, trajectory, _ = rollout(k_rollout, env, actor(network, params), world, num_steps)
    return Experience(trajectory, jnp.ones_like(trajectory.terminated))


def ascent(
    network: Network,
    params: Params,
    experience: Experience,
    weight: Array,
    loss: Callable[[Array, Array], Array] = policy_gradient,
) -> Params:
    """1/N sum_i sum_t grad log pi(a_it|s_it) * weight_it: minus the gradient of a loss, summed over the steps of the
    mask and divided by N.

    Args:
      weight: `[T, N]`. loss: `loss(log_prob, weight)`, `[T, N]`.
    """
    trajectory, mask = experience

    def total(params):
        distribution, _ = network.apply(params, trajectory.obs)
        return jnp.sum(loss(distribution.log_prob(trajectory.action), weight), where=mask) / mask.shape[1]

    return jax.tree.map(jnp.negative, jax.grad(total)(params))


def update_of(algorithm: Algorithm, params: Params, learning_rate: float) -> Callable[[Key], Params]:
    """The estimate that an algorithm's own update is, (new parameters - parameters) / learning rate.

    The algorithm must take one plain step an update (`optimizer="sgd"`, no `max_grad_norm`), and keep its parameters in
    `learner.params`. Where a critic learns, its step is part of the estimate.
    """

    def estimate(key: Key) -> Params:
        k_init, k_step = jax.random.split(key)
        learner, world, _ = algorithm.init(k_init)
        state, _ = algorithm.step(k_step, State(with_params(learner, params), world), jnp.int32(0))
        return jax.tree.map(lambda new, old: (new - old) / learning_rate, state.learner.params, params)

    return estimate
