"""Policies' distributions over actions. Leading axes are batch axes; every method keeps them.

    sample(key) -> action      log_prob(action) -> [...]      entropy() -> [...]      mode() -> action
    kl(other) = KL(self || other) -> [...]

A sample is a fixed noise, transformed: sample(key) = transform(noise(key)). `noise` looks at shapes alone, so that a
rollout can draw all its random numbers in one batch before its loop begins. `scored(noise)` is (action, log_prob) of
that sample, differentiable where `transform` is. A Deterministic action has no density: it has sample, transform and
mode alone.
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import Action, Array, Key

Distribution = Any  # one of the kinds below; a KL is between two of one kind


class Categorical(NamedTuple):
    """pi(a) = softmax(logits)_a; `logits` is `[..., A]`, an action is an int32 of shape `[...]`."""

    logits: Array

    def sample(self, key: Key) -> Action:
        return self.transform(self.noise(key))

    def noise(self, key: Key) -> Array:
        return jax.random.uniform(key, self.logits.shape[:-1])

    def transform(self, noise: Array) -> Action:
        """Inverts the cumulative distribution: one uniform number for an action, where Gumbel's trick takes A."""
        probability = jax.nn.softmax(self.logits)
        # Rounding may leave the sum off 1, and unordered by a bit where A is large. So an action of probability 0 is
        # stepped over, and the threshold stays below the largest sum, which some other action has.
        cumulative = jnp.where(probability > 0, jnp.cumsum(probability, axis=-1), -1.0)
        threshold = noise * jnp.max(cumulative, axis=-1) * (1 - 2.0**-22)
        return jnp.argmax(cumulative > threshold[..., None], axis=-1).astype(jnp.int32)

    def scored(self, noise: Array) -> tuple[Action, Array]:
        action = self.transform(noise)
        return action, self.log_prob(action)

    def log_prob(self, action: Action) -> Array:
        chex.assert_shape(action, self.logits.shape[:-1])
        # A masked sum and not a gather: a gather's gradient is a scatter, which is slow where A is small.
        taken = action[..., None] == jnp.arange(self.logits.shape[-1])
        return jnp.sum(jax.nn.log_softmax(self.logits), axis=-1, where=taken)

    def entropy(self) -> Array:
        log_prob = jax.nn.log_softmax(self.logits)
        return -_expectation(log_prob, log_prob)

    def kl(self, other: "Categorical") -> Array:
        log_prob = jax.nn.log_softmax(self.logits)
        return _expectation(log_prob, log_prob - jax.nn.log_softmax(other.logits))

    def mode(self) -> Action:
        return jnp.argmax(self.logits, axis=-1).astype(jnp.int32)


def _expectation(log_prob: Array, x: Array) -> Array:
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
        return self.mean + jnp.exp(self.log_std) * noise

    def scored(self, noise: Array) -> tuple[Action, Array]:
        action = self.transform(noise)
        return action, self.log_prob(action)

    def log_prob(self, action: Action) -> Array:
        chex.assert_equal_shape([action, self.mean])
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * jnp.square(z) - self.log_std - 0.5 * math.log(2 * math.pi), axis=-1)

    def entropy(self) -> Array:
        return jnp.sum(self.log_std + 0.5 * math.log(2 * math.pi * math.e), axis=-1)

    def kl(self, other: "DiagGaussian") -> Array:
        variance_ratio = jnp.exp(2 * (self.log_std - other.log_std))
        z = (self.mean - other.mean) * jnp.exp(-other.log_std)
        return jnp.sum(0.5 * (variance_ratio + jnp.square(z) - 1) + other.log_std - self.log_std, axis=-1)

    def mode(self) -> Action:
        return self.mean


class TanhGaussian(NamedTuple):
    """tanh(u) of independent normals u: actions in (-1, 1); `mean` and `log_std`, those of u, are `[..., A]`."""

    mean: Array
    log_std: Array

    def sample(self, key: Key) -> Action:
        return self.transform(self.noise(key))

    def noise(self, key: Key) -> Array:
        return jax.random.normal(key, self.mean.shape)

    def transform(self, noise: Array) -> Action:
        return self.scored(noise)[0]

    def scored(self, noise: Array) -> tuple[Action, Array]:
        """From u itself: to take it back from its tanh loses all digits where tanh saturates."""
        u = self._gaussian.transform(noise)
        return jnp.tanh(u), self._log_prob_before_tanh(u)

    def log_prob(self, action: Action) -> Array:
        """For actions whose u was not kept; those nearer than 1e-6 to -1 or 1 are taken to be that near."""
        return self._log_prob_before_tanh(jnp.arctanh(jnp.clip(action, -1 + 1e-6, 1 - 1e-6)))

    def _log_prob_before_tanh(self, u: Array) -> Array:
        """log pi(tanh(u))."""
        return self._gaussian.log_prob(u) - jnp.sum(_log_tanh_slope(u), axis=-1)

    def entropy(self) -> Array:
        """The normals' entropy + E[log tanh'(u)], by Gauss-Hermite quadrature: to 1e-3 for deviations of u up to 2."""
        node, weight = np.polynomial.hermite_e.hermegauss(32)
        u = self.mean[..., None] + jnp.exp(self.log_std)[..., None] * jnp.asarray(node, self.mean.dtype)
        slope = jnp.sum(_log_tanh_slope(u) * jnp.asarray(weight / weight.sum(), self.mean.dtype), axis=-1)
        return self._gaussian.entropy() + jnp.sum(slope, axis=-1)

    def kl(self, other: "TanhGaussian") -> Array:
        """That of the normals, since tanh is one to one."""
        return self._gaussian.kl(other._gaussian)

    def mode(self) -> Action:
        """tanh of the normals' mode: the median, which every implementation acts by; the density's own mode may lie at
        the bounds."""
        return jnp.tanh(self.mean)

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
