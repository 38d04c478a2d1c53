"""Narrow floats: parameters may be bfloat16 or float16, but samples, sums and optimiser steps are at least float32."""

from typing import Any

import jax
import jax.numpy as jnp

from purepg.types import Array


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype is a float narrower than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def has_narrow(tree: Any) -> bool:
    """Whether any array of the tree has a narrow dtype."""
    return any(is_narrow(x.dtype) for x in jax.tree.leaves(tree))


def at_least_float32(tree: Any) -> Any:
    """Converts floats narrower than float32 to float32; other arrays stay unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_narrow(x.dtype) else x, tree)


def in_bfloat16(tree: Any) -> Any:
    """Converts wider floats to bfloat16; other arrays stay unchanged."""

    def converted(x):
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) and not is_narrow(x.dtype) else x

    return jax.tree.map(converted, tree)


def rounded(x: Array, dtype: Any = None) -> Array:
    """Converts `x` to `dtype` (None: its own) and, if that is narrow, forces the rounding to happen here.

    A conversion alone is not enough: where XLA computes in float32 it may skip the rounding, in one program and not in
    another, so a network's outputs would depend on what they are compiled with.
    """
    dtype = dtype or x.dtype
    if not is_narrow(dtype):
        return x.astype(dtype)
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(at_least_float32(x), kind.nexp, kind.nmant).astype(dtype)
