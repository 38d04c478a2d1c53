"""A ring buffer of transitions as (init, add, sample): contiguous arrays, written in place where they are donated.

    buffer = init(example, capacity)
    buffer = add(buffer, batch, index)                      for index = 0, 1, 2, ...
    batch  = sample(key, buffer, batch_size, num_filled(buffer, num_batches, n))

The buffer is the data alone. How much was written is the caller's to know (`index`, the number of batches before): a
count inside the buffer would get a batch axis under vmap, and every write would be a scatter, where one index for all
members is a slice written in place. An algorithm knows it from its update's number, which a population shares.

The buffer must never pass through a select or a cond: either copies it whole.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from purepg.types import Array, Key

Buffer = Any  # a pytree like the example, leaves [capacity, ...]


def init(example: Any, capacity: int) -> Buffer:
    """An empty buffer.

    Args:
      example: one transition, or shapes and dtypes of one (`jax.ShapeDtypeStruct`): every dtype stays as it is.
      capacity: transitions; a multiple of the batches that will be added.
    """
    return jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), x.dtype), example)


def add(buffer: Buffer, batch: Any, index: Array | int) -> Buffer:
    """Writes a batch over the oldest one: a single slice, since the capacity is a multiple of the batch.

    Args:
      batch: transitions `[n, ...]`, of the buffer's dtypes.
      index: how many batches of this size were added before.
    Raises:
      AssertionError: the batch does not divide the capacity, or a dtype differs.
    """
    capacity, n = _length(buffer), _length(batch)
    chex.assert_is_divisible(capacity, n)
    chex.assert_trees_all_equal_dtypes(buffer, batch)
    start = jnp.asarray(index, jnp.int32) % (capacity // n) * n
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), buffer, batch)


def num_filled(buffer: Buffer, num_batches: Array | int, n: int) -> Array:
    """How many slots hold a transition after `num_batches` batches of n: an int32 scalar."""
    return jnp.minimum(jnp.asarray(num_batches, jnp.int32), _length(buffer) // n) * n


def sample(key: Key, buffer: Buffer, batch_size: int, num_filled: Array | int) -> Any:
    """`batch_size` transitions, uniformly and with replacement from the first `num_filled` slots, in time that does not
    depend on the capacity. A slot's probability is off by at most num_filled / 2^32 of itself.

    Args:
      num_filled: at least 1.
    """
    bits = jax.random.bits(key, (batch_size,), jnp.uint32)
    index = (bits % jnp.asarray(num_filled, jnp.uint32)).astype(jnp.int32)
    return jax.tree.map(lambda x: x.at[index].get(mode="promise_in_bounds"), buffer)


def _length(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
