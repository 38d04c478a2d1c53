"""Policies' distributions over actions. Leading axes are batch axes; every method keeps them.

    sample(key) -> action      log_prob(action) -> [...]      entropy() -> [...]      mode() -> action
    kl(other) = KL(self || other) -> [...]

A sample is a fixed noise, transformed: sample(key) = transform(noise(key)). `noise` looks at shapes alone, so that a
rollout can draw all its random numbers in one batch before its loop begins. `scored(noise)` is (action, log_prob) of
that sample, differentiable where `transform` is. A Deterministic action has no density: it has sample, transform and
mode alone.

A TanhGaussian's action is `Squashed`, which keeps what its density is exact in; `executed(action)` is what an
environment, a critic or a replay buffer gets, of this kind and of every other. Parameters narrower than float32 are
read as float32: probabilities are float32 at least.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from purepg.precision import at_least_float32
from purepg.types import Action, Array, Key

NODE = np.linspace(-5, 5, 64)  # deviations from the mean, at which `TanhGaussian.entropy` looks

Distribution = Any  # one of the kinds below; a KL is between two of one kind


class Categorical(NamedTuple):
    """pi(a) = softmax(logits)_a; `logits` is `[..., A]`, an action is an int32 of shape `[...]`."""

    logits: Array

    def sample(self, key: Key) -> Action:
        return self.transform(self.noise(key))

    def noise(self, key: Key) -> Array:
        return jax.random.bits(key, self.logits.shape[:-1], jnp.uint32)

    def transform(self, noise: Array) -> Action:
        """Inverts the cumulative distribution: one random number for an action, where Gumbel's trick takes A.

        In whole numbers, whose sums are exact: an action's probability is off by about 2^-31 however many there are,
        and one below that, such as a masked action's 0, is never taken.
        """
        probability = jax.nn.softmax(at_least_float32(self.logits))
        cumulative = jnp.cumsum(jnp.round(2.0**30 * probability).astype(jnp.int32), axis=-1)
        total = cumulative[..., -1].astype(jnp.uint32)
        threshold = _scaled(noise, total).astype(jnp.int32)  # uniform over 0, ..., total - 1
        num_passed = jnp.sum(cumulative <= threshold[..., None], axis=-1, dtype=jnp.int32)
        return jnp.minimum(num_passed, self.logits.shape[-1] - 1)  # of logits that are NaN, an action still

    def scored(self, noise: Array) -> tuple[Action, Array]:
        action = self.transform(noise)
        return action, self.log_prob(action)

    def log_prob(self, action: Action) -> Array:
        chex.assert_shape(action, self.logits.shape[:-1])
        # A masked sum and not a gather: a gather's gradient is a scatter, which is slow where A is small.
        taken = action[..., None] == jnp.arange(self.logits.shape[-1])
        return jnp.sum(self.log_prob_of_all(), axis=-1, where=taken)

    def log_prob_of_all(self) -> Array:
        """Of every action, `[..., A]`."""
        return jax.nn.log_softmax(at_least_float32(self.logits))

    def entropy(self) -> Array:
        log_prob = self.log_prob_of_all()
        return -expectation(log_prob, log_prob)

    def kl(self, other: "Categorical") -> Array:
        log_prob = self.log_prob_of_all()
        return expectation(log_prob, log_prob - other.log_prob_of_all())

    def mode(self) -> Action:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)


def _scaled(bits: Array, n: Array) -> Array:
    """floor(bits * n / 2^32) of uint32, by halves of 16 bits: jax 0.10.2 cannot compile `lax.mulhi` for several
    devices."""
    upper, lower = bits >> 16, bits & 0xFFFF
    n_upper, n_lower = n >> 16, n & 0xFFFF
    middle = upper * n_lower + ((lower * n_lower) >> 16)
    other = lower * n_upper + (middle & 0xFFFF)
    return upper * n_upper + (middle >> 16) + (other >> 16)


def expectation(log_prob: Array, x: Array) -> Array:
    """sum_a p(a) x(a), with 0 * (-inf) = 0: an action masked out by a logit of -inf adds nothing."""
    possible = jnp.isfinite(log_prob)
    return jnp.sum(jnp.exp(log_prob) * jnp.where(possible, x, 0.0), axis=-1)


class DiagGaussian(NamedTuple):
    """Independent normals; `mean` and `log_std` are `[..., A]`, as is an action, which only the environment clips."""

    mean: Array
    log_std: Array

    def sample(self, key: Key) -> Action:
        return self.transform(self.noise(key))

    def noise(self, key: Key) -> Array:
        return jax.random.normal(key, self.mean.shape)

    def transform(self, noise: Array) -> Action:
        mean, log_std = at_least_float32(self)
        return mean + jnp.exp(log_std) * noise

    def scored(self, noise: Array) -> tuple[Action, Array]:
        action = self.transform(noise)
        return action, self.log_prob(action)

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
    """An action tanh(u) of a TanhGaussian, as its u: where tanh saturates, the action itself has lost u's digits, and a
    score computed from it no longer has the mean 0."""

    sample: Array  # u, [..., A]


def executed(action: Action | Squashed) -> Action:
    """The action that an environment, a critic or a replay buffer gets: tanh(u) of a `Squashed`, and any other itself.
    Differentiable."""
    return jnp.tanh(action.sample) if isinstance(action, Squashed) else action


class TanhGaussian(NamedTuple):
    """tanh(u) of independent normals u: actions in (-1, 1); `mean` and `log_std`, those of u, are `[..., A]`."""

    mean: Array
    log_std: Array

    def sample(self, key: Key) -> Squashed:
        return self.transform(self.noise(key))

    def noise(self, key: Key) -> Array:
        return jax.random.normal(key, self.mean.shape)

    def transform(self, noise: Array) -> Squashed:
        return Squashed(self._gaussian.transform(noise))

    def scored(self, noise: Array) -> tuple[Squashed, Array]:
        action = self.transform(noise)
        return action, self.log_prob(action)

    def log_prob(self, action: Squashed | Action) -> Array:
        """log pi(tanh(u)).

        Args:
          action: `Squashed`, exactly; or an executed action of somebody else, whose u was not kept: one nearer than
            1e-6 to -1 or 1 is taken to be that near, u = 7.3, so that the score's mean is 0 only well inside.
        """
        if not isinstance(action, Squashed):
            action = Squashed(jnp.arctanh(jnp.clip(at_least_float32(action), -1 + 1e-6, 1 - 1e-6)))
        return self._gaussian.log_prob(action.sample) - jnp.sum(_log_tanh_slope(action.sample), axis=-1)

    def entropy(self) -> Array:
        """The normals' entropy + E[log tanh'(u)], a sum over NODE: to 1e-4 for any mean, and deviations of u up to 7.4.

        Equal steps, where the nodes of Gauss and Hermite would be too far apart for a wide u: log tanh' bends within
        about 1 of u = 0."""
        mean, log_std = at_least_float32(self)
        node, weight = (jnp.asarray(x, mean.dtype) for x in (NODE, np.exp(-0.5 * NODE**2)))
        u = mean[..., None] + jnp.exp(log_std)[..., None] * node
        slope = jnp.sum(_log_tanh_slope(u) * (weight / weight.sum()), axis=-1)
        return self._gaussian.entropy() + jnp.sum(slope, axis=-1)

    def kl(self, other: "TanhGaussian") -> Array:
        """That of the normals, since tanh is one to one."""
        return self._gaussian.kl(other._gaussian)

    def mode(self) -> Squashed:
        """tanh of the normals' mode: the median, which every implementation acts by; the density's own mode may lie at
        the bounds."""
        return Squashed(self.mean)

    @property
    def _gaussian(self) -> DiagGaussian:
        return DiagGaussian(self.mean, self.log_std)


def _log_tanh_slope(u: Array) -> Array:
    """log(1 - tanh(u)^2), for any u (Haarnoja et al. 2018 give the plain form, which underflows from |u| = 9 on)."""
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))


class Deterministic(NamedTuple):
    """One action, `[..., A]`."""

    action: Action

    def sample(self, key: Key) -> Action:
        del key
        return self.action

    def noise(self, key: Key) -> tuple[()]:
        del key
        return ()

    def transform(self, noise: tuple[()]) -> Action:
        del noise
        return self.action

    def mode(self) -> Action:
        return self.action
