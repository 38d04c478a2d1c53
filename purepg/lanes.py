"""Control flow that stays cheap under vmap.

A loop or branch with a batched predicate copies whole buffers through `select`. `any_lane` reduces the predicate over
all lanes of all enclosing vmaps, so it stays unbatched: a loop runs until no lane needs it, and each lane masks its own
result.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from purepg.types import Array, Metrics


@jax.custom_batching.custom_vmap
def any_lane(predicate: Array) -> Array:
    """Whether `predicate` (bool, any shape) is true anywhere, in any lane of the population."""
    return jnp.any(predicate)


@any_lane.def_vmap
def _any_lane_over_lanes(axis_size, in_batched, predicate):
    del axis_size, in_batched
    return any_lane(predicate), False


def select(where: Array, new: Any, old: Any) -> Any:
    """Returns `new` where `where` (`[N]`), else `old`; leaves are `[N, ...]`."""

    def choose(new, old):
        return jnp.where(where.reshape(where.shape + (1,) * (old.ndim - where.ndim)), new, old)

    return jax.tree.map(choose, new, old)


def step_if(
    predicate: Array, step: Callable[..., tuple[Any, Metrics]], carry: Any, *inputs: Any
) -> tuple[Any, Metrics]:
    """`step(carry, *inputs) -> (carry, metrics)` where an unbatched predicate holds; elsewhere the carry as it is, and
    zeros for the metrics."""

    def skip(carry, *inputs):
        shapes = jax.eval_shape(step, carry, *inputs)[1]
        return carry, jax.tree.map(jnp.zeros_like, shapes)

    return jax.lax.cond(predicate, step, skip, carry, *inputs)


def step_where(
    predicate: Array, step: Callable[..., tuple[Any, Metrics]], carry: Any, *inputs: Any
) -> tuple[Any, Metrics]:
    """`step_if` by selection, which computes the step in any case. A GPU copies what a branch takes and returns, so
    this is faster there where a step is rarely skipped."""
    new, metrics = step(carry, *inputs)
    old = carry, jax.tree.map(jnp.zeros_like, metrics)
    return jax.tree.map(lambda new, old: jnp.where(predicate, new, old), (new, metrics), old)
