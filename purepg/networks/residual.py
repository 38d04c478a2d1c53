"""Residual dense layers."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn

from purepg.types import Array

EXPANSION = 4  # of a block's inner layer


def simba(x: Array, hidden: Sequence[int], activation: Callable[[Array], Array]) -> Array:
    """SimBa's layers (Lee et al. 2024): a linear embedding, one residual block for each entry of `hidden`, all of one
    width, and a final layer norm. Normalising the observations, which SimBa also does, is the algorithms' part.

    The layers belong to the flax module that calls this. Initialisation is orthogonal, with gain sqrt(2) before the
    activation and 1 elsewhere; the paper's blocks have He's normal initialisation.
    """
    width = hidden[0]
    linear, before = nn.initializers.orthogonal(1.0), nn.initializers.orthogonal(math.sqrt(2))
    x = nn.Dense(width, kernel_init=linear, name="embedding")(x)
    for i in range(len(hidden)):
        branch = nn.LayerNorm(name=f"block_{i}_norm")(x)
        branch = activation(nn.Dense(EXPANSION * width, kernel_init=before, name=f"block_{i}_in")(branch))
        x = x + nn.Dense(width, kernel_init=linear, name=f"block_{i}_out")(branch)
    return nn.LayerNorm(name="norm")(x)
