"""Linear-quadratic regulation: the environment by hand and by its moments, and what the laboratory computes of it.

The oracle is a series: second moments of the state, step by step, and what each step costs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

import purepg.envs
from purepg.envs.lqr import LQR, coupled_carts, lqr_env
from purepg.equations.advantages import discounted_return
from purepg.experience.rollout import episodes, reset_all, rollout
from purepg.lab.exact import in_float64
from purepg.lab.riccati import closed_loop, gradient, objective, optimum, state_moment, values
from purepg.networks.linear import LinearPolicy, LinearQuadraticConfig, QuadraticQ, linear_quadratic
from purepg.types import Actor, Box, UsageError

SMALL = LQR(  # nothing in it is symmetric but what must be
    A=np.array([[1.0, 0.2], [-0.1, 0.9]]),
    B=np.array([[0.0, 0.3, 0.1], [0.5, -0.2, 0.0]]),
    Q=np.array([[1.0, 0.3], [0.3, 0.5]]),
    R=np.array([[0.2, 0.05, 0.0], [0.05, 0.3, 0.0], [0.0, 0.0, 0.4]]),
    start_std=0.7,
    noise_std=0.3,
    gamma=0.9,
    horizon=5,
)
CARTS = coupled_carts()
PROBLEMS = {"small": SMALL, "carts": CARTS, "no noise": dataclasses.replace(SMALL, noise_std=0.0)}
EVERY = pytest.mark.parametrize("lqr", PROBLEMS.values(), ids=PROBLEMS.keys())


def some_gain(lqr: LQR, seed: int = 0) -> np.ndarray:
    """Not the best, and stable."""
    K = optimum(lqr)
    return 0.7 * K + 0.1 * np.random.default_rng(seed).normal(size=K.shape)


def actor(K: np.ndarray) -> Actor:
    return Actor.of(lambda key, obs: -obs @ jnp.asarray(K.T, jnp.float32))


# --- the environment ---


def test_a_step_is_the_equation_and_the_reward_that_of_the_state_it_leaves():
    env = lqr_env(dataclasses.replace(SMALL, noise_std=0.0))
    state, obs = env.reset(jax.random.key(0))
    x, u = np.array([2.0, -1.0]), np.array([10.0, 1.0, -2.0])  # an action far beyond 1 is taken as it is
    state, step = env.step(jax.random.key(1), state._replace(x=jnp.asarray(x, jnp.float32)), jnp.asarray(u))
    # x' = [2 - .2 + .3 - .2, -.2 - .9 + 5 - .2];  cost 4 - 1.2 + .5, and 20 + 2 * .5 + .3 + 1.6
    np.testing.assert_allclose(step.obs, [1.9, 3.7], rtol=1e-6)
    np.testing.assert_allclose(step.reward, -(3.3 + 22.9), rtol=1e-6)
    np.testing.assert_array_equal(state.x, step.obs)
    assert obs.shape == (2,) and obs.dtype == step.obs.dtype == step.reward.dtype == jnp.float32
    assert step.reward.shape == ()


def test_the_clock_truncates_and_nothing_ever_terminates():
    """With states far beyond any that a policy would reach, too; and the clock starts again at a reset."""
    env = lqr_env(SMALL)

    wild = Actor.of(lambda key, obs: jnp.full((2, 3), 1e6))
    world = reset_all(jax.random.key(0), env, 2)
    _, trajectory, _ = quick_jit(lambda key: rollout(key, env, wild, world, 12))(jax.random.key(1))
    assert not trajectory.terminated.any()
    np.testing.assert_array_equal(trajectory.truncated.all(1), np.arange(12) % 5 == 4)
    np.testing.assert_array_equal(trajectory.truncated.any(1), np.arange(12) % 5 == 4)
    assert np.abs(trajectory.obs[5]).max() < 5 < np.abs(trajectory.next_obs[4]).min()
    assert env.max_episode_steps == 5


@pytest.mark.parametrize(("start_std", "noise_std"), [(0.7, 0.3), (0.0, 0.0)])
def test_starts_and_noise_are_normal_with_the_standard_deviations_that_were_asked_for(start_std, noise_std):
    env, n = lqr_env(dataclasses.replace(SMALL, start_std=start_std, noise_std=noise_std)), 20_000

    @quick_jit
    def draw(key):
        def one(key):
            k_reset, k_step = jax.random.split(key)
            state, x = env.reset(k_reset)
            still = jnp.array([1.0, 2.0])
            return x, env.step(k_step, state._replace(x=still), jnp.zeros(3))[1].obs - SMALL.A @ still

        return jax.vmap(one)(jax.random.split(key, n))

    for x, std in zip(draw(jax.random.key(0)), (start_std, noise_std), strict=True):
        x = np.asarray(x, np.float64)
        error = 5 / np.sqrt(n) * np.array([std, 1.5 * std**2, 4 * std**4]) + 1e-6
        np.testing.assert_allclose(x.mean(0), 0, atol=error[0])
        np.testing.assert_allclose(x.T @ x / n, std**2 * np.eye(2), atol=error[1])
        np.testing.assert_allclose(np.mean(x**4, axis=0), 3 * std**4, atol=2.5 * error[2])  # a uniform's is 1.8


def test_spaces_are_unbounded_vectors_and_the_carts_have_a_name_on_the_command_line():
    env = purepg.envs.make("lqr")
    for space, size in ((env.observation_space, 4), (env.action_space, 2)):
        assert isinstance(space, Box) and space.shape == (size,)
        assert np.isneginf(space.low).all() and np.isposinf(space.high).all() and not space.bounded
    assert (env.name, env.max_episode_steps) == ("lqr", 100)
    stiff = purepg.envs.make("lqr", spring=2.0)
    x = jnp.array([1.0, 0.0, 0.0, 0.0])  # a cart off the centre: the spring pulls both, by dt * spring
    for made, pull in ((env, 0.1), (stiff, 0.4)):
        state = made.reset(jax.random.key(0))[0]._replace(x=x)
        moved, noise = (made.step(jax.random.key(1), s, jnp.zeros(2))[1].obs for s in (state, state._replace(x=0 * x)))
        np.testing.assert_allclose(moved - noise, [1, -pull, 0, pull], atol=1e-6)


def test_the_carts_are_pushed_each_by_its_own_motor_and_pull_at_each_other():
    env = lqr_env(dataclasses.replace(CARTS, noise_std=0.0))
    state, _ = env.reset(jax.random.key(0))
    _, step = env.step(jax.random.key(0), state._replace(x=jnp.array([1.0, 2.0, 0.0, -1.0])), jnp.array([3.0, -1.0]))
    # positions move by .2 * velocity, velocities by .2 * (motor +- .5 - .1 * velocity)
    expected = [1.4, 2 + 0.2 * (3 - 0.5 - 0.2), -0.2, -1 + 0.2 * (-1 + 0.5 + 0.1)]
    np.testing.assert_allclose(step.obs, expected, rtol=1e-6)
    np.testing.assert_allclose(step.reward, -(1 + 0.4 + 0.1 + 0.1 * 10), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"A": np.eye(3)}, r"A has shape \(3, 3\), but must have \(2, 2\)"),
        ({"B": np.ones(2)}, "where B is"),
        ({"B": np.ones((2, 0)), "R": np.ones((0, 0))}, "shape"),
        ({"Q": np.eye(3)}, "Q has shape"),
        ({"R": np.eye(2)}, "R has shape"),
        ({"Q": np.diag([1.0, -0.1])}, "Q must be symmetric and positive semidefinite"),
        ({"Q": [[1.0, 0.1], [0.0, 1.0]]}, "Q must be symmetric"),
        ({"R": np.diag([1.0, 1.0, 0.0])}, "R must be symmetric and positive definite"),
        ({"gamma": 1.0}, r"gamma \(1.0\) must be in \[0, 1\)"),
        ({"gamma": -0.1}, "gamma"),
        ({"start_std": -1.0}, "start_std and noise_std"),
        ({"noise_std": -1.0}, "start_std and noise_std"),
        ({"noise_std": np.nan}, "start_std and noise_std"),
        ({"A": np.full((2, 2), np.nan)}, "A must be finite"),
        ({"horizon": 0}, "horizon at least 1"),
    ],
)  # fmt: skip
def test_what_is_no_regulation_is_refused_in_one_line(changes, says):
    with pytest.raises(UsageError, match=says) as error:
        dataclasses.replace(SMALL, name="mine", **changes)
    assert "\n" not in str(error.value) and str(error.value).startswith("mine: ")


def test_matrices_are_double_precision_and_copies_of_what_was_given():
    B = np.eye(2, dtype=np.float32)
    lqr = LQR(np.array([[1, 0], [0, 1]]), B, np.eye(2, dtype=int), np.eye(2))
    B[0, 0] = 5
    assert all(x.dtype == np.float64 for x in (lqr.A, lqr.B, lqr.Q, lqr.R)) and lqr.B[0, 0] == 1
    assert (SMALL.num_states, SMALL.num_actions) == (2, 3)
    LQR(lqr.A, lqr.B, np.zeros((2, 2)), lqr.R)  # a state may cost nothing


# --- the laboratory ---


def cost_to_come(lqr: LQR, K: np.ndarray, M: Any, num_steps: int = 2000) -> Any:
    """sum_t gamma^t E[cost_t] of u = -K x from a first state of second moment M, one step after the other."""
    loop, cost = lqr.A - lqr.B @ K, lqr.Q + K.T @ lqr.R @ K
    noise = lqr.noise_std**2 * np.eye(len(lqr.A))
    total = 0.0
    for t in range(num_steps):
        total += lqr.gamma**t * np.sum(cost * M)
        M = loop @ M @ loop.T + noise
    return total


@EVERY
def test_values_are_minus_the_long_sum_of_what_each_step_costs(lqr):
    K, rng = some_gain(lqr), np.random.default_rng(1)
    P, H, c = values(lqr, K)
    n, m = lqr.B.shape
    np.testing.assert_allclose(P, P.T, atol=1e-12 * np.abs(P).max())
    np.testing.assert_allclose(H, H.T, atol=1e-12 * np.abs(H).max())
    for _ in range(3):
        x, u = rng.normal(size=n), rng.normal(size=m)
        assert x @ P @ x + c == pytest.approx(cost_to_come(lqr, K, np.outer(x, x)), rel=1e-10)
        z, x_next = np.append(x, u), lqr.A @ x + lqr.B @ u
        moment = np.outer(x_next, x_next) + lqr.noise_std**2 * np.eye(n)
        later = lqr.gamma * cost_to_come(lqr, K, moment)
        assert z @ H @ z + c == pytest.approx(x @ lqr.Q @ x + u @ lqr.R @ u + later, rel=1e-10)
        on_policy = np.append(x, -K @ x)
        assert on_policy @ H @ on_policy == pytest.approx(x @ P @ x, rel=1e-10)


@EVERY
def test_objective_and_state_moment_are_long_sums_from_the_start(lqr):
    K, n = some_gain(lqr), lqr.num_states
    assert objective(lqr, K) == pytest.approx(-cost_to_come(lqr, K, lqr.start_std**2 * np.eye(n)), rel=1e-10)
    loop, M, total = lqr.A - lqr.B @ K, lqr.start_std**2 * np.eye(n), np.zeros((n, n))
    for t in range(2000):
        total += lqr.gamma**t * M
        M = loop @ M @ loop.T + lqr.noise_std**2 * np.eye(n)
    np.testing.assert_allclose(state_moment(lqr, K), total, atol=1e-10 * np.abs(total).max())


def test_objective_is_the_mean_discounted_return_of_episodes_in_the_environment():
    """Whatever its horizon: here of 60 steps, what is left being the value of the state in which the clock stops."""
    lqr = dataclasses.replace(CARTS, horizon=60)
    K = some_gain(lqr)
    P, _, c = values(lqr, K)

    @quick_jit
    def mean_return(key):
        x, mask, _ = episodes(key, lqr_env(lqr), actor(K), 4000, 100)
        last = x.next_obs[lqr.horizon - 1]
        final_value = -jnp.einsum("ni,ij,nj->n", last, jnp.asarray(P, jnp.float32), last) - c
        G = discounted_return(x.reward, mask, lqr.gamma, final_value)[0]
        alone = discounted_return(x.reward, mask, lqr.gamma)[0]
        return G.mean(), G.std() / np.sqrt(len(G)), mask.sum(), alone.mean()

    mean, error, num_steps, alone = map(float, mean_return(jax.random.key(0)))
    J = objective(lqr, K)
    assert num_steps == 4000 * 60 and error < 0.02 * abs(J)
    assert abs(mean - J) < 4 * error
    assert alone > mean


def dense_objective(lqr: LQR, K: Any) -> Any:
    """J(K), differentiable: both equations as systems of n^2 unknowns."""
    n, g = lqr.num_states, lqr.gamma
    loop = lqr.A - lqr.B @ K
    cost = lqr.Q + K.T @ lqr.R @ K
    P = jnp.linalg.solve(jnp.eye(n * n) - g * jnp.kron(loop.T, loop.T), cost.ravel()).reshape(n, n)
    return -(lqr.start_std**2 + g / (1 - g) * lqr.noise_std**2) * jnp.trace(P)


@EVERY
def test_three_forms_give_one_gradient_and_finite_differences_agree(lqr):
    """By Fazel et al., by differentiating J, and as deterministic policy gradient: the sum over the states visited of
    grad mu(x) grad_a Q(x, a) at a = mu(x)."""
    K, n = some_gain(lqr), lqr.num_states
    by_fazel = gradient(lqr, K)
    J, by_autodiff = in_float64(quick_jit(jax.value_and_grad(lambda K: dense_objective(lqr, K))), K)
    H, scale = values(lqr, K).H, np.abs(by_fazel).max()

    def visited(K_of_mu):
        """Over second moments M_t of the states under K: mu(x) = -K_of_mu x and Q is bilinear in them."""
        loop, M, total = lqr.A - lqr.B @ K, lqr.start_std**2 * np.eye(n), 0.0
        z = jnp.concatenate([jnp.eye(n), -K_of_mu])
        moments = np.zeros((n, n))
        for t in range(2000):
            moments += lqr.gamma**t * M
            M = loop @ M @ loop.T + lqr.noise_std**2 * np.eye(n)
        return total - jnp.sum((z.T @ H @ z) * moments)

    by_dpg = in_float64(jax.grad(visited), K)
    assert objective(lqr, K) == pytest.approx(float(J), rel=1e-11)
    np.testing.assert_allclose(by_fazel, by_autodiff, rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(by_fazel, by_dpg, rtol=0, atol=1e-10 * scale)
    h, differences = 1e-5, np.zeros_like(K)
    for i in np.ndindex(K.shape):
        step = np.zeros_like(K)
        step[i] = h
        differences[i] = (objective(lqr, K + step) - objective(lqr, K - step)) / (2 * h)
    np.testing.assert_allclose(by_fazel, differences, rtol=0, atol=1e-6 * scale)
    assert scale > 0.1


@EVERY
def test_riccatis_gain_has_no_gradient_is_greedy_for_its_own_q_and_beats_all_around_it(lqr):
    K, rng, n = optimum(lqr), np.random.default_rng(0), lqr.num_states
    J = objective(lqr, K)
    np.testing.assert_allclose(gradient(lqr, K), 0, atol=1e-10 * abs(J))
    assert np.abs(gradient(lqr, 0.9 * K)).max() > 1e-3 * abs(J)
    H = values(lqr, K).H
    np.testing.assert_allclose(np.linalg.solve(H[n:, n:], H[n:, :n]), K, rtol=0, atol=1e-10)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(5):
            assert objective(lqr, K + size * rng.normal(size=K.shape)) < J
    P, greedy = (
        np.zeros((n, n)),
        0 * K,
    )  # and, step by step from the last one, it is what an ever longer horizon asks for
    for _ in range(2000):
        gB = lqr.gamma * lqr.B.T @ P
        greedy = np.linalg.solve(lqr.R + gB @ lqr.B, gB @ lqr.A)
        P = lqr.Q + lqr.gamma * lqr.A.T @ P @ (lqr.A - lqr.B @ greedy)
    np.testing.assert_allclose(greedy, K, rtol=0, atol=1e-9)


def test_policy_iteration_from_no_gain_at_all_improves_at_every_round_and_ends_at_riccatis():
    K, J = np.zeros((2, 4)), [objective(CARTS, np.zeros((2, 4)))]
    for _ in range(10):
        H = values(CARTS, K).H
        K = np.linalg.solve(H[4:, 4:], H[4:, :4])
        J.append(objective(CARTS, K))
    assert np.diff(J).min() > -1e-12 and J[0] < 20 * J[-1]
    np.testing.assert_allclose(K, optimum(CARTS), rtol=0, atol=1e-10)


def test_a_discount_of_zero_leaves_the_step_that_is_taken():
    lqr = dataclasses.replace(SMALL, gamma=0.0)
    K = some_gain(SMALL)
    J = -(0.7**2) * np.trace(lqr.Q + K.T @ lqr.R @ K)
    assert objective(lqr, K) == pytest.approx(J, rel=1e-12) and values(lqr, K).c == 0
    np.testing.assert_allclose(gradient(lqr, K), -2 * lqr.R @ K * 0.7**2, rtol=1e-12)
    np.testing.assert_allclose(optimum(lqr), 0, atol=1e-12)


def test_a_gain_of_infinite_cost_is_refused_and_one_just_short_of_it_is_not():
    """The state may grow by less than 1 / sqrt(gamma) a step."""
    for function in (closed_loop, values, objective, state_moment, gradient):
        with pytest.raises(UsageError, match=r"small carts: this gain's cost is infinite.* by 5\.57 per step") as error:
            function(dataclasses.replace(CARTS, name="small carts"), -10 * optimum(CARTS))
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"small carts: .* no gain has a finite cost"):
        optimum(LQR(1.1 * np.eye(2), np.array([[0.0], [1.0]]), np.eye(2), np.eye(1), name="small carts"))
    edge = np.sqrt(1 / 0.9)
    for growth, finite in ((0.999 * edge, True), (1.001 * edge, False), (-1.001 * edge, False)):
        lqr = dataclasses.replace(SMALL, A=np.diag([growth, 0.5]))
        if finite:
            assert objective(lqr, np.zeros((3, 2))) < -100
        else:
            with pytest.raises(UsageError, match="infinite"):
                objective(lqr, np.zeros((3, 2)))


# --- the networks in which it is exact ---


def test_a_linear_policy_and_a_quadratic_q_hold_the_exact_solution():
    lqr, rng = SMALL, np.random.default_rng(2)
    K = some_gain(lqr)
    _, H, c = values(lqr, K)
    x, u = rng.normal(size=(4, 2)), rng.normal(size=(4, 3))
    skew = rng.normal(size=H.shape)
    lopsided = H + skew - skew.T  # of which only the symmetric part counts

    def all_of(x, u):
        policy: Any = LinearPolicy(3)
        q = QuadraticQ()
        outs = []
        for matrix in (-H, -lopsided):
            params = {"params": {"matrix": jnp.asarray(matrix), "offset": jnp.asarray(-c)}}
            outs.append((q.apply(params, x, u), jax.vmap(jax.hessian(lambda u, p=params: q.apply(p, x[0], u)))(u)))
        return policy.apply({"params": {"weight": jnp.asarray(-K.T)}}, x).mode(), outs

    mode, outs = in_float64(all_of, x, u)
    z = np.concatenate([x, u], axis=1)
    np.testing.assert_allclose(mode, -x @ K.T, rtol=1e-12)
    for q, hessian in outs:
        np.testing.assert_allclose(q, -np.einsum("bi,ij,bj->b", z, H, z) - c, rtol=1e-12)
        np.testing.assert_allclose(hessian, np.broadcast_to(-2 * H[2:, 2:], hessian.shape), rtol=1e-12)


def test_the_networks_start_at_zero_and_ask_for_unbounded_actions():
    env = lqr_env(SMALL)
    network = linear_quadratic(env, LinearQuadraticConfig())
    params = network.init(jax.random.key(0), jnp.zeros(2))
    assert jax.tree.map(jnp.shape, params) == {
        "policy": {"params": {"weight": (2, 3)}},
        "critic": {"params": {"matrix": (1, 5, 5), "offset": (1,)}},
    }
    assert not any(x.any() for x in jax.tree.leaves(params))
    q = network.q(params, jnp.ones((7, 2)), jnp.ones((7, 3)))
    assert q.shape == (1, 7)
    for name in ("Pendulum-v1", "CartPole-v1", "garnet"):
        with pytest.raises(UsageError, match="try lqr") as error:
            linear_quadratic(purepg.envs.make(name), LinearQuadraticConfig())
        assert "\n" not in str(error.value)
