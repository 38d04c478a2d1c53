"""The rounds of acting and learning that algorithms with a replay buffer share, seen by a `learn` that takes notes."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import (
    TinyNetwork,
    TinyQNetwork,
    arms_env,
    diary_env,
    episode_length,
    equations,
    quick_jit,
    terminates,
    truncates,
)

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.off_policy import ReplayLearner, replay_algorithm
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.experience import normalize
from purepg.experience.exploration import Exploration, gaussian_noise, own_samples, random_action
from purepg.optimize import TrainState, with_params
from purepg.train import averaged, train
from purepg.types import Box, Discrete, State, Transition, UsageError

REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
UNBOUNDED = Box(np.full(2, -np.inf, np.float32), np.full(2, np.inf, np.float32))

N, T, G, B, U = 4, 6, 2, 16, 4
WARMUP = 4 * N - 1  # after the fourth round the buffer holds as many and one more
LARGE, SMALL = 64 * N, 13 * N  # room for all rounds, and for thirteen
CONFIG: Any = DDPGConfig(
    num_envs=N, num_steps=T, num_gradient_steps=G, batch_size=B, capacity=LARGE, warmup_steps=WARMUP
)
FIRST_ROUND, NUM_ROUNDS = 3, T * U  # the round with which learning begins, and their number


class Notes(NamedTuple):
    """What `learn` was given, call by call."""

    count: Any
    number: Any
    key: Any
    batch: Any


def take_notes(key, learner, batch, number):
    params, notes = learner.train_state
    new = Notes(1, number, jax.random.key_data(key), batch)
    i = notes.count
    written = jax.tree.map(lambda all, x: all.at[i].set(x), notes[1:], new[1:])
    return learner._replace(train_state=TrainState(params, Notes(i + 1, *written))), {
        "number": number.astype(jnp.float32)
    }


def with_notes(env, network, config, exploration):
    """An algorithm whose learner keeps the notes where others keep their optimisers' state."""
    calls = NUM_ROUNDS * G

    def init_learner(params):
        obs = jax.eval_shape(env.reset, jax.random.key(0))[1]
        action = jax.eval_shape(lambda: random_action(jax.random.key(0), env, 1))
        seen = jnp.zeros((calls, B, *obs.shape), float if config.normalize_obs else obs.dtype)
        reward, flag = jnp.zeros((calls, B)), jnp.zeros((calls, B), bool)
        batch = Transition(seen, jnp.zeros((calls, B, *action.shape[1:]), action.dtype), None, reward, flag, flag, seen)
        notes: Any = Notes(jnp.int32(0), jnp.zeros(calls, int), jnp.zeros((calls, 2), jnp.uint32), batch)
        return ReplayLearner(TrainState(params, notes), params)

    return replay_algorithm(env, network, config, init_learner, exploration, take_notes)


def by_updates(algorithm, change=lambda params: params):
    """[(state, metrics)]: before the first update, with parameters changed at will, and after each of U."""

    def update(state, u):
        state, metrics = train(jax.random.key(1), algorithm, state, u, 1)
        return state, (state, metrics)

    def updates():
        state = algorithm.init(jax.random.key(0))
        state = State(with_params(state.learner, change(state.learner.params)), state.world)
        return state, jax.lax.scan(update, state, jnp.arange(U))[1]

    first, (states, metrics) = jax.tree.map(np.asarray, quick_jit(updates)())
    metrics = {name: x[:, 0] for name, x in averaged(metrics).items()}
    return [(first, {}), *(jax.tree.map(lambda x, u=u: x[u], (states, metrics)) for u in range(U))]


def always_one(params):
    return params | {"policy": params["policy"] | {"shift": jnp.array([0.0, 1e6])}}


def story(**config):
    """Of the diary, whose policy takes action 1."""
    network = TinyQNetwork("categorical")
    return by_updates(with_notes(diary_env(), network, replace(CONFIG, **config), own_samples(network)), always_one)


@pytest.fixture(scope="module")
def told():
    return story()


@pytest.fixture(scope="module")
def retold():
    """The same with a small buffer, a truncation taken for a termination, and a warm-up of more than two updates."""
    return story(capacity=SMALL, bootstrap_at_truncation=False, warmup_steps=SMALL - 1)


def log(states) -> Any:
    """All transitions, `[rounds, N, ...]`, from a buffer with room for them."""
    return jax.tree.map(lambda x: x.reshape(-1, N, *x.shape[1:])[:NUM_ROUNDS], states[-1][0].world.buffer)


def test_the_buffer_has_every_transition_in_order_with_the_observation_before_any_reset(told):
    x = log(told)
    id, t = np.moveaxis(x.obs, -1, 0)
    np.testing.assert_array_equal(x.next_obs, np.stack([id, t + 1], -1))
    np.testing.assert_allclose(x.reward, id + t + 0.5 * x.action)
    ended = t + 1 == episode_length(id)
    np.testing.assert_array_equal(x.terminated, ended & terminates(id))
    np.testing.assert_array_equal(x.truncated, ended & truncates(id))
    assert (x.terminated != x.truncated).any() and (x.terminated & x.truncated).any()
    np.testing.assert_array_equal(x.obs[1:][~ended[:-1]], x.next_obs[:-1][~ended[:-1]])
    assert not t[0].any() and not t[1:][ended[:-1]].any()
    assert x.log_prob is None and x.obs.dtype == np.int32 and x.action.dtype == np.int32


def test_nothing_past_what_was_written_has_been_written(told):
    for i, (state, _) in enumerate(told):
        assert not state.world.buffer.next_obs[i * T * N :].any()


def test_until_the_buffer_holds_the_warm_up_actions_are_random_and_afterwards_the_policys(told):
    action = log(told).action
    assert set(action[: FIRST_ROUND + 1].ravel()) == {0, 1}
    assert set(action[FIRST_ROUND]) == {0, 1} and (action[FIRST_ROUND + 1 :] == 1).all()


def test_until_the_buffer_holds_the_warm_up_nothing_learns(retold):
    """Not one bit of the learner changes, and metrics of gradient steps that were not taken are no numbers."""
    (before, _), *waiting, (third, metrics), _ = retold
    assert len(waiting) == 2
    for state, said in waiting:
        jax.tree.map(np.testing.assert_array_equal, state.learner, before.learner)
        assert np.isnan(said["number"])
        assert set(state.world.buffer.action) == {0, 1}
    assert third.learner.train_state.opt_state.count == T * G and np.isfinite(metrics["number"])


def test_learning_goes_on_after_two_billion_rounds():
    """An update is the same one after as many rounds as int32 cannot count as it is after a few: it learns, writes over
    the oldest transitions, and keeps the rhythm of delayed steps."""
    sizes: Any = {"num_envs": N, "num_steps": T, "batch_size": B, "capacity": SMALL, "warmup_steps": WARMUP}
    algorithm = td3(arms_env(REAL), TinyQNetwork("deterministic"), TD3Config(**sizes, policy_delay=5))
    step = quick_jit(algorithm.step)
    state = quick_jit(algorithm.init)(jax.random.key(0))
    for u in range(3):  # more rounds than the buffer has room for
        state, _ = step(jax.random.key(u), state, jnp.int32(u))
    cycle = math.lcm(SMALL // N, 5)  # updates after which the buffer's place and the delay are what they were
    late = 3 + (2**31 // (T * cycle) + 1) * cycle
    assert late * T > 2**31
    soon, metrics = step(jax.random.key(9), state, jnp.int32(3))
    after, late_metrics = step(jax.random.key(9), state, jnp.int32(late))
    jax.tree.map(np.testing.assert_array_equal, (soon, metrics), (after, late_metrics))
    assert late_metrics["critic_loss"].num == T
    assert late_metrics["policy_loss"].num == 1


def test_a_small_buffer_keeps_the_newest_transitions_and_may_take_a_truncation_for_a_termination(told, retold):
    x, small = log(told), retold[-1][0].world.buffer
    x = x._replace(terminated=x.terminated | x.truncated)
    assert (x.terminated != log(told).terminated)[SMALL // N :].any()
    for round in range(SMALL // N, NUM_ROUNDS):
        i = round * N % SMALL
        jax.tree.map(lambda x, y, i=i, r=round: np.testing.assert_array_equal(x[i : i + N], y[r]), small, x)


def test_every_round_learns_so_many_times_by_steps_that_are_numbered_on(told):
    """From the first round that had enough to learn from, across updates."""
    notes = told[-1][0].learner.train_state.opt_state
    np.testing.assert_array_equal(notes.number[: notes.count], np.arange(FIRST_ROUND * G, NUM_ROUNDS * G))
    calls = [state.learner.train_state.opt_state.count for state, _ in told]
    assert calls == [0, *((T * u - FIRST_ROUND) * G for u in range(1, U + 1))]


def test_metrics_are_means_over_the_gradient_steps_of_an_update(told):
    for u, (_, metrics) in enumerate(told[1:]):
        first, last = max(FIRST_ROUND, u * T) * G, (u + 1) * T * G - 1
        np.testing.assert_allclose(metrics["number"], (first + last) / 2)


def test_metrics_tell_the_episodes_that_ended_in_an_update(told):
    x, running_return, running_length = log(told), np.zeros(N), np.zeros(N)
    for u, (_, metrics) in enumerate(told[1:]):
        returns, lengths = [], []
        for k in range(u * T, (u + 1) * T):
            running_return, running_length = running_return + x.reward[k], running_length + 1
            ended = x.terminated[k] | x.truncated[k]
            returns += list(running_return[ended])
            lengths += list(running_length[ended])
            running_return, running_length = np.where(ended, 0, running_return), np.where(ended, 0, running_length)
        assert (metrics["num_episodes"], metrics["env_steps"]) == (len(returns), T * N)
        np.testing.assert_allclose(metrics["episode_return"], np.mean(returns), rtol=1e-5)
        np.testing.assert_allclose(metrics["episode_length"], np.mean(lengths), rtol=1e-6)


def test_a_batch_is_of_transitions_made_until_then_the_newest_among_them(told):
    notes, x = told[-1][0].learner.train_state.opt_state, log(told)
    made = [tuple(row) for row in np.concatenate([x.obs, x.action[..., None]], -1).reshape(-1, 3)]
    rounds = set()
    for call, number in enumerate(notes.number[: notes.count]):
        batch = jax.tree.map(lambda leaf, call=call: leaf[call], notes.batch)
        num_made = (number // G + 1) * N
        np.testing.assert_array_equal(batch.next_obs, batch.obs + [0, 1])
        np.testing.assert_allclose(batch.reward, batch.obs.sum(-1) + 0.5 * batch.action)
        rows = [tuple(row) for row in np.concatenate([batch.obs, batch.action[:, None]], -1)]
        assert set(rows) <= set(made[:num_made])
        rounds |= {number // G} if set(rows) & set(made[num_made - N : num_made]) else set()
    # Sixteen of a hundred transitions have one of the newest four every other time.
    assert len(rounds) > NUM_ROUNDS / 3


def test_every_gradient_step_has_a_batch_and_a_key_of_its_own(told):
    count, _, key, batch = told[-1][0].learner.train_state.opt_state
    assert len(np.unique(key[:count], axis=0)) == count
    assert len(np.unique(batch.obs[:count, :, 0], axis=0)) == count


# --- normalised observations ---


@pytest.fixture(scope="module")
def normalised():
    """Of arms whose action is what the policy sees of the observation's second entry, a third of it."""
    sees = Exploration(
        lambda key, obs: (),
        lambda before, fresh, starts: (),
        lambda params, noise, memory, obs: (memory, obs[:, 1:] / 3),
    )
    config = replace(CONFIG, normalize_obs=True, warmup_steps=1)
    return by_updates(with_notes(arms_env(REAL), TinyQNetwork("deterministic"), config, sees))


def test_observations_are_stored_raw_and_their_statistics_are_those_of_all_updates_before(normalised):
    x = log(normalised)
    assert x.obs.mean() > 3
    for u, (state, _) in enumerate(normalised[1:], 1):
        raw, moments = x.obs[: u * T].reshape(-1, 2), state.learner.obs_moments
        np.testing.assert_allclose(moments.mean, raw.mean(0), rtol=1e-5)
        np.testing.assert_allclose(moments.variance, raw.var(0), rtol=1e-4)
        assert moments.num_samples == u * T * N


def test_an_update_acts_and_learns_on_observations_normalised_by_the_statistics_at_its_start(normalised):
    x, notes = log(normalised), normalised[-1][0].learner.train_state.opt_state
    for u, (state, _) in enumerate(normalised[:-1]):
        see, now = lambda obs, m=state.learner.obs_moments: np.asarray(normalize.apply(m, obs)), slice(u * T, u * T + T)
        acted = np.s_[1 if u == 0 else 0 :]  # the first round's actions are random
        np.testing.assert_allclose(x.action[now][acted], see(x.obs[now])[acted][..., 1:] / 3, rtol=1e-5)
        for seen, raw in ((notes.batch.obs, x.obs), (notes.batch.next_obs, x.next_obs)):
            seen = seen[G * u * T : G * (u + 1) * T].reshape(-1, 1, 2)
            distance = np.abs(seen - see(raw).reshape(-1, 2)).max(-1).min(1)
            assert distance.max() < 1e-5


# --- exploration ---


def test_random_actions_are_uniform_over_their_space_and_normal_where_it_has_no_bounds():
    k = jax.random.split(jax.random.key(0), 3)
    action = random_action(k[0], arms_env(Discrete(3)), 9000)
    assert action.dtype == jnp.int32
    assert scipy.stats.chisquare(np.bincount(action, minlength=3)).pvalue > 0.01
    bounded = np.asarray(random_action(k[1], arms_env(REAL), 9000))
    assert bounded.shape == (9000, 1)
    assert scipy.stats.kstest(bounded[:, 0], scipy.stats.uniform(-1, 2).cdf).pvalue > 0.01
    unbounded = np.asarray(random_action(k[2], arms_env(UNBOUNDED), 9000))
    for i in range(2):
        assert scipy.stats.kstest(unbounded[:, i], scipy.stats.norm.cdf).pvalue > 0.01
    assert abs(np.corrcoef(unbounded.T)[0, 1]) < 0.04


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_an_episodes_noises_are_stationary_from_its_start_and_as_correlated_as_they_should_be(correlation):
    """At every step normal with deviation 1, and rho^k between steps k apart."""
    exploration = gaussian_noise(TinyQNetwork("deterministic"), arms_env(REAL), 0.3, correlation)
    obs, length = jnp.zeros((20_000, 2)), 8
    fresh = jax.vmap(exploration.noise, (0, None))(jax.random.split(jax.random.key(0), length), obs)
    noise, noises = 100.0 * jnp.ones_like(fresh[0]), []  # of an episode that has ended
    for t in range(length):
        noise = exploration.carry(noise, fresh[t], jnp.full(len(obs), t == 0))
        noises.append(np.asarray(noise)[:, 0])
    np.testing.assert_array_equal(noises[0], np.asarray(fresh[0])[:, 0])
    np.testing.assert_allclose(np.std(noises, axis=1), 1, atol=0.02)
    gap = np.abs(np.subtract.outer(np.arange(length), np.arange(length)))
    np.testing.assert_allclose(np.corrcoef(noises), np.power(correlation, gap), atol=0.04)


def test_noise_begins_anew_in_the_environments_whose_episode_does_and_in_no_others():
    """Where the correlation is 1, an episode has one noise and the next another, across updates."""
    network, env = TinyQNetwork("deterministic"), arms_env(REAL)

    def centred(params):
        return params | {"policy": jax.tree.map(jnp.zeros_like, params["policy"])}

    algorithm = with_notes(env, network, replace(CONFIG, warmup_steps=1), gaussian_noise(network, env, 0.2, 1.0))
    states = by_updates(algorithm, centred)
    x = log(states)
    action, ended = x.action[1:, :, 0], (x.terminated | x.truncated)[1:-1]
    goes_on = action[1:] == action[:-1]
    np.testing.assert_array_equal(goes_on, ~ended)
    assert abs(np.unique(action).std() - 0.2) < 0.08 and abs(action).max() < 1


def test_an_action_is_the_policys_and_noise_held_within_bounds_where_there_are_some():
    network, obs = TinyQNetwork("deterministic"), 5 + jax.random.normal(jax.random.key(1), (500, 2))
    params, noise = network.init(jax.random.key(0), obs), jax.random.normal(jax.random.key(2), (500, 1))
    mode = network.apply(params, obs)[0].mode()
    bounded = gaussian_noise(network, arms_env(REAL), 2.0, 0.0).act(params, noise, (), obs)[1]
    np.testing.assert_allclose(bounded, np.clip(mode + 2 * noise, -1, 1), rtol=1e-6)
    assert (abs(bounded) == 1).any() and (abs(bounded) < 1).any()
    unbounded = gaussian_noise(network, arms_env(UNBOUNDED), 2.0, 0.0).act(params, noise, (), obs)[1]
    np.testing.assert_allclose(unbounded, mode + 2 * noise, rtol=1e-6)
    assert (abs(unbounded) > 1).any()


@pytest.mark.parametrize("kind", ["categorical", "tanh_gaussian"])
def test_a_stochastic_policys_exploration_is_its_own_distribution(kind):
    network, obs = TinyQNetwork(kind), 5 + jax.random.normal(jax.random.key(1), (1, 2))
    params, obs = network.init(jax.random.key(0), obs), jnp.broadcast_to(obs, (4000, 2))
    exploration, distribution = own_samples(network), network.apply(params, obs)[0]
    noise = exploration.noise(jax.random.key(2), obs)
    nothing: Any = None
    assert exploration.carry(nothing, noise, nothing) is noise
    action = np.asarray(exploration.act(params, noise, (), obs)[1])
    if kind == "categorical":
        probability = float(jax.nn.softmax(distribution.logits[0])[1])
        assert scipy.stats.binomtest(int(action.sum()), 4000, probability).pvalue > 0.01
    else:
        normal: Any = scipy.stats.norm(distribution.mean[0, 0], np.exp(distribution.log_std[0, 0]))
        assert scipy.stats.kstest(np.arctanh(action[:, 0]), normal.cdf).pvalue > 0.01


# --- populations, and bad input ---


def test_in_a_population_what_depends_on_the_updates_number_is_a_branch_for_all_members():
    """To learn or to wait, and TD3's delay. A number with a batch axis would make a select of either, and both sides
    would be computed at every step."""
    algorithm = td3(arms_env(REAL), TinyQNetwork("deterministic"), TD3Config(num_envs=4, num_steps=3, batch_size=8))
    keys = jax.random.split(jax.random.key(0), 3)
    state = jax.eval_shape(jax.vmap(algorithm.init), keys)
    lanes = jax.vmap(algorithm.step, in_axes=(0, 0, None))
    branches = [e for e in equations(lanes, keys, state, 0) if e.primitive.name == "cond"]
    assert len(branches) == 2
    assert all(e.invars[0].aval.shape == () for e in branches)


def test_a_capacity_that_the_environments_do_not_divide_or_the_warm_up_exceeds_is_refused():
    def make(**config):
        return ddpg(arms_env(REAL), TinyQNetwork("deterministic"), DDPGConfig(**config))

    for capacity, num_envs, warmup_steps in ((1000, 3, 10), (999, 3, 1000)):
        message = f"capacity ({capacity}) must be a multiple of num_envs ({num_envs}), and at least warmup_steps "
        with pytest.raises(UsageError) as error:
            make(capacity=capacity, num_envs=num_envs, warmup_steps=warmup_steps)
        assert str(error.value) == message + f"({warmup_steps})"
    assert make(capacity=999, num_envs=3, warmup_steps=999)


@pytest.mark.parametrize(
    ("algorithm", "config", "space", "kind", "needs", "has"),
    [
        (ddpg, DDPGConfig(), REAL, "gaussian", "deterministic", "DiagGaussian"),
        (td3, TD3Config(), REAL, "tanh_gaussian", "deterministic", "TanhGaussian"),
        (sac, SACConfig(), REAL, "deterministic", "tanh_gaussian or gaussian", "Deterministic"),
        (sac, SACConfig(), Discrete(2), "categorical", "tanh_gaussian or gaussian", "Categorical"),
        (sac_discrete, DiscreteSACConfig(), REAL, "tanh_gaussian", "categorical", "TanhGaussian"),
    ],
)
def test_a_policy_of_a_kind_that_an_algorithm_has_no_use_for_is_refused(algorithm, config, space, kind, needs, has):
    message = f"{algorithm.__name__} needs a policy of kind {needs}; that of this network on toy is a {has}"
    with pytest.raises(UsageError) as error:
        algorithm(arms_env(space), TinyQNetwork(kind), config)
    assert str(error.value) == message


def test_a_network_without_a_q_is_refused_by_its_policy():
    network: Any = TinyNetwork(REAL)
    with pytest.raises(UsageError) as error:
        ddpg(arms_env(REAL), network, DDPGConfig())
    assert "that of this network on toy is a DiagGaussian" in str(error.value)
