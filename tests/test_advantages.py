"""Weights of the policy gradient: by hand, by plain loops, by enumeration, and against each other."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.equations.advantages import (
    batch_mean,
    discount_power,
    discounted_return,
    gae,
    leave_one_out_mean,
    n_step,
    per_time_mean,
    standardise,
    td_error,
    td_target,
    total_return,
)
from purepg.equations.ratios import effective_sample_size, per_decision_ratio, segment_ratio, trajectory_ratio

T, N, GAMMA = 8, 6, 0.9
jit_gae = jax.jit(gae)
jit_n_step = jax.jit(n_step, static_argnums=6)


class Data(NamedTuple):
    """A rollout in the order of the estimators' arguments. Of numpy's arrays, which jax's functions take as well."""

    reward: Any
    value: Any
    next_value: Any
    terminated: Any
    truncated: Any


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_data(seed: int) -> Data:
    """Flags of every kind, both at once among them, at the first, the last and other steps.

    next_value is V of the next observation, and V of something else where a reset lies between.
    """
    rng = np.random.default_rng(seed)
    value, other, reward = rng.normal(size=(3, T, N)).astype(np.float32)
    terminated, truncated = rng.random((2, T, N)) < 0.25
    terminated[[0, -1], [0, 1]] = True
    truncated[[0, -1], [2, 3]] = True
    truncated[[0, -1], [0, 1]] = True
    terminated[[0, -1], [2, 3]] = False
    next_value = np.where(terminated | truncated, other, np.roll(value, -1, axis=0))
    next_value[-1] = other[-1]
    return Data(reward, value, next_value, terminated, truncated)


def n_step_target(data: Data, gamma: float, n: int) -> np.ndarray:
    """The n-step return by its definition: walk ahead until n steps are done or something ends."""
    target = np.zeros((T, N))
    for t, i in itertools.product(range(T), range(N)):
        for k in range(n):
            target[t, i] += gamma**k * data.reward[t + k, i]
            if data.terminated[t + k, i]:
                break
            if data.truncated[t + k, i] or k == n - 1 or t + k == T - 1:
                target[t, i] += gamma ** (k + 1) * data.next_value[t + k, i]
                break
    return target


def column(*x: float) -> np.ndarray:
    return np.array(x, np.float32)[:, None]


# gamma = lambda = 1/2, rewards 1, 2, 4, values 8, 16, 32; next_value is 64 wherever something ends. Where nothing does,
# the TD errors are 1, 2, 4. Columns: terminated, truncated, advantage.
HAND = {
    "nothing ends": ((0, 0, 0), (0, 0, 0), (1.75, 3, 4)),
    "terminated in the middle": ((0, 1, 0), (0, 0, 0), (-2.5, -14, 4)),
    "truncated in the middle": ((0, 0, 0), (0, 1, 0), (5.5, 18, 4)),
    "both in the middle": ((0, 1, 0), (0, 1, 0), (-2.5, -14, 4)),
    "terminated at the first step": ((1, 0, 0), (0, 0, 0), (-7, 3, 4)),
    "truncated at the first step": ((0, 0, 0), (1, 0, 0), (25, 3, 4)),
    "both at the first step": ((1, 0, 0), (1, 0, 0), (-7, 3, 4)),
    "terminated at the last step": ((0, 0, 1), (0, 0, 0), (-0.25, -5, -28)),
    "truncated at the last step": ((0, 0, 0), (0, 0, 1), (1.75, 3, 4)),
    "both at the last step": ((0, 0, 1), (0, 0, 1), (-0.25, -5, -28)),
}


def test_gae_by_hand():
    """All cases as the columns of one batch."""
    terminated, truncated, expected = (np.array(x).T for x in zip(*HAND.values(), strict=True))
    terminated, truncated = terminated.astype(bool), truncated.astype(bool)
    reward, value = (np.broadcast_to(column(*x), terminated.shape) for x in ((1, 2, 4), (8, 16, 32)))
    next_value = np.where(terminated | truncated, 64, column(16, 32, 64)).astype(np.float32)
    advantage, target = jit_gae(reward, value, next_value, terminated, truncated, 0.5, 0.5)
    for i, name in enumerate(HAND):
        np.testing.assert_array_equal(advantage[:, i], expected[:, i], err_msg=name)
    np.testing.assert_array_equal(target, expected + value)


@pytest.mark.parametrize("seed", range(3))
def test_gae_with_lambda_zero_is_the_td_error(seed):
    data = random_data(seed)
    advantage, _ = jit_gae(*data, GAMMA, 0.0)
    np.testing.assert_allclose(advantage, td_error(*data[:4], GAMMA), rtol=1e-5, atol=1e-6)
    bootstrap = np.where(data.terminated, 0, data.next_value)
    np.testing.assert_allclose(advantage, data.reward + GAMMA * bootstrap - data.value, rtol=1e-5, atol=1e-6)


def test_the_td_target_of_a_transition_is_its_reward_and_unless_it_terminated_the_discounted_next_value():
    """A batch from a replay buffer, without a time axis. A terminated state's value may be anything."""
    reward, next_value = jnp.array([1.0, 2.0, 3.0]), jnp.array([4.0, jnp.inf, -8.0])
    target = td_target(reward, next_value, jnp.array([False, True, False]), 0.5)
    np.testing.assert_array_equal(target, [3, 2, -1])


def test_gae_with_lambda_one_is_the_discounted_return_minus_value_where_episodes_end():
    """Episodes that end at steps 1, 4 and 7 by termination: every other value cancels, right or wrong."""
    reward, value = normal(0, 2, T, N)
    next_value = np.roll(value, -1, axis=0)
    terminated = np.zeros((T, N), bool)
    terminated[[1, 4, 7]] = True
    advantage, target = jit_gae(reward, value, next_value, terminated, np.zeros_like(terminated), GAMMA, 1.0)
    monte_carlo = np.zeros((T, N))
    for t in reversed(range(T)):
        monte_carlo[t] = reward[t] + (0 if terminated[t, 0] else GAMMA * monte_carlo[t + 1])
    np.testing.assert_allclose(advantage, monte_carlo - value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(target, monte_carlo, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_gae_is_the_average_of_n_step_advantages_with_weights_lambda_to_the_n(seed):
    """(1 - lambda) sum_n lambda^(n-1) A^(n), the tail beyond T included: GAE's definition (eq. 16), at any flags."""
    data, lam = random_data(seed), 0.7
    weight = [(1 - lam) * lam ** (n - 1) for n in range(1, T)] + [lam ** (T - 1)]
    expected = sum(w * (n_step_target(data, GAMMA, n) - data.value) for n, w in enumerate(weight, 1))
    np.testing.assert_allclose(jit_gae(*data, GAMMA, lam)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, T, T + 5])
def test_n_step_is_what_a_plain_loop_over_its_definition_gives(n):
    for seed in range(3):
        data = random_data(seed)
        advantage, target = jit_n_step(*data, GAMMA, n)
        expected = n_step_target(data, GAMMA, n)
        np.testing.assert_allclose(target, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(advantage, expected - data.value, rtol=1e-4, atol=1e-5)


def test_n_step_with_n_one_is_the_td_error_and_with_n_the_length_is_gae_with_lambda_one():
    data = random_data(7)
    np.testing.assert_allclose(jit_n_step(*data, GAMMA, 1)[0], td_error(*data[:4], GAMMA), rtol=1e-5, atol=1e-6)
    for n in (T, T + 5):
        for a, b in zip(jit_n_step(*data, GAMMA, n), jit_gae(*data, GAMMA, 1.0), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_shapes_and_flags_that_do_not_fit_raise():
    data = random_data(0)
    for estimator, num_fields in (
        (lambda d: gae(*d, gamma=GAMMA, lam=0.5), 5),
        (lambda d: n_step(*d, gamma=GAMMA, n=2), 5),
        (lambda d: td_error(*d[:4], gamma=GAMMA), 4),
    ):
        for field in Data._fields[:num_fields]:
            with pytest.raises(AssertionError):  # [T, N] against [T, N, 1] would broadcast to [T, T, N]
                estimator(data._replace(**{field: getattr(data, field)[..., None]}))
            if field in ("terminated", "truncated"):
                with pytest.raises(AssertionError):
                    estimator(data._replace(**{field: getattr(data, field).astype(np.float32)}))
    for field in ("reward", "next_value", "terminated"):
        bad = data._replace(**{field: getattr(data, field)[..., None]})
        with pytest.raises(AssertionError):
            td_target(bad.reward, bad.next_value, bad.terminated, GAMMA)
    with pytest.raises(AssertionError):
        td_target(data.reward, data.next_value, data.terminated.astype(np.float32), GAMMA)
    mask = data.terminated
    for returns in (discounted_return, total_return):
        with pytest.raises(AssertionError):
            returns(data.reward, mask[:, :1], GAMMA)
        with pytest.raises(AssertionError):
            returns(data.reward[..., None], mask[..., None], GAMMA)


# --- whole episodes ---

LENGTHS = np.array([8, 1, 3, 5, 8, 2])
MASK: Any = np.arange(T)[:, None] < LENGTHS


def test_returns_are_what_a_plain_loop_gives_and_zero_outside_the_mask():
    reward = normal(0, T, N)
    for final in (0 * normal(1, N), normal(1, N)):
        to_go, total = np.zeros((T, N)), np.zeros((T, N))
        for i, length in enumerate(LENGTHS):
            for t in range(length):
                to_go[t, i] = sum(GAMMA ** (k - t) * reward[k, i] for k in range(t, length))
                to_go[t, i] += GAMMA ** (length - t) * final[i]
            total[:length, i] = to_go[0, i]
        # What lies beyond an episode's end is nobody's reward.
        beyond = jnp.where(MASK, reward, 1e6)
        np.testing.assert_allclose(discounted_return(beyond, MASK, GAMMA, final), to_go, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(total_return(beyond, MASK, GAMMA, final), total, rtol=1e-4, atol=1e-5)


def test_the_total_return_is_the_discounted_sum_of_what_is_to_come_plus_what_has_been():
    """R = sum_{k<t} gamma^k r_k + gamma^t G_t, at every t: the two weights differ by what an action cannot change."""
    reward = normal(1, T, N)
    power = np.asarray(discount_power(MASK, GAMMA))
    past = np.cumsum(power * reward, axis=0) - power * reward
    rest = past + power * discounted_return(reward, MASK, GAMMA)
    np.testing.assert_allclose(total_return(reward, MASK, GAMMA)[MASK], rest[MASK], rtol=1e-4, atol=1e-5)


def test_discount_power_starts_at_one():
    np.testing.assert_allclose(discount_power(MASK, GAMMA)[:, 0], [GAMMA**t for t in range(T)], rtol=1e-5)
    assert discount_power(MASK, 0.0)[:, 0].tolist() == [1.0] + [0.0] * (T - 1)
    assert discount_power(MASK, 1.0)[:, 0].tolist() == [1.0] * T


def test_baselines_are_means_over_the_episodes_alive_and_no_others():
    weight = normal(2, T, N)
    outside = jnp.where(MASK, weight, 1e6)
    np.testing.assert_allclose(batch_mean(outside, MASK), weight[MASK].mean().reshape(1, 1), rtol=1e-5)
    leave_one_out, per_time = leave_one_out_mean(outside, MASK), per_time_mean(outside, MASK)
    for t in range(T):
        alive = np.flatnonzero(MASK[t])
        np.testing.assert_allclose(per_time[t, 0], weight[t, alive].mean(), rtol=1e-4, atol=1e-6)
        for i in alive:
            others = weight[t, alive[alive != i]]
            np.testing.assert_allclose(leave_one_out[t, i], others.mean() if len(others) else 0.0, rtol=1e-4, atol=1e-6)


def test_a_time_step_at_which_nobody_or_only_one_is_alive_has_finite_baselines():
    mask = jnp.array([[True, True], [True, False], [False, False]])
    weight = jnp.full((3, 2), 5.0)
    assert per_time_mean(weight, mask).tolist() == [[5.0], [5.0], [0.0]]
    assert leave_one_out_mean(weight, mask)[:2].tolist() == [[5.0, 5.0], [0.0, 5.0]]
    assert np.isfinite(leave_one_out_mean(weight, mask)).all()


def test_subtracting_the_group_mean_is_one_minus_one_over_n_of_leaving_one_out():
    weight, mask = normal(3, T, N), jnp.ones((T, N), bool)
    np.testing.assert_allclose(
        weight - per_time_mean(weight, mask),
        (1 - 1 / N) * (weight - leave_one_out_mean(weight, mask)),
        rtol=1e-4,
        atol=1e-6,
    )


LOGITS = jnp.array([0.2, -0.7, 1.1])
ARM_REWARD = jnp.array([2.0, -1.0, 0.5])
EXACT_GRADIENT = jax.grad(lambda logits: jax.nn.softmax(logits) @ ARM_REWARD)(LOGITS)


def expected_gradient(baseline, num_samples: int) -> jax.Array:
    """E[1/G sum_i (R_i - b_i) grad log pi(a_i)] over all K^G outcomes of G samples of a K-armed softmax bandit."""
    outcomes = jnp.array(list(itertools.product(range(3), repeat=num_samples)))
    probs = jax.nn.softmax(LOGITS)

    def estimate(arms):
        reward = ARM_REWARD[arms][None]  # one step, G episodes
        weight = (reward - baseline(reward, jnp.ones_like(reward, bool)))[0]
        score = jnp.eye(3)[arms] - probs
        return jnp.prod(probs[arms]) * jnp.mean(weight[:, None] * score, axis=0)

    return jax.vmap(estimate)(outcomes).sum(axis=0)


@pytest.mark.parametrize("num_samples", [2, 4])
def test_leave_one_out_is_unbiased_and_the_group_mean_gives_one_minus_one_over_g_of_the_gradient(num_samples):
    unbiased = expected_gradient(leave_one_out_mean, num_samples)
    np.testing.assert_allclose(unbiased, EXACT_GRADIENT, rtol=1e-4, atol=1e-6)
    for mean in (per_time_mean, batch_mean):
        shrunk = expected_gradient(mean, num_samples)
        np.testing.assert_allclose(shrunk, (1 - 1 / num_samples) * EXACT_GRADIENT, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [500.0, 0.1, -1e-3, 1e6, 0.0])
def test_standardise_makes_zeros_of_equal_weights(value):
    """In float32 the mean of seven times 0.1 is not 0.1."""
    for shape in ((7,), (7, 1), (5, 7)):
        weight = jnp.full(shape, value, jnp.float32)
        assert not np.asarray(standardise(weight)).any()
        assert not np.asarray(standardise(weight, jnp.ones(shape, bool).at[0].set(False))).any()


def test_standardise_gives_mean_zero_and_deviation_one_over_the_mask():
    weight = 100 + 3 * normal(4, T, N)
    outside = jnp.where(MASK, weight, 1e6)
    for x in (standardise(weight), np.asarray(standardise(outside, MASK))[MASK]):
        np.testing.assert_allclose([np.mean(x), np.std(x)], [0, 1], atol=1e-4)
    np.testing.assert_allclose(standardise(weight), (weight - weight.mean()) / weight.std(), rtol=1e-3, atol=1e-4)
    # Rewards of 0 and 1 with one success in a thousand are a signal, not rounding.
    assert np.std(standardise(jnp.zeros(1000).at[3].set(1.0))) > 0.99


# --- importance ratios ---


def test_ratios_are_products_over_the_whole_episode_or_up_to_a_step_and_one_outside_the_mask():
    log_prob, old_log_prob = -abs(normal(5, T, N)), -abs(normal(6, T, N))
    whole, so_far = np.ones((T, N)), np.ones((T, N))
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            so_far[t, i] = np.prod(np.exp(log_prob[: t + 1, i]) / np.exp(old_log_prob[: t + 1, i]))
        whole[:length, i] = so_far[length - 1, i]
    # What lies beyond an episode's end was decided by nobody.
    beyond = jnp.where(MASK, log_prob, 1e6)
    np.testing.assert_allclose(trajectory_ratio(beyond, old_log_prob, MASK), whole, rtol=1e-4)
    np.testing.assert_allclose(per_decision_ratio(beyond, old_log_prob, MASK), so_far, rtol=1e-4)


def test_an_episodes_ratio_has_mean_one_and_a_variance_that_grows_exponentially():
    """Two arms, (.7, .3) against (.5, .5), over all 2^H episodes: 1.16^H - 1, and 1.16^(t+1) - 1 up to step t."""
    action = np.array(list(itertools.product(range(2), repeat=10))).T
    log_prob, old_log_prob = jnp.log(jnp.array([0.7, 0.3]))[action], jnp.log(jnp.full(action.shape, 0.5))
    mask = jnp.ones(action.shape, bool)
    whole, so_far = (np.asarray(f(log_prob, old_log_prob, mask)) for f in (trajectory_ratio, per_decision_ratio))
    power = 1.16 ** np.arange(1, 11)
    np.testing.assert_allclose([whole.mean(1), so_far.mean(1)], np.ones((2, 10)), rtol=1e-5)
    np.testing.assert_allclose(whole.var(1), np.full(10, power[-1] - 1), rtol=1e-4)
    np.testing.assert_allclose(so_far.var(1), power - 1, rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_in_a_rollout_the_product_is_over_the_steps_of_one_episode_and_the_same_at_each(share):
    """Episodes that began before it, or outlast it, have the part that lies inside; some are of one step."""
    log_prob, old_log_prob = 0.5 * normal(8, T, N, 2), 0.5 * normal(9, T, N, 2)
    ended = np.random.default_rng(10).random((T, N, 2)) < share
    expected = np.zeros((T, N, 2))
    for i in np.ndindex(N, 2):
        begin = 0
        for t in range(T):
            if ended[(t, *i)] or t == T - 1:
                episode = (slice(begin, t + 1), *i)
                expected[episode] = np.prod(np.exp(log_prob[episode]) / np.exp(old_log_prob[episode]))
                begin = t + 1
    np.testing.assert_allclose(segment_ratio(log_prob, old_log_prob, ended), expected, rtol=1e-4)


def test_in_a_rollout_of_whole_episodes_it_is_their_ratio_and_where_each_step_is_an_episode_the_steps():
    log_prob, old_log_prob = normal(8, T, N), normal(9, T, N)
    never = jnp.zeros((T, N), bool)
    whole = trajectory_ratio(log_prob, old_log_prob, ~never)
    for ended in (never, never.at[-1].set(True)):
        np.testing.assert_allclose(segment_ratio(log_prob, old_log_prob, ended), whole, rtol=1e-4)
    ratio = np.exp(log_prob - old_log_prob)
    np.testing.assert_allclose(segment_ratio(log_prob, old_log_prob, ~never), ratio, rtol=1e-4)


def test_in_a_rollout_an_action_that_became_impossible_makes_its_episodes_ratio_zero_and_no_others():
    log_prob = jnp.array([-1.0, -jnp.inf, -2.0, -0.5])
    ended = jnp.array([False, False, True, False])
    ratio = segment_ratio(log_prob, jnp.full(4, -1.0), ended)
    np.testing.assert_allclose(ratio, [0, 0, 0, math.exp(0.5)], rtol=1e-6)


def test_the_effective_sample_size_is_the_share_of_samples_that_unequal_weights_leave():
    """All of them where the weights are equal, one of n where one has it all; their scale has no part in it."""
    for weight in (1.0, 0.01, 300.0):
        np.testing.assert_allclose(effective_sample_size(jnp.full((4, 5), weight)), 1.0, rtol=1e-6)
        one = jnp.zeros((4, 5)).at[2, 3].set(weight)
        np.testing.assert_allclose(effective_sample_size(one), 1 / 20, rtol=1e-6)
        np.testing.assert_allclose(effective_sample_size(weight * jnp.array([1.0, 3.0])), 16 / (2 * 10), rtol=1e-6)
    ratio, where = jnp.array([1.0, 3.0, 1e6]), jnp.array([True, True, False])
    np.testing.assert_allclose(effective_sample_size(ratio, where), 0.8, rtol=1e-6)


def test_ratios_of_shapes_that_do_not_fit_raise():
    log_prob = normal(7, T, N)
    for ratio in (trajectory_ratio, per_decision_ratio, segment_ratio):
        for wrong in (
            (log_prob[:1], log_prob, MASK),
            (log_prob, log_prob[:1], MASK),
            (log_prob, log_prob, MASK[:, :1]),
        ):
            with pytest.raises(AssertionError):
                ratio(*wrong)


def test_the_effective_sample_size_has_no_scale():
    for scale in (1e-24, 1.0, 1e20):
        np.testing.assert_allclose(effective_sample_size(jnp.array([scale, scale, 0.0, 0.0])), 0.5, rtol=1e-6)
    np.testing.assert_allclose(effective_sample_size(jnp.array([1e20, 1.0])), 0.5, rtol=1e-6)
    np.testing.assert_allclose(effective_sample_size(jnp.array([jnp.inf, 1.0, 1.0, 1.0])), 0.25, rtol=1e-6)
