"""Running mean and variance as (init, update, apply). None means "not normalised"; every function passes it through.

The statistics at the start of an update are used throughout it: by the rollout, critics, losses and evaluation. The
update's raw data are merged at its end. Merging earlier would make the policy that scores the data differ from the one
that acted, so the first importance ratio would not be 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.loops import scan
from purepg.spread import within_device
from purepg.types import (
    Array,
    Box,
    Discrete,
    Env,
    Following,
    Moment,
    ObservationSpace,
    UsageError,
    Window,
    observed,
    space_leaves,
)


class Moments(NamedTuple):
    """Mean and (population) variance of `num_samples` observations; the trees have the structure of an observation.
    Leaves that are not normalised, which are categories and masks of legal actions, have moments of size 0.

    `rest` is the accumulated rounding error of the three (compensated summation). Without it, float32 statistics would
    stop moving, and the count stop growing, long before 1e9 steps.
    """

    mean: Any
    variance: Any
    num_samples: Array
    rest: tuple[Any, Any, Array]


def check_space(env: Env) -> None:
    """Raises UsageError if all observations are category indices, which have no meaningful mean."""
    spaces = space_leaves(env.observation_space)
    if not any(isinstance(space, Box) for space in spaces):
        one = isinstance(spaces[0], Discrete) and len(spaces) == 1
        seen = f"one of {spaces[0].n} categories" if one else "categories only"
        raise UsageError(f"normalize_obs (True) must be off: {env.name} observes {seen}")


def init(example: Any, space: ObservationSpace = None) -> Moments:
    """Returns mean 0, variance 1 and no samples, for observations shaped like `example` (an array or a tree). Of an
    observation `space`, only the leaves in a Box are normalised; without one, all leaves are."""
    leaves, structure = jax.tree.flatten(example)
    spaces = [None] * len(leaves) if space is None else space_leaves(space)

    def zeros(x, space):
        shape = jnp.shape(x) if space is None or isinstance(space, Box) else (0,)
        return jnp.zeros(shape, jnp.promote_types(jnp.result_type(x), jnp.float32))

    zero = structure.unflatten(map(zeros, leaves, spaces))
    none = jnp.zeros((), jnp.float32)
    return Moments(zero, jax.tree.map(jnp.ones_like, zero), none, (zero, zero, none))


def update(moments: Moments | None, batch: Any) -> Moments | None:
    """Merges a batch with leaves `[..., *shape]`; the result is the moments of all data at once (Chan et al. 1979).
    Of a `Window` or a `Moment`, the observations count."""
    if moments is None:
        return None
    batch = observed(batch)
    mean_rest, variance_rest, num_rest = moments.rest
    pairs = zip(jax.tree.leaves(batch), jax.tree.leaves(moments.mean), strict=True)
    n = next(x.size // mean.size for x, mean in pairs if mean.size)
    is_first = moments.num_samples == 0  # then the initial variance of 1 is ignored
    num_samples, num_rest = _add(moments.num_samples, num_rest, jnp.float32(n))
    fraction = n / num_samples

    def merge(mean, variance, mean_rest, variance_rest, batch):
        if not mean.size:
            return mean, mean_rest, variance, variance_rest
        batch = within_device(lambda x: x.reshape(-1, *mean.shape), (1,), 0)(batch.astype(mean.dtype))
        variance = jnp.where(is_first, 0.0, variance)
        delta = batch.mean(axis=0) - mean - mean_rest
        gain = batch.var(axis=0) - variance - variance_rest + (1 - fraction) * jnp.square(delta)
        return *_add(mean, mean_rest, fraction * delta), *_add(variance, variance_rest, fraction * gain)

    merged = jax.tree.map(merge, moments.mean, moments.variance, mean_rest, variance_rest, batch)
    outer, inner = jax.tree.structure(moments.mean), jax.tree.structure((0, 0, 0, 0))
    mean, mean_rest, variance, variance_rest = jax.tree.transpose(outer, inner, merged)
    return Moments(mean, variance, num_samples, (mean_rest, variance_rest, num_rest))


def _add(x: Array, rest: Array, more: Array) -> tuple[Array, Array]:
    """Returns x + rest + more, rounded, and the rounding error (Knuth's two-sum)."""
    more = rest + more
    total = x + more
    added = total - x
    return total, (x - (total - added)) + (more - added)


def apply(moments: Moments | None, x: Any, clip: float = 10.0, eps: float = 1e-8) -> Any:
    """Returns (x - mean) / sqrt(variance + eps), clipped to [-clip, clip]; the leaves of `x` are `[..., *shape]`. In a
    `Window`, a `Moment` or a `Following`, the observations are standardised."""
    if moments is None:
        return x

    def standardised(x, mean, variance):
        return jnp.clip((x - mean) * jax.lax.rsqrt(variance + eps), -clip, clip) if mean.size else x

    def each(obs):
        return jax.tree.map(standardised, obs, moments.mean, moments.variance)

    match x:
        case Following():
            return Following(apply(moments, x.window, clip, eps), each(x.obs))
        case Window():
            return x._replace(obs=each(x.obs), burn_in=x.burn_in and (each(x.burn_in[0]), x.burn_in[1]))
        case Moment():
            return x._replace(obs=each(x.obs))
    return each(x)


def scale(moments: Moments | None, reward: Array, clip: float = 10.0, eps: float = 1e-8) -> Array:
    """Divides the reward by the standard deviation of the running discounted return, and clips the result to [-clip,
    clip]. It is not centred, because shifting rewards changes the problem. Before any reward the deviation is 0."""
    if moments is None:
        return reward
    return jnp.clip(reward * jax.lax.rsqrt(moments.variance + eps), -clip, clip)


def times(factor: Array | float | None, reward: Array) -> Array:
    """The reward times a constant; None leaves it as it is, and compiles to nothing."""
    return reward if factor is None else factor * reward


def running_return(
    carry: Array | None, reward: Array, ended: Array, gamma: Array | float
) -> tuple[Array | None, Array]:
    """Discounted sum of an episode's rewards so far, R_t = gamma * R_{t-1} + r_t, reset after the episode ends.

    Args:
      carry: `[N]`, R at the step before this rollout, 0 where an episode begins. None: rewards are not scaled.
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

    return scan(forward, carry, (reward, ended), unroll=32)
