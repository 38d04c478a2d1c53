"""The tables and the figure of experiments/overoptimisation.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.tasks import Task, decode
from purepg.run.pages import table
from purepg.run.reliability import bootstrap_interval, iqm
from purepg.run.watch.style import COLOURS, GREY, dress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.overoptimisation import Config, RewardModel, Turn


def iqm_text(x: np.ndarray, digits: int = 2) -> str:
    lower, upper = bootstrap_interval(x)
    return f"{iqm(x):.{digits}f} ({lower:.{digits}f} to {upper:.{digits}f})"


def say_reward_models(c: Config, task: Task, found: RewardModel, at_start: np.ndarray, num_measured: int) -> str:
    return (
        f"{task.name}, up to {c.length} digits; the true reward is the share of correct columns. The clone's is "
        f"{np.mean(at_start):.3f} on held-out prompts\n"
        f"{c.num_seeds} seeds; IQM over seeds and its 95 % interval, here and below\n"
        f"pairs from {c.num_pairs} prompts with {c.num_candidates} responses each: {iqm_text(found.pairs, 0)}\n"
        f"ranked correctly by the reward model: {iqm_text(found.accuracy)} of the pairs for its training, and "
        f"{iqm_text(found.held_out_accuracy)} of the pairs from {num_measured} held-out prompts, two responses each, "
        "whose true rewards differ\n"
        f"its correlation with the true reward among the clone's responses to a prompt: {iqm_text(found.correlation)}"
    )


def say_turns(c: Config, turns: list[Turn]) -> str:
    header = ["kl_coef", "proxy at the end", "KL at the end", "highest after update", "KL there", "proxy there"]
    header += ["true there", "true at the end", "fall", "turned"]
    rows = []
    for kl_coef, t in zip(c.kl_coefs, turns, strict=True):
        rows.append([
            f"{kl_coef:g}",
            iqm_text(t.proxy[:, 1]),
            iqm_text(t.kl[:, 1]),
            f"{t.update}",
            f"{iqm(t.kl[:, 0]):.2f}",
            f"{iqm(t.proxy[:, 0]):.2f}",
            iqm_text(t.true[:, 0], 3),
            iqm_text(t.true[:, 1], 3),
            iqm_text(t.fall, 3),
            ("from the start" if t.update == 0 else "yes") if t.has_turned else "no",
        ])  # fmt: skip
    return (
        f"{c.num_updates} updates; values are means over {c.window} updates. Proxy: the learned reward, standardised "
        "so that the clone has mean 0 and, among responses to a prompt, deviation 1. True: the true reward on held-out "
        "prompts. Turned: the interval of the fall lies above 0\n"
        f"{table(header, rows)}"
    )


def page_table(c: Config, turns: list[Turn]) -> str:
    """The table of experiments/language_models.md."""
    header = ["kl_coef", "learned reward at the end, deviations", "KL at the end", "true reward at its highest"]
    header += ["at update", "at the end"]

    def interval(x: np.ndarray, digits: int) -> str:
        lower, upper = bootstrap_interval(x)
        return f"{iqm(x):.{digits}f} [{lower:.{digits}f}, {upper:.{digits}f}]"

    rows = []
    for kl_coef, t in zip(c.kl_coefs, turns, strict=True):
        highest, end = (interval(t.true[:, i], 3) for i in range(2))
        at_end = interval(t.proxy[:, 1], 2), f"{iqm(t.kl[:, 1]):.2f}"
        rows.append([f"{kl_coef:g}", *at_end, highest, f"{t.update}", "the same" if end == highest else end])
    return table(header, rows)


def say_answers(c: Config, task: Task, answers: np.ndarray) -> str:
    """The table of the first seed's responses, `[H, NUM_SHOWN, L + R]`."""
    L = task.prompt_length
    rows = []
    for n, row in enumerate(answers[0]):
        right = decode(task, task.demonstration(jax.random.key(0), jnp.asarray(row[:L])))
        rows.append([decode(task, row[:L]), right, *(decode(task, answers[h, n, L:]) for h in range(len(answers)))])
    header = ["prompt", "right", *(f"kl_coef {kl_coef:g}" for kl_coef in c.kl_coefs)]
    return f"The first seed's responses to held-out prompts after training\n{table(header, rows)}"


def draw(c: Config, kl: np.ndarray, proxy: np.ndarray, true: np.ndarray, turns: list[Turn]) -> Figure:
    """Plots both rewards at the least coefficient, then the true one at every coefficient; arrays are `[S, H, U]`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    distance = np.sqrt(iqm(kl, axis=0))
    update = np.arange(c.num_updates)

    def band(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str, t: Turn | None = None) -> None:
        lower, upper = np.quantile(y, (0.25, 0.75), axis=0)
        centre = iqm(y, axis=0)
        order = np.argsort(x)
        axes.fill_between(x[order], lower[order], upper[order], color=colour, alpha=0.13, linewidth=0)
        axes.plot(x, centre, color=colour, linewidth=1.8, label=label)
        if t is not None:
            face = colour if t.has_turned else "white"
            dot = {"markerfacecolor": face, "markeredgecolor": colour, "markeredgewidth": 2.0, "markersize": 8.0}
            axes.plot(x[t.update], centre[t.update], "o", zorder=5, clip_on=False, **dot)

    h = int(np.argmin(c.kl_coefs))
    gold, learned = COLOURS[0], COLOURS[1]
    band(left, distance[h], true[:, h], gold, "true reward", turns[h])
    left.axvline(distance[h][turns[h].update], color=GREY, linestyle="--", linewidth=0.9)
    left.margins(y=0.08)
    other = left.twinx()
    band(other, distance[h], proxy[:, h], learned, "learned reward")
    other.set_ylabel("learned reward, in the clone's deviations", color=learned)
    other.spines[["top", "left"]].set_visible(False)
    other.tick_params(colors=GREY, width=0.8, labelcolor="black")
    left.set_ylabel("true reward, held-out prompts", color=gold)
    dress(left, f"kl_coef {c.kl_coefs[h]:g}: the rewards part", "dashed: the true reward's turning point")

    for i, (kl_coef, t) in enumerate(zip(c.kl_coefs, turns, strict=True)):
        colour, label = COLOURS[i % len(COLOURS)], f"{kl_coef:g}"
        band(middle, distance[i], true[:, i], colour, label, t)
        band(right, update, true[:, i], colour, label, t)
    dress(middle, "True reward by distance", "from the clone; dots: highest, filled where it fell after")
    dress(right, "True reward by update", f"IQM of {c.num_seeds} seeds; bands: quartiles")
    for axes in (middle, right):
        axes.set_ylabel("true reward, held-out prompts")
    right.legend(title="kl_coef", frameon=False, fontsize=9)
    for axes in (left, middle):
        axes.set(xlabel=r"$\sqrt{\mathrm{KL}(\pi\,\|\,\mathrm{clone})}$", xlim=(0, None))
    right.set(xlabel="updates of GRPO", xlim=(0, c.num_updates))
    return figure
