"""The result of population-based training: which member of each repetition is the best, and how it came to be.

The S seeds of a population are as many independent repetitions.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from purepg.run.schedule import schedule_texts
from purepg.run.summary import last_episodes_return, seed_statistics


class Best(NamedTuple):
    """The best member of each repetition, by its training. Its final evaluation had no part in the choice."""

    member: np.ndarray  # [S]
    score: np.ndarray  # [S] mean return of the last episodes, NaN where none ended
    held: np.ndarray  # [S, U] which member held its ancestor, or itself, in each update


def ancestors(parent: np.ndarray) -> np.ndarray:
    """Which member held the ancestor of each final member in each update.

    Args:
      parent: `[H, S, U]` the member that was copied before each update, the member itself where none was; NaN where
        a member made no update.
    Returns:
      `[H, S, U]` positions of members. The last one is the member itself.
    """
    own = np.broadcast_to(np.arange(len(parent))[:, None], parent.shape[:2])
    parent = np.where(np.isnan(parent), own[..., None], parent).astype(int)
    held, now, end = np.empty(parent.shape, int), own, parent.shape[-1]
    for u in np.flatnonzero((parent != own[..., None]).any((0, 1)))[::-1]:
        held[..., u:end] = now[..., None]
        now, end = np.take_along_axis(parent[..., u], now, axis=0), u
    held[..., :end] = now[..., None]
    return held


def best_members(metrics: Mapping[str, np.ndarray], every: int) -> Best:
    """The members whose learners had the highest mean return over the episodes that ended in their last `every`
    updates, those of a copied learner's ancestor among them. Where none ended, over its last hundred episodes."""
    held = ancestors(metrics["parent"])
    names = "env_steps", "episode_return", "num_episodes"
    along = {name: np.take_along_axis(metrics[name], held, axis=0) for name in names}
    recent = last_episodes_return({name: x[..., -every:] for name, x in along.items()}, np.inf)
    score = np.where(np.isnan(recent), last_episodes_return(along), recent)
    member = np.nan_to_num(score, nan=-np.inf).argmax(axis=0)
    seeds = np.arange(len(member))
    return Best(member, score[member, seeds], held[member, seeds])


def schedule_of_best(metrics: Mapping[str, np.ndarray], every: int) -> tuple[int, int, tuple[str, ...]]:
    """The repetition whose best member has the highest score, that member, and the hyperparameters that it and its
    ancestors had, as the field `schedule` of `RunConfig`."""
    best = best_members(metrics, every)
    s = int(np.nan_to_num(best.score, nan=-np.inf).argmax())
    updates = np.arange(0, best.held.shape[-1], every)
    place = best.held[s, updates], s, updates
    hyper = {name.removeprefix("hyper/"): x[place] for name, x in metrics.items() if name.startswith("hyper/")}
    return s, int(best.member[s]), schedule_texts(hyper, updates * int(metrics["env_steps"][0, s, 0]))


def of_repetitions(settings: list[dict[str, Any]], best: Best, metrics: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The entry `pbt` of summary.json: statistics over repetitions of the best member's final evaluation.

    Args:
      settings: those of summary.json, an entry per member.
    """
    chosen = list(enumerate(best.member.tolist()))
    return {
        "members": best.member.tolist(),
        "hyperparameters": [
            {name: float(str(metrics[f"hyper/{name}"][h, s, -1])) for name in settings[h]["hyperparameters"]}
            for s, h in chosen
        ],
        **seed_statistics(np.array([settings[h]["finals"][s] for s, h in chosen])),
        "mode": seed_statistics(np.array([settings[h]["mode"]["finals"][s] for s, h in chosen])),
        "training": seed_statistics(best.score),
    }


def round_returns(metrics: Mapping[str, np.ndarray], every: int) -> np.ndarray:
    """Mean return of the episodes that each member ended in each round, `[H, S, R]`; NaN where none ended."""
    starts = range(0, metrics["parent"].shape[-1], every)
    of_rounds = ({name: x[..., u : u + every] for name, x in metrics.items()} for u in starts)
    return np.stack([last_episodes_return(x, np.inf) for x in of_rounds], axis=-1)
