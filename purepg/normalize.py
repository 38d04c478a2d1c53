"""Running mean and variance as (init, update, apply). None stands for "not normalised" and is passed through.

The statistics at an update's start serve that whole update: rollout, critics, losses and evaluation. The update's raw
data are merged at its end. Otherwise the policy that scores the data is not the policy that acted: the first
importance ratio would not be 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from purepg.types import Array, Discrete, Env, UsageError


class Moments(NamedTuple):
    """Mean and (population) variance of `num_samples` observations."""

    mean: Array
    variance: Array
    num_samples: Array


def check_space(env: Env) -> None:
    """Raises UsageError where observations are the numbers of categories, whose mean says nothing."""
    if isinstance(env.observation_space, Discrete):
        n = env.observation_space.n
        raise UsageError(f"normalize_obs (True) must be off: {env.name} observes one of {n} categories")


def init(example: Array | float) -> Moments:
    """Mean 0, variance 1, no samples, for observations shaped like `example`."""
    shape = jnp.shape(example)
    return Moments(jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32), jnp.zeros((), jnp.float32))


def update(moments: Moments | None, batch: Array) -> Moments | None:
    """Merges a batch exactly (Chan et al. 1979): the result is that of all data at once. `batch` is `[..., *shape]`."""
    if moments is None:
        return None
    batch = batch.astype(jnp.float32).reshape(-1, *moments.mean.shape)
    n = batch.shape[0]
    mean, variance = batch.mean(axis=0), batch.var(axis=0)
    num_samples = moments.num_samples + n
    fraction = n / num_samples
    delta = mean - moments.mean
    merged = (1 - fraction) * moments.variance + fraction * variance + fraction * (1 - fraction) * jnp.square(delta)
    return Moments(moments.mean + fraction * delta, merged, num_samples)


def apply(moments: Moments | None, x: Array, clip: float = 10.0, eps: float = 1e-8) -> Array:
    """(x - mean) / sqrt(variance + eps), clipped to [-clip, clip]; `x` is `[..., *shape]`."""
    if moments is None:
        return x
    return jnp.clip((x - moments.mean) * jax.lax.rsqrt(moments.variance + eps), -clip, clip)


def scale(moments: Moments | None, reward: Array, clip: float = 10.0, eps: float = 1e-8) -> Array:
    """Reward over the standard deviation of the running discounted return: scaled, not centred, since a shift of the
    reward would change the problem. Clipped to [-clip, clip]: before the first reward was seen, the deviation is 0."""
    if moments is None:
        return reward
    return jnp.clip(reward * jax.lax.rsqrt(moments.variance + eps), -clip, clip)


def running_return(
    carry: Array | None, reward: Array, ended: Array, gamma: Array | float
) -> tuple[Array | None, Array]:
    """The discounted sum of an episode's rewards so far, R_t = gamma * R_{t-1} + r_t, reset after an episode's end.

    Args:
      carry: `[N]` R of the step before this rollout, 0 where an episode begins. None: rewards are not scaled, and
        nothing is computed.
      reward, ended: `[T, N]`.
    Returns:
      (carry `[N]` for the next rollout, R `[T, N]`).
    """
    if carry is None:
        return None, reward

    def forward(before, now):
        reward, ended = now
        total = gamma * before + reward
        return jnp.where(ended, 0.0, total), total

    return jax.lax.scan(forward, carry, (reward, ended))
