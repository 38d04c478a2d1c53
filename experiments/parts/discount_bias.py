"""The figure of experiments/discount_bias.py."""

from typing import TYPE_CHECKING

import numpy as np

from purepg.run.watch.style import COLOURS, GREY, dress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    names: dict[bool, str], path: dict[bool, np.ndarray], mean: dict[bool, np.ndarray], returns: np.ndarray
) -> "Figure":
    """Plots p over updates: median and quartiles over the seeds, and the path if every update equalled its mean.

    Args:
      names: labels, keyed by `discount_states` like `path` and `mean`.
      returns: `[2, 2]`, J_.5 and J_1 at p = 0 and at p = 1.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    num_seeds, num_points = path[True].shape
    update = np.arange(num_points)
    for discounts, colour in zip(names, COLOURS, strict=False):
        lower, middle, upper = np.quantile(path[discounts], (0.25, 0.5, 0.75), axis=0)
        axes.fill_between(update, lower, upper, color=colour, alpha=0.25, linewidth=0)
        axes.plot(update, middle, color=colour, linewidth=1.8, label=names[discounts].replace("gamma^t", r"$\gamma^t$"))
        label = None if discounts else "if every update were its mean"
        axes.plot(update, mean[discounts], "--", color="black", linewidth=0.9, label=label)
    for p, (discounted, undiscounted) in zip((0.0, 1.0), returns, strict=True):
        text = f"p = {p:g}: $J_{{.5}}$ = {discounted:g}, $J_1$ = {undiscounted:g}"
        place, side = (p + 0.025, "bottom") if p else (p - 0.025, "top")
        axes.text(num_points - 1, place, text, ha="right", va=side, fontsize=9, color=GREY)
    axes.set(xlabel="update", ylabel="p, the probability of action 0", xlim=(0, num_points - 1), ylim=(-0.09, 1.09))
    axes.set_yticks(np.linspace(0, 1, 6))
    note = f"$\\gamma$ = 0.5; median over {num_seeds} seeds; band: lower to upper quartile"
    dress(axes, "REINFORCE on five aliased states", note)
    axes.legend(frameon=False, fontsize=9, loc="center right")
    return figure
