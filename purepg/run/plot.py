"""Pictures of a run: learning curves, a line and a band per setting, and a heat map of a sweep over two fields."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from purepg.run.reliability import iqm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe and Ito's colours without black and yellow: told apart by colour-blind readers, and on white. Seven settings
# have a colour of their own; the next seven share them in another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6F4E37")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_POINTS = 500  # more updates than a line can show are averaged in windows, and the axis says so
MAX_INSIDE = 4  # settings whose legend still fits among the curves
MAX_COLOURED = 6  # more settings than this, and only the best stand out,
NUM_BEST = 5  # so many of them
LAST_PART = 0.1  # the part of a curve, from its end, whose mean says how good the setting is
MAX_LABEL = 40  # characters
GREY = "#555555"
LIGHT_GREY = "#BBBBBB"


def curves(
    file: Path | IO[bytes],
    metrics: Mapping[str, np.ndarray],
    labels: Sequence[str],
    title: str,
    metric: str = "episode_return",
) -> None:
    """Draws a PNG of a metric: per setting the IQM over seeds, and a band from the lower to the upper quartile.

    Of many settings, those that are highest at the end are drawn so, and the others as thin grey lines.

    Args:
      file: where to write it.
      metrics: each `[H, S, U]`; `metric` (NaN where an update has none) and `env_steps` (of one update; 0 or NaN once
        a member has stopped).
      labels: `[H]` the settings' names, as `setting_label` makes them or any other. A single setting has no legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    num_settings, num_seeds, num_updates = metrics[metric].shape
    window = -(-num_updates // MAX_POINTS)
    outside = num_settings > MAX_INSIDE
    names, labels = short_labels(labels)
    figure = Figure(figsize=(9.5 if outside else 7, 4.4), dpi=150, layout="constrained")  # no pyplot: no global state
    axes = figure.add_subplot()
    grids, bands = [], []
    for h in range(num_settings):
        grid, value = on_common_grid(metrics["env_steps"][h], metrics[metric][h], window)
        grids.append(grid)
        bands.append(over_seeds(value))
    shown = list(range(num_settings))
    if num_settings > MAX_COLOURED:
        shown = best([middle for middle, _, _ in bands])
    lines: dict[int, Line2D] = {}
    for h, (grid, (middle, lo, hi)) in enumerate(zip(grids, bands, strict=True)):
        marker = "o" if np.isfinite(middle).sum() == 1 else None  # a line through one point is invisible
        if h not in shown:
            lines[h] = axes.plot(grid, middle, color=LIGHT_GREY, marker=marker, markersize=3, linewidth=0.8, zorder=1)[
                0
            ]
            continue
        place = shown.index(h)
        colour, style = COLOURS[place % len(COLOURS)], LINE_STYLES[place // len(COLOURS) % len(LINE_STYLES)]
        label = labels[h] if np.isfinite(middle).any() else f"{labels[h]} (no value)"
        line = axes.plot(grid, middle, style, color=colour, marker=marker, linewidth=1.8, label=label, zorder=3)
        lines[h] = line[0]
        axes.fill_between(grid, lo, hi, color=colour, alpha=0.1 if outside else 0.2, linewidth=0, zorder=2)
    if not any(np.isfinite(middle).any() for middle, _, _ in bands):
        axes.text(0.5, 0.5, "no value in any update", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_yticks([])

    name = metric.replace("_", " ")
    axes.set_ylabel(name if window == 1 else f"{name} (mean of {window} updates)")
    axes.set_xlabel("environment steps per seed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(0, 1.01 * max(1.0, *(grid.max(initial=0) for grid in grids)))
    note = f"IQM over {num_seeds} seeds; band: lower to upper quartile" if num_seeds > 1 else "one seed"
    if len(shown) < num_settings:
        note += f"; in colour: the {len(shown)} of {num_settings} highest at the end"
    dress(axes, title, note)
    handles = [lines[h] for h in shown]
    if len(shown) < num_settings:
        grey = next(line for h, line in lines.items() if h not in shown)
        grey.set_label(f"the other {num_settings - len(shown)}")
        handles.append(grey)
    if outside:
        figure.legend(
            handles=handles,
            title=names,
            title_fontsize=8,
            loc="outside right center",
            alignment="left",
            frameon=False,
            fontsize=8,
        )
    elif num_settings > 1:
        axes.legend(handles=handles, title=names, alignment="left", frameon=False, fontsize=9)
    figure.savefig(file, format="png")


def best(curves: Sequence[np.ndarray], number: int = NUM_BEST) -> list[int]:
    """The curves that are highest at their ends, the highest first: by the mean of their last tenth. A curve without a
    value there is behind all others."""

    def at_end(curve: np.ndarray) -> float:
        last = curve[-max(1, round(LAST_PART * len(curve))) :]
        known = last[np.isfinite(last)]
        return float(known.mean()) if len(known) else -np.inf

    return sorted(range(len(curves)), key=lambda h: -at_end(curves[h]))[:number]


def short_labels(labels: Sequence[str]) -> tuple[str, list[str]]:
    """`learning_rate=0.001,gamma=0.95` and its like as the names that all have, said once, and each one's values.

    Returns:
      (names, labels): names are "" where the labels are of another kind; those are only cut where they are too long.
    """
    fields = [re.findall(r"(?:^|,)([\w.]+)=(.*?)(?=,[\w.]+=|$)", label) for label in labels]
    names = {tuple(name for name, _ in field) for field in fields}
    if len(names) != 1 or names == {()}:
        return "", [_cut(label) for label in labels]
    short = [", ".join(short_value(value) for _, value in field) for field in fields]
    if len(set(short)) < len(set(labels)):
        short = [", ".join(value for _, value in field) for field in fields]
    lines: list[str] = []
    for name in names.pop():
        if lines and len(lines[-1]) + len(name) < MAX_LABEL:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    return ",\n".join(lines), [_cut(label) for label in short]


def short_value(value: Any) -> str:
    """A swept value as a reader wants it: floats with three digits, widths as 64x64."""
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    text = str(value)
    if re.fullmatch(r"\([\d, ]+\)", text):
        return "x".join(re.findall(r"\d+", text))
    try:
        return text if re.fullmatch(r"-?\d+", text) else f"{float(text):.3g}"
    except ValueError:
        return text


def _cut(label: str) -> str:
    half = MAX_LABEL // 2 - 1
    return label if len(label) <= MAX_LABEL else f"{label[:half]}…{label[-half:]}"


def heatmap(file: Path | IO[bytes], settings: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draws a PNG of a sweep over two fields: the final evaluation of each pair of values, the highest in a frame.

    Args:
      settings: summary.json's: `hyperparameters`, two of them, `iqm` (NaN or None where there is none), and `finals`.
    Raises:
      ValueError: the settings are not those of a sweep over two fields.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    names = list(settings[0]["hyperparameters"])
    if len(names) != 2:
        raise ValueError(f"a heat map needs a sweep over two fields, and this is one over {len(names)}")
    values = [list(dict.fromkeys(_hashable(s["hyperparameters"][name]) for s in settings)) for name in names]
    across, up = (0, 1) if len(values[0]) >= len(values[1]) else (1, 0)  # wide rather than high
    cells = np.full((len(values[up]), len(values[across])), np.nan)
    for setting in settings:
        place = [known.index(_hashable(setting["hyperparameters"][n])) for n, known in zip(names, values, strict=True)]
        cells[place[up], place[across]] = np.nan if setting["iqm"] is None else setting["iqm"]
    num_rows, num_columns = cells.shape

    size = min(0.8, 24 / num_columns)  # of a cell, inches
    figure = Figure(
        figsize=(max(4.5, 1.6 + size * num_columns), 1.6 + 0.7 * size * num_rows), dpi=150, layout="constrained"
    )
    axes = figure.add_subplot()
    known = cells[np.isfinite(cells)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    scale = Normalize(low, high if high > low else low + 1)
    colours = colormaps["viridis"]
    axes.set_facecolor("#EEEEEE")  # where there is no value
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=scale, aspect="auto", origin="lower")
    largest = np.abs(known).max(initial=0)
    decimals = 0 if largest >= 100 else 1 if largest >= 10 else 2
    for (row, column), value in np.ndenumerate(cells):
        dark = np.isfinite(value) and np.dot(colours(scale(value))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = f"{value:.{decimals}f}" if np.isfinite(value) else "none"
        is_best = value == high > low
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=min(10, 72 * size / 6),
            fontweight="bold" if is_best else None,
        )
        if is_best:
            axes.add_patch(_frame(column, row))
    axes.set_xticks(range(num_columns), [short_value(v) for v in values[across]])
    axes.set_yticks(range(num_rows), [short_value(v) for v in values[up]])
    if max(len(short_value(v)) for v in values[across]) > 10 * size:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel(names[across])
    axes.set_ylabel(names[up])
    num_seeds = len(settings[0]["finals"])
    dress(axes, title, "final evaluation, " + (f"IQM over {num_seeds} seeds" if num_seeds > 1 else "one seed"))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(file, format="png")


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=2)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
