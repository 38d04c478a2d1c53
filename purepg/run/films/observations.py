"""Observations of any kind as coloured cells, for environments that nothing else draws.

A cell is light where its number is 0, the bluer the larger a positive number, and the redder the smaller a negative
one. A category is a row of cells, of which its own is blue; several categories are one cell each. Numbers between
bounds are divided by the largest possible magnitude, and others are shown as x / (1 + |x|). An image's channels lie
side by side, and a tree's entries below each other, in frames of different colours.
"""

import math
from typing import Any

import jax
import numpy as np

from purepg.run.films.grids import cell
from purepg.run.films.scene import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, Line, Scene, rectangle
from purepg.types import Box, Discrete, MultiDiscrete, ObservationSpace, is_space

COLUMNS = 32  # of a vector's cells, until it has as many rows
LEAST = 8  # cells that a scene has room for in a row
FRAMES = (ORANGE, GREEN, PINK, INK, SKY)
GAP = 1  # cells between entries
UNBOUNDED = 1e6  # a bound of this magnitude is none


def observation_scene(space: ObservationSpace, obs: Any) -> Scene:
    """The cells of an observation in numpy."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(space, is_leaf=is_space)
    entries = [cells(leaf, np.asarray(x)) for (_, leaf), x in zip(leaves, jax.tree.leaves(obs), strict=True)]
    num_rows = sum(len(entry) for entry in entries) + GAP * (len(entries) - 1)
    num_columns = max(LEAST, *(entry.shape[1] for entry in entries))
    shapes, key, first = [], [(BLUE, "above 0"), (RED, "below 0")], 0
    for i, ((path, _), entry) in enumerate(zip(leaves, entries, strict=True)):
        shapes += [
            cell(num_rows, first + row, column, colour_of(entry[row, column]))
            for row, column in np.argwhere(np.isfinite(entry)).tolist()
        ]
        if len(entries) > 1:
            top, bottom = num_rows - first, num_rows - first - len(entry)
            corners = rectangle(0, bottom, entry.shape[1], top)
            shapes.append(Line([*corners, corners[0]], FRAMES[i % len(FRAMES)], 2))
            key.append((FRAMES[i % len(FRAMES)], jax.tree_util.keystr(path, simple=True, separator=".")))
        first += len(entry) + GAP
    return Scene((0, 0), (num_columns, num_rows), shapes, key)


def cells(space: Any, x: np.ndarray) -> np.ndarray:
    """The numbers in [-1, 1] of a leaf's cells, `[rows, columns]`; NaN where there is none."""
    if isinstance(space, Discrete):
        return wrapped(np.arange(space.n) == x)
    if isinstance(space, MultiDiscrete):
        return wrapped(x / np.maximum(np.array(space.sizes) - 1, 1))
    x = np.asarray(x, float)
    if isinstance(space, Box):
        largest = np.maximum(*(np.abs(np.asarray(bound, float)) for bound in (space.low, space.high)))
        x = x / np.where(largest < UNBOUNDED, np.maximum(largest, np.finfo(float).tiny), 1 + np.abs(x))
    if x.ndim == 3:
        apart = np.pad(np.moveaxis(x, 2, 1), [(0, 0), (0, 0), (0, 1)], constant_values=np.nan)
        return apart.reshape(len(x), -1)[:, :-1]
    return x if x.ndim == 2 else wrapped(x.ravel())


def wrapped(x: np.ndarray) -> np.ndarray:
    """A vector in rows of one length, the last of which ends in NaN."""
    columns = min(x.size, max(COLUMNS, math.isqrt(x.size - 1) + 1))
    rows = np.full((-(-x.size // columns), columns), np.nan)
    rows.flat[: x.size] = x
    return rows


def colour_of(x: float) -> str:
    """Light at 0, blue at 1 and red at -1."""
    full = BLUE if x > 0 else RED
    parts = (round(0xF0 + min(abs(x), 1) * (int(full[i : i + 2], 16) - 0xF0)) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02X}" for part in parts)
