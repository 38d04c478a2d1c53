"""The gymnax adapter: its contract for every environment, Gymnasium as the oracle of the classic ones, its messages."""

import functools
import gzip
import struct
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import purepg.envs
from purepg.envs.contract import in_units
from purepg.envs.gymnax import MNIST_FILES, gymnax_env
from purepg.envs.lqr import LQRS
from purepg.envs.named_mdps import MDPS
from purepg.envs.named_pomdps import POMDPS
from purepg.envs.named_tasks import TASKS
from purepg.types import Box, Discrete, Env, TimeStep, UsageError

# isort: split
# gymnax's import starts a JAX backend, before which purepg has to have set XLA's flags.
import flax.struct
import gymnasium
import gymnax
from gymnax.environments import environment, spaces
from gymnax.utils import load_mnist

NAMES = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]  # that one needs data
MINATAR = ("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "Seaquest-MinAtar", "SpaceInvaders-MinAtar")
CLOCK_ONLY = (
    "Pendulum-v1",
    "Freeway-MinAtar",
    "DiscountingChain-bsuite",
    "PointRobot-misc",
    "BernoulliBandit-misc",
    "GaussianBandit-misc",
    "Reacher-misc",
    "Swimmer-misc",
)
# gymnax observes values outside what these declare.
LOOSE_BOUNDS = {
    "MemoryChain-bsuite": "the context is -1 or 1, its bound 0",
    "MetaMaze-misc": "the last reward is 10, its bound 1",
    "GaussianBandit-misc": "the last reward and the scaled time go below 0, their bound",
}
T, N, LIMIT = 20, 4, 12

make = functools.cache(purepg.envs.make)
gymnax_make = functools.cache(gymnax.make)


class Played(NamedTuple):
    """N environments driven by random actions for T steps, right through their ends; leaves are `[T, N, ...]`."""

    start_obs: np.ndarray  # [N, ...]
    time: np.ndarray
    time_step: TimeStep
    gymnax_time_step: TimeStep  # what gymnax's own auto-resetting `step` says of the same transition


def types(tree: Any) -> list[tuple]:
    return [(leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]


def random_action(key: jax.Array, env: Env) -> jax.Array:
    """Of a Box half as far again as [-1, 1], so that some are clipped."""
    space = env.action_space
    if isinstance(space, Discrete):
        return jax.random.randint(key, (), 0, space.n)
    assert isinstance(space, Box)
    return jax.random.uniform(key, space.shape, minval=-1.5, maxval=1.5)


def gymnax_action(action: jax.Array, space: Any) -> jax.Array:
    if isinstance(space, spaces.Discrete):
        return action
    return space.low + (jnp.clip(action, -1.0, 1.0) + 1.0) / 2.0 * (space.high - space.low)


@functools.cache
def play(name: str) -> Played:
    """One compiled program per environment; the episodes' limit is LIMIT steps."""
    env = gymnax_env(name, {"max_steps_in_episode": LIMIT})
    theirs, params = gymnax_make(name)
    params = params.replace(max_steps_in_episode=LIMIT)

    def step(state: Any, key: jax.Array) -> tuple[Any, Any]:
        k_action, k_step = jax.random.split(key)
        action = random_action(k_action, env)
        k_step_env, _ = jax.random.split(k_step)  # as gymnax's step splits it
        next_state, time_step = env.step(k_step_env, state, in_units(env.action_space, action))
        _, _, reward, terminated, truncated, info = theirs.step(
            k_step, state, gymnax_action(action, theirs.action_space(params)), params
        )
        gymnax_time_step = TimeStep(info["final_observation"], reward, terminated, truncated)
        return next_state, (next_state.time, time_step, gymnax_time_step)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiling is all of the time
    def run(key: jax.Array) -> Any:
        k_reset, k_steps = jax.random.split(key)
        state, obs = jax.vmap(env.reset)(jax.random.split(k_reset, N))
        return obs, jax.lax.scan(jax.vmap(step), state, jax.random.split(k_steps, (T, N)))[1]

    start_obs, played = jax.device_get(run(jax.random.key(0)))
    return Played(start_obs, *played)


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_steps_under_vmap_and_scan_and_keeps_its_declared_types(name):
    played, (theirs, params) = play(name), gymnax_make(name)
    declared = theirs.observation_space(params)
    obs, reward, terminated, truncated, _ = played.time_step
    assert (played.start_obs.shape, obs.shape) == ((N, *declared.shape), (T, N, *declared.shape))
    assert played.start_obs.dtype == obs.dtype == (bool if name in MINATAR else declared.dtype)
    assert (reward.shape, reward.dtype) == ((T, N), np.float32)
    assert (terminated.shape, terminated.dtype) == (truncated.shape, truncated.dtype) == ((T, N), bool)
    assert np.isfinite(obs).all() and np.isfinite(reward).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_state_has_exactly_the_types_of_a_stepped_one(name):
    env, key = make(name), jax.random.key(0)
    state, obs = jax.eval_shape(env.reset, key)
    next_state, time_step = jax.eval_shape(env.step, key, state, jax.eval_shape(lambda: random_action(key, env)))
    assert jax.tree.structure(state) == jax.tree.structure(next_state)
    assert types((state, obs)) == types((next_state, time_step.obs))
    assert not any(weak for *_, weak in types((state, obs, time_step)))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_gymnaxs_own_step_before_its_reset(name):
    played = play(name)
    ours, theirs = played.time_step, played.gymnax_time_step
    np.testing.assert_allclose(ours.obs.astype(float), theirs.obs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(ours.reward, theirs.reward, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(ours.terminated, theirs.terminated)
    np.testing.assert_array_equal(ours.truncated, theirs.truncated)


@pytest.mark.parametrize("name", NAMES)
def test_no_environment_resets_itself_and_each_truncates_exactly_at_its_limit(name):
    played = play(name)
    elapsed = np.broadcast_to(np.arange(1, T + 1)[:, None], (T, N))
    np.testing.assert_array_equal(played.time, elapsed)  # a reset would have set the clock back
    np.testing.assert_array_equal(played.time_step.truncated, elapsed >= LIMIT)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOSE_BOUNDS])
def test_observations_lie_within_the_declared_bounds_until_the_episode_ends(name):
    env, played = make(name), play(name)
    ended = played.time_step.terminated | played.time_step.truncated
    alive = np.cumsum(ended, axis=0) - ended == 0  # up to the first end, that step included
    obs = np.concatenate([played.start_obs, played.time_step.obs[alive]])
    space = env.observation_space
    low, high = (0, space.n - 1) if isinstance(space, Discrete) else (space.low, space.high)
    rounding = 0 if obs.dtype in (bool, np.int32) else 1e-6
    assert (obs >= low - rounding).all() and (obs <= high + rounding).all()


@pytest.mark.parametrize("name", CLOCK_ONLY)
def test_what_only_the_clock_ends_never_terminates(name):
    assert not play(name).time_step.terminated.any()


@pytest.mark.parametrize("name", NAMES)
def test_the_spaces_are_gymnaxs(name):
    env, (theirs, params) = make(name), gymnax_make(name)
    observed, acted = theirs.observation_space(params), theirs.action_space(params)
    if isinstance(env.observation_space, Discrete):
        assert env.observation_space.n == observed.n
    else:
        assert env.observation_space.shape == observed.shape
        assert env.observation_space.dtype == (bool if name in MINATAR else observed.dtype)
        assert env.observation_space.low.dtype == env.observation_space.high.dtype == env.observation_space.dtype
    if isinstance(env.action_space, Discrete):
        assert env.action_space.n == acted.n
    else:
        assert isinstance(env.action_space, Box)
        np.testing.assert_array_equal(env.action_space.low, np.broadcast_to(acted.low, acted.shape))
        np.testing.assert_array_equal(env.action_space.high, np.broadcast_to(acted.high, acted.shape))
    assert (env.name, env.max_episode_steps) == (name, params.max_steps_in_episode)


def test_deep_sea_ends_terminated_and_truncated_at_once():
    env = gymnax_env("DeepSea-bsuite", size=5)
    start, _ = env.reset(jax.random.key(0))
    _, time_step = jax.lax.scan(functools.partial(env.step, jax.random.key(1)), start, jnp.ones(5, int))
    np.testing.assert_array_equal(time_step.terminated, [False] * 4 + [True])
    np.testing.assert_array_equal(time_step.truncated, [False] * 4 + [True])


# Gymnasium's own environments as the oracle. The columns are Gymnasium's state variables in its order, with the range
# from which the states are drawn; none of these states has ended already.
CLASSIC = {
    "CartPole-v1": {"x": (-2.4, 2.4), "x_dot": (-3, 3), "theta": (-0.209, 0.209), "theta_dot": (-3, 3)},
    "Acrobot-v1": {"joint_angle1": (-3, 3), "joint_angle2": (-3, 3), "velocity_1": (-9, 9), "velocity_2": (-12, 12)},
    "MountainCar-v0": {"position": (-1.2, 0.499), "velocity": (-0.07, 0.07)},
    "MountainCarContinuous-v0": {"position": (-1.2, 0.449), "velocity": (-0.07, 0.07)},
    "Pendulum-v1": {"theta": (-9, 9), "theta_dot": (-8, 8)},
}


def gymnasium_steps(name: str, states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, ...]:
    """(obs, reward, terminated) of one step from each state."""
    env: Any = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    steps = []
    for state, action in zip(states, actions, strict=True):
        env.state = tuple(map(float, state))
        env.steps_beyond_terminated = None  # CartPole's memory of having ended
        steps.append(env.step(action)[:3])
    return tuple(map(np.array, zip(*steps, strict=True)))


@pytest.mark.parametrize("name", CLASSIC)
def test_a_step_from_anywhere_is_gymnasiums(name):
    rng, num = np.random.default_rng(0), 1000
    states = np.stack([rng.uniform(low, high, num) for low, high in CLASSIC[name].values()], axis=1).astype(np.float32)
    env = make(name)
    keys = jax.random.split(jax.random.key(0), num)
    actions = jax.device_get(jax.vmap(random_action, (0, None))(keys, env))

    @jax.jit
    def one_step(keys: jax.Array, states: jax.Array, actions: jax.Array) -> TimeStep:
        start, _ = jax.vmap(env.reset)(keys)
        start = start.replace(**dict(zip(CLASSIC[name], states.T, strict=True)))
        return jax.vmap(env.step)(keys, start, in_units(env.action_space, actions))[1]

    obs, reward, terminated, truncated, _ = jax.device_get(one_step(keys, states, actions))
    scale = {"Pendulum-v1": 2.0}.get(name, 1)  # canonical 1 is its full torque, 2
    theirs = np.clip(actions, -1, 1) * scale if isinstance(env.action_space, Box) else actions
    expected_obs, expected_reward, expected_terminated = gymnasium_steps(name, states, theirs)

    if name == "MountainCarContinuous-v0":
        # gymnax 1.0.1 keeps the velocity at the left wall, where Gymnasium stops the car: only that is passed over.
        at_wall = expected_obs[:, 0] == np.float32(-1.2)
        assert 0 < at_wall.mean() < 0.1
        expected_obs[at_wall, 1] = obs[at_wall, 1]
    np.testing.assert_allclose(obs, expected_obs, atol=1e-4)
    np.testing.assert_allclose(reward, expected_reward, atol=1e-4)
    np.testing.assert_array_equal(terminated, expected_terminated)
    assert terminated.any() == (name != "Pendulum-v1")
    assert not truncated.any()


@pytest.mark.parametrize("name", CLASSIC)
def test_the_time_limit_is_gymnasiums(name):
    env = make(name)
    limit = gymnasium.spec(name).max_episode_steps
    assert env.max_episode_steps == limit

    theirs: Any = gymnasium.make(name, disable_env_checker=True)
    theirs.reset(seed=0)
    start, truncated, expected = tuple(theirs.unwrapped.state), False, 0
    while not truncated:
        truncated = theirs.step(theirs.action_space.sample())[3]
        theirs.unwrapped.state, expected = start, expected + 1  # held where it began, so that only the clock ends it

    @jax.jit
    def flags(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, _ = env.reset(key)

        def step(time: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
            state, time_step = env.step(key, start.replace(time=time), random_action(key, env))
            return state.time, (time_step.terminated, time_step.truncated)

        return jax.lax.scan(step, start.time, jax.random.split(key, expected + 3))[1]

    terminated, truncated = jax.device_get(flags(jax.random.key(0)))
    assert not terminated.any()
    assert truncated.argmax() + 1 == expected == limit
    assert truncated[expected - 1 :].all()


@pytest.mark.parametrize(("map_name", "spec"), [("4x4", "FrozenLake-v1"), ("8x8", "FrozenLake8x8-v1")])
def test_frozen_lake_has_gymnasiums_transition_probabilities_and_time_limit(map_name, spec):
    env = gymnax_env("FrozenLake-misc", map_name=map_name)
    assert env.max_episode_steps == gymnasium.spec(spec).max_episode_steps
    theirs: Any = gymnasium.make(spec).unwrapped
    table, samples = theirs.P, 1000
    num = len(table)
    alive = [s for s in range(num) if len(table[s][0]) > 1]  # holes and the goal have one certain transition

    @jax.jit
    def frequencies(key: jax.Array) -> tuple[jax.Array, TimeStep]:
        """`[states, actions, next]`, and every step that was taken."""
        start, _ = env.reset(key)

        def sample(position: jax.Array, action: jax.Array, key: jax.Array) -> TimeStep:
            return env.step(key, start.replace(position=position), action)[1]

        steps = jax.vmap(sample, (None, None, 0))
        steps = jax.vmap(jax.vmap(steps, (None, 0, None)), (0, None, None))
        time_steps = steps(jnp.array(alive), jnp.arange(4), jax.random.split(key, samples))
        return jax.nn.one_hot(time_steps.obs, num).mean(axis=2), time_steps

    frequency, time_steps = jax.device_get(frequencies(jax.random.key(0)))
    probability = np.zeros_like(frequency)
    reward, terminated = np.zeros(num), np.zeros(num, bool)  # both are the tile's that was reached
    for i, s in enumerate(alive):
        for a in range(4):
            for p, reached, r, end in table[s][a]:
                probability[i, a, reached] += p
                reward[reached], terminated[reached] = r, end
    deviation = np.sqrt(probability * (1 - probability) / samples)
    np.testing.assert_array_less(np.abs(frequency - probability), 5 * deviation + 1e-6)
    np.testing.assert_array_equal(time_steps.reward, reward[time_steps.obs])
    np.testing.assert_array_equal(time_steps.terminated, terminated[time_steps.obs])


class Echo(environment.Environment):
    """An environment of a user's own, whose observation is the action that reached it.

    Its state holds a key, and a count that a reset gives as an int and a step as a float.
    """

    def __init__(self, low: Any, high: Any, reward_shape: tuple[int, ...] = (), dtype: Any = jnp.float32):
        self.space = spaces.Box(low, high, (3,), dtype)
        self.reward_shape = reward_shape

    @property
    def default_params(self) -> Any:
        return EchoParams()

    def reset_env(self, key, params):
        return jnp.zeros(3), {"key": key, "count": 0}

    def step_env(self, key, state, action, params):
        state = {"key": jax.random.fold_in(state["key"], 1), "count": state["count"] + params.gain}
        return action, state, jnp.zeros(self.reward_shape), jnp.array(False), {}

    def is_truncated(self, state, params):
        return jnp.array(False)

    def action_space(self, params) -> Any:
        return self.space

    def observation_space(self, params) -> Any:
        return spaces.Box(-jnp.inf, jnp.inf, (3,))


@flax.struct.dataclass
class EchoParams:
    gain: float = 1.0


def echo(env: Env, action: Any) -> np.ndarray:
    state, _ = env.reset(jax.random.key(0))
    return np.asarray(env.step(jax.random.key(0), state, in_units(env.action_space, jnp.array(action)))[1].obs)


def test_the_core_clips_a_canonical_action_and_scales_it_to_its_bounds():
    env = gymnax_env(Echo(low=np.array([-1.0, 0.0, -3.0]), high=np.array([1.0, 10.0, 5.0])))
    assert isinstance(env.action_space, Box)
    np.testing.assert_array_equal(env.action_space.low, [-1, 0, -3])
    np.testing.assert_array_equal(env.action_space.high, [1, 10, 5])
    for action, expected in {-7: [-1, 0, -3], -1: [-1, 0, -3], 0: [0, 5, 1], 0.5: [0.5, 7.5, 3], 1: [1, 10, 5]}.items():
        np.testing.assert_allclose(echo(env, [action] * 3), expected)
    np.testing.assert_allclose(echo(env, [9.0, -9.0, 0.25]), [1, 0, 2])


def test_scalar_bounds_count_for_every_element():
    np.testing.assert_allclose(echo(gymnax_env(Echo(low=-2, high=4.0)), [-1.0, 0.0, 1.0]), [-2, 1, 4])


@pytest.mark.parametrize("high", [np.inf, np.finfo(np.float32).max, np.array([1.0, 1.0, np.inf])])
def test_an_action_is_in_its_own_units_where_a_bound_is_missing_and_clipped_to_those_there_are(high):
    env = gymnax_env(Echo(low=-2.0, high=high))
    assert isinstance(env.action_space, Box) and env.action_space.high[2] == np.inf
    np.testing.assert_array_equal(echo(env, [-30.0, 0.5, 30.0]), [-2, 0.5, 30])
    np.testing.assert_array_equal(echo(gymnax_env(Echo(-np.inf, high=np.inf)), [-30.0, 0.5, 30.0]), [-30, 0.5, 30])


def test_bounds_of_the_largest_float_mean_unbounded():
    space = gymnax_env("CartPole-v1").observation_space
    assert isinstance(space, Box)
    np.testing.assert_allclose(space.high, [4.8, np.inf, 24 * np.pi / 180, np.inf], rtol=1e-6)
    np.testing.assert_array_equal(space.low, -space.high)


def test_an_environment_of_the_users_own_needs_no_time_limit_and_no_array_for_its_state():
    params: Any = EchoParams(gain=0.5)
    env = gymnax_env(Echo(-1.0, 1.0), params)
    assert (env.max_episode_steps, env.name) == (None, "Echo")
    start, _ = env.reset(jax.random.key(0))
    end, _ = jax.lax.scan(functools.partial(env.step, jax.random.key(1)), start, jnp.zeros((3, 3)))
    assert types(start) == types(end)
    assert end["count"] == 1.5


def test_params_are_a_whole_or_the_fields_that_differ():
    whole = gymnax_env("CartPole-v1", gymnax.make("CartPole-v1")[1].replace(max_steps_in_episode=7))
    differing = gymnax_env("CartPole-v1", {"max_steps_in_episode": np.int32(7)})
    own = gymnax_env(gymnax.make("CartPole-v1")[0], {"max_steps_in_episode": 7})
    assert whole.max_episode_steps == differing.max_episode_steps == own.max_episode_steps == 7
    assert gymnax_env("CartPole-v1").max_episode_steps == 500


OURS = (*MDPS, *POMDPS, *LQRS, *TASKS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CartPol-v1", "did you mean CartPole-v1?"),
        ("cartpole-V1", "did you mean CartPole-v1?"),
        ("clif", "did you mean cliff?"),
        ("catch", "did you mean Catch-bsuite?"),
        ("MinAtar/Breakout-v1", "did you mean pgx/minatar-breakout or Breakout-MinAtar"),
        ("MountainCar", "did you mean MountainCar-v0 or MountainCarContinuous-v0?"),
        ("adition", "did you mean addition?"),
        ("HalfCheetah-v5", "did you mean brax/halfcheetah? (Gymnasium's is gym/HalfCheetah-v5)"),
        ("Zaxxon", f"the known ones are {', '.join((*gymnax.registered_envs, *OURS))}, and those of"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones_or_with_all(name, hint):
    with pytest.raises(UsageError) as error:
        purepg.envs.make(name)
    assert str(error.value).startswith(f"unknown environment {name!r}; {hint}")


def test_the_name_of_a_suite_alone_is_answered_with_one_of_its_environments():
    for suite, one in (("brax", "ant"), ("gym", "CartPole-v1")):
        with pytest.raises(UsageError, match=f"{suite} is a suite: name one of its environments, as in {suite}/{one}"):
            purepg.envs.make(suite)


def test_an_unknown_parameter_is_answered_with_the_known_ones():
    with pytest.raises(
        UsageError, match=r"MountainCar-v0 has no parameter 'gravty'; it has .*force, gravity.*"
    ) as error:
        gymnax_env("MountainCar-v0", {"gravty": 1.0, "force": 1.0})
    assert "observed" not in str(error.value)  # which only `make` takes


def test_constructor_arguments_beside_an_environment_are_refused():
    with pytest.raises(UsageError, match="need a name"):
        gymnax_env(Echo(-1.0, 1.0), size=3)


def test_spaces_and_shapes_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="Echo: its action space must be Discrete or a Box of floats"):
        gymnax_env(Echo(-1, 1, dtype=jnp.int32))
    with pytest.raises(UsageError, match=r"Echo: its step's reward must have shape \(\), but has \(1,\)"):
        gymnax_env(Echo(-1.0, 1.0, reward_shape=(1,)))

    class TwoActions(Echo):
        def action_space(self, params):
            return spaces.Tuple([spaces.Discrete(2), spaces.Discrete(2)])

    with pytest.raises(UsageError, match="TwoActions: its action space must be Discrete or a Box of floats"):
        gymnax_env(TwoActions(-1.0, 1.0))

    class DictObserved(Echo):
        def observation_space(self, params):
            return spaces.Dict({"position": spaces.Discrete(2)})

    with pytest.raises(UsageError, match=r"DictObserved: its observation space must be .*a Box, but is a Dict"):
        gymnax_env(DictObserved(-1.0, 1.0))


def write_mnist(directory) -> None:
    """Six white images of each kind, labelled 3."""
    for file in MNIST_FILES:
        header = struct.pack(">IIII", 0, 6, 28, 28) if "images" in file else struct.pack(">II", 0, 6)
        with gzip.open(directory / file, "wb") as out:
            out.write(header + (bytes(6 * 28 * 28) if "images" in file else bytes([3] * 6)))  # pyright: ignore


def test_mnist_names_the_files_that_are_missing_and_downloads_none(monkeypatch, tmp_path):
    def no_download(*args):
        raise AssertionError(f"a download of {args}")

    monkeypatch.setattr(load_mnist, "urlretrieve", no_download)
    monkeypatch.setattr(load_mnist.load_mnist, "__defaults__", (str(tmp_path),))
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[1]).unlink()
    with pytest.raises(UsageError, match=f"reads MNIST from {tmp_path}, which lacks {MNIST_FILES[1]}: put the files"):
        gymnax_env("MNISTBandit-bsuite")


def test_mnist_plays_where_its_files_are(monkeypatch, tmp_path):
    monkeypatch.setattr(load_mnist.load_mnist, "__defaults__", (str(tmp_path),))
    monkeypatch.setattr(load_mnist._download, "__defaults__", (str(tmp_path),))
    write_mnist(tmp_path)
    env = gymnax_env("MNISTBandit-bsuite")
    state, obs = env.reset(jax.random.key(0))
    _, time_step = jax.vmap(functools.partial(env.step, jax.random.key(1), state))(jnp.arange(10))
    assert obs.shape == (28, 28)
    np.testing.assert_array_equal(time_step.reward, [1.0 if label == 3 else -1.0 for label in range(10)])


def test_importing_the_environments_starts_no_backend():
    code = "import purepg.envs, purepg.runtime; raise SystemExit(purepg.runtime.backend_is_running())"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_what_gymnax_draws_with_is_imported_when_something_is_drawn():
    code = """
import sys
from purepg.envs.gymnax import library
pong = library().environments.misc.pong
loaded = lambda: [name in sys.modules for name in ("matplotlib.pyplot", "seaborn")]
assert loaded() == [False, False], loaded()
assert callable(pong.plt.subplots)
assert loaded() == [True, False], loaded()
import matplotlib.pyplot
assert pong.plt.subplots is matplotlib.pyplot.subplots
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
