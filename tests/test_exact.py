"""Exact values, visitation and gradients: against plain numpy, closed forms and brute force, in double precision.

The oracle is `oracle_objective`, a loop or a solve in numpy that takes complex logits: the imaginary part of
J(theta + i h) / h is its derivative to the last bit, for any tiny h.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.envs.finite_mdp import FiniteMDP, mdp_env, unroll
from purepg.envs.named_mdps import aliased, chain, contextual_bandit, garnet
from purepg.equations.distributions import Categorical
from purepg.lab.exact import (
    bellman_gradient,
    fisher,
    in_float64,
    log_policy,
    natural_gradient,
    objective,
    occupancy_gradient,
    optimum,
    score,
    values,
    visitation,
    weighted_gradient,
)
from purepg.lab.trajectories import trajectory_gradient
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.networks.tabular import tabular_policy
from purepg.types import UsageError

FOUR = garnet(1, num_states=4, num_actions=2, branching=2)
INNER = replace(FOUR, terminal=np.arange(4) == 2, start=np.array([0.5, 0.3, 0.0, 0.2]))
TERMINATING = {
    "garnet": garnet(0, num_states=3, num_actions=2, branching=2, horizon=5, horizon_terminates=True),
    "terminal states inside": replace(INNER, horizon=4, horizon_terminates=True),
    "aliases": replace(INNER, alias=np.array([0, 1, 0, 1]), horizon=3, horizon_terminates=True, gamma=1.0),
    "contextual bandit": contextual_bandit(),
    "aliased": aliased(),
}
ONGOING = {
    "garnet": garnet(),
    "terminal states, aliases and a time limit": replace(INNER, alias=np.array([0, 1, 2, 0]), horizon=3),
    "chain": chain(),
}


def exactly(function: Callable, *args: Any) -> Any:
    """In double precision, as one small program."""
    return in_float64(quick_jit(function), *args)


def same(a: Any, b: Any, rtol: float = 1e-10) -> None:
    """Equal in every entry, to `rtol` of the largest."""
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def random_logits(mdp: FiniteMDP, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(mdp.alias.max() + 1, mdp.num_actions))


def as_params(logits: np.ndarray) -> Any:
    return {"params": {"logits": logits}}


def as_logits(params: Any) -> np.ndarray:
    return params["params"]["logits"]


def policy_of(mdp: FiniteMDP) -> Any:
    return log_policy(tabular_policy(mdp), mdp.num_states)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits)
    return e / e.sum(-1, keepdims=True)


def oracle_objective(mdp: FiniteMDP, logits: np.ndarray, tau: float = 0.0) -> Any:
    pi, alive = softmax(logits)[mdp.alias], ~mdp.terminal
    reward = alive * np.sum(pi * (mdp.reward - tau * np.log(pi)), axis=1)
    onward = np.einsum("sa,sat->st", pi, mdp.transition) * alive[:, None] * alive
    if not mdp.horizon_terminates:
        return mdp.start @ np.linalg.solve(np.eye(len(pi)) - mdp.gamma * onward, reward)
    value = np.zeros(len(pi))
    for _ in range(mdp.horizon or 0):
        value = reward + mdp.gamma * onward @ value
    return mdp.start @ value


def oracle_gradient(mdp: FiniteMDP, logits: np.ndarray, tau: float = 0.0) -> np.ndarray:
    gradient, h = np.zeros_like(logits), 1e-30
    for i in np.ndindex(logits.shape):
        moved = logits.astype(complex)
        moved[i] += 1j * h
        gradient[i] = oracle_objective(mdp, moved, tau).imag / h
    return gradient


# --- the forms of the gradient ---


@pytest.mark.parametrize("name", TERMINATING)
def test_trajectories_occupancy_bellman_and_backward_induction_give_one_gradient(name):
    mdp = TERMINATING[name]
    unrolled = unroll(mdp) if mdp.horizon_terminates else mdp
    logits = random_logits(mdp)
    params, policy = as_params(logits), policy_of(unrolled)
    by_bellman, by_occupancy, J = exactly(
        lambda params: (
            bellman_gradient(unrolled, policy, params),
            occupancy_gradient(unrolled, policy, params),
            objective(unrolled, policy(params)),
        ),
        params,
    )
    expected = oracle_gradient(mdp, logits)
    assert np.abs(expected).max() > 0.01
    same(J, oracle_objective(mdp, logits), rtol=1e-12)
    same(as_logits(by_bellman), expected)
    same(as_logits(by_occupancy), expected)
    same(as_logits(in_float64(lambda params: trajectory_gradient(mdp, policy_of(mdp), params), params)), expected)


@pytest.mark.parametrize("name", ONGOING)
def test_occupancy_and_bellman_give_one_gradient_for_ever_with_and_without_entropy(name):
    """A time limit is no part of it."""
    mdp = ONGOING[name]
    logits, policy = random_logits(mdp), policy_of(mdp)

    @quick_jit
    def both(params: Any, tau: Any) -> Any:
        return (
            bellman_gradient(mdp, policy, params, tau),
            occupancy_gradient(mdp, policy, params, tau),
            objective(mdp, policy(params), tau),
        )

    for tau in (0.0, 0.5):
        by_bellman, by_occupancy, J = in_float64(both, as_params(logits), tau)
        expected = oracle_gradient(mdp, logits, tau)
        same(J, oracle_objective(mdp, logits, tau), rtol=1e-12)
        same(as_logits(by_bellman), expected)
        same(as_logits(by_occupancy), expected)
    assert np.abs(expected - oracle_gradient(mdp, logits)).max() > 0.01 * np.abs(expected).max()


def test_a_horizon_of_two_hundred_has_the_gradient_of_an_infinite_one_and_a_horizon_of_five_has_not():
    """gamma^200 is 7e-10 at gamma .9."""
    forever = garnet(0, num_states=2, num_actions=2, branching=2)
    params = as_params(random_logits(forever))

    def gradient(mdp: FiniteMDP) -> np.ndarray:
        return as_logits(exactly(lambda params: bellman_gradient(mdp, policy_of(mdp), params), params))

    infinite = gradient(forever)
    long, short = (gradient(unroll(replace(forever, horizon=H, horizon_terminates=True))) for H in (200, 5))
    same(long, infinite, rtol=2e-9)
    assert np.linalg.norm(short - infinite) > 0.1 * np.linalg.norm(infinite)


@pytest.mark.parametrize(("gamma", "factor"), [(0.5, 0.25), (1.0, 6.5)])
def test_the_aliased_processs_gradient_is_the_one_worked_out_by_hand(gamma, factor):
    mdp = replace(aliased(), gamma=gamma)
    policy = log_policy(tabular_policy(mdp, pinned=True), mdp.num_states)
    gradient = quick_jit(lambda params: bellman_gradient(mdp, policy, params))
    for theta in (-2.0, 0.0, 1.0):
        p = 1 / (1 + np.exp(-theta))
        got = in_float64(gradient, as_params(np.full((1, 1), theta)))
        assert as_logits(got).item() == pytest.approx(factor * p * (1 - p), rel=1e-12)


def test_the_forms_agree_for_an_mlp_whose_critic_has_no_part_in_it():
    mdp, rng = garnet(num_states=4), np.random.default_rng(0)
    network, obs = actor_critic(mdp_env(mdp), NetworkConfig(hidden=(8,))), jnp.arange(4)
    shapes = jax.eval_shape(network.init, jax.random.key(0), obs)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
    policy = log_policy(network, 4)
    by_bellman, by_occupancy, log_pi = exactly(
        lambda params: (
            bellman_gradient(mdp, policy, params),
            occupancy_gradient(mdp, policy, params),
            policy(params),
        ),
        params,
    )
    hidden, head = params["params"]["policy_torso"]["hidden_0"], params["params"]["policy_head"]["logits"]
    logits = np.tanh(hidden["kernel"] + hidden["bias"]) @ head["kernel"] + head["bias"]
    same(np.exp(log_pi), softmax(logits))
    largest = max(np.abs(x).max() for x in jax.tree.leaves(by_bellman))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * largest), by_bellman, by_occupancy)
    for path, x in jax.tree.leaves_with_path(by_bellman):
        assert x.any() == ("policy" in jax.tree_util.keystr(path))


def test_a_weighted_gradient_sums_over_leading_axes_and_holds_its_weights_constant():
    """For free logits: d(s) pi(a|s) (w(s, a) - sum_b pi(b|s) w(s, b))."""
    mdp, rng = garnet(num_states=3, num_actions=4), np.random.default_rng(0)
    logits, d, w = rng.normal(size=(3, 4)), rng.random(size=(2, 3)), rng.normal(size=(2, 3, 4))
    pi, policy = softmax(logits), policy_of(mdp)

    def gradient(params: Any, d: Any, w: Any) -> Any:
        return weighted_gradient(policy, params, d, w)

    expected = np.sum(d[..., None] * pi * (w - np.sum(pi * w, axis=-1, keepdims=True)), axis=0)
    same(as_logits(exactly(gradient, as_params(logits), d, w)), expected)


# --- values and visitation ---


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_values_are_the_discounted_sums_of_what_follows(tau):
    """By a long loop forward over each start, s and (s, a), and not by any Bellman equation."""
    mdp = INNER
    pi = softmax(random_logits(mdp))
    got = exactly(lambda log_pi: values(mdp, log_pi, tau), np.log(pi))
    alive = ~mdp.terminal
    bonus = -tau * np.log(pi) * alive[:, None]
    reward = np.sum(pi * (mdp.reward + bonus), axis=1)

    def follow(distribution: np.ndarray) -> np.ndarray:
        total = np.zeros(len(distribution))
        for t in range(400):
            total += mdp.gamma**t * distribution @ reward
            distribution = distribution @ np.einsum("sa,sat->st", pi, mdp.transition)
        return total

    V = follow(np.eye(4))
    Q = mdp.reward + mdp.gamma * np.stack([follow(mdp.transition[:, a]) for a in range(2)], axis=1)
    same(got.value, V)
    same(got.q, Q)
    same(got.advantage, Q + bonus - V[:, None])
    assert got.value[2] == 0 and not got.q[2].any() and not got.advantage[2].any()
    np.testing.assert_allclose(np.sum(pi * got.advantage, axis=1), 0, atol=1e-13)


@pytest.mark.parametrize("name", ["garnet", "terminal states inside", "aliases"])
def test_an_unrolled_processs_values_are_those_of_backward_induction_at_every_time(name):
    mdp = TERMINATING[name]
    H, S = mdp.horizon or 0, mdp.num_states
    pi = softmax(random_logits(mdp))[mdp.alias]
    unrolled = unroll(mdp)
    unrolled_pi = np.append(np.tile(pi, (H, 1)), [[0.5, 0.5]], axis=0)
    got = exactly(lambda log_pi: values(unrolled, log_pi), np.log(unrolled_pi))
    V = np.zeros(S)
    for t in reversed(range(H)):
        Q = (mdp.reward + mdp.gamma * mdp.transition @ V) * ~mdp.terminal[:, None]
        V = np.sum(pi * Q, axis=1)
        same(got.value[t * S : (t + 1) * S], V)
        same(got.q[t * S : (t + 1) * S], Q)
    assert got.value[-1] == 0


@pytest.mark.parametrize("name", ONGOING)
def test_visitation_is_the_discounted_sum_of_state_distributions(name):
    mdp = ONGOING[name]
    pi = softmax(random_logits(mdp))[mdp.alias]
    d = exactly(lambda log_pi: visitation(mdp, log_pi), np.log(pi))
    step = np.einsum("sa,sat->st", pi, mdp.transition) * ~mdp.terminal
    expected, now = np.zeros(mdp.num_states), mdp.start
    for _ in range(800):
        expected, now = expected + now, mdp.gamma * now @ step
    same(d, expected)
    assert not d[mdp.terminal].any()
    if mdp.terminal.any():
        assert d.sum() < 0.9 / (1 - mdp.gamma)
    else:
        assert d.sum() == pytest.approx(1 / (1 - mdp.gamma), rel=1e-12)


def test_what_needs_the_time_that_is_left_is_refused():
    mdp = TERMINATING["garnet"]
    params, policy = as_params(random_logits(mdp)), policy_of(mdp)
    for function in (
        lambda: values(mdp, policy(params)),
        lambda: objective(mdp, policy(params)),
        lambda: visitation(mdp, policy(params)),
        lambda: bellman_gradient(mdp, policy, params),
        lambda: occupancy_gradient(mdp, policy, params),
        lambda: fisher(mdp, policy, params),
        lambda: natural_gradient(mdp, policy, params),
        lambda: optimum(mdp),
    ):
        with pytest.raises(UsageError, match=r"garnet 0: .* unroll"):
            function()


def test_double_precision_is_for_the_function_alone():
    def function(x: Any) -> Any:
        return {"sum": jnp.sum(x["float"]), "int": x["int"] + 1}

    got = in_float64(function, {"float": np.full(3, 1 / 3, np.float32), "int": np.arange(2, dtype=np.int32)})
    assert isinstance(got["sum"], np.ndarray) and got["sum"].dtype == np.float64
    assert got["int"].dtype == np.int32
    assert in_float64(lambda x: x + 1e-12, 1.0) - 1 == pytest.approx(1e-12, rel=1e-3)
    assert jnp.ones(1).dtype == jnp.float32


# --- the geometry ---


@pytest.mark.parametrize("name", ["garnet", "terminal states, aliases and a time limit"])
def test_the_fisher_matrix_is_the_visited_mean_of_the_scores_outer_products(name):
    """Of a softmax's scores, one-hot less pi, in the rows that a state reads."""
    mdp = ONGOING[name]
    logits, policy = random_logits(mdp), policy_of(mdp)
    F, phi, d = exactly(
        lambda params: (fisher(mdp, policy, params), score(policy, params), visitation(mdp, policy(params))),
        as_params(logits),
    )
    pi, expected = softmax(logits)[mdp.alias], np.zeros((logits.size, logits.size))
    for s, a in np.ndindex(pi.shape):
        g = np.zeros_like(logits)
        g[mdp.alias[s]] = np.eye(mdp.num_actions)[a] - pi[s]
        same(phi[s, a], g.ravel())
        expected += d[s] / d.sum() * pi[s, a] * np.outer(g, g)
    same(F, expected)


def test_the_fisher_matrix_is_the_hessian_of_the_visited_kl():
    """KL(pi_theta || pi_x), averaged over the states that pi_theta visits, at x = theta; of a policy whose parameters
    are shared between states and not its logits."""
    mdp, rng = garnet(num_states=4), np.random.default_rng(0)
    first, second, theta = rng.normal(size=(4, 2)), rng.normal(size=(2, 3)), rng.normal(size=(2, 2))

    def policy(x: Any) -> Any:
        return jax.nn.log_softmax(jnp.tanh(first @ x) @ second)

    def matrices(theta: Any) -> Any:
        d = visitation(mdp, policy(theta))

        def kl(flat: Any) -> Any:
            return d @ Categorical(policy(theta)).kl(Categorical(policy(flat.reshape(2, 2)))) / d.sum()

        return fisher(mdp, policy, theta), jax.hessian(kl)(theta.ravel())

    F, hessian = exactly(matrices, theta)
    same(F, hessian)
    assert np.linalg.eigvalsh(F).min() > 1e-4


def test_the_natural_gradient_of_free_logits_is_the_advantage_over_one_minus_gamma():
    """Up to a constant in each state, which a softmax does not feel."""
    mdp = garnet()
    policy = policy_of(mdp)
    natural, advantage = exactly(
        lambda params: (natural_gradient(mdp, policy, params), values(mdp, policy(params)).advantage),
        as_params(random_logits(mdp)),
    )
    difference = as_logits(natural) - advantage / (1 - mdp.gamma)
    np.testing.assert_allclose(difference - difference[:, :1], 0, atol=1e-8)
    assert np.abs(advantage).max() > 1


# --- the best there is ---


def test_no_deterministic_policy_is_better_than_the_optimum_in_any_state():
    mdp = garnet(2, num_states=4, num_actions=3)
    best = optimum(mdp)
    V = []
    for actions in itertools.product(range(3), repeat=4):
        step, reward = mdp.transition[np.arange(4), actions], mdp.reward[np.arange(4), actions]
        V.append(np.linalg.solve(np.eye(4) - mdp.gamma * step, reward))
    np.testing.assert_allclose(np.sum(best.pi * best.q, axis=1), np.max(V, axis=0), rtol=1e-12)
    assert best.objective == pytest.approx(np.max(V @ mdp.start), rel=1e-12)
    assert set(best.pi.ravel()) == {0.0, 1.0} and (best.pi.sum(1) == 1).all()
    np.testing.assert_allclose(best.q, mdp.reward + mdp.gamma * mdp.transition @ np.max(V, axis=0), rtol=1e-12)


def test_the_optimum_with_entropy_is_a_softmax_of_its_q_where_the_gradient_vanishes():
    mdp, tau = INNER, 0.3
    J, pi, Q = optimum(mdp, tau)
    alive = ~mdp.terminal
    np.testing.assert_allclose(pi, softmax(Q / tau), rtol=1e-10)
    V = tau * np.log(np.sum(np.exp(Q / tau), axis=1)) * alive
    assert mdp.start @ V == pytest.approx(J, rel=1e-10)
    np.testing.assert_allclose(Q[alive], (mdp.reward + mdp.gamma * mdp.transition @ V)[alive], rtol=1e-10)
    np.testing.assert_allclose(oracle_gradient(mdp, np.log(pi), tau), 0, atol=1e-10)
    assert np.abs(oracle_gradient(mdp, np.log(pi))).max() > 0.01
    same(J, oracle_objective(mdp, np.log(pi), tau))
