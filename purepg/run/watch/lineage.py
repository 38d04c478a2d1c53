"""A picture of population-based training: the hyperparameters of every member over time, and who copied whom."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from purepg.run.watch.style import COLOURS, GREY, LIGHT_GREY, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from purepg.run.watch.figure import Figure

BEST = COLOURS[1]  # the colour of the best member's ancestors
NOTE = "orange: the best member and its ancestors; a cross: a member is replaced by a copy of another"
BEND = 0.5  # the part of a round over which a copy's line leads from its parent to itself


def lineage_figure(
    hyper: Mapping[str, np.ndarray],
    returns: np.ndarray,
    parent: np.ndarray,
    held: np.ndarray,
    edges: np.ndarray,
    title: str,
    logarithmic: Sequence[str] = (),
) -> "Figure":
    """Draws a panel for each hyperparameter: a line for every member, which ends where the member is replaced, and
    begins anew at the member that it copies.

    The figure does not belong to pyplot. `figure.savefig(file, format="png")` writes it.

    Args:
      hyper: each `[H, R]`, the values in each of R rounds.
      returns: `[H, R]` mean return of the episodes that ended in the round, NaN where none did; the lines' colours.
      parent: `[H, R]` the member that was copied before the round, or the member itself.
      held: `[R]` the best member's ancestor in each round, and at last the best member.
      edges: `[R + 1]` environment steps of a member at the rounds' ends, from 0 on.
      logarithmic: the hyperparameters whose axis is logarithmic.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, to_rgba
    from matplotlib.ticker import EngFormatter

    from purepg.run.watch.figure import Figure

    figure = Figure(figsize=(9.5, 0.8 + 2.9 * len(hyper)), dpi=150, layout="constrained")
    known = returns[np.isfinite(returns)] if np.isfinite(returns).any() else np.zeros(1)
    colours = ScalarMappable(Normalize(known.min(), max(known.max(), known.min() + 1e-12)), "viridis")
    colour = colours.to_rgba(np.nan_to_num(returns, nan=known.min()))
    colour[~np.isfinite(returns)] = to_rgba(LIGHT_GREY)
    panels = figure.subplots(len(hyper), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, value) in zip(panels, hyper.items(), strict=True):
        if name in logarithmic:
            axes.set_yscale("log")
        _draw(axes, value, colour, parent, held, edges)
        dress(axes, name, NOTE if axes is panels[0] else "")
        axes.set_xlim(0, edges[-1])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[-1].set_xlabel("environment steps of each member")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    bar = figure.colorbar(colours, ax=list(panels), fraction=0.03, pad=0.01)
    bar.set_label("mean return of the episodes that ended in the round", color=GREY, fontsize=9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def _draw(
    axes: "Axes", value: np.ndarray, colour: np.ndarray, parent: np.ndarray, held: np.ndarray, edges: np.ndarray
) -> None:
    """Draws the members' lines over one hyperparameter, and above them those of the best member's ancestors."""
    from matplotlib.collections import LineCollection

    H, R = value.shape
    lines: Any = [[(edges[r], value[h, r]), (edges[r + 1], value[h, r])] for h in range(H) for r in range(R)]
    axes.add_collection(LineCollection(lines, colors=colour.reshape(H * R, 4), linewidths=1.8, zorder=2))
    for h, r in zip(*np.nonzero(parent != np.arange(H)[:, None]), strict=True):
        bend = edges[r] - BEND * (edges[r] - edges[r - 1])
        axes.plot(
            [bend, edges[r]], [value[parent[h, r], r - 1], value[h, r]], color=LIGHT_GREY, linewidth=0.8, zorder=1
        )
        axes.plot(edges[r], value[h, r - 1], "x", color=GREY, markersize=4, markeredgewidth=0.8, zorder=3)
    bends = edges[1:] - BEND * np.diff(edges) * np.append(held[1:] != held[:-1], False)
    path = [at for r, h in enumerate(held) for at in ((edges[r], value[h, r]), (bends[r], value[h, r]))]
    axes.plot(*zip(*path, strict=True), color=BEST, linewidth=2.6, solid_capstyle="round", zorder=4)
    axes.autoscale_view()
