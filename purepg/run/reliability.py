"""Statistics over seeds: the interquartile mean and intervals that a handful of seeds can support.

A stratum is the scores of one algorithm's seeds in one environment, `[S_k]`; strata may differ in their numbers of
seeds.

References: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def iqm(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The interquartile mean: the mean of what is left when the lowest and the highest quarter are cut off.

    `scipy.stats.trim_mean(x, 0.25)`: of `n` values, `floor(n / 4)` are cut at either end and none is weighted by a
    fraction. A NaN makes the result NaN: trimming it away would pass a seed without a value for one of the best.

    Args:
      x: `[..., n, ...]`, `n` along `axis`.
    Returns:
      `[..., ...]` float64.
    """
    from scipy import stats

    x = np.asarray(x, np.float64)
    return np.where(np.isnan(x).any(axis=axis), np.nan, stats.trim_mean(x, 0.25, axis=axis))


def iqm_and_quartiles(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IQM, lower and upper quartile over the seeds that have a value.

    Args:
      x: `[S, G]`, NaN where a seed has none.
    Returns:
      (iqm, lower, upper), each `[G]`, NaN where no seed has a value.
    """
    result = np.full((3, x.shape[1]), np.nan)
    num_known = np.isfinite(x).sum(axis=0)
    ordered = np.sort(x, axis=0)  # NaN last
    for num in np.unique(num_known[num_known > 0]):
        columns = num_known == num
        known = ordered[:num, columns]
        result[:, columns] = iqm(known, axis=0), *np.quantile(known, (0.25, 0.75), axis=0)
    return result[0], result[1], result[2]


def optimality_gap(x: np.ndarray, target: float, axis: int = -1) -> np.ndarray:
    """How far the scores fall short of a target, on average; one above it does not make up for one below.

    mean(max(target - x, 0))
    """
    return np.mean(np.maximum(target - np.asarray(x, np.float64), 0.0), axis=axis)


def performance_profile(x: np.ndarray, threshold: np.ndarray, axis: int = -1) -> np.ndarray:
    """The share of scores above each threshold: the empirical survival function, of many resamples at once.

    Args:
      x: `[..., n, ...]`, `n` along `axis`.
      threshold: `[K]`.
    Returns:
      `[K, ...]`.
    """
    x = np.asarray(x)
    return np.mean(x > np.asarray(threshold).reshape(-1, *[1] * x.ndim), axis=axis % x.ndim + 1)


def probability_of_improvement(x: Sequence[np.ndarray], y: Sequence[np.ndarray], axis: int = -1) -> np.ndarray:
    """P(X > Y) + P(X = Y) / 2 for a seed of x and one of y, the mean over environments: Mann-Whitney's U / (n m).

    Args:
      x, y: a stratum for each environment, `[..., n_k, ...]` and `[..., m_k, ...]` along `axis`.
    Returns:
      `[..., ...]` in [0, 1].
    """
    from scipy import stats

    def of_one(x, y):  # the p-value is not looked at, and the asymptotic one is cheap
        return stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / (x.shape[axis] * y.shape[axis])

    return np.mean([of_one(x_k, y_k) for x_k, y_k in zip(x, y, strict=True)], axis=0)


def pooled(statistic: Callable[..., Any]) -> Callable[..., Any]:
    """A statistic of one sample as one of several strata put together; every seed has the same weight.

    So is Agarwal et al.'s IQM. Their median, not this one, is that of the environments' means: of one environment, the
    mean.
    """
    return lambda *strata, axis=-1: statistic(np.concatenate(strata, axis=axis), axis=axis)


def bootstrap_interval(
    *strata: np.ndarray,
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[Any, Any]:
    """The percentile bootstrap's confidence interval of a statistic over seeds; the same numbers at every call.

    Args:
      strata: each `[S_k]` a value per seed, resampled on its own: what differs from one environment to the next is not
        chance.
      statistic: `statistic(*strata, axis=...)` reduces that axis, as `np.mean` and `iqm` do for one stratum and
        `pooled(iqm)` for several.
    Returns:
      (lo, hi), floats, or arrays where the statistic is `[K, ...]`. Both are NaN where there is nothing to resample:
      fewer than two seeds in a stratum, or a value that is not finite.
    """
    from scipy import stats

    samples = [np.asarray(x, np.float64) for x in strata]
    if any(len(x) < 2 or not np.isfinite(x).all() for x in samples):
        return float("nan"), float("nan")
    result = stats.bootstrap(
        samples,
        statistic,
        n_resamples=num_resamples,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    lo, hi = result.confidence_interval
    return lo, hi


def mean_interval(x: np.ndarray, axis: int, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and Student's t interval of the finite values along an axis: cheap enough for every metric of every update.

        mean +- t_{n-1} * s / sqrt(n)

    Args:
      x: `[..., n, ...]`, `n` along `axis`; what is not finite is left out.
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
