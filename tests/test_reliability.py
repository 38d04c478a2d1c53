"""The statistics over seeds, against hand-computed numbers and known coverage."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from purepg.run.reliability import (
    bootstrap_interval,
    iqm,
    iqm_and_quartiles,
    mean_interval,
    optimality_gap,
    performance_profile,
    pooled,
    probability_of_improvement,
)
from purepg.run.summary import with_interval


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


def test_one_seed_is_printed_without_an_interval_and_a_diverged_one_as_nothing():
    printed = [with_interval(float(iqm(x)), bootstrap_interval(x)) for x in np.array([[0.61], [np.nan]])]
    assert printed == ["0.610", ""]
    assert with_interval(3.11, (2.8, 3.44)) == "3.1 [2.8, 3.4]"


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


def test_bootstrap_interval_is_scipys():
    x = np.random.default_rng(3).normal(size=(2, 11))
    found = bootstrap_interval(*x, statistic=pooled(iqm), confidence=0.9, num_resamples=300, seed=4)
    options: Any = {"vectorized": True, "method": "percentile", "confidence_level": 0.9, "n_resamples": 300}
    expected = stats.bootstrap(list(x), pooled(iqm), **options, rng=np.random.default_rng(4)).confidence_interval
    np.testing.assert_allclose(found, expected, rtol=1e-12)


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


def test_iqm_and_quartiles_are_over_the_seeds_that_have_a_value():
    value = np.array([[np.nan, 1.0], [4.0, 2.0], [np.nan, 3.0], [6.0, 10.0], [8.0, np.nan]])
    value = np.concatenate([value, np.full((5, 1), np.nan)], axis=1)
    middle, lo, hi = iqm_and_quartiles(value)
    np.testing.assert_array_equal(middle, [6.0, 2.5, np.nan])
    np.testing.assert_array_equal(lo, [5.0, 1.75, np.nan])
    np.testing.assert_array_equal(hi, [7.0, 4.75, np.nan])


# --- several strata ---


def test_strata_are_resampled_each_on_its_own_and_keep_their_sizes():
    small, large = np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0, 40.0, 50.0])
    shapes = set()

    def statistic(x, y, axis):
        shapes.add((x.shape[axis], y.shape[axis]))
        assert np.isin(x, small).all() and np.isin(y, large).all()
        return np.mean(x, axis=axis) + np.mean(y, axis=axis)

    lo, hi = bootstrap_interval(small, large, statistic=statistic)
    assert shapes == {(3, 5)}
    assert 1 + 10 < lo < 2 + 30 < hi < 3 + 50


def test_a_difference_between_environments_is_not_chance():
    # No seed differs from another in its environment, so nothing is uncertain; resampled together, the mean would be.
    assert bootstrap_interval(np.zeros(4), np.ones(4), statistic=pooled(np.mean)) == (0.5, 0.5)


@pytest.mark.parametrize("statistic", [np.mean, iqm])
def test_the_stratified_interval_covers_the_truth_about_as_often_as_it_says(statistic):
    # Two environments, 30 seeds in each, symmetric around 0 and 4: the pooled mean and IQM are both 2. Resampled
    # without strata, the interval of the mean is 4.1 times as wide and covers it always.
    generator, covered, num = np.random.default_rng(3), 0, 400
    for _ in range(num):
        x, y = generator.normal(0, 0.5, 30), generator.normal(4, 0.5, 30)
        lo, hi = bootstrap_interval(x, y, statistic=pooled(statistic), num_resamples=500)
        covered += lo <= 2 <= hi
    assert 0.91 < covered / num < 0.98


def test_pooled_weighs_every_seed_the_same():
    assert pooled(np.mean)(np.array([0.0, 1.0]), np.array([5.0, 6.0, 8.0])) == 4.0
    x, y = np.random.default_rng(4).normal(size=(2, 3, 8))
    np.testing.assert_allclose(pooled(iqm)(x, y), stats.trim_mean(np.concatenate([x, y], axis=1), 0.25, axis=1))


@pytest.mark.parametrize("strata", [([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0, np.nan])])
def test_one_stratum_without_an_interval_leaves_none_for_all(strata):
    assert np.isnan(bootstrap_interval(*map(np.array, strata), statistic=pooled(np.mean))).all()


# --- optimality gap, profiles, improvement ---


def test_optimality_gap_counts_what_is_missing_and_not_what_is_beyond():
    x = np.array([[0.25, 0.5, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(optimality_gap(x, 1.0), [(0.75 + 0.5) / 4, 0.0])
    np.testing.assert_array_equal(optimality_gap(x, 2.0, axis=0), [0.875, 0.75, 0.0, 0.5])


def test_performance_profile_is_the_share_above_and_not_at_the_threshold():
    x = np.array([1.0, 2.0, 2.0, 4.0])
    np.testing.assert_array_equal(performance_profile(x, np.array([0, 1, 1.5, 2, 4])), [1, 0.75, 0.75, 0.25, 0])


def test_performance_profile_is_scipys_survival_function_along_any_axis():
    x = np.random.default_rng(5).integers(0, 9, size=(3, 11, 2)).astype(float)
    threshold = np.linspace(-1, 10, 23)
    found = performance_profile(x, threshold, axis=1)
    assert found.shape == (23, 3, 2)
    for i, j in np.ndindex(3, 2):
        np.testing.assert_allclose(found[:, i, j], stats.ecdf(x[i, :, j]).sf.evaluate(threshold), atol=1e-15)


def test_a_profile_has_an_interval_at_each_threshold():
    x = np.random.default_rng(6).uniform(size=400)
    lo, hi = bootstrap_interval(x, statistic=lambda x, axis: performance_profile(x, np.array([-1, 0.5, 2]), axis))
    np.testing.assert_array_equal([lo[0], hi[0], lo[2], hi[2]], [1, 1, 0, 0])
    share = np.mean(x > 0.5)
    half = 1.96 * np.sqrt(share * (1 - share) / 400)
    np.testing.assert_allclose([lo[1], hi[1]], [share - half, share + half], atol=0.01)


def test_improvement_is_a_half_on_oneself_one_when_separated_and_ties_count_half():
    x = np.random.default_rng(7).normal(size=9)
    assert probability_of_improvement([x], [x]) == 0.5
    assert probability_of_improvement([x + 100], [x]) == 1.0
    assert probability_of_improvement([x], [x + 100]) == 0.0
    assert probability_of_improvement([np.full(3, 500.0)], [np.full(5, 500.0)]) == 0.5
    # Of six pairs: 2 > 1 and 3 > 1, 3 > 2 and 2 = 2 count, 1 against 1 is a tie and 1 against 2 is lost.
    assert probability_of_improvement([np.array([1.0, 2.0, 3.0])], [np.array([1.0, 2.0])]) == (3 + 2 * 0.5) / 6


def test_improvement_is_the_mean_over_environments_whatever_their_numbers_of_seeds():
    x, y = [np.array([1.0, 1.0]), np.array([0.0] * 10)], [np.array([0.0]), np.array([0.0, 1.0])]
    assert probability_of_improvement(x, y) == (1 + 0.25) / 2
    many = np.random.default_rng(8).normal(size=(5, 10))
    by_hand = np.mean(many[:, :4, None] > many[:, None, 4:], axis=(1, 2))
    np.testing.assert_allclose(probability_of_improvement([many[:, :4]], [many[:, 4:]]), by_hand)
