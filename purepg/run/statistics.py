"""Statistics over seeds: the interquartile mean and intervals that a handful of seeds can support.

References: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice".
"""

from collections.abc import Callable
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


def bootstrap_interval(
    x: np.ndarray,
    statistic: Callable[..., Any] = iqm,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap's confidence interval of a statistic over seeds; the same numbers at every call.

    Args:
      x: `[S]` a value per seed.
      statistic: `statistic(x, axis=...)` reduces that axis, as `np.mean` and `iqm` do.
    Returns:
      (lo, hi). Both are NaN where there is nothing to resample: fewer than two seeds, or a value that is not finite.
    """
    from scipy import stats

    x = np.asarray(x, np.float64)
    if len(x) < 2 or not np.isfinite(x).all():
        return float("nan"), float("nan")
    result = stats.bootstrap(
        (x,),
        statistic,
        n_resamples=num_resamples,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    lo, hi = result.confidence_interval
    return float(lo), float(hi)


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
