"""Weights of the policy gradient: the factors that multiply grad log pi(a_t | s_t).

For whole episodes with a `mask` of the steps taken (from `episodes`): returns, and baselines to subtract from them. For
fixed-length rollouts, in which an episode may end at any step and the next one begins (from `rollout`): TD errors,
n-step returns and GAE, which need a learned value.
"""

from typing import Literal

import chex
import jax.numpy as jnp

from purepg.config import Number, check_choice
from purepg.loops import scan
from purepg.types import Array

GroupBaseline = Literal["none", "batch_mean", "group_mean", "leave_one_out"]

# --- whole episodes: every array is [T, N], and steps outside `mask` are ignored ---


def discounted_return(reward: Array, mask: Array, gamma: Number, final_value: Number = 0.0) -> Array:
    """Return to go, G_t = r_t + gamma * G_{t+1}.

    Args:
      reward: `[T, N]` float, environment units.
      mask: `[T, N]` bool, true from an episode's first step to its last.
      gamma: discount per environment step, in [0, 1].
      final_value: `[N]` or scalar, the value of the state in which the episode was truncated; 0 where it terminated.
    Returns:
      `[T, N]`, zero outside the mask.
    Raises:
      AssertionError: the arrays' shapes differ.
    """
    chex.assert_rank([reward, mask], 2)
    chex.assert_equal_shape([reward, mask])
    final_value = jnp.broadcast_to(jnp.asarray(final_value, reward.dtype), reward.shape[1:])

    def backward(later, now):
        reward, mask = now
        # Going backwards, `later` stays at the final value until the episode's last step.
        later = jnp.where(mask, reward + gamma * later, later)
        return later, jnp.where(mask, later, 0.0)

    return scan(backward, final_value, (reward, mask), reverse=True, unroll=32)[1]


def total_return(reward: Array, mask: Array, gamma: Number, final_value: Number = 0.0) -> Array:
    """R(tau) = sum_t gamma^t r_t, the same weight for every step of the episode: `[T, N]`, zero outside the mask."""
    from_start = discounted_return(reward, mask, gamma, final_value)[0]
    return jnp.where(mask, from_start, 0.0)


def discount_power(mask: Array, gamma: Number) -> Array:
    """gamma^t, `[T, 1]`: a factor of the discounted gradient that most implementations omit (Nota & Thomas 2020)."""
    t = jnp.arange(mask.shape[0], dtype=float)[:, None]
    return jnp.power(jnp.asarray(gamma, float), t)


def batch_mean(weight: Array, mask: Array) -> Array:
    """The mean over all steps of all episodes, `[1, 1]`. It depends on the action, which adds a bias of O(1/N)."""
    return jnp.mean(weight, where=mask, keepdims=True)


def per_time_mean(weight: Array, mask: Array) -> Array:
    """The mean at step t over the episodes still running at t, `[T, 1]`; 0 where none is.

    Where all N are running, subtracting it gives exactly (1 - 1/N) times what subtracting `leave_one_out_mean` gives.
    """
    num_alive = jnp.sum(mask, axis=1, keepdims=True)
    return jnp.sum(weight, axis=1, where=mask, keepdims=True) / jnp.maximum(num_alive, 1)


def leave_one_out_mean(weight: Array, mask: Array) -> Array:
    """The mean at step t over the *other* episodes running at t, `[T, N]`; 0 where there is none.

    It does not depend on the episode it is subtracted from, so it adds no bias (Kool et al. 2019; RLOO).
    """
    weight = jnp.where(mask, weight, 0.0)
    others = jnp.sum(weight, axis=1, keepdims=True) - weight
    num_others = jnp.sum(mask, axis=1, keepdims=True) - mask
    return others / jnp.maximum(num_others, 1)


def standardise(weight: Array, mask: Array | None = None) -> Array:
    """(weight - mean) / standard deviation over the mask; 0 where all are equal. `weight` may have any shape.

    Standardising changes the gradient's length and, over few episodes, its direction.
    """
    mean = jnp.mean(weight, where=mask)
    centred = weight - mean
    std = jnp.sqrt(jnp.mean(jnp.square(centred), where=mask))
    # Equal weights, of 500 say, differ from their mean by rounding errors, which must not be scaled up to 1.
    return _over_std(centred, std, std <= 1e-5 * jnp.abs(mean))


def _over_std(centred: Array, std: Array, all_equal: Array) -> Array:
    """centred / std; 0 where all are equal, and NaN where a weight or its square is not finite, to show the failure."""
    std = jnp.where(jnp.isfinite(std), std, jnp.nan)
    return jnp.where(all_equal, 0.0, centred / jnp.where(all_equal, 1.0, std))


# --- groups: every array is [P, G], one number for each of G episodes from one initial state ---


def has_signal(reward: Array) -> Array:
    """Whether a group's episodes earned different rewards, `[P, 1]` bool; if not, subtracting a baseline leaves
    nothing. A reward that is not finite counts as a signal, so that it reaches the advantage and is noticed."""
    chex.assert_rank(reward, 2)
    spread = jnp.max(reward, axis=1, keepdims=True) - jnp.min(reward, axis=1, keepdims=True)
    largest = jnp.max(jnp.abs(reward), axis=1, keepdims=True)
    return (spread > 1e-5 * largest) | ~jnp.isfinite(largest)


def group_advantage(reward: Array, baseline: GroupBaseline, divide_by_std: bool = False) -> Array:
    """Reward minus a baseline, `[P, G]`, and the mean of the resulting gradient estimate:

        none            reward                                   the exact gradient
        batch_mean      minus the mean over all P * G            (1 - 1/(P G)) of it over one state's P * G episodes
        group_mean      minus the group's mean                   (1 - 1/G) of it (Shao et al. 2024)
        leave_one_out   minus the mean of the group's others     the exact gradient (RLOO: Kool et al. 2019)

    Args:
      divide_by_std: divide by the group's population standard deviation (GRPO, whose code uses the sample's:
        sqrt(G/(G-1)) of it). For binary rewards with success probability p, the mean gradient is then c_G(p) grad p,
        where sqrt(p (1-p)) c_G(p) -> 1 as G grows: it approaches grad 2 arcsin sqrt(p). A group without signal gets 0.
    Raises:
      UsageError: `baseline` is unknown.
    """
    check_choice("baseline", baseline, GroupBaseline)
    chex.assert_rank(reward, 2)
    everything = jnp.ones_like(reward, bool)
    match baseline:
        case "batch_mean":
            advantage = reward - batch_mean(reward, everything)
        case "group_mean":
            advantage = reward - per_time_mean(reward, everything)
        case "leave_one_out":
            advantage = reward - leave_one_out_mean(reward, everything)
        case _:
            advantage = reward
    if not divide_by_std:
        return advantage
    return _over_std(advantage, jnp.std(reward, axis=1, keepdims=True), ~has_signal(reward))


# --- rollouts: time first, any batch axes after it; an episode may end at any step ---


def td_error(reward: Array, value: Array, next_value: Array, terminated: Array, gamma: Number) -> Array:
    """delta_t = r_t + gamma * (1 - terminated_t) * V(s_{t+1}) - V(s_t).

    `next_value` is V of the observation before any reset. Only termination zeroes it; truncation does not.
    """
    chex.assert_equal_shape([reward, value])
    return td_target(reward, next_value, terminated, gamma) - value


def td_target(reward: Array, next_value: Array, terminated: Array, gamma: Number) -> Array:
    """r_t + gamma * (1 - terminated_t) * V(s_{t+1}), with `next_value` as in `td_error`; all `[...]`."""
    chex.assert_equal_shape([reward, next_value, terminated])
    chex.assert_type(terminated, bool)
    return reward + gamma * jnp.where(terminated, 0.0, next_value)


def gae(
    reward: Array, value: Array, next_value: Array, terminated: Array, truncated: Array, gamma: Number, lam: Number
) -> tuple[Array, Array]:
    """Generalised advantage estimate (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma * (1 - terminated_t) * V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma * lam * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}

    Args:
      reward: `[T, ...]` float, environment units.
      value: `[T, ...]` V(s_t).
      next_value: `[T, ...]` V of the observation before any reset.
      terminated, truncated: `[T, ...]` bool.
      gamma: discount per environment step, in [0, 1].
      lam: lambda in [0, 1]: 0 gives the TD error, 1 the discounted return minus V.
    Returns:
      (advantage, target), each `[T, ...]`; target = advantage + value, the lambda-return.
    Raises:
      AssertionError: the arrays' shapes differ, or a flag is not bool.
    """
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    chex.assert_type([terminated, truncated], bool)
    delta = td_error(reward, value, next_value, terminated, gamma)
    trace = gamma * lam * (1.0 - (terminated | truncated))

    def backward(later, now):
        delta, trace = now
        advantage = delta + trace * later
        return advantage, advantage

    _, advantage = scan(backward, jnp.zeros_like(delta[0]), (delta, trace), reverse=True, unroll=32)
    return advantage, advantage + value


def n_step(
    reward: Array, value: Array, next_value: Array, terminated: Array, truncated: Array, gamma: Number, n: int
) -> tuple[Array, Array]:
    """n-step advantage (Mnih et al. 2016), shortened where an episode or the rollout ends.

        G_t^(1) = r_t + gamma * (1 - terminated_t) * V(s_{t+1})
        G_t^(k) = r_t + gamma * (1 - terminated_t) * (V(s_{t+1}) if cut at t else G_{t+1}^(k-1))
        A_t     = G_t^(n) - V(s_t)

    Arguments, shapes and errors are those of `gae`; `n >= 1` is static. With `n >= T` it equals GAE with lambda = 1.
    Returns (advantage, target) with target = G^(n).
    """
    chex.assert_equal_shape([reward, value, next_value, terminated, truncated])
    chex.assert_type([terminated, truncated], bool)
    cut = jnp.asarray(truncated).at[-1].set(True)
    target = td_target(reward, next_value, terminated, gamma)
    for _ in range(min(n, reward.shape[0]) - 1):
        later = jnp.where(cut, next_value, jnp.roll(target, -1, axis=0))
        target = td_target(reward, later, terminated, gamma)
    return target - value, target
