"""Measures how robust algorithms with and without trust regions are to the step size, on CartPole-v1.

It trains A2C, NPG, TRPO, PPO-Penalty and PPO-Clip with the defaults of their scripts, but without annealing, for the
same number of environment steps. A step size solves the task if the IQM over seeds of the final evaluation reaches 475.
The report gives log10(largest / smallest) of the longest row of solving step sizes, and the KL of the updates.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import numpy as np
from parts.trust_region import draw, width_of

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.config import Count, Positive, Range, Seed
from purepg.run.console import say
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.reliability import iqm, iqm_and_quartiles
from purepg.run.results import Results
from purepg.run.study import Study, main
from purepg.run.watch.curves import on_common_grid

ENV = "CartPole-v1"
NUM_RESAMPLES = 2000  # bootstrap resamples of the seeds, for a width's interval
QUANTILES = 0.05, 0.5, 0.95, 1.0  # quantiles of the KL per update that are reported


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      seed: seed of training.
      total_steps: environment steps of each agent.
      num_seeds: number of agents trained at each step size.
      per_decade: number of step sizes per decade, the same for all algorithms.
      eval_episodes: number of episodes in each agent's final evaluation.
      solved: the IQM of the final return at which a step size solves the task.
    """

    seed: Seed = 0
    total_steps: Count = 102_400
    num_seeds: Annotated[int, Range(2)] = 8
    per_decade: Count = 3
    eval_episodes: Count = 64
    solved: Positive = 475.0


class Sweep(NamedTuple):
    """An algorithm and the step sizes to try."""

    name: str
    algorithm: Callable[..., Any]
    config: Any
    field: str
    low: float  # log10 of the ends of the grid
    high: float

    def grid(self, per_decade: int) -> list[float]:
        ends = math.ceil(self.low * per_decade - 1e-6), math.floor(self.high * per_decade + 1e-6)
        return [float(f"{10 ** (i / per_decade):.3g}") for i in range(ends[0], ends[1] + 1)]

    @property
    def lengths_per_decade(self) -> float:
        """Decades of the step's length per decade of the step size; 0.5 for a KL, which grows as the length squared."""
        return 0.5 if self.field == "max_kl" else 1.0

    @property
    def batch(self) -> int:
        return self.config.num_envs * self.config.num_steps


PENALTY = PPOPenaltyConfig(num_steps=32, gamma=0.98, target_kl=0.003)
CLIP = PPOConfig(num_envs=4, num_steps=32, num_epochs=8, num_minibatches=4, gamma=0.98, gae_lambda=0.9)
SWEEPS = (
    Sweep("A2C", a2c, A2CConfig(num_envs=8, num_steps=8, gamma=0.98, gae_lambda=1.0), "learning_rate", -4, -4 / 3),
    Sweep("NPG", npg, NPGConfig(max_kl=None), "learning_rate", -4 / 3, 4 / 3),
    Sweep("NPG", npg, NPGConfig(), "max_kl", -4, 2 / 3),
    Sweep("TRPO", trpo, TRPOConfig(), "max_kl", -4, 2 / 3),
    Sweep("PPO-Penalty", ppo_penalty, PENALTY, "learning_rate", -14 / 3, -4 / 3),
    Sweep("PPO-Clip", ppo, CLIP, "learning_rate", -14 / 3, -4 / 3),
)


# --- trained ---


def trained(config: Config, sweep: Sweep) -> Results:
    """Trains all step sizes and seeds of a sweep as one program."""
    sizes: Any = {"num_seeds": config.num_seeds, "seed": config.seed, "eval_episodes": config.eval_episodes}
    run = RunConfig(ENV, config.total_steps, log_every=0, **sizes)
    return train_population(
        sweep.algorithm, sweep.config, run=run, sweep={sweep.field: sweep.grid(config.per_decade)}, name=sweep.name
    )


# --- measured ---


def longest_row(solved: Sequence[bool] | np.ndarray) -> tuple[int, int] | None:
    """First and last index of the longest run of True, the first of several; None if there is none."""
    rows, start = [], 0
    for good, members in groupby(solved):
        stop = start + len(list(members))
        if good:
            rows.append((start, stop - 1))
        start = stop
    return max(rows, key=lambda row: row[1] - row[0], default=None)


class Result(NamedTuple):
    """The measurements of a sweep over H step sizes."""

    sweep: Sweep
    step: np.ndarray  # [H] the step sizes
    middle: np.ndarray  # IQM of the final return
    quartiles: np.ndarray  # [2, H]
    kl: np.ndarray  # [len(QUANTILES), H] per update, over all seeds' updates
    best: int  # index of the best step size
    region: tuple[int, int] | None  # first and last index of the step sizes that solve the task
    interval: tuple[float, float]  # of the region's width, over resampled seeds
    curve: tuple[np.ndarray, np.ndarray]  # at the best step size: environment steps, IQM of the training return
    num_diverged: int

    @property
    def width(self) -> float:
        """log10(largest / smallest) of the solving step sizes; 0 if there is only one, NaN if there is none."""
        return float("nan") if self.region is None else decades(self.step, self.region)

    @property
    def cut(self) -> bool:
        """Whether the region reaches an end of the grid, so that it may be wider than measured."""
        return self.region is not None and (self.region[0] == 0 or self.region[1] == len(self.step) - 1)


def decades(step: np.ndarray, region: tuple[int, int] | None) -> float:
    return 0.0 if region is None else float(np.log10(step[region[1]] / step[region[0]]))


def measure(config: Config, sweep: Sweep, found: Results) -> Result:
    step, returned, metrics = np.array(sweep.grid(config.per_decade)), found.final_return, found.metrics
    num_settings, num_seeds = returned.shape
    middle = iqm(returned)

    curves = []
    for h in range(num_settings):
        window = -(-metrics["kl"].shape[-1] // 50)
        env_steps, value = on_common_grid(metrics["env_steps"][h], metrics["episode_return"][h], window)
        curves.append((env_steps, iqm_and_quartiles(value)[0]))
    # If several reach the same final IQM, as at 500, the best is the one with the highest mean training return.
    best = max(range(num_settings), key=lambda h: (middle[h], np.nanmean(curves[h][1])))

    # A seed's agents share their initialisation over all step sizes, so seeds are resampled, not agents.
    drawn = np.random.default_rng(config.seed).integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    again = iqm(returned[:, drawn]) >= config.solved
    widths = [decades(step, longest_row(solved)) for solved in again.T]
    low, high = np.quantile(widths, (0.025, 0.975))

    return Result(
        sweep,
        step,
        middle,
        np.quantile(returned, (0.25, 0.75), axis=1),
        np.nanquantile(metrics["kl"].reshape(num_settings, -1), QUANTILES, axis=1),
        best,
        longest_row(middle >= config.solved),
        (float(low), float(high)),
        curves[best],
        sum(len(setting["diverged"]) for setting in found.summary["settings"]),
    )


# --- the report ---


def say_results(config: Config, results: Sequence[Result]) -> str:
    header = ["algorithm", "step size", "batch", "tried from", "to", "best", "IQM", "solved from", "to"]
    header += ["decades", "95 %", "of length", "median KL at best", "largest KL at best"]
    rows = []
    for r in results:
        ends = ["", ""] if r.region is None else [f"{r.step[h]:.3g}" for h in r.region]
        rows.append([
            r.sweep.name,
            r.sweep.field,
            f"{r.sweep.batch}",
            f"{r.step[0]:.3g}",
            f"{r.step[-1]:.3g}",
            f"{r.step[r.best]:.3g}",
            f"{r.middle[r.best]:.0f}",
            *ends,
            width_of(r),
            f"{r.interval[0]:.2f} to {r.interval[1]:.2f}",
            width_of(r, r.sweep.lengths_per_decade),
            f"{r.kl[1, r.best]:.2g}",
            f"{r.kl[-1, r.best]:.2g}",
        ])  # fmt: skip
    return table(header, rows)


def page_table(results: Sequence[Result]) -> str:
    """The table of experiments/results.md."""
    header = ["algorithm", "step size", "solved from", "to", "decades", "95 %", "decades of length"]
    rows = []
    for r in results:
        ends = ["", ""] if r.region is None else [f"{r.step[h]:.3g}" for h in r.region]
        name = {"max_kl": "KL"}.get(r.sweep.field, r.sweep.field.replace("_", " "))
        interval = f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
        rows.append([r.sweep.name, name, *ends, width_of(r), interval, width_of(r, r.sweep.lengths_per_decade)])
    return table(header, rows)


def findings(results: Sequence[Result]) -> list[str]:
    """Describes the largest KL of each sweep, one line each."""
    said = []
    for r in results:
        name = f"{r.sweep.name} by {r.sweep.field}: the largest KL of an update is"
        if r.sweep.field == "max_kl":
            excess = r.kl[-1] / r.step
            said.append(f"{name} {excess.max():.3f} x its bound, at {r.step[excess.argmax()]:.3g}")
        else:
            first, last = r.region or (r.best, r.best)
            solved = r.kl[-1, first : last + 1].max()
            said.append(f"{name} {r.kl[-1].max():.3g}, and {solved:.3g} where it solves the task")
    return said


def study(config: Config) -> Study:
    """Trains every sweep, and measures how wide its range of solving step sizes is."""
    results = []
    for sweep in SWEEPS:
        begun = time.perf_counter()
        say(
            f"{sweep.name} by {sweep.field}: {len(sweep.grid(config.per_decade))} step sizes x {config.num_seeds} seeds"
        )
        results.append(measure(config, sweep, trained(config, sweep)))
        say(f"  solved over {width_of(results[-1])} decades; {time.perf_counter() - begun:.0f} s")
    num_agents = sum(len(r.step) for r in results) * config.num_seeds
    cut = [f"{r.sweep.name} by {r.sweep.field}" for r in results if r.cut]
    report = [
        f"{ENV}, {config.total_steps:,} environment steps, {config.num_seeds} seeds, {config.per_decade} step sizes a "
        f"decade; solved: IQM of the final return (sampled actions, {config.eval_episodes} episodes) at least "
        f"{config.solved:g}; batch: environment steps of an update",
        say_results(config, results),
        "\n".join([
            "KL: the metric `kl`, exact at each state; A2C and PPO-Clip look at every fourth time step of a rollout",
            f"the true edge may lie up to {1 / config.per_decade:.2g} decades beyond the last solved step size",
            "of length: decades of the step's length, which grows as the square root of max_kl",
            f"became non-finite and were frozen: {sum(r.num_diverged for r in results)} of {num_agents} agents",
            f"regions that reach an end of the grid and may be wider than measured: {', '.join(cut) or 'none'}",
        ]),
        "\n".join(findings(results)),
    ]  # fmt: skip
    numbers = {
        "config": dataclasses.asdict(config),
        "sweeps": [
            {
                "algorithm": r.sweep.name,
                "config": dataclasses.asdict(r.sweep.config),
                "field": r.sweep.field,
                "step": r.step,
                "iqm": r.middle,
                "quartiles": r.quartiles,
                "kl": {f"{q:g}": kl for q, kl in zip(QUANTILES, r.kl, strict=True)},
                "best": r.step[r.best],
                "solved": None if r.region is None else r.step[list(r.region)],
                "decades": r.width,
                "interval": r.interval,
                "decades_of_length": r.sweep.lengths_per_decade * r.width,
                "cut": r.cut,
                "num_diverged": r.num_diverged,
            }
            for r in results
        ],
    }
    return Study("\n\n".join(report), numbers, draw(config, results), page_table(results))


if __name__ == "__main__":
    main(study, Config(), __doc__)
