"""Summarises a run: joins the metrics of its chunks, computes summary.json, and prints the table of results."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from purepg.run.folder.files import SUMMARY
from purepg.run.loop import HostMetrics, Outcome
from purepg.run.memory import peak_memory_bytes
from purepg.run.pages import table
from purepg.run.reliability import bootstrap_interval, iqm, rank
from purepg.run.sweep import Chunk, Setting, label_of

LEAST_ENTROPY, MOST_KL = 0.01, 20.0  # nats; below the one or above the other, a language model counts as collapsed
MAX_ROWS = 20  # of a printed table; of more settings, it has the best
LAST_EPISODES = 100  # papers often report the mean return of an agent's last hundred training episodes


class Part(NamedTuple):
    """A trained chunk and its outcome."""

    chunk: Chunk
    outcome: Outcome


class Found(NamedTuple):
    """The returns of a round."""

    total_steps: int  # environment steps of each agent, from its first update on
    settings: list[int]
    iqm: np.ndarray  # [n] over seeds, of the evaluation at the end of the round


def joined(parts: Sequence[Part], num_settings: int, num_seeds: int) -> tuple[HostMetrics, np.ndarray]:
    """Joins the metrics of all parts into `[H, S, U]`, NaN after a member's last update. Also returns `num_updates
    [H]`, the largest number of updates that any seed of each setting made."""
    made = np.zeros((num_settings, num_seeds), int)
    order = []
    for chunk, outcome in parts:
        active = outcome.metrics["env_steps"] > 0
        made[chunk.place] = active.sum(-1)
        # If a run was extended, a member that had stopped before the others has a gap where it waited for them.
        order.append(np.argsort(~active, axis=-1, kind="stable"))
    longest = made.max(initial=0)
    metrics = {}
    for (chunk, outcome), active_first in zip(parts, order, strict=True):
        for name, gapped in outcome.metrics.items():
            x = np.take_along_axis(gapped, active_first, axis=-1)
            wide = np.float32 if x.dtype.kind == "f" else np.float64  # integers stay exact
            full = metrics.setdefault(name, np.full((num_settings, num_seeds, longest), np.nan, wide))
            updates = np.arange(min(x.shape[-1], longest))
            within = updates < made[chunk.place][..., None]
            full[(*(axis[..., None] for axis in chunk.place), updates)] = np.where(within, x[..., updates], np.nan)
    return metrics, made.max(axis=1)


def summarize(
    settings: Sequence[Setting],
    parts: Sequence[Part],
    metrics: HostMetrics,
    num_updates: np.ndarray,
    interrupted: bool,
    rounds: Sequence[Found] = (),
) -> dict[str, Any]:
    """The contents of summary.json.

    For each setting: `iqm`, 95 % bootstrap `interval` over seeds, `mean` and `finals` (one per seed) of the final
    evaluation with sampled actions; the same statistics under `mode` for an evaluation with the policy's mode, and
    under `training` for the mean of each agent's last 100 training episodes; and which seeds diverged at which update.
    With several rounds, also their returns, and `stopped_at`, the steps of a setting that a later one left out.
    """
    num_settings, num_seeds = metrics["env_steps"].shape[:2]
    sampled, mode = np.full((2, num_settings, num_seeds), np.nan)
    responses: dict[tuple[int, int], list] = {}
    measures: dict[str, np.ndarray] = {}
    seconds = np.zeros((num_settings, 2))
    for chunk, outcome in parts:
        sampled[chunk.place], mode[chunk.place] = outcome.sampled, outcome.mode
        seconds[chunk.settings] += outcome.compile_seconds, outcome.run_seconds
        for name, value in (outcome.measures or {}).items():
            measures.setdefault(name, np.full((num_settings, num_seeds), np.nan))[chunk.place] = value
        for h, of_setting in zip(chunk.settings, outcome.responses or [], strict=False):
            for s, of_seed in zip(chunk.seeds, of_setting, strict=True):
                responses[h, s] = of_seed
    training = last_episodes_return(metrics)
    env_steps = np.nansum(metrics["env_steps"], axis=(1, 2))
    run_seconds = sum(outcome.run_seconds for _, outcome in parts)
    trained = {h: found.total_steps for found in rounds for h in found.settings}
    stopped = {h: steps for h, steps in trained.items() if steps < rounds[-1].total_steps}
    return {
        "settings": [
            {
                "hyperparameters": setting.hyperparameters,
                **seed_statistics(sampled[h]),
                "mode": seed_statistics(mode[h]),
                "training": seed_statistics(training[h]),
                "diverged": diverged(metrics["finite"][h]),
                "num_updates": int(num_updates[h]),
                "env_steps": int(env_steps[h]),
                "compile_seconds": seconds[h, 0],
                "run_seconds": seconds[h, 1],
                **({"stopped_at": stopped[h]} if h in stopped else {}),
                **({"before": _first(metrics, measures, h)} if measures else {}),
                **({"measures": {name: seed_statistics(x[h]) for name, x in measures.items()}} if measures else {}),
                **({"responses": [responses.get((h, s)) for s in range(num_seeds)]} if responses else {}),
            }
            for h, setting in enumerate(settings)
        ],
        "compile_seconds": sum(outcome.compile_seconds for _, outcome in parts),
        "run_seconds": run_seconds,
        "env_steps_per_second": float(env_steps.sum() / run_seconds) if run_seconds else float("nan"),
        **({"rounds": [found._asdict() for found in rounds]} if len(rounds) > 1 else {}),
        "peak_memory_bytes": peak_memory_bytes(),
        "interrupted": interrupted,
    }


def _first(metrics: HostMetrics, measures: Iterable[str], h: int) -> dict[str, Any]:
    """Statistics of what was measured before the first update."""
    return {name: seed_statistics(metrics[name][h, :, 0]) for name in measures}


def seed_statistics(finals: np.ndarray) -> dict[str, Any]:
    """Statistics of one number per seed, `[S]`."""
    return {
        "iqm": float(iqm(finals)),
        "interval": list(bootstrap_interval(finals)),
        "mean": float(np.mean(finals)),
        "finals": finals.tolist(),
    }


def last_episodes_return(metrics: HostMetrics, num_episodes: float = LAST_EPISODES) -> np.ndarray:
    """Mean return of each member's last training episodes, `[H, S]`; NaN if none ended or the algorithm has none.

    Counts whole updates, from the last one backwards, until they hold at least `num_episodes` episodes.
    """
    if "episode_return" not in metrics:
        return np.full(metrics["env_steps"].shape[:2], np.nan)
    ended = np.where(np.isfinite(metrics["episode_return"]), metrics["num_episodes"], 0)
    later = np.cumsum(ended[..., ::-1], axis=-1)[..., ::-1] - ended  # ended in the updates after this one
    weight = np.where(later < num_episodes, ended, 0)
    total = np.sum(np.nan_to_num(metrics["episode_return"].astype(np.float64)) * weight, axis=-1)
    count = weight.sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def diverged(finite: np.ndarray) -> list[dict[str, int]]:
    """The seeds of a setting whose parameters became non-finite, and at which update; `finite` is `[S, U]`."""
    return [{"seed": int(s), "update": int(np.argmax(finite[s] == 0))} for s in np.flatnonzero((finite == 0).any(-1))]


def collapsed(metrics: HostMetrics) -> list[str]:
    """Describes how a setting's language models collapsed, a line for each kind of collapse.

    Args:
      metrics: the setting's metrics, each `[S, U]`.
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


def report(summary: dict[str, Any]) -> str:
    """The summary as lines of text: a row per setting, of many the best; and the winner on fresh seeds."""
    settings, winner, pbt = summary["settings"], summary.get("winner"), summary.get("pbt")
    many = len(settings) > MAX_ROWS
    stopped = any("stopped_at" in entry for entry in settings)
    if many or stopped:
        settings = sorted(settings, key=rank, reverse=True)[:MAX_ROWS]
    first = "member, by its first values" if pbt else "setting"
    rate = "tokens/s" if any("responses" in entry for entry in settings) else "steps/s"
    header = [first, "return: IQM [95 %]", "with mode", "training", rate, "compile s", "run s"]
    header += ["stopped at step"] * stopped
    rows = []
    for setting in settings:
        steps_per_second = setting["env_steps"] / setting["run_seconds"] if setting["run_seconds"] else float("nan")
        rows.append(
            [
                label_of(setting["hyperparameters"]) or "default",
                with_interval(setting["iqm"], setting["interval"]),
                short(setting["mode"]["iqm"]),
                short(setting["training"]["iqm"]),
                f"{steps_per_second:,.0f}",
                f"{setting['compile_seconds']:.1f}",
                f"{setting['run_seconds']:.1f}",
                *([f"{setting['stopped_at']:,}" if "stopped_at" in setting else ""] * stopped),
            ]
        )
    lines = [table(header, rows), *_measured(settings), *_flops(summary)]
    if many:
        lines.append(f"the best {MAX_ROWS} of {len(summary['settings'])} settings; {SUMMARY} has all")
    if pbt:
        header = ["best member of each seed", *header[1:4]]
        row = with_interval(pbt["iqm"], pbt["interval"]), short(pbt["mode"]["iqm"]), short(pbt["training"]["iqm"])
        lines += ["", table(header, [["chosen by training", *row]])]
    if winner:
        header = [
            f"winner on {len(winner['finals'])} fresh seeds",
            "return: IQM [95 %]",
            "with mode",
            "when it was chosen",
        ]
        chosen = with_interval(winner["in_search"]["iqm"], winner["in_search"]["interval"])
        values = with_interval(winner["iqm"], winner["interval"]), short(winner["mode"]["iqm"]), chosen
        lines += ["", table(header, [[label_of(winner["hyperparameters"]) or "the best member's schedule", *values]])]
    return "\n".join([*lines, *_best_responses(summary)])


def _measured(settings: Sequence[dict[str, Any]]) -> list[str]:
    """A table of what evaluations measured beside the return, before the first update and at the end."""
    rows = [
        [label_of(setting["hyperparameters"]) or "default", name.removeprefix("eval/"), *map(_of_seeds, values)]
        for setting in settings
        for name, now in setting.get("measures", {}).items()
        for values in [(setting["before"][name], now)]
    ]
    return ["", table(["setting", "held-out", "before: IQM [95 %]", "at the end"], rows)] if rows else []


def _flops(summary: dict[str, Any]) -> list[str]:
    """The line on model FLOPs, of a run that has measured them."""
    if "flops_per_second" not in summary:
        return []
    line = f"model FLOPs: {summary['flops_per_second'] / 1e9:,.1f} GFLOP/s"
    share = summary.get("flops_utilisation")
    return [line if share is None else f"{line}, {share:.1%} of the devices' peak in bfloat16"]


def _of_seeds(found: dict[str, Any]) -> str:
    return with_interval(found["iqm"], found["interval"])


def short(x: float) -> str:
    """Formats a return with one decimal, or three if its absolute value is below 2; NaN is an empty string."""
    return "" if np.isnan(x) else f"{x:.3f}" if abs(x) < 2 else f"{x:.1f}"


def with_interval(x: float, interval: Sequence[float]) -> str:
    """Formats a return and its interval, as in "3.1 [2.8, 3.4]"; without an interval, which one seed has not, "3.1"."""
    return short(x) if np.isnan(interval).all() else f"{short(x)} [{', '.join(map(short, interval))}]"


def _best_responses(summary: dict[str, Any]) -> list[str]:
    """Describes the best agent's final observations, a line each; empty if the environment has no `describe`."""
    finals = [
        (final, h, seed)
        for h, setting in enumerate(summary["settings"])
        for seed, final in enumerate(setting["finals"])
        if setting.get("responses", {}) and setting["responses"][seed] and final is not None and np.isfinite(final)
    ]
    if not finals:
        return []
    _, h, seed = max(finals)
    label = label_of(summary["settings"][h]["hyperparameters"])
    lines = [f"final evaluation of {label + ', ' if label else ''}seed {seed}:"]
    between = " -> " if "measures" in summary["settings"][h] else ""  # a token task's prompt ends with a mark
    for response in summary["settings"][h]["responses"][seed]:
        *texts, reward = response.values()
        line = between.join(_on_one_line(text) if between else text for text in texts)
        lines.append(f"  {line:<20} reward {reward:g}")
    return lines


def _on_one_line(text: str) -> str:
    """The text for a terminal, which would obey some of a model's control characters."""
    return "".join(x if x.isprintable() else "\ufffd" for x in " ".join(text.split()))
