"""The accuracy of a gradient estimator: bias, variance, signal to noise, cosine, and tests of unbiasedness.

An estimator is a function from a key to a gradient: a tree like the parameters, or a dict of such trees.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from purepg.types import Key, Params, UsageError


class Statistics(NamedTuple):
    """Statistics of K independent estimates, in float64. The D parameters are flattened.

    Attributes:
      exact: `[D]`, the exact gradient.
      mean, bias: `[D]`; bias = mean - exact.
      standard_error: `[D]`, of the mean and of the bias.
      variance: total variance of one estimate, the trace of its covariance.
      variance_error: standard error of `variance`.
      cosine: mean over the estimates of the cosine between an estimate and `exact`.
      length: |exact|.
      along, along_error: the mean's component along `exact`, equal to `length` if unbiased, and its standard error.
      num_samples: K.
      batch_size: as given by the caller.
    """

    exact: np.ndarray
    mean: np.ndarray
    bias: np.ndarray
    standard_error: np.ndarray
    variance: float
    variance_error: float
    cosine: float
    length: float
    along: float
    along_error: float
    num_samples: int
    batch_size: int

    @property
    def z(self) -> np.ndarray:
        """Bias in standard errors, `[D]`; 0 for parameters that never vary."""
        return _ratio(self.bias, self.standard_error)

    @property
    def z_along(self) -> float:
        return float(_ratio(self.along - self.length, self.along_error))

    @property
    def signal_to_noise(self) -> float:
        """|exact| / sqrt(variance)."""
        return float(self.length / np.sqrt(self.variance)) if self.variance else np.inf

    @property
    def direction(self) -> float:
        """Cosine between the mean and `exact`. Noise in the mean (squared length variance / K) lowers it a little."""
        return float(_ratio(self.mean @ self.exact, float(np.linalg.norm(self.mean) * np.linalg.norm(self.exact))))


def gradient_statistics(
    estimator: Callable[[Key, int], Params],
    exact: Params,
    key: Key,
    num_samples: int,
    batch_sizes: Sequence[int] = (1,),
    chunk: int = 1024,
) -> dict[int, Statistics]:
    """Returns an estimator's statistics for each batch size, each from `num_samples` keys in one compiled program.

    Args:
      estimator: `estimator(key, batch_size)` returns a gradient; `batch_size` is static.
      exact: the exact gradient, as the same tree.
      chunk: number of estimates computed at once; memory grows with it.
    """
    found = {}
    for n in batch_sizes:
        samples = sample(lambda key, n=n: estimator(key, n), jax.random.fold_in(key, n), num_samples, chunk)
        found[n] = statistics(samples, exact, n)
    return found


def sample(
    estimator: Callable[[Key], Any], key: Key, num_samples: int, chunk: int = 1024, jit: Callable = jax.jit
) -> Any:
    """Returns independent estimates from one compiled program, a tree of NumPy arrays `[num_samples, ...]`."""
    keys = jax.random.split(key, num_samples)
    estimates = jit(lambda keys: jax.lax.map(estimator, keys, batch_size=min(chunk, num_samples)))(keys)
    return jax.tree.map(np.asarray, estimates)


def statistics(samples: Params, exact: Params, batch_size: int = 1) -> Statistics:
    """Returns the statistics of given estimates.

    Args:
      samples: a tree of arrays `[K, ...]`.
      exact: the same tree without the first axis.
    Raises:
      UsageError: the trees differ, there are fewer than two estimates, or an estimate is not finite.
    """
    if jax.tree.structure(samples) != jax.tree.structure(exact):
        raise UsageError(
            f"an estimate must have the exact gradient's structure, {jax.tree.structure(exact)}, but has "
            f"{jax.tree.structure(samples)}"
        )
    g = flatten(samples)
    target = np.concatenate([np.ravel(x) for x in jax.tree.leaves(exact)], dtype=np.float64)
    K = len(g)
    if K < 2:
        raise UsageError(f"num_samples ({K}) must be at least 2")
    if not np.all(np.isfinite(g)):
        raise UsageError(f"{np.sum(~np.isfinite(g).all(axis=1))} of {K} estimates are not finite")
    mean, centred = g.mean(0), g - g.mean(0)
    square = np.sum(centred**2, axis=1) * K / (K - 1)
    length = float(np.linalg.norm(target))
    along = g @ target / length if length else np.zeros(K)
    norm = np.linalg.norm(g, axis=1)
    return Statistics(
        exact=target,
        mean=mean,
        bias=mean - target,
        standard_error=g.std(0, ddof=1) / np.sqrt(K),
        variance=float(square.mean()),
        variance_error=float(square.std(ddof=1) / np.sqrt(K)),
        cosine=float(np.mean(_ratio(along, norm))),
        length=length,
        along=float(along.mean()),
        along_error=float(along.std(ddof=1) / np.sqrt(K)),
        num_samples=K,
        batch_size=batch_size,
    )


def variance_change(samples: Params, reference: Params) -> tuple[float, float]:
    """Returns (difference, standard error) of the total variances of two estimators sampled with the same keys.

    Pairing detects far smaller differences than separate variances; it exposes wrong baselines that add no bias.
    """
    a, b = flatten(samples), flatten(reference)
    difference = np.sum((a - a.mean(0)) ** 2, axis=1) - np.sum((b - b.mean(0)) ** 2, axis=1)
    K = len(difference)
    return float(difference.sum() / (K - 1)), float(difference.std(ddof=1) / np.sqrt(K))


def flatten(samples: Params) -> np.ndarray:
    """Flattens a tree of arrays `[K, ...]` to one float64 array `[K, D]`."""
    leaves = jax.tree.leaves(samples)
    return np.concatenate([np.reshape(x, (len(x), -1)) for x in leaves], axis=1, dtype=np.float64)


class Verdict(NamedTuple):
    """The result of testing that an estimator's mean is `exact`.

    Attributes:
      max_z: the largest |z| among the parameters.
      p: the smallest p-value among the parameters, corrected for all tests made together (Holm 1979).
      unbiased: whether p is above the level, so that no bias was detected.
      detectable: the smallest bias, as a fraction of |exact|, that every one of its tests detects with at least the
        given power, at Holm's strictest level.
    """

    max_z: float
    p: float
    unbiased: bool
    detectable: float


def unbiasedness(named: Mapping[str, Statistics], level: float = 0.01, power: float = 0.9) -> dict[str, Verdict]:
    """Two-sided z-tests of all parameters of all estimators; the probability of any false alarm is at most `level`."""
    from scipy.stats import norm

    z = {name: np.abs(s.z[(s.standard_error > 0) | (s.bias != 0)]) for name, s in named.items()}
    p_value = 2 * norm.sf(np.concatenate(list(z.values())))
    adjusted = np.split(holm(p_value), np.cumsum([len(x) for x in z.values()]))
    factor = norm.isf(level / (2 * max(len(p_value), 1))) + norm.isf(1 - power)
    verdicts = {}
    for (name, s), p in zip(named.items(), adjusted, strict=False):
        smallest = float(p.min(initial=1.0))
        detectable = float(factor * s.standard_error.max(initial=0.0) / s.length) if s.length else np.inf
        verdicts[name] = Verdict(float(z[name].max(initial=0.0)), smallest, smallest > level, detectable)
    return verdicts


def holm(p: np.ndarray) -> np.ndarray:
    """Corrects p-values `[M]` for their number (Holm 1979): the k-th smallest times M - k + 1, made monotone."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(stepped, 1.0)[np.argsort(order)]


def _ratio(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    """a / b, with 0 / 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = np.asarray(a), np.asarray(b)
        return np.where((a == 0) & (b == 0), 0.0, a / b)
