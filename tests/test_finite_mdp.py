"""Finite MDPs: what is simulated is what is written down, what is unrolled is the same process, and what is known of
the named ones."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from scipy.stats import chi2

import purepg.envs
from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.envs.finite_mdp import FiniteMDP, MDPState, mdp_env, unroll
from purepg.envs.named_mdps import MDPS, aliased, bandit, chain, cliff, contextual_bandit, garnet
from purepg.lab.exact import log_policy, optimum
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.networks.tabular import tabular_actor_critic
from purepg.train import train
from purepg.types import Discrete, UsageError

# Probabilities of 0 at either end and in between, certainty, rare outcomes, and sums that are 1 but for rounding.
ROWS = [
    [[0, 0.3, 0.7, 0, 0], [0, 0, 0, 0, 1]],
    [[0.1, 0.2, 0, 0.3, 0.4], [1 / 3, 1 / 3, 1 / 3, 0, 0]],
    [[0, 0, 1, 0, 0], [0.002, 0, 0.998, 0, 0]],
    [[0.7, 0.2, 0.1, 0, 0], [0, 0.5, 0, 0.5, 0]],
    [[0.2, 0.2, 0.2, 0.2, 0.2]] * 2,  # terminal, so it means nothing
]
AWKWARD = FiniteMDP(
    np.array(ROWS), np.arange(10.0).reshape(5, 2) / 7, np.array([0, 0.25, 0, 0.75, 0]), 0.9, np.arange(5) == 4
)


def p_value(count: np.ndarray, probability: np.ndarray) -> float:
    """Of Pearson's test, over the outcomes that are possible."""
    possible = probability > 0
    expected = count.sum() * probability[possible]
    statistic = np.sum((count[possible] - expected) ** 2 / expected)
    return float(chi2.sf(statistic, possible.sum() - 1)) if possible.sum() > 1 else 1.0


def test_starts_and_transitions_have_the_frequencies_written_down_and_no_others():
    env, num_samples = mdp_env(AWKWARD), 20_000

    @quick_jit
    def count(key: jax.Array) -> Any:
        k_start, k_step = jax.random.split(key)
        first = jax.vmap(env.reset)(jax.random.split(k_start, num_samples))[1]
        s, a = jnp.divmod(jnp.arange(10), 2)
        state = MDPState(s.astype(jnp.int32), jnp.zeros(10, jnp.int32))
        step = jax.vmap(jax.vmap(env.step), (0, None, None))
        following = step(jax.random.split(k_step, (num_samples, 10)), state, a)[1].obs
        return jax.nn.one_hot(first, 5).sum(0), jax.nn.one_hot(following, 5).sum(0)

    starts, following = (np.asarray(x) for x in count(jax.random.key(0)))
    cases = [(starts, AWKWARD.start), *zip(following, AWKWARD.transition.reshape(10, 5), strict=True)]
    for number, probability in cases:
        assert number.sum() == num_samples
        assert not number[probability == 0].any()
        assert p_value(number, probability) > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_first_and_the_last_of_all_random_numbers_draw_what_is_possible(uniform, monkeypatch):
    """The ends of [0, 1) in float32, which chance would not show."""
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(uniform))
    env, key = mdp_env(AWKWARD), jax.random.key(0)
    s, a = np.divmod(np.arange(10, dtype=np.int32), 2)
    following = jax.vmap(env.step, (None, 0, 0))(key, MDPState(jnp.array(s), jnp.zeros(10, jnp.int32)), jnp.array(a))
    drawn = np.append(np.asarray(following[1].obs), env.reset(key)[1])
    possible = np.concatenate([AWKWARD.transition.reshape(10, 5), AWKWARD.start[None]]) > 0
    expected = [np.flatnonzero(row)[0 if uniform == 0 else -1] for row in possible]
    np.testing.assert_array_equal(drawn, expected)


# States 0, 1, 2 and the terminal 3 in a line: action 0 walks on, action 1 stays.
WALK, STAY = np.eye(4)[[1, 2, 3, 3]], np.eye(4)
LINE = FiniteMDP(
    np.stack([WALK, STAY], axis=1), np.arange(8.0).reshape(4, 2), np.eye(4)[0], 0.9, terminal=np.arange(4) == 3
)


@pytest.mark.parametrize(("horizon", "terminates"), [(None, False), (3, False), (3, True)])
def test_flags_rewards_and_the_clock_are_as_declared_and_a_step_never_resets(horizon, terminates):
    """At every state, action and time, past the end too. A terminal state reached at a time limit has both flags."""
    env = mdp_env(replace(LINE, horizon=horizon, horizon_terminates=terminates))
    s, a, t = (np.array(x, np.int32) for x in zip(*itertools.product(range(4), range(2), range(6)), strict=True))
    step = quick_jit(jax.vmap(env.step, (None, 0, 0)))
    (state, clock), (obs, reward, terminated, truncated, _) = step(
        jax.random.key(0), MDPState(jnp.array(s), jnp.array(t)), jnp.array(a)
    )
    expected = np.where(a == 0, np.minimum(s + 1, 3), s)
    late = t + 1 >= 3 if horizon else np.zeros_like(t, bool)
    np.testing.assert_array_equal(state, expected)
    np.testing.assert_array_equal(obs, expected)
    np.testing.assert_array_equal(clock, t + 1)
    np.testing.assert_array_equal(reward, np.where(s == 3, 0, 2 * s + a))
    np.testing.assert_array_equal(terminated, (expected == 3) | (late & terminates))
    np.testing.assert_array_equal(truncated, late & (not terminates))


def test_the_environment_declares_its_spaces_its_limit_and_the_types_that_it_keeps():
    for mdp in (AWKWARD, chain(), bandit(horizon=3)):
        env, key = mdp_env(mdp), jax.random.key(0)
        assert (env.observation_space, env.action_space) == (Discrete(mdp.num_states), Discrete(mdp.num_actions))
        assert (env.max_episode_steps, env.name) == (mdp.horizon, mdp.name)
        first = jax.eval_shape(env.reset, key)
        state, step = jax.eval_shape(env.step, key, first[0], jax.ShapeDtypeStruct((), jnp.int32))
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(first)] == [((), jnp.int32)] * 3
        assert jax.tree.leaves((state, step.obs)) == jax.tree.leaves(first)
        dtypes = [x.dtype for x in (step.reward, step.terminated, step.truncated)]
        assert dtypes == [jnp.float32, bool, bool]


# --- unrolling ---


def test_an_unrolled_process_is_where_the_original_is_at_each_time():
    """Terminal states inside, aliases and the original's clock: state (t, s) has the mass of s at time t, and mass
    leaves for the terminal state when an episode ends."""
    H, S = 4, 5
    mdp = replace(AWKWARD, horizon=H, horizon_terminates=True, alias=np.array([0, 1, 0, 1, 2]))
    unrolled = unroll(mdp)
    pi = np.random.default_rng(0).dirichlet(np.ones(2), size=S)
    step = np.einsum("sa,sat->st", pi, mdp.transition) * ~mdp.terminal
    unrolled_pi = np.concatenate([np.tile(pi, (H, 1)), [[0.5, 0.5]]])
    unrolled_step = np.einsum("sa,sat->st", unrolled_pi, unrolled.transition)

    here, there = mdp.start, unrolled.start
    for t in range(H + 2):
        expected = np.zeros(H * S + 1)
        if t < H:
            expected[t * S : (t + 1) * S] = here
        expected[-1] = 1 - expected.sum()
        np.testing.assert_allclose(there, expected, atol=1e-15)
        here, there = here @ step, there @ unrolled_step
    assert there[-1] == pytest.approx(1, abs=1e-15)

    index = np.arange(H * S) % S
    np.testing.assert_array_equal(unrolled.reward, np.append(mdp.reward[index], [[0, 0]], axis=0))
    np.testing.assert_array_equal(unrolled.alias, np.append(mdp.alias[index], 0))
    np.testing.assert_array_equal(unrolled.terminal, np.append(mdp.terminal[index], True))
    assert (unrolled.gamma, unrolled.horizon, unrolled.horizon_terminates) == (mdp.gamma, None, False)


@pytest.mark.parametrize("terminates", [None, False])
def test_only_a_horizon_that_terminates_is_unrolled(terminates):
    horizon = None if terminates is None else 3
    with pytest.raises(UsageError, match="garnet 0: unroll needs a horizon that terminates"):
        unroll(garnet(horizon=horizon))


# --- validation ---

UNIFORM = {"transition": np.full((2, 3, 2), 0.5), "reward": np.zeros((2, 3)), "start": np.array([1.0, 0.0])}
END = np.array([False, True])
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a transition of rank 2": ("transition", {"transition": np.full((2, 2), 0.5)}),
    "a transition to fewer states than there are": ("transition", {"transition": np.ones((2, 3, 1))}),
    "a reward that is transposed": ("reward", {"reward": np.zeros((3, 2))}),
    "a reward of the state alone": ("reward", {"reward": np.zeros(2)}),
    "a start of other length": ("start", {"start": np.ones(1)}),
    "a terminal of other length": ("terminal", {"terminal": np.zeros(3, bool)}),
    "an alias of other length": ("alias", {"alias": np.arange(3)}),
    "a transition that sums to more": ("transition", {"transition": np.full((2, 3, 2), 0.6)}),
    "a transition that is negative": ("transition", {"transition": np.tile([1.5, -0.5], (2, 3, 1))}),
    "a transition that is not a number": ("transition", {"transition": np.full((2, 3, 2), np.nan)}),
    "a start that sums to less": ("start", {"start": np.array([0.9, 0.0])}),
    "a start that is negative": ("start", {"start": np.array([1.5, -0.5])}),
    "a reward that is not a number": ("reward", {"reward": np.full((2, 3), np.nan)}),
    "an infinite reward": ("reward", {"reward": np.full((2, 3), -np.inf)}),
    "a start in a terminal state": ("start", {"start": np.array([0.5, 0.5]), "terminal": END}),
    "a gamma below 0": (r"gamma \(-0.1\)", {"gamma": -0.1}),
    "a gamma above 1": (r"gamma \(1.1\)", {"gamma": 1.1}),
    "a gamma that is not a number": (r"gamma \(nan\)", {"gamma": np.nan}),
    "a horizon of no steps": (r"horizon \(0\)", {"horizon": 0}),
    "a horizon of two steps and a half": (r"horizon \(2.5\)", {"horizon": 2.5}),
    "a termination at no horizon": ("horizon_terminates", {"horizon_terminates": True}),
    "an alias between two rows": ("alias", {"alias": np.array([0, 0.5])}),
    "a negative alias": ("alias", {"alias": np.array([0, -1])}),
    "gamma 1 for ever": (r"gamma \(1\)", {"gamma": 1}),
    "gamma 1 and a time limit": (r"gamma \(1\)", {"gamma": 1, "horizon": 5}),
    "gamma 1 and no way to the end": (
        r"gamma \(1\)",
        {"gamma": 1, "terminal": END, "transition": np.tile([1.0, 0.0], (2, 3, 1))},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_process_that_cannot_be_is_refused_by_the_name_of_what_is_wrong(wrong):
    field, change = WRONG[wrong]
    FiniteMDP(**UNIFORM, gamma=0.9, name="mine")
    with pytest.raises(UsageError, match=f"^mine: .*{field}"):
        FiniteMDP(**(UNIFORM | {"gamma": 0.9, "name": "mine"} | change))


def test_gamma_may_be_one_where_every_state_has_a_way_to_the_end_or_the_horizon_terminates():
    """One way is enough, by any action and through any states."""
    line = np.zeros((4, 2, 4))
    line[:, 0] = np.eye(4)
    line[np.arange(4), 1, [1, 2, 3, 3]] = 1
    start, reward, terminal = np.eye(4)[0], np.zeros((4, 2)), np.arange(4) == 3
    assert FiniteMDP(line, reward, start, 1, terminal).gamma == 1
    assert FiniteMDP(line, reward, start, 1, horizon=2, horizon_terminates=True).gamma == 1
    line[1] = np.eye(4)[1]  # a trap on the way
    with pytest.raises(UsageError, match="gamma"):
        FiniteMDP(line, reward, start, 1, terminal)


def test_terminal_rows_mean_nothing_and_the_callers_arrays_are_left_alone():
    transition, reward = np.full((2, 3, 2), 0.5), np.ones((2, 3), np.float32)
    transition[1], reward[1] = np.nan, np.inf
    mdp = FiniteMDP(transition, reward, np.array([1, 0]), 0.9, END)
    np.testing.assert_array_equal(mdp.transition[1], np.tile([0.0, 1.0], (3, 1)))
    np.testing.assert_array_equal(mdp.reward, [[1, 1, 1], [0, 0, 0]])
    assert np.isnan(transition[1]).all() and np.isinf(reward[1]).all()
    assert {x.dtype for x in (mdp.transition, mdp.reward, mdp.start)} == {np.dtype(np.float64)}


def test_left_out_nothing_is_terminal_and_every_state_is_itself():
    mdp = FiniteMDP(**UNIFORM, gamma=0.9)
    assert not mdp.terminal.any()
    np.testing.assert_array_equal(mdp.alias, [0, 1])


# --- the named ones ---


@pytest.mark.parametrize("name", MDPS)
def test_every_named_process_is_made_by_its_name(name):
    env, mdp = purepg.envs.make(name), MDPS[name]()
    assert (env.observation_space.n, env.action_space.n) == (mdp.num_states, mdp.num_actions)  # type: ignore[union-attr]
    assert (env.name, env.max_episode_steps) == (mdp.name, mdp.horizon)


def test_make_passes_a_processs_arguments_on():
    env, mdp = purepg.envs.make("garnet", seed=3), garnet(seed=3)
    assert env.name == "garnet 3"
    state = MDPState(jnp.int32(2), jnp.int32(0))
    _, time_step = env.step(jax.random.key(0), state, jnp.int32(1))
    np.testing.assert_allclose(time_step.reward, mdp.reward[2, 1], rtol=1e-6)
    assert mdp.transition[2, 1, time_step.obs] > 0


def test_bandits_pay_their_arms_and_end():
    assert bandit().reward.tolist() == [[1.0, 0.0]]
    assert (bandit().horizon, bandit().horizon_terminates, bandit().gamma) == (1, True, 1.0)
    three = bandit((1.0, 0.5, 0.0), horizon=7)
    assert (three.num_states, three.num_actions, three.horizon) == (1, 3, 7)
    contexts = contextual_bandit(seed=2, num_contexts=5, num_arms=2)
    assert contexts.reward.shape == (5, 2)
    np.testing.assert_allclose(contexts.start, 1 / 5)
    assert (contexts.horizon, contexts.horizon_terminates, contexts.gamma) == (1, True, 1.0)
    np.testing.assert_array_equal(contexts.reward, contextual_bandit(2, 5, 2).reward)
    assert (contexts.reward != contextual_bandit(3, 5, 2).reward).all()


def test_the_chains_best_policy_walks_on_for_3_677_a_step():
    """Strens (2000) gives 3677 for a run of 1000 steps."""
    mdp = chain()
    np.testing.assert_array_equal(optimum(mdp).pi, np.tile([1.0, 0.0], (5, 1)))
    stationary = np.linalg.matrix_power(mdp.transition[:, 0], 200)[0]
    assert stationary @ mdp.reward[:, 0] == pytest.approx(3.677, abs=5e-4)
    assert mdp.transition[4, 0].tolist() == pytest.approx([0.2, 0, 0, 0, 0.8])
    assert mdp.transition[2, 1].tolist() == pytest.approx([0.8, 0, 0, 0.2, 0])
    assert (mdp.horizon, mdp.horizon_terminates) == (100, False)


def test_the_cliffs_best_way_is_thirteen_steps_along_its_edge_and_a_fall_costs_a_hundred():
    """Sutton & Barto (2018), example 6.6: up, eleven to the right, down; the safest way, along the top, takes 17."""
    mdp, up, right, down, left = cliff(gamma=1.0), 0, 1, 2, 3
    assert optimum(mdp).objective == pytest.approx(-13, abs=1e-9)

    def walk(actions: list[int]) -> tuple[int, float]:
        s, total = int(mdp.start.argmax()), 0.0
        for a in actions:
            total, s = total + mdp.reward[s, a], int(mdp.transition[s, a].argmax())
        return s, total

    assert set(mdp.transition.ravel()) == {0.0, 1.0}
    assert walk([up] + 11 * [right] + [down]) == (47, -13)
    assert walk(3 * [up] + 11 * [right] + 3 * [down]) == (47, -17)
    assert walk([right]) == (36, -100)
    assert walk([up] + 10 * [right] + [down]) == (36, -11 - 100)
    assert walk([left, down, up, left] + 4 * [up]) == (0, -8)  # into walls
    assert np.flatnonzero(mdp.terminal).tolist() == [47]
    assert (mdp.reward[:37] == -100).sum() == 11  # ten from above, one from the start
    assert cliff().gamma == 0.99 and cliff().horizon == 200


def test_the_aliased_process_is_the_one_that_was_worked_out():
    mdp = aliased()
    arrows = {(s, a): int(mdp.transition[s, a].argmax()) for s in range(5) for a in range(2)}
    assert mdp.transition.max(-1).min() == 1
    assert arrows == {
        (0, 0): 1, (0, 1): 1, (1, 0): 2, (1, 1): 5, (2, 0): 3, (2, 1): 3, (3, 0): 4, (3, 1): 4, (4, 0): 5, (4, 1): 5
    }  # fmt: skip
    np.testing.assert_array_equal(mdp.reward, [[1, 0], [0, 2.5], [0, 0], [0, 0], [8, 8], [0, 0]])
    assert (mdp.gamma, mdp.start.tolist(), mdp.horizon) == (0.5, [1, 0, 0, 0, 0, 0], None)
    assert mdp.terminal.tolist() == [False] * 5 + [True]
    assert set(mdp.alias) == {0}


def test_a_garnet_branches_as_asked_and_is_its_seeds():
    mdp = garnet(1, num_states=7, num_actions=2, branching=4)
    assert ((mdp.transition > 0).sum(-1) == 4).all()
    np.testing.assert_allclose(mdp.start, 1 / 7)
    again, other = garnet(1, 7, 2, 4), garnet(2, 7, 2, 4)
    np.testing.assert_array_equal(mdp.transition, again.transition)
    np.testing.assert_array_equal(mdp.reward, again.reward)
    assert (mdp.reward != other.reward).all() and (mdp.transition != other.transition).any()
    assert set(garnet(branching=1).transition.ravel()) == {0.0, 1.0}
    for branching in (0, 7):
        with pytest.raises(UsageError, match=rf"branching \({branching}\)"):
            garnet(branching=branching)


def test_uniform_cuts_make_a_garnets_probabilities_uniform_on_the_simplex():
    """Of two branches the larger is uniform on [1/2, 1], of mean 3/4 and variance 1/48."""
    larger = garnet(0, num_states=30, num_actions=20, branching=2).transition.max(-1)
    np.testing.assert_allclose([larger.mean(), larger.var()], [3 / 4, 1 / 48], rtol=0.06)


# --- every algorithm learns on one ---

CONTEXTS = contextual_bandit()
BATCH: dict[str, Any] = {"num_envs": 32, "num_steps": 1}
ALGORITHMS: dict[str, tuple] = {
    "reinforce": (reinforce, REINFORCEConfig(num_episodes=32, learning_rate=0.02)),
    "a2c": (a2c, A2CConfig(**BATCH, learning_rate=0.02)),
    "ppo": (ppo, PPOConfig(**BATCH, num_epochs=2, num_minibatches=1, learning_rate=0.02)),
}
NETWORKS = {
    "MLP": actor_critic(mdp_env(CONTEXTS), NetworkConfig()),
    "table": tabular_actor_critic(CONTEXTS),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_finds_the_best_arms_of_a_contextual_bandit(algorithm, network):
    """With either network, at every seed: nine tenths of the way from the first policy to the exact optimum."""
    (make, config), net = ALGORITHMS[algorithm], NETWORKS[network]
    config = replace(config, learning_rate=config.learning_rate * (5 if network == "table" else 1))
    made, table = make(mdp_env(CONTEXTS), net, config), log_policy(net, CONTEXTS.num_states)

    def run(key: jax.Array) -> Any:
        k_init, k_train = jax.random.split(key)
        first = made.init(k_init)
        last, _ = train(k_train, made, first, 0, 80)
        return tuple(jnp.mean(jnp.sum(jnp.exp(table(x.learner.params)) * CONTEXTS.reward, 1)) for x in (first, last))

    first, last = (np.asarray(x) for x in quick_jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 4)))
    best = CONTEXTS.reward.max(1).mean()
    assert (best - first > 0.5).all()
    assert (best - last < 0.1 * (best - first)).all(), (first, last, best)
