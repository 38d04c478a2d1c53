"""The figure of experiments/softmax_convergence.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from purepg.run.watch.style import COLOURS, dress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.softmax_convergence import Curve, Row

FLOOR = 1e-11  # gaps below this are rounding: a gap is a difference of returns of order 10, with errors near 1e-14


def steps_above_floor(gap: np.ndarray) -> int:
    """The number of values before the first that is only rounding."""
    low = gap <= FLOOR
    return int(np.argmax(low)) if low.any() else len(gap)


def draw(parts: list[tuple[list[Row], list[Curve]]]) -> Figure:
    """Plots the gaps, with one panel for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    plain, entropy, natural = (curves for _, curves in parts)

    for curve, colour in zip(plain, COLOURS, strict=False):
        t = np.unique(np.geomspace(1, len(curve.gap) - 1, 300).astype(int))
        left.loglog(t, curve.gap[t], color=colour, linewidth=1.8, label=curve.label)
        left.loglog(t, curve.theory[t], "--", color="black", linewidth=0.9)
    dress(left, "Softmax policy gradient", "gap to the optimum; dashed: theory's c / t")
    left.set_xlabel("step t")
    left.legend(frameon=False, fontsize=9)

    for curve, colour in zip(entropy, COLOURS[1:], strict=False):
        t = np.arange(steps_above_floor(curve.gap))
        middle.semilogy(t, curve.gap[t], color=colour, linewidth=1.8, label=curve.label)
        middle.semilogy(t, curve.theory[t], "--", color="black", linewidth=0.9)
    dress(middle, "With entropy", "gap to the regularised optimum; dashed: theory's slope")
    middle.set_xlabel("step t")
    middle.legend(frameon=False, fontsize=9)

    gap, bound = natural
    t = np.arange(steps_above_floor(gap.gap))
    right.semilogy(t, bound.gap[t], color=COLOURS[0], linewidth=1.8, label="bound of order 1/T")
    right.semilogy(t, gap.gap[t], color=COLOURS[2], linewidth=1.8, label="gap")
    right.semilogy(t, gap.theory[t], "--", color="black", linewidth=0.9)
    dress(right, "Natural policy gradient", "gap to the optimum; dashed: theory's slope")
    right.set_xlabel("step T")
    right.legend(frameon=False, fontsize=9)
    return figure
