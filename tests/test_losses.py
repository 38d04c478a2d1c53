"""Per-element losses: their gradients are the textbook's."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.equations.diagnostics import explained_variance
from purepg.equations.distributions import Categorical
from purepg.equations.losses import (
    clipped_squared_error,
    clipped_surrogate,
    expected_soft_policy_gradient,
    importance_weighted,
    policy_gradient,
    squared_error,
    surrogate,
    two_sided_surrogate,
)
from purepg.equations.ratios import kl_k3
from purepg.train import all_finite

EPS = 0.2
LOGITS = jnp.array([0.2, -0.7, 1.1])
ARM_REWARD = jnp.array([2.0, -1.0, 0.5])
ACTION = jnp.array([0, 2, 1, 1, 2])
ADVANTAGE = jnp.array([1.5, -0.3, 2.0, -4.0, 0.0])


def log_probs(logits):
    return Categorical(jnp.broadcast_to(logits, (5, 3))).log_prob(ACTION)


def test_the_policy_gradients_expectation_is_the_gradient_of_the_expected_reward():
    """Over every arm of a softmax bandit, each weighted by its probability."""
    probs = jax.nn.softmax(LOGITS)

    def loss(logits):
        return jnp.sum(probs * policy_gradient(jax.nn.log_softmax(logits), ARM_REWARD))

    exact = jax.grad(lambda logits: jax.nn.softmax(logits) @ ARM_REWARD)(LOGITS)
    np.testing.assert_allclose(jax.grad(loss)(LOGITS), -exact, rtol=1e-5, atol=1e-7)


def test_ppos_gradient_before_any_update_is_the_policy_gradient():
    old = log_probs(LOGITS)
    ppo = jax.grad(lambda logits: clipped_surrogate(log_probs(logits), old, ADVANTAGE, EPS).mean())(LOGITS)
    plain = jax.grad(lambda logits: policy_gradient(log_probs(logits), ADVANTAGE).mean())(LOGITS)
    assert jnp.linalg.norm(plain) > 0.1
    np.testing.assert_allclose(ppo, plain, rtol=1e-6, atol=1e-8)


def test_the_clipped_surrogates_gradient_is_ratio_times_advantage_where_the_clip_is_not_in_force():
    """Off the boundaries 1 - eps and 1 + eps, where jax splits a tie."""
    ratio, advantage = map(
        jnp.array, zip(*itertools.product((0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0), (-2.0, 0.5)), strict=True)
    )
    old = jnp.linspace(-3, -1, len(ratio))
    loss, gradient = jax.vmap(jax.value_and_grad(clipped_surrogate), (0, 0, 0, None))(
        old + jnp.log(ratio), old, advantage, EPS
    )
    free = np.where(advantage >= 0, ratio <= 1 + EPS, ratio >= 1 - EPS)
    np.testing.assert_allclose(gradient, np.where(free, -ratio * advantage, 0.0), rtol=1e-5)
    # Pessimistic: never better than the surrogate without a clip, and bounded where the clip is in force.
    np.testing.assert_allclose(loss, -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage), rtol=1e-5)


BEYOND = jnp.array([50.0, 88.0, 89.0, 1e4, jnp.inf])  # log-ratios; from e^88.8 on a ratio is no float32


@pytest.mark.parametrize(("advantage", "max_ratio", "bound"), [(0.5, None, 1.3), (0.0, None, 1.3), (-2.0, 3.0, 3.0)])
def test_where_an_upper_bound_is_in_force_the_gradient_is_zero_however_large_the_ratio(advantage, max_ratio, bound):
    def loss(log_ratio):
        losses = two_sided_surrogate(log_ratio, jnp.full_like(log_ratio, advantage), 0.2, 0.3, max_ratio)
        return losses.sum(), losses

    gradient, losses = jax.grad(loss, has_aux=True)(BEYOND)
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_allclose(losses, -bound * advantage * np.ones(5), rtol=1e-6)


def test_a_clipped_weight_is_its_bound_however_large_the_ratio():
    gradient = jax.grad(lambda x: importance_weighted(x, BEYOND, jnp.full(5, 2.0), 1.0, 0.3).sum())(jnp.zeros(5))
    np.testing.assert_allclose(gradient, np.full(5, -2.6), rtol=1e-6)


def test_a_masked_action_adds_nothing_to_the_soft_policy_gradient():
    """A logit of -inf: value and gradient are those of the other actions."""
    logits, q = jnp.array([0.2, -jnp.inf, 1.1, -0.4]), jnp.array([1.0, 7.0, -2.0, 0.5])
    rest = np.array([0, 2, 3])

    def loss(logits, q):
        return expected_soft_policy_gradient(jax.nn.log_softmax(logits), q, 0.3)

    value, gradient = jax.value_and_grad(loss)(logits, q)
    expected, of_rest = jax.value_and_grad(loss)(logits[rest], q[rest])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[rest], of_rest, rtol=1e-6)
    assert gradient[1] == 0


def test_the_surrogate_is_minus_ratio_times_weight_and_what_a_clip_out_of_reach_leaves():
    new, old = log_probs(LOGITS), log_probs(0.5 * LOGITS)
    loss = surrogate(new, old, ADVANTAGE)
    np.testing.assert_allclose(loss, -np.exp(new) / np.exp(old) * ADVANTAGE, rtol=1e-5)
    np.testing.assert_allclose(loss, clipped_surrogate(new, old, ADVANTAGE, 1e6), rtol=1e-6)


def test_what_the_equations_hold_constant_has_no_gradient():
    x = jnp.array([0.5, -1.0, 2.0])
    for loss in (
        lambda weight: policy_gradient(x, weight),
        lambda old_log_prob: clipped_surrogate(x, old_log_prob, x, 5.0),
        lambda advantage: clipped_surrogate(x, 0.9 * x, advantage, 5.0),
        lambda target: squared_error(x, target),
        lambda target: clipped_squared_error(x, 1.1 * x, target, 0.1),
        lambda old_value: clipped_squared_error(x, old_value, x + 3, 0.1),
    ):
        assert not jax.grad(lambda constant, loss=loss: loss(constant).sum())(1.2 * x).any()


def test_squared_errors_gradient_is_value_minus_target():
    gradient = jax.grad(lambda value: squared_error(value, ADVANTAGE).sum())(0.1 * ADVANTAGE + 1)
    np.testing.assert_allclose(gradient, 0.1 * ADVANTAGE + 1 - ADVANTAGE, rtol=1e-5)


def test_the_clipped_squared_error_is_the_worse_of_the_two_and_stops_pushing_past_the_clip():
    # old value 1, eps 0.5. Columns: value, target, loss, gradient in value.
    value, target, loss, gradient = jnp.array(
        [
            [1.2, 3.0, 0.5 * 1.8**2, -1.8],  # inside: the plain squared error
            [2.0, 3.0, 0.5 * 1.5**2, 0.0],  # moved past 1.5 towards the target: held
            [2.0, 1.0, 0.5 * 1.0**2, 1.0],  # moved past 1.5 away from the target: the plain error is worse
            [0.0, -2.0, 0.5 * 2.5**2, 0.0],  # below
            [0.0, 2.0, 0.5 * 2.0**2, -2.0],
        ]
    ).T
    got = jax.vmap(jax.value_and_grad(clipped_squared_error), (0, 0, 0, None))(value, jnp.ones(5), target, 0.5)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    np.testing.assert_allclose(got[1], gradient, rtol=1e-5)


def test_kl_k3_is_an_unbiased_and_never_negative_estimate_of_the_kl_from_the_old_policy():
    old, new = Categorical(LOGITS), Categorical(jnp.array([0.5, 0.5, -1.0]))
    log_ratio = jax.nn.log_softmax(new.logits) - jax.nn.log_softmax(old.logits)
    assert (kl_k3(log_ratio) >= 0).all()
    np.testing.assert_allclose(jax.nn.softmax(LOGITS) @ kl_k3(log_ratio), old.kl(new), rtol=1e-5)
    # exp(x) - 1 - x loses everything to rounding here; x^2 / 2 is what it should be.
    np.testing.assert_allclose(kl_k3(jnp.float32(1e-3)), 0.5e-6, rtol=1e-2)


def test_explained_variance_is_one_when_perfect_zero_for_a_constant_and_negative_when_worse():
    target = ADVANTAGE
    np.testing.assert_allclose(explained_variance(target, target), 1.0, atol=1e-6)
    np.testing.assert_allclose(explained_variance(jnp.full(5, 3.0), target), 0.0, atol=1e-6)
    np.testing.assert_allclose(explained_variance(target + 3.0, target), 1.0, atol=1e-6)
    np.testing.assert_allclose(explained_variance(-target, target), -3.0, rtol=1e-5)
    np.testing.assert_allclose(explained_variance(0.5 * target, target), 0.75, rtol=1e-5)
    assert explained_variance(target, jnp.full(5, 2.0)) == 0.0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite_finds_one_bad_number_anywhere_and_looks_at_floats_only(bad):
    tree = {"a": jnp.ones((2, 3)), "b": (jnp.arange(3), jnp.array([True])), "key": jax.random.key(0)}
    assert all_finite(tree)
    assert not all_finite(tree | {"a": tree["a"].at[1, 2].set(bad)})
    assert not all_finite((tree, jnp.float32(bad)))


@pytest.mark.parametrize(
    "loss",
    [
        policy_gradient,
        lambda a, b: surrogate(a, a, b),
        lambda a, b: surrogate(a, b, a),
        lambda a, b: clipped_surrogate(a, a, b, EPS),
        lambda a, b: clipped_surrogate(a, b, a, EPS),
        squared_error,
        lambda a, b: clipped_squared_error(a, a, b, EPS),
        lambda a, b: clipped_squared_error(a, b, a, EPS),
        explained_variance,
    ],
)
def test_a_column_against_a_vector_raises(loss):
    with pytest.raises(AssertionError):
        loss(jnp.ones(3), jnp.ones((3, 1)))
