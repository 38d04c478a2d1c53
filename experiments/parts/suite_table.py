"""The tables and the picture of experiments/suite.py, from the folders of its cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from parts.compare import number
from parts.suite_cells import Missing, named

from purepg.run.folder.config import read_config, read_summary
from purepg.run.folder.files import METRICS
from purepg.run.pages import table
from purepg.run.summary import short, with_interval
from purepg.run.watch.curves import Curve, curves_of
from purepg.run.watch.style import GREY, look, over_num_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3  # of the picture


class Score(NamedTuple):
    """A finished cell."""

    algorithm: str  # as it was asked for
    env: str
    trained: str  # the algorithm that was trained
    script: str
    iqm: float  # of the final returns with sampled actions
    interval: tuple[float, float]  # 95 % bootstrap
    mode: float  # IQM of the final returns with the policy's mode
    num_diverged: int
    env_steps: int  # of each seed
    seconds: float  # of training, without compilation
    curve: Curve


def read_score(folder: Path, algorithm: str, env: str) -> Score:
    """Reads a finished cell from its run's folder."""
    config, summary = read_config(folder), read_summary(folder)
    (setting,) = summary["settings"]
    with np.load(folder / METRICS) as stored:
        metrics = {name: stored[name] for name in ("episode_return", "env_steps")}
    (curve,) = curves_of(metrics, "episode_return")
    lo, hi, mode = (number(x) for x in (*setting["interval"], setting["mode"]["iqm"]))
    num_seeds = config["run"]["num_seeds"]
    return Score(
        *(algorithm, env, config["code"]["name"], config["script"], number(setting["iqm"]), (lo, hi), mode),
        *(len(setting["diverged"]), setting["env_steps"] // num_seeds, summary["run_seconds"], curve),
    )


def matrix(scores: Sequence[Score], envs: Sequence[str], algorithms: Sequence[str]) -> str:
    """A table with a row for each environment and a column for each algorithm: IQM and interval of the final return."""
    found = {(score.env, score.algorithm): score for score in scores}
    rows = [[env, *(_cell(found.get((env, algorithm))) for algorithm in algorithms)] for env in envs]
    return table(["environment", *algorithms], rows)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    return f"{with_interval(score.iqm, score.interval)}{_other(score)}"


def _other(score: Score) -> str:
    """The algorithm that was trained, where the label names another."""
    return f" ({score.trained})" if score.trained != named(score.algorithm)[0] else ""


def details(scores: Sequence[Score]) -> str:
    """A table with a row for each cell: with the policy's mode, steps, seconds, diverged seeds and the script."""
    header = ["environment", "algorithm", "with mode", "steps per seed", "seconds", "diverged", "settings of"]
    rows = [
        [
            *(score.env, score.algorithm + _other(score), short(score.mode)),
            *(f"{score.env_steps:,}", f"{score.seconds:.1f}"),
            *(str(score.num_diverged), f"{score.script}.py"),
        ]
        for score in scores
    ]
    return table(header, rows)


def page(
    scores: Sequence[Score], missing: Sequence[Missing], envs: Sequence[str], algorithms: Sequence[str], num_seeds: int
) -> str:
    """The Markdown of both tables, and a line for each missing cell."""
    title = f"Final return, IQM over {num_seeds} seeds [95 % bootstrap interval], actions sampled:"
    lines = [title, "", matrix(scores, envs, algorithms)]
    if scores:
        lines += ["", details(scores)]
    if missing:
        lines += ["", "Without a result:", "", *(f"- {x.algorithm} on {x.env}: {x.why}" for x in missing)]
    return "\n".join(lines)


def numbers(scores: Sequence[Score], missing: Sequence[Missing]) -> dict[str, Any]:
    """The contents of table.json."""
    kept: list[Mapping[str, Any]] = [score._asdict() for score in scores]
    return {
        "cells": [{name: x for name, x in score.items() if name != "curve"} for score in kept],
        "missing": [x._asdict() for x in missing],
    }


def picture(scores: Sequence[Score], algorithms: Sequence[str], num_seeds: int) -> "Figure":
    """Learning curves: a panel for each environment, a line for each algorithm."""
    from matplotlib.ticker import EngFormatter

    from purepg.run.watch.figure import Figure

    envs = list(dict.fromkeys(score.env for score in scores))
    columns = min(COLUMNS, len(envs))
    num_rows = -(-len(envs) // columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 0.8 + 2.6 * num_rows), dpi=150, layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    lines = {}
    for axes, env in zip(panels, envs, strict=False):
        for score in scores:
            if score.env == env:
                grid, middle, lower, upper = score.curve
                colour, style = look(list(algorithms).index(score.algorithm))
                (lines[score.algorithm],) = axes.plot(grid, middle, style, color=colour, linewidth=1.5)
                axes.fill_between(grid, lower, upper, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(env, loc="left", fontsize=10, fontweight="bold")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=GREY, labelcolor="black")
    for axes in panels[len(envs) :]:
        axes.set_visible(False)
    figure.supxlabel("environment steps per seed", fontsize=9)
    figure.supylabel("episode return", fontsize=9)
    band = "; band: lower to upper quartile" if num_seeds > 1 else ""
    figure.suptitle(over_num_seeds(num_seeds) + band, x=0.01, ha="left", fontsize=9, color=GREY)
    shown = [name for name in algorithms if name in lines]
    figure.legend([lines[x] for x in shown], shown, loc="outside upper right", ncols=6, frameon=False, fontsize=9)
    return figure
