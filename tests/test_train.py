"""The generic loops: blocks, the guard, the budget, evaluation."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TinyNetwork,
    arms_env,
    diary_env,
    episode_length,
    loops_are_unbatched,
    quick_jit,
    terminates,
    truncates,
)

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.family import FAMILY
from purepg.algorithms.grpo import grpo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.train import averaged, evaluate, guard, train
from purepg.types import Actor, Algorithm, Discrete, State, UpdateSteps

NEVER = 10**6


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def member(tree, *index):
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


# --- an algorithm whose every update is known: w gains a normal number ---


class Learner(NamedTuple):
    w: jax.Array  # [2]
    num_updates: jax.Array


def random_walk(nan_at, min_env_steps: int, max_env_steps: int) -> Algorithm:
    """One of its two parameters becomes NaN at update `nan_at`. The world counts its updates."""

    def init(key):
        return State(Learner(jax.random.normal(key, (2,)), jnp.int32(0)), jnp.int32(0))

    def step(key, state, update):
        k_walk, k_length = jax.random.split(key)
        (w, num_updates), world, _ = state
        w += jax.random.normal(k_walk, (2,))
        w = w.at[1].set(jnp.where(update == nan_at, jnp.nan, w[1]))
        env_steps = jax.random.randint(k_length, (), min_env_steps, max_env_steps + 1)
        metrics = {"env_steps": env_steps, "w": w[0], "update": update}
        return State(Learner(w, num_updates + 1), world + 1), metrics

    def policy(state, deterministic):
        return Actor.of(lambda key, obs: state.learner.w[0] + obs + deterministic)

    return Algorithm(init, step, policy, UpdateSteps(min_env_steps, max_env_steps))


def walk(w, key, updates):
    for u in updates:
        w = w + jax.random.normal(jax.random.split(jax.random.fold_in(key, u))[0], (2,))
    return w


def test_update_u_uses_the_key_folded_with_u_wherever_the_block_begins():
    algorithm, key = random_walk(NEVER, 1, 1), jax.random.key(1)
    state = algorithm.init(jax.random.key(0))
    after, metrics = train(key, algorithm, state, 5, 3)
    np.testing.assert_allclose(after.learner.w, walk(state.learner.w, key, (5, 6, 7)), rtol=1e-6)
    assert metrics["update"].tolist() == [5, 6, 7]
    assert metrics["w"][-1] == after.learner.w[0]


@pytest.fixture(scope="module")
def walkers():
    """run(lengths, nan_at [S], budget [S]) -> (first, after, metrics [S, 8]) of three guarded walkers."""

    def one(key, nan_at, budget, min_env_steps, max_env_steps):
        algorithm = guard(random_walk(nan_at, min_env_steps, max_env_steps), budget)
        state = algorithm.init(key)
        after, metrics = train(key, algorithm, state, 0, 8)
        return state, after, metrics

    programs = {
        "fixed": quick_jit(jax.vmap(lambda *args: one(*args, min_env_steps=3, max_env_steps=3))),
        "varying": quick_jit(jax.vmap(lambda *args: one(*args, min_env_steps=1, max_env_steps=9))),
    }
    keys = jax.random.split(jax.random.key(2), 3)

    def run(lengths, nan_at=(NEVER,) * 3, budget=(NEVER,) * 3):
        return jax.tree.map(np.asarray, programs[lengths](keys, jnp.array(nan_at), jnp.array(budget)))

    return keys, run


@pytest.mark.parametrize("lengths", ["fixed", "varying"])
def test_a_member_that_diverges_is_frozen_before_that_update_and_the_others_do_not_notice(walkers, lengths):
    keys, run = walkers
    first, healthy, healthy_metrics = run(lengths)
    _, after, metrics = run(lengths, (NEVER, 3, 0))

    same(member((after, metrics), 0), member((healthy, healthy_metrics), 0))
    assert healthy_metrics["finite"].all()
    assert metrics["finite"].tolist() == [[True] * 8, [True] * 3 + [False] * 5, [False] * 8]
    assert after.guard.finite.tolist() == [True, False, False]
    for s, num_updates in ((1, 3), (2, 0)):
        assert after.learner.num_updates[s] == num_updates
        expected = walk(first.learner.w[s], keys[s], range(num_updates))
        np.testing.assert_allclose(after.learner.w[s], expected, rtol=1e-6)
    # The world is never held back: it may be large, and goes through no select.
    assert after.world.tolist() == [8, 8, 8]


def test_a_member_stops_before_the_update_that_could_pass_its_budget_and_changes_no_more(walkers):
    keys, run = walkers
    first, _, ample_metrics = run("varying")
    env_steps = ample_metrics["env_steps"]
    # An update takes at most 9. The last walker has exactly these left before its update 3, and so may take it.
    budget = (30, 20, int(env_steps[2, :3].sum()) + 9)
    _, after, metrics = run("varying", budget=budget)
    stops = []
    for s in range(3):
        used = np.concatenate([[0], np.cumsum(env_steps[s])])
        stop = int(np.argmax(budget[s] - used < 9))
        assert 0 < stop < 8
        np.testing.assert_array_equal(metrics["env_steps"][s], np.where(np.arange(8) < stop, env_steps[s], 0))
        np.testing.assert_array_equal(metrics["w"][s, :stop], ample_metrics["w"][s, :stop])
        assert not metrics["w"][s, stop:].any()
        assert after.learner.num_updates[s] == stop
        expected = walk(first.learner.w[s], keys[s], range(stop))
        np.testing.assert_allclose(after.learner.w[s], expected, rtol=1e-5, atol=1e-6)
        stops.append(stop)
    assert len(set(stops)) > 1
    assert stops[2] >= 4
    assert (metrics["env_steps"].sum(axis=1) <= budget).all()
    assert metrics["finite"].all()


def test_a_diverged_member_still_says_so_after_its_budget_is_spent(walkers):
    _, run = walkers
    _, _, metrics = run("varying", (NEVER, 1, NEVER), (30, 30, 30))
    assert metrics["env_steps"][1, -1] == 0
    assert metrics["finite"].tolist() == [[True] * 8, [True] + [False] * 7, [True] * 8]


def test_updates_of_one_length_are_not_counted(walkers):
    """Their number is the caller's affair: a budget of one step stops nobody."""
    _, run = walkers
    _, after, metrics = run("fixed", budget=(1, 1, 1))
    assert metrics["env_steps"].tolist() == [[3] * 8] * 3
    assert after.learner.num_updates.tolist() == [8, 8, 8]


def test_a_guarded_policy_is_the_algorithms_own():
    plain = random_walk(NEVER, 1, 9)
    guarded = guard(plain, 100)
    key, obs = jax.random.key(0), jnp.arange(3.0)
    for deterministic in (False, True):
        np.testing.assert_array_equal(
            guarded.policy(guarded.init(key), deterministic)(key, (), obs)[1],
            plain.policy(plain.init(key), deterministic)(key, (), obs)[1],
        )


# --- real algorithms ---


@pytest.fixture(scope="module")
def a2c_population():
    """(init, block): A2C guarded, learning rates [H] by seeds [S]."""
    config = A2CConfig(num_envs=4, num_steps=5, normalize_obs=True, scale_reward=True)

    def make(learning_rate):
        algorithm = a2c(arms_env(), TinyNetwork(Discrete(2)), replace(config, learning_rate=learning_rate))
        return guard(algorithm, NEVER)

    def block(num_updates):
        def one(learning_rate, key, state, start):
            return train(key, make(learning_rate), state, start, num_updates)

        return quick_jit(jax.vmap(jax.vmap(one, (None, 0, 0, None)), (0, None, 0, None)))

    keys = jax.random.split(jax.random.key(3), 2)
    init = quick_jit(jax.vmap(jax.vmap(lambda rate, key: make(rate).init(key), (None, 0)), (0, None)))
    return keys, init, {n: block(n) for n in (2, 6)}


def test_blocks_of_updates_are_the_whole_run_bit_for_bit(a2c_population):
    keys, init, blocks = a2c_population
    rates = jnp.array([0.01, 0.03])
    state = first = init(rates, keys)
    parts = []
    for start in (0, 2, 4):
        state, metrics = blocks[2](rates, keys, state, start)
        parts.append(metrics)
    whole_state, whole_metrics = blocks[6](rates, keys, first, 0)
    same(jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *parts), whole_metrics)
    same(state, whole_state)
    assert [block._cache_size() for block in blocks.values()] == [1, 1]
    assert (state.learner.params["policy"] != first.learner.params["policy"]).any()


def test_a_setting_that_diverges_leaves_the_others_bit_identical(a2c_population):
    keys, init, blocks = a2c_population
    first = init(jnp.array([0.01, 0.03]), keys)
    healthy = blocks[2](jnp.array([0.01, 0.03]), keys, first, 0)
    state, metrics = blocks[2](jnp.array([0.01, jnp.nan]), keys, first, 0)
    same(member((state, metrics), 0), member(healthy, 0))
    assert metrics["finite"].tolist() == [[[True] * 2] * 2, [[False] * 2] * 2]
    same(member(state.learner, 1), member(first.learner, 1))


@pytest.mark.parametrize("method", ["reinforce", "grpo"])
def test_a_reward_that_is_not_finite_freezes_the_member_and_says_so(method):
    """Standardising weights, or leaving out groups without signal, must not make zeros of it."""
    env, network = arms_env(), TinyNetwork(Discrete(2))

    def two_updates(bad):
        def step(key, state, action):
            state, time_step = env.step(key, state, action)
            return state, time_step._replace(reward=jnp.where(state.id % 7 == 0, bad, time_step.reward))

        paid = env._replace(step=step)
        if method == "reinforce":
            algorithm = reinforce(paid, network, REINFORCEConfig(num_episodes=64))
        else:
            sizes: Any = {"num_prompts": 32, "group_size": 2, "num_minibatches": 1, "skip_groups_without_signal": True}
            algorithm = grpo(paid, network, replace(FAMILY["grpo"], **sizes))
        algorithm = guard(algorithm, NEVER)
        state = algorithm.init(jax.random.key(0))
        return state, *train(jax.random.key(1), algorithm, state, 0, 2)

    state, after, metrics = quick_jit(jax.vmap(two_updates))(jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf]))
    assert metrics["finite"].tolist() == [[True] * 2, *[[False] * 2] * 3]
    params, learned = (x.learner.params["policy"] for x in (state, after))
    np.testing.assert_array_equal((params != learned).any(axis=(1, 2)), [True, False, False, False])


def test_reinforce_never_passes_its_budget_and_stays_as_it_was_when_it_stopped():
    """One episode of 2 to 4 steps per update, so that seeds stop at updates of their own."""
    budget, config = 18, REINFORCEConfig(num_episodes=1, baseline="none")
    algorithm = guard(reinforce(arms_env(), TinyNetwork(Discrete(2)), config), budget)
    keys = jax.random.split(jax.random.key(4), 5)
    block = quick_jit(jax.vmap(lambda key, state, start: train(key, algorithm, state, start, 4), (0, 0, None)))
    state, rows = quick_jit(jax.vmap(algorithm.init))(keys), []
    for start in (0, 4, 8):
        before = state
        state, metrics = block(keys, state, start)
        rows.append(metrics)
    metrics = jax.tree.map(lambda *x: np.concatenate(x, axis=-1), *rows)

    env_steps, took = metrics["env_steps"], metrics["env_steps"] > 0
    left_before = budget - (np.cumsum(env_steps, axis=1) - env_steps)
    np.testing.assert_array_equal(took, left_before >= 4)
    assert (env_steps.sum(axis=1) <= budget).all()
    assert len(set(took.sum(axis=1))) > 1
    for name, x in averaged(metrics).items():
        if np.issubdtype(x.dtype, np.floating):
            np.testing.assert_array_equal(np.isnan(x), ~took, err_msg=name)
    assert not took[:, 8:].any()
    same(state, before)


# --- evaluation ---

NUM_EPISODES = 40


@pytest.fixture(scope="module")
def evaluations():
    """[S, NUM_EPISODES] of the diary, whose returns tell which episodes they were, by max_steps."""

    still = Actor.of(lambda key, obs: jnp.zeros(len(obs)))

    def run(max_steps):
        return lambda key: evaluate(key, diary_env(), still, NUM_EPISODES, max_steps)

    keys = jax.random.split(jax.random.key(6), 3)
    programs = {max_steps: run(max_steps) for max_steps in (3, 10)}
    return keys, {n: jax.tree.map(np.asarray, quick_jit(jax.vmap(f))(keys)) for n, f in programs.items()}, programs


def identify(stats, length):
    """The ids whose rewards, id + t at step t, sum to these returns over these lengths."""
    id = (stats.episode_return - length * (length - 1) / 2) / length
    np.testing.assert_array_equal(id, np.round(id))
    return id.astype(int)


def test_evaluation_counts_each_episode_once_from_its_reset_to_its_end(evaluations):
    stats = evaluations[1][10]
    id = identify(stats, stats.episode_length)
    np.testing.assert_array_equal(stats.episode_length, episode_length(id))
    np.testing.assert_array_equal(stats.terminated, terminates(id))
    np.testing.assert_array_equal(stats.truncated, truncates(id))
    assert set(stats.episode_length.ravel()) == {2, 3, 4}
    assert len(np.unique(id)) > 0.8 * id.size


def test_an_evaluation_episode_still_running_after_max_steps_is_truncated_there(evaluations):
    stats, uncut = evaluations[1][3], evaluations[1][10]
    cut = uncut.episode_length == 4
    id = identify(stats, stats.episode_length)
    np.testing.assert_array_equal(id, identify(uncut, uncut.episode_length))  # the same keys, the same episodes
    np.testing.assert_array_equal(stats.episode_length, np.where(cut, 3, uncut.episode_length))
    np.testing.assert_array_equal(stats.terminated, uncut.terminated & ~cut)
    np.testing.assert_array_equal(stats.truncated, uncut.truncated | cut)


def test_evaluation_under_vmap_is_that_of_a_plain_loop(evaluations):
    keys, stats, programs = evaluations
    assert loops_are_unbatched(jax.vmap(programs[10]), keys)
    alone = quick_jit(programs[10])
    for s, key in enumerate(keys):
        same(member(stats[10], s), alone(key))


def test_evaluation_acts_on_what_it_observes_with_keys_of_its_own():
    """The policy pays itself half a unit where the step is odd, and a fair coin elsewhere."""

    def act(key, obs):
        coin = jax.random.bernoulli(key, 0.5, obs.shape[:1])
        return jnp.where(obs[:, 1] % 2 == 1, 1, 2 * coin)

    stats = quick_jit(lambda key: evaluate(key, diary_env(), Actor.of(act), NUM_EPISODES, 10))(jax.random.key(8))
    length = stats.episode_length
    # id is an integer, an odd step pays 1/2, a coin 0 or 1: the halves tell how many odd steps there were.
    halves = 2 * (stats.episode_return - length * (length - 1) / 2)
    np.testing.assert_array_equal(halves % 2, (length // 2) % 2)
    # Two coins in an episode of four steps: a key used at every step would let both fall alike.
    coins = (stats.episode_return - length * (length - 1) / 2 - 0.5 * (length // 2)) % length
    assert set(coins[length == 4].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("num_steps", [8, 8_000_000])
def test_metrics_grow_with_updates_and_not_with_environment_steps(num_steps):
    algorithm = a2c(arms_env(), TinyNetwork(Discrete(2)), A2CConfig(num_envs=2, num_steps=num_steps))
    shapes = jax.eval_shape(lambda key: train(key, algorithm, algorithm.init(key), 0, 5)[1], jax.random.key(0))
    assert {x.shape for x in jax.tree.leaves(shapes)} == {(5,)}
