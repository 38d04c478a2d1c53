"""Torsos: networks from observations to features."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from purepg.config import check
from purepg.envs.contract import space_name
from purepg.networks.convolutions import CONVOLUTIONS
from purepg.networks.observations import as_features, flat, joined, readable, visible
from purepg.networks.residual import simba
from purepg.types import (
    Action,
    Array,
    Box,
    Env,
    LegalActions,
    Obs,
    ObservationSpace,
    UsageError,
    is_image,
    space_leaves,
)

ACTIVATIONS = {"tanh": nn.tanh, "relu": nn.relu, "silu": nn.silu}

TorsoKind = Literal["mlp", "cnn", "nature", "impala", "simba"]


class Torso(nn.Module):
    """Features `[..., hidden[-1]]` of an observation, or of one and an action. Initialisation is orthogonal.

    Masks of legal actions are not read. A convolutional torso gives every image layers of its own; their features and
    those of the other leaves, flat, are the input of the dense layers. Any other torso reads images flat.

    Attributes:
      space: the observation space; a dict observation may hold only some of its entries.
      config: a `NetworkConfig` or an `ActorQConfig`.
    """

    space: ObservationSpace
    config: Any

    @nn.compact
    def __call__(self, obs: Obs, action: Action | None = None) -> Array:
        c = check(self.config)
        activation = ACTIVATIONS[c.activation]
        leaves = [(as_features(x, space), space) for x, space in readable(obs, self.space)]
        images = [x for x, space in leaves if c.torso in CONVOLUTIONS and is_image(space)]
        features = []
        for i, image in enumerate(images):
            prefix = f"image_{i}_" if len(images) > 1 else ""
            x = CONVOLUTIONS[c.torso].layers(image, activation, prefix, c.layer_norm)
            features.append(x.reshape(*x.shape[:-3], -1))
        features += [flat(x, space) for x, space in leaves if not (images and is_image(space))]
        x = joined(features)
        if action is not None:
            x = jnp.concatenate([x, action], axis=-1)
        if c.torso == "simba":
            return simba(x, c.hidden, activation)
        for i, width in enumerate(c.hidden):
            x = nn.Dense(width, kernel_init=nn.initializers.orthogonal(math.sqrt(2)), name=f"hidden_{i}")(x)
            if c.layer_norm:
                x = nn.LayerNorm(name=f"norm_{i}")(x)
            x = activation(x)
        return x


def check_torso(env: Env, config: Any) -> None:
    """Raises UsageError if the torso cannot have the config's layers, or cannot read the environment's observations or
    actions."""
    torso, action_space = config.torso, env.action_space
    if not config.hidden:
        raise UsageError("hidden (none) must hold at least one width")
    if torso == "simba" and len(set(config.hidden)) > 1:
        raise UsageError(f"hidden ({config.hidden}) must hold equal widths for torso 'simba', one for each block")
    for name in ("layer_norm", "critic_layer_norm"):
        if torso == "simba" and getattr(config, name, False):
            raise UsageError(f"{name} (True) must be off with torso 'simba', which has layer norms of its own")
    spaces = space_leaves(env.observation_space)
    images = [space for space in spaces if is_image(space)]
    if torso in CONVOLUTIONS and not images:
        seen = ", ".join(map(space_name, spaces))
        raise UsageError(f"torso '{torso}' needs observations [height, width, channels], but {env.name} has {seen}")
    least = CONVOLUTIONS[torso].min_size if torso in CONVOLUTIONS else 0
    for height, width, _ in (space.shape for space in images):
        if min(height, width) < least:
            smaller = ", ".join(f"'{name}'" for name, other in CONVOLUTIONS.items() if other.min_size < least)
            raise UsageError(
                f"torso '{torso}' needs images of at least {least} x {least}, but {env.name} has one of {height} x "
                f"{width}: try {smaller}"
            )
    if all(isinstance(space, LegalActions) for space in space_leaves(visible(env.observation_space, env.privileged))):
        raise UsageError(f"{env.name} observes nothing that a policy could read but which actions are legal")
    if isinstance(action_space, Box) and len(action_space.shape) != 1:
        raise UsageError(f"a Box action space must be one-dimensional, but {env.name}'s has shape {action_space.shape}")
