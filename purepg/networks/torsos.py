"""Torsos: networks from observations to features."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from purepg.config import check
from purepg.types import Action, Array, Box, Discrete, Env, Obs, ObservationSpace, Space, UsageError, space_leaves

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu}


def as_features(obs: Array, space: Space) -> Array:
    """Converts observations to float32: a Discrete one to one-hot, any other (bool, uint8, int) by value."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(obs, space.n, dtype=jnp.float32)
    return obs.astype(jnp.float32)


def flat_features(obs: Obs, space: ObservationSpace) -> Array:
    """Concatenates `as_features` of every leaf of an observation along one axis: `[..., n]`."""

    def flat(obs, space):
        x = as_features(obs, space)
        rank = len(space.shape) if isinstance(space, Box) else 1
        return x.reshape(*x.shape[: x.ndim - rank], -1)

    leaves = [flat(*pair) for pair in zip(jax.tree.leaves(obs), space_leaves(space), strict=True)]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=-1)


class Torso(nn.Module):
    """Features `[..., hidden[-1]]` of an observation, or of one and an action. Initialisation is orthogonal."""

    space: ObservationSpace
    config: Any  # a `NetworkConfig` or an `ActorQConfig`

    @nn.compact
    def __call__(self, obs: Obs, action: Action | None = None) -> Array:
        c = check(self.config)
        activation = ACTIVATIONS[c.activation]
        dense = nn.initializers.orthogonal(math.sqrt(2))
        if c.torso == "cnn":  # 16 filters of 3 x 3 (Young & Tian 2019)
            x = as_features(obs, self.space)
            x = activation(nn.Conv(16, (3, 3), padding="VALID", kernel_init=dense, name="conv")(x))
            x = x.reshape(*x.shape[:-3], -1)
        else:
            x = flat_features(obs, self.space)
        if action is not None:
            x = jnp.concatenate([x, action], axis=-1)
        for i, width in enumerate(c.hidden):
            x = activation(nn.Dense(width, kernel_init=dense, name=f"hidden_{i}")(x))
        return x


def check_torso(env: Env, config: Any) -> None:
    """Raises UsageError if the torso cannot read the environment's observations or actions."""
    obs_space, action_space = env.observation_space, env.action_space
    if not config.hidden:
        raise UsageError("hidden (none) must hold at least one width")
    if config.torso == "cnn" and not (isinstance(obs_space, Box) and len(obs_space.shape) == 3):
        raise UsageError(f"torso 'cnn' needs observations [height, width, channels], but {env.name} has {obs_space}")
    if isinstance(action_space, Box) and len(action_space.shape) != 1:
        raise UsageError(f"a Box action space must be one-dimensional, but {env.name}'s has shape {action_space.shape}")
