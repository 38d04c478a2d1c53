"""Off-policy policy gradient: several gradient steps on the data of one rollout, the later ones on those of an older
policy, whose actions an importance ratio makes speak for the new one. Per step, with A and its target from V:

    ratio  = pi_theta(a|s) / pi_old(a|s)
    theta <- theta + lr * E[ ratio * A(s, a) * grad log pi(a|s) + entropy_coef * grad H(pi(.|s)) ]
    phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]

The ratio of a step leaves the states as the older policy visits them (Degris et al. 2012). The contrast is the product
over the whole trajectory, which corrects for those too, at a variance that grows exponentially with its length.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from purepg.advantages import effective_sample_size, gae, segment_ratio, standardise
from purepg.config import Count, NonNegative, Positive, UnitInterval, check, check_schedules, check_standardised
from purepg.losses import policy_gradient, squared_error
from purepg.networks import require_policy_gradient
from purepg.on_policy import SPARSE, assemble, collect, diagnostics
from purepg.optimize import anneal, gradient_steps, step_direction
from purepg.types import Algorithm, Env, Network, State


@dataclass(frozen=True)
class OffPolicyPGConfig:
    """Hyperparameters of the off-policy policy gradient.

    Attributes:
      num_envs: parallel environments, N.
      num_steps: steps of each environment in one update, T.
      num_epochs: gradient steps on the N * T steps.
      ratio: of the step alone, or of the whole trajectory: the product over those of the rollout's steps that belong
        to one episode.
      max_ratio: larger ratios count as this much; None: as they are.
      optimizer: adam, or sgd, the plain gradient.
      learning_rate: the optimiser's.
      anneal_learning_rate: let it fall linearly to 0 over `anneal_updates`.
      anneal_updates: length of the schedule; None: the run's.
      adam_eps: Adam's epsilon.
      gamma: discount per environment step.
      gae_lambda: GAE's lambda; 1 is the advantage over all that is left of the rollout.
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
    num_epochs: Count = 4
    ratio: Literal["step", "trajectory"] = "step"
    max_ratio: Positive | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Positive = 1e-3
    anneal_learning_rate: bool = False
    anneal_updates: Count | None = None
    adam_eps: Positive = 1e-5
    gamma: UnitInterval = 0.99
    gae_lambda: UnitInterval = 0.95
    value_coef: NonNegative = 0.5
    entropy_coef: NonNegative = 0.0
    max_grad_norm: Positive | None = 0.5
    normalize_advantage: bool = False
    normalize_obs: bool = False
    scale_reward: bool = False
    bootstrap_at_truncation: bool = True


def off_policy_pg(env: Env, network: Network, config: OffPolicyPGConfig) -> Algorithm:
    """Off-policy policy gradient on `env`.

    Raises:
      UsageError: what `check` refuses, annealing without a length, one advantage standardised by itself, a network
        without a stochastic policy or without V, or categories to be normalised.
    """
    c = check(config)
    check_schedules(c)
    check_standardised(c.normalize_advantage, c.num_envs * c.num_steps)
    require_policy_gradient(env, network, "off_policy_pg")
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def loss(params, batch):
        obs, action, old_log_prob, ended, advantage, target = batch
        distribution, value = network.apply(params, obs)
        log_prob = distribution.log_prob(action)
        ratio = jnp.exp(log_prob - old_log_prob)
        if c.ratio == "trajectory":
            ratio = segment_ratio(log_prob, old_log_prob, ended)
        ratio = ratio if c.max_ratio is None else jnp.minimum(ratio, c.max_ratio)
        policy_loss = policy_gradient(log_prob, ratio * advantage).mean()
        value_loss = squared_error(value, target).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        return total, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "weight_mean": ratio.mean(),
            "weight_max": ratio.max(),
            "weight_effective_sample_size": effective_sample_size(ratio),
        }

    def step(key, state, update):
        data, after, info = collect(key, env, network, c, state)
        estimate = (data.reward, data.value, data.next_value, data.terminated, data.truncated, c.gamma)
        advantage, target = gae(*estimate, c.gae_lambda)
        if c.normalize_advantage:
            advantage = standardise(advantage)

        learning_rate = anneal(c.learning_rate, update, c.anneal_updates if c.anneal_learning_rate else None)
        ended = data.terminated | data.truncated
        batch = (data.obs, data.action, data.log_prob, ended, advantage, target)
        params, opt_state, metrics = gradient_steps(
            loss, tx, learning_rate, state.learner.params, state.learner.opt_state, batch, c.num_epochs
        )
        learner = after.learner._replace(params=params, opt_state=opt_state)
        return State(learner, after.world), info | metrics | diagnostics(
            network, state.learner.params, params, data, target, SPARSE
        )

    return assemble(env, network, c, tx.init, step)
