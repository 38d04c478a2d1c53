"""Proximal policy optimisation with a KL penalty (Schulman et al. 2017, section 4). Per update, A from GAE:

    ratio  = pi_theta(a|s) / pi_old(a|s)
    theta <- theta + lr * E[ grad (ratio * A - beta * KL(pi_old || pi_theta)(s)) + entropy_coef * grad H(pi(.|s)) ]
    phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]

over several epochs of shuffled minibatches of the same data. Afterwards, with d the mean KL of the update,

    beta <- beta / 2 if d < target_kl / 1.5,  2 beta if d > 1.5 target_kl
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import ProximalConfig
from purepg.algorithms.on_policy import checked, collect, finish, rollout_algorithm
from purepg.config import Positive
from purepg.equations.advantages import standardise
from purepg.equations.losses import squared_error, surrogate
from purepg.optimize import annealed_learning_rate, minibatch_epochs, step_direction
from purepg.types import Algorithm, Env, Network, State


@dataclass(frozen=True, kw_only=True)
class PPOPenaltyConfig(ProximalConfig):
    """Hyperparameters of PPO with a KL penalty.

    Attributes:
      kl_coef: initial weight of the KL penalty, beta.
      target_kl: beta is adapted so that the KL divergence of an update approaches this, in nats; None keeps beta fixed.
      penalty: kl is KL(pi_old || pi_theta), reverse_kl is KL(pi_theta || pi_old).
    """

    kl_coef: Positive = 1.0
    target_kl: Positive | None = 0.01
    penalty: Literal["kl", "reverse_kl"] = "kl"


def ppo_penalty(env: Env, network: Network, config: PPOPenaltyConfig) -> Algorithm:
    """PPO-Penalty on `env`. Raises UsageError as `checked` and `rollout_algorithm` do."""
    c = checked(env, network, config, "ppo_penalty")
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def loss(params, batch, kl_coef):
        obs, action, old_log_prob, old_policy, advantage, target = batch
        distribution, value = network.apply(params, obs)
        log_prob = distribution.log_prob(action)
        if c.normalize_advantage == "minibatch":
            advantage = standardise(advantage)
        kl = old_policy.kl(distribution) if c.penalty == "kl" else distribution.kl(old_policy)
        policy_loss = surrogate(log_prob, old_log_prob, advantage).mean() + kl_coef * kl.mean()
        value_loss = squared_error(value, target).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        return total, {"policy_loss": policy_loss, "value_loss": value_loss}

    def adapt(kl_coef, kl):
        if c.target_kl is None:
            return kl_coef
        factor = jnp.where(kl < c.target_kl / 1.5, 0.5, jnp.where(kl > 1.5 * c.target_kl, 2.0, 1.0))
        return jnp.clip(kl_coef * factor, 1e-6, 1e6)  # far beyond what a run that learns reaches

    def step(key, state, update):
        kl_coef = state.learner.own
        k_rollout, k_update = jax.random.split(key)
        data, after, info = collect(k_rollout, env, network, c, state)
        advantage, target = data.gae(c.gamma, c.gae_lambda)
        if c.normalize_advantage == "batch":
            advantage = standardise(advantage)

        learning_rate = annealed_learning_rate(c, update)
        batch = (data.obs, data.action, data.log_prob, data.policy, advantage, target)
        epochs = (c.num_epochs, c.num_minibatches, None, c.window)
        train_state, metrics = minibatch_epochs(
            k_update, partial(loss, kl_coef=kl_coef), tx, learning_rate, state.learner.train_state, batch, *epochs
        )
        metrics |= info | {"kl_coef": kl_coef}
        after, metrics = finish(network, state, after, train_state, data, target, metrics, every=1)
        learner = after.learner._replace(own=adapt(kl_coef, metrics[c.penalty]))
        return State(learner, after.world), metrics

    return rollout_algorithm(env, network, c, tx, step, lambda: jnp.asarray(c.kl_coef, jnp.float32))
