"""What networks read of observations: which leaves of a tree, and their conversion to float32 features."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.types import (
    Array,
    Box,
    Discrete,
    LegalActions,
    MultiDiscrete,
    Obs,
    ObservationSpace,
    Space,
    is_image,
    space_leaves,
)

MAX_PIXEL = 2**16 - 1  # of uint16


def as_features(obs: Array, space: Space) -> Array:
    """Converts observations to float32: a Discrete one to one-hot, a MultiDiscrete one to the one-hots of its entries,
    `[..., sum of sizes]`, an image as `image_features` does, any other (bool, uint8, int) by value."""
    if isinstance(space, Discrete):
        return jax.nn.one_hot(obs, space.n, dtype=jnp.float32)
    if isinstance(space, MultiDiscrete):
        entry = np.repeat(np.arange(len(space.sizes)), space.sizes)
        value = np.concatenate([np.arange(n) for n in space.sizes])
        return (obs[..., entry] == value).astype(jnp.float32)
    return image_features(obs, space) if is_image(space) else obs.astype(jnp.float32)


def image_features(obs: Array, space: Box) -> Array:
    """Converts images `[..., height, width, channels]` to float32. Integers are scaled to [0, 1] by the space's bounds,
    unless these are further apart than 16 bits, which no pixel's are. Bools and floats, such as normalised images, keep
    their values."""
    x = obs.astype(jnp.float32)
    if not jnp.issubdtype(obs.dtype, jnp.integer):
        return x
    low, high = np.asarray(space.low, np.float32), np.asarray(space.high, np.float32)
    width = np.where(high > low, high - low, np.float32(1))
    if width.max() > MAX_PIXEL:
        return x
    if (low == low.flat[0]).all() and (width == width.flat[0]).all():
        low, width = low.flat[0], width.flat[0]
    return (x - low) / width


def flat(x: Array, space: Space) -> Array:
    """Features of one leaf as vectors `[..., n]`."""
    rank = len(space.shape) if isinstance(space, Box) else 1
    return x.reshape(*x.shape[: x.ndim - rank], -1)


def readable(obs: Obs, space: ObservationSpace) -> list[tuple[Array, Space]]:
    """The leaves of an observation that are features, with their spaces, in JAX's order. These are all but masks of
    legal actions. A dict without some of the space's entries (`visible`) has only the leaves of the others."""
    if isinstance(obs, Mapping):
        space = {name: space[name] for name in obs}
    pairs = zip(jax.tree.leaves(obs), space_leaves(space), strict=True)
    return [(x, leaf) for x, leaf in pairs if not isinstance(leaf, LegalActions)]


def joined(features: Sequence[Array]) -> Array:
    """Concatenates vectors `[..., n]` along their last axis."""
    return features[0] if len(features) == 1 else jnp.concatenate(features, axis=-1)


def visible(obs: Any, privileged: Sequence[str]) -> Any:
    """A dict observation, or the space of one, without its privileged entries."""
    return {name: x for name, x in obs.items() if name not in privileged} if privileged else obs
