"""Every policy loss against its textbook: grad loss = -c * grad log pi, element by element, and, where the data are the
policy's own, the exact gradient of the objective in the mean.

A later algorithm's loss is one more line of ROWS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.envs.named_mdps import garnet
from purepg.equations.distributions import Categorical, DiagGaussian
from purepg.equations.losses import clipped_surrogate, policy_gradient, surrogate
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, values, visitation
from purepg.networks.tabular import tabular_policy

EPS = 0.2


class Row(NamedTuple):
    loss: Callable  # (log_prob, old_log_prob, weight) -> per element
    coefficient: Callable  # (ratio, weight) -> c
    weight: str = "A"  # of which the mean is the gradient: an advantage, or Q


def ppo_clip(ratio: np.ndarray, A: np.ndarray) -> np.ndarray:
    return ratio * A * np.where(A >= 0, ratio <= 1 + EPS, ratio >= 1 - EPS)


ROWS = {
    "REINFORCE": Row(lambda new, old, w: policy_gradient(new, w), lambda r, w: w, "Q"),
    "actor-critic": Row(lambda new, old, w: policy_gradient(new, w), lambda r, w: w, "Q"),
    "A2C": Row(lambda new, old, w: policy_gradient(new, w), lambda r, w: w),
    "off-policy": Row(lambda new, old, w: policy_gradient(new, jnp.exp(new - old) * w), lambda r, w: r * w, "Q"),
    "TRPO": Row(surrogate, lambda r, w: r * w),
    "PPO-Clip": Row(lambda new, old, w: clipped_surrogate(new, old, w, EPS), ppo_clip),
}

B, A = 400, 3


class Batch(NamedTuple):
    """Actions of random old policies, seen by random new ones not far from them; a state for each."""

    policy: Any  # a distribution of numpy arrays: its leaves are the parameters
    old_policy: Any
    old_log_prob: np.ndarray
    log_prob: np.ndarray
    action: np.ndarray
    weight: np.ndarray
    score: Any  # grad log pi by the parameters, in closed form
    kl_gradient: Any  # that of KL(pi_old || pi), in closed form
    reverse_kl_gradient: Any  # that of KL(pi || pi_old)


def categorical_batch() -> Batch:
    rng: Any = np.random.default_rng(0)
    logits = rng.normal(size=(B, A))
    old, action = logits + 0.3 * rng.normal(size=(B, A)), rng.integers(A, size=B)

    def log_softmax(x: Any) -> Any:
        return x - np.log(np.sum(np.exp(x), axis=1, keepdims=True))

    log_pi, old_log_pi = log_softmax(logits), log_softmax(old)
    i = np.arange(B), action
    score = Categorical(np.eye(A)[action] - np.exp(log_pi))
    reverse_kl = np.sum(np.exp(log_pi) * (log_pi - old_log_pi), axis=1, keepdims=True)
    return Batch(
        Categorical(logits),
        Categorical(old),
        old_log_pi[i],
        log_pi[i],
        action,
        rng.normal(size=B),
        score,
        Categorical(np.exp(log_pi) - np.exp(old_log_pi)),
        Categorical(np.exp(log_pi) * (log_pi - old_log_pi - reverse_kl)),
    )


def gaussian_batch() -> Batch:
    rng: Any = np.random.default_rng(1)
    mean, log_std, z = rng.normal(size=(3, B, A))
    old_mean, old_log_std = mean + 0.2 * rng.normal(size=(B, A)), log_std + 0.1 * rng.normal(size=(B, A))
    action = old_mean + np.exp(old_log_std) * z

    def log_prob(mean: Any, log_std: Any) -> Any:
        z = (action - mean) / np.exp(log_std)
        return np.sum(-(z**2) / 2 - log_std - np.log(2 * np.pi) / 2, axis=1)

    z = (action - mean) / np.exp(log_std)
    score = DiagGaussian(z / np.exp(log_std), z**2 - 1)
    variance, old_variance = np.exp(2 * log_std), np.exp(2 * old_log_std)
    return Batch(
        DiagGaussian(mean, log_std),
        DiagGaussian(old_mean, old_log_std),
        log_prob(old_mean, old_log_std),
        log_prob(mean, log_std),
        action,
        rng.normal(size=B),
        score,
        DiagGaussian((mean - old_mean) / variance, 1 - (old_variance + (mean - old_mean) ** 2) / variance),
        DiagGaussian((mean - old_mean) / old_variance, variance / old_variance - 1),
    )


BATCHES = {"Categorical": categorical_batch(), "DiagGaussian": gaussian_batch()}
OFF_POLICY = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
EVERY_ROW = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def assert_is_score_times(gradient: Any, coefficient: np.ndarray, score: Any) -> None:
    for got, by in zip(gradient, score, strict=True):
        np.testing.assert_allclose(got, -coefficient[:, None] * by, rtol=1e-10, atol=1e-13)


@OFF_POLICY
def test_the_batches_fall_on_both_sides_of_the_clip_with_advantages_of_either_sign(batch):
    """And nowhere on a boundary, where jax gives three quarters of the gradient."""
    ratio, positive = np.exp(batch.log_prob - batch.old_log_prob), batch.weight >= 0
    for side in (ratio < 1 - EPS, (ratio > 1 - EPS) & (ratio < 1 + EPS), ratio > 1 + EPS):
        assert np.sum(side & positive) > 10 and np.sum(side & ~positive) > 10
    assert np.abs(np.abs(ratio - 1) - EPS).min() > 1e-6


@OFF_POLICY
@EVERY_ROW
def test_the_losses_gradient_is_the_textbooks_coefficient_times_the_score(row, batch):
    def loss(policy: Any, old_log_prob: Any, action: Any, weight: Any) -> Any:
        return jnp.sum(row.loss(policy.log_prob(action), old_log_prob, weight))

    gradient = in_float64(quick_jit(jax.grad(loss)), batch.policy, batch.old_log_prob, batch.action, batch.weight)
    coefficient = row.coefficient(np.exp(batch.log_prob - batch.old_log_prob), batch.weight)
    assert_is_score_times(gradient, coefficient, batch.score)


@OFF_POLICY
@pytest.mark.parametrize("direction", ["kl", "reverse_kl"])
def test_the_penalised_surrogates_gradient_is_the_scores_and_beta_times_the_kls(batch, direction):
    """PPO-Penalty: -ratio * A * grad log pi + beta * grad KL, in either direction; where a KL is 0 it has none."""
    beta = 0.7

    def loss(policy: Any, old_policy: Any, old_log_prob: Any, action: Any, weight: Any) -> Any:
        kl = old_policy.kl(policy) if direction == "kl" else policy.kl(old_policy)
        return jnp.sum(surrogate(policy.log_prob(action), old_log_prob, weight) + beta * kl)

    gradient_of, data = quick_jit(jax.grad(loss)), (batch.action, batch.weight)
    gradient = in_float64(gradient_of, batch.policy, batch.old_policy, batch.old_log_prob, *data)
    of_kl = batch.kl_gradient if direction == "kl" else batch.reverse_kl_gradient
    coefficient = np.exp(batch.log_prob - batch.old_log_prob) * batch.weight
    for got, score, by in zip(gradient, batch.score, of_kl, strict=True):
        assert np.abs(by).max() > 0.1
        np.testing.assert_allclose(got, -coefficient[:, None] * score + beta * by, rtol=1e-10, atol=1e-12)
    gradient = in_float64(gradient_of, batch.policy, batch.policy, batch.log_prob, *data)
    assert_is_score_times(gradient, batch.weight, batch.score)


@EVERY_ROW
def test_no_gradient_flows_through_the_weight_or_the_old_policy(row):
    """Both computed from the parameters that learn, as from a network that they share."""
    batch, shift = BATCHES["Categorical"], 0.1

    def loss(policy: Any, action: Any, weight: Any) -> Any:
        log_prob = policy.log_prob(action)
        return jnp.sum(row.loss(log_prob, log_prob - shift, weight * (1 + jnp.square(log_prob))))

    gradient = in_float64(quick_jit(jax.grad(loss)), batch.policy, batch.action, batch.weight)
    weight = batch.weight * (1 + batch.log_prob**2)
    assert_is_score_times(gradient, row.coefficient(np.full(B, np.exp(shift)), weight), batch.score)


@EVERY_ROW
def test_on_policy_the_expected_ascent_direction_is_the_exact_gradient(row):
    """Over the states visited and the policy's actions, each with its exact weight: the same gradient, length and
    all, as differentiating the objective gives."""
    mdp = garnet()
    policy = log_policy(tabular_policy(mdp), mdp.num_states)

    def both(params: Any) -> Any:
        log_pi = policy(params)
        exact = values(mdp, log_pi)
        mass = visitation(mdp, log_pi)[:, None] * jnp.exp(log_pi)
        weight = exact.q if row.weight == "Q" else exact.advantage
        expected = jax.grad(lambda params: jnp.sum(mass * row.loss(policy(params), log_pi, weight)))
        return expected(params), bellman_gradient(mdp, policy, params)

    logits = np.random.default_rng(0).normal(size=(6, 3))
    loss_gradient, gradient = (
        x["params"]["logits"].ravel() for x in in_float64(quick_jit(both), {"params": {"logits": logits}})
    )
    cosine = -loss_gradient @ gradient / np.linalg.norm(loss_gradient) / np.linalg.norm(gradient)
    assert cosine > 1 - 1e-10
    np.testing.assert_allclose(-loss_gradient, gradient, atol=1e-10 * np.abs(gradient).max())
