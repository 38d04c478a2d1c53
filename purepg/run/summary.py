"""What a run came to: its metrics put together, the summary of summary.json, and the table on the screen."""

import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purepg.run.loop import HostMetrics, Outcome
from purepg.run.population import Chunk, Group, Setting
from purepg.run.record import setting_label
from purepg.run.statistics import bootstrap_interval, iqm

LAST_EPISODES = 100  # the training return that papers report: over an agent's last hundred episodes


class Part(NamedTuple):
    """A chunk that was trained, and where in the population it belongs."""

    group: Group
    chunk: Chunk
    outcome: Outcome

    @property
    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of its members in `[H, S]`."""
        settings = np.array(self.group.settings)[self.chunk.settings]
        return settings[:, None], np.arange(self.chunk.seeds.start, self.chunk.seeds.stop)[None]


def assemble(parts: Sequence[Part], num_settings: int, num_seeds: int) -> tuple[HostMetrics, np.ndarray]:
    """The metrics of all parts as `[H, S, U]`, NaN where a member made no update; and `num_updates [H]`, the most that
    a seed of each setting made."""
    made = np.zeros((num_settings, num_seeds), int)
    order = []
    for part in parts:
        active = part.outcome.metrics["env_steps"] > 0
        made[part.place] = active.sum(-1)
        # A member that stopped before others, and went on with more steps, has a gap where it waited for them.
        order.append(np.argsort(~active, axis=-1, kind="stable"))
    longest = made.max(initial=0)
    metrics = {}
    for part, active_first in zip(parts, order, strict=True):
        for name, gapped in part.outcome.metrics.items():
            x = np.take_along_axis(gapped, active_first, axis=-1)
            wide = np.float32 if x.dtype.kind == "f" else np.float64  # integers stay exact
            full = metrics.setdefault(name, np.full((num_settings, num_seeds, longest), np.nan, wide))
            updates = np.arange(min(x.shape[-1], longest))
            within = updates < made[part.place][..., None]
            full[(*(axis[..., None] for axis in part.place), updates)] = np.where(within, x[..., updates], np.nan)
    return metrics, made.max(axis=1)


def summarize(
    settings: Sequence[Setting],
    parts: Sequence[Part],
    metrics: HostMetrics,
    num_updates: np.ndarray,
    interrupted: bool,
) -> dict[str, Any]:
    """The contents of summary.json.

    Per setting: `iqm`, 95 % bootstrap `interval` over seeds, `mean` and `finals` (one per seed) of the final
    evaluation with sampled actions; the same under `mode` with the distribution's mode, and under `training` for the
    mean over each agent's last 100 training episodes; and which seeds diverged, at which update.
    """
    num_settings, num_seeds = metrics["env_steps"].shape[:2]
    sampled, mode = np.full((2, num_settings, num_seeds), np.nan)
    seconds = np.zeros((num_settings, 2))
    for part in parts:
        sampled[part.place], mode[part.place] = part.outcome.sampled, part.outcome.mode
        rows = np.array(part.group.settings)[part.chunk.settings]
        seconds[rows] += part.outcome.compile_seconds, part.outcome.run_seconds
    training = last_episodes_return(metrics)
    env_steps = np.nansum(metrics["env_steps"], axis=(1, 2))
    run_seconds = sum(part.outcome.run_seconds for part in parts)
    return {
        "settings": [
            {
                "hyperparameters": setting.hyperparameters,
                **over_seeds(sampled[h]),
                "mode": over_seeds(mode[h]),
                "training": over_seeds(training[h]),
                "diverged": diverged(metrics["finite"][h]),
                "num_updates": int(num_updates[h]),
                "env_steps": int(env_steps[h]),
                "compile_seconds": seconds[h, 0],
                "run_seconds": seconds[h, 1],
            }
            for h, setting in enumerate(settings)
        ],
        "compile_seconds": sum(part.outcome.compile_seconds for part in parts),
        "run_seconds": run_seconds,
        "env_steps_per_second": float(env_steps.sum() / run_seconds) if run_seconds else float("nan"),
        "peak_memory_bytes": peak_memory_bytes(),
        "interrupted": interrupted,
    }


def over_seeds(finals: np.ndarray) -> dict[str, Any]:
    """Statistics of one number per seed, `[S]`."""
    return {
        "iqm": float(iqm(finals)),
        "interval": list(bootstrap_interval(finals)),
        "mean": float(np.mean(finals)),
        "finals": finals.tolist(),
    }


def last_episodes_return(metrics: HostMetrics, num_episodes: int = LAST_EPISODES) -> np.ndarray:
    """Mean return of each member's last training episodes, `[H, S]`; NaN where none ended.

    Whole updates are taken from the end until they hold `num_episodes`.
    """
    ended = np.nan_to_num(metrics["num_episodes"])
    later = np.cumsum(ended[..., ::-1], axis=-1)[..., ::-1] - ended  # ended in the updates after this one
    weight = np.where(later < num_episodes, ended, 0)
    total = np.sum(np.nan_to_num(metrics["episode_return"].astype(np.float64)) * weight, axis=-1)
    count = weight.sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def diverged(finite: np.ndarray) -> list[dict[str, int]]:
    """The seeds whose parameters became non-finite, and the update that did it, of a setting's `finite [S, U]`."""
    return [{"seed": int(s), "update": int(np.argmax(finite[s] == 0))} for s in np.flatnonzero((finite == 0).any(-1))]


def peak_memory_bytes() -> int:
    """The most memory the device has held at once; on a CPU, the process."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def report(summary: dict[str, Any]) -> str:
    """The summary as lines of text, a row per setting."""
    rows = [("setting", "return: IQM [95 %]", "with mode", "training", "steps/s", "compile s", "run s")]
    for setting in summary["settings"]:
        steps_per_second = setting["env_steps"] / setting["run_seconds"] if setting["run_seconds"] else float("nan")
        lo, hi = setting["interval"]
        rows.append(
            (
                setting_label(setting["hyperparameters"]) or "default",
                f"{setting['iqm']:.1f} [{lo:.1f}, {hi:.1f}]",
                f"{setting['mode']['iqm']:.1f}",
                f"{setting['training']['iqm']:.1f}",
                f"{steps_per_second:,.0f}",
                f"{setting['compile_seconds']:.1f}",
                f"{setting['run_seconds']:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
