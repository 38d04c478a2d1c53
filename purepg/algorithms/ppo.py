"""Proximal policy optimisation with the clipped surrogate (Schulman et al. 2017). Per update, A from GAE:

    ratio  = pi_theta(a|s) / pi_old(a|s)
    theta <- theta + lr * E[ grad min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) + entropy_coef * grad H(pi(.|s)) ]
    phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]

over several epochs of shuffled minibatches of the same data.
"""

from dataclasses import dataclass
from functools import partial

import jax

from purepg.algorithms.configs import ProximalConfig
from purepg.algorithms.on_policy import checked, collect, finish, rollout_algorithm
from purepg.config import Positive
from purepg.equations.advantages import standardise
from purepg.equations.losses import clipped_squared_error, clipped_surrogate, squared_error
from purepg.equations.ratios import kl_k3
from purepg.optimize import anneal, annealed_learning_rate, minibatch_epochs, step_direction
from purepg.types import Algorithm, Env, Network


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ProximalConfig):
    """Hyperparameters of PPO.

    Attributes:
      clip_eps: the ratio is clipped to [1 - clip_eps, 1 + clip_eps].
      anneal_clip_eps: decrease `clip_eps` linearly to 0 over `anneal_updates` updates.
      clip_value_eps: clip the change of the value to this, in units of the return; None disables value clipping.
      target_kl: stop the update before the first minibatch whose estimated KL(pi_old || pi) exceeds 1.5 times this;
        None never stops early.
    """

    clip_eps: Positive = 0.2
    anneal_clip_eps: bool = False
    clip_value_eps: Positive | None = None
    target_kl: Positive | None = None


def ppo(env: Env, network: Network, config: PPOConfig) -> Algorithm:
    """PPO-Clip on `env`. Raises UsageError as `checked` and `rollout_algorithm` do."""
    c = checked(env, network, config, "ppo")
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def loss(params, batch, clip_eps):
        obs, action, old_log_prob, old_value, advantage, target = batch
        distribution, value = network.apply(params, obs)
        log_prob = distribution.log_prob(action)
        if c.normalize_advantage == "minibatch":
            advantage = standardise(advantage)
        policy_loss = clipped_surrogate(log_prob, old_log_prob, advantage, clip_eps).mean()
        value_loss = squared_error(value, target).mean()
        if c.clip_value_eps is not None:
            value_loss = clipped_squared_error(value, old_value, target, c.clip_value_eps).mean()
        entropy = distribution.entropy().mean()
        total = policy_loss + c.value_coef * value_loss - c.entropy_coef * entropy
        approx_kl = kl_k3(log_prob - old_log_prob).mean()
        return total, {"policy_loss": policy_loss, "value_loss": value_loss, "approx_kl": approx_kl}

    def step(key, state, update):
        k_rollout, k_update = jax.random.split(key)
        data, after, info = collect(k_rollout, env, network, c, state)
        advantage, target = data.gae(c.gamma, c.gae_lambda)
        if c.normalize_advantage == "batch":
            advantage = standardise(advantage)

        learning_rate = annealed_learning_rate(c, update)
        clip_eps = anneal(c.clip_eps, update, c.anneal_updates if c.anneal_clip_eps else None)
        batch = (data.obs, data.action, data.log_prob, data.value, advantage, target)
        epochs = (c.num_epochs, c.num_minibatches, c.target_kl, c.window)
        train_state, metrics = minibatch_epochs(
            k_update, partial(loss, clip_eps=clip_eps), tx, learning_rate, state.learner.train_state, batch, *epochs
        )
        return finish(network, state, after, train_state, data, target, info | metrics)

    return rollout_algorithm(env, network, c, tx, step)
