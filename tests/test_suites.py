"""Other suites' environments: one contract for all, held by random play of two copies that differ in their time limit.

A suite that is not installed is not tested; `popgym` is purepg's own. CI installs craftax, playground and xminigrid.
"""

import bz2
import functools
import importlib
import importlib.metadata
import importlib.util
import pickle
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg import envs
from purepg.envs.contract import in_units, legal_actions
from purepg.envs.suites import SUITES
from purepg.experience.exploration import random_actor
from purepg.types import Box, Discrete, Env, TimeStep, UsageError, is_space

N, T, LIMIT = 4, 120, 50
# The cheapest environment of each kind of adapter: its package, and whether random play reaches a terminal state in T
# steps.
PLAYED = {
    "craftax/Craftax-Classic-Symbolic": ("craftax", False),
    "playground/CartpoleBalance": ("mujoco_playground", False),
    "brax/fast": ("brax", False),
    "brax/inverted_pendulum": ("brax", True),
    "xminigrid/MiniGrid-EmptyRandom-5x5": ("xminigrid", True),
    "octax/brix": ("octax", False),
    "popgym_arcade/NoisyCartPoleEasy": ("popgym_arcade", True),
    "popgym/ConcentrationEasy": ("purepg", False),
    "popgym/BattleshipEasy": ("purepg", False),
    "pgx/2048": ("pgx", False),
    "pgx/minatar-breakout": ("pgx", True),
    "jumanji/Snake": ("jumanji", False),
    "jumanji/Game2048": ("jumanji", False),
    "jumanji/Maze": ("jumanji", False),
}


pytestmark = pytest.mark.filterwarnings("default")  # suites warn of their own deprecated calls


class Played(NamedTuple):
    """N environments, driven by random legal actions for T steps and never reset; leaves are `[T, N, ...]`."""

    first: Any  # (state, observation) `[N, ...]`
    obs: Any  # before each step
    action: np.ndarray
    t: np.ndarray  # steps of the episode by our clock, after the step
    step: TimeStep


def need(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")


def rollout(env: Env, key: jax.Array, t: jax.Array) -> Any:
    """From time t by our clock."""
    k_reset, k_play = jax.random.split(key)
    state, obs = jax.vmap(env.reset)(jax.random.split(k_reset, N))
    state = state._replace(t=state.t + t)
    at_random = random_actor(env)

    def step(carry, key):
        state, obs = carry
        k_act, k_step = jax.random.split(key)
        _, action, _ = at_random(k_act, (), obs)
        units = in_units(env.action_space, action)
        state, time_step = jax.vmap(env.step)(jax.random.split(k_step, N), state, units)
        return (state, time_step.obs), (obs, action, state.t, time_step)

    return (state, obs), jax.lax.scan(step, (state, obs), jax.random.split(k_play, T))[1]


@functools.cache
def made(name: str, limit: int | None = None) -> Env:
    return envs.make(name, {} if limit is None else {"max_episode_steps": limit})


@functools.cache
def compiled(name: str) -> Any:
    return jax.jit(functools.partial(rollout, made(name)))


@functools.cache
def play(name: str, left: int | None = None) -> Played:
    """`left`: so many steps before the time limit; None: all of them."""
    limit = made(name).max_episode_steps
    assert limit
    t = 0 if left is None else limit - left
    first, played = jax.device_get(compiled(name)(jax.random.key(0), jnp.int32(t)))
    return Played(first, *played)


@pytest.fixture(params=PLAYED)
def name(request):
    need(PLAYED[request.param][0])
    return request.param


def test_observations_rewards_and_flags_are_as_declared(name):
    env, played = made(name), play(name)
    over = np.cumsum(played.step.terminated, axis=0) - played.step.terminated > 0  # past the end, physics may diverge

    def check(space, obs, step_obs):
        shape, dtype = (space.shape, space.dtype) if isinstance(space, Box) else (obs.shape[2:], obs.dtype)
        assert obs.shape == step_obs.shape == (T, N, *shape)
        assert obs.dtype == step_obs.dtype == dtype
        if isinstance(space, Box):
            assert np.all(step_obs[~over] >= space.low) and np.all(step_obs[~over] <= space.high)

    jax.tree.map(check, env.observation_space, played.obs, played.step.obs, is_leaf=is_space)
    assert played.step.reward.dtype == np.float32 and np.isfinite(played.step.reward[~over]).all()
    assert played.step.terminated.dtype == played.step.truncated.dtype == bool
    assert set(played.step.info or {}) == set(env.metrics)
    assert all(np.isfinite(x[~over]).all() for x in jax.tree.leaves(played.step.info))


def test_our_clock_truncates_from_its_step_on_and_changes_nothing_else(name):
    """In particular it resets nothing: past the limit, the episode goes on as in the copy without that limit."""
    short, long, limit = play(name, LIMIT), play(name), made(name).max_episode_steps
    assert limit
    time = np.broadcast_to(np.arange(1, T + 1)[:, None], (T, N))
    np.testing.assert_array_equal(short.step.truncated, time >= LIMIT)
    np.testing.assert_array_equal(short.t, time + limit - LIMIT)
    np.testing.assert_array_equal(long.t, time)
    assert not (long.step.truncated[: LIMIT + 10]).any()
    np.testing.assert_array_equal(short.step.reward, long.step.reward)
    np.testing.assert_array_equal(short.step.terminated, long.step.terminated)
    jax.tree.map(np.testing.assert_array_equal, short.step.obs, long.step.obs)


@pytest.mark.parametrize("name", [name for name, (_, terminates) in PLAYED.items() if terminates])
def test_random_play_that_reaches_a_terminal_state_is_not_truncated_there(name):
    need(PLAYED[name][0])
    step = play(name, LIMIT).step
    assert (step.terminated & ~step.truncated).any()


def dead_in_craftax(state):
    inner, episode_return = state.inner
    return state._replace(inner=(inner.replace(player_health=jnp.int32(0)), episode_return)), jnp.int32(0)


def diverged(state):
    inner, sums, t = state.inner
    data = inner.data.replace(qvel=inner.data.qvel * jnp.nan)
    return state._replace(inner=(inner.replace(data=data), sums, t)), jnp.zeros(1)


def walled_in(state):
    return state._replace(inner=state.inner.replace(walls=jnp.ones_like(state.inner.walls))), jnp.int32(0)


def brix_out_of_lives(state):
    lost = state.inner.V.at[14].set(4)  # the register that counts lives lost
    return state._replace(inner=state.inner.replace(V=lost)), jnp.int32(0)


# Powers of 2 that can be moved to the right alone; then nothing can be, whichever tile fills the gap.
LAST_MOVE = np.array([[3, 4, 3, 4], [4, 3, 4, 3], [3, 4, 3, 4], [5, 6, 7, 0]])


def stuck_in_pgx(state):
    board = jnp.asarray(LAST_MOVE, state.inner._board.dtype).reshape(state.inner._board.shape)
    return state._replace(inner=state.inner.replace(_board=board)), jnp.int32(2)


def stuck_in_jumanji(state):
    board = jnp.asarray(LAST_MOVE, state.inner.board.dtype)
    inner = state.inner.replace(board=board, action_mask=jnp.ones(4, bool))
    return state._replace(inner=inner), jnp.int32(1)


def snake_at_a_wall(state):
    return state._replace(inner=state.inner.replace(action_mask=jnp.zeros(4, bool))), jnp.int32(0)


DOOMED = {
    "craftax/Craftax-Classic-Symbolic": dead_in_craftax,
    "playground/CartpoleBalance": diverged,
    "jumanji/Maze": walled_in,
    "jumanji/Game2048": stuck_in_jumanji,
    "jumanji/Snake": snake_at_a_wall,
    "octax/brix": brix_out_of_lives,
    "pgx/2048": stuck_in_pgx,
}


class Single:
    """The compiled reset and step of one environment, with the time limit LIMIT, and how often the step was traced."""

    def __init__(self, name: str) -> None:
        env = made(name, LIMIT)
        self.num_traces = 0

        def step(key, state, action):
            self.num_traces += 1
            return env.step(key, state, in_units(env.action_space, action))

        self.reset, self.step = jax.jit(env.reset), jax.jit(step)


single = functools.cache(Single)


@pytest.mark.parametrize("name", DOOMED)
def test_a_step_into_a_terminal_state_terminates_and_is_truncated_too_only_at_the_limit(name):
    need(PLAYED[name][0])
    state, _ = jax.tree.map(lambda x: jnp.asarray(x[0]), play(name).first)
    doomed, action = DOOMED[name](state)
    _, early = single(name).step(jax.random.key(0), doomed, action)
    _, late = single(name).step(jax.random.key(0), doomed._replace(t=jnp.int32(LIMIT - 1)), action)
    assert (bool(early.terminated), bool(early.truncated)) == (True, False)
    assert (bool(late.terminated), bool(late.truncated)) == (True, True)


# Suites that count an episode's steps themselves: a state with this count.
CLOCKS = {
    "craftax/Craftax-Classic-Symbolic": lambda inner, t: (inner[0].replace(timestep=t), inner[1]),
    "popgym_arcade/NoisyCartPoleEasy": lambda inner, t: inner.replace(time=t),
    "jumanji/Snake": lambda inner, t: inner.replace(step_count=t),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_the_suites_own_time_limit_ends_no_episode(name):
    need(PLAYED[name][0])
    state, obs = jax.tree.map(lambda x: jnp.asarray(x[:1]), play(name).first)
    _, action, _ = random_actor(made(name))(jax.random.key(0), (), obs)
    state, action = jax.tree.map(lambda x: x[0], (state, action))
    limit = made(name).max_episode_steps  # by default that of the suite
    assert limit
    for t in (0, limit - 1, limit, limit + 1):
        later = state._replace(inner=CLOCKS[name](state.inner, jnp.int32(t)))
        assert not single(name).step(jax.random.key(0), later, action)[1].terminated, t


def test_auto_encode_has_the_action_that_answers_and_can_be_solved():
    need("popgym_arcade")
    env = made("popgym_arcade/AutoEncodeEasy")
    assert env.action_space == Discrete(5)
    change, answer = jnp.int32(3), jnp.int32(4)

    def step(state, key):
        game = state.inner
        right = (game.timestep >= len(game.cards)) & (game.default_action == jnp.flip(game.cards)[game.count])
        state, time_step = env.step(key, state, jnp.where(right, answer, change))
        return state, (time_step.reward, time_step.terminated)

    state, _ = env.reset(jax.random.key(0))
    play = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    _, (reward, terminated) = play(state, jax.random.split(jax.random.key(1), 200))
    assert terminated.any() and reward[: jnp.argmax(terminated) + 1].sum() >= 1


def test_the_same_key_gives_the_same_trajectory_and_vmap_that_of_a_loop(name):
    """One environment stepped alone goes where it went among N, to rounding; its step is traced once. With a time limit
    of its own it goes there too, and is truncated at that."""
    env, played = single(name), play(name)
    k_reset, k_play = jax.random.split(jax.random.key(0))
    state, obs = env.reset(jax.random.split(k_reset, N)[0])
    keys = jax.random.split(k_play, T)
    for t in range(5):
        jax.tree.map(lambda x, y, t=t: close(x, y[t, 0]), obs, played.obs)
        k_step = jax.random.split(jax.random.split(keys[t])[1], N)[0]
        state, time_step = env.step(k_step, state, jnp.asarray(played.action[t, 0]))
        obs = time_step.obs
        close(time_step.reward, played.step.reward[t, 0])
    action = jnp.asarray(played.action[0, 0])
    truncated = [env.step(k_play, state._replace(t=jnp.int32(t)), action)[1].truncated for t in (LIMIT - 2, LIMIT - 1)]
    assert truncated == [False, True]
    assert env.num_traces == 1


def close(x, y):
    np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), atol=1e-3)


def test_random_play_takes_legal_actions_only(name):
    env, played = made(name), play(name)
    mask = legal_actions(env.observation_space, played.obs)
    if mask is not None:
        assert np.take_along_axis(np.asarray(mask), played.action[..., None], -1).all()
        assert not np.asarray(mask).all(), "some actions must have been illegal"


# --- names and parameters ---

REGISTRIES = {
    "playground": ("mujoco_playground", lambda: importlib.import_module("mujoco_playground").dm_control_suite.ALL_ENVS),
    "brax": ("brax", lambda: importlib.import_module("brax.envs")._envs.keys() - {"swimmer"}),
    "xminigrid": ("xminigrid", lambda: importlib.import_module("xminigrid").registered_environments()),
    "popgym_arcade": (
        "popgym_arcade",
        lambda: importlib.import_module("popgym_arcade.registration").REGISTERED_ENVIRONMENTS,
    ),
}


@pytest.mark.parametrize("suite", REGISTRIES)
def test_the_listed_names_are_those_that_the_suite_has_registered(suite):
    package, registered = REGISTRIES[suite]
    need(package)
    assert sorted(SUITES[suite].names) == sorted(registered())


def test_a_suite_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    extras = importlib.metadata.metadata("purepg").get_all("Provides-Extra") or []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for suite, entry in SUITES.items():
        if suite == "popgym":  # which is purepg's own
            continue
        with pytest.raises(UsageError) as error:
            envs.make(f"{suite}/{next(iter(entry.names), 'CartPole-v1')}")
        named = re.search(r'pip install -e "\.\[(.+?)\]"', str(error.value))
        assert named and named[1] in extras, "pip must know the extra by the very name"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dm_pix" else name)
    with pytest.raises(UsageError, match=r'needs dm_pix, not installed here: pip install -e "\.\[popgym-arcade\]"'):
        envs.make("popgym_arcade/CartPoleEasy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("craftax/Craftax-Classic", "did you mean craftax/Craftax-Classic-"),
        ("CheetahRunn", "did you mean playground/CheetahRun"),
        ("snake", "did you mean jumanji/Snake"),
        ("atari/Pong", "unknown environment 'atari/Pong'; did you mean"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones_of_all_suites(name, message):
    with pytest.raises(UsageError) as error:
        envs.make(name)
    assert message in str(error.value)


def test_a_bare_name_is_looked_up_in_every_suite():
    need("xminigrid")
    assert envs.make("MiniGrid-Empty-5x5").name == "MiniGrid-Empty-5x5"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("craftax/Craftax-Classic-Symbolic", {"day": 3}, "has no parameter 'day'; it has day_length"),
        ("craftax/Craftax-Classic-Symbolic", {"day_length": 0.5}, r"day_length \(0.5\) must be of type int"),
        ("craftax/Craftax-Classic-Symbolic", {"max_episode_steps": 0}, "must be a positive whole number"),
        ("playground/CartpoleBalance", {"gravity": 3}, "has no parameter 'gravity'; it has ctrl_dt, impl"),
        ("playground/Go1JoystickFlatTerrain", {}, "reads robots' models from .* which does not exist"),
        ("playground/CartpoleJuggle", {}, "playground has no task 'CartpoleJuggle'"),
        ("xminigrid/XLand-MiniGrid-R1-9x9", {}, "set benchmark to one of trivial-"),
        ("xminigrid/XLand-MiniGrid-R1-9x9", {"benchmark": "high-3m"}, "download it first"),
        ("xminigrid/MiniGrid-Empty-5x5", {"benchmark": "high-3m"}, "takes no benchmark"),
        ("xminigrid/MiniGrid-Empty-5x5", {"observation": "rgb"}, "must be one_hot or ids"),
    ],
)
def test_what_a_suite_cannot_do_is_refused_in_one_line(name, params, message):
    suite = name.split("/")[0]
    need("mujoco_playground" if suite == "playground" else suite)
    with pytest.raises(UsageError, match=message):
        envs.make(name, params)


def test_an_xland_episode_draws_its_goal_and_rules_from_the_benchmark(monkeypatch, tmp_path):
    need("xminigrid")
    benchmarks = importlib.import_module("xminigrid").benchmarks
    rules, num = np.zeros((2, 1, 7), np.uint8), np.zeros(2, np.uint8)
    goals = np.array([[1, 3, 1, 0, 0], [1, 4, 2, 0, 0]], np.uint8)  # hold a red ball; hold a green square
    tiles = np.array([[[3, 1]], [[4, 2]]], np.uint8)
    content = {"goals": goals, "rules": rules, "init_tiles": tiles, "num_rules": num}
    (tmp_path / "trivial_21k").write_bytes(bz2.compress(pickle.dumps({k: jnp.asarray(v) for k, v in content.items()})))
    monkeypatch.setattr(benchmarks, "DATA_PATH", str(tmp_path))
    env = envs.make("XLand-MiniGrid-R1-9x9", {"benchmark": "trivial-21k"})
    state, _ = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.key(0), 32))
    drawn = {tuple(goal) for goal in np.asarray(state.inner.state.goal_encoding)}
    assert drawn == {tuple(goal) for goal in goals}


def test_a_minigrid_observation_is_the_same_cells_as_identifiers_and_one_hot():
    need("xminigrid")
    found = {}
    for kind in ("one_hot", "ids"):
        env = envs.make("MiniGrid-DoorKey-5x5", {"observation": kind})
        _, found[kind] = jax.jit(env.reset)(jax.random.key(3))
    tile, colour = np.split(np.asarray(found["one_hot"]), [13], axis=-1)
    cells = np.stack([tile.argmax(-1), colour.argmax(-1)], -1)
    assert (tile.sum(-1) == 1).all() and (colour.sum(-1) == 1).all()
    np.testing.assert_array_equal(cells.reshape(-1), found["ids"])


def test_craftax_scores_an_episode_by_its_return_and_counts_what_it_unlocked():
    need("craftax")
    name = "craftax/Craftax-Classic-Symbolic"
    played, env = play(name), made(name)
    info = played.step.info
    np.testing.assert_allclose(info["score"], 100 * np.cumsum(played.step.reward, 0) / 22, rtol=1e-4, atol=1e-4)
    unlocked = np.stack([info[metric] for metric in env.metrics[:-2]])
    np.testing.assert_array_equal(info["num_achievements"], unlocked.sum(0))
    assert (np.diff(unlocked, axis=1) >= 0).all() and info["num_achievements"].max() > 0
