"""Importance ratios between two policies, for a step, an episode or a response, and KL estimates from them."""

from typing import Literal

import chex
import jax.numpy as jnp

from purepg.config import check_choice
from purepg.loops import scan
from purepg.types import Array


def trajectory_ratio(log_prob: Array, old_log_prob: Array, mask: Array) -> Array:
    """prod_t pi(a_t|s_t) / pi_old(a_t|s_t) over the episode, `[T, N]`, the same at each step; 1 outside the mask.

    It makes estimates for pi from episodes of pi_old unbiased, at a variance exponential in the episode's length.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, mask])
    log_ratio = jnp.sum(log_prob - old_log_prob, axis=0, where=mask)
    return jnp.where(mask, jnp.exp(log_ratio), 1.0)


def per_decision_ratio(log_prob: Array, old_log_prob: Array, mask: Array) -> Array:
    """The product of ratios up to and including step t, `[T, N]` (Precup et al. 2000), which is enough to correct the
    distribution of (s_t, a_t); 1 outside the mask."""
    chex.assert_equal_shape([log_prob, old_log_prob, mask])
    log_ratio = jnp.cumsum(jnp.where(mask, log_prob - old_log_prob, 0.0), axis=0)
    return jnp.where(mask, jnp.exp(log_ratio), 1.0)


def segment_ratio(log_prob: Array, old_log_prob: Array, ended: Array) -> Array:
    """prod_t pi(a_t|s_t) / pi_old(a_t|s_t) over those steps of a rollout that belong to one episode, the same at each.
    All arrays are `[T, ...]`; `ended` is a bool, true at an episode's last step."""
    chex.assert_equal_shape([log_prob, old_log_prob, ended])

    def running(log_ratio, starts, reverse):
        def step(before, now):
            log_ratio, starts = now
            before = jnp.where(starts, 0.0, before)
            return before + log_ratio, before

        return scan(step, jnp.zeros_like(log_ratio[0]), (log_ratio, starts), reverse=reverse, unroll=32)[1]

    log_ratio = log_prob - old_log_prob
    starts = jnp.roll(ended, 1, axis=0).at[0].set(True)
    return jnp.exp(running(log_ratio, starts, False) + log_ratio + running(log_ratio, ended, True))


def effective_sample_size(ratio: Array, where: Array | None = None) -> Array:
    """(sum ratio)^2 / (n sum ratio^2), a scalar in (0, 1]: the share of the samples that importance weights leave."""
    floats = jnp.finfo(ratio.dtype)
    ratio = jnp.minimum(ratio, 1 / floats.tiny)  # an overflowing ratio counts as the largest
    ratio = ratio / jnp.max(ratio, where=where, initial=floats.tiny)  # otherwise the squares overflow
    return jnp.square(jnp.mean(ratio, where=where)) / jnp.mean(jnp.square(ratio), where=where)


def sequence_log_ratio(log_ratio: Array, mask: Array) -> Array:
    """GSPO's length-normalised log-ratio of whole responses (Zheng et al. 2025, eq. 7), log s = mean_t log ratio_t,
    repeated for every token of its response: `[..., R]`; 0 outside the mask. Its gradient reaches every token."""
    chex.assert_equal_shape([log_ratio, mask])
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    total = jnp.sum(log_ratio, axis=-1, keepdims=True, where=mask)
    return jnp.where(mask, total / length, 0.0)


def kl_k1(log_ratio: Array) -> Array:
    """-log r, an unbiased estimate of KL(q || p), with r = p(a) / q(a) and a sampled from q (Schulman 2020,
    "Approximating KL divergence"). As a loss with fixed samples, its gradient has mean 0 if q is trained."""
    return -log_ratio


def kl_k2(log_ratio: Array) -> Array:
    """(log r)^2 / 2, r as in `kl_k1`; biased by a third-order term. As a loss, its mean gradient is grad KL(q || p)."""
    return 0.5 * jnp.square(log_ratio)


def kl_k3(log_ratio: Array) -> Array:
    """r - 1 - log r, r as in `kl_k1`; unbiased and never negative. As a loss, its mean gradient is grad KL(p || q).

    With r = pi(a|s) / pi_old(a|s) and a sampled from pi_old, it estimates KL(pi_old || pi), a useful diagnostic.
    """
    return jnp.expm1(log_ratio) - log_ratio


Estimator = Literal["k1", "k2", "k3"]
Level = Literal["token", "sequence"]
KL = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def kl_penalty(log_prob: Array, reference_log_prob: Array, mask: Array, estimator: Estimator, level: Level) -> Array:
    """An estimate of KL(pi || pi_ref) per token, `[..., T]`; the sum over a response estimates the response's KL.

    Args:
      log_prob: `[..., T]` under the policy, which sampled the tokens and is differentiated.
      level: token: each token's own estimate; sequence: the estimate from the whole response's log-ratio, in equal
        parts. Token-level k2 and k3 as losses take the prefixes as fixed, so their gradient is not the KL's.
    Raises:
      UsageError: the estimator or the level is unknown.
    """
    check_choice("estimator", estimator, Estimator)
    check_choice("level", level, Level)
    log_ratio = jnp.where(mask, reference_log_prob - log_prob, 0.0)
    if level == "token":
        return KL[estimator](log_ratio)
    length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return jnp.where(mask, KL[estimator](jnp.sum(log_ratio, axis=-1, keepdims=True)) / length, 0.0)
