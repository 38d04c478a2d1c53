"""Policies' distributions over actions. All leading axes are batch axes.

    sample(key) -> action      log_prob(action) -> [...]      entropy() -> [...]      mode() -> action
    kl(other) = KL(self || other) -> [...]

sample(key) = transform(noise(key)). `noise` reads only shapes, so a rollout can draw all its random numbers in one
batch before its loop. `scored(noise)` returns (action, log_prob) of that sample, and is differentiable where
`transform` is. Deterministic has no density, so it has only sample, noise, transform and mode.

A TanhGaussian's action is `Squashed`, which keeps the value before the tanh so that its density is exact.
`executed(action)` converts any action to what an environment, a critic or a replay buffer receives. Parameters narrower
than float32 are converted to float32, so probabilities are at least float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from purepg.equations.last_axis import Blocks, blocks, cumulated, log_softmax, softmax, total, whole
from purepg.precision import at_least_float32
from purepg.types import Action, Array, Key

NODE = np.linspace(-5, 5, 64)  # in standard deviations from the mean: the nodes of `TanhGaussian.entropy`

Distribution = Any  # one of the classes below; a KL needs two of the same class


def _sample(self: Any, key: Key) -> Any:
    return self.transform(self.noise(key))


def _scored(self: Any, noise: Array) -> tuple[Any, Array]:
    action = self.transform(noise)
    return action, self.log_prob(action)


class Categorical(NamedTuple):
    """pi(a) = softmax(logits)_a; `logits` is `[..., A]`, an action is an int32 of shape `[...]`."""

    logits: Array

    sample, scored = _sample, _scored

    def noise(self, key: Key) -> Array:
        return jax.random.bits(key, self.logits.shape[:-1], jnp.uint32)

    def transform(self, noise: Array) -> Action:
        """Inverts the cumulative distribution, which takes one random number per action; the Gumbel trick takes A.

        The sums are of integers and therefore exact: an action's probability is off by about 2^-31 for any A, and an
        action with a smaller probability, such as a masked one, is never sampled.
        """
        probability = softmax(blocks(at_least_float32(self.logits)))
        cumulative = cumulated([jnp.round(2.0**30 * p).astype(jnp.int32) for p in probability])
        last = cumulative[-1][..., -1].astype(jnp.uint32)
        threshold = _scaled(noise, last).astype(jnp.int32)[..., None]  # uniform over 0, ..., last - 1
        num_passed = total([(c <= threshold).astype(jnp.int32) for c in cumulative])
        return jnp.minimum(num_passed, self.logits.shape[-1] - 1)  # a valid action even for NaN logits

    def log_prob(self, action: Action) -> Array:
        chex.assert_shape(action, self.logits.shape[:-1])
        # A masked sum instead of a gather, whose gradient is a scatter and slow for small A.
        entries = zip(self._log_probs(), blocks(jnp.arange(self.logits.shape[-1])), strict=True)
        return total([jnp.where(action[..., None] == a, log_prob, 0.0) for log_prob, a in entries])

    def log_prob_of_all(self) -> Array:
        """Log-probabilities of all actions, `[..., A]`."""
        return whole(self._log_probs())

    def _log_probs(self) -> Blocks:
        return log_softmax(blocks(at_least_float32(self.logits)))

    def entropy(self) -> Array:
        log_prob = self.log_prob_of_all()
        return -expectation(log_prob, log_prob)

    def kl(self, other: "Categorical") -> Array:
        log_prob = self.log_prob_of_all()
        return expectation(log_prob, log_prob - other.log_prob_of_all())

    def mode(self) -> Action:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)

    def masked(self, legal: Array) -> "Categorical":
        """The policy given that its action is legal, with `legal` bool `[..., A]`: the others have logits of -inf."""
        chex.assert_equal_shape([legal, self.logits])
        return Categorical(jnp.where(legal, self.logits, -jnp.inf))


class MultiCategorical(NamedTuple):
    """D independent choices; an action is int32 `[..., D]`. `logits` is `[..., D, A]` with A the largest number of
    options; those that an entry does not have are -inf."""

    logits: Array

    sample, scored = _sample, _scored

    def noise(self, key: Key) -> Array:
        return self._each.noise(key)

    def transform(self, noise: Array) -> Action:
        return self._each.transform(noise)

    def log_prob(self, action: Action) -> Array:
        return jnp.sum(self._each.log_prob(action), axis=-1)

    def entropy(self) -> Array:
        return jnp.sum(self._each.entropy(), axis=-1)

    def kl(self, other: "MultiCategorical") -> Array:
        return jnp.sum(self._each.kl(other._each), axis=-1)

    def mode(self) -> Action:
        return self._each.mode()

    @property
    def _each(self) -> Categorical:
        return Categorical(self.logits)


def _scaled(bits: Array, n: Array) -> Array:
    """floor(bits * n / 2^32) of uint32 in 16-bit halves; jax 0.10.2 cannot compile `lax.mulhi` for several devices."""
    upper, lower = bits >> 16, bits & 0xFFFF
    n_upper, n_lower = n >> 16, n & 0xFFFF
    middle = upper * n_lower + ((lower * n_lower) >> 16)
    other = lower * n_upper + (middle & 0xFFFF)
    return upper * n_upper + (middle >> 16) + (other >> 16)


def jointly(f: Callable[..., Any], policies: Sequence[Distribution], *arrays: Any) -> Any:
    """f(*policies, *arrays), where a policy over a large vocabulary computes its logits only once for all of `f`.

    Args:
      f: returns arrays `[...]`, computed for each of the policies' batch elements by itself.
      arrays: trees of arrays `[..., ...]`.
    """
    divided = getattr(policies[0], "jointly", None)
    return f(*policies, *arrays) if divided is None else divided(f, policies, *arrays)


def expectation(log_prob: Array, x: Array) -> Array:
    """sum_a p(a) x(a), with 0 * (-inf) = 0: an action masked by a logit of -inf adds nothing."""
    entries = zip(blocks(log_prob), blocks(x), strict=True)
    return total([jnp.exp(log_p) * jnp.where(jnp.isfinite(log_p), x, 0.0) for log_p, x in entries])


class DiagGaussian(NamedTuple):
    """Independent normals; `mean`, `log_std` and actions are `[..., A]`. Only the environment clips an action."""

    mean: Array
    log_std: Array

    sample, scored = _sample, _scored

    def noise(self, key: Key) -> Array:
        return jax.random.normal(key, self.mean.shape)

    def transform(self, noise: Array) -> Action:
        mean, log_std = at_least_float32(self)
        return mean + jnp.exp(log_std) * noise

    def log_prob(self, action: Action) -> Array:
        chex.assert_equal_shape([action, self.mean])
        mean, log_std = at_least_float32(self)
        z = (action - mean) * jnp.exp(-log_std)
        return jnp.sum(-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self) -> Array:
        return jnp.sum(at_least_float32(self.log_std) + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other: "DiagGaussian") -> Array:
        (mean, log_std), (other_mean, other_log_std) = at_least_float32(self), at_least_float32(other)
        variance_ratio = jnp.exp(2 * (log_std - other_log_std))
        z = (mean - other_mean) * jnp.exp(-other_log_std)
        return jnp.sum(0.5 * (variance_ratio + jnp.square(z) - 1) + other_log_std - log_std, axis=-1)

    def mode(self) -> Action:
        return self.mean


class Squashed(NamedTuple):
    """An action tanh(u) of a TanhGaussian, stored as u. Where tanh saturates, u cannot be recovered from the action,
    and a score computed from it would not have mean 0."""

    sample: Array  # u, [..., A]


def executed(action: Action | Squashed) -> Action:
    """The action for environments, critics and replay: tanh(u) of a `Squashed` one, others unchanged."""
    return jnp.tanh(action.sample) if isinstance(action, Squashed) else action


class TanhGaussian(NamedTuple):
    """tanh(u) of independent normals u, in (-1, 1); `mean` and `log_std` of u are `[..., A]`."""

    mean: Array
    log_std: Array

    sample, scored = _sample, _scored
    noise = DiagGaussian.noise

    def transform(self, noise: Array) -> Squashed:
        return Squashed(self._gaussian.transform(noise))

    def log_prob(self, action: Squashed | Action) -> Array:
        """log pi(tanh(u)).

        Args:
          action: `Squashed`, for which the result is exact; or an executed action from elsewhere, clipped to 1e-6 from
            the bounds (|u| = 7.3), for which the score's mean is 0 only well inside the bounds.
        """
        if not isinstance(action, Squashed):
            action = Squashed(jnp.arctanh(jnp.clip(at_least_float32(action), -1 + 1e-6, 1 - 1e-6)))
        return self._gaussian.log_prob(action.sample) - jnp.sum(_log_tanh_slope(action.sample), axis=-1)

    def entropy(self) -> Array:
        """The normals' entropy + E[log tanh'(u)], as a sum over NODE, to 1e-4 for any mean and deviations up to 7.4.

        The nodes are equally spaced: for a wide u, Gauss-Hermite's are too sparse near u = 0, where log tanh' bends.
        """
        mean, log_std = at_least_float32(self)
        node, weight = (jnp.asarray(x, mean.dtype) for x in (NODE, np.exp(-0.5 * NODE**2)))
        u = mean[..., None] + jnp.exp(log_std)[..., None] * node
        slope = jnp.sum(_log_tanh_slope(u) * (weight / weight.sum()), axis=-1)
        return self._gaussian.entropy() + jnp.sum(slope, axis=-1)

    def kl(self, other: "TanhGaussian") -> Array:
        """The KL of the normals, since tanh is one to one."""
        return self._gaussian.kl(other._gaussian)

    def mode(self) -> Squashed:
        """tanh of the normals' mean, the median, as is usual; the density's own mode may lie at the bounds."""
        return Squashed(self.mean)

    @property
    def _gaussian(self) -> DiagGaussian:
        return DiagGaussian(self.mean, self.log_std)


def _log_tanh_slope(u: Array) -> Array:
    """log(1 - tanh(u)^2) for any u. The plain form of Haarnoja et al. (2018) underflows from |u| = 9 on."""
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))


class Deterministic(NamedTuple):
    """One action, `[..., A]`."""

    action: Action

    sample = _sample

    def noise(self, _: Key) -> tuple[()]:
        return ()

    def transform(self, _: tuple[()]) -> Action:
        return self.action

    def mode(self) -> Action:
        return self.action
