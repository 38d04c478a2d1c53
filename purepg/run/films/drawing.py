"""Which environments can be drawn, and how."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from purepg.run.films.classic_control import CLASSIC_CONTROL
from purepg.run.films.grids import CLIFF_SHAPE, GRIDS, cliff
from purepg.run.films.minatar import MINATAR, PALETTE, channels_scene
from purepg.run.films.scene import Scene
from purepg.types import Box, Discrete, Env, UsageError


class Drawing(NamedTuple):
    """How an environment is drawn: its scene, given a state and an observation in numpy, and how long a step lasts."""

    scene: Callable[[Any, np.ndarray], Scene]
    milliseconds: int


def drawing_of(env: Env) -> Drawing:
    """How to draw an environment. A boolean image of any name is drawn as MinAtar's are.

    Raises:
      UsageError: the environment cannot be drawn.
    """
    space = env.observation_space
    if env.name in CLASSIC_CONTROL:
        return Drawing(CLASSIC_CONTROL[env.name], 30)
    if env.name in GRIDS:
        return Drawing(GRIDS[env.name], 200)
    if env.name == "cliff" and isinstance(space, Discrete) and space.n == CLIFF_SHAPE[0] * CLIFF_SHAPE[1]:
        return Drawing(cliff, 200)
    if isinstance(space, Box) and len(space.shape) == 3 and space.dtype is bool:
        unnamed = [(i, f"channel {i}", PALETTE[i % len(PALETTE)]) for i in range(space.shape[2])]
        channels = MINATAR.get(env.name, unnamed)
        return Drawing(lambda state, obs: channels_scene(obs, channels), 100)
    known = ", ".join((*CLASSIC_CONTROL, *GRIDS, "cliff"))
    raise UsageError(f"{env.name} cannot be drawn; choose a run on MinAtar or on one of {known}")
