"""Pictures of a search: final returns against each of its fields, which fields matter, the best settings, and parallel
coordinates.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from purepg.run.reliability import are_numbers, importance, rank
from purepg.run.watch.style import COLOURS, GREY, LIGHT_GREY, dress, over_num_seeds, short_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from purepg.run.watch.figure import Figure

NUM_SHOWN = 10  # of the best settings
PANELS_IN_A_ROW = 4
FEW = 6  # so many different numbers are drawn as choices
BEST, FRESH = COLOURS[1], COLOURS[2]  # of the best setting: in the search, and on fresh seeds


class Field(NamedTuple):
    """The values of a hyperparameter in the settings, as places on an axis."""

    name: str
    place: np.ndarray  # [n] the numbers, or the positions of choices
    labels: Sequence[str]  # of choices, by position; empty for numbers, unless only a few differ
    ordered: bool  # whether the values are numbers
    log: bool
    importance: float

    @property
    def limits(self) -> tuple[float, float]:
        """The ends of an axis, with room for the points at its ends."""
        place = self.place if len(self.place) else np.ones(1)
        low, high = (f(np.log(place) if self.log else place) for f in (np.min, np.max))
        margin = 0.5 if self.labels else 0.06 * (high - low) or 0.5
        ends = np.array([low - margin, high + margin])
        return tuple(np.exp(ends) if self.log else ends)


class Scores(NamedTuple):
    """The settings that have a final return, the best last."""

    fields: Sequence[Field]
    labels: Sequence[str]  # [n] the values of each setting
    iqm: np.ndarray  # [n]
    interval: np.ndarray  # [n, 2], NaN where there is none
    num_seeds: int


def scores_of(settings: Sequence[Mapping[str, Any]], logarithmic: Sequence[str]) -> Scores:
    """The settings of summary.json as arrays, without those that have no final return."""
    kept = sorted((x for x in settings if x["iqm"] is not None and np.isfinite(x["iqm"])), key=rank)
    iqm = np.array([x["iqm"] for x in kept])
    interval = np.array([[np.nan if end is None else end for end in x["interval"]] for x in kept]).reshape(-1, 2)
    fields, texts = [], []
    for name in settings[0]["hyperparameters"]:
        values = [x["hyperparameters"][name] for x in kept]
        ordered, different = are_numbers(values), {str(value): value for value in values}
        few = not ordered or len(different) <= FEW < len(values)
        labels = sorted(different, key=different.__getitem__ if ordered else _in_order) if few else []
        place = np.array([labels.index(str(value)) for value in values] if few else values, float)
        names, log = [short_value(label) for label in labels], name in logarithmic and not few
        fields.append(Field(name, place, names, ordered, log, importance(values, iqm)))
        texts.append([short_value(str(value)) for value in values])
    return Scores(fields, [", ".join(x) for x in zip(*texts, strict=True)], iqm, interval, len(settings[0]["finals"]))


def _in_order(text: str) -> tuple[list[int], str]:
    """Sorts widths by their sizes, and words by the alphabet."""
    return [int(number) for number in re.findall(r"\d+", text)], text


def search_figure(summary: Mapping[str, Any], title: str, logarithmic: Sequence[str] = ()) -> "Figure":
    """Draws the final returns of a search against each field, which fields matter, and the best settings.

    The figure does not belong to pyplot. `figure.savefig(file, format="png")` writes it.

    Args:
      summary: the contents of summary.json, with at least one field in its settings; and `winner`, if it has one.
      logarithmic: the fields whose axis is logarithmic.
    """
    from purepg.run.watch.figure import Figure

    scores, winner = scores_of(summary["settings"], logarithmic), summary.get("winner")
    num_rows = -(-len(scores.fields) // PANELS_IN_A_ROW)
    columns = max(2, -(-len(scores.fields) // num_rows))
    num_bars = min(NUM_SHOWN, len(scores.iqm)) + (winner is not None)
    heights = [0.3 + 2.7 * num_rows, 1.5 + 0.24 * max(num_bars, len(scores.fields))]
    figure = Figure(figsize=(max(10.0, 3.0 * columns), 0.5 + sum(heights)), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    upper, lower = parts
    note = f"final return, {over_num_seeds(scores.num_seeds)}; orange: the highest"
    note += f"; green: the same setting on {len(winner['finals'])} fresh seeds" if winner else ""
    stopped = any("stopped_at" in x for x in summary["settings"])
    note += "; others when they were stopped" if stopped else ""
    upper.suptitle(note, x=0.01, ha="left", fontsize=9, color=GREY)
    panels = upper.subplots(num_rows, columns, sharey=True, squeeze=False).ravel()
    for axes, field in zip(panels, scores.fields, strict=False):
        _draw_field(axes, scores, field, winner)
    for axes in panels[len(scores.fields) :]:
        axes.set_visible(False)
    left, right = lower.subplots(1, 2, width_ratios=(1, 1.3))
    _draw_importance(left, scores)
    _draw_best(right, scores, winner)
    return figure


def _draw_field(axes: "Axes", scores: Scores, field: Field, winner: Mapping[str, Any] | None) -> None:
    """Draws every setting's final return, with its interval, over one field."""
    place = field.place
    if field.labels:  # settings of the same choice beside each other
        place = place - 0.3 + 0.6 * (0.618 * np.arange(len(place)) % 1)
        axes.set_xticks(range(len(field.labels)), list(field.labels))
    if field.log:
        axes.set_xscale("log")
    axes.set_xlim(*field.limits)
    if field.log and (ticks := _ticks(field)):  # those of matplotlib may lie upon each other
        axes.set_xticks(*map(list, zip(*ticks, strict=True)))
        axes.minorticks_off()
    axes.vlines(place, *scores.interval.T, color=LIGHT_GREY, linewidth=0.8, zorder=1)
    axes.scatter(place, scores.iqm, s=14, color=COLOURS[0], alpha=0.75, linewidth=0, zorder=2)
    if len(place):
        axes.scatter(place[-1], scores.iqm[-1], s=34, color=BEST, zorder=3)
        if winner:
            axes.scatter(place[-1], winner["iqm"], s=34, marker="D", color=FRESH, zorder=3)
    dress(axes, "", "")
    axes.set_title(field.name, loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(labelsize=8)


def _draw_importance(axes: "Axes", scores: Scores) -> None:
    """Draws a bar for each field, the most important first; of a numeric one with the sign of its trend."""
    from scipy import stats

    order = sorted(scores.fields, key=lambda field: -np.nan_to_num(field.importance))
    for y, field in enumerate(order):
        share = float(np.nan_to_num(field.importance))
        axes.barh(y, share, height=0.62, color=COLOURS[0], alpha=0.85, linewidth=0)
        said = f"{share:.2f}" if np.isfinite(field.importance) else "unknown"
        if field.ordered and len(scores.iqm) > 1 and min(np.ptp(field.place), np.ptp(scores.iqm)) > 0:
            rho: Any = stats.spearmanr(field.place, scores.iqm)
            said += f", trend {rho.statistic:+.2f}"
        axes.annotate(said, (share, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=GREY)
    axes.set_yticks(range(len(order)), [field.name for field in order], fontsize=8)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_xlim(0, 1.3)
    axes.set_xticks((0, 0.5, 1))
    dress(axes, "Which fields matter", "rank variance explained alone; trend: rho")
    _lie_down(axes)


def _draw_best(axes: "Axes", scores: Scores, winner: Mapping[str, Any] | None) -> None:
    """Draws the best settings with their intervals, and the winner's on fresh seeds."""
    rows = [
        (label, x, interval, "o", BEST if i == 0 else COLOURS[0])
        for i, (label, x, interval) in enumerate(
            zip(scores.labels[::-1], scores.iqm[::-1], scores.interval[::-1], strict=True)
        )
    ][:NUM_SHOWN]
    if winner:
        fresh = f"the first again, {len(winner['finals'])} fresh seeds"
        ends = [np.nan if end is None else end for end in winner["interval"]]
        rows.insert(0, (fresh, winner["iqm"], np.array(ends), "D", FRESH))
    for y, (_, x, interval, marker, colour) in enumerate(rows):
        axes.hlines(y, *interval, color=colour, linewidth=2.2, alpha=0.5)
        axes.plot(x, y, marker, color=colour, markersize=5)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    dress(axes, "The best settings", "fields as above" + ("; 95 % intervals" if scores.num_seeds > 1 else ""))
    _lie_down(axes)


def _lie_down(axes: "Axes") -> None:
    """Makes axes those of horizontal bars."""
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def parallel_figure(settings: Sequence[Mapping[str, Any]], title: str, logarithmic: Sequence[str] = ()) -> "Figure":
    """Draws each setting as a line over the fields, coloured by its final return, the best above the others.

    Args:
      settings, logarithmic: as for `search_figure`.
    """
    from matplotlib import colormaps

    from purepg.run.watch.figure import Figure

    scores = scores_of(settings, logarithmic)
    returns = Field("final return", scores.iqm, [], True, False, 1.0)
    fields = [*scores.fields, returns]
    figure = Figure(figsize=(max(6.0, 1.9 * len(fields)), 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    height = np.array([_height(field, field.place) for field in fields])  # [fields, n]
    colours = colormaps["viridis"]
    span = max(float(np.ptp(scores.iqm)), 1e-12) if len(scores.iqm) else 1.0
    for i, line in enumerate(height.T):  # the lowest first
        share = (scores.iqm[i] - scores.iqm[0]) / span
        axes.plot(line, color=colours(0.95 * share), alpha=0.25 + 0.65 * share, linewidth=0.8 + 1.4 * share)
    for x, field in enumerate(fields):
        axes.axvline(x, color=GREY, linewidth=0.8, zorder=0)
        for at, label in _ticks(field):
            axes.annotate(
                label,
                (x, float(_height(field, np.array([at]))[0])),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
            )
    axes.set_xticks(range(len(fields)), [field.name for field in fields], fontsize=9)
    axes.set_xlim(-0.4, len(fields) - 0.9)
    axes.set_ylim(0, 1)
    dress(axes, title, f"a line per setting; yellow: the highest final return, {over_num_seeds(scores.num_seeds)}")
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _height(field: Field, place: np.ndarray) -> np.ndarray:
    """Places of a field as heights in [0, 1]."""
    low, high = np.log(field.limits) if field.log else np.array(field.limits)
    return ((np.log(place) if field.log else place) - low) / (high - low)


def _ticks(field: Field) -> list[tuple[float, str]]:
    """Places of a field with their labels: of every choice, or of round numbers within the limits."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if field.labels:
        return list(enumerate(field.labels))
    low, high = field.limits
    decades = field.log and high / low > 100
    locator = LogLocator() if decades else LogLocator(subs=(1, 2, 5)) if field.log else MaxNLocator(5)
    return [(at, f"{at:.4g}") for at in locator.tick_values(low, high) if low <= at <= high]
