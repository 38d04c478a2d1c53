"""Advantage actor-critic (Mnih et al. 2016), synchronous. Per update, with A and its target from a learned V:

theta <- theta + lr * E[ grad log pi(a|s) * A(s, a) + entropy_coef * grad H(pi(.|s)) ]
phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg import normalize
from purepg.advantages import gae, n_step, standardise
from purepg.config import Count, NonNegative, Positive, UnitInterval, check
from purepg.losses import explained_variance, policy_gradient, squared_error
from purepg.networks import actor, evaluation_policy
from purepg.normalize import Moments
from purepg.optimize import anneal, gradient_step, step_direction
from purepg.rollout import RolloutState, rollout, start, truncation_as_termination
from purepg.types import Algorithm, Array, Env, Network, Params, State, UsageError


@dataclass(frozen=True)
class A2CConfig:
    """Hyperparameters of A2C.

    Attributes:
      num_envs: parallel environments, N.
      num_steps: steps of each environment in one update, T.
      optimizer: adam, or sgd, the plain gradient.
      learning_rate: the optimiser's.
      anneal_learning_rate: let it fall linearly to 0 over `anneal_updates`.
      anneal_updates: length of the schedule; None: the run's.
      adam_eps: Adam's epsilon.
      gamma: discount per environment step.
      gae_lambda: GAE's lambda; 1 is the advantage over all that is left of the rollout.
      n_step: if not None, n-step advantages with this n take GAE's place.
      value_coef: weight of the critic's loss.
      entropy_coef: weight of the entropy bonus.
      max_grad_norm: bound on the gradient's global norm; None: unbounded.
      normalize_advantage: standardise the batch's advantages.
      normalize_obs: by their running mean and variance.
      scale_reward: by the standard deviation of the running discounted return.
      bootstrap_at_truncation: False takes a time limit for a death, the common mistake.
    """

    num_envs: Count = 8
    num_steps: Count = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    anneal_learning_rate: bool = False
    anneal_updates: Count | None = None
    adam_eps: Positive = 1e-5
    gamma: UnitInterval = 0.99
    gae_lambda: UnitInterval = 0.95
    n_step: Count | None = None
    value_coef: NonNegative = 0.5
    entropy_coef: NonNegative = 0.0
    max_grad_norm: Positive | None = 0.5
    normalize_advantage: bool = False
    normalize_obs: bool = False
    scale_reward: bool = False
    bootstrap_at_truncation: bool = True


class Learner(NamedTuple):
    params: Params
    opt_state: optax.OptState
    obs_moments: Moments | None
    return_moments: Moments | None


class World(NamedTuple):
    envs: RolloutState
    running_return: Array | None  # [N], of the running episode, discounted


def a2c(env: Env, network: Network, config: A2CConfig) -> Algorithm:
    """A2C on `env`.

    Raises:
      UsageError: a number out of its range, annealing without a length, or categories to be normalised.
    """
    c = config
    check(c)
    if c.anneal_learning_rate and c.anneal_updates is None:
        raise UsageError("anneal_updates (None) must be a number of updates where something is annealed")
    if c.normalize_obs:
        normalize.check_space(env)
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def init(key):
        k_params, k_world = jax.random.split(key)
        envs = start(k_world, env, c.num_envs)
        params = network.init(k_params, envs.obs)
        obs_moments = normalize.init(envs.obs[0]) if c.normalize_obs else None
        return_moments = normalize.init(0.0) if c.scale_reward else None
        running_return = jnp.zeros(c.num_envs) if c.scale_reward else None
        return State(Learner(params, tx.init(params), obs_moments, return_moments), World(envs, running_return))

    def loss(params, batch):
        obs, action, advantage, target = batch
        distribution, value = network.apply(params, obs)
        policy_loss = policy_gradient(distribution.log_prob(action), advantage).mean()
        value_loss = squared_error(value, target).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        return total, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}

    def step(key, state, update):
        (params, opt_state, obs_moments, return_moments), world = state
        act = actor(network, params, obs_moments)
        envs, trajectory, info = rollout(key, env, act, world.envs, c.num_steps)
        if not c.bootstrap_at_truncation:
            trajectory = truncation_as_termination(trajectory)
        _, action, _, reward, terminated, truncated, _ = trajectory

        obs = normalize.apply(obs_moments, trajectory.obs)
        _, value = network.apply(params, obs)
        _, next_value = network.apply(params, normalize.apply(obs_moments, trajectory.next_obs))
        scaled_reward = normalize.scale(return_moments, reward)
        estimate = (scaled_reward, value, next_value, terminated, truncated, c.gamma)
        advantage, target = gae(*estimate, c.gae_lambda) if c.n_step is None else n_step(*estimate, c.n_step)
        if c.normalize_advantage:
            advantage = standardise(advantage)

        learning_rate = anneal(c.learning_rate, update, c.anneal_updates if c.anneal_learning_rate else None)
        batch = (obs, action, advantage, target)
        params, opt_state, metrics = gradient_step(loss, tx, learning_rate, params, opt_state, batch)

        running_return, returns = normalize.running_return(
            world.running_return, reward, terminated | truncated, c.gamma
        )
        learner = Learner(
            params,
            opt_state,
            normalize.update(obs_moments, trajectory.obs),
            normalize.update(return_moments, returns),
        )
        metrics |= {"explained_variance": explained_variance(value, target)}
        return State(learner, World(envs, running_return)), info | metrics

    def policy(state, deterministic):
        return evaluation_policy(network, state.learner.params, deterministic, state.learner.obs_moments)

    env_steps = c.num_envs * c.num_steps
    return Algorithm(init, step, policy, env_steps, env_steps)
