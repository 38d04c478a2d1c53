"""An adapter from pgx 2.6 (Koyamada et al. 2023, github.com/sotetsuk/pgx): its games for a single player.

pgx never truncates, so our clock does; a step after the end of a game changes nothing. An illegal action would end a
game of 2048 with a penalty, so observations say which actions are legal: `{"board": ..., "legal_actions": ...}`. In
MinAtar's games all actions are legal, and an observation is the bool image alone.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from purepg.envs.suites.adapter import box, chosen, require, suite_env
from purepg.types import Discrete, Env, LegalActions

MINATAR = tuple(f"minatar-{game}" for game in ("asterix", "breakout", "freeway", "seaquest", "space_invaders"))
NAMES = ("2048", *MINATAR)


def pgx_env(name: str, params: Mapping[str, Any]) -> Env:
    """One of `NAMES`.

    Args:
      params: of MinAtar's games, `sticky_action_prob`, the probability that the last action is repeated; and
        `max_episode_steps`, our clock, by default 10,000 for 2048 and 2,500 for MinAtar's.
    Raises:
      UsageError: pgx is not installed, or a parameter is unknown.
    """
    pgx = require("pgx", "pgx")

    is_minatar = name in MINATAR
    own: dict[str, Any] = {"sticky_action_prob": 0.1} if is_minatar else {}
    given = chosen(name, params, max_episode_steps=2500 if is_minatar else 10_000, **own)
    if is_minatar:
        game = name.removeprefix("minatar-")
        kind = f"MinAtar{game.title().replace('_', '')}"
        env = getattr(import_module(f"pgx.minatar.{game}"), kind)(sticky_action_prob=given["sticky_action_prob"])
    else:
        env = pgx.make("2048")

    def seen(state):
        board = state.observation
        return board if is_minatar else {"board": board, "legal_actions": state.legal_action_mask}

    def reset(key):
        state = env.init(key)
        return state, seen(state)

    def step(key, state, action):
        state = env.step(state, action, key)
        return state, seen(state), state.rewards[0], state.terminated, {}

    board = box(env.observation_shape, bool, False, True)
    observed = board if is_minatar else {"board": board, "legal_actions": LegalActions(4)}
    limit, costly = given["max_episode_steps"], not is_minatar  # 2048 begins with two random tiles
    return suite_env(name, reset, step, observed, Discrete(env.num_actions), limit, costly_reset=costly)
