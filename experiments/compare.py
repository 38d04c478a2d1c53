"""Compares saved runs as Agarwal et al. (2021) recommend: interquartile mean, median, mean and optimality gap with
bootstrap intervals, performance profiles, and the probability that one run improves on another.
"""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from parts.compare import Strata, gather, ranges, stratify

from purepg.config import Seed
from purepg.run.pages import table
from purepg.run.reliability import (
    bootstrap_interval,
    iqm,
    optimality_gap,
    performance_profile,
    pooled,
    probability_of_improvement,
)
from purepg.run.study import Study, main
from purepg.run.watch.style import GREY, MAX_INSIDE, dress, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ALL_PAIRS = 8  # of more labels, the report has only the pairs with the first
NUM_THRESHOLDS = 201  # of a profile
BAND_RESAMPLES = 2000  # bootstrap resamples for a profile's band
SCORES = {
    "sampled": "final evaluation, actions sampled",
    "mode": "final evaluation with the policy's mode",
    "training": "mean of the last 100 training episodes",
}


@dataclass(frozen=True)
class Config:
    """What is compared, and by which scores.

    Attributes:
      runs: folders of runs, before any flag. Every setting of every run is a row.
      labels: comma-separated names of the runs. Runs that share a label are one algorithm on several environments.
        None: the folders' names.
      best: keep only the setting with the highest IQM of each run.
      scores: the final evaluation with sampled actions or with the policy's mode, or the last 100 training episodes.
      range: the returns that are normalised to 0 and 1. Repeat the flag for each environment; it is required to compare
        runs on several environments.
      target: the score below which the optimality gap counts. None: 1 for normalised scores, and no gap for returns.
      seed: seed of the bootstrap.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    labels: str | None = None
    best: bool = False
    scores: Literal["sampled", "mode", "training"] = "sampled"
    range: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="ENV=LOW,HIGH")] = ()
    target: float | None = None
    seed: Seed = 0


class Estimate(NamedTuple):
    """A number and its 95 % bootstrap interval, NaN where there is none."""

    value: float
    low: float
    high: float


class Pair(NamedTuple):
    """The probability that a seed of x scores higher than one of y, and a two-sided test's p (one environment only)."""

    x: str
    y: str
    probability: Estimate
    p: float | None


# --- statistics ---


def estimate(statistic: Callable[..., Any], strata: Strata, seed: int) -> Estimate:
    low, high = bootstrap_interval(*strata, statistic=statistic, seed=seed)
    return Estimate(float(statistic(*strata)), float(low), float(high))


def aggregates(strata: Strata, target: float | None, seed: int) -> dict[str, Estimate]:
    """IQM, median, mean and, given a target, optimality gap of one algorithm's scores."""
    statistics = {"IQM": iqm, "median": np.median, "mean": np.mean}
    if target is not None:
        statistics["optimality gap"] = partial(optimality_gap, target=target)
    return {name: estimate(pooled(statistic), strata, seed) for name, statistic in statistics.items()}


def profile(strata: Strata, threshold: np.ndarray, seed: int) -> np.ndarray:
    """The performance profile and the lower and upper end of its pointwise 95 % band, `[3, K]`."""
    statistic = pooled(partial(performance_profile, threshold=threshold))
    band = bootstrap_interval(*strata, statistic=statistic, num_resamples=BAND_RESAMPLES, seed=seed)
    value = statistic(*strata)
    return np.stack([value, *(np.broadcast_to(end, value.shape) for end in band)])


def improvement_of(algorithms: Mapping[str, Strata], x: str, y: str, seed: int) -> Pair:
    """The probability that x improves on y."""
    from scipy import stats

    first, second = algorithms[x], algorithms[y]

    def improvement(*strata, axis=-1):
        return probability_of_improvement(strata[: len(first)], strata[len(first) :], axis=axis)

    p = float(stats.mannwhitneyu(first[0], second[0]).pvalue) if len(first) == 1 else None
    return Pair(x, y, estimate(improvement, [*first, *second], seed), p)


# --- the report ---


def study(config: Config) -> Study:
    """Reads the runs and compares them."""
    rows, notes = gather(config.runs, config.labels, config.scores, config.best)
    envs = list(dict.fromkeys(row.env for row in rows))
    scale = ranges(config.range, envs)
    algorithms = stratify(rows, scale)
    target = 1.0 if scale and config.target is None else config.target

    single = {label: aggregates(strata, target, config.seed) for label, strata in algorithms.items()}
    labels = list(algorithms)
    pairs = [improvement_of(algorithms, x, y, config.seed) for i, x in enumerate(labels) for y in labels[i + 1 :]]
    scores = np.concatenate([score for strata in algorithms.values() for score in strata])
    margin = 0.02 * float(np.ptp(scores)) or 1.0
    threshold = np.linspace(scores.min() - margin, scores.max() + margin, NUM_THRESHOLDS)
    profiles = {label: profile(strata, threshold, config.seed) for label, strata in algorithms.items()}

    where = envs[0] if len(envs) == 1 else f"{len(envs)} environments"
    measure = f"{'normalised score' if scale else 'return'}, {where}"
    report, first_table = written(config, envs, scale, algorithms, single, pairs, notes)
    numbers = {
        "config": dataclasses.asdict(config),
        "environments": envs,
        "target": target,
        "scores": algorithms,
        "aggregates": {
            label: {name: number._asdict() for name, number in found.items()} for label, found in single.items()
        },
        "pairs": [pair._asdict() | {"probability": pair.probability._asdict()} for pair in pairs],
        "threshold": threshold,
        "profiles": profiles,
        "notes": notes,
    }
    return Study(report, numbers, draw(measure, single, threshold, profiles, pairs[: len(labels) - 1]), first_table)


def written(
    config: Config,
    envs: Sequence[str],
    scale: Mapping[str, tuple[float, float]],
    algorithms: Mapping[str, Strata],
    single: Mapping[str, Mapping[str, Estimate]],
    pairs: Sequence[Pair],
    notes: Sequence[str],
) -> tuple[str, str]:
    """The report: two tables and remarks that help to read them. Also returns the first table alone."""
    few = len(single) <= MAX_ALL_PAIRS
    pairs = pairs if few else pairs[: len(single) - 1]
    largest = max(abs(number.value) for found in single.values() for number in found.values())
    decimals = 3 if largest < 10 else 1

    def number(x: Estimate, decimals: int = decimals) -> str:
        interval = "" if math.isnan(x.low) else f" [{x.low:.{decimals}f}, {x.high:.{decimals}f}]"
        return f"{x.value:.{decimals}f}{interval}"

    def seeds(strata: Strata) -> str:
        sizes = list(map(len, strata))
        return str(sizes[0]) if len(sizes) == 1 else " + ".join(map(str, sizes))

    names = list(next(iter(single.values())))
    place = envs[0] if len(envs) == 1 else str(len(envs))
    lines = [
        [label, place, seeds(algorithms[label]), *(number(found[name]) for name in names)]
        for label, found in single.items()
    ]
    scaled = [f"{env} from {low:g} to {high:g}" for env, (low, high) in scale.items()]
    what = f"score: (return - low) / (high - low), {'; '.join(scaled)}" if scale else "return"
    first_table = table(["label", "environments", "seeds", *(f"{name} [95 %]" for name in names)], lines)
    parts = [f"{what}; {SCORES[config.scores]}", first_table]
    if pairs:
        with_p = len(envs) == 1
        header = ["X", "Y", "P(X > Y) [95 %]", *(["p-value"] if with_p else [])]
        lines = [
            [pair.x, pair.y, number(pair.probability, 3), *([f"{pair.p:.3g}"] if with_p else [])] for pair in pairs
        ]
        parts.append(table(header, lines))
    remarks = list(notes)
    if pairs:
        remarks.append(
            "Ties count half in P(X > Y)." + ("" if few else " The pairs without the first are in numbers.json.")
        )
    if any(x.probability.value in (0.0, 1.0) and not math.isnan(x.probability.low) for x in pairs):
        remarks.append("Where no two scores overlap, the interval of P(X > Y) has no width, however few the seeds are.")
    if any(len(score) < 2 for strata in algorithms.values() for score in strata):
        remarks.append("A single seed has no interval.")
    if "optimality gap" not in names:
        remarks.append("No optimality gap: returns need a target (--target).")
    if len(pairs) > 1 and len(envs) == 1:
        remarks.append(f"The p-values are those of {len(pairs)} two-sided Mann-Whitney tests, and are not corrected.")
    return "\n\n".join(parts + (["\n".join(remarks)] if remarks else [])), first_table


# --- the figure ---


def draw(
    measure: str,
    single: Mapping[str, Mapping[str, Estimate]],
    threshold: np.ndarray,
    profiles: Mapping[str, np.ndarray],
    pairs: Sequence[Pair],
) -> "Figure":
    """Three panels: aggregates, profiles, and the probability that the first label improves on each of the others."""
    from matplotlib.figure import Figure

    labels = [textwrap.fill(label.replace(",", ", "), 24) for label in single]
    looks = [look(i) for i in range(len(labels))]
    row = max(0.48, *(0.16 * (1 + label.count("\n")) for label in labels))  # inches
    figure = Figure(figsize=(13, max(3.8, 1.6 + row * len(labels))), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    def interval(axes: "Axes", i: int, x: Estimate, offset: float = 0.0, marker: str = "o", width: float = 3.0) -> None:
        (colour, style), y = looks[i], i + offset
        axes.plot([x.low, x.high], [y, y], style, color=colour, linewidth=width)
        axes.plot(x.value, y, marker, color=colour, markersize=5.5, markeredgecolor="white", markeredgewidth=0.6)

    for name, offset, marker, width in (("IQM", -0.22, "o", 3.0), ("median", 0.0, "D", 1.3), ("mean", 0.22, "s", 1.3)):
        for i, found in enumerate(single.values()):
            interval(left, i, found[name], offset, marker, width)
        left.plot([], [], marker, color=GREY, markersize=5.5, label=name)
    dress(left, "Aggregates", "95 % intervals, seeds resampled")
    left.set_xlabel(measure)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower left")

    with_band = len(labels) <= MAX_INSIDE  # more would cover each other; numbers.json has them
    for (value, low, high), (colour, style) in zip(profiles.values(), looks, strict=True):
        middle.step(threshold, value, style, where="post", color=colour, linewidth=1.6)
        if with_band:
            middle.fill_between(threshold, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    dress(middle, "Performance profiles", "share of seeds above tau" + ("; band: 95 %" if with_band else ""))
    middle.set_xlabel(f"tau ({measure})")
    middle.set_ylim(-0.02, 1.02)

    for i, pair in enumerate(pairs, start=1):
        interval(right, i, pair.probability)
    right.axvline(0.5, color=GREY, linewidth=0.9, linestyle=":")
    first = "first row" if pairs else "no other row"
    right.text(0.5, 0, first, ha="center", va="center", fontsize=9, color=GREY, backgroundcolor="white")
    dress(right, "Probability of improvement", "P(first row > this row), ties half; 95 % intervals")
    right.set_xlim(-0.02, 1.02)
    right.set_xlabel("probability")
    for axes in (left, right):
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    return figure


if __name__ == "__main__":
    main(study, Config(), __doc__)
