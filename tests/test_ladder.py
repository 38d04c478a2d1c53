"""The laboratory at work: the known estimators and the algorithms themselves against the exact gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from parts.gradient_ladder import (
    FLIPPED,
    NAMES,
    NO_DISCOUNT,
    OFF_BY_ONE,
    THEORY,
    estimates,
    pose,
)

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.envs.finite_mdp import mdp_env, unroll
from purepg.envs.named_mdps import garnet
from purepg.lab.accuracy import sample, statistics, unbiasedness, variance_change
from purepg.lab.estimators import update_of
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, values, weighted_gradient
from purepg.lab.trajectories import state_distributions
from purepg.networks.tabular import tabular_actor_critic

BATCH = 4
DETECTED = 6.0  # |z|
CHUNK = 1000  # divides every number of samples: what is left over would be a second program


@pytest.fixture(scope="module")
def ladder():
    """The process, the estimates, and each estimator's statistics against what theory says of its mean."""
    problem = pose(0)
    samples = sample(lambda key: estimates(problem, key, BATCH), jax.random.key(2), 8000, CHUNK, jit=quick_jit)
    exact = {name: problem.exact_cut if name.startswith("cut") else problem.exact for name in NAMES}
    exact |= {FLIPPED: problem.exact, NO_DISCOUNT: problem.exact, OFF_BY_ONE: problem.exact_cut}
    mean = exact | problem.mean
    mean["return to go - per-time mean"] = jax.tree.map(lambda x: (1 - 1 / BATCH) * x, problem.exact)
    found = {name: statistics(samples[name], mean[name], BATCH) for name in samples}
    return problem, samples, exact, found


def test_every_estimator_has_the_mean_that_theory_gives_it(ladder):
    *_, found = ladder
    claimed = [name for group in THEORY.values() for name, theory in group.items() if theory]
    assert len(claimed) == 35
    verdicts = unbiasedness({name: found[name] for name in claimed})
    assert {name for name, v in verdicts.items() if not v.unbiased} == set()
    # And this says something: a bias of a few per cent of the gradient would have been seen.
    assert np.median([v.detectable for v in verdicts.values()]) < 0.03


def test_the_baselines_that_look_at_the_action_are_seen_to_be_biased(ladder):
    *_, found = ladder
    for name in ("return to go - batch mean", "return to go, standardised"):
        assert abs(found[name].z_along) > DETECTED


def test_a_flipped_sign_of_the_baseline_is_caught(ladder):
    *_, found = ladder
    assert np.abs(found[FLIPPED].z).max() > DETECTED
    assert np.abs(found["GAE 0.9, exact V"].z).max() < 4


def test_a_dropped_power_of_gamma_is_caught(ladder):
    *_, found = ladder
    assert np.abs(found[NO_DISCOUNT].z).max() > DETECTED
    assert np.abs(found["return to go"].z).max() < 4


def test_an_off_by_one_at_truncation_is_caught(ladder):
    *_, found = ladder
    assert np.abs(found[OFF_BY_ONE].z).max() > DETECTED
    assert np.abs(found["cut: GAE 0.9, exact V"].z).max() < 4


def statistics_of(ladder, name):
    _, samples, exact, _ = ladder
    return statistics(samples[name], exact[name], BATCH)


def test_what_is_cut_and_what_is_biased_are_told_apart(ladder):
    """Lambda = 1 forgives a wrong V to the episode's end, not at a cut, where a constant error is forgiven still."""
    assert np.abs(statistics_of(ladder, "GAE 1, wrong V").z).max() < 4
    assert np.abs(statistics_of(ladder, "GAE 0, wrong V").z).max() > DETECTED
    assert np.abs(statistics_of(ladder, "cut: GAE 1, shifted V").z).max() < 4
    assert np.abs(statistics_of(ladder, "cut: GAE 1, wrong V").z).max() > DETECTED
    assert np.abs(statistics_of(ladder, "step ratio x exact A").z).max() > DETECTED
    assert np.abs(statistics_of(ladder, "ratio to t x exact A").z).max() < 4


def test_causality_and_baselines_cut_the_variance_and_the_optimal_one_cuts_it_most(ladder):
    _, samples, _, _ = ladder

    def z(name, reference):
        change, error = variance_change(samples[name], samples[reference])
        return change / error

    assert z("return to go", "total return") < -DETECTED
    for baseline in ("leave-one-out", "learned V", "exact V", "optimal baseline"):
        assert z(f"return to go - {baseline}", "return to go") < -DETECTED
    assert z("return to go - optimal baseline", "return to go - exact V") < -DETECTED
    # A leave-one-out baseline added instead of subtracted leaves the mean alone: the variance gives it away.
    flipped = jax.tree.map(
        lambda plain, minus: 2 * plain - minus, samples["return to go"], samples["return to go - leave-one-out"]
    )
    exact = statistics(flipped, ladder[0].exact, BATCH)
    assert np.abs(exact.z).max() < 4
    change, error = variance_change(flipped, samples["return to go"])
    assert change / error > DETECTED


# --- the algorithms' own updates ---


def test_reinforce_takes_the_exact_gradient_step_with_every_unbiased_baseline():
    mdp, H = unroll(garnet(3, 3, 2, 2, horizon=4, horizon_terminates=True)), 4
    network, env = tabular_actor_critic(mdp), mdp_env(mdp)
    policy = log_policy(network, mdp.num_states)
    params = quick_jit(network.init)(jax.random.key(0), jnp.int32(0))
    params["params"]["policy"]["logits"] = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    V = in_float64(lambda params: values(mdp, policy(params)), params).value
    params["params"]["value"]["value"] = jnp.asarray(V + 1, jnp.float32)  # any V will do
    exact = in_float64(lambda params: bellman_gradient(mdp, policy, params), params)
    config = REINFORCEConfig(
        num_episodes=4, max_steps=H, optimizer="sgd", learning_rate=1.0, gamma=mdp.gamma, discount_states=True,
        mean_over_steps=False, value_coef=0.0,
    )  # fmt: skip
    configs = {
        "total return": dataclasses.replace(config, weight="total_return", baseline="none", discount_states=False),
        **{name: dataclasses.replace(config, baseline=name) for name in ("none", "leave_one_out", "value")},
        "per_time_mean": dataclasses.replace(config, baseline="per_time_mean"),
        "no gamma^t": dataclasses.replace(config, baseline="value", discount_states=False),
    }
    updates = {name: update_of(reinforce(env, network, c), params, 1.0) for name, c in configs.items()}
    samples = sample(
        lambda key: {name: update(key) for name, update in updates.items()},
        jax.random.key(1),
        10_000,
        CHUNK,
        jit=quick_jit,
    )
    mean = dict.fromkeys(samples, exact) | {"per_time_mean": jax.tree.map(lambda x: 0.75 * x, exact)}
    found = {name: statistics(samples[name], mean[name], 4) for name in samples}
    broken = found.pop("no gamma^t")
    assert all(v.unbiased for v in unbiasedness(found).values())
    assert np.abs(broken.z).max() > DETECTED


def test_a2c_and_ppo_take_the_mean_gradient_over_the_states_that_a_rollout_visits():
    """Episodes of three steps end by the clock, rollouts have seven: with the exact V, every step's advantage is right,
    whatever lambda; taking the limit for a death is seen."""
    mdp, T = garnet(3, 3, 2, 2, horizon=3), 7
    network, env = tabular_actor_critic(mdp), mdp_env(mdp)
    policy = log_policy(network, mdp.num_states)
    params = quick_jit(network.init)(jax.random.key(0), jnp.int32(0))
    params["params"]["policy"]["logits"] = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
    V, _, A = in_float64(lambda params: values(mdp, policy(params)), params)
    params["params"]["value"]["value"] = jnp.asarray(V, jnp.float32)
    visited = state_distributions(mdp, in_float64(policy, params), T, restart=True).mean(0)
    exact = in_float64(lambda params: weighted_gradient(policy, params, visited, A), params)
    common = {
        "num_envs": 4, "num_steps": T, "optimizer": "sgd", "learning_rate": 1.0, "gamma": mdp.gamma, "value_coef": 0.0,
        "max_grad_norm": None,
    }  # fmt: skip
    actor_critic, clip = A2CConfig(**common, gae_lambda=0.9), PPOConfig(
        **common, gae_lambda=0.9, num_epochs=1, num_minibatches=1, normalize_advantage="off", anneal_learning_rate=False
    )  # fmt: skip
    algorithms = {
        "a2c": a2c(env, network, actor_critic),
        "a2c, two steps": a2c(env, network, dataclasses.replace(actor_critic, n_step=2)),
        "ppo": ppo(env, network, clip),
        "a2c, death": a2c(env, network, dataclasses.replace(actor_critic, bootstrap_at_truncation=False)),
    }
    updates = {name: update_of(algorithm, params, 1.0) for name, algorithm in algorithms.items()}
    samples = sample(
        lambda key: {name: update(key) for name, update in updates.items()},
        jax.random.key(1),
        10_000,
        CHUNK,
        jit=quick_jit,
    )
    found = {name: statistics(x, exact, 4 * T) for name, x in samples.items()}
    broken = found.pop("a2c, death")
    verdicts = unbiasedness(found)
    assert all(v.unbiased for v in verdicts.values()), verdicts
    assert np.abs(broken.z).max() > DETECTED
