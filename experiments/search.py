"""Measures how good the best of a search is on fresh seeds, against the environment steps that the search took: for a
grid, Sobol points, successive halving, Optuna's TPE and population-based training, at equal environment steps.

The highest of many noisy returns is above its setting's true return; the report has both.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np

from purepg.config import Count, Range, Seed
from purepg.run.console import say
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.reliability import bootstrap_interval, iqm
from purepg.run.search import Sweep, Uniform
from purepg.run.study import Study, main
from purepg.run.summary import with_interval
from purepg.run.watch.style import dress, look

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Task(NamedTuple):
    """A script, the environment in place of its own, and the ranges of a search."""

    script: str
    total_steps: int  # of each agent that is trained to the end
    ranges: Mapping[str, Uniform]
    per_field: tuple[int, ...] = (2, 3)  # the sizes of the searches: the grid's values of each field


Name = Literal["CartPole-v1", "Acrobot-v1", "Pendulum-v1"]
OF_PPO = {
    "learning_rate": Uniform(1e-4, 1e-1, log=True),
    "gamma": Uniform(0.9, 0.999),
    "entropy_coef": Uniform(1e-4, 1e-1, log=True),
}
OF_SAC = {
    "critic_learning_rate": Uniform(1e-5, 1e-1, log=True),
    "gamma": Uniform(0.9, 0.999),
    "tau": Uniform(1e-4, 1e-1, log=True),
}
TASKS: dict[Name, Task] = {
    "CartPole-v1": Task("ppo", 12_800, OF_PPO),
    "Acrobot-v1": Task("ppo_general", 40_960, OF_PPO, (2,)),
    "Pendulum-v1": Task("sac", 5_000, OF_SAC, (2,)),
}


def grid(task: Task, per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """The grid of the middles of `per_field` equal parts of each range."""
    middles = (np.arange(per_field) + 0.5) / per_field
    return {name: [values.at(u, whole=False) for u in middles] for name, values in task.ranges.items()}, {}


def sobol(task: Task, per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """As many Sobol points as the grid has settings."""
    return task.ranges, {"search": per_field ** len(task.ranges)}


def halving(task: Task, per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """Successive halving in three rungs, of a ninth of the steps, a third, and all; a third of the settings goes on.

    n settings take n (1/9 + 2/27 + 2/27) of the steps of n trainings, so 27/7 times as many take as many as the grid.
    """
    number = per_field ** len(task.ranges) * 27 // 7
    return task.ranges, {"search": number, "halve": 3, "first_rung": task.total_steps // 9}


def tpe(task: Task, per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """As many settings as the grid has, a quarter of them Sobol points, and each later quarter proposed by TPE."""
    number = per_field ** len(task.ranges)
    return task.ranges, {"search": number, "tpe": -(-number // 4)}


def pbt(task: Task, per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """As many members as the grid has settings, and eight intervals between rounds."""
    return task.ranges, {"search": per_field ** len(task.ranges), "pbt": task.total_steps // 8}


# Each gives a sweep, and the fields of RunConfig that say how its settings are searched.
METHODS: dict[str, Callable[[Task, int], tuple[Sweep, dict[str, Any]]]] = {
    "grid": grid,
    "sobol": sobol,
    "halving": halving,
    "tpe": tpe,
    "pbt": pbt,
}


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      tasks: environments.
      num_seeds: number of agents trained for each setting of a search.
      fresh_seeds: number of agents on which the best setting is trained again.
      repetitions: number of searches of each size, each with other seeds.
      seed: seed of the first repetition.
    """

    tasks: tuple[Name, ...] = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")
    num_seeds: Count = 2
    fresh_seeds: Count = 16
    repetitions: Annotated[int, Range(2)] = 5
    seed: Seed = 0


class Result(NamedTuple):
    """The searches of one size, in R repetitions."""

    task: Name
    method: str
    num_settings: int
    env_steps: float  # of a search, the mean over repetitions
    fresh: np.ndarray  # [R] IQM over fresh seeds of the setting that was chosen
    chosen: np.ndarray  # [R] its IQM in the search


def searched(config: Config, name: Name, method: str, per_field: int) -> Result:
    """Repeats one method's search of one size."""
    task = TASKS[name]
    algorithm, own, network, network_config, run = import_module(task.script).EXPERIMENT
    sweep, how = METHODS[method](task, per_field)
    summaries = []
    for r in range(config.repetitions):
        seeds: Any = {"num_seeds": config.num_seeds, "fresh_seeds": config.fresh_seeds, "seed": config.seed + r}
        run_r = replace(run, env=name, total_steps=task.total_steps, log_every=0, **seeds, **how)
        summaries.append(train_population(algorithm, own, network, network_config, run_r, sweep=sweep).summary)
    fresh, chosen = (
        np.array([entry["iqm"] for entry in entries])
        for entries in ([x["winner"] for x in summaries], [x["winner"]["in_search"] for x in summaries])
    )
    env_steps = np.mean([sum(setting["env_steps"] for setting in x["settings"]) for x in summaries])
    return Result(name, method, len(summaries[0]["settings"]), float(env_steps), fresh, chosen)


def study(config: Config) -> Study:
    """Runs every search, and compares the returns of what they choose."""
    results = []
    for name in config.tasks:
        for per_field in TASKS[name].per_field:
            for method in METHODS:
                results.append(searched(config, name, method, per_field))
                found = results[-1]
                say(f"{name}, {method}, {found.num_settings} settings: {with_interval(*estimate(found.fresh))}")
    header = ["task", "method", "settings", "environment steps", "chosen, on fresh seeds [95 %]", "when it was chosen"]
    rows = [
        [
            *(r.task, r.method, str(r.num_settings), f"{r.env_steps:,.0f}"),
            *(with_interval(*estimate(r.fresh)), with_interval(*estimate(r.chosen))),
        ]
        for r in results
    ]
    report = (
        f"final return, IQM over {config.repetitions} searches of the best setting's IQM over "
        f"{config.fresh_seeds} fresh seeds, and of that over the {config.num_seeds} seeds by which it was chosen"
    )
    written = table(header, rows)
    numbers = {"config": dataclasses.asdict(config), "results": [result._asdict() for result in results]}
    return Study(f"{report}\n\n{written}", numbers, draw(results, config), written)


def estimate(x: np.ndarray) -> tuple[float, Sequence[float]]:
    """The IQM of one number per search, and its 95 % bootstrap interval."""
    return float(iqm(x)), bootstrap_interval(x)


def draw(results: Sequence[Result], config: Config) -> "Figure":
    """Draws a panel for each task: the return of what is chosen against the environment steps of the search."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tasks = list(dict.fromkeys(result.task for result in results))
    figure = Figure(figsize=(1.0 + 3.8 * len(tasks), 4.2), dpi=100, layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, method in enumerate(METHODS):
            own = [result for result in results if (result.task, result.method) == (task, method)]
            x, colour = np.array([result.env_steps for result in own]) * 1.03 ** (i - 2), look(i)[0]  # side by side
            middle, ends = zip(*(estimate(result.fresh) for result in own), strict=True)
            axes.plot(x, middle, "o-", color=colour, label=method)
            axes.vlines(x, *np.transpose(ends), color=colour, linewidth=1)
            axes.plot(x, [float(iqm(result.chosen)) for result in own], "_", color=colour, markersize=9)
        axes.set_xscale("log")
        axes.set_xticks(
            sorted({result.env_steps for result in results if (result.task, result.method) == (task, "grid")})
        )
        axes.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
        axes.minorticks_off()
        axes.set_xlabel("environment steps of the search")
        dress(axes, task, "line: 95 %; dash: when it was chosen")
    figure.axes[0].set_ylabel(f"return of the best, IQM over {config.fresh_seeds} fresh seeds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    main(study, Config(), __doc__)
