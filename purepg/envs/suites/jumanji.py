"""An adapter from Jumanji 1.1 (Bonnet et al. 2024, github.com/instadeepai/jumanji): Snake, 2048 and Maze.

Jumanji reports its time limits as terminations, so the adapter lifts them and uses our clock. Observations are dicts,
with the suite's mask of legal actions, and without its count of steps: a time limit is no part of the task, and the
value of the last state is bootstrapped. 2048's board is one-hot, bool `[4, 4, 18]`, by the exponent of a tile.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env
from purepg.types import Discrete, Env, LegalActions

LIMITS = {"Snake": 4000, "Game2048": 10_000, "Maze": 100}  # Jumanji's own; 2048 has none
NAMES = tuple(LIMITS)
NEVER = 2**31 - 1
EXPONENTS = 18  # the largest tile of a 4 x 4 board is 2^17


def jumanji_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`.

    Args:
      params: `max_episode_steps`, our clock.
    Raises:
      UsageError: Jumanji is not installed, or a parameter is unknown.
    """
    environments = require("jumanji", "jumanji").environments
    limit = chosen(name, params, max_episode_steps=LIMITS[name])["max_episode_steps"]
    env = getattr(environments, name)(**({} if name == "Game2048" else {"time_limit": NEVER}))

    def seen(obs):
        if name == "Snake":
            found = {"grid": obs.grid}
        elif name == "Game2048":
            found = {"board": obs.board[..., None] == jnp.arange(EXPONENTS)}
        else:
            found = {"walls": obs.walls[..., None], "agent": _cell(obs, "agent"), "target": _cell(obs, "target")}
        return found | {"legal_actions": obs.action_mask}

    def _cell(obs, which):
        place = getattr(obs, f"{which}_position")
        row, column = (jnp.arange(n) for n in obs.walls.shape)
        return ((row[:, None] == place.row) & (column == place.col))[..., None]

    def reset(key):
        state, timestep = env.reset(key)
        return state, seen(timestep.observation)

    def step(key, state, action):
        state, timestep = env.step(state, action)
        return state, seen(timestep.observation), timestep.reward, timestep.discount == 0, {}

    grids = {
        "Snake": {"grid": box((12, 12, 5), np.float32, 0, 1)},
        "Game2048": {"board": box((4, 4, EXPONENTS), bool, False, True)},
        "Maze": {which: box((10, 10, 1), bool, False, True) for which in ("walls", "agent", "target")},
    }
    observed = grids[name] | {"legal_actions": LegalActions(4)}
    return suite_env(name, reset, step, observed, Discrete(4), limit, costly_reset=True)
