"""Group-relative policy optimisation (Shao et al. 2024). Per update, over P starts and G episodes of each:

    A_i    = R_i - mean(R_1..G)                              perhaps divided by their standard deviation
    ratio  = pi_theta(y_it | x, y_i,<t) / pi_old(...)        of the token, or of the whole response
    theta <- theta + lr * E[ grad min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) - kl_coef * grad KL(pi || pi_ref) ]

over epochs of shuffled minibatches of the same data; pi_ref is the initial policy. Episodes start from a prompt where
the network is a language model, and from an initial state of the environment otherwise. `algorithms.family` has the
methods that differ from GRPO only by choices in `GRPOConfig`.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import AnnealConfig, GroupConfig, HeldOutConfig, LearningRateConfig, LossConfig
from purepg.algorithms.groups import (
    GroupedEpisodes,
    GroupLearner,
    Source,
    advantages,
    check_groups,
    group_algorithm,
    mean_return,
    score_all,
    source,
    watch,
)
from purepg.algorithms.refill import info, sample_for_update
from purepg.config import Count, CountOrZero, Positive, check, check_schedules
from purepg.equations.distributions import jointly
from purepg.equations.losses import aggregate, importance_weighted, squared_error, two_sided_surrogate
from purepg.equations.ratios import kl_k3, kl_penalty, sequence_log_ratio
from purepg.lanes import any_lane
from purepg.language.model import LanguageModel
from purepg.optimize import annealed_learning_rate, minibatch_epochs, step_direction
from purepg.types import Algorithm, Array, Env, Metrics, Network, Params, State


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(HeldOutConfig, LossConfig, AnnealConfig, LearningRateConfig, GroupConfig):
    """Hyperparameters of GRPO.

    Attributes:
      max_steps: truncates an environment's episode that still runs then; None uses the environment's time limit.
      num_epochs: passes over the P * G episodes.
      ratio: the importance ratio of each token, or of the whole response, normalised by its length (GSPO).
      surrogate: clipped; or weighted, where the clipped ratio is a constant weight (CISPO).
      clip_eps: the ratio is clipped below at 1 - clip_eps, and above at 1 + clip_eps.
      clip_eps_high: clip above at 1 + clip_eps_high instead (DAPO's clip-higher); None uses clip_eps.
      max_ratio: upper bound on the ratio where the advantage is negative (dual clip); None disables it.
      aggregation: how the tokens' losses become one loss (`losses.aggregate`).
      kl_estimator: estimator of KL(pi || pi_ref), `kl_k1` to `kl_k3` of `losses`.
      kl_level: estimate the KL of each token and aggregate it as the loss does, or estimate that of whole responses. In
        the loss, only the latter has the gradient of the KL.
      kl_in: subtract the KL in the loss, or in the reward.
    """

    max_grad_norm: Positive | None = 1.0
    num_held_out: CountOrZero = 32
    max_steps: Count | None = None
    num_epochs: Count = 1
    ratio: Literal["token", "sequence"] = "token"
    surrogate: Literal["clipped", "weighted"] = "clipped"
    clip_eps: Positive = 0.2
    clip_eps_high: Positive | None = None
    max_ratio: Positive | None = None
    aggregation: Literal["sequence_mean", "token_mean", "constant_length", "sequence_sum"] = "sequence_mean"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_level: Literal["token", "sequence"] = "token"
    kl_in: Literal["loss", "reward"] = "loss"


def grpo(env: Env, network: Network | LanguageModel, config: GRPOConfig) -> Algorithm:
    """GRPO on `env`. Raises UsageError as `check`, `check_groups` and `source` do."""
    c = check(config)
    check_schedules(c)
    check_groups(env, network, c)
    groups = source(env, network, c.max_steps)
    judged = env.task is not None and env.task.judge is not None  # then held-out prompts are answered between updates
    held_out = source(env.held_out, network) if env.held_out and c.num_held_out and not judged else None
    tx = step_direction(c.optimizer, c.max_grad_norm, c.adam_eps)

    def step(key, state, update):
        learning_rate = annealed_learning_rate(c, update)
        k_sample, k_update, k_held_out = jax.random.split(key, 3)
        (train_state, reference, kl_coef), params = state.learner, state.learner.params
        data, signal, sampled = sample_for_update(k_sample, groups, params, c, state.world)
        reference_log_prob = _reference_log_prob(groups, reference, data, kl_coef)
        reward = data.reward
        if c.kl_in == "reward":
            reward -= kl_coef * kl_penalty(data.log_prob, reference_log_prob, data.mask, c.kl_estimator, c.kl_level)
        value = score_all(groups, params, data)[1] if c.baseline == "value" else jnp.zeros_like(reward)
        advantage, target = advantages(data, reward, value, c)
        mask = data.mask & signal[:, None, None] if c.skip_groups_without_signal else data.mask

        loss = partial(_loss, groups, c, kl_coef)
        batch = (data.obs, data.action, mask, data.log_prob, reference_log_prob, advantage, target)
        epochs = (c.num_epochs, c.num_minibatches, None, None, 0)
        train_state, metrics = minibatch_epochs(k_update, loss, tx, learning_rate, train_state, batch, *epochs)
        metrics |= watch(groups, data, params, train_state.params, reference)
        if c.kl_target is not None:
            factor = 1 + 0.1 * jnp.clip(metrics["kl_reference"] / c.kl_target - 1, -0.2, 0.2)
            kl_coef = (factor * kl_coef).astype(kl_coef.dtype)
        metrics |= {"kl_coef": kl_coef}
        if held_out:
            metrics["held_out_return"] = mean_return(k_held_out, held_out, train_state.params, c.num_held_out)
        return State(GroupLearner(train_state, reference, kl_coef), state.world), info(data, sampled) | metrics

    return group_algorithm(groups, network, c, tx, step)


def _reference_log_prob(groups: Source, reference: Params, data: GroupedEpisodes, kl_coef: Array) -> Array:
    """log pi_ref of all episodes, `[P, G, T]`; where no agent's penalty weighs anything, anything will do."""
    return jax.lax.cond(any_lane(kl_coef != 0), lambda: score_all(groups, reference, data)[0], lambda: data.log_prob)


def _loss(groups: Source, c: GRPOConfig, kl_coef: Array, params: Params, batch: Any) -> tuple[Array, Metrics]:
    """The loss of a minibatch of episodes, whose leaves are `[B, T, ...]`."""
    obs, action, mask, old_log_prob, reference_log_prob, advantage, target = batch
    distribution, value = groups.score(params, obs)
    log_prob, entropy = jointly(
        lambda policy, action: (policy.log_prob(action), policy.entropy()), (distribution,), action
    )
    log_prob = jnp.where(mask, log_prob, 0.0)
    log_ratio = log_prob - jnp.where(mask, old_log_prob, 0.0)
    approx_kl = aggregate(kl_k3(log_ratio), mask, "token_mean")
    if c.ratio == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, mask)
    clip_high = c.clip_eps if c.clip_eps_high is None else c.clip_eps_high
    if c.surrogate == "weighted":
        policy_losses = importance_weighted(log_prob, log_ratio, advantage, c.clip_eps, clip_high)
    else:
        policy_losses = two_sided_surrogate(log_ratio, advantage, c.clip_eps, clip_high, c.max_ratio)
    policy_loss = aggregate(policy_losses, mask, c.aggregation)
    metrics = {"policy_loss": policy_loss, "approx_kl": approx_kl}
    total = policy_loss - c.entropy_coef * aggregate(entropy, mask, c.aggregation)
    if c.kl_in == "loss":
        penalty = kl_penalty(log_prob, reference_log_prob, mask, c.kl_estimator, c.kl_level)
        total += kl_coef * aggregate(penalty, mask, c.aggregation)
    if c.baseline == "value":
        metrics["value_loss"] = aggregate(squared_error(value, target), mask, "token_mean")
        total += c.value_coef * metrics["value_loss"]
    return total, metrics
