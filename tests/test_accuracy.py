"""The laboratory's statistics, on samples of which everything is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from purepg.lab.accuracy import gradient_statistics, holm, sample, statistics, unbiasedness, variance_change
from purepg.types import UsageError

EXACT = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}


def noisy(mean, scale, num_samples=4000, seed=0):
    """Independent normal estimates, `mean` and `scale` by flattened parameter."""
    g = np.random.default_rng(seed).normal(mean, scale, size=(num_samples, 3))
    return {"a": g[:, :2], "b": g[:, 2:, None]}


def test_statistics_of_five_estimates_by_hand():
    g = np.array([[4.0, 0.0, 4.0], [2.0, 0.0, 4.0], [3.0, 1.0, 4.0], [3.0, -1.0, 4.0], [3.0, 0.0, 9.0]])
    s = statistics({"a": g[:, :2], "b": g[:, 2:, None]}, EXACT, batch_size=7)
    np.testing.assert_allclose(s.mean, [3, 0, 5])
    np.testing.assert_allclose(s.bias, [0, 0, 1])
    np.testing.assert_allclose(s.standard_error, np.sqrt([2 / 4 / 5, 2 / 4 / 5, 20 / 4 / 5]))
    np.testing.assert_allclose(s.z, [0, 0, 1])
    assert s.length == 5
    np.testing.assert_allclose(s.variance, (2 + 2 + 20) / 4)
    np.testing.assert_allclose(s.signal_to_noise, 5 / np.sqrt(6))
    np.testing.assert_allclose(s.along, np.mean(g @ [0.6, 0, 0.8]))
    np.testing.assert_allclose(s.along_error, np.std(g @ [0.6, 0, 0.8], ddof=1) / np.sqrt(5))
    np.testing.assert_allclose(s.cosine, np.mean(g @ [0.6, 0, 0.8] / np.linalg.norm(g, axis=1)))
    np.testing.assert_allclose(s.direction, (9 + 20) / (5 * np.sqrt(34)))
    np.testing.assert_allclose(s.z_along, 0.8 / s.along_error)
    assert (s.num_samples, s.batch_size) == (5, 7)


def test_the_errors_of_mean_and_variance_are_what_repetition_spreads_them_by():
    scale = np.array([1.0, 2.0, 0.5])
    many = [statistics(noisy([3, 0, 4], scale, 400, seed), EXACT) for seed in range(300)]
    np.testing.assert_allclose(np.std([s.mean for s in many], axis=0), many[0].standard_error, rtol=0.15)
    np.testing.assert_allclose(np.std([s.variance for s in many]), np.mean([s.variance_error for s in many]), rtol=0.15)
    np.testing.assert_allclose(np.mean([s.variance for s in many]), np.sum(scale**2), rtol=0.02)


def test_parameters_that_never_move_are_no_test():
    samples = noisy([3, 0, 4], [1, 0, 1])
    s = statistics(samples, EXACT)
    assert s.z[1] == 0
    assert unbiasedness({"still": s})["still"].unbiased
    moved = statistics(samples, EXACT | {"a": np.array([3.0, 1e-9])})
    assert np.isinf(moved.z[1])  # no noise could have made the difference
    assert not unbiasedness({"moved": moved})["moved"].unbiased


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, made monotone.
    np.testing.assert_allclose(holm(np.array([0.03, 0.01, 0.04, 0.02])), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9])), [1.0, 1.0])


def test_an_unbiased_family_is_called_biased_no_more_often_than_the_level():
    def rejects(seed):
        family = {str(i): statistics(noisy([3, 0, 4], 1, 200, 10 * seed + i), EXACT) for i in range(5)}
        return not all(v.unbiased for v in unbiasedness(family, level=0.1).values())

    rate = np.mean([rejects(seed) for seed in range(400)])
    assert 0.04 < rate < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 400)  # without a correction it would be .79


def test_the_detectable_bias_is_detected_with_the_power_it_says():
    clean = statistics(noisy([3, 0, 4], 1, 400), EXACT)
    verdict = unbiasedness({"clean": clean}, level=0.05, power=0.8)["clean"]
    size = verdict.detectable * clean.length
    np.testing.assert_allclose(size, (norm.isf(0.05 / 6) + norm.isf(0.2)) * clean.standard_error.max())

    def detects(seed):
        biased = statistics(noisy([3, size, 4], 1, 400, 1000 + seed), EXACT)
        return not unbiasedness({"biased": biased}, level=0.05)["biased"].unbiased

    assert 0.7 < np.mean([detects(seed) for seed in range(300)]) < 0.92


def test_paired_samples_show_a_change_of_variance_that_unpaired_ones_cannot():
    g = np.random.default_rng(0).normal(size=(2000, 3))
    reference = {"a": g[:, :2], "b": g[:, 2:, None]}
    less = jax.tree.map(lambda x: 0.995 * x, reference)
    change, error = variance_change(less, reference)
    np.testing.assert_allclose(change, (0.995**2 - 1) * statistics(reference, EXACT).variance)
    assert change / error < -50
    assert abs(change) < statistics(reference, EXACT).variance_error  # alone, the two cannot be told apart


def test_gradient_statistics_takes_each_batch_size_from_its_own_keys():
    def estimator(key, batch_size):
        noise = jax.random.normal(key, (batch_size, 3)).mean(0)
        return {"a": jnp.array([3.0, 0.0]) + noise[:2], "b": 4.0 + noise[None, 2:]}

    found = gradient_statistics(estimator, EXACT, jax.random.key(0), 20_000, (1, 4), chunk=3000)
    assert [s.batch_size for s in found.values()] == [1, 4]
    for batch_size, s in found.items():
        np.testing.assert_allclose(s.variance, 3 / batch_size, rtol=0.05)
    assert all(v.unbiased for v in unbiasedness({str(b): s for b, s in found.items()}).values())


def test_chunks_do_not_change_the_estimates():
    def draw(chunk):
        return sample(lambda key: jax.random.normal(key), jax.random.key(1), 10, chunk)

    np.testing.assert_array_equal(draw(10), draw(4))
    assert len(np.unique(draw(4))) == 10


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        ({"a": np.zeros((5, 2))}, "must have the exact gradient's structure"),
        ({"a": np.zeros((1, 2)), "b": np.zeros((1, 1, 1))}, "num_samples .1. must be at least 2"),
        ({"a": np.full((5, 2), np.nan), "b": np.zeros((5, 1, 1))}, "5 of 5 estimates are not finite"),
    ],
)
def test_samples_that_say_nothing_are_refused(samples, says):
    with pytest.raises(UsageError, match=says):
        statistics(samples, EXACT)
