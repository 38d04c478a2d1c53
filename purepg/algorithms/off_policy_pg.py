"""Off-policy policy gradient: several gradient steps on the data of one rollout. After the first step the data come
from an older policy, which an importance ratio corrects for. Per step, with A and its target from V:

    ratio  = pi_theta(a|s) / pi_old(a|s)
    theta <- theta + lr * E[ ratio * A(s, a) * grad log pi(a|s) + entropy_coef * grad H(pi(.|s)) ]
    phi   <- phi   - lr * value_coef * E[ grad (V(s) - target)^2 / 2 ]

The ratio of a single step does not correct the distribution of states, which stays that of the older policy (Degris et
al. 2012). The product of ratios over the trajectory does, but its variance grows exponentially with the length.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from purepg.algorithms.configs import ActorCriticConfig
from purepg.algorithms.on_policy import checked, collect, finish, rollout_algorithm
from purepg.config import Count, Positive
from purepg.equations.advantages import standardise
from purepg.equations.losses import policy_gradient, squared_error
from purepg.equations.ratios import effective_sample_size, segment_ratio
from purepg.optimize import annealed_learning_rate, gradient_steps, step_direction
from purepg.types import Algorithm, Env, Network


@dataclass(frozen=True, kw_only=True)
class OffPolicyPGConfig(ActorCriticConfig):
    """Hyperparameters of the off-policy policy gradient.

    Attributes:
      num_epochs: gradient steps on the N * T steps.
      ratio: the importance ratio of the step alone, or of the trajectory: the product over those steps of the rollout
        that belong to the same episode.
      max_ratio: larger ratios are truncated to this value; None disables truncation.
      normalize_advantage: standardise the advantages over the batch.
    """

    num_epochs: Count = 4
    ratio: Literal["step", "trajectory"] = "step"
    max_ratio: Positive | None = None
    normalize_advantage: bool = False


def off_policy_pg(env: Env, network: Network, config: OffPolicyPGConfig) -> Algorithm:
    """Off-policy policy gradient on `env`. Raises UsageError as `checked` and `rollout_algorithm` do."""
    c = checked(env, network, config, "off_policy_pg")
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
        advantage, target = data.gae(c.gamma, c.gae_lambda)
        if c.normalize_advantage:
            advantage = standardise(advantage)

        learning_rate = annealed_learning_rate(c, update)
        ended = data.terminated | data.truncated
        batch = (data.obs, data.action, data.log_prob, ended, advantage, target)
        train_state, metrics = gradient_steps(loss, tx, learning_rate, state.learner.train_state, batch, c.num_epochs)
        return finish(network, state, after, train_state, data, target, info | metrics)

    return rollout_algorithm(env, network, c, tx, step)
