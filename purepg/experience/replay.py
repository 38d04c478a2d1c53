"""A ring buffer of transitions as (init, add, sample): contiguous arrays, updated in place when they are donated.

    buffer = init(example, capacity)
    buffer = add(buffer, batch, index)                      for index = 0, 1, 2, ...
    batch  = sample(key, buffer, batch_size, num_filled(buffer, num_batches, n))

The caller tracks how many batches were written (`index`), from the number of its update, which is the same for a whole
population. A count inside the buffer would get a batch axis under vmap, which turns a slice update in place into a
scatter.

Do not pass the buffer through a select or a cond: both copy the whole buffer.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from purepg.types import Array, Key

Buffer = Any  # a pytree like the example, leaves [capacity, ...]


def init(example: Any, capacity: int) -> Buffer:
    """Returns an empty buffer.

    Args:
      example: one transition, or its shapes and dtypes (`jax.ShapeDtypeStruct`). The buffer keeps its dtypes.
      capacity: number of transitions; must be a multiple of the size of the batches that will be added.
    """
    return jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), x.dtype), example)


def add(buffer: Buffer, batch: Any, index: Array | int) -> Buffer:
    """Overwrites the oldest batch. Capacity is a multiple of the batch size, so this writes a single slice.

    Args:
      batch: transitions `[n, ...]` with the buffer's dtypes.
      index: number of batches of this size added before.
    Raises:
      AssertionError: the batch size does not divide the capacity, or a dtype differs.
    """
    capacity, n = _length(buffer), _length(batch)
    chex.assert_is_divisible(capacity, n)
    chex.assert_trees_all_equal_dtypes(buffer, batch)
    start = jnp.asarray(index, jnp.int32) % (capacity // n) * n
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0), buffer, batch)


def num_filled(buffer: Buffer, num_batches: Array | int, n: int) -> Array:
    """Number of filled slots after `num_batches` batches of n transitions, an int32 scalar."""
    return jnp.minimum(jnp.asarray(num_batches, jnp.int32), _length(buffer) // n) * n


def sample(key: Key, buffer: Buffer, batch_size: int, num_filled: Array | int) -> Any:
    """Draws `batch_size` transitions uniformly with replacement from the first `num_filled` slots, at least 1.

    The cost does not depend on the capacity. The relative error of a slot's probability is at most num_filled / 2^32.
    """
    bits = jax.random.bits(key, (batch_size,), jnp.uint32)
    return take(buffer, (bits % jnp.asarray(num_filled, jnp.uint32)).astype(jnp.int32))


def windows(key: Key, buffer: Buffer, n: int, length: int, num_windows: int, newest: Array, num_filled: Array) -> Array:
    """Draws windows of successive batches' i-th transitions uniformly with replacement, as slots `[L, W]` for `take`.
    None crosses from the newest batch to the oldest.

    Args:
      n: the size of a batch; transition i of the next one follows transition i of this.
      length: L. While the buffer holds fewer batches, windows have slots that are not filled.
      newest: the `index` of the last batch that was added.
      num_filled: as for `sample`.
    """
    ring, filled = _length(buffer) // n, num_filled // n
    oldest = newest % ring + ring + 1 - filled
    bits = jax.random.bits(key, (num_windows,), jnp.uint32)
    num_starts = jnp.maximum(filled - length + 1, 1) * n
    age, i = jnp.divmod((bits % num_starts.astype(jnp.uint32)).astype(jnp.int32), n)
    return (oldest + age + jnp.arange(length)[:, None]) % ring * n + i


def take(buffer: Buffer, slots: Array) -> Any:
    """The transitions in these slots; leaves `[*slots.shape, ...]`."""
    return jax.tree.map(lambda x: x.at[slots].get(mode="promise_in_bounds"), buffer)


def _length(tree: Any) -> int:
    return jax.tree.leaves(tree)[0].shape[0]
