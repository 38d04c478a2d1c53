"""Policies with memory: the gradient summed over every trajectory against finite differences, against the algorithms'
own updates, and against the same update through windows; and the Fisher matrix of an unrolled policy."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from jax.flatten_util import ravel_pytree

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.envs.finite_mdp import FiniteMDP, mdp_env, unroll
from purepg.envs.named_mdps import aliased, garnet
from purepg.envs.named_pomdps import tmaze
from purepg.equations.trust_region import fisher_vector_product
from purepg.experience.rollout import Episodes, Recording
from purepg.lab.exact import bellman_gradient, in_float64, log_policy
from purepg.lab.histories import Cut, Histories, enumerate_histories, history_gradient, history_objective, window_bias
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.optimize import with_params
from purepg.types import Moment, Network, State, Window, first_seen

ALIASED = aliased()
# The same choices, rewards and returns in episodes of five steps each, as a rollout has them: the end is a place to be.
STRETCHED = replace(ALIASED, terminal=np.zeros(6, bool), horizon=5, horizon_terminates=True)
MAZE = tmaze(2)


def network_of(mdp: FiniteMDP, kind: Any = "gru", size: int = 3) -> Any:
    config = NetworkConfig(hidden=(3,), policy_scale=1.0, memory=kind, memory_size=size)
    return actor_critic(mdp_env(mdp, observe_alias=True), config)


def params_of(network: Network, seed: int = 0) -> Any:
    """Parameters, critic's among them, far from where they start."""
    seen = first_seen(network, jnp.int32(0))
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(network.init, jax.random.key(0), seen)
    return jax.tree.map(lambda x: 0.7 * rng.normal(size=x.shape), shapes)


def exactly(function: Callable, *args: Any) -> Any:
    return in_float64(quick_jit(function), *args)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def same(a: Any, b: Any, rtol: float = 1e-9) -> None:
    """Equal in every entry, to `rtol` of the largest."""
    a, b = flat(a), flat(b)
    assert np.abs(b).max() > 1e-3
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


class Case(NamedTuple):
    mdp: FiniteMDP
    network: Any
    params: Any
    gradient: Any


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """GRU policies and their exact gradients, with the parameters at which they are."""
    found = {}
    for mdp in (ALIASED, replace(ALIASED, gamma=1.0), replace(STRETCHED, gamma=1.0), MAZE):
        network = network_of(mdp)
        params = params_of(network)
        gradient = exactly(partial(history_gradient, mdp, network), params)
        found[f"{mdp.name} {mdp.gamma} {mdp.horizon}"] = Case(mdp, network, params, gradient)
    return found


HALF, WHOLE, LONG, RECALL = "aliased 0.5 None", "aliased 1.0 None", "aliased 1.0 5", "tmaze 1.0 3"


# --- the gradient itself ---


@pytest.mark.parametrize("name", [HALF, RECALL])
def test_the_gradient_is_what_finite_differences_of_the_objective_give(cases, name):
    """Along every parameter of the policy's; the critic's have none."""
    mdp, network, params, gradient = cases[name]
    point, unravel = ravel_pytree(params)
    J = quick_jit(jax.vmap(lambda point: history_objective(mdp, network, unravel(point))))
    h, moves = 1e-5, np.flatnonzero(flat(gradient))
    assert 40 < len(moves) < len(point)
    assert all(not np.any(x) for module, tree in gradient["params"].items() if "value" in module for x in [flat(tree)])
    step = h * np.eye(len(point))[moves]
    up, down = (in_float64(J, np.asarray(point, np.float64) + s) for s in (step, -step))
    np.testing.assert_allclose((up - down) / (2 * h), flat(gradient)[moves], rtol=0, atol=1e-9)


class Table(NamedTuple):
    """A policy that remembers nothing, of states."""

    alias: np.ndarray
    network: Any

    def apply(self, params, obs):
        nothing = jax.tree.map(lambda x: x.astype(float), self.network.memory(len(obs)))
        return self.network.apply(params, Moment(jnp.asarray(self.alias)[obs], nothing))


def test_a_policy_that_remembers_nothing_has_the_gradient_of_the_bellman_equation():
    """A stack of one observation, on a random process of three steps; that gradient goes through no trajectory."""
    mdp = garnet(num_states=4, num_actions=2, branching=2, horizon=3, horizon_terminates=True)
    mdp = unroll(replace(mdp, alias=np.array([0, 1, 0, 1])))
    network = network_of(mdp, "stack", size=1)
    policy: Any = log_policy(Table(mdp.alias, network), mdp.num_states)  # pyright: ignore

    def both(params):
        return history_gradient(mdp, network, params), bellman_gradient(mdp, policy, params)

    same(*exactly(both, params_of(network)), rtol=1e-12)


def test_stretching_the_aliased_process_to_five_steps_changes_no_gradient(cases):
    same(cases[LONG].gradient, cases[WHOLE].gradient, rtol=1e-12)
    with pytest.raises(AssertionError):
        same(cases[HALF].gradient, cases[WHOLE].gradient, rtol=0.1)


def test_the_histories_of_a_policy_have_probabilities_that_sum_to_one_and_windows_that_score_them_alike(cases):
    """`remember` step by step, as the enumeration goes, and `apply` to whole windows."""
    for name in (HALF, RECALL):
        mdp, network, params, _ = cases[name]

        def scores(params, mdp=mdp, network=network):
            every = enumerate_histories(mdp, network, params)
            policy, _ = network.apply(params, every.trajectory.obs)
            return every, policy.log_prob(every.trajectory.action)

        every, log_prob = exactly(scores, params)
        assert every.probability.sum() == pytest.approx(1, abs=1e-14)
        np.testing.assert_allclose(every.trajectory.log_prob, np.where(every.mask, log_prob, 0.0), atol=1e-14)
        assert every.mask.shape == ((5, 18) if name == HALF else (3, 16))


# --- the algorithms' own updates ---


def expected_update(
    case: Case, make: Callable, config: Any, met: Callable[[Histories], Histories] = lambda every: every
) -> Any:
    """The mean change of the parameters in one update with learning rate 1, on each of what it may have `met`: an
    episode, each with its probability."""
    mdp, network, params, _ = case
    env = mdp_env(mdp, observe_alias=True)

    def expected(params):
        def update(*one):
            trajectory, mask = jax.tree.map(lambda x: x[:, None], one)
            played = Episodes(trajectory, mask, {})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("purepg.algorithms.reinforce.episodes", lambda *unused: played)
                algorithm = make(env, network, config)
                learner, world, _ = algorithm.init(jax.random.key(0))
                if world:
                    recording = Recording(trajectory, jnp.zeros((len(mask), 3)))
                    world = world._replace(envs=world.envs._replace(env_state=recording))
                state, _ = algorithm.step(jax.random.key(1), State(with_params(learner, params), world), jnp.int32(0))
            return jax.tree.map(jnp.subtract, state.learner.params, params)

        trajectory, mask, probability = met(enumerate_histories(mdp, network, params))
        each = jax.vmap(update, in_axes=1)(trajectory, mask)
        return jax.tree.map(lambda x: jnp.tensordot(probability, x, 1), each)

    return exactly(expected, params)


PLAIN: Any = {"optimizer": "sgd", "learning_rate": 1.0, "value_coef": 0.0}


@pytest.mark.parametrize("name", [HALF, RECALL])
def test_reinforces_mean_update_of_a_policy_with_memory_is_the_exact_gradient(cases, name):
    """Of the discounted return, over episodes of two steps and of five; the critic, a baseline, remembers too."""
    case = cases[name]
    config = REINFORCEConfig(
        **PLAIN, num_episodes=1, mean_over_steps=False, max_steps=5, gamma=case.mdp.gamma, baseline="value",
        discount_states=True,
    )  # fmt: skip
    same(expected_update(case, reinforce, config), case.gradient)


def rollouts(T: int, **more: Any) -> Any:
    """The settings of one plain gradient step on one environment's rollout of T steps, with the critic as a baseline:
    lambda = 1, so that its error changes no mean."""
    return PLAIN | {"num_envs": 1, "num_steps": T, "gamma": 1.0, "gae_lambda": 1.0, "max_grad_norm": None} | more


def ppo_of(T: int, **more: Any) -> PPOConfig:
    return PPOConfig(**rollouts(T, normalize_advantage="off", num_epochs=1, num_minibatches=1, **more))


@pytest.mark.parametrize("name", [LONG, RECALL])
@pytest.mark.parametrize("algorithm", ["a2c", "ppo"])
def test_the_mean_update_of_a2c_and_the_first_step_of_ppo_are_the_exact_gradient(cases, name, algorithm):
    """Of an episode, where their losses are means over its steps."""
    case = cases[name]
    T = case.mdp.horizon or 0
    make, config = {"a2c": (a2c, A2CConfig(**rollouts(T))), "ppo": (ppo, ppo_of(T))}[algorithm]
    update = expected_update(case, make, config)
    same(T * flat(update), case.gradient)


def test_a_rollout_of_two_episodes_has_twice_the_gradient_of_one(cases):
    """Every pair of episodes of the T-maze, one after the other in a single window: no gradient, no memory and no
    return passes from one to the next."""

    def pairs(every):
        N = len(every.probability)
        first, second = np.divmod(np.arange(N * N), N)
        trajectory, mask = jax.tree.map(lambda x: jnp.concatenate([x[:, first], x[:, second]]), every[:2])
        return Histories(trajectory, mask, every.probability[first] * every.probability[second])

    update = expected_update(cases[RECALL], a2c, A2CConfig(**rollouts(6)), pairs)
    same(6 * flat(update), 2 * flat(cases[RECALL].gradient))


# --- windows ---


@pytest.mark.parametrize("kind", ["gru", "lstm", "lru", "transformer"])
def test_through_windows_shorter_than_an_episode_the_gradient_is_biased_and_ppos_first_step_has_that_mean(kind):
    """T-maze of four steps. PPO's windows are of two."""
    mdp = tmaze(3)
    network = network_of(mdp, kind)
    params = params_of(network)
    found = exactly(partial(window_bias, mdp, network, lengths=(1, 2, 3, 4, 9)), params)
    assert (found.bias[:3] > 0.1).all() and (found.cosine[:3] < 0.995).all()
    np.testing.assert_array_equal(found.bias[3:], 0.0)
    np.testing.assert_allclose(found.cosine[3:], 1.0, rtol=1e-14)
    if kind != "lstm":  # which `Recurrence` takes along a window as it does a GRU
        update = expected_update(Case(mdp, network, params, None), ppo, ppo_of(4, window=2))
        same(4 * flat(update), found.gradient[1])


def test_where_episodes_begin_anywhere_in_a_window_the_bias_falls_with_its_length(cases):
    """From L = H on it is H / L of that at H; and windows of whole episodes have the gradient that is not cut."""
    mdp, network, params, gradient = cases[RECALL]
    found = exactly(partial(window_bias, mdp, network, lengths=(1, 3, 6), anywhere=True), params)
    same(exactly(partial(history_gradient, mdp, network), params, Cut(3)), gradient, rtol=1e-12)
    assert 0.1 < found.bias[1] < found.bias[0]
    assert found.bias[2] == pytest.approx(found.bias[1] / 2, rel=1e-10)


# --- the Fisher matrix ---


def test_the_fisher_product_through_a_window_of_two_episodes_is_with_the_hessian_and_the_mean_square_score():
    """Forward over reverse through the scan, against the dense Hessian of the KL, and against the definition: the mean
    over steps of sum_a pi(a | h) grad log pi grad log pi^T."""
    network, (L, N) = network_of(MAZE), (5, 2)
    rng = np.random.default_rng(1)
    starts = np.array([[0, 1], [0, 0], [1, 0], [0, 1], [0, 0]], bool)  # the first goes on from before the window
    obs = rng.integers(4, size=(L, N))
    memory = jax.tree.map(lambda x: rng.normal(size=(L, *x.shape)), network.memory(N))

    def matrices(params, memory):
        window, (point, unravel) = Window(jnp.asarray(obs), jnp.asarray(starts), memory), ravel_pytree(params)
        old = network.apply(params, window)[0]

        def kl(params):
            return old.kl(network.apply(params, window)[0]).mean()

        def log_pi(point):
            return jax.nn.log_softmax(network.apply(unravel(point), window)[0].logits)

        vector = jax.random.normal(jax.random.key(0), point.shape, point.dtype)
        score = jax.jacobian(log_pi)(point)  # [L, N, A, D]
        mean_square = jnp.einsum("tna,tnai,tnaj->ij", jnp.exp(log_pi(point)), score, score) / (L * N)
        hessian = jax.hessian(lambda point: kl(unravel(point)))(point)
        return fisher_vector_product(kl, params, 0.1)(vector), vector, hessian, mean_square

    product, vector, hessian, mean_square = exactly(matrices, params_of(network), memory)
    assert np.linalg.matrix_rank(mean_square, tol=1e-10) == L * N
    same(hessian, mean_square)
    same(product, hessian @ vector + 0.1 * vector)
