"""One protocol for every algorithm: one trace, vmapped members equal to a plain loop, and something learned."""

import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ENDINGS, TRUNCATED, TinyNetwork, arms_env, quick_jit, settings

import purepg.algorithms
from purepg import normalize
from purepg.advantages import discounted_return, gae, leave_one_out_mean, n_step, per_time_mean
from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.npg import NPGConfig, npg
from purepg.algorithms.off_policy_pg import OffPolicyPGConfig, off_policy_pg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.ppo_penalty import PPOPenaltyConfig, ppo_penalty
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.distributions import DiagGaussian
from purepg.rollout import episodes, rollout
from purepg.train import train
from purepg.types import Box, Discrete, Space, State, UsageError

ARMS = Discrete(2)
REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
H, S, U = 2, 2, 3  # settings, seeds, updates in a block


class Case(NamedTuple):
    algorithm: Callable
    config: Any
    action_space: Space


EPISODES: dict[str, Any] = {"num_episodes": 8, "learning_rate": 0.05}
STEPS: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "learning_rate": 0.05, "gamma": 0.8}
TRUST: dict[str, Any] = {"num_envs": 4, "num_steps": 8, "gamma": 0.8, "num_value_epochs": 2, "num_value_minibatches": 2}
# Options that have nothing to do with each other share a case, since compiling is what these tests cost.
CASES = {
    "reinforce": Case(
        reinforce,
        REINFORCEConfig(**EPISODES, weight="total_return", baseline="none", mean_over_steps=False, gamma=0.8),
        ARMS,
    ),
    "reinforce batch mean": Case(
        reinforce, REINFORCEConfig(**EPISODES, baseline="batch_mean", entropy_coef=0.01), ARMS
    ),
    "reinforce standardised": Case(reinforce, REINFORCEConfig(**EPISODES, baseline="standardised"), REAL),
    "reinforce per-time mean": Case(
        reinforce, REINFORCEConfig(**EPISODES, baseline="per_time_mean", discount_states=True), ARMS
    ),
    "reinforce leave one out": Case(
        reinforce,
        REINFORCEConfig(**EPISODES, weight="total_return", baseline="leave_one_out", max_steps=3, max_grad_norm=0.5),
        ARMS,
    ),
    "reinforce value": Case(reinforce, REINFORCEConfig(**EPISODES, baseline="value", max_steps=3), REAL),
    "a2c gae": Case(a2c, A2CConfig(**STEPS, normalize_obs=True, scale_reward=True, entropy_coef=0.01), ARMS),
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
    "ppo": Case(ppo, PPOConfig(**STEPS, num_epochs=2, num_minibatches=2), ARMS),
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
    "trpo": Case(trpo, TRPOConfig(**TRUST, max_kl=0.05), ARMS),
    "trpo normalised": Case(trpo, TRPOConfig(**TRUST, max_kl=0.05, normalize_obs=True, scale_reward=True), REAL),
    "ppo penalty": Case(ppo_penalty, PPOPenaltyConfig(**STEPS, num_epochs=2, num_minibatches=2, target_kl=0.2), ARMS),
    "ppo penalty fixed": Case(
        ppo_penalty,
        PPOPenaltyConfig(**STEPS, num_epochs=2, num_minibatches=2, target_kl=None, penalty="reverse_kl", kl_coef=0.5),
        REAL,
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
    network = TinyNetwork(case.action_space, lambda: calls.append(1))
    env = arms_env(case.action_space)

    def make(hyper):
        return case.algorithm(env, network, replace(case.config, **hyper))

    def updates(hyper, key, state, start):
        return train(key, make(hyper), state, start, U)

    init = quick_jit(jax.vmap(jax.vmap(lambda hyper, key: make(hyper).init(key), (None, 0)), (0, None)))
    block = quick_jit(jax.vmap(jax.vmap(updates, (None, 0, 0, None)), (0, None, 0, None)))
    hyper, keys = settings(case.config, H), jax.random.split(jax.random.key(0), S)
    first = init(hyper, keys)
    after, metrics = block(hyper, keys, first, 0)
    metrics = jax.tree.map(np.asarray, metrics)
    return Population(request.param, case, make, hyper, keys, init, block, lambda: len(calls), first, after, metrics)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_every_algorithm_is_among_the_cases():
    found = {module.name for module in pkgutil.iter_modules(purepg.algorithms.__path__)}
    assert found == {case.algorithm.__name__ for case in CASES.values()}


# The tests of one population follow each other, so that pytest makes it once.


def test_vmapped_settings_and_seeds_equal_a_plain_loop(population):
    p = population
    one = quick_jit(lambda hyper, key, state: train(key, p.make(hyper), state, 0, U))
    for h in range(H):
        for s in range(S):
            hyper = {name: x[h] for name, x in p.hyper.items()}
            alone = one(hyper, p.keys[s], jax.tree.map(lambda x, h=h, s=s: x[h, s], p.first))
            jax.tree.map(lambda x, y, h=h, s=s: close(x[h, s], y), (p.after, p.metrics), alone)


def test_the_settings_and_the_seeds_differ(population):
    """Otherwise the plain loop shows little."""
    policy = np.asarray(population.after.learner.params["policy"])
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
    params, other_params = p.after.learner.params["policy"], other.learner.params["policy"]
    assert (params != other_params).any(axis=(-1, -2)).all()


def test_metrics_are_one_number_per_update_and_count_the_steps_taken(population):
    p = population
    algorithm = p.make({})
    assert all(x.shape == (H, S, U) for x in p.metrics.values())
    assert {"episode_return", "episode_length", "num_episodes", "env_steps", "kl", "entropy"} <= set(p.metrics)
    assert all(np.isfinite(x).all() for x in p.metrics.values())
    env_steps = p.metrics["env_steps"]
    assert (algorithm.min_env_steps_per_update <= env_steps).all()
    assert (env_steps <= algorithm.max_env_steps_per_update).all()
    if p.case.algorithm is reinforce:
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
        "trpo": {"shrink"},  # every first try is good
        "ppo in one step": {"clip_eps"},
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


@only("a2c n-step", "ppo with everything")
def test_an_annealed_learning_rate_ends_at_zero(population):
    p = population
    after, _ = p.block(p.hyper, p.keys, p.after, p.case.config.anneal_updates)
    assert equal(after.learner.params, p.after.learner.params)
    late, _ = p.block(p.hyper, p.keys, p.after, p.case.config.anneal_updates - 1)
    assert not equal(late.learner.params, p.after.learner.params)


@only("ppo with everything")
def test_a_tiny_target_kl_leaves_one_gradient_step_of_each_update(population):
    """Before the first step the ratio is 1 and the KL 0; after it, it is not."""
    p = population
    _, metrics = p.block(p.hyper | {"target_kl": jnp.full(H, 1e-8, jnp.float32)}, p.keys, p.first, 0)
    np.testing.assert_array_equal(metrics["epochs_used"], np.full((H, S, U), 0.5))


@only("a2c gae", "ppo with everything", "reinforce")
def test_a_policy_acts_on_raw_observations_by_the_learners_own_statistics(population):
    p = population
    state = jax.tree.map(lambda x: x[1, 0], p.after)
    obs = 5 + 3 * jax.random.normal(jax.random.key(0), (200, 2))
    seen = normalize.apply(getattr(state.learner, "obs_moments", None), obs)
    distribution, _ = TinyNetwork(p.case.action_space).apply(state.learner.params, seen)
    k1, k2 = jax.random.split(jax.random.key(1))
    mode, sample = p.make({}).policy(state, True), p.make({}).policy(state, False)
    np.testing.assert_allclose(mode(k1, obs), distribution.mode(), rtol=1e-5)
    assert (sample(k1, obs) != sample(k2, obs)).any()
    if isinstance(distribution, DiagGaussian):
        noise = (sample(k1, obs) - distribution.mode()) / jnp.exp(distribution.log_std)
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.2)


# --- one update, held to its equation on the experience that it saw ---

GAMMA, LAMBDA, RATE, ADAM_EPS, VALUE_COEF, ENTROPY_COEF = 0.8, 0.7, 0.05, 1e-5, 0.3, 0.1
COMMON: dict[str, Any] = {
    "learning_rate": RATE,
    "gamma": GAMMA,
    "value_coef": VALUE_COEF,
    "entropy_coef": ENTROPY_COEF,
    "max_grad_norm": None,
}
PRIOR = {"obs": (5.0, 9.0), "return": (1.0, 4.0)}  # mean and variance of 10 samples
RUNNING_RETURN = jnp.array([1.0, 2.0, 3.0, 4.0])
HALF_TIME = 30


apply = TinyNetwork(ARMS).apply


class Update(NamedTuple):
    before: Any  # parameters
    learner: Any  # after, as the next
    world: Any
    metrics: dict[str, np.ndarray]
    experience: Any  # what `rollout` or `episodes` gave


def standardised(env):
    """What normalisation by PRIOR does, done by the environment."""

    def see(obs):
        (mean, variance), (_, return_variance) = PRIOR.values()
        return (obs - mean) / variance**0.5, return_variance**-0.5

    def reset(key):
        state, obs = env.reset(key)
        return state, see(obs)[0]

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        obs, scale = see(time_step.obs)
        return state, time_step._replace(obs=obs, reward=scale * time_step.reward)

    return env._replace(reset=reset, step=step)


def with_prior(state):
    """The state in the midst of things: PRIOR for its statistics, where it has any, and RUNNING_RETURN."""
    learner = state.learner
    if getattr(learner, "obs_moments", None) is None:
        return state
    obs, returns = (jnp.float32(PRIOR[name]) for name in ("obs", "return"))
    ten = jnp.float32(10)
    learner = learner._replace(
        obs_moments=normalize.Moments(jnp.full(2, obs[0]), jnp.full(2, obs[1]), ten),
        return_moments=normalize.Moments(returns[0], returns[1], ten),
    )
    return State(learner, state.world._replace(running_return=RUNNING_RETURN))


def updates_by_ending(variants: dict[str, tuple]) -> list[dict[str, Update]]:
    """One update of each variant, all with the same keys, for each way in which all episodes may end.

    One program for them all. The experience is noted as it leaves `rollout` and `episodes`, whose key is fixed, since
    the algorithms take theirs from different places.
    """
    noted = []

    def noting(gather):
        def with_fixed_key(key, *args):
            result = gather(jax.random.key(5), *args)
            noted.append(result)
            return result

        return with_fixed_key

    def updates(ending):
        results = {}
        for name, (algorithm, config, *change) in variants.items():
            env = arms_env(ending=ending)
            for f in change:
                env = f(env)
            made = algorithm(env, TinyNetwork(ARMS), config)
            state = with_prior(made.init(jax.random.key(0)))
            after, metrics = made.step(jax.random.key(1), state, HALF_TIME)
            results[name] = Update(state.learner.params, after.learner, after.world, metrics, noted.pop())
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purepg.on_policy.rollout", noting(rollout))
        patch.setattr("purepg.algorithms.reinforce.episodes", noting(episodes))
        results = quick_jit(jax.vmap(updates))(jnp.array(ENDINGS))
    return [jax.tree.map(lambda x, ending=ending: x[ending], results) for ending in ENDINGS]


def check_update(update: Update, loss) -> None:
    """Holds the metrics to the loss's terms, and the new parameters to Adam's first step down its gradient."""
    (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(update.before)
    for name, x in terms.items():
        np.testing.assert_allclose(update.metrics[name], x, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(update.metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-3)
    expected = jax.tree.map(lambda p, g: p - RATE * g / (abs(g) + ADAM_EPS), update.before, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), update.learner.params, expected)


def distance(a, b) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), a, b)))


SIZES: dict[str, Any] = COMMON | {"num_envs": 4, "num_steps": 8}
ONCE: dict[str, Any] = SIZES | {"num_epochs": 1, "num_minibatches": 1, "gae_lambda": LAMBDA}
TWICE: dict[str, Any] = SIZES | {"num_epochs": 2, "num_minibatches": 2}
ANNEALED: dict[str, Any] = TWICE | {
    "learning_rate": 2 * RATE,
    "anneal_learning_rate": True,
    "anneal_clip_eps": True,
    "anneal_updates": 2 * HALF_TIME,
}
ACTOR_CRITICS = {
    "a2c": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA)),
    "a2c mistaken": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA, bootstrap_at_truncation=False)),
    "a2c n-step": (a2c, A2CConfig(**SIZES, n_step=3)),
    "a2c normalised": (a2c, A2CConfig(**SIZES, normalize_obs=True, scale_reward=True)),
    "a2c on normalised": (a2c, A2CConfig(**SIZES), standardised),
    "a2c standardised advantage": (a2c, A2CConfig(**SIZES, gae_lambda=LAMBDA, normalize_advantage=True)),
    "ppo": (ppo, PPOConfig(**ONCE, normalize_advantage="off")),
    "ppo mistaken": (ppo, PPOConfig(**ONCE, normalize_advantage="off", bootstrap_at_truncation=False)),
    "ppo batch": (ppo, PPOConfig(**ONCE, normalize_advantage="batch")),
    "ppo minibatch": (ppo, PPOConfig(**ONCE, normalize_advantage="minibatch")),
    "ppo normalised": (ppo, PPOConfig(**TWICE, normalize_obs=True, scale_reward=True)),
    "ppo on normalised": (ppo, PPOConfig(**TWICE), standardised),
    "ppo half": (ppo, PPOConfig(**TWICE, clip_eps=0.1)),
    "ppo annealed": (ppo, PPOConfig(**ANNEALED, clip_eps=0.2)),
}


@pytest.fixture(scope="module")
def actor_critic_updates():
    return updates_by_ending(ACTOR_CRITICS)


@pytest.mark.parametrize("name", ["a2c", "a2c n-step", "a2c standardised advantage", "ppo"])
def test_an_actor_critics_update_is_its_equation(actor_critic_updates, name):
    """Nothing but the loss is written anew here: the estimators have tests of their own."""
    for update in (updates[name] for updates in actor_critic_updates):
        _, x, _ = update.experience
        value, next_value = (apply(update.before, obs)[1] for obs in (x.obs, x.next_obs))
        known = (x.reward, value, next_value, x.terminated, x.truncated, GAMMA)
        advantage, target = n_step(*known, 3) if name == "a2c n-step" else gae(*known, LAMBDA)
        if name == "a2c standardised advantage":
            advantage = (advantage - advantage.mean()) / advantage.std()

        def loss(params, x=x, advantage=advantage, target=target):
            distribution, value = apply(params, x.obs)
            log_prob = distribution.log_prob(x.action)
            ratio = jnp.exp(log_prob - x.log_prob)
            policy_loss = -jnp.mean((ratio if name == "ppo" else log_prob) * advantage)
            value_loss, entropy = 0.5 * jnp.mean((value - target) ** 2), jnp.mean(distribution.entropy())
            terms = {"policy_loss": policy_loss, "value_loss": value_loss}
            return policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * entropy, terms

        check_update(update, loss)
        expected = 1 - jnp.var(target - value) / jnp.var(target)
        np.testing.assert_allclose(update.metrics["explained_variance"], expected, rtol=1e-3)


def test_ppo_in_one_step_is_a2c(actor_critic_updates):
    """The ratio is 1, the clip idle, and the update that of the advantage actor-critic."""
    for updates in actor_critic_updates:
        assert distance(updates["ppo"].learner.params, updates["a2c"].learner.params) < 1e-5
        for name in ("ppo batch", "ppo minibatch"):
            assert distance(updates[name].learner.params, updates["a2c standardised advantage"].learner.params) < 1e-5


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_bootstrap_at_truncation_matters_where_the_clock_ends_episodes_and_nowhere_else(actor_critic_updates, name):
    """Off, a time limit is a death: the same update as where the episodes did terminate. With both flags they did."""
    terminating, truncating, both = actor_critic_updates
    right, mistaken = name, f"{name} mistaken"
    for update in (terminating[mistaken], truncating[mistaken], both[mistaken], both[right]):
        assert distance(update.learner, terminating[right].learner) < 1e-6
    assert distance(truncating[mistaken].learner.params, truncating[right].learner.params) > 1e-3
    assert abs(truncating[mistaken].metrics["value_loss"] - truncating[right].metrics["value_loss"]) > 1e-2


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_normalising_is_learning_in_a_normalised_environment(actor_critic_updates, name):
    """By the statistics before the update, throughout it; the raw data are merged after it."""
    for updates in actor_critic_updates:
        normalised, reference = updates[f"{name} normalised"], updates[f"{name} on normalised"]
        assert distance(normalised.learner.params, reference.learner.params) < 1e-4
        assert distance(normalised.learner.params, updates[name].learner.params) > 1e-3
        assert reference.learner.obs_moments is None

        _, x, _ = normalised.experience
        ended = x.terminated | x.truncated
        running_return, returns = normalize.running_return(RUNNING_RETURN, x.reward, ended, GAMMA)
        assert running_return is not None
        np.testing.assert_allclose(normalised.world.running_return, running_return, rtol=1e-5)
        for moments, (mean, variance), data in (
            (normalised.learner.obs_moments, PRIOR["obs"], x.obs),
            (normalised.learner.return_moments, PRIOR["return"], returns),
        ):
            mean, variance = jnp.broadcast_to(mean, moments.mean.shape), jnp.broadcast_to(variance, moments.mean.shape)
            expected = normalize.update(normalize.Moments(mean, variance, jnp.float32(10)), data)
            assert distance(moments, expected) < 1e-4


def test_half_way_down_learning_rate_and_clip_are_half_of_what_they_were(actor_critic_updates):
    for updates in actor_critic_updates:
        half, annealed = updates["ppo half"], updates["ppo annealed"]
        assert half.metrics["clip_fraction"] > 0.1
        assert distance((half.learner.params, half.metrics), (annealed.learner.params, annealed.metrics)) < 1e-4


REINFORCES = {
    name: (reinforce, REINFORCEConfig(**COMMON, num_episodes=5, **config))
    for name, config in {
        "none": {"baseline": "none"},
        "total return": {"baseline": "none", "weight": "total_return"},
        "sum over steps": {"baseline": "none", "mean_over_steps": False},
        "discounted states": {"baseline": "leave_one_out", "discount_states": True},
        "batch_mean": {"baseline": "batch_mean"},
        "standardised": {"baseline": "standardised"},
        "per_time_mean": {"baseline": "per_time_mean"},
        "value": {"baseline": "value"},
    }.items()
}


@pytest.fixture(scope="module")
def reinforce_updates():
    return updates_by_ending(REINFORCES)


@pytest.mark.parametrize("name", REINFORCES)
def test_a_reinforce_update_is_its_equation(reinforce_updates, name):
    for ending, updates in zip(ENDINGS, reinforce_updates, strict=True):
        update = updates[name]
        x, mask, _ = update.experience
        value, next_value = (apply(update.before, obs)[1] for obs in (x.obs, x.next_obs))
        num_steps, length = mask.sum(), mask.sum(axis=0)
        # Only a learned value looks past a time limit, and nothing past a death.
        final = next_value[length - 1, jnp.arange(5)] if ending == TRUNCATED and name == "value" else 0.0
        to_go = discounted_return(x.reward, mask, GAMMA, final)
        time = jnp.arange(len(mask))[:, None]
        mean, std = to_go[mask].mean(), to_go[mask].std()
        weight = {
            "none": to_go,
            "sum over steps": to_go,
            "total return": jnp.where(mask, GAMMA**time * x.reward, 0.0).sum(axis=0, keepdims=True),
            "discounted states": GAMMA**time * (to_go - leave_one_out_mean(to_go, mask)),
            "batch_mean": to_go - mean,
            "standardised": (to_go - mean) / std,
            "per_time_mean": to_go - per_time_mean(to_go, mask),
            "value": to_go - value,
        }[name]

        def loss(params, x=x, mask=mask, weight=weight, num_steps=num_steps, target=to_go):
            distribution, value = apply(params, x.obs)
            count = 5 if name == "sum over steps" else num_steps
            policy_loss = -jnp.sum(distribution.log_prob(x.action) * weight, where=mask) / count
            entropy = jnp.mean(distribution.entropy(), where=mask)
            terms = {"policy_loss": policy_loss}
            total = policy_loss - ENTROPY_COEF * entropy
            if name == "value":
                terms["value_loss"] = 0.5 * jnp.mean((value - target) ** 2, where=mask)
                total += VALUE_COEF * terms["value_loss"]
            return total, terms

        check_update(update, loss)


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
        (a2c, A2CConfig(num_steps=-1), "num_steps (-1) must be at least 1"),
        (a2c, A2CConfig(n_step=0), "n_step (0) must be at least 1"),
        (a2c, A2CConfig(max_grad_norm=0.0), "max_grad_norm (0.0) must be above 0"),
        (reinforce, REINFORCEConfig(num_episodes=0), "num_episodes (0) must be at least 1"),
        (reinforce, REINFORCEConfig(max_steps=0), "max_steps (0) must be at least 1"),
        *(
            (algorithm, config, "anneal_updates (None) must be a number of updates where something is annealed")
            for algorithm, config in (
                (a2c, A2CConfig(anneal_learning_rate=True)),
                (ppo, PPOConfig(anneal_learning_rate=True)),
                (ppo, PPOConfig(anneal_clip_eps=True)),
            )
        ),
        (
            reinforce,
            REINFORCEConfig(weight="total_return", discount_states=True),
            "discount_states (True) needs weight 'return_to_go'; 'total_return' counts from the start",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_says_the_contract_and_the_value(algorithm, config, message):
    with pytest.raises(UsageError) as error:
        algorithm(arms_env(), TinyNetwork(ARMS), config)
    assert str(error.value) == message


def test_minibatches_need_to_divide_environments_and_steps_together_alone():
    assert ppo(arms_env(), TinyNetwork(ARMS), PPOConfig(num_envs=10, num_steps=100, num_minibatches=8))


def test_reinforce_wants_a_time_limit_where_the_environment_has_none():
    endless = arms_env()._replace(max_episode_steps=None, name="endless")
    message = "endless has no time limit: max_steps (None) must be set, so that an episode ends"
    with pytest.raises(UsageError) as error:
        reinforce(endless, TinyNetwork(ARMS), REINFORCEConfig())
    assert str(error.value) == message
    assert reinforce(endless, TinyNetwork(ARMS), REINFORCEConfig(max_steps=7)).max_env_steps_per_update == 28
