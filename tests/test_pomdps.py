"""Processes that need memory: what happens in them, and the best return with memory and without, by brute force."""

from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit

import purepg.envs
from purepg.envs.finite_mdp import FiniteMDP, MDPState, mdp_env, unroll
from purepg.envs.named_mdps import aliased, bandit, chain, garnet
from purepg.envs.named_pomdps import POMDPS, repeat_previous, tmaze
from purepg.lab.exact import in_float64, objective, optimum
from purepg.lab.pomdp import longest_episode, objective_without_memory, optimum_with_memory, optimum_without_memory
from purepg.types import Discrete, UsageError

# --- the processes ---


@pytest.mark.parametrize("length", [1, 5])
def test_in_the_tmaze_the_cue_is_seen_once_and_pays_at_the_junction(length):
    env = purepg.envs.make("tmaze", length=length)
    assert (env.observation_space, env.action_space, env.max_episode_steps) == (Discrete(4), Discrete(2), length + 1)
    keys = jax.random.split(jax.random.key(0), 40)

    @quick_jit
    @jax.vmap
    def episode(key):
        state, first = env.reset(key)
        action = jax.random.randint(key, (length + 1,), 0, 2)
        return first, action, jax.lax.scan(lambda state, a: env.step(key, state, a), state, action)[1]

    cue, action, steps = jax.tree.map(np.asarray, episode(keys))
    assert 10 < cue.sum() < 30 and set(cue) == {0, 1}
    assert (steps.obs[:, : length - 1] == 2).all() and (steps.obs[:, length - 1] == 3).all()
    np.testing.assert_array_equal(steps.reward[:, -1], action[:, -1] == cue)
    assert not steps.reward[:, :-1].any() and not steps.terminated[:, :-1].any()
    assert steps.terminated[:, -1].all() and not steps.truncated[:, :-1].any()


@pytest.mark.parametrize(("n", "k", "length"), [(2, 0, 3), (3, 2, 9)])
def test_repeat_previous_pays_for_the_value_of_k_steps_before(n, k, length):
    env = purepg.envs.make("repeat_previous", num_values=n, k=k, length=length)
    assert (env.observation_space, env.action_space, env.max_episode_steps) == (Discrete(n), Discrete(n), length)
    keys = jax.random.split(jax.random.key(0), 60)

    @quick_jit
    @jax.vmap
    def episode(key):
        state, first = env.reset(key)
        action = jax.random.randint(key, (length,), 0, n)
        k_step = jax.random.split(key, length)
        return first, action, jax.lax.scan(lambda state, x: env.step(x[0], state, x[1]), state, (k_step, action))[1]

    first, action, steps = jax.tree.map(np.asarray, episode(keys))
    value = np.concatenate([first[:, None], steps.obs[:, :-1]], axis=1)
    assert not steps.reward[:, :k].any()
    right = action[:, k:] == value[:, : length - k]
    np.testing.assert_allclose(steps.reward[:, k:] * (length - k), right, rtol=1e-6)
    assert right.any() and not right.all()
    np.testing.assert_array_equal(steps.terminated, np.broadcast_to(np.arange(length) == length - 1, (60, length)))
    assert not steps.truncated.any()
    share = np.bincount(value.ravel(), minlength=n) / value.size
    np.testing.assert_allclose(share, 1 / n, atol=4 / np.sqrt(value.size))


@pytest.mark.parametrize("name", POMDPS)
def test_by_name_a_process_is_observed_by_its_alias_and_otherwise_the_same(name):
    mdp, named = POMDPS[name](), purepg.envs.make(name)
    full, key = mdp_env(mdp), jax.random.key(3)
    assert full.observation_space == Discrete(mdp.num_states)
    state, obs = named.reset(key)
    same_state, true = full.reset(key)
    assert state == same_state and obs == mdp.alias[true] and obs.dtype == jnp.int32
    at = MDPState(jnp.arange(mdp.num_states, dtype=jnp.int32), jnp.zeros(mdp.num_states, jnp.int32))
    step = jax.vmap(named.step, (None, 0, None)), jax.vmap(full.step, (None, 0, None))
    (seen_state, seen), (true_state, true) = (f(key, at, jnp.int32(1)) for f in step)
    np.testing.assert_array_equal(seen.obs, mdp.alias[np.asarray(true.obs)])
    for a, b in zip(jax.tree.leaves((seen_state, seen[1:])), jax.tree.leaves((true_state, true[1:])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tmaze(0), r"tmaze: length \(0\) must be an integer, at least 1"),
        (lambda: tmaze(5000), r"tmaze: length \(5000\) must be at most 1022"),
        (lambda: repeat_previous(k=-1), r"repeat_previous: k \(-1\) must be an integer, at least 0"),
        (lambda: repeat_previous(k=3, length=3), r"repeat_previous: length \(3\) must be an integer, at least 4"),
        (lambda: repeat_previous(num_values=4, k=9), r"num_values \(4\) and k \(9\) make 1398100 states; choose fewer"),
    ],
)
def test_a_process_that_cannot_be_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


# --- the optimum ---

GARNETS = [
    replace(
        garnet(seed, num_states=4, num_actions=2, branching=2, horizon=3, horizon_terminates=True),
        alias=np.array([0, 0, 1, 1]),
        terminal=np.arange(4) == (3 if ends else 9),
        start=np.array([0.5, 0.2, 0.3, 0.0]),
    )
    for seed, ends in ((2, False), (5, True), (10, False))
]


def brute_force(mdp: FiniteMDP, remembers: bool) -> float:
    """The best J of all deterministic policies from the observations so far, or from the present one, to an action:
    all of them along every path of states."""
    H, S, A = mdp.horizon or 0, mdp.num_states, mdp.num_actions
    histories = [h for t in range(1, H + 1) for h in product(range(2), repeat=t)]
    index = {h: i for i, h in enumerate(histories)} if remembers else {h: h[-1] for h in histories}
    policy = np.array(list(product(range(A), repeat=max(index.values()) + 1)))  # [policies, histories]
    total = np.zeros(len(policy))
    for path in product(range(S), repeat=H):
        probability, R = np.full(len(policy), mdp.start[path[0]]), np.zeros(len(policy))
        for t, s in enumerate(path):
            action = policy[:, index[tuple(mdp.alias[list(path[: t + 1])])]]
            R += mdp.gamma**t * mdp.reward[s, action]
            probability = probability * (mdp.transition[s, action, path[t + 1]] if t + 1 < H else 1.0)
        total += probability * R
    return float(total.max())


@pytest.mark.parametrize("mdp", GARNETS, ids=lambda mdp: mdp.name)
def test_the_optima_are_those_of_all_policies_with_and_without_memory(mdp):
    """16,384 policies with memory, and 4 without."""
    best, without = optimum_with_memory(mdp).objective, optimum_without_memory(mdp)
    assert best == pytest.approx(brute_force(mdp, remembers=True), rel=1e-12)
    assert without.objective == pytest.approx(brute_force(mdp, remembers=False), rel=1e-12)
    assert without.objective < best < optimum(unroll(mdp)).objective
    pi = np.eye(2)[without.action[mdp.alias]]
    assert objective_without_memory(mdp, pi) == pytest.approx(without.objective, rel=1e-14)


@pytest.mark.parametrize(
    "mdp",
    [
        garnet(3, horizon=4, horizon_terminates=True),
        repeat_previous(2, 0, 5),
        replace(tmaze(3), alias=np.arange(9)),
    ],
    ids=lambda mdp: mdp.name,
)
def test_where_the_observation_is_the_state_memory_adds_the_time_and_nothing_else(mdp):
    """The optimum that sees the state, and the steps left where there is a horizon."""
    expected = optimum(unroll(mdp) if mdp.horizon_terminates else mdp).objective
    assert optimum_with_memory(mdp).objective == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("mdp", "best", "without"),
    [
        *((tmaze(length), 1.0, 0.5) for length in (1, 2, 10, 100)),
        *((repeat_previous(2, k, 8), 1.0, 0.5) for k in (1, 2, 3, 4)),
        (repeat_previous(3, 1, 5), 1.0, 1 / 3),
        (aliased(), 1 + 0.5 * 2.5, 1.5),  # action 0 and then 1; without a clock, 0 for ever, which 1 + 8 / 16 pays
        (bandit((0.0, 3.0), horizon=4), 12.0, 12.0),
    ],
    ids=lambda x: x.name if isinstance(x, FiniteMDP) else None,
)
def test_the_named_processes_have_the_optima_worked_out_by_hand(mdp, best, without):
    assert optimum_with_memory(mdp).objective == pytest.approx(best, rel=1e-12)
    assert optimum_without_memory(mdp).objective == pytest.approx(without, rel=1e-12)


def test_beliefs_that_repeat_are_counted_once():
    """In the T-maze the cue is all there is to know; in RepeatPrevious, the values seen so far or the last k + 1."""
    assert optimum_with_memory(tmaze(30)).num_beliefs == 2 * 31
    assert optimum_with_memory(repeat_previous(2, 2, 6)).num_beliefs == 2 + 4 + 8 + 8 + 8 + 8
    assert optimum_with_memory(aliased()).num_beliefs == 5


def test_a_policy_without_memory_has_the_objective_that_the_bellman_equation_gives():
    rng: Any = np.random.default_rng(0)
    for mdp in (aliased(), tmaze(4)):
        pi = rng.dirichlet(np.ones(2), size=mdp.alias.max() + 1)[mdp.alias]
        expected = in_float64(quick_jit(lambda log_pi, mdp=mdp: objective(mdp, log_pi)), np.log(pi))
        assert objective_without_memory(mdp, pi) == pytest.approx(float(expected), rel=1e-12)


def test_a_coin_can_be_better_than_every_deterministic_policy_without_memory():
    """Two states that look alike; an action that leaves one for the other, for a reward, earns nothing there."""
    transition, reward = np.zeros((2, 2, 2)), np.zeros((2, 2))
    for s in range(2):
        transition[s, s, 1 - s] = transition[s, 1 - s, s] = 1
        reward[s, s] = 1.0
    mdp = FiniteMDP(transition, reward, np.eye(2)[0], 1.0, horizon=6, horizon_terminates=True, alias=np.zeros(2, int))
    assert optimum_without_memory(mdp).objective == 1.0
    assert objective_without_memory(mdp, np.full((2, 2), 0.5)) == pytest.approx(3.0, rel=1e-14)
    assert optimum_with_memory(mdp).objective == 6.0


def test_episodes_of_any_length_are_refused_and_the_longest_is_found():
    assert [longest_episode(mdp) for mdp in (aliased(), tmaze(7), repeat_previous(), bandit(horizon=9))] == [
        5,
        8,
        16,
        9,
    ]
    assert longest_episode(replace(aliased(), horizon=3)) == 5  # a time limit is none of the process's
    assert longest_episode(replace(aliased(), horizon=3, horizon_terminates=True)) == 3
    with pytest.raises(UsageError, match="chain has episodes of any length: give it a horizon that terminates"):
        optimum_with_memory(chain())


def test_too_many_policies_are_refused():
    with pytest.raises(UsageError, match=r"garnet 0 has 3\^30 policies without memory, more than 100000"):
        optimum_without_memory(garnet(num_states=30, horizon=2, horizon_terminates=True))
