"""Statistics over seeds, as Agarwal et al. (2021), "Deep reinforcement learning at the edge of the statistical
precipice", recommend them: the interquartile mean, bootstrap intervals, performance profiles.

A stratum is the scores of one algorithm's seeds on one environment, `[S_k]`. Strata may differ in their numbers of
seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MAX_GROUPS = 8  # of a hyperparameter's values, in `importance`


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean: the mean of what remains without the lowest and the highest quarter.

    It is `scipy.stats.trim_mean(x, 0.25)`, which drops `floor(n / 4)` of `n` values at either end, without scipy.stats,
    which takes most of a second to import. A NaN makes the result NaN: if it were trimmed away, a seed without a value
    would count as one of the best.

    Args:
      x: `[..., n, ...]`, `n` along `axis`.
    Returns:
      `[..., ...]` float64.
    """
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    n = x.shape[-1]
    cut = n // 4
    middle = np.partition(x, (cut, n - cut - 1))[..., cut : n - cut] if n else x
    return np.where(np.isnan(x).any(axis=-1), np.nan, middle.mean(axis=-1))


def iqm_and_quartiles(x: np.ndarray) -> np.ndarray:
    """IQM, lower and upper quartile over the seeds that have a value.

    Args:
      x: `[S, G]`, NaN where a seed has no value.
    Returns:
      `[3, G]`, NaN where no seed has a value.
    """
    result = np.full((3, x.shape[1]), np.nan)
    num_known = np.isfinite(x).sum(axis=0)
    ordered = np.sort(x, axis=0)  # NaN last
    for num in np.unique(num_known[num_known > 0]):
        columns = num_known == num
        known = ordered[:num, columns]
        result[:, columns] = iqm(known, axis=0), *np.quantile(known, (0.25, 0.75), axis=0)
    return result


def optimality_gap(x: np.ndarray, target: float, axis: int = -1) -> np.ndarray:
    """mean(max(target - x, 0)): how far scores fall short of a target on average. Scores above it do not compensate."""
    return np.mean(np.maximum(target - np.asarray(x, np.float64), 0.0), axis=axis)


def performance_profile(x: np.ndarray, threshold: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of scores above each threshold, which is the empirical survival function.

    Args:
      x: `[..., n, ...]`, `n` along `axis`.
      threshold: `[K]`.
    Returns:
      `[K, ...]`.
    """
    x = np.asarray(x)
    return np.mean(x > np.asarray(threshold).reshape(-1, *[1] * x.ndim), axis=axis % x.ndim + 1)


def probability_of_improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for one seed of x and one of y, averaged over environments: Mann-Whitney's U / (n m).

    Args:
      x, y: a stratum for each environment, `[..., n_k, ...]` and `[..., m_k, ...]` along `axis`.
    Returns:
      `[..., ...]` in [0, 1].
    """
    from scipy import stats

    def of_one(x, y):  # the asymptotic p-value, which is not used, is the cheapest
        return stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / (x.shape[axis] * y.shape[axis])

    return np.mean([of_one(x_k, y_k) for x_k, y_k in zip(x, y, strict=True)], axis=0)


def importance(values: Sequence[Any], score: np.ndarray) -> float:
    """The share of the variance of the scores' ranks that one hyperparameter explains alone: eta squared of Kruskal and
    Wallis' H (Tomczak and Tomczak 2014), (H - k + 1) / (n - k) for n scores in k groups.

    It is 0 on average where they are independent (a negative value counts as 0), and sees an optimum inside a range as
    well as a trend. Each value is a group; of more numbers than about sqrt(n), groups of neighbours are of equal size.

    Args:
      values: `[n]` the hyperparameter of each setting: numbers, or anything with a text.
      score: `[n]`, finite.
    Returns:
      in [0, 1]; NaN for fewer than 4 settings, or where all values are equal, or all texts differ.
    """
    from scipy import stats

    n = len(score)
    if n < 4 or len(set(map(str, values))) < 2:
        return float("nan")
    most = min(round(n**0.5), MAX_GROUPS)
    if are_numbers(values) and len(set(values)) > most:
        group = np.argsort(np.argsort(values, kind="stable")) * most // n
    else:
        group = np.unique(list(map(str, values)), return_inverse=True)[1]
    k = group.max() + 1
    if k == n:
        return float("nan")
    if np.ptp(score) == 0:
        return 0.0
    h = stats.kruskal(*(score[group == g] for g in range(k))).statistic
    return float(np.clip((h - k + 1) / (n - k), 0, 1))


def are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def pooled(statistic: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a statistic of one sample into that of several strata put together, in which all seeds weigh the same.

    This is Agarwal et al.'s IQM, but not their median, which is that of the environments' means.
    """
    return lambda *strata, axis=-1: statistic(np.concatenate(strata, axis=axis), axis=axis)


def bootstrap_interval(
    *strata: np.ndarray,
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """The percentile bootstrap's confidence interval of a statistic over seeds. Equal arguments give equal numbers.

    It draws what `scipy.stats.bootstrap` draws.

    Args:
      strata: each `[S_k]` a value per seed. Each is resampled on its own, as differences between environments are not
        due to chance.
      statistic: `statistic(*strata, axis=...)` reduces that axis, as `np.mean` and `iqm` do for one stratum and
        `pooled(iqm)` for several.
    Returns:
      (lo, hi), floats, or arrays where the statistic is `[K, ...]`. Both are NaN if a stratum has fewer than two seeds
      or a value that is not finite.
    """
    samples = [np.asarray(x, np.float64) for x in strata]
    if any(len(x) < 2 or not np.isfinite(x).all() for x in samples):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    resampled = statistic(*(x[rng.integers(0, len(x), (num_resamples, len(x)))] for x in samples), axis=-1)
    lo, hi = np.quantile(resampled, ((1 - confidence) / 2, (1 + confidence) / 2), axis=-1)
    return lo, hi


def mean_interval(x: np.ndarray, axis: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and Student's t interval, mean +- t_{n-1} * s / sqrt(n), of the finite values along an axis.

    It is cheap enough for every metric of every update.

    Args:
      x: `[..., n, ...]`, `n` along `axis`.
    Returns:
      (mean, lo, hi), each `[..., ...]` float64. The mean of no value is NaN, and so is the interval of fewer than two.
    """
    from scipy import special

    kept = np.isfinite(x)
    num = kept.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.sum(x, axis=axis, where=kept, dtype=np.float64) / num
        deviation = np.where(kept, x - np.expand_dims(mean, axis), 0.0)
        error = np.sqrt(np.square(deviation).sum(axis=axis) / (num - 1) / num)
        half = np.where(num > 1, special.stdtrit(num - 1, (1 + confidence) / 2) * error, np.nan)
    return mean, mean - half, mean + half


def rank(entry: Mapping[str, Any]) -> tuple[float, float]:
    """By this, settings of summary.json are sorted, the best last: trained longest, and of these the highest return."""
    iqm = entry["iqm"]
    return entry.get("stopped_at", np.inf), iqm if iqm is not None and np.isfinite(iqm) else -np.inf
