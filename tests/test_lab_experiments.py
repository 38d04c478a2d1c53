"""The mathematics behind experiments/discount_bias.py and experiments/softmax_convergence.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.envs.finite_mdp import mdp_env, unroll
from purepg.envs.named_mdps import aliased, bandit, garnet
from purepg.equations.advantages import discount_power, discounted_return
from purepg.lab.estimators import WithCritic, update_of
from purepg.lab.exact import (
    bellman_gradient,
    fisher,
    in_float64,
    log_policy,
    natural_gradient,
    objective,
    optimum,
    score,
    values,
    visitation,
    weighted_gradient,
)
from purepg.lab.trajectories import enumerate_trajectories, state_distributions
from purepg.networks.tabular import tabular_policy

ALIASED = aliased()
ALIASED_NETWORK = tabular_policy(ALIASED, pinned=True)
ALIASED_POLICY = log_policy(ALIASED_NETWORK, ALIASED.num_states)


def aliased_params(p):
    return {"params": {"logits": np.full((1, 1), np.log(p / (1 - p)))}}


def only_number(tree):
    return tree["params"]["logits"][..., 0, 0]


def follow(direction, watch, start, step, num_steps):
    """What `watch` sees of theta <- theta + step * direction(theta), before the first step and after each."""

    def advance(params, _):
        return jax.tree.map(lambda x, g: x + step * g, params, direction(params)), watch(params)

    return in_float64(quick_jit(lambda params: jax.lax.scan(advance, params, length=num_steps + 1)[1]), start)


def ascent_gap(mdp, step, num_steps, entropy_coef=0.0):
    network = tabular_policy(mdp)
    policy, start = log_policy(network, mdp.num_states), network.init(jax.random.key(0), jnp.int32(0))
    J = follow(
        lambda params: bellman_gradient(mdp, policy, params, entropy_coef),
        lambda params: objective(mdp, policy(params), entropy_coef),
        start,
        step,
        num_steps,
    )
    return optimum(mdp, entropy_coef).objective - J


# --- the missing gamma^t ---


def test_without_gamma_t_the_mean_update_has_the_sign_against_both_returns_at_every_p():
    undiscounted = dataclasses.replace(ALIASED, gamma=1.0)

    def gradients(params, visited):
        log_pi = ALIASED_POLICY(params)
        update = weighted_gradient(ALIASED_POLICY, params, visited, values(ALIASED, log_pi).q)
        return [bellman_gradient(mdp, ALIASED_POLICY, params) for mdp in (ALIASED, undiscounted)] + [update]

    compiled = quick_jit(gradients)
    for p in np.random.default_rng(0).uniform(size=10):
        params, dp = aliased_params(p), p * (1 - p)
        visited = state_distributions(ALIASED, in_float64(ALIASED_POLICY, params), 5, restart=False)
        half, one, update = (only_number(g) for g in in_float64(compiled, params, visited))
        np.testing.assert_allclose([half, one, update], [0.25 * dp, 6.5 * dp, -0.5 * dp], rtol=0, atol=1e-10)
        np.testing.assert_allclose(visited.sum(), 2 + 3 * p, rtol=1e-12)  # an episode's mean length


@pytest.mark.parametrize("discount_states", [True, False])
def test_one_episode_with_the_exact_value_has_three_quarters_of_p_1_minus_p_as_its_deviation(discount_states):
    def update(params):
        log_pi = ALIASED_POLICY(params)
        trajectory, mask, probability = jax.tree.map(jnp.asarray, enumerate_trajectories(ALIASED, log_pi))
        weight = discounted_return(trajectory.reward, mask, 0.5) - values(ALIASED, log_pi).value[trajectory.obs]
        weight *= discount_power(mask, 0.5) if discount_states else 1.0
        phi = score(ALIASED_POLICY, params)[trajectory.obs, trajectory.action, 0]
        return jnp.sum(phi * weight, axis=0, where=mask), probability

    g, probability = in_float64(update, aliased_params(0.5))
    mean = probability @ g
    np.testing.assert_allclose(mean, 0.0625 if discount_states else -0.125, atol=1e-12)
    np.testing.assert_allclose(np.sqrt(probability @ (g - mean) ** 2), 0.75 * 0.25, atol=1e-12)


def test_reinforces_own_update_goes_up_with_gamma_t_and_down_without():
    N = 4096
    value = in_float64(lambda params: values(ALIASED, ALIASED_POLICY(params)).value, aliased_params(0.5))
    network = WithCritic(ALIASED_NETWORK, jnp.asarray(value))
    params = jax.tree.map(jnp.float32, aliased_params(0.5))

    def updates(key):
        config = REINFORCEConfig(
            num_episodes=N,
            max_steps=5,
            optimizer="sgd",
            gamma=0.5,
            baseline="value",
            mean_over_steps=False,
            value_coef=0.0,
        )
        return [
            only_number(
                update_of(
                    reinforce(mdp_env(ALIASED), network, dataclasses.replace(config, discount_states=discounts)),
                    params,
                    config.learning_rate,
                )(key)
            )
            for discounts in (True, False)
        ]

    error = 0.75 * 0.25 / np.sqrt(N)  # a sixtieth of what is between the two
    with_gamma_t, without = quick_jit(updates)(jax.random.key(0))
    np.testing.assert_allclose([with_gamma_t, without], [0.0625, -0.125], rtol=0, atol=4 * error)


# --- softmax policy gradient ---


@pytest.mark.parametrize(
    ("mdp", "step", "limit"),
    [
        (unroll(bandit()), 0.4, 1 / (2 * 0.4)),
        (unroll(bandit((1.0, 0.5, 0.0))), 0.4, 2 / (3 * 0.4)),
        (garnet(), 1.0, 6 * 2 / 3),
    ],
    ids=["two arms", "three arms", "garnet"],
)
def test_t_times_the_gap_tends_to_states_times_actions_minus_one_over_actions_times_step(mdp, step, limit):
    T = 10_000
    np.testing.assert_allclose(T * ascent_gap(mdp, step, T)[-1], limit, rtol=0.01)


def test_the_regularised_gap_is_tau_times_the_discounted_divergence_from_the_optimum():
    mdp, tau = garnet(1), 0.5
    best = optimum(mdp, tau)

    def both(logits):
        log_pi = jax.nn.log_softmax(logits)
        divergence = jnp.sum(jnp.exp(log_pi) * (log_pi - jnp.log(best.pi)), axis=1)
        return best.objective - objective(mdp, log_pi, tau), tau * visitation(mdp, log_pi) @ divergence

    gap, divergence = in_float64(quick_jit(both), np.random.default_rng(0).normal(size=mdp.reward.shape))
    np.testing.assert_allclose(gap, divergence, rtol=1e-10)


def test_at_the_regularised_optimum_the_hessian_is_minus_tau_times_the_fisher_of_the_unnormalised_states():
    mdp, tau = garnet(1), 0.5

    def both(flat):
        def regularised(flat):
            return objective(mdp, jax.nn.log_softmax(flat.reshape(mdp.reward.shape)), tau)

        logits = flat.reshape(mdp.reward.shape)
        mass = jnp.sum(visitation(mdp, jax.nn.log_softmax(logits)))
        return jax.hessian(regularised)(flat), -tau * mass * fisher(mdp, jax.nn.log_softmax, logits)

    hessian, expected = in_float64(quick_jit(both), np.ravel(optimum(mdp, tau).q) / tau)
    np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-10)


def test_with_entropy_the_gap_shrinks_in_the_end_by_the_square_of_one_minus_step_times_the_smallest_eigenvalue():
    mdp, tau, step = unroll(bandit((1.0, 0.5, 0.0))), 0.5, 0.4
    pi = optimum(mdp, tau).pi[0]
    eigenvalue = np.linalg.eigvalsh(tau * (np.diag(pi) - np.outer(pi, pi)))[1]  # the first is 0
    gap = ascent_gap(mdp, step, 400, tau)
    fitted = np.polyfit(np.arange(300, 400), np.log(gap[300:400]), 1)[0]
    np.testing.assert_allclose(fitted, 2 * np.log(1 - step * eigenvalue), rtol=1e-3)
    np.testing.assert_allclose(fitted, -0.048, atol=5e-5)


# --- natural policy gradient ---


def test_a_natural_step_multiplies_the_policy_by_exp_of_eta_advantage_over_one_minus_gamma():
    mdp, eta = garnet(2), 0.3

    def both(logits):
        log_pi = jax.nn.log_softmax(logits)
        natural = jax.nn.softmax(logits + eta * natural_gradient(mdp, jax.nn.log_softmax, logits))
        weighted = jnp.exp(log_pi + eta * values(mdp, log_pi).advantage / (1 - mdp.gamma))
        return natural, weighted / weighted.sum(1, keepdims=True)

    natural, exponentiated = in_float64(quick_jit(both), np.random.default_rng(0).normal(size=mdp.reward.shape))
    np.testing.assert_allclose(natural, exponentiated, rtol=0, atol=1e-9)


def test_the_natural_gradients_gap_never_grows_keeps_under_its_bound_and_is_linear_in_the_end():
    eta, mdp = 0.1, garnet()
    low, high = mdp.reward.min(), mdp.reward.max()
    mdp = dataclasses.replace(mdp, reward=(mdp.reward - low) / (high - low))  # the bound asks for rewards in [0, 1]
    horizon = 1 / (1 - mdp.gamma)
    best = optimum(mdp)
    J = follow(
        lambda logits: horizon * values(mdp, jax.nn.log_softmax(logits)).advantage,
        lambda logits: objective(mdp, jax.nn.log_softmax(logits)),
        np.zeros_like(mdp.reward),
        eta,
        150,
    )
    gap, T = best.objective - J, np.arange(1, 151)
    assert np.all(np.diff(gap) < 0)
    assert np.all(gap[1:] < np.log(3) / (eta * T) + horizon**2 / T)
    q = np.sort(best.q, axis=1)
    slope = np.polyfit(np.arange(100, 150), np.log(gap[100:150]), 1)[0]
    np.testing.assert_allclose(slope, -eta * horizon * np.min(q[:, -1] - q[:, -2]), rtol=0.01)
