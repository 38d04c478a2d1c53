"""The look that all figures share."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours without black and yellow: colour-blind readers can tell them apart, and they show on white.
# The first seven lines have a colour of their own; the next seven repeat the colours in another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6F4E37")
LINE_STYLES = ("-", "--", ":", "-.")
MAX_INSIDE = 4  # settings whose legend still fits among the curves
GREY = "#555555"
LIGHT_GREY = "#BBBBBB"


def look(i: int) -> tuple[str, str]:
    """The colour and the line style of the `i`-th line."""
    return COLOURS[i % len(COLOURS)], LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]


def dress(axes: "Axes", title: str, note: str) -> None:
    """Gives axes a title, a line of explanation under it, thin spines and a faint grid."""
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(linewidth=0.8, color=GREY)
    axes.tick_params(colors=GREY, width=0.8, labelcolor="black")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    axes.annotate(note, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=GREY)


def over_num_seeds(num_seeds: int) -> str:
    return f"IQM over {num_seeds} seeds" if num_seeds > 1 else "one seed"


def short_value(text: str) -> str:
    """A swept value for an axis or a legend: floats with three significant digits, layer widths as 64x64."""
    if re.fullmatch(r"[(\[][\d, ]+[)\]]", text):
        return "x".join(re.findall(r"\d+", text))
    try:
        return text if re.fullmatch(r"-?\d+", text) else f"{float(text):.3g}"
    except ValueError:
        return text
