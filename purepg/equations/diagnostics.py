"""Diagnostics of an update: how far it moved the policy, and how good the critic was."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from purepg.equations.distributions import Distribution, jointly
from purepg.equations.ratios import effective_sample_size
from purepg.types import Action, Array, Metrics, Window

SPARSE = 4  # algorithms that do not act on their diagnostics compute them at every fourth time step
CLIP_EPS = 0.2  # `clip_fraction` counts ratios further from 1 than this, whatever an algorithm clips at


def sparse(batch: Any, every: int) -> Any:
    """Some of a batch `[T, N, ...]`: every so many time steps; with memory, whose steps belong together, every so many
    environments."""
    windows = any(isinstance(x, Window) for x in jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, Window)))
    return jax.tree.map(lambda x: x[:, ::every] if windows else x[::every], batch)


def explained_variance(value: Array, target: Array, where: Array | None = None) -> Array:
    """1 - Var(target - V) / Var(target), a scalar: 1 is perfect, 0 no better than a constant; 0 for equal targets."""
    chex.assert_equal_shape([value, target])
    variance = jnp.var(target, where=where)
    left = jnp.var(target - value, where=where)
    return jnp.where(variance > 0, 1 - left / jnp.where(variance > 0, variance, 1), 0.0)


def policy_change(old: Distribution, new: Distribution, action: Action, where: Array | None = None) -> Metrics:
    """Measures how far an update moved the policy, on the states and actions that it learned from.

    Args:
      old, new: the policy before and after, at each state.
      where: which elements count; None: all.
    Returns:
      `kl` = KL(old || new) and `reverse_kl` = KL(new || old), exact at each state and averaged; `clip_fraction`, the
        share of ratios new / old that differ from 1 by more than 0.2; `max_ratio`; `effective_sample_size` of the old
        data under the new policy; `entropy` of the new policy.
    """

    def measured(old, new, action):
        return new.log_prob(action) - old.log_prob(action), old.kl(new), new.kl(old), new.entropy()

    log_ratio, kl, reverse_kl, entropy = jointly(measured, (old, new), action)
    ratio = jnp.exp(log_ratio)
    return {
        "kl": jnp.mean(kl, where=where),
        "reverse_kl": jnp.mean(reverse_kl, where=where),
        "clip_fraction": jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > CLIP_EPS, where=where),
        "max_ratio": jnp.max(ratio, where=where, initial=0.0),
        "effective_sample_size": effective_sample_size(ratio, where),
        "entropy": jnp.mean(entropy, where=where),
    }
