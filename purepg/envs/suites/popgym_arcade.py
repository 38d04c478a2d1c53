"""An adapter from POPGym Arcade 0.0.7 (Wang et al. 2025, github.com/bolt-research/popgym-arcade): games on pixels.

Each game has two twins, which differ in what is seen: fully observed, and partially observed (`partial_obs`), which
needs memory; BattleShip's and MineSweeper's fully observed ones show all guesses so far, not what is hidden.
Observations are uint8 images. Most games end an episode in the same way at a terminal state and at their time limit;
the adapter puts the limit out of reach and uses our clock, set to the game's own limit.

What the games do, stays so: CartPole terminates one step after the fall, whose reward is 0; AutoEncode pays for one
answer more than there are cards. AutoEncode declares four actions, although the fifth is the one that answers: it has
five here. Navigator's last step before the limit pays what it earns, and CartPole pays 1 over its own limit for each
step, whatever our clock is.

POPGym Arcade requires `stable-gymnax`, which overwrites gymnax by an older one. It runs on gymnax 1.0.1 too, and must
be installed without its requirements, as the error says.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.suites.adapter import box, chosen, require, suite_env, with_limit
from purepg.types import Discrete, Env, UsageError

GAMES = ("AutoEncode", "BattleShip", "Breakout", "CartPole", "CountRecall", "MineSweeper", "Navigator", "NoisyCartPole")
NAMES = tuple(f"{game}{level}" for game in (*GAMES, "Skittles", "Tetris") for level in ("Easy", "Medium", "Hard"))
SIZES = (128, 256)  # of an image, in pixels
NEVER = 2**30


def popgym_arcade_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`.

    Args:
      params: `partial_obs`, False for the fully observed twin; `obs_size`, 128 or 256 pixels; and `max_episode_steps`,
        our clock.
    Raises:
      UsageError: POPGym Arcade is not installed, or a parameter is unknown or has an impossible value.
    """
    if importlib.util.find_spec("popgym_arcade") is None:
        raise UsageError(
            "popgym_arcade needs popgym-arcade, installed without its requirements, one of which overwrites gymnax: "
            'pip install -e ".[popgym-arcade]" && pip install --no-deps popgym-arcade==0.0.7'
        )
    popgym_arcade = require("popgym_arcade", "popgym_arcade", "dm_pix", "jaxtyping")
    own, _ = with_limit(name, params, NEVER)
    twin = chosen(name, own, obs_size=SIZES[0], partial_obs=False)
    if twin["obs_size"] not in SIZES:
        raise UsageError(f"{name}'s obs_size ({twin['obs_size']}) must be {' or '.join(map(str, SIZES))}")
    env, env_params = popgym_arcade.make(name, **twin)
    clock = "max_steps_in_episode" if hasattr(env, "max_steps_in_episode") else "max_episode_length"
    own_limit = int(getattr(env, clock))
    _, limit = with_limit(name, params, own_limit)
    setattr(env, clock, NEVER)
    if hasattr(env_params, "max_steps_in_episode"):
        env_params = env_params.replace(max_steps_in_episode=NEVER)
    env.discount = lambda *_: jnp.float32(1)  # gymnax 1's asks for a function that these games lack
    # CartPole's reward for a step is one part of its limit.
    unit = NEVER / own_limit if "CartPole" in name else 1.0

    def reset(key):
        obs, state = env.reset_env(key, env_params)
        return state, obs

    def step(key, state, action):
        obs, state, reward, terminated, _ = env.step_env(key, state, action, env_params)
        return state, obs, reward * unit, terminated, {}

    shape = env.observation_space(env_params).shape
    actions = Discrete(5 if name.startswith("AutoEncode") else int(env.action_space(env_params).n))

    def render(state: Any) -> np.ndarray:
        noise = (env_params, jax.random.PRNGKey(state.time)) if "CartPole" in name else ()
        return np.asarray(env.get_obs(state, *noise), np.uint8)

    return suite_env(name, reset, step, box(shape, np.uint8, 0, 255), actions, limit, costly_reset=True, render=render)
