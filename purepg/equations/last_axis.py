"""Sums, maxima and softmax over the last axis, such as that of actions, by blocks of it.

An axis is one block. Only on a GPU, a short one is cut into blocks of one entry, so that a reduction over it is
arithmetic between arrays. XLA joins that with what comes before and after into one kernel, where the reduction of an
array would be a kernel of its own, and small networks are bound by the number of kernels.
"""

import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from purepg.runtime import compiles_for_gpu
from purepg.types import Array

LONGEST = 16  # axis that is cut

Blocks = Sequence[Array]  # [..., a] each; their a add up to the axis


def blocks(x: Array) -> Blocks:
    """The blocks of `[..., A]`."""
    return jnp.split(x, x.shape[-1], axis=-1) if compiles_for_gpu() and x.shape[-1] <= LONGEST else [x]


def whole(x: Blocks) -> Array:
    """`[..., A]` of its blocks."""
    return jnp.concatenate(x, axis=-1)


def total(x: Blocks) -> Array:
    """The sum, `[...]`."""
    return functools.reduce(operator.add, [jnp.sum(block, axis=-1, dtype=block.dtype) for block in x])


def largest(x: Blocks) -> Array:
    """The maximum, `[...]`."""
    return functools.reduce(jnp.maximum, [jnp.max(block, axis=-1) for block in x])


def cumulated(x: Blocks) -> Blocks:
    """At each entry the sum up to it."""
    return list(itertools.accumulate([jnp.cumsum(b, axis=-1) for b in x], lambda before, b: before[..., -1:] + b))


def softmax(logits: Blocks) -> Blocks:
    """exp(logits) / sum exp(logits)."""
    highest = jax.lax.stop_gradient(largest(logits))[..., None]
    weight = [jnp.exp(x - highest) for x in logits]
    sum_of_weights = total(weight)[..., None]
    return [x / sum_of_weights for x in weight]


def log_softmax(logits: Blocks) -> Blocks:
    """logits - log sum exp(logits)."""
    highest = jax.lax.stop_gradient(largest(logits))[..., None]
    shifted = [x - highest for x in logits]
    log_sum = jnp.log(total([jnp.exp(x) for x in shifted]))[..., None]
    return [x - log_sum for x in shifted]
