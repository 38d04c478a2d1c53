"""A heat map of a sweep over two fields: the final evaluation for each pair of values."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from purepg.run.watch.style import COLOURS, dress, over_num_seeds, short_value
from purepg.types import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from purepg.run.watch.figure import Figure


def heatmap_figure(settings: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Draws the IQM of every setting's final evaluation and frames the highest.

    The figure does not belong to pyplot. `figure.savefig(file, format="png")` writes it.

    Args:
      settings: those of summary.json, with two `hyperparameters`, `iqm` (NaN or None where there is none) and `finals`.
    Raises:
      UsageError: the sweep is not over two fields.
    """
    from purepg.run.watch.figure import Figure

    names = list(settings[0]["hyperparameters"])
    if len(names) != 2:
        raise UsageError(f"a heat map needs a sweep over two fields, and this one is over {len(names)}")
    points = [tuple(str(setting["hyperparameters"][name]) for name in names) for setting in settings]
    values = [list(dict.fromkeys(column)) for column in zip(*points, strict=True)]
    across, up = (0, 1) if len(values[0]) >= len(values[1]) else (1, 0)  # wide rather than high
    cells = np.full((len(values[up]), len(values[across])), np.nan)
    for point, setting in zip(points, settings, strict=True):
        place = values[up].index(point[up]), values[across].index(point[across])
        cells[place] = np.nan if setting["iqm"] is None else setting["iqm"]
    num_rows, num_columns = cells.shape

    size = min(0.8, 24 / num_columns)  # of a cell, inches
    figsize = max(4.5, 1.6 + size * num_columns), 1.6 + 0.7 * size * num_rows
    figure = Figure(figsize=figsize, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_cells(axes, cells, fontsize=min(10, 72 * size / 6))
    labels = [list(map(short_value, column)) for column in values]
    axes.set_xticks(range(num_columns), labels[across])
    axes.set_yticks(range(num_rows), labels[up])
    if max(map(len, labels[across])) > 10 * size:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlabel(names[across])
    axes.set_ylabel(names[up])
    dress(axes, title, f"final evaluation, {over_num_seeds(len(settings[0]['finals']))}")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _draw_cells(axes: "Axes", cells: np.ndarray, fontsize: float) -> None:
    """Colours every cell by its value, writes the value into it, and frames the highest."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    known = cells[np.isfinite(cells)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    scale, colours = Normalize(low, high if high > low else low + 1), colormaps["viridis"]
    axes.set_facecolor("#EEEEEE")  # shows where there is no value
    axes.imshow(np.ma.masked_invalid(cells), cmap=colours, norm=scale, aspect="auto", origin="lower")
    largest = np.abs(known).max(initial=0)
    decimals = 0 if largest >= 100 else 1 if largest >= 10 else 2
    for (row, column), value in np.ndenumerate(cells):
        dark = np.isfinite(value) and np.dot(colours(scale(value))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = f"{value:.{decimals}f}" if np.isfinite(value) else "none"
        is_best = value == high > low
        style: Any = {"color": "white" if dark else "black", "fontweight": "bold" if is_best else None}
        axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, **style)
        if is_best:
            corner = column - 0.46, row - 0.46
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=COLOURS[1], linewidth=2))
