"""Running moments against numpy in float64; running returns against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.experience import normalize

SHAPE = (3,)


@pytest.fixture(scope="module")
def batches():
    """Of several sizes and leading axes, far from mean 0 and variance 1, and each unlike the others."""
    rng = np.random.default_rng(0)
    return [
        (rng.normal(size=(*lead, *SHAPE)) * [0.1, 5.0, 30.0] + [2.0 * i, -50.0, 200.0]).astype(np.float32)
        for i, lead in enumerate([(4, 5), (1, 1), (7,), (2, 3, 4), (100, 2)])
    ]


def test_merged_batches_equal_all_data_at_once(batches):
    moments = normalize.init(jnp.zeros(SHAPE))
    for i, batch in enumerate(batches):
        moments = normalize.update(moments, jnp.asarray(batch))
        assert moments is not None
        data = np.concatenate([x.reshape(-1, *SHAPE) for x in batches[: i + 1]]).astype(np.float64)
        np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moments.variance, data.var(0), rtol=1e-4, atol=1e-9)
        assert moments.num_samples == len(data)


def test_a_first_batch_owes_nothing_to_the_initial_moments(batches):
    moments = normalize.update(normalize.init(jnp.zeros(SHAPE)), jnp.asarray(batches[0]))
    assert moments is not None
    np.testing.assert_allclose(moments.variance, batches[0].astype(np.float64).var((0, 1)), rtol=1e-5)


def test_integer_and_boolean_observations_are_merged_by_value():
    for dtype, mean, variance in ((np.uint8, 200.0, 100.0**2 / 4), (bool, 0.5, 0.25)):
        batch = np.array([[150], [250]] if dtype is np.uint8 else [[False], [True]], dtype)
        moments = normalize.update(normalize.init(jnp.zeros(1, dtype)), jnp.asarray(batch))
        assert moments is not None
        np.testing.assert_allclose([moments.mean[0], moments.variance[0]], [mean, variance], rtol=1e-6)
        np.testing.assert_allclose(normalize.apply(moments, jnp.asarray(batch))[:, 0], [-1, 1], rtol=1e-5)


def test_before_any_data_observations_pass_through():
    x = jnp.array([0.5, -3.0, 9.0])
    np.testing.assert_allclose(normalize.apply(normalize.init(x), x), x, rtol=1e-6)


def test_applied_to_its_own_data_gives_mean_zero_and_variance_one(batches):
    data = jnp.asarray(batches[-1])
    x = normalize.apply(normalize.update(normalize.init(jnp.zeros(SHAPE)), data), data)
    np.testing.assert_allclose(x.mean((0, 1)), np.zeros(3), atol=1e-4)
    np.testing.assert_allclose(x.std((0, 1)), np.ones(3), rtol=1e-4)


def test_an_outlier_is_clipped_on_both_sides_and_a_constant_feature_is_not_blown_up():
    moments = normalize.init(0.0)._replace(mean=jnp.float32(1.0), variance=jnp.float32(4.0))
    assert normalize.apply(moments, jnp.array([1e6, -1e6, 3.0])).tolist() == [10.0, -10.0, 1.0]
    constant = normalize.update(normalize.init(jnp.zeros(1)), jnp.full((5, 1), 7.0))
    assert normalize.apply(constant, jnp.full((2, 1), 7.0)).tolist() == [[0.0], [0.0]]


def test_moments_of_a_tree_are_those_of_its_leaves(batches):
    trees = [{"a": x[..., :1], "b": (x[..., 1:],)} for x in map(jnp.asarray, batches)]
    whole = normalize.init(jnp.zeros(SHAPE))
    moments = normalize.init(jax.tree.map(lambda x: jnp.zeros(x.shape[-1]), trees[0]))
    for tree, batch in zip(trees, batches, strict=True):
        moments, whole = normalize.update(moments, tree), normalize.update(whole, jnp.asarray(batch))
    assert moments is not None
    assert whole is not None and moments.num_samples == whole.num_samples
    standardised = normalize.apply(moments, trees[-1])
    joined = jnp.concatenate([standardised["a"], standardised["b"][0]], axis=-1)
    np.testing.assert_array_equal(joined, normalize.apply(whole, jnp.asarray(batches[-1])))


def test_moments_neither_freeze_nor_drift_over_a_run_of_hundreds_of_millions_of_samples():
    """In batches of 50, float32 sums stop counting at 2^30 samples and are off by a per cent at 2e8."""
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.normal(3.0, 2.0, size=(64, 50)).astype(np.float32))
    num_batches = 4_000_000

    def merge(moments, i):
        return normalize.update(moments, batches[i % 64]), ()

    moments, _ = jax.jit(lambda x: jax.lax.scan(merge, x, jnp.arange(num_batches)))(normalize.init(0.0))
    data = np.asarray(batches, np.float64)
    np.testing.assert_allclose([moments.mean, moments.variance], [data.mean(), data.var()], rtol=1e-6)
    assert int(moments.num_samples) + int(moments.rest[2]) == 50 * num_batches

    # After 2^30 samples a thousand batches still count, and move the mean by their share.
    late = moments._replace(num_samples=jnp.float32(2**30))
    for _ in range(1000):
        late = jax.jit(normalize.update)(late, jnp.full(50, 7.0))
    assert int(late.num_samples) + int(late.rest[2]) == 2**30 + 50_000
    moved = float(late.mean - moments.mean) + float(late.rest[0] - moments.rest[0])
    np.testing.assert_allclose(moved, (7 - data.mean()) * 50_000 / (2**30 + 50_000), rtol=1e-3)


def test_none_passes_everything_through(batches):
    x = jnp.asarray(batches[0])
    assert normalize.update(None, x) is None
    assert normalize.apply(None, x) is x
    assert normalize.scale(None, x) is x
    carry, returns = normalize.running_return(None, x, x > 0, 0.9)
    assert carry is None
    assert returns is x


def test_rewards_are_scaled_and_not_centred():
    moments = normalize.init(0.0)._replace(mean=jnp.float32(100.0), variance=jnp.float32(25.0))
    np.testing.assert_allclose(normalize.scale(moments, jnp.array([0.0, 40.0, -5.0])), [0, 8, -1], rtol=1e-6)


def test_the_first_reward_after_a_rewardless_start_is_not_blown_up():
    """Sparse rewards: the first rollouts' returns are all 0, and so is their variance."""
    moments = normalize.update(normalize.init(0.0), jnp.zeros((128, 8)))
    assert abs(normalize.scale(moments, jnp.float32(1.0))) <= 10


def test_the_running_return_is_reset_after_it_is_used_at_an_episodes_end():
    rng, gamma = np.random.default_rng(1), 0.9
    reward = rng.normal(size=(12, 4)).astype(np.float32)
    ended = rng.random((12, 4)) < 0.3
    ended[[0, 5, 11], [0, 1, 2]] = True
    before = np.array([3.0, -1.0, 0.0, 2.0], np.float32)

    expected, running = np.zeros((12, 4)), before.astype(np.float64)
    for t in range(12):
        running = gamma * running + reward[t]
        expected[t] = running
        running = np.where(ended[t], 0.0, running)
    carry, returns = jax.jit(normalize.running_return)(before, reward, ended, gamma)
    np.testing.assert_allclose(returns, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(carry, running, rtol=1e-4, atol=1e-5)

    # Two rollouts of six steps, the second starting from the first one's carry, are one of twelve.
    carry, first = normalize.running_return(jnp.asarray(before), jnp.asarray(reward[:6]), jnp.asarray(ended[:6]), gamma)
    _, second = normalize.running_return(carry, jnp.asarray(reward[6:]), jnp.asarray(ended[6:]), gamma)
    np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=1e-4, atol=1e-5)
