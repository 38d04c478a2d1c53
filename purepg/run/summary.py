"""What a run came to: its metrics put together, the summary of summary.json, and the table on the screen."""

import resource
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purepg.envs.tasks import Task, decode
from purepg.run.loop import HostMetrics, Outcome
from purepg.run.population import Chunk, Group, Setting
from purepg.run.record import setting_label
from purepg.run.reliability import bootstrap_interval, iqm

LEAST_ENTROPY, MOST_KL = 0.01, 20.0  # nats; below and above, a policy with a reference has collapsed
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
    ended = np.where(np.isfinite(metrics["episode_return"]), metrics["num_episodes"], 0)
    later = np.cumsum(ended[..., ::-1], axis=-1)[..., ::-1] - ended  # ended in the updates after this one
    weight = np.where(later < num_episodes, ended, 0)
    total = np.sum(np.nan_to_num(metrics["episode_return"].astype(np.float64)) * weight, axis=-1)
    count = weight.sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def diverged(finite: np.ndarray) -> list[dict[str, int]]:
    """The seeds whose parameters became non-finite, and the update that did it, of a setting's `finite [S, U]`."""
    return [{"seed": int(s), "update": int(np.argmax(finite[s] == 0))} for s in np.flatnonzero((finite == 0).any(-1))]


def collapsed(metrics: HostMetrics) -> list[str]:
    """What went wrong with a setting's language models: a line for each kind of collapse.

    Args:
      metrics: each `[S, U]`.
    """
    if "kl_reference" not in metrics:
        return []
    signs = (
        (
            metrics["entropy"] < LEAST_ENTROPY,
            f"entropy under {LEAST_ENTROPY} nats a step, so that a group's episodes agree",
        ),
        (metrics["kl_reference"] > MOST_KL, f"a KL of more than {MOST_KL} nats from the policy it started from"),
    )
    lines = []
    for sign, what in signs:
        seeds = np.flatnonzero(sign.any(-1))
        if len(seeds):
            first = int(np.argmax(sign.any(0)))
            lines.append(f"collapse: {what}, in {len(seeds)} of {len(sign)} seeds, first at update {first}")
    return lines


def add_responses(summary: dict[str, Any], task: Task, parts: Sequence[Part]) -> None:
    """Gives every setting of the summary `responses`: for each seed some prompts, what was answered and its reward."""
    for part in parts:
        rows, earned = np.asarray(part.outcome.rows), np.asarray(part.outcome.earned)
        for row, h in enumerate(part.group.settings[part.chunk.settings]):
            of_setting = summary["settings"][h].setdefault("responses", [None] * len(summary["settings"][h]["finals"]))
            for column, seed in enumerate(range(part.chunk.seeds.start, part.chunk.seeds.stop)):
                shown = zip(rows[row, column], earned[row, column], strict=True)
                of_setting[seed] = [_response(task, tokens, float(reward)) for tokens, reward in shown]


def _response(task: Task, tokens: np.ndarray, reward: float) -> dict[str, Any]:
    """A row of tokens as text; what stands after the end of its response is no part of it."""
    prompt, response = tokens[: task.prompt_length], tokens[task.prompt_length :].copy()
    ends = np.flatnonzero(response == task.eos)
    if len(ends):
        response[ends[0] + 1 :] = -1
    return {"prompt": decode(task, prompt), "response": decode(task, response), "reward": reward}


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
                f"{_number(setting['iqm'])} [{_number(lo)}, {_number(hi)}]",
                _number(setting["mode"]["iqm"]),
                _number(setting["training"]["iqm"]),
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
    return "\n".join(lines + _best_responses(summary))


def _number(x: float) -> str:
    """A return, or a share: three decimals where it is small."""
    return f"{x:.3f}" if abs(x) < 2 else f"{x:.1f}"


def _best_responses(summary: dict[str, Any]) -> list[str]:
    """What the best agent answered to some held-out prompts, a line each; nothing where it was no language model."""
    finals = [
        (final, h, seed)
        for h, setting in enumerate(summary["settings"])
        for seed, final in enumerate(setting["finals"])
        if setting.get("responses", {}) and setting["responses"][seed] and final is not None and np.isfinite(final)
    ]
    if not finals:
        return []
    _, h, seed = max(finals)
    label = setting_label(summary["settings"][h]["hyperparameters"])
    lines = [f"held-out prompts, answered by {label + ', ' if label else ''}seed {seed}:"]
    for found in summary["settings"][h]["responses"][seed]:
        lines.append(f"  {found['prompt']}{found['response']:<12} reward {found['reward']:g}")
    return lines
