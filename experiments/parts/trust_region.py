"""The figure of experiments/trust_region.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from purepg.run.watch.style import COLOURS, GREY, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.trust_region import Config, Result

KL_FLOOR = 1e-8  # smaller values are drawn at this height


def width_of(r: Result, scale: float = 1.0) -> str:
    return "none" if r.region is None else f"{'> ' if r.cut else ''}{scale * r.width:.2f}"


def draw(config: Config, results: Sequence[Result]) -> Figure:
    """Plots final return and KL against the step size, a column for each sweep; then learning curves and widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.8, 6.9), dpi=100, layout="constrained")
    upper, lower = (figure.add_subfigure(part) for part in figure.add_gridspec(2, 1, height_ratios=(1.75, 1)))
    panels = upper.subplots(2, len(results), sharex="col", sharey="row")
    for r, colour, (above, below) in zip(results, COLOURS, panels.T, strict=False):
        draw_return(above, config, r, colour)
        draw_kl(below, r, colour, legend=below is panels[1, 0])
    panels[0, 0].set_ylabel("final return")
    panels[1, 0].set_ylabel("KL per update, nats")
    left, right = lower.subplots(1, 2)
    draw_curves(left, results)
    draw_widths(right, results)
    return figure


def draw_return(axes: Axes, config: Config, r: Result, colour: str) -> None:
    axes.fill_between(r.step, *r.quartiles, color=colour, alpha=0.25, linewidth=0)
    axes.plot(r.step, r.middle, "o-", color=colour, linewidth=1.5, markersize=3.5)
    axes.axhline(config.solved, color="black", linewidth=0.7, linestyle=":")
    shade(axes, r, colour)
    centre, half = math.log10(r.step[0] * r.step[-1]) / 2, 2.6  # as many decades in every panel, so that widths compare
    axes.set_xscale("log")
    axes.set_xlim(10 ** (centre - half), 10 ** (centre + half))
    axes.set_xticks([10.0**i for i in range(-8, 8) if i % 2 == 0 and abs(i - centre) < half])
    axes.minorticks_off()
    axes.set_ylim(0, 520)
    axes.set_yticks((0, 250, 500))
    said = "nowhere solved" if r.region is None else f"solved: {width_of(r)} decades"
    dress(axes, r.sweep.name, said)


def draw_kl(axes: Axes, r: Result, colour: str, legend: bool) -> None:
    """Plots the median KL, a band from 5 to 95 %, and the largest.

    Args:
      legend: label the median and the largest; the bounds on the KL are always labelled.
    """
    low, middle, high, largest = np.maximum(r.kl, KL_FLOOR)
    axes.fill_between(r.step, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.plot(r.step, middle, "o-", color=colour, linewidth=1.5, markersize=3.5, label="median" if legend else None)
    axes.plot(r.step, largest, ":", color=colour, linewidth=1.5, label="largest" if legend else None)
    shade(axes, r, colour)
    if r.sweep.field == "max_kl":
        axes.plot(r.step, r.step, "--", color="black", linewidth=0.8, label="max_kl")
    if target_kl := getattr(r.sweep.config, "target_kl", None):
        axes.axhline(target_kl, linestyle="--", color="black", linewidth=0.8, label="target_kl")
    axes.set_yscale("log")
    axes.set_ylim(KL_FLOOR / 2, 1e4)
    axes.set_yticks([10.0**i for i in range(-8, 4, 2)])
    axes.minorticks_off()
    axes.set_xlabel(r.sweep.field)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=1.6, borderaxespad=0, labelspacing=0.2)
    dress(axes, "", "")


def shade(axes: Axes, r: Result, colour: str) -> None:
    """Shades the step sizes that solve the task."""
    if r.region is not None:
        axes.axvspan(*r.step[list(r.region)], color=colour, alpha=0.12, linewidth=0)


def draw_curves(axes: Axes, results: Sequence[Result]) -> None:
    from matplotlib.ticker import EngFormatter

    for r, colour in zip(results, COLOURS, strict=False):
        axes.plot(*r.curve, color=colour, linewidth=1.6)
    axes.set(xlabel="environment steps", ylabel="training return", ylim=(0, 520), xlim=(0, None))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    dress(axes, "At the best step size", "IQM over seeds, in windows of a fiftieth of the run; colours as above")


def draw_widths(axes: Axes, results: Sequence[Result]) -> None:
    names = []
    for y, (r, colour) in enumerate(zip(results, COLOURS, strict=False)):
        scale, field = r.sweep.lengths_per_decade, r.sweep.field
        width = 0.0 if r.region is None else r.width
        axes.barh(y, width, height=0.62, color=colour, alpha=0.25, linewidth=0)
        axes.barh(y, width * scale, height=0.62, color=colour, alpha=0.85, linewidth=0)
        axes.hlines(y, *r.interval, color="black", linewidth=1.0)
        names.append(f"{r.sweep.name}, {field}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel("decades of solved step sizes")
    dress(axes, "How far the step size may be off", "dark: in the step's length; line: 95 % interval, seeds resampled")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", colors=GREY, labelcolor="black", length=0)
