"""Measures how good the best setting of a search is on fresh seeds, against the environment steps that the search took,
for a grid and for Sobol points with equally many settings.

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
    total_steps: int  # of each agent
    ranges: Mapping[str, Uniform]


Name = Literal["CartPole-v1", "Acrobot-v1", "Pendulum-v1"]
OF_PPO = {
    "learning_rate": Uniform(1e-4, 1e-1, log=True),
    "gamma": Uniform(0.9, 0.999),
    "entropy_coef": Uniform(1e-4, 1e-1, log=True),
}
OF_SAC = {
    "learning_rate": Uniform(1e-5, 1e-1, log=True),
    "gamma": Uniform(0.9, 0.999),
    "tau": Uniform(1e-4, 1e-1, log=True),
}
TASKS: dict[Name, Task] = {
    "CartPole-v1": Task("ppo", 25_600, OF_PPO),
    "Acrobot-v1": Task("ppo_general", 51_200, OF_PPO),
    "Pendulum-v1": Task("sac", 10_000, OF_SAC),
}


def grid(ranges: Mapping[str, Uniform], per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """The grid of the middles of `per_field` equal parts of each range."""
    middles = (np.arange(per_field) + 0.5) / per_field
    return {name: [values.at(u, whole=False) for u in middles] for name, values in ranges.items()}, {}


def sobol(ranges: Mapping[str, Uniform], per_field: int) -> tuple[Sweep, dict[str, Any]]:
    """As many Sobol points as the grid has settings."""
    return ranges, {"search": per_field ** len(ranges)}


# Each gives a sweep, and the fields of RunConfig that say how its settings are searched.
METHODS: dict[str, Callable[[Mapping[str, Uniform], int], tuple[Sweep, dict[str, Any]]]] = {
    "grid": grid,
    "sobol": sobol,
}


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      tasks: environments.
      per_field: the sizes of the searches: the grid's values of each field. All methods train as many settings.
      num_seeds: number of agents trained for each setting of a search.
      fresh_seeds: number of agents on which the best setting is trained again.
      repetitions: number of searches of each size, each with other seeds.
      seed: seed of the first repetition.
    """

    tasks: tuple[Name, ...] = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1")
    per_field: tuple[Annotated[int, Range(2)], ...] = (2, 3, 4)
    num_seeds: Count = 2
    fresh_seeds: Count = 16
    repetitions: Annotated[int, Range(2)] = 8
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
    sweep, how = METHODS[method](task.ranges, per_field)
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
        for per_field in config.per_field:
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
            x, colour = [result.env_steps for result in own], look(i)[0]
            middle, ends = zip(*(estimate(result.fresh) for result in own), strict=True)
            axes.plot(x, middle, "o-", color=colour, label=method)
            axes.fill_between(x, *np.transpose(ends), color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, [float(iqm(result.chosen)) for result in own], ":", color=colour)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("environment steps of the search")
        dress(axes, task, "dotted: when it was chosen; band: 95 %")
    figure.axes[0].set_ylabel(f"return of the best, IQM over {config.fresh_seeds} fresh seeds")
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(study, Config(), __doc__)
