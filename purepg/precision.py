"""Narrow floats: parameters may be bfloat16 or float16; what is sampled, summed up or stepped is float32 at least."""

from typing import Any

import jax
import jax.numpy as jnp

from purepg.types import Array


def is_narrow(dtype: Any) -> bool:
    """Whether it is a float narrower than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def has_narrow(tree: Any) -> bool:
    """Whether any array of the tree is."""
    return any(is_narrow(x.dtype) for x in jax.tree.leaves(tree))


def at_least_float32(tree: Any) -> Any:
    """Floats narrower than float32 as float32; all other arrays as they are."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x.dtype) else x, tree)


def rounded(x: Array, dtype: Any = None) -> Array:
    """`x` in `dtype` (None: its own), rounded here, where that is narrow.

    A conversion alone does not see to it: XLA may leave a narrow float's rounding out where it computes in float32, and
    does in one program and not in another, so that a network's outputs would depend on what is compiled with it.
    """
    dtype = dtype or x.dtype
    if not is_narrow(dtype):
        return x.astype(dtype)
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(at_least_float32(x), kind.nexp, kind.nmant).astype(dtype)
