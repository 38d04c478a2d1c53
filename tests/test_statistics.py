"""The statistics over seeds, against hand-computed numbers and known coverage."""

import numpy as np
import pytest
from scipy import stats

from purepg.run.statistics import bootstrap_interval, iqm, mean_interval


def test_iqm_of_eight_values_is_the_mean_of_the_middle_four():
    assert iqm(np.array([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0])) == 3.5


def test_iqm_cuts_whole_values_only():
    # floor(6 / 4) = 1 off either end, and nothing off three values.
    assert iqm(np.array([0.0, 1.0, 2.0, 3.0, 4.0, 90.0])) == 2.5
    assert iqm(np.array([0.0, 1.0, 8.0])) == 3.0


def test_iqm_is_scipys_trimmed_mean_along_any_axis():
    x = np.random.default_rng(0).normal(size=(3, 17, 2)).astype(np.float32)
    np.testing.assert_array_equal(iqm(x, axis=1), stats.trim_mean(x.astype(np.float64), 0.25, axis=1))


def test_iqm_does_not_trim_a_nan_away():
    x = np.array([[1.0, 2.0, 3.0, np.nan], [1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_array_equal(iqm(x), [np.nan, 2.5])


def test_bootstrap_interval_of_the_mean_is_near_the_normal_one():
    x = np.random.default_rng(0).normal(size=400)
    lo, hi = bootstrap_interval(x, statistic=np.mean)
    half = 1.96 * x.std() / np.sqrt(400)
    np.testing.assert_allclose([lo, hi], [x.mean() - half, x.mean() + half], atol=0.01)


def test_bootstrap_interval_of_the_iqm_holds_it_and_narrows_with_less_confidence():
    x = np.random.default_rng(1).normal(size=16)
    lo, hi = bootstrap_interval(x)
    inner_lo, inner_hi = bootstrap_interval(x, confidence=0.5)
    assert x.min() < lo < inner_lo < iqm(x) < inner_hi < hi < x.max()


def test_bootstrap_interval_is_the_same_at_every_call_and_follows_its_seed():
    x = np.random.default_rng(2).normal(size=16)
    assert bootstrap_interval(x) == bootstrap_interval(x)
    assert bootstrap_interval(x) != bootstrap_interval(x, seed=1)


def test_bootstrap_interval_of_equal_values_is_that_value():
    assert bootstrap_interval(np.full(16, 500.0)) == (500.0, 500.0)


@pytest.mark.parametrize("x", [[], [3.0], [1.0, np.nan, 2.0], [1.0, np.inf, 2.0]])
def test_bootstrap_interval_is_nan_where_there_is_nothing_to_resample(x):
    assert np.isnan(bootstrap_interval(np.array(x))).all()


def test_mean_interval_is_students_t_over_the_finite_values():
    x = np.array([[1.0, 2.0, 6.0, np.nan], [1.0, 2.0, 6.0, 7.0]])
    mean, lo, hi = mean_interval(x, axis=1)
    for row, kept in enumerate(([1.0, 2.0, 6.0], [1.0, 2.0, 6.0, 7.0])):
        expected = stats.t.interval(0.95, len(kept) - 1, np.mean(kept), stats.sem(kept))
        np.testing.assert_allclose([mean[row], lo[row], hi[row]], [np.mean(kept), *expected], rtol=1e-12)


def test_mean_interval_of_one_value_has_a_mean_only_and_of_none_nothing():
    mean, lo, hi = mean_interval(np.array([[5.0, np.nan], [np.nan, np.nan]]), axis=1)
    np.testing.assert_array_equal(mean, [5.0, np.nan])
    assert np.isnan([lo, hi]).all()
