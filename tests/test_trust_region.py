"""Fisher matrices by brute force, conjugate gradients against dense solves, natural gradients against the laboratory's,
and line searches against a plain loop. In double precision wherever a number is exact.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, loops_are_unbatched, quick_jit
from jax.flatten_util import ravel_pytree

from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import garnet
from purepg.equations.distributions import Categorical
from purepg.equations.trust_region import (
    conjugate_gradient,
    fisher_vector_product,
    line_search,
    move,
    natural_gradient,
    refuse_a_shared_torso,
)
from purepg.lab import exact
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.networks.tabular import tabular_actor_critic
from purepg.types import Box, UsageError

MDP = garnet()
PLANE = Box(-np.ones(2, np.float32), np.ones(2, np.float32))
DAMPING = 0.3


class Policy(NamedTuple):
    """A network at random parameters, and states that it sees; every network has a critic of its own."""

    network: Any
    params: Any  # of float64
    obs: np.ndarray


def random_policy(network: Any, obs: np.ndarray) -> Policy:
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0), obs)
    return Policy(network, jax.tree.map(lambda x: rng.normal(size=x.shape), shapes), obs)


SMALL = NetworkConfig(hidden=(3,))
POLICIES = {
    "a table": random_policy(tabular_actor_critic(MDP), np.arange(MDP.num_states)),
    "a categorical network": random_policy(actor_critic(mdp_env(MDP), SMALL), np.arange(MDP.num_states)),
    "a gaussian network": random_policy(
        actor_critic(arms_env(PLANE), SMALL), np.random.default_rng(0).normal(size=(5, 2))
    ),
}
ON_THE_MDP = ["a table", "a categorical network"]


def exactly(function: Callable, *args: Any) -> Any:
    """In double precision, as one small program."""
    return exact.in_float64(quick_jit(function), *args)


def same(a: Any, b: Any, rtol: float = 1e-10) -> None:
    """Equal in every entry, to `rtol` of the largest."""
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


def divergence(policy: Policy, old: Any, weight: Any = None) -> Callable:
    """params -> KL(pi_old || pi_params), its mean over the states, or weighted."""

    def kl(params):
        per_state = policy.network.apply(old, policy.obs)[0].kl(policy.network.apply(params, policy.obs)[0])
        return jnp.mean(per_state) if weight is None else jnp.sum(weight * per_state)

    return kl


def dense(product: Callable, size: int) -> Any:
    """The matrix of a product, row by row."""
    return jax.vmap(product)(jnp.eye(size))


def mean_score_square(policy: Policy, params: Any) -> Any:
    """E grad log pi grad log pi^T, by its definition: a sum over all actions, or, a Gaussian's score squared being a
    polynomial of degree 4, over the 3 x 3 nodes of the Gauss-Hermite quadrature that is exact to degree 5."""
    flat, unravel = ravel_pytree(params)
    distribution = policy.network.apply(params, policy.obs)[0]
    if isinstance(distribution, Categorical):
        actions = jnp.arange(MDP.num_actions)[:, None] + jnp.zeros(len(policy.obs), int)
        probability = jnp.exp(jax.vmap(distribution.log_prob)(actions))
    else:
        node, mass = np.array([-(3**0.5), 0, 3**0.5]), np.array([1, 4, 1]) / 6
        noise = np.array(list(itertools.product(node, node)))[:, None]
        actions = distribution.mean + jnp.exp(distribution.log_std) * noise
        probability = np.outer(mass, mass).reshape(-1, 1) * np.ones(len(policy.obs))

    def log_prob(flat):
        return jax.vmap(policy.network.apply(unravel(flat), policy.obs)[0].log_prob)(actions)

    score = jax.jacobian(log_prob)(flat)  # [actions, states, D]
    return jnp.einsum("ks,ksi,ksj->ij", probability, score, score) / len(policy.obs)


# --- the Fisher matrix ---


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_the_product_is_with_the_mean_square_of_the_score_which_is_the_hessian_of_the_kl_and_with_the_damping(policy):
    def matrices(params):
        flat, unravel = ravel_pytree(params)
        kl = divergence(policy, params)
        damped = dense(fisher_vector_product(kl, params, DAMPING), len(flat))
        plain = dense(fisher_vector_product(kl, params), len(flat))
        hessian = jax.hessian(lambda flat: kl(unravel(flat)))(flat)
        return damped, plain, hessian, mean_score_square(policy, params)

    damped, plain, hessian, expected = exactly(matrices, policy.params)
    assert np.linalg.matrix_rank(expected, tol=1e-8) > 5
    same(plain, expected)
    same(hessian, expected)
    same(damped, expected + DAMPING * np.eye(len(expected)))


@pytest.mark.parametrize("name", ON_THE_MDP)
def test_weighted_as_the_policy_visits_the_states_it_is_the_laboratorys_fisher_matrix(name):
    policy = POLICIES[name]
    table = exact.log_policy(policy.network, MDP.num_states)

    def matrices(params):
        d = exact.visitation(MDP, table(params))
        product = fisher_vector_product(divergence(policy, params, d / jnp.sum(d)), params)
        return dense(product, len(ravel_pytree(params)[0])), exact.fisher(MDP, table, params)

    same(*exactly(matrices, policy.params))


def test_a_critic_of_its_own_has_no_part_in_the_metric_and_none_in_the_step():
    policy = POLICIES["a gaussian network"]

    def step(params):
        kl = divergence(policy, params)
        product = dense(fisher_vector_product(kl, params), len(ravel_pytree(params)[0]))

        def gain(params):
            return policy.network.apply(params, policy.obs)[0].mean.sum()

        return product, natural_gradient(gain, kl, params, DAMPING, 20).direction

    product, direction = exactly(step, policy.params)
    modules = policy.params["params"].items()
    flags = {name: jax.tree.map(np.ones_like if "value" in name else np.zeros_like, module) for name, module in modules}
    is_critic = np.asarray(ravel_pytree(flags)[0]) == 1
    assert 10 < is_critic.sum() < len(is_critic) - 10
    assert not product[is_critic].any() and not product[:, is_critic].any()
    direction = np.asarray(ravel_pytree(direction)[0])
    assert not direction[is_critic].any() and direction[~is_critic].any()


# --- conjugate gradients ---

D = 8


def spd(seed: int, eigenvalue: Any) -> np.ndarray:
    """A symmetric matrix of these eigenvalues in a random basis."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalue), len(eigenvalue))))
    return basis * np.asarray(eigenvalue) @ basis.T


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def solve(matrix: Any, b: Any, num_steps: int) -> Any:
    return conjugate_gradient(lambda v: matrix @ v, b, num_steps)


jit_solve = jax.jit(solve, static_argnums=2)


def solve_exactly(matrix: Any, b: Any, num_steps: int) -> Any:
    return exact.in_float64(lambda *args: jit_solve(*args, num_steps), matrix, b)


@pytest.mark.parametrize("seed", range(3))
def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_dimensions_and_not_in_fewer(seed):
    matrix, b = spd(seed, np.geomspace(1, 30, D)), normal(seed + 10, D)
    x, residual = solve_exactly(matrix, b, D)
    same(x, np.linalg.solve(matrix, b), rtol=1e-6)
    assert residual < 1e-7
    x, residual = solve_exactly(matrix, b, D - 1)
    assert residual > 1e-4
    np.testing.assert_allclose(residual, np.linalg.norm(b - matrix @ x) / np.linalg.norm(b), rtol=1e-6)
    # In single precision rounding costs a few steps more.
    x, residual = (np.asarray(y) for y in jit_solve(matrix.astype(np.float32), b.astype(np.float32), 2 * D))
    same(x, np.linalg.solve(matrix, b), rtol=1e-4)
    assert residual < 1e-6


def test_as_many_steps_as_there_are_different_eigenvalues_are_enough():
    matrix, b = spd(0, [1] * 3 + [5] * 3 + [20] * 2), normal(0, D)
    assert solve_exactly(matrix, b, 3)[1] < 1e-7 < 1e-3 < solve_exactly(matrix, b, 2)[1]


def test_steps_past_the_solution_change_nothing():
    """Not one bit, in either precision: what is left of the residual is rounding, and is not divided by itself."""
    for dtype in (np.float32, np.float64):
        matrix, b = spd(1, np.geomspace(1, 30, D)).astype(dtype), normal(1, D).astype(dtype)
        with jax.enable_x64(dtype == np.float64):
            few, many = jit_solve(matrix, b, 3 * D), jit_solve(matrix, b, 40 * D)
            assert few[0].dtype == dtype
            jax.tree.map(np.testing.assert_array_equal, few, many)
            assert many[1] < 1e-6


def test_nothing_on_the_right_is_solved_by_nothing():
    x, residual = jit_solve(spd(0, np.ones(D)).astype(np.float32), jnp.zeros(D), D)
    assert not np.asarray(x).any() and residual == 0


def test_a_singular_system_that_has_solutions_is_solved_by_the_shortest():
    """A softmax has a direction in each state that changes nothing: its Fisher matrix is singular."""
    matrix = spd(2, [0, 0, 0, 1, 2, 3, 5, 8])
    b = matrix @ normal(3, D)
    x, residual = solve_exactly(matrix, b, 3 * D)
    same(x, np.linalg.pinv(matrix) @ b, rtol=1e-6)
    assert residual < 1e-7


def test_where_the_matrix_has_no_curvature_there_is_no_step():
    x, residual = jit_solve(jnp.zeros((D, D)), normal(0, D).astype(np.float32), D)
    assert not np.asarray(x).any() and residual == 1


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**30])
def test_the_solution_scales_with_the_right_hand_side(scale):
    """To the last bit: nothing compares a gradient with an absolute number."""
    matrix, b = spd(3, np.geomspace(1, 30, D)).astype(np.float32), normal(4, D).astype(np.float32)
    x, residual = jit_solve(matrix, b, D)
    scaled, scaled_residual = jit_solve(matrix, np.float32(scale) * b, D)
    np.testing.assert_array_equal(scaled, scale * np.asarray(x))
    assert scaled_residual == residual


def test_lanes_of_nested_vmaps_solve_as_in_a_plain_loop():
    """Some are solved at the first step, some at the third, and one has nothing to solve."""
    spectra = [np.geomspace(1, 30, D), np.ones(D), np.repeat([1, 4, 9, 16], 2)]
    matrices = np.stack([spd(i, spectrum) for i, spectrum in enumerate(spectra)]).astype(np.float32)  # [H]
    b = normal(5, 4, D).astype(np.float32)  # [S]
    b[2] = 0
    nested = jax.vmap(jax.vmap(solve, (None, 0, None)), (0, None, None))
    x, residual = jax.jit(nested, static_argnums=2)(matrices, b, 2 * D)
    for h, s in itertools.product(range(3), range(4)):
        alone, alone_residual = jit_solve(matrices[h], b[s], 2 * D)
        np.testing.assert_allclose(x[h, s], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(residual[h, s], alone_residual, atol=1e-5)
        np.testing.assert_allclose(matrices[h] @ x[h, s], b[s], atol=1e-4)


# --- the natural gradient ---


def gain_of_the_objective(policy: Policy, params: Any) -> tuple[Callable, Any]:
    """(sum_s d(s) sum_a pi_params(a|s) A(s, a), whose gradient at the old policy is that of the objective; the share of
    each state in d)."""
    table = exact.log_policy(policy.network, MDP.num_states)
    log_pi = table(params)
    d, advantage = exact.visitation(MDP, log_pi), exact.values(MDP, log_pi).advantage

    def gain(params):
        return jnp.sum(d[:, None] * jnp.exp(log_pi) * jnp.exp(table(params) - log_pi) * advantage)

    return gain, d / jnp.sum(d)


def naturals(policy: Policy, params: Any, dampings: tuple[float, ...], num_cg_steps: int) -> Any:
    gain, share = gain_of_the_objective(policy, params)
    kl = divergence(policy, params, share)
    return [natural_gradient(gain, kl, params, damping, num_cg_steps) for damping in dampings]


def test_fed_with_expectations_it_is_the_laboratorys_natural_gradient():
    """Which for a tabular softmax is A / (1 - gamma), up to constants of the states; as damping falls, it leaves it."""
    policy, dampings = POLICIES["a table"], (0.0, 1e-4, 1e-3, 1e-2)
    table = exact.log_policy(policy.network, MDP.num_states)

    def compare(params):
        advantage = exact.values(MDP, table(params)).advantage
        return naturals(policy, params, dampings, 40), exact.natural_gradient(MDP, table, params), advantage

    found, expected, advantage = exactly(compare, policy.params)
    logits = [natural.direction["params"]["policy"]["logits"] for natural in found]
    same(logits[0], expected["params"]["policy"]["logits"], rtol=1e-5)
    same(logits[0], (advantage - advantage.mean(1, keepdims=True)) / (1 - MDP.gamma), rtol=1e-5)
    assert all(natural.residual < 1e-7 for natural in found)
    error = [np.abs(x - logits[0]).max() / np.abs(logits[0]).max() for x in logits[1:]]
    assert error[0] < 0.2 * error[1] < 0.04 * error[2]


def test_damped_it_solves_with_the_damped_fisher_matrix():
    policy = POLICIES["a categorical network"]
    table = exact.log_policy(policy.network, MDP.num_states)

    def compare(params):
        gradient = ravel_pytree(exact.bellman_gradient(MDP, table, params))[0]
        fisher = exact.fisher(MDP, table, params)
        natural = naturals(policy, params, (DAMPING,), 60)[0]
        return natural, ravel_pytree(natural.direction)[0], gradient, fisher

    natural, direction, gradient, fisher = exactly(compare, policy.params)
    matrix = fisher + DAMPING * np.eye(len(fisher))
    same(direction, np.linalg.solve(matrix, gradient), rtol=1e-6)
    np.testing.assert_allclose(natural.curvature, direction @ matrix @ direction, rtol=1e-8)
    np.testing.assert_allclose(natural.grad_norm, np.linalg.norm(gradient), rtol=1e-8)
    # A few steps are no solution, and say so.
    few = exactly(lambda params: naturals(policy, params, (DAMPING,), 2)[0], policy.params)
    left = np.linalg.norm(gradient - matrix @ np.asarray(ravel_pytree(few.direction)[0])) / np.linalg.norm(gradient)
    assert left > 1e-3
    np.testing.assert_allclose(few.residual, left, rtol=1e-5)


@pytest.mark.parametrize("damping", [0.0, DAMPING])
def test_a_step_by_kl_has_that_kl_to_second_order_and_in_the_limit_of_small_steps(damping):
    """Damping counts as KL: with it, the true one falls short."""
    policy, max_kl = POLICIES["a table"], 10.0 ** -np.arange(1, 8, 2)

    def step(params):
        _, share = gain_of_the_objective(policy, params)
        kl, natural = divergence(policy, params, share), naturals(policy, params, (damping,), 40)[0]
        product, direction = fisher_vector_product(kl, params, damping), ravel_pytree(natural.direction)[0]
        lengths = natural.length(max_kl)
        model = [0.5 * length**2 * direction @ product(direction) for length in lengths]
        return (
            model,
            [kl(move(params, length, natural.direction)) for length in lengths],
            direction @ direction,
            lengths,
        )

    model, true, square, length = (np.asarray(x) for x in exactly(step, policy.params))
    np.testing.assert_allclose(model, max_kl, rtol=1e-8)
    off = np.abs((true + 0.5 * damping * length**2 * square) / max_kl - 1)
    assert (off[1:] < 0.15 * off[:-1]).all() and off[-1] < 1e-3  # it falls with the step, as sqrt(max_kl) does
    assert damping == 0 or (true < 0.9 * max_kl).all()


def test_where_nothing_is_to_be_gained_there_is_no_direction_and_no_length():
    policy = POLICIES["a table"]
    params = jax.tree.map(jnp.float32, policy.params)
    natural = natural_gradient(lambda params: jnp.float32(3), divergence(policy, params), params, DAMPING, 5)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(natural.direction))
    assert (natural.curvature, natural.residual, natural.grad_norm, natural.length(0.1)) == (0, 0, 0, 0)


def test_a_torso_that_policy_and_critic_share_is_refused():
    with pytest.raises(UsageError) as error:
        refuse_a_shared_torso(actor_critic(arms_env(), NetworkConfig(shared=True)))
    message = "shared (True) must be off: a critic fitted on the policy's torso would leave the trust region"
    assert str(error.value) == message
    refuse_a_shared_torso(actor_critic(arms_env(), NetworkConfig()))


# --- the line search ---

SHRINK, NUM_TRIES, MAX_KL, KL_BEFORE, START, STEP = 0.5, 5, 0.1, 0.01, 2.0, 4.0


def gain_and_kl(bend: Any, stiffness: Any) -> tuple[Callable, Callable]:
    """Parabolas in the distance x from the start: x - bend * x^2, and a KL that need not be 0 there."""

    def gain(params):
        x = params["x"] - START
        return (x - bend * x * x).sum()

    def kl(params):
        return KL_BEFORE + (stiffness * (params["x"] - START) ** 2).sum()

    return gain, kl


def search(bend: Any, stiffness: Any) -> Any:
    params, step = {"x": jnp.array([START]), "y": jnp.array(7.0)}, {"x": jnp.array([STEP]), "y": jnp.array(1.0)}
    return line_search(*gain_and_kl(bend, stiffness), params, step, MAX_KL, SHRINK, NUM_TRIES)


def search_by_hand(bend: float, stiffness: float) -> tuple[dict, dict]:
    gain, kl = gain_and_kl(bend, stiffness)
    full_kl = kl({"x": np.array([START + STEP])})
    for fraction in SHRINK ** np.arange(NUM_TRIES):
        at = {"x": np.array([START + fraction * STEP])}
        if gain(at) > 0 and kl(at) <= MAX_KL:
            found = (1, fraction, gain(at), kl(at), full_kl)
            return at | {"y": 7 + fraction}, dict(zip(METRICS, found, strict=True))
    return {"x": np.array([START]), "y": 7.0}, dict(zip(METRICS, (0, 0, 0, KL_BEFORE, full_kl), strict=True))


METRICS = ("accepted", "step_fraction", "surrogate_improvement", "step_kl", "full_step_kl")
# The gain improves for x < 1 / bend, the KL is under its bound for x < 0.3 / sqrt(stiffness); x is tried at 4, 2, ...
BEND: Any = np.array([0.01, 0.2, 0.4, 0.9, 1.7, 3.0, 5.0, -1.0], np.float32)
STIFFNESS: Any = np.array([0.0, 0.015, 0.08, 0.7, 9.0], np.float32)


def test_the_line_search_takes_the_first_try_that_is_good_in_every_lane_of_nested_vmaps():
    nested = jax.vmap(jax.vmap(search, (0, None)), (None, 0))
    assert loops_are_unbatched(nested, BEND, STIFFNESS)
    found = quick_jit(nested)(BEND, STIFFNESS)
    fractions = set()
    for (h, stiffness), (s, bend) in itertools.product(enumerate(STIFFNESS), enumerate(BEND)):
        expected = search_by_hand(bend, stiffness)
        one = jax.tree.map(lambda x, h=h, s=s: np.asarray(x[h, s]), found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, expected)
        fractions.add(float(one[1]["step_fraction"]))
        if not one[1]["accepted"]:
            assert (one[0]["x"], one[0]["y"]) == (START, 7.0)
    assert fractions == {0.0, *(SHRINK ** np.arange(NUM_TRIES))}


def test_a_lane_alone_is_what_it_is_in_a_population():
    alone, population = quick_jit(search), quick_jit(jax.vmap(search))(BEND, np.full(8, STIFFNESS[1]))
    for s, bend in enumerate(BEND):
        one = jax.tree.map(lambda x, s=s: x[s], population)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), alone(bend, STIFFNESS[1]), one)


def tiny_search(gain: Callable, kl: Callable, num_tries: int = 4) -> tuple[float, Any]:
    """From 0 by a step of 1 under a KL of 1."""
    search = quick_jit(lambda x, step: line_search(gain, kl, x, step, 1.0, 0.5, num_tries))
    x, metrics = search(jnp.float32(0), jnp.float32(1))
    return float(x), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("gain", "kl"),
    [
        (lambda x: jnp.where(x > 0.3, jnp.nan, x), lambda x: x),
        (lambda x: x, lambda x: jnp.where(x > 0.3, jnp.nan, x)),
        (lambda x: jnp.where(x > 0.3, -jnp.inf, x), lambda x: x),
        (lambda x: x, lambda x: jnp.where(x > 0.3, jnp.inf, x)),
    ],
)
def test_a_candidate_that_is_no_number_is_not_taken(gain, kl):
    x, metrics = tiny_search(gain, kl)
    assert x == metrics["step_fraction"] == metrics["surrogate_improvement"] == metrics["step_kl"] == 0.25
    # With no other left there is no step, and what was is not touched by it.
    x, metrics = tiny_search(gain, kl, num_tries=2)
    assert x == metrics["accepted"] == metrics["step_kl"] == metrics["surrogate_improvement"] == 0


def test_the_bound_itself_is_allowed_and_no_gain_is_not_enough():
    assert tiny_search(lambda x: x, lambda x: x * x)[0] == 1
    assert tiny_search(lambda x: x, lambda x: 1.001 * x * x)[0] == 0.5
    assert tiny_search(lambda x: 0 * x, lambda x: x)[0] == 0
    assert tiny_search(lambda x: -x, lambda x: x)[1]["accepted"] == 0


def test_a_step_is_searched_from_where_the_gain_is_and_not_from_zero():
    """A gain that is positive everywhere and only falls has nothing to offer."""
    x, metrics = tiny_search(lambda x: 10 - x, lambda x: 0 * x)
    assert x == metrics["accepted"] == 0
