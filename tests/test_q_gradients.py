"""The gradients that go through a Q against exact ones: deterministic policy gradient on linear-quadratic regulation,
with the exact Q and with a learned one; soft actor-critic's and the actor-critic's with Q on finite processes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.lqr import LQR, coupled_carts, lqr_env
from purepg.envs.named_mdps import garnet
from purepg.equations.advantages import discount_power
from purepg.equations.distributions import Categorical, TanhGaussian, executed
from purepg.equations.losses import deterministic_policy_gradient, expected_soft_policy_gradient, soft_policy_gradient
from purepg.experience.rollout import reset_all, rollout
from purepg.lab.accuracy import sample, statistics, unbiasedness
from purepg.lab.estimators import update_of
from purepg.lab.exact import (
    bellman_gradient,
    in_float64,
    log_policy,
    objective,
    occupancy_gradient,
    values,
    visitation,
    weighted_gradient,
)
from purepg.lab.riccati import gradient as lqr_gradient
from purepg.lab.riccati import optimum as lqr_optimum
from purepg.lab.riccati import state_moment
from purepg.lab.riccati import values as lqr_values
from purepg.lab.trajectories import state_distributions
from purepg.networks.actor_critic import ActorQ
from purepg.networks.linear import LinearQuadraticConfig, linear_quadratic
from purepg.networks.tabular import TabularValue, tabular_policy
from purepg.optimize import with_params
from purepg.train import train
from purepg.types import Actor, Discrete, State

DETECTED = 6.0  # |z|
TINY = 1e-20  # a learning rate that leaves float32 parameters as they are

HALVES = {"policy_learning_rate": jnp.array([1.0, TINY]), "critic_learning_rate": jnp.array([TINY, 1.0])}


def steps_of_either_half(make: Any, config: Any, params: Any, key: Any) -> dict[str, Any]:
    """The estimate that is the policy's step while the critic stands still, and the other way round."""

    def one(rates):
        return update_of(make(dataclasses.replace(config, **rates)), params, 1.0)(key)

    policy, critic = (jax.tree.map(lambda x, i=i: x[i], jax.vmap(one)(HALVES)) for i in (0, 1))
    return {"policy": policy["policy"], "critic": critic["critic"]}


# --- deterministic policy gradient ---

CARTS = coupled_carts()
K = 0.5 * lqr_optimum(CARTS) + 0.1 * np.random.default_rng(0).normal(size=(2, 4))
LIMITED = dataclasses.replace(CARTS, horizon=10)  # values and gradients are those of CARTS
NETWORK = linear_quadratic(lqr_env(CARTS), LinearQuadraticConfig())


def lqr_params(matrix: np.ndarray, offset: float) -> Any:
    """u = -K x, and Q(z) = z^T matrix z + offset."""
    critic = {"matrix": matrix[None], "offset": np.full(1, offset)}
    return jax.tree.map(jnp.float32, {"policy": {"params": {"weight": -K.T}}, "critic": {"params": critic}})


def exact_params() -> Any:
    _, H, c = lqr_values(CARTS, K)
    return lqr_params(-H, -c)


def dpg_mean(matrix: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """sum of grad mu(x) grad_a Q(x, a) at a = mu(x), `[n, m]`, over states of that second moment."""
    matrix = (matrix + matrix.T) / 2
    return 2 * moment @ (matrix[4:, :4] - matrix[4:, 4:] @ K).T


def moments(lqr: LQR, num_steps: int, exploration_std: float = 0.0) -> np.ndarray:
    """E[x_t x_t^T] of the states in a rollout that began with a reset, `[T, n, n]`."""
    loop, out = lqr.A - lqr.B @ K, []
    noise = lqr.noise_std**2 * np.eye(4) + exploration_std**2 * lqr.B @ lqr.B.T
    for t in range(num_steps):
        M = loop @ out[-1] @ loop.T + noise if t % lqr.horizon else lqr.start_std**2 * np.eye(4)
        out.append(M)
    return np.stack(out)


def test_dpg_with_the_exact_q_has_the_exact_gradient_as_its_mean():
    """Over 300 steps, after which gamma^t is 2e-7; three ways to get it wrong are seen."""
    T, env, params = 300, lqr_env(dataclasses.replace(CARTS, horizon=1000)), exact_params()
    exact = -lqr_gradient(CARTS, K).T  # by the weight W = -K^T
    H, M = lqr_values(CARTS, K).H, moments(dataclasses.replace(CARTS, horizon=1000), T)
    discounted = np.einsum("t,tij->ij", 0.95 ** np.arange(T), M)
    np.testing.assert_allclose(dpg_mean(-H, discounted), exact, rtol=0, atol=1e-6 * np.abs(exact).max())

    def estimate(key, batch):
        k_start, k_rollout = jax.random.split(key)

        def mode(params, obs):
            return NETWORK.apply(params, obs)[0].mode()

        actor = Actor.of(lambda key, obs: mode(params, obs))
        _, x, _ = rollout(k_rollout, env, actor, reset_all(k_start, env, batch), T)
        discount = discount_power(x.reward, CARTS.gamma)

        def ascent(obs, discount):
            def loss(params):
                q = NETWORK.q(jax.lax.stop_gradient(params), obs, mode(params, obs)).mean(0)
                return jnp.sum(discount * deterministic_policy_gradient(q)) / batch

            return -jax.grad(loss)(params)["policy"]["params"]["weight"]

        right = ascent(x.obs, discount)
        return {
            "DPG": right,
            "sign flipped": -right,
            "gamma^t dropped": ascent(x.obs, jnp.ones_like(discount)),
            "at the next state": ascent(x.next_obs, discount),
        }

    samples = sample(lambda key: estimate(key, 4), jax.random.key(1), 800, chunk=200, jit=quick_jit)
    found = {name: statistics(x, exact, 4) for name, x in samples.items()}
    verdict = unbiasedness({"DPG": found.pop("DPG")})["DPG"]
    assert verdict.unbiased and verdict.detectable < 0.05, verdict
    for name, broken in found.items():
        assert np.abs(broken.z).max() > DETECTED, name


def dpg_config(**changes: Any) -> DPGConfig:
    """One plain step of either half an update; a critic that stays as it is."""
    config = DPGConfig(
        num_envs=4, num_steps=25, num_critic_steps=1, optimizer="sgd", policy_learning_rate=1.0,
        critic_learning_rate=TINY, gamma=CARTS.gamma, exploration_std=2.0, max_grad_norm=None,
        anneal_learning_rate=False,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_dpgs_update_is_the_gradient_over_the_states_that_its_exploring_rollout_visits():
    """Two episodes and half a third; and its critic, being exact, stays where it is in the mean, unless the clock
    is taken for a death."""
    env, params, config = lqr_env(LIMITED), exact_params(), dpg_config()
    H = lqr_values(CARTS, K).H
    exact = dpg_mean(-H, moments(LIMITED, 25, 2.0).mean(0))
    dead = dataclasses.replace(
        config, bootstrap_at_truncation=False, policy_learning_rate=TINY, critic_learning_rate=1.0
    )

    def estimate(key):
        halves = steps_of_either_half(lambda c: dpg(env, NETWORK, c), config, params, key)
        return halves | {"death": update_of(dpg(env, NETWORK, dead), params, 1.0)(key)["critic"]}

    samples = sample(estimate, jax.random.key(2), 1500, chunk=750, jit=quick_jit)
    weight, death = samples["policy"]["params"]["weight"], samples["death"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape[1:]), samples["critic"])
    found = {
        "policy": statistics(weight, exact),
        "critic": statistics(samples["critic"], zeros),
    }
    verdicts = unbiasedness(found)
    assert all(v.unbiased for v in verdicts.values()), verdicts
    assert verdicts["policy"].detectable < 0.05
    without_noise = dpg_mean(-H, moments(LIMITED, 25).mean(0))
    assert np.abs(statistics(weight, without_noise).z).max() > DETECTED
    assert np.abs(statistics(death, zeros).z).max() > DETECTED


@pytest.fixture(scope="module")
def learned():
    """The critic that DPG learns of a policy that stands still, with the clock as what it is and, for fewer updates, as
    a death: `[n + m, n + m]` and an offset each, by `bootstrap_at_truncation`."""
    config = dpg_config(
        num_envs=64, num_steps=20, num_critic_steps=4, optimizer="adam", policy_learning_rate=TINY,
        critic_learning_rate=0.02, exploration_std=4.0, anneal_learning_rate=True,
    )  # fmt: skip
    env = lqr_env(LIMITED)

    def fit(key, config):
        algorithm = dpg(env, NETWORK, config)
        k_init, k_train = jax.random.split(key)
        learner, world, _ = algorithm.init(k_init)
        params = {"policy": exact_params()["policy"], "critic": learner.params["critic"]}
        state = State(with_params(learner, params), world)
        return train(k_train, algorithm, state, 0, config.anneal_updates)[0].learner.params

    out = {}
    for bootstrap, num_updates in ((True, 800), (False, 100)):
        c = dataclasses.replace(config, bootstrap_at_truncation=bootstrap, anneal_updates=num_updates)
        params = quick_jit(lambda key, c=c: fit(key, c))(jax.random.key(3))
        np.testing.assert_array_equal(params["policy"]["params"]["weight"], np.float32(-K.T))
        critic = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["critic"]["params"])
        out[bootstrap] = (critic["matrix"] + critic["matrix"].T) / 2, float(critic["offset"])
    return out


def test_dpg_with_a_learned_q_points_where_the_exact_gradient_does(learned):
    """In length and direction, to a few per cent; not so where a time limit is taken for a death."""
    H = lqr_values(CARTS, K).H
    exact, visited = -lqr_gradient(CARTS, K).T, state_moment(CARTS, K)

    def error(bootstrap):
        return np.linalg.norm(dpg_mean(learned[bootstrap][0], visited) - exact) / np.linalg.norm(exact)

    assert error(True) < 0.05 and np.linalg.norm(learned[True][0] + H) < 0.02 * np.linalg.norm(H)
    assert error(False) > 0.2


def test_dpgs_update_with_a_learned_q_has_the_mean_of_that_q(learned):
    """Where the gradient's error is all the critic's, and none the estimator's."""
    config = dpg_config(exploration_std=0.0)
    params = lqr_params(*learned[True])
    update = update_of(dpg(lqr_env(LIMITED), NETWORK, config), params, 1.0)
    mean = dpg_mean(learned[True][0], moments(LIMITED, 25).mean(0))
    samples = sample(
        lambda key: update(key)["policy"]["params"]["weight"], jax.random.key(4), 2000, chunk=1000, jit=quick_jit
    )
    verdict = unbiasedness({"learned": statistics(samples, mean)})["learned"]
    assert verdict.unbiased and verdict.detectable < 0.05, verdict


# --- soft actor-critic ---

TAU = 0.4
MDP = garnet(3, 3, 2, 2, horizon=3)  # episodes of three steps that the clock ends
TABLES = ActorQ(tabular_policy(MDP), TabularValue(MDP.num_states, MDP.num_actions), Discrete(2), 1)
POLICY = log_policy(tabular_policy(MDP), MDP.num_states)
LOGITS = {"params": {"logits": np.random.default_rng(0).normal(size=(3, 2))}}


def finite_params(q: np.ndarray) -> Any:
    return jax.tree.map(jnp.float32, {"policy": LOGITS, "critic": {"params": {"value": q[None]}}})


def test_the_expected_soft_loss_over_the_states_visited_has_the_exact_entropy_regularised_gradient():
    """By the exact soft Q, in double precision: length and all. Without the entropy, or by a Q without it, not."""
    mdp = garnet()
    policy = log_policy(tabular_policy(mdp), mdp.num_states)
    params = {"params": {"logits": np.random.default_rng(0).normal(size=(6, 3))}}

    def all_of(params):
        log_pi = policy(params)
        soft, plain, d = values(mdp, log_pi, TAU).q, values(mdp, log_pi).q, visitation(mdp, log_pi)

        def by_loss(q, tau):
            # Q and d depend on the policy, and the loss must not look.
            loss = lambda params: jax.lax.stop_gradient(d) @ expected_soft_policy_gradient(policy(params), q, tau)  # noqa: E731
            return jax.tree.map(jnp.negative, jax.grad(loss)(params))

        exact = bellman_gradient(mdp, policy, params, TAU), occupancy_gradient(mdp, policy, params, TAU)
        return exact, by_loss(soft, TAU), [by_loss(plain, TAU), by_loss(soft, 0.0), by_loss(soft, -TAU)]

    (exact, again), by_loss, broken = jax.tree.map(np.asarray, in_float64(quick_jit(all_of), params))
    exact, again, by_loss, *broken = (x["params"]["logits"] for x in (exact, again, by_loss, *broken))
    scale = np.abs(exact).max()
    np.testing.assert_allclose(again, exact, rtol=0, atol=1e-10 * scale)
    np.testing.assert_allclose(by_loss, exact, rtol=0, atol=1e-10 * scale)
    for x in broken:
        assert np.abs(x - exact).max() > 0.02 * scale


def test_the_expected_soft_loss_is_minus_the_soft_value_and_holds_q_and_the_temperature_constant():
    log_pi = np.log([[0.2, 0.8], [0.5, 0.5]])
    q = np.array([[1.0, 2.0], [3.0, -1.0]])

    def loss(logits, shift):
        return expected_soft_policy_gradient(jax.nn.log_softmax(logits), q + shift, TAU * jnp.exp(shift))

    def value_and_slopes(logits):
        total = lambda logits, shift: loss(logits, shift).sum()  # noqa: E731
        return loss(logits, 0.0), jax.grad(total, argnums=1)(logits, 0.0), jax.grad(total)(logits, 0.0)

    value, of_q, of_logits = in_float64(value_and_slopes, log_pi)
    pi = np.exp(log_pi)
    np.testing.assert_allclose(-value, np.sum(pi * (q - TAU * log_pi), axis=1), rtol=1e-12)
    assert of_q == 0
    weight = q - TAU * log_pi
    expected = -pi * (weight - np.sum(pi * weight, axis=1, keepdims=True))
    np.testing.assert_allclose(of_logits, expected, rtol=1e-10, atol=1e-12)


def test_discrete_sacs_own_update_has_the_exact_soft_gradient_and_keeps_the_exact_soft_q():
    """On what random actions left in the buffer: the policy's step is the gradient over the states there, and the soft
    Q is where the critic's step is 0 in the mean, unless the clock is taken for a death or Q is a plain one."""
    N, T, env = 4, 7, mdp_env(MDP)
    soft, plain = in_float64(lambda params: [values(MDP, POLICY(params), tau).q for tau in (TAU, 0.0)], LOGITS)
    visited = state_distributions(MDP, np.log(np.full((3, 2), 0.5)), T, restart=True).mean(0)

    def mean(params):
        return weighted_gradient(POLICY, params, visited, soft - TAU * POLICY(params))

    exact = in_float64(mean, LOGITS)
    config = DiscreteSACConfig(
        num_envs=N, num_steps=T, num_gradient_steps=1, batch_size=16, capacity=N * T, warmup_steps=N * T,
        optimizer="sgd", policy_learning_rate=1.0, critic_learning_rate=TINY, gamma=MDP.gamma, temperature=TAU,
        learn_temperature=False,
    )  # fmt: skip
    death = dataclasses.replace(
        config, bootstrap_at_truncation=False, policy_learning_rate=TINY, critic_learning_rate=1.0
    )

    def steps(key, c, params):
        algorithm, (k_init, k_step) = sac_discrete(env, TABLES, c), jax.random.split(key)
        learner, world, _ = algorithm.init(k_init)
        state = State(with_params(learner, params)._replace(target={"critic": params["critic"]}), world)
        after, _ = algorithm.step(k_step, state, jnp.int32(0))
        return jax.tree.map(jnp.subtract, after.learner.params, params)

    rates = jax.tree.map(lambda x: x[jnp.array([0, 1, 1])], HALVES)
    q = jax.tree.map(lambda *x: jnp.stack(x), *map(finite_params, (soft, soft, plain)))

    def estimate(key):
        each = jax.vmap(lambda rates, params: steps(key, dataclasses.replace(config, **rates), params))(rates, q)
        policy, critic, of_plain = (jax.tree.map(lambda x, i=i: x[i], each) for i in range(3))
        of_death = steps(key, death, finite_params(soft))
        return {
            "policy": policy["policy"],
            "critic": critic["critic"],
            "plain Q": of_plain["critic"],
            "death": of_death["critic"],
        }

    samples = sample(estimate, jax.random.key(5), 1500, chunk=750, jit=quick_jit)
    found = {"policy": statistics(samples["policy"], exact)}
    zeros = jax.tree.map(lambda x: np.zeros(x.shape[1:]), samples["critic"])
    found |= {name: statistics(samples[name], zeros) for name in ("critic", "death", "plain Q")}
    broken = [found.pop(name) for name in ("death", "plain Q")]
    verdicts = unbiasedness(found)
    assert all(v.unbiased for v in verdicts.values()) and verdicts["policy"].detectable < 0.05, verdicts
    assert all(np.abs(x.z).max() > DETECTED for x in broken)


def test_the_reparameterised_soft_loss_has_the_integrated_gradient_as_its_mean():
    """One step, two actions in (-1, 1), a quadratic Q with a product in it. The integral is over the normals' density,
    which is what the parameters move there: nothing is reparameterised."""
    start_at = {"mean": np.array([0.3, -0.5]), "log_std": np.log([0.6, 0.9])}
    peak, H = np.array([0.4, 0.2]), np.array([[3.0, 1.0], [1.0, 2.0]])

    def q_of(action):
        return -jnp.einsum("...i,ij,...j->...", action - peak, H, action - peak)

    def integrated(params):
        node = jnp.linspace(-8, 8, 801)
        u = jnp.stack(jnp.meshgrid(node, node, indexing="ij"), axis=-1)
        std = jnp.exp(params["log_std"])
        log_density = jnp.sum(-(((u - params["mean"]) / std) ** 2) / 2 - jnp.log(std * jnp.sqrt(2 * jnp.pi)), axis=-1)
        log_prob = log_density - jnp.sum(jnp.log(1 - jnp.tanh(u) ** 2), axis=-1)
        return jnp.sum(jnp.exp(log_density) * (TAU * log_prob - q_of(jnp.tanh(u)))) * (node[1] - node[0]) ** 2

    exact = in_float64(quick_jit(jax.grad(integrated)), start_at)

    def losses(params, key, q_of_action):
        action, log_prob = TanhGaussian(params["mean"], params["log_std"]).scored(
            TanhGaussian(params["mean"], params["log_std"]).noise(key)
        )
        return soft_policy_gradient(log_prob, q_of_action(executed(action)), TAU)

    def held_constant(action):
        return q_of(jax.lax.stop_gradient(action))

    def estimate(key):
        params = jax.tree.map(jnp.float32, start_at)
        return {name: jax.grad(losses)(params, key, q) for name, q in {"soft": q_of, "cut": held_constant}.items()}

    samples = sample(estimate, jax.random.key(6), 100_000, chunk=10_000, jit=quick_jit)
    verdict = unbiasedness({"soft": statistics(samples["soft"], exact)})["soft"]
    assert verdict.unbiased and verdict.detectable < 0.03, verdict
    assert np.abs(statistics(samples["cut"], exact).z).max() > DETECTED


# --- the actor-critic with Q ---


def test_the_actor_critic_with_the_exact_q_takes_the_exact_gradient_and_keeps_its_q():
    """Over the states that a rollout of two episodes and a third of one visits; with the entropy's own gradient. The
    critic's step is 0 in the mean, unless the clock is taken for a death."""
    T, env = 7, mdp_env(MDP)
    Q = in_float64(lambda params: values(MDP, POLICY(params)).q, LOGITS)
    visited = state_distributions(MDP, in_float64(POLICY, LOGITS), T, restart=True).mean(0)

    def mean(params, coef):
        entropy = jax.grad(lambda params: visited @ Categorical(POLICY(params)).entropy())(params)
        ascent = weighted_gradient(POLICY, params, visited, Q)
        return jax.tree.map(lambda g, h: g + coef * h, ascent, entropy)

    exact = {coef: in_float64(mean, LOGITS, coef) for coef in (0.0, 0.5)}
    params = finite_params(Q)
    config = QActorCriticConfig(
        num_envs=4, num_steps=T, optimizer="sgd", learning_rate=1.0, critic_learning_rate=TINY, num_critic_steps=1,
        gamma=MDP.gamma, sarsa_lambda=0.7, max_grad_norm=None,
    )  # fmt: skip
    rates = {"learning_rate": jnp.array([1.0, 1.0, TINY]), "critic_learning_rate": jnp.array([TINY, TINY, 1.0])}
    rates["entropy_coef"] = jnp.array([0.0, 0.5, 0.0])
    death = dataclasses.replace(config, bootstrap_at_truncation=False, learning_rate=TINY, critic_learning_rate=1.0)

    def estimate(key):
        def update(config):
            return update_of(q_actor_critic(env, TABLES, config), params, 1.0)(key)

        each = jax.vmap(lambda rates: update(dataclasses.replace(config, **rates)))(rates)
        plain, entropy, critic = (jax.tree.map(lambda x, i=i: x[i], each) for i in range(3))
        return {
            "plain": plain["policy"],
            "entropy": entropy["policy"],
            "critic": critic["critic"],
            "death": update(death)["critic"],
        }

    samples = sample(estimate, jax.random.key(7), 2000, chunk=1000, jit=quick_jit)
    zeros = jax.tree.map(jnp.zeros_like, params["critic"])
    found = {
        "plain": statistics(samples["plain"], exact[0.0]),
        "entropy": statistics(samples["entropy"], exact[0.5]),
        "critic": statistics(samples["critic"], zeros),
    }
    verdicts = unbiasedness(found)
    assert all(v.unbiased for v in verdicts.values()), verdicts
    assert verdicts["plain"].detectable < 0.1 and verdicts["entropy"].detectable < 0.1
    assert np.abs(statistics(samples["entropy"], exact[0.0]).z).max() > DETECTED
    assert np.abs(statistics(samples["death"], zeros).z).max() > DETECTED


def test_the_gradient_with_entropy_is_that_of_the_regularised_objective():
    """What the rows above call exact, by finite differences of J."""
    exact, h = in_float64(lambda params: bellman_gradient(MDP, POLICY, params, TAU), LOGITS), 1e-5
    J = quick_jit(lambda params: objective(MDP, POLICY(params), TAU))
    for i in np.ndindex(3, 2):
        step = np.zeros((3, 2))
        step[i] = h
        up, down = (in_float64(J, {"params": {"logits": LOGITS["params"]["logits"] + s}}) for s in (step, -step))
        assert exact["params"]["logits"][i] == pytest.approx((up - down) / (2 * h), abs=1e-7)
