"""Learning curves: for each setting, a metric's IQM over seeds with a band between the quartiles."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from purepg.run.reliability import iqm_and_quartiles
from purepg.run.watch.style import GREY, LIGHT_GREY, MAX_INSIDE, dress, look, over_num_seeds, short_value
from purepg.types import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase, SubFigure
    from matplotlib.lines import Line2D

    from purepg.run.watch.figure import Figure

MAX_POINTS = 500  # of more updates, windows are averaged, and the axis says so
MAX_COLOURED = 6  # of more settings, only the best are drawn in colour,
NUM_BEST = 5  # so many of them
LAST_PART = 0.1  # a setting is as good as the mean over this last part of its curve
MAX_LABEL = 40  # characters
MAX_PANELS, PANELS_IN_A_ROW = 6, 3  # of further metrics
Curve = tuple[np.ndarray, ...]  # environment steps, IQM, lower and upper quartile, each `[G]`


def curves_figure(
    metrics: Mapping[str, np.ndarray],
    labels: Sequence[str],
    title: str,
    metric: str = "episode_return",
    panels: Sequence[str] = (),
) -> "Figure":
    """Draws a metric over environment steps. Of many settings, only those that end highest are coloured and named.

    The figure does not belong to pyplot. `figure.savefig(file, format="png")` writes it.

    Args:
      metrics: each `[H, S, U]`; `metric` (NaN where an update has none) and the `env_steps` of every update (0 or NaN
        once a member has stopped).
      labels: `[H]` the settings' names, from `label_of` or any others. A single setting needs no legend.
      metric: the name of the metric to draw.
      panels: names of further metrics, such as an environment's own, each drawn in a small panel below. Of more than
        `MAX_PANELS`, those that `most_changed` chooses.
    Raises:
      UsageError: the metrics do not have `metric`.
    """
    from purepg.run.watch.figure import Figure

    if metric not in metrics:
        raise UsageError(f"there is no metric {metric!r}; the run has {', '.join(sorted(metrics))}")
    num_settings = len(metrics[metric])
    curves = curves_of(metrics, metric)
    shown = best([curve[1] for curve in curves]) if num_settings > MAX_COLOURED else list(range(num_settings))
    below = {name: curves_of(metrics, name) for name in panels if name in metrics}
    chosen = most_changed(below) if len(below) > MAX_PANELS else list(below)

    width = 9.5 if num_settings > MAX_INSIDE or chosen else 7  # room for a legend beside the axes
    heights = [4.4, 0.4 + 1.8 * -(-len(chosen) // PANELS_IN_A_ROW)]
    figure = Figure(figsize=(width, sum(heights) if chosen else heights[0]), dpi=150, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights) if chosen else [figure]
    _draw_metric(parts[0], curves, labels, shown, title, metric, metrics[metric].shape)
    if chosen:
        which = f": the {len(chosen)} of {len(below)} that change most" if len(below) > len(chosen) else ""
        _draw_panels(parts[1], {name: below[name] for name in chosen}, shown, which)
    return figure


def curves_of(metrics: Mapping[str, np.ndarray], metric: str) -> list[Curve]:
    """The curve of each setting."""
    window = -(-metrics[metric].shape[-1] // MAX_POINTS)
    curves: list[Curve] = []
    for env_steps, value in zip(metrics["env_steps"], metrics[metric], strict=True):
        grid, on_grid = on_common_grid(env_steps, value, window)
        curves.append((grid, *iqm_and_quartiles(on_grid)))
    return curves


def most_changed(curves: Mapping[str, Sequence[Curve]], number: int = MAX_PANELS) -> list[str]:
    """The metrics that change most, in their own units, from the mean over the first tenth of a setting's curve to that
    over its last tenth, the most first. A metric without a value counts as constant.

    Rates, such as those of achievements, are between 0 and 1, so that scores and counts come before them.
    """

    def change(curve: Curve) -> float:
        known = curve[1][np.isfinite(curve[1])]
        part = max(1, round(LAST_PART * len(known)))
        return abs(float(known[-part:].mean() - known[:part].mean())) if len(known) else 0.0

    return sorted(curves, key=lambda name: -max(map(change, curves[name])))[:number]


def _draw_metric(
    figure: "FigureBase",
    curves: Sequence[Curve],
    labels: Sequence[str],
    shown: Sequence[int],
    title: str,
    metric: str,
    shape: tuple[int, ...],
) -> None:
    """Draws the large panel and its legend."""
    num_settings, num_seeds, num_updates = shape
    window = -(-num_updates // MAX_POINTS)
    axes = figure.add_subplot()
    names, short = short_labels(labels)
    lines = _draw(axes, curves, short, shown)
    name = metric.replace("_", " ")
    axes.set_ylabel(name if window == 1 else f"{name} (mean of {window} updates)")
    axes.set_xlabel("environment steps per seed")
    note = over_num_seeds(num_seeds) + ("; band: lower to upper quartile" if num_seeds > 1 else "")
    if len(shown) < num_settings:
        note += f"; in colour: the {len(shown)} of {num_settings} highest at the end"
    dress(axes, title, note)
    legend: Any = {"handles": lines, "title": names, "alignment": "left", "frameon": False}
    if num_settings > MAX_INSIDE:
        figure.legend(loc="outside right center", fontsize=8, title_fontsize=8, **legend)
    elif num_settings > 1:
        axes.legend(fontsize=9, **legend)


def _draw_panels(figure: "SubFigure", curves: Mapping[str, Sequence[Curve]], shown: Sequence[int], which: str) -> None:
    """Draws each metric's curves in a small panel, with the colours of the settings above."""
    num_rows = -(-len(curves) // PANELS_IN_A_ROW)
    panels = figure.subplots(num_rows, PANELS_IN_A_ROW, sharex=True, squeeze=False).ravel()
    for axes, (name, of_settings) in zip(panels, curves.items(), strict=False):
        _draw(axes, of_settings, [""] * len(of_settings), shown)
        axes.set_title(name.partition("/")[2].replace("_", " ") or name, loc="left", fontsize=9)
        axes.tick_params(labelsize=8, colors=GREY, labelcolor="black")
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(curves) :]:
        axes.set_visible(False)
    figure.suptitle(f"The environment's own metrics{which}", x=0.01, ha="left", fontsize=10, fontweight="bold")


def _draw(axes: "Axes", curves: Sequence[Curve], labels: Sequence[str], shown: Sequence[int]) -> "list[Line2D]":
    """Draws the curves, those in `shown` in colour and above the others. Returns a line per entry of the legend."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.01 * max(1.0, *(curve[0].max(initial=0) for curve in curves)))
    in_colour: dict[int, Line2D] = {}
    grey: list[Line2D] = []
    for h, (grid, middle, lower, upper) in enumerate(curves):
        has_value = np.isfinite(middle)
        marker = "o" if has_value.sum() == 1 else None  # a line through one point is invisible
        if h not in shown:
            grey += axes.plot(grid, middle, color=LIGHT_GREY, marker=marker, markersize=3, linewidth=0.8, zorder=1)
            continue
        colour, style = look(shown.index(h))
        label = labels[h] if has_value.any() else f"{labels[h]} (no value)"
        (line,) = axes.plot(grid, middle, style, color=colour, marker=marker, linewidth=1.8, label=label, zorder=3)
        in_colour[h] = line
        alpha = 0.1 if len(curves) > MAX_INSIDE else 0.2
        axes.fill_between(grid, lower, upper, color=colour, alpha=alpha, linewidth=0, zorder=2)
    if not any(np.isfinite(middle).any() for _, middle, _, _ in curves):
        axes.text(0.5, 0.5, "no value in any update", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])
    if grey:
        grey[0].set_label(f"the other {len(grey)}")
    return [in_colour[h] for h in shown] + grey[:1]


def best(curves: Sequence[np.ndarray], number: int = NUM_BEST) -> list[int]:
    """The curves that end highest, the highest first, by the mean over their last tenth. A curve without a value there
    comes after all others."""

    def at_end(curve: np.ndarray) -> float:
        last = curve[-max(1, round(LAST_PART * len(curve))) :]
        known = last[np.isfinite(last)]
        return float(known.mean()) if len(known) else -np.inf

    return sorted(range(len(curves)), key=lambda h: -at_end(curves[h]))[:number]


def short_labels(labels: Sequence[str]) -> tuple[str, list[str]]:
    """Splits labels such as `learning_rate=0.001,gamma=0.95` into the names, which all share, and each one's values.

    Returns:
      (names, labels): the legend's title and its entries. Labels of another form, or with names that differ, have an
      empty title; they are only shortened.
    """
    fields = [re.findall(r"(?:^|,)([\w.]+)=(.*?)(?=,[\w.]+=|$)", label) for label in labels]
    names = {tuple(name for name, _ in field) for field in fields}
    if len(names) != 1 or names == {()}:
        return "", [_cut(label) for label in labels]
    short = [", ".join(short_value(value) for _, value in field) for field in fields]
    if len(set(short)) < len(set(labels)):  # values that differ would look the same
        short = [", ".join(value for _, value in field) for field in fields]
    lines: list[str] = []
    for name in names.pop():
        if lines and len(lines[-1]) + len(name) < MAX_LABEL:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return ",\n".join(lines), [_cut(label) for label in short]


def _cut(label: str) -> str:
    half = MAX_LABEL // 2 - 1
    return label if len(label) <= MAX_LABEL else f"{label[:half]}…{label[-half:]}"


def on_common_grid(env_steps: np.ndarray, value: np.ndarray, window: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Interpolates one setting's curves to shared numbers of environment steps, as seeds' updates may differ in length.

    A seed has no value before its first one. After its last update it keeps its last value, so that the curve does not
    jump as seeds stop one by one.

    Args:
      env_steps: `[S, U]` environment steps of each update, 0 or NaN once a seed has stopped.
      value: `[S, U]` at the end of each update, NaN where there is none.
      window: the number of updates that are averaged into one, leaving NaN out.
    Returns:
      (grid `[G]`, value `[S, G]`): the environment steps so far, in increasing order.
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
    if len(grid) > value.shape[1]:  # the seeds' updates end at different steps
        grid = np.linspace(grid[0], grid[-1], value.shape[1])
    curve = np.full((num_seeds, len(grid)), np.nan)
    for s in range(num_seeds):
        known = num_kept[s] > 0
        if known.any():
            curve[s] = np.interp(grid, total[s, known], value[s, known], left=np.nan)
    return grid, curve
