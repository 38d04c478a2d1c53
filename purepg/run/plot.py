"""Learning curves: a line and a band per setting, over environment steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from purepg.run.statistics import iqm

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours without black and yellow: told apart by colour-blind readers, and on white. Seven settings
# have a colour of their own; the next seven share them in another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6F4E37")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_POINTS = 500  # more updates than a line can show are averaged in windows, and the axis says so
MAX_INSIDE = 4  # settings whose legend still fits among the curves
GREY = "#555555"


def curves(
    file: Path | IO[bytes],
    metrics: Mapping[str, np.ndarray],
    labels: Sequence[str],
    title: str,
    metric: str = "episode_return",
) -> None:
    """Draws a PNG of a metric: per setting the IQM over seeds, and a band from the lower to the upper quartile.

    Args:
      file: where to write it.
      metrics: each `[H, S, U]`; `metric` (NaN where an update has none) and `env_steps` (of one update; 0 or NaN once
        a member has stopped).
      labels: `[H]` the settings' names. A single setting has no legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    num_settings, num_seeds, num_updates = metrics[metric].shape
    window = -(-num_updates // MAX_POINTS)
    outside = num_settings > MAX_INSIDE
    figure = Figure(figsize=(9.5 if outside else 7, 4.4), dpi=150, layout="constrained")  # no pyplot: no global state
    axes = figure.add_subplot()
    end, has_value = 1.0, False
    for h, label in enumerate(labels):
        grid, value = on_common_grid(metrics["env_steps"][h], metrics[metric][h], window)
        middle, lo, hi = over_seeds(value)
        colour, style = COLOURS[h % len(COLOURS)], LINE_STYLES[h // len(COLOURS) % len(LINE_STYLES)]
        marker = "o" if np.isfinite(middle).sum() == 1 else None  # a line through one point is invisible
        axes.plot(grid, middle, style, color=colour, marker=marker, linewidth=1.8, label=label, zorder=3)
        axes.fill_between(grid, lo, hi, color=colour, alpha=0.1 if outside else 0.2, linewidth=0, zorder=2)
        end = max(end, grid.max(initial=0))
        has_value = has_value or np.isfinite(middle).any()
    if not has_value:
        axes.text(0.5, 0.5, "no value in any update", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])

    name = metric.replace("_", " ")
    axes.set_ylabel(name if window == 1 else f"{name} (mean of {window} updates)")
    axes.set_xlabel("environment steps per seed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.01 * end)
    note = f"IQM over {num_seeds} seeds; band: lower to upper quartile" if num_seeds > 1 else "one seed"
    dress(axes, title, note)
    if outside:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    elif num_settings > 1:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def dress(axes: "Axes", title: str, note: str) -> None:
    """What every picture here shares: a title, a line of explanation under it, thin axes and a faint grid."""
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(linewidth=0.8, color=GREY)
    axes.tick_params(colors=GREY, width=0.8, labelcolor="black")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.annotate(note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=GREY)


def on_common_grid(env_steps: np.ndarray, value: np.ndarray, window: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """One setting's curves at shared places, for where updates vary in length every seed has its own.

    Between its updates a seed's curve is interpolated; before its first value it has none, and after its last it keeps
    that one, so that the last stretch does not jump as seeds stop one by one.

    Args:
      env_steps: `[S, U]` environment steps of each update, 0 or NaN once a seed has stopped.
      value: `[S, U]` at the end of each update, NaN where there is none.
      window: how many updates are averaged into one, NaN left out.
    Returns:
      (grid `[G]`, value `[S, G]`): the environment steps so far, in order.
    """
    num_seeds, num_updates = value.shape
    padding = ((0, 0), (0, -num_updates % window))
    windows = (num_seeds, -1, window)
    steps = np.pad(np.nan_to_num(env_steps.astype(np.float64)), padding).reshape(windows)
    value = np.pad(value.astype(np.float64), padding, constant_values=np.nan).reshape(windows)
    kept = np.isfinite(value) & (steps > 0)
    num_kept = kept.sum(axis=-1)
    value = np.sum(value, axis=-1, where=kept) / np.maximum(num_kept, 1)
    total = np.cumsum(steps.sum(axis=-1), axis=-1)
    grid = np.unique(total[steps.any(axis=-1)])
    if len(grid) > value.shape[1]:  # the seeds' places differ
        grid = np.linspace(grid[0], grid[-1], value.shape[1])
    curve = np.full((num_seeds, len(grid)), np.nan)
    for s in range(num_seeds):
        known = num_kept[s] > 0
        if known.any():
            curve[s] = np.interp(grid, total[s, known], value[s, known], left=np.nan)
    return grid, curve


def over_seeds(value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM and quartiles over the seeds that have a value.

    Args:
      value: `[S, G]`, NaN where a seed has none.
    Returns:
      (iqm, lower quartile, upper quartile), each `[G]`, NaN where no seed has a value.
    """
    result = np.full((3, value.shape[1]), np.nan)
    num_known = np.isfinite(value).sum(axis=0)
    ordered = np.sort(value, axis=0)  # NaN last
    for num in np.unique(num_known[num_known > 0]):
        columns = num_known == num
        known = ordered[:num, columns]
        result[:, columns] = iqm(known, axis=0), *np.quantile(known, (0.25, 0.75), axis=0)
    return result[0], result[1], result[2]
