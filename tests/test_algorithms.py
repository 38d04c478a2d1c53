"""One protocol for every algorithm: one trace, vmapped members equal to a plain loop, and something learned."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SeparateNetwork, TinyNetwork, TinyQNetwork, arms_env, quick_jit, settings

import purepg.algorithms
from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import garnet
from purepg.equations.distributions import DiagGaussian, executed
from purepg.experience import normalize
from purepg.networks.actor_critic import ActorQ, NetworkConfig, actor_critic
from purepg.networks.tabular import TabularValue, tabular_actor_critic, tabular_policy
from purepg.runtime import compiling_for
from purepg.train import averaged, train
from purepg.types import Box, Discrete, EpisodeMetrics, Space, State, UsageError

ARMS = Discrete(2)
REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
H, S, U = 2, 2, 3  # settings, seeds, updates in a block


class Case(NamedTuple):
    algorithm: Callable
    config: Any
    action_space: Space
    q_network: Any = None  # the kind of policy, where the critic is a Q


EPISODES: dict[str, Any] = {"num_episodes": 8, "learning_rate": 0.05}
STEPS: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "learning_rate": 0.05, "gamma": 0.8}
TRUST: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "gamma": 0.8, "num_value_epochs": 2, "num_value_minibatches": 2}
REPLAY: dict[str, Any] = {
    **{"num_envs": 4, "num_steps": 8, "batch_size": 32, "capacity": 256, "warmup_steps": 24, "gamma": 0.8},
    **{"policy_learning_rate": 0.05, "critic_learning_rate": 0.03, "tau": 0.1, "max_grad_norm": 1.0},
}
# Options that have nothing to do with each other share a case, since compiling is what these tests cost.
CASES = {
    "reinforce": Case(
        reinforce,
        REINFORCEConfig(**EPISODES, weight="total_return", baseline="none", mean_over_steps=False, gamma=0.8),
        ARMS,
    ),
    "reinforce per-time mean": Case(
        reinforce, REINFORCEConfig(**EPISODES, baseline="per_time_mean", discount_states=True), ARMS
    ),
    "reinforce leave one out": Case(
        reinforce,
        REINFORCEConfig(
            **EPISODES,
            weight="total_return",
            baseline="leave_one_out",
            max_steps=3,
            max_grad_norm=0.5,
            anneal_learning_rate=True,
            anneal_updates=120,
        ),
        ARMS,
    ),
    "reinforce value": Case(reinforce, REINFORCEConfig(**EPISODES, baseline="value", max_steps=3), REAL),
    "a2c gae": Case(
        a2c, A2CConfig(**STEPS, normalize_obs=True, scale_reward=True, reward_scale=2.0, entropy_coef=0.01), ARMS
    ),
    "a2c n-step": Case(
        a2c,
        A2CConfig(
            **STEPS,
            n_step=3,
            normalize_advantage=True,
            max_grad_norm=None,
            anneal_learning_rate=True,
            anneal_updates=120,
        ),
        REAL,
    ),
    "ppo with everything": Case(
        ppo,
        PPOConfig(
            **STEPS,
            num_epochs=2,
            num_minibatches=2,
            normalize_obs=True,
            scale_reward=True,
            clip_value_eps=0.5,
            target_kl=0.05,
            anneal_learning_rate=True,
            anneal_clip_eps=True,
            anneal_updates=120,
            entropy_coef=0.01,
            normalize_advantage="batch",
        ),
        REAL,
    ),
    "off-policy": Case(off_policy_pg, OffPolicyPGConfig(**STEPS, entropy_coef=0.01), ARMS),
    "off-policy by trajectories": Case(
        off_policy_pg,
        OffPolicyPGConfig(**STEPS, num_epochs=2, ratio="trajectory", max_ratio=1.5, normalize_advantage=True),
        REAL,
    ),
    "npg": Case(npg, NPGConfig(**TRUST, max_kl=None, normalize_advantage=False), ARMS),
    "npg by kl": Case(npg, NPGConfig(**TRUST, max_grad_norm=0.5, normalize_obs=True), REAL),
    "trpo normalised": Case(trpo, TRPOConfig(**TRUST, max_kl=0.05, normalize_obs=True, scale_reward=True), REAL),
    "ppo penalty": Case(ppo_penalty, PPOPenaltyConfig(**STEPS, num_epochs=2, num_minibatches=2, target_kl=0.2), ARMS),
    "ppo penalty fixed": Case(
        ppo_penalty,
        PPOPenaltyConfig(**STEPS, num_epochs=2, num_minibatches=2, target_kl=None, penalty="reverse_kl", kl_coef=0.5),
        REAL,
    ),
    "q actor-critic, continuous": Case(
        q_actor_critic,
        QActorCriticConfig(
            **STEPS,
            entropy_coef=0.3,
            normalize_weight=True,
            normalize_obs=True,
            anneal_learning_rate=True,
            anneal_updates=120,
        ),
        REAL,
        "gaussian",
    ),
    "dpg": Case(
        dpg,
        DPGConfig(
            **{"num_envs": 4, "num_steps": 8, "num_critic_steps": 5, "policy_learning_rate": 0.03, "gamma": 0.8},
            **{"exploration_std": 0.5, "normalize_obs": True, "scale_reward": True, "max_grad_norm": 1.0},
            anneal_learning_rate=True,
            anneal_updates=120,
        ),
        REAL,
        "deterministic",
    ),
    "ddpg": Case(
        ddpg,
        DDPGConfig(**REPLAY, normalize_obs=True, exploration_std=0.1, noise_correlation=0.9, num_gradient_steps=2),
        REAL,
        "deterministic",
    ),
    "td3": Case(
        td3,
        TD3Config(**REPLAY, exploration_std=0.3, bootstrap_at_truncation=False, reward_scale=2.0),
        REAL,
        "deterministic",
    ),
    "sac": Case(
        sac,
        SACConfig(**REPLAY, temperature=0.2, target_entropy=-2.0, normalize_obs=True, temperature_learning_rate=0.03),
        REAL,
        "tanh_gaussian",
    ),
    "sac discrete": Case(
        sac_discrete, DiscreteSACConfig(**REPLAY, temperature=0.1, learn_temperature=False), ARMS, "categorical"
    ),
    "grpo": Case(
        grpo,
        GRPOConfig(
            **{"num_prompts": 2, "group_size": 4, "learning_rate": 0.05, "num_epochs": 2, "num_minibatches": 2},
            **{"clip_eps": 0.05, "entropy_coef": 0.01, "aggregation": "token_mean", "kl_coef": 0.01},
            **{"anneal_learning_rate": True, "anneal_updates": 120},
        ),
        ARMS,
    ),
    "ppo in one step": Case(
        ppo,
        PPOConfig(
            **STEPS,
            num_epochs=1,
            num_minibatches=1,
            normalize_obs=True,
            scale_reward=True,
            normalize_advantage="off",
        ),
        ARMS,
    ),
}


class Population(NamedTuple):
    """A case's population `[H, S]`, every float of its config swept, after one block of U updates."""

    name: str
    case: Case
    network: Any
    make: Callable
    hyper: Any
    keys: jax.Array
    init: Callable  # (hyper, keys) -> state
    block: Callable  # (hyper, keys, state, start) -> (state, metrics [H, S, U])
    num_traces: Callable[[], int]
    first: Any
    after: Any
    metrics: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def population(request):
    case, calls = CASES[request.param], []
    # A trust region is one where the critic's fit does not move the policy.
    network_of = SeparateNetwork if case.algorithm in (npg, trpo) else TinyNetwork
    network = network_of(case.action_space, lambda: calls.append(1))
    if case.q_network is not None:
        network = TinyQNetwork(case.q_network, on_apply=lambda: calls.append(1))
    env = arms_env(case.action_space)

    def make(hyper):
        return case.algorithm(env, network, replace(case.config, **hyper))

    def updates(hyper, key, state, start):
        return train(key, make(hyper), state, start, U)

    init = quick_jit(jax.vmap(jax.vmap(lambda hyper, key: make(hyper).init(key), (None, 0)), (0, None)))
    block = quick_jit(jax.vmap(jax.vmap(updates, (None, 0, 0, None)), (0, None, 0, None)))
    hyper, keys = settings(case.config, H), jax.random.split(jax.random.key(0), S)
    first = init(hyper, keys)
    with jax.debug_nans(True):
        after, metrics = block(hyper, keys, first, 0)
    metrics = averaged(metrics)
    return Population(
        request.param, case, network, make, hyper, keys, init, block, lambda: len(calls), first, after, metrics
    )


def close(a, b, enlarged=1.0):
    np.testing.assert_allclose(a, b, rtol=enlarged * 1e-4, atol=enlarged * 2e-6)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def policy_parameters(state):
    """Of every member, `[H, S, ...]`."""
    leaves = jax.tree.leaves(state.learner.params["policy"])
    return np.concatenate([np.reshape(x, (H, S, -1)) for x in leaves], axis=-1)


def test_every_algorithm_is_among_the_cases():
    found = set(purepg.algorithms.names())
    of_tokens = {"clone", "dpo", "reward_model"}  # which have no actions of their own: tests/test_token_runs.py
    assert found == {case.algorithm.__name__ for case in CASES.values()} | of_tokens


# The tests of one population follow each other, so that pytest makes it once.


def test_vmapped_settings_and_seeds_equal_a_plain_loop_in_a_gpus_form(population):
    """One comparison for both, since each program takes seconds to compile. Where a GPU's form is near only, the plain
    loop is compared by itself too."""
    p = population
    # At the tests' low level of optimisation, XLA's CPU backend makes NaN of SAC's update without a branch. At its
    # ordinary level, or if the program returns one more of its intermediate numbers, it makes none.
    ordinary = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})
    compile_it = ordinary if p.case.algorithm is sac else quick_jit
    # Conjugate gradients on a nearly singular Fisher matrix enlarge what is rounded in another order.
    forms = {"cpu": close, "gpu": partial(close, enlarged=30)} if p.case.algorithm in (npg, trpo) else {"gpu": close}
    for form, near in forms.items():
        one = compile_it(lambda hyper, key, state: train(key, p.make(hyper), state, 0, U))
        for h in range(H):
            for s in range(S):
                hyper = {name: x[h] for name, x in p.hyper.items()}
                with compiling_for(form):
                    after, metrics = one(hyper, p.keys[s], jax.tree.map(lambda x, h=h, s=s: x[h, s], p.first))
                alone = (after, averaged(metrics))
                jax.tree.map(lambda x, y, h=h, s=s, near=near: near(x[h, s], y), (p.after, p.metrics), alone)


def test_the_settings_and_the_seeds_differ(population):
    """Otherwise the plain loop shows little."""
    policy = policy_parameters(population.after)
    assert len(np.unique(policy.reshape(H * S, -1), axis=0)) == H * S


def test_a_block_is_traced_once(population):
    """Other values, other updates and the state that a block returns are no reason to compile again."""
    p, before = population, population.num_traces()
    hyper = jax.tree.map(lambda x: 0.9 * x, p.hyper)
    p.block(hyper, jax.random.split(jax.random.key(9), S), p.after, U)
    assert p.num_traces() == before
    assert p.block._cache_size() == 1


def test_the_key_decides_everything_that_is_random(population):
    p = population
    again = p.block(p.hyper, p.keys, p.first, 0)
    assert equal(again[0].learner, p.after.learner)
    other, _ = p.block(p.hyper, p.keys[::-1], p.first, 0)
    assert (policy_parameters(p.after) != policy_parameters(other)).any(axis=-1).all()


def test_metrics_are_one_number_per_update_and_count_the_steps_taken(population):
    p = population
    algorithm = p.make({})
    assert all(x.shape == (H, S, U) for x in p.metrics.values())
    assert EpisodeMetrics.__required_keys__ <= p.metrics.keys()
    change = {"kl", "reverse_kl", "clip_fraction", "max_ratio", "effective_sample_size", "entropy"}
    critic = set() if p.case.algorithm in (reinforce, grpo) else {"explained_variance", "value_loss"}
    by_half = {"policy_loss", "policy_grad_norm", "critic_loss", "critic_grad_norm", "q"}
    expected = {
        q_actor_critic: by_half - {"q"} | change | {"explained_variance"},
        dpg: by_half | {"explained_variance"},
        ddpg: by_half,
        td3: by_half,
        sac: by_half | {"entropy", "temperature"},
        sac_discrete: by_half | {"entropy", "temperature"},
    }.get(p.case.algorithm, change | critic | {"grad_norm"})
    assert expected <= set(p.metrics)
    assert all(np.isfinite(x).all() for x in p.metrics.values())
    env_steps = p.metrics["env_steps"]
    assert (algorithm.update_steps.least <= env_steps).all()
    assert (env_steps <= algorithm.update_steps.most).all()
    if p.case.algorithm in (reinforce, grpo):
        total = p.metrics["episode_length"] * p.metrics["num_episodes"]
        np.testing.assert_allclose(env_steps, total, rtol=1e-5)
        assert (p.metrics["num_episodes"] == 8).all()
    else:
        assert (env_steps == 32).all()


def test_every_float_of_a_config_has_its_part_in_what_is_learned(population):
    """Save those that another option puts out of play."""
    p = population
    unused = {
        "a2c n-step": {"gae_lambda"},
        "npg by kl": {"learning_rate"},
        "ppo in one step": {"clip_eps"},
        "sac discrete": {"temperature_learning_rate", "target_entropy"},
        "grpo": {"gae_lambda", "value_coef"},
    }.get(p.name, set())
    if p.case.algorithm is reinforce and p.case.config.baseline != "value":
        unused = {"value_coef"}
    idle = set()
    for name, x in p.hyper.items():
        hyper = p.hyper | {name: 0.1 * x + 0.01}
        other, _ = p.block(hyper, p.keys, p.init(hyper, p.keys), 0)
        if equal(other.learner.params, p.after.learner.params):
            idle.add(name)
    assert idle == unused


def test_the_better_arm_is_learned(population):
    """The share of steps on which it was taken, which the episodes' rewards and lengths say."""
    p, state, metrics = population, population.after, population.metrics
    for i in range(1, 31):
        state, metrics = p.block(p.hyper, p.keys, state, i * U)
    metrics = averaged(metrics)
    share = metrics["episode_return"].sum(-1) / metrics["episode_length"].sum(-1)
    at_first = p.metrics["episode_return"][..., 0] / p.metrics["episode_length"][..., 0]
    assert at_first.mean() < 0.7
    assert (share > 0.9).all()


def only(*names: str):
    return pytest.mark.parametrize("population", names, indirect=True)


@only("ppo in one step")
def test_the_first_ratio_is_one(population):
    """The policy that scores the data is the policy that acted, statistics and all, at every update."""
    np.testing.assert_allclose(population.metrics["approx_kl"], 0.0, atol=1e-9)
    moved = population.after.learner.obs_moments.mean - population.first.learner.obs_moments.mean
    assert (abs(moved) > 1).any()  # so that normalising by other statistics would show


@only("a2c n-step", "ppo with everything", "q actor-critic, continuous", "dpg", "reinforce leave one out", "grpo")
def test_an_annealed_learning_rate_ends_at_zero(population):
    p = population
    after, _ = p.block(p.hyper, p.keys, p.after, p.case.config.anneal_updates)
    np.testing.assert_array_equal(policy_parameters(after), policy_parameters(p.after))
    late, _ = p.block(p.hyper, p.keys, p.after, p.case.config.anneal_updates - 1)
    assert (policy_parameters(late) != policy_parameters(p.after)).any()
    # The critics of an actor-critic with Q go on: its schedule is the policy's.
    assert equal(after.learner.params, p.after.learner.params)


@only("ppo with everything")
def test_a_tiny_target_kl_leaves_one_gradient_step_of_each_update(population):
    """Before the first step the ratio is 1 and the KL 0; after it, it is not."""
    p = population
    _, metrics = p.block(p.hyper | {"target_kl": jnp.full(H, 1e-8, jnp.float32)}, p.keys, p.first, 0)
    np.testing.assert_array_equal(metrics["epochs_used"], np.full((H, S, U), 0.5))


@only("trpo normalised")
def test_no_update_leaves_the_trust_region_and_what_it_says_of_its_step_is_so(population):
    """From the first update to the ninetieth: the critic's fit, which shares nothing, adds nothing to the KL."""
    p, state = population, population.first
    bound = np.asarray(p.hyper["max_kl"])[:, None, None]
    for i in range(30):
        state, metrics = p.block(p.hyper, p.keys, state, i * U)
        assert (metrics["kl"] <= bound + 1e-6).all()
        np.testing.assert_allclose(metrics["step_kl"], metrics["kl"], rtol=1e-4, atol=1e-6)
        taken = np.asarray(metrics["accepted"]) == 1
        np.testing.assert_array_equal(np.asarray(metrics["step_fraction"]) > 0, taken)
        np.testing.assert_array_equal(np.asarray(metrics["surrogate_improvement"]) > 0, taken)
        assert i or ((metrics["kl"] > 0.3 * bound) & taken).all()


@only("npg by kl")
def test_a_natural_step_has_about_the_kl_that_it_may_have(population):
    """Its quadratic model has it, damping included, and a hundredth of a nat is small enough for a model to be near."""
    p = population
    ratio = p.metrics["kl"] / np.asarray(p.hyper["max_kl"])[:, None, None]
    assert ((ratio > 0.3) & (ratio < 1.2)).all()


def adapted(kl_coef, kl, target):
    return kl_coef * np.where(kl < target / 1.5, 0.5, np.where(kl > 1.5 * target, 2.0, 1.0))


@only("ppo penalty")
def test_the_coefficient_of_the_penalty_goes_from_update_to_update_and_from_block_to_block(population):
    p, target = population, np.asarray(population.hyper["target_kl"])[:, None, None]
    _, later = p.block(p.hyper, p.keys, p.after, U)
    coef, kl = (np.concatenate([p.metrics[name], later[name]], axis=-1) for name in ("kl_coef", "kl"))
    np.testing.assert_array_equal(coef[..., 0], np.broadcast_to(p.hyper["kl_coef"][:, None], (H, S)))
    np.testing.assert_allclose(coef[..., 1:], adapted(coef, kl, target)[..., :-1], rtol=1e-6)
    assert len(np.unique(coef / coef[..., :1])) > 2


@only("ppo penalty")
def test_the_penalty_has_the_coefficient_that_the_state_carries_and_the_config_only_its_first(population):
    p = population
    state, _ = p.block(p.hyper | {"kl_coef": 5 * p.hyper["kl_coef"]}, p.keys, p.first, 0)
    assert equal(state, p.after)
    first = State(p.first.learner._replace(own=5 * p.first.learner.own), p.first.world)
    state, _ = p.block(p.hyper, p.keys, first, 0)
    assert not equal(state.learner.params, p.after.learner.params)


@only("ppo penalty")
def test_two_blocks_of_an_adaptive_penalty_are_one_bit_for_bit(population):
    p = population

    def updates(hyper, key, state, start):
        return train(key, p.make(hyper), state, start, 2 * U)

    both = quick_jit(jax.vmap(jax.vmap(updates, (None, 0, 0, None)), (0, None, 0, None)))
    assert equal(both(p.hyper, p.keys, p.first, 0)[0], p.block(p.hyper, p.keys, p.after, U)[0])


@only("ppo penalty")
def test_the_coefficient_of_the_penalty_stays_within_a_millionth_and_a_million(population):
    """However far the KL is from its target, it does not run away to where no later update could bring it back."""
    p = population
    for coef, target in ((1e6, 1e-9), (1e-6, 1e9)):
        coef, target = jnp.full((H, S), coef, jnp.float32), jnp.full(H, target, jnp.float32)
        first = State(p.first.learner._replace(own=coef), p.first.world)
        state, metrics = p.block(p.hyper | {"target_kl": target}, p.keys, first, 0)
        assert (metrics["kl"] > 1e-8).all() and (metrics["kl"] < 1e8).all()
        np.testing.assert_array_equal(state.learner.own, coef)


@only("ppo penalty fixed")
def test_without_a_target_the_coefficient_of_the_penalty_stays(population):
    p = population
    np.testing.assert_array_equal(p.metrics["kl_coef"], np.broadcast_to(p.hyper["kl_coef"][:, None, None], (H, S, U)))
    assert np.ptp(p.metrics["kl"]) > 0


@only("a2c gae", "ppo with everything", "reinforce", "sac")
def test_a_policy_acts_on_raw_observations_by_the_learners_own_statistics(population):
    p = population
    state = jax.tree.map(lambda x: x[1, 0], p.after)
    obs = 5 + 3 * jax.random.normal(jax.random.key(0), (200, 2))
    seen = normalize.apply(getattr(state.learner, "obs_moments", None), obs)
    distribution, _ = p.network.apply(state.learner.params, seen)
    k1, k2 = jax.random.split(jax.random.key(1))

    def mode(key, obs, deterministic=True):
        _, action, _ = p.make({}).policy(state, deterministic)(key, (), obs)
        return executed(action)

    sample = partial(mode, deterministic=False)
    np.testing.assert_allclose(mode(k1, obs), executed(distribution.mode()), rtol=1e-5)
    assert (sample(k1, obs) != sample(k2, obs)).any()
    if isinstance(distribution, DiagGaussian):
        noise = (sample(k1, obs) - distribution.mode()) / jnp.exp(distribution.log_std)
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.2)


# --- bad input ---


@pytest.mark.parametrize(
    ("algorithm", "config", "message"),
    [
        (
            ppo,
            PPOConfig(num_envs=10, num_steps=100, num_minibatches=3),
            "num_envs * num_steps (1000) must be divisible by num_minibatches (3)",
        ),
        (ppo, PPOConfig(num_envs=0), "num_envs (0) must be at least 1"),
        (ppo, PPOConfig(num_minibatches=0), "num_minibatches (0) must be at least 1"),
        (ppo, PPOConfig(num_epochs=-2), "num_epochs (-2) must be at least 1"),
        (ppo, PPOConfig(gamma=1.5), "gamma (1.5) must be in [0, 1]"),
        (ppo, PPOConfig(gae_lambda=-0.1), "gae_lambda (-0.1) must be in [0, 1]"),
        (ppo, PPOConfig(learning_rate=0.0), "learning_rate (0.0) must be above 0"),
        (ppo, PPOConfig(learning_rate=float("nan")), "learning_rate (nan) must be above 0"),
        (ppo, PPOConfig(entropy_coef=-1.0), "entropy_coef (-1.0) must be at least 0"),
        (ppo, PPOConfig(clip_value_eps=0.0), "clip_value_eps (0.0) must be above 0"),
        (ppo, PPOConfig(target_kl=-0.01), "target_kl (-0.01) must be above 0"),
        *(
            (algorithm, config, "num_envs * num_steps (100) must be divisible by num_value_minibatches (3)")
            for algorithm, config in (
                (npg, NPGConfig(num_envs=10, num_steps=10, num_value_minibatches=3)),
                (trpo, TRPOConfig(num_envs=10, num_steps=10, num_value_minibatches=3)),
            )
        ),
        (
            ppo_penalty,
            PPOPenaltyConfig(num_envs=10, num_steps=10, num_minibatches=3),
            "num_envs * num_steps (100) must be divisible by num_minibatches (3)",
        ),
        (npg, NPGConfig(max_kl=0.0), "max_kl (0.0) must be above 0"),
        (npg, NPGConfig(damping=-0.1), "damping (-0.1) must be at least 0"),
        (npg, NPGConfig(num_cg_steps=0), "num_cg_steps (0) must be at least 1"),
        (npg, NPGConfig(num_value_epochs=0), "num_value_epochs (0) must be at least 1"),
        (trpo, TRPOConfig(max_kl=-1.0), "max_kl (-1.0) must be above 0"),
        (trpo, TRPOConfig(shrink=1.5), "shrink (1.5) must be in [0, 1]"),
        (trpo, TRPOConfig(num_tries=0), "num_tries (0) must be at least 1"),
        (trpo, TRPOConfig(value_learning_rate=0.0), "value_learning_rate (0.0) must be above 0"),
        (off_policy_pg, OffPolicyPGConfig(num_epochs=0), "num_epochs (0) must be at least 1"),
        (off_policy_pg, OffPolicyPGConfig(max_ratio=0.0), "max_ratio (0.0) must be above 0"),
        (ppo_penalty, PPOPenaltyConfig(kl_coef=0.0), "kl_coef (0.0) must be above 0"),
        (ppo_penalty, PPOPenaltyConfig(target_kl=0.0), "target_kl (0.0) must be above 0"),
        (q_actor_critic, QActorCriticConfig(sarsa_lambda=1.1), "sarsa_lambda (1.1) must be in [0, 1]"),
        (dpg, DPGConfig(num_critic_steps=0), "num_critic_steps (0) must be at least 1"),
        (ddpg, DDPGConfig(tau=1.5), "tau (1.5) must be in [0, 1]"),
        (ddpg, DDPGConfig(noise_correlation=-0.5), "noise_correlation (-0.5) must be in [0, 1]"),
        (td3, TD3Config(policy_delay=0), "policy_delay (0) must be at least 1"),
        (td3, TD3Config(target_noise_clip=-0.5), "target_noise_clip (-0.5) must be at least 0"),
        (sac, SACConfig(temperature=0.0), "temperature (0.0) must be above 0"),
        (sac_discrete, DiscreteSACConfig(target_entropy=2.0), "target_entropy (2.0) must be in [0, 1]"),
        (a2c, A2CConfig(num_steps=-1), "num_steps (-1) must be at least 1"),
        (a2c, A2CConfig(n_step=0), "n_step (0) must be at least 1"),
        (a2c, A2CConfig(max_grad_norm=0.0), "max_grad_norm (0.0) must be above 0"),
        (reinforce, REINFORCEConfig(num_episodes=0), "num_episodes (0) must be at least 1"),
        (reinforce, REINFORCEConfig(max_steps=0), "max_steps (0) must be at least 1"),
        *(
            (algorithm, config, "anneal_updates (None) must be a number of updates if something is annealed")
            for algorithm, config in (
                (reinforce, REINFORCEConfig(anneal_learning_rate=True)),
                (grpo, GRPOConfig(anneal_learning_rate=True)),
                (a2c, A2CConfig(anneal_learning_rate=True)),
                (ppo, PPOConfig(anneal_learning_rate=True)),
                (ppo, PPOConfig(anneal_clip_eps=True)),
                (off_policy_pg, OffPolicyPGConfig(anneal_learning_rate=True)),
                (ppo_penalty, PPOPenaltyConfig(anneal_learning_rate=True)),
                (q_actor_critic, QActorCriticConfig(anneal_learning_rate=True)),
                (dpg, DPGConfig(anneal_learning_rate=True)),
            )
        ),
        (
            reinforce,
            REINFORCEConfig(weight="total_return", discount_states=True),
            "discount_states (True) needs weight 'return_to_go'; 'total_return' is discounted already",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_says_the_contract_and_the_value(algorithm, config, message):
    with pytest.raises(UsageError) as error:
        algorithm(arms_env(), TinyNetwork(ARMS), config)
    assert str(error.value) == message


@pytest.mark.parametrize(("algorithm", "config"), [(npg, NPGConfig()), (trpo, TRPOConfig())])
def test_a_trust_region_refuses_a_torso_that_its_critic_would_move(algorithm, config):
    env, message = arms_env(), "shared (True) must be off: a critic fitted on the policy's torso would leave the"
    with pytest.raises(UsageError) as error:
        algorithm(env, actor_critic(env, NetworkConfig(shared=True)), config)
    assert str(error.value) == f"{message} trust region"
    assert algorithm(env, actor_critic(env, NetworkConfig()), config)


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (a2c, A2CConfig(normalize_obs=True)),
        (off_policy_pg, OffPolicyPGConfig(normalize_obs=True)),
        (npg, NPGConfig(normalize_obs=True)),
        (trpo, TRPOConfig(normalize_obs=True)),
        (ppo_penalty, PPOPenaltyConfig(normalize_obs=True)),
        (ppo, PPOConfig(normalize_obs=True)),
        (q_actor_critic, QActorCriticConfig(normalize_obs=True)),
        (sac_discrete, DiscreteSACConfig(normalize_obs=True)),
    ],
)
def test_the_numbers_of_categories_are_not_normalised(algorithm, config):
    mdp, env = garnet(), mdp_env(garnet())
    with_q = algorithm in (q_actor_critic, sac_discrete)
    network = (
        ActorQ(tabular_policy(mdp), TabularValue(mdp.num_states, mdp.num_actions), env.action_space)
        if with_q
        else tabular_actor_critic(mdp)
    )
    with pytest.raises(UsageError) as error:
        algorithm(env, network, config)
    assert str(error.value) == "normalize_obs (True) must be off: garnet 0 observes one of 6 categories"


def test_minibatches_need_to_divide_environments_and_steps_together_alone():
    assert ppo(arms_env(), TinyNetwork(ARMS), PPOConfig(num_envs=10, num_steps=100, num_minibatches=8))


def test_reinforce_wants_a_time_limit_where_the_environment_has_none():
    endless = arms_env()._replace(max_episode_steps=None, name="endless")
    message = "endless has no time limit: max_steps (None) must be set, so that an episode ends"
    with pytest.raises(UsageError) as error:
        reinforce(endless, TinyNetwork(ARMS), REINFORCEConfig())
    assert str(error.value) == message
    assert reinforce(endless, TinyNetwork(ARMS), REINFORCEConfig(max_steps=7)).update_steps == (4, 28)
