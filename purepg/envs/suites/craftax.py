"""An adapter from Craftax 1.6 (Matthews et al. 2024, github.com/MichaelTMatthews/Craftax): the full game and Classic,
with symbolic observations or pixels.

Craftax ends an episode in the same way at death and at its time limit. The adapter puts Craftax's clock out of reach
and keeps its own, so that only death (or victory over the boss) terminates. An episode's metrics are, for each
achievement, whether it was unlocked; their number; and the score, which is the return in per cent of the largest
possible: 226 in the full game (Matthews et al. 2024), 22 in Classic.
"""

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, require, suite_env, with_fields, with_limit
from purepg.types import Discrete, Env

NAMES = (  # Craftax's own names end in -v1
    "Craftax-Symbolic",
    "Craftax-Pixels",
    "Craftax-Classic-Symbolic",
    "Craftax-Classic-Pixels",
)
NEVER = np.iinfo(np.int32).max
MAX_RETURN = {"craftax": 226, "craftax_classic": 22}
MAX_EPISODE_STEPS = {"craftax": 100_000, "craftax_classic": 10_000}  # as Craftax's own


def craftax_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`. Pixels are uint8; symbolic observations are float32 vectors of 8268 numbers (Classic 1345).

    Args:
      params: fields of Craftax's `EnvParams`, such as `god_mode`, and `max_episode_steps`, our clock.
    Raises:
      UsageError: Craftax is not installed, or a parameter is unknown.
    """
    require("craftax", "craftax")
    game, kind = "craftax_classic" if "Classic" in name else "craftax", "pixels" if "Pixels" in name else "symbolic"
    module = importlib.import_module(f"craftax.{game}.envs.craftax_{kind}_env")
    env = getattr(module, name.replace("-", "") + "EnvNoAutoReset")()
    own, limit = with_limit(name, params, MAX_EPISODE_STEPS[game])
    env_params = with_fields(name, env.default_params, own, "max_timesteps").replace(max_timesteps=NEVER)
    achievements = {x.name.lower(): x.value for x in importlib.import_module(f"craftax.{game}.constants").Achievement}

    def seen(obs):
        return jnp.round(255 * obs).astype(jnp.uint8) if kind == "pixels" else obs

    def reset(key):
        obs, state = env.reset_env(key, env_params)
        return (state, jnp.float32(0)), seen(obs)

    def step(key, state, action):
        state, before = state
        obs, state, reward, terminated, _ = env.step_env(key, state, action, env_params)
        episode_return = before + reward
        info = {achievement: state.achievements[i] for achievement, i in achievements.items()}
        info["num_achievements"] = jnp.sum(state.achievements)
        info["score"] = 100 * episode_return / MAX_RETURN[game]
        return (state, episode_return), seen(obs), reward, terminated, info

    shape = env.observation_space(env_params).shape
    # Health and its like are in tenths, and can exceed 1.
    observed = box(shape, np.uint8, 0, 255) if kind == "pixels" else box(shape, low=0)
    actions = Discrete(env.action_space(env_params).n)
    metrics = (*achievements, "num_achievements", "score")
    return suite_env(
        name, reset, step, observed, actions, limit, metrics=metrics, costly_reset=True, render=_renderer(game)
    )


def _renderer(game: str) -> Any:
    @functools.cache
    def picture() -> Any:
        constants = importlib.import_module(f"craftax.{game}.constants")
        renderer = importlib.import_module(f"craftax.{game}.renderer")
        return jax.jit(renderer.make_craftax_pixel_renderer(constants.BLOCK_PIXEL_SIZE_IMG))

    def render(state: Any) -> np.ndarray:
        inner, _ = state
        return np.asarray(picture()(inner)).round().clip(0, 255).astype(np.uint8)

    return render
