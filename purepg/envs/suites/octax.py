"""An adapter from Octax 0.1 (Radji et al. 2025, github.com/riiswa/octax): games of the CHIP-8 computer.

An observation is the display at the last four frames, bool `[64, 32, 4]`, channels last. Octax keeps the flags apart;
its own time limit changes no state, so the adapter reads only its termination and uses our clock. Episodes of a game
begin in one state; what differs is the emulator's random numbers. Its delay timer counts steps, not frames, and goes on
from 0 to 255 in the games that use it, which stays so here.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env
from purepg.envs.wrappers import positive_count
from purepg.types import Discrete, Env, UsageError

NAMES = (
    *("airplane", "blinky", "brix", *(f"cavern{i}" for i in (1, 2, 3, 5, 6)), "deep", "filter", "flight_runner"),
    *("missile", "pong", "rocket", "shooting_stars", *(f"space_flight{i}" for i in range(1, 11)), "spacejam"),
    *("squash", "submarine", "tank", *(f"target_shooter{i}" for i in (1, 2, 3)), "tetris", "ufo", "vertical_brix"),
    *("wipe_off", "worm"),
)


def octax_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`.

    Args:
      params: `frame_skip`, frames of an observation and of a step; `instruction_frequency`, the computer's instructions
        a second; `fps`, its frames a second; and `max_episode_steps`, our clock.
    Raises:
      UsageError: Octax, or a package that it uses and does not declare, is not installed, or a parameter is unknown or
        has an impossible value.
    """
    require("octax", "octax", "cv2", "PIL")
    environments: Any = import_module("octax.environments")
    defaults = {"frame_skip": 4, "instruction_frequency": 700, "fps": 60}
    given = chosen(name, params, max_episode_steps=4500, **defaults)
    for key in defaults:
        positive_count(f"{name}'s {key}", given[key])
    if given["instruction_frequency"] < given["fps"]:
        raise UsageError(
            f"{name}'s instruction_frequency ({given['instruction_frequency']}) must be at least its fps "
            f"({given['fps']}): each frame takes an instruction or more"
        )
    env, _ = environments.create_environment(
        name, render_mode="rgb_array", render_scale=4, **{key: given[key] for key in defaults}
    )

    def seen(frames):
        return jnp.moveaxis(frames, 0, -1)

    def reset(key):
        state, frames, _ = env.reset(key)
        return state, seen(frames)

    def step(key, state, action):
        state, frames, reward, terminated, _, _ = env.step(state, action)
        return state, seen(frames), reward, terminated, {}

    def render(state: Any) -> np.ndarray:
        return np.asarray(env.render(state), np.uint8)

    shape = (*env.cached_reset_state.display.shape, given["frame_skip"])
    observed, limit = box(shape, bool, False, True), given["max_episode_steps"]
    return suite_env(name, reset, step, observed, Discrete(env.num_actions), limit, render=render)
