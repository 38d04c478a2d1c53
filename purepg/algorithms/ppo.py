"""Proximal policy optimisation with the clipped surrogate (Schulman et al. 2017). Per update, A from GAE:

    ratio  = pi_theta(a|s) / pi_old(a|s)
    theta <- theta + lr * E[ grad min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) + entropy_coef * grad H(pi(.|s)) ]
    phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]

over several epochs of shuffled minibatches of the same data.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg import normalize
from purepg.advantages import gae, standardise
from purepg.config import Count, NonNegative, Positive, UnitInterval, check
from purepg.losses import clipped_squared_error, clipped_surrogate, explained_variance, kl_k3, squared_error
from purepg.networks import actor, evaluation_policy
from purepg.normalize import Moments
from purepg.optimize import anneal, minibatch_epochs, step_direction
from purepg.rollout import RolloutState, rollout, start, truncation_as_termination
from purepg.types import Algorithm, Array, Env, Network, Params, State, UsageError


@dataclass(frozen=True)
class PPOConfig:
    """Hyperparameters of PPO.

    Attributes:
      num_envs: parallel environments, N.
      num_steps: steps of each environment in one update, T.
      num_epochs: passes over the N * T steps.
      num_minibatches: gradient steps in one pass.
      optimizer: adam, or sgd, the plain gradient.
      learning_rate: the optimiser's.
      anneal_learning_rate: let it fall linearly to 0 over `anneal_updates`.
      anneal_clip_eps: let `clip_eps` fall linearly to 0 over `anneal_updates`.
      anneal_updates: length of the schedules; None: the run's.
      adam_eps: Adam's epsilon.
      gamma: discount per environment step.
      gae_lambda: GAE's lambda.
      clip_eps: the ratio is clipped to [1 - clip_eps, 1 + clip_eps].
      clip_value_eps: how far the value may move from its old self, in units of the return; None: anywhere.
      target_kl: end the update before the minibatch whose estimated KL(pi_old || pi) passes 1.5 times it; None: never.
      value_coef: weight of the critic's loss.
      entropy_coef: weight of the entropy bonus.
      max_grad_norm: bound on the gradient's global norm; None: unbounded.
      normalize_advantage: standardise the advantages of each minibatch, of the whole batch, or not at all.
      normalize_obs: by their running mean and variance.
      scale_reward: by the standard deviation of the running discounted return.
      bootstrap_at_truncation: False takes a time limit for a death, the common mistake.
    """

    num_envs: Count = 8
    num_steps: Count = 128
    num_epochs: Count = 4
    num_minibatches: Count = 4
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 3e-4
    anneal_learning_rate: bool = False
    anneal_clip_eps: bool = False
    anneal_updates: Count | None = None
    adam_eps: Positive = 1e-5
    gamma: UnitInterval = 0.99
    gae_lambda: UnitInterval = 0.95
    clip_eps: Positive = 0.2
    clip_value_eps: Positive | None = None
    target_kl: Positive | None = None
    value_coef: NonNegative = 0.5
    entropy_coef: NonNegative = 0.0
    max_grad_norm: Positive | None = 0.5
    normalize_advantage: Literal["minibatch", "batch", "off"] = "minibatch"
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


def ppo(env: Env, network: Network, config: PPOConfig) -> Algorithm:
    """PPO-Clip on `env`.

    Raises:
      UsageError: a number out of its range, a batch that the minibatches do not divide, annealing without a length, or
        categories to be normalised.
    """
    c = config
    check(c)
    if (c.anneal_learning_rate or c.anneal_clip_eps) and c.anneal_updates is None:
        raise UsageError("anneal_updates (None) must be a number of updates where something is annealed")
    if c.num_envs * c.num_steps % c.num_minibatches:
        raise UsageError(
            f"num_envs * num_steps ({c.num_envs * c.num_steps}) must be divisible by num_minibatches "
            f"({c.num_minibatches})"
        )
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

    def loss(params, batch, clip_eps):
        obs, action, old_log_prob, old_value, advantage, target = batch
        distribution, value = network.apply(params, obs)
        log_prob = distribution.log_prob(action)
        if c.normalize_advantage == "minibatch":
            advantage = standardise(advantage)
        policy_loss = clipped_surrogate(log_prob, old_log_prob, advantage, clip_eps).mean()
        if c.clip_value_eps is None:
            value_loss = squared_error(value, target).mean()
        else:
            value_loss = clipped_squared_error(value, old_value, target, c.clip_value_eps).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        log_ratio = log_prob - old_log_prob
        return total, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": kl_k3(log_ratio).mean(),
            "clip_fraction": jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip_eps),
        }

    def step(key, state, update):
        k_rollout, k_update = jax.random.split(key)
        (params, opt_state, obs_moments, return_moments), world = state
        act = actor(network, params, obs_moments)
        envs, trajectory, info = rollout(k_rollout, env, act, world.envs, c.num_steps)
        if not c.bootstrap_at_truncation:
            trajectory = truncation_as_termination(trajectory)
        _, action, log_prob, reward, terminated, truncated, _ = trajectory

        obs = normalize.apply(obs_moments, trajectory.obs)
        _, value = network.apply(params, obs)
        _, next_value = network.apply(params, normalize.apply(obs_moments, trajectory.next_obs))
        scaled_reward = normalize.scale(return_moments, reward)
        advantage, target = gae(scaled_reward, value, next_value, terminated, truncated, c.gamma, c.gae_lambda)
        if c.normalize_advantage == "batch":
            advantage = standardise(advantage)

        learning_rate = anneal(c.learning_rate, update, c.anneal_updates if c.anneal_learning_rate else None)
        clip_eps = anneal(c.clip_eps, update, c.anneal_updates if c.anneal_clip_eps else None)
        batch = (obs, action, log_prob, value, advantage, target)
        params, opt_state, metrics = minibatch_epochs(
            k_update,
            partial(loss, clip_eps=clip_eps),
            tx,
            learning_rate,
            params,
            opt_state,
            batch,
            c.num_epochs,
            c.num_minibatches,
            c.target_kl,
        )

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
