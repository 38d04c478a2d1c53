"""Convolutional layers that make features of an image `[..., height, width, channels]`.

Each function makes its layers in the flax module that calls it; `prefix` comes before their names, so that several
images can have layers of their own. Initialisation is orthogonal with gain sqrt(2). With `layer_norm`, what each
convolution computes is normalised over its channels, pixel by pixel (Ba et al. 2016).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from purepg.types import Array

Activation = Callable[[Array], Array]


def minatar(x: Array, activation: Activation, prefix: str, layer_norm: bool = False) -> Array:
    """16 filters of 3 x 3 (Young & Tian 2019)."""
    return activation(_conv(x, 16, 3, 1, "VALID", f"{prefix}conv", layer_norm))


def nature(x: Array, activation: Activation, prefix: str, layer_norm: bool = False) -> Array:
    """32 filters of 8 x 8 with stride 4, 64 of 4 x 4 with stride 2, and 64 of 3 x 3 (Mnih et al. 2015)."""
    for i, (filters, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1))):
        x = activation(_conv(x, filters, size, stride, "VALID", f"{prefix}conv_{i}", layer_norm))
    return x


def impala(x: Array, activation: Activation, prefix: str, layer_norm: bool = False) -> Array:
    """Three sections with 16, 32 and 32 filters: a convolution, max pooling with stride 2, and two residual blocks of
    two convolutions, all 3 x 3 (Espeholt et al. 2018, figure 3, the large network, without its LSTM)."""
    for i, filters in enumerate((16, 32, 32)):
        x = _conv(x, filters, 3, 1, "SAME", f"{prefix}section_{i}_conv", layer_norm)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for j in range(2):
            branch = x
            for k in range(2):
                name = f"{prefix}section_{i}_block_{j}_conv_{k}"
                branch = _conv(activation(branch), filters, 3, 1, "SAME", name, layer_norm)
            x = x + branch
    return activation(x)


class Convolutions(NamedTuple):
    """Layers for images, and the least height and width of an image that they can read."""

    layers: Callable[[Array, Activation, str, bool], Array]
    min_size: int


CONVOLUTIONS = {"cnn": Convolutions(minatar, 3), "nature": Convolutions(nature, 36), "impala": Convolutions(impala, 1)}


def _conv(x: Array, filters: int, size: int, stride: int, padding: str, name: str, layer_norm: bool) -> Array:
    x = nn.Conv(
        filters,
        (size, size),
        strides=(stride, stride),
        padding=padding,
        kernel_init=nn.initializers.orthogonal(math.sqrt(2)),
        conv_general_dilated=convolve,
        name=name,
    )(x)
    return nn.LayerNorm(name=f"{name}_norm")(x) if layer_norm else x


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: Any, **others: Any) -> Array:
    """`lax.conv_general_dilated` of images `[N, height, width, channels]` and a kernel `[h, w, channels, filters]`.

    On a CPU it is a product of matrices, which was 7 to 60 times faster there: XLA's convolutions are slow inside
    loops, and slower still where every agent of a population has its own kernel.
    """

    def library(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **others)

    def product(x, kernel):
        (h, w, _, filters), (down, right) = kernel.shape, strides
        pads = lax.padtype_to_pads(x.shape[1:3], (h, w), strides, padding) if isinstance(padding, str) else padding
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        height, width = (x.shape[1] - h) // down + 1, (x.shape[2] - w) // right + 1
        shifted = [
            x[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
            for i in range(h)
            for j in range(w)
        ]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, filters)

    return lax.platform_dependent(x, kernel, cpu=product, default=library)
