"""The results of a run: metrics, trained agents, summary and learning curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from purepg.run.lineage import best_members, round_returns
from purepg.run.load import Agent, choose, load
from purepg.run.loop import HostMetrics
from purepg.run.plan import Plan
from purepg.run.search import Uniform
from purepg.run.summary import Part, report
from purepg.run.tuning import settled
from purepg.run.watch.curves import curves_figure
from purepg.run.watch.lineage import lineage_figure
from purepg.run.watch.search import parallel_figure, search_figure
from purepg.train import guard
from purepg.types import UsageError

if TYPE_CHECKING:
    import pandas
    import xarray
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Results:
    """The results of a run of H settings, S seeds and at most U updates. `print` shows a table of the final returns.

    Attributes:
      name: the run's name in titles.
      metrics: every metric `[H, S, U]`, NaN after an agent's last update. `env_steps` counts the steps of one update.
      num_updates: `[H]` the largest number of updates that any seed of the setting made.
      summary: the contents of summary.json: statistics of the final evaluations, and which seeds diverged.
      lost: one line for each file that could not be written.
      winner: the results of the best setting on fresh seeds, after a search; else None.
    """

    plan: Plan
    name: str
    metrics: HostMetrics
    num_updates: np.ndarray
    summary: dict[str, Any]
    parts: Sequence[Part]
    lost: list[str]
    winner: "Results | None" = None

    @property
    def out(self) -> Path | None:
        """The folder that holds the results; None if nothing was written."""
        return self.plan.run.out

    @property
    def title(self) -> str:
        return f"{self.name} on {self.plan.run.env}"

    @property
    def labels(self) -> list[str]:
        """`[H]` names of the settings; of members whose values change, their numbers."""
        if self.plan.tuning:
            return [f"member {h}" for h in range(len(self.plan.settings))]
        return [setting.label or self.name for setting in self.plan.settings]

    @property
    def total_env_steps(self) -> np.ndarray:
        """`[H, S, U]` an agent's environment steps up to and including an update."""
        return np.nancumsum(self.metrics["env_steps"], axis=-1)

    @property
    def swept(self) -> dict[str, np.ndarray]:
        """The swept fields, each `[H]`."""
        settings = [setting.hyperparameters for setting in self.plan.settings]
        return {name: column([setting[name] for setting in settings]) for name in settings[0]}

    @property
    def interrupted(self) -> bool:
        return self.summary["interrupted"]

    @property
    def final_return(self) -> np.ndarray:
        """`[H, S]` mean return of each agent's final evaluation with sampled actions; NaN if it was not trained."""
        return np.array([entry["finals"] for entry in self.summary["settings"]], float)

    @property
    def final_return_of_mode(self) -> np.ndarray:
        """`[H, S]` as `final_return`, but with the policy's most probable actions."""
        return np.array([entry["mode"]["finals"] for entry in self.summary["settings"]], float)

    def agent(self, setting: int | None = None, seed: int | None = None, best: bool = False) -> Agent:
        """A trained agent: environment, algorithm and state, as `purepg.run.load.load` returns them.

        Args:
          setting: position of the agent's setting in the sweep. None: the only one.
          seed: the agent's seed. None: the only one.
          best: choose the agent with the highest final evaluation, among those that match `setting` and `seed`.
        Raises:
          UsageError: no agent matches, or several do.
        """
        plan = self.plan
        if plan.run.out is not None:
            return load(plan.run.out, setting, seed, best, plan.env)
        finals = [entry["finals"] for entry in self.summary["settings"]] if best else None
        sizes = len(plan.settings), plan.run.num_seeds
        h, s = choose("the run", *sizes, setting, seed, finals)
        part = next((part for part in reversed(self.parts) if h in part.chunk.settings and s in part.chunk.seeds), None)
        if part is None:
            raise UsageError(f"the run was interrupted before it trained setting {h}, seed {s}")
        place = part.chunk.settings.index(h), part.chunk.seeds.index(s)
        state = jax.tree.map(lambda x: x[place], part.outcome.state)
        update = part.outcome.metrics["env_steps"].shape[-1]
        state, now = settled(state, plan.settings[h])
        algorithm = guard(plan.algorithm_of(h, now), plan.run.total_steps)
        return Agent(plan.env, algorithm, state, h, s, now.label, update)

    def dataset(self) -> "xarray.Dataset":
        """The metrics as an xarray Dataset over (setting, seed, update), with `final_return` and
        `final_return_of_mode` over (setting, seed). Swept fields are coordinates of `setting`. `total_env_steps`, an
        agent's environment steps up to and including an update, is a coordinate over all three axes.

        Raises:
          UsageError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise UsageError("dataset() needs xarray: pip install xarray") from None
        axes = ("setting", "seed", "update")
        num_settings, num_seeds, num_updates = self.metrics["env_steps"].shape
        finals = {"final_return": self.final_return, "final_return_of_mode": self.final_return_of_mode}
        return xarray.Dataset(
            {name: (axes, x) for name, x in self.metrics.items()} | {name: (axes[:2], x) for name, x in finals.items()},
            {
                "setting": np.arange(num_settings),
                "seed": np.arange(num_seeds),
                "update": np.arange(num_updates),
                "total_env_steps": (axes, self.total_env_steps),
                **{name: ("setting", values) for name, values in self.swept.items()},
            },
            {"title": self.title},
        )

    def frame(self) -> "pandas.DataFrame":
        """The metrics as a pandas DataFrame with one row for each update of each agent. The columns are `setting`, the
        swept fields, `seed`, `update`, `total_env_steps` and the metrics.

        Raises:
          UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError("frame() needs pandas: pip install pandas") from None
        h, s, u = np.nonzero(self.metrics["env_steps"] > 0)
        swept = {name: values[h] for name, values in self.swept.items()}
        total = self.total_env_steps[h, s, u]
        columns = {"setting": h, **swept, "seed": s, "update": u, "total_env_steps": total}
        return pandas.DataFrame(columns | {name: x[h, s, u] for name, x in self.metrics.items()})

    def plot(self, metric: str | None = None) -> "Figure":
        """Learning curves: each setting's IQM over seeds, with a band from the lower to the upper quartile.

        Args:
          metric: name of the metric, such as `info/score` of an environment with its own `score`. None: the first of
            episode_return, held_out_return and policy_loss that exists, with at most six of the environment's own
            metrics in small panels below.
        Raises:
          UsageError: there is no such metric.
        """
        nearest = (name for name in ("episode_return", "held_out_return", "policy_loss") if name in self.metrics)
        panels = () if metric else [f"info/{name}" for name in self.plan.env.metrics]
        return curves_figure(self.metrics, self.labels, self.title, metric or next(nearest, "finite"), panels)

    def plot_search(self) -> "Figure":
        """The final returns of a search against each of its fields, which of them matter, and the best settings."""
        return search_figure(self.summary, self.title, self.logarithmic)

    def plot_parallel(self) -> "Figure":
        """Parallel coordinates: each setting is a line over the fields, coloured by its final return."""
        return parallel_figure(self.summary["settings"], self.title, self.logarithmic)

    def plot_lineage(self, seed: int = 0) -> "Figure":
        """The hyperparameters of every member of population-based training over time, and who copied whom.

        Raises:
          UsageError: the run has none.
        """
        if self.plan.tuning is None:
            raise UsageError("there are no copies to draw: set pbt")
        every = self.plan.tuning.every
        metrics = {name: x[:, [seed]] for name, x in self.metrics.items()}
        of_rounds = {name: x[:, 0, ::every] for name, x in metrics.items()}
        num_updates = metrics["env_steps"].shape[-1]
        return lineage_figure(
            {name: of_rounds[f"hyper/{name}"] for name in self.swept},
            round_returns(metrics, every)[:, 0],
            of_rounds["parent"].astype(int),
            best_members(metrics, every).held[0, ::every],
            np.append(np.arange(0, num_updates, every), num_updates) * of_rounds["env_steps"][0, 0],
            f"{self.title}: population-based training, seed {seed}",
            self.logarithmic,
        )

    @property
    def logarithmic(self) -> list[str]:
        """The fields whose range in the search has a logarithmic scale."""
        return [name for name, values in self.plan.sweep.items() if isinstance(values, Uniform) and values.log]

    def __str__(self) -> str:
        return report(self.summary)

    def __repr__(self) -> str:
        return f"{self.title}\n{self}"


def column(values: Sequence[Any]) -> np.ndarray:
    """Swept values as a column: of numbers if all are, else of objects such as None or tuples of widths."""
    if all(isinstance(value, int | float) for value in values):
        return np.array(values)
    column = np.empty(len(values), object)
    column[:] = values
    return column
