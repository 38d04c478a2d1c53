"""Gymnasium's spaces as ours, and its observations and actions in our dtypes: 64 bits become 32, and categories that
start at another number than 0 start at 0."""

from collections.abc import Callable
from typing import Any

import numpy as np

from purepg.envs.contract import example
from purepg.types import Box, Discrete, MultiDiscrete, Obs, ObservationSpace, Space, UsageError

KINDS = "Box, Discrete and MultiDiscrete, and observations Dict and Tuple of them"


def as_observations(name: str, space: Any) -> tuple[ObservationSpace, Callable[..., Obs]]:
    """Our space, and `read(obs, batched=True)`, which copies observations into our dtypes.

    Raises:
      UsageError: a space of another kind.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        parts = {key: as_observations(name, part) for key, part in space.items()}

        def read_dict(obs, batched=True):
            return {key: read(obs[key], batched) for key, (_, read) in parts.items()}

        return {key: ours for key, (ours, _) in parts.items()}, read_dict
    if isinstance(space, spaces.Tuple):
        entries = [as_observations(name, part) for part in space.spaces]

        def read_tuple(obs, batched=True):
            return tuple(read(x, batched) for (_, read), x in zip(entries, obs, strict=True))

        return tuple(ours for ours, _ in entries), read_tuple
    ours = _leaf(name, "observations", space)
    shape, dtype = example(ours).shape, example(ours).dtype
    start = None if isinstance(ours, Box) else np.asarray(space.start)

    def read(obs, batched=True):
        x = np.asarray(obs)
        if x.shape != ((len(x), *shape) if batched else shape):
            found, where = x.shape[batched:], "" if isinstance(ours, Box) else " of categories"
            raise UsageError(f"{name}: it observes an array{where} of shape {found}, but its space says {shape}")
        return np.array(x if start is None else x - start, dtype)

    return ours, read


def as_actions(name: str, space: Any) -> tuple[Space, Callable[[np.ndarray], np.ndarray]]:
    """Our space, and the conversion of actions in its units to Gymnasium's dtype and numbers.

    Raises:
      UsageError: a space of another kind, or a Box of integers.
    """
    ours = _leaf(name, "actions", space)
    if not isinstance(ours, Box):
        start = np.asarray(space.start)
        return ours, lambda action: np.asarray(action).astype(space.dtype) + start.astype(space.dtype)
    if not np.issubdtype(space.dtype, np.floating):
        raise UsageError(f"{name}: its actions are a Box of {space.dtype}; it must be one of floats")

    def write(action):
        # Rounding to float32 and back may have left the bounds.
        return np.clip(np.asarray(action).astype(space.dtype), space.low, space.high)

    return ours, write


def take_row(final: Any, i: int) -> Any:
    """Row i of `info["final_obs"]`: Gymnasium gives an array of observations, other vector environments a batch."""
    if isinstance(final, dict):
        return {key: take_row(part, i) for key, part in final.items()}
    if isinstance(final, tuple):
        return tuple(take_row(part, i) for part in final)
    return final[i]


def _leaf(name: str, what: str, space: Any) -> Any:
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            return Discrete(int(space.n))
        case spaces.MultiDiscrete() if space.nvec.ndim == 1:
            return MultiDiscrete(tuple(map(int, space.nvec)))
        case spaces.Box():
            dtype = _our_dtype(space.dtype)
            return Box(_cast(space.low, dtype), _cast(space.high, dtype), dtype)
    raise UsageError(f"{name}: its {what} are {space}; the kinds known here are {KINDS}")


def _our_dtype(dtype: np.dtype) -> Any:
    if np.issubdtype(dtype, np.floating):
        return np.float32
    return np.int32 if np.issubdtype(dtype, np.integer) and (dtype.itemsize > 2) else dtype.type


def _cast(bound: np.ndarray, dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return np.clip(bound, limits.min, limits.max).astype(dtype)
    with np.errstate(over="ignore"):  # bounds beyond float32 are infinite
        return bound.astype(dtype)
