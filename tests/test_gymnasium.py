"""Gymnasium's environments through the bridge: both autoreset modes, spaces, time limits, and what is refused."""

import functools
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from helpers import diary_env, episode_length, quick_jit, terminates, truncates

from purepg.envs import make
from purepg.envs.contract import in_units
from purepg.envs.suites.gymnasium import gym_env
from purepg.experience.rollout import reset_all, rollout
from purepg.run.outside import Recorder
from purepg.types import Actor, Box, Discrete, MultiDiscrete, Transition, UsageError

gymnasium = pytest.importorskip("gymnasium")
spaces, SyncVectorEnv, AutoresetMode = gymnasium.spaces, gymnasium.vector.SyncVectorEnv, gymnasium.vector.AutoresetMode
T, N = 7, 6


class Diary(gymnasium.Env):
    """The environment of `helpers.diary_env`, whose episodes' ids are given."""

    observation_space = spaces.Box(-1000, 1000, (2,), np.int64)
    action_space = spaces.Discrete(2)

    def __init__(self, ids: Any):
        self.metadata, self.ids = {}, list(ids)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.id, self.t = self.ids.pop(0), 0
        return np.array([self.id, self.t]), {}

    def step(self, action):
        reward = self.id + self.t + 0.5 * action
        self.t += 1
        ended = self.t == episode_length(self.id)
        flags = bool(ended and terminates(self.id)), bool(ended and truncates(self.id))
        return np.array([self.id, self.t]), reward, *flags, {}


def rule(obs):
    return (obs[..., 0] + obs[..., 1]) % 2


def by_rule(t, obs, starts):
    del t, starts
    return rule(obs), -1.0 * rule(obs), ((), ()), rule(obs)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP], ids=lambda mode: mode.value)
def test_what_is_recorded_is_transition_by_transition_the_rollout_of_the_twin_in_jax(mode):
    env, act = diary_env(), Actor(lambda key, obs: (), lambda noise, memory, obs: (memory, rule(obs), -1.0 * rule(obs)))
    run = quick_jit(lambda key: rollout(key, env, act, reset_all(jax.random.key(8), env, N), 30)[1])
    twin = jax.tree.map(np.asarray, run(jax.random.key(9)))
    assert len(np.unique(np.stack([twin.terminated, twin.truncated], -1).reshape(-1, 2), axis=0)) == 4
    ids = [twin.obs[twin.obs[:, i, 1] == 0, i, 0] for i in range(N)]

    def vector(num_envs):
        envs = SyncVectorEnv([functools.partial(Diary, own) for own in ids], autoreset_mode=mode)
        envs.num_envs = min(num_envs, N)  # that the spaces can be read off one
        return envs

    recorder = Recorder(gym_env(vector), (), N, T, list(range(N)))
    ended = twin.terminated | twin.truncated
    position = np.zeros(N, int)  # in next-step mode, those ahead skip what an older policy did
    for _ in range(3):
        found = recorder.record(by_rule)
        if mode == AutoresetMode.NEXT_STEP:
            first = found.trajectory.obs[0]
            while (late := (twin.obs[position, np.arange(N)] != first).any(-1)).any():
                position[late] += 1
            assert (position == 0).all() or not (position == position[0]).all()
        for name, a, b in zip(Transition._fields, found.trajectory, twin, strict=True):
            b = np.stack([b[position[i] :][:T, i] for i in range(N)], 1)
            np.testing.assert_array_equal(a, b, err_msg=f"{name} from {position}")
        position += T
        if mode == AutoresetMode.SAME_STEP:
            assert found.finished[:, 2].sum() == ended[position[0] - T : position[0]].sum()


class OneArray(gymnasium.Env):
    """Counts to 3 in the one array that it always returns."""

    metadata: ClassVar[dict[str, Any]] = {}
    observation_space = spaces.Box(0, 9, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self):
        self.count = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count[:] = 0
        return self.count, {}

    def step(self, action):
        self.count += 1
        return self.count, 1.0, False, bool(self.count[0] == 3), {}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_last_observation_outlives_the_reset_of_an_environment_that_has_one_array(asynchronous):
    env = gym_env(OneArray, "one_array", asynchronous=asynchronous)
    assert env.outside is not None
    envs = env.outside(2)
    try:
        np.testing.assert_array_equal(envs.reset([0, 1]), np.zeros((2, 2)))
        for t in (1, 2, 3, 1):
            step = envs.step(np.zeros(2, int))
            np.testing.assert_array_equal(step.next_obs, np.full((2, 2), t))
            np.testing.assert_array_equal(step.obs, np.full((2, 2), t % 3))
    finally:
        envs.close()


class Kinds(gymnasium.Env):
    """Observes a bit of everything; the second step ends the episode. `taken` are the actions that it got."""

    metadata: ClassVar[dict[str, Any]] = {}

    def __init__(self, action_space: Any, space: Any = None, fails: bool = False):
        self.action_space, self.fails = action_space, fails
        self.observation_space = space or spaces.Dict(
            time=spaces.Discrete(3, start=5),
            pair=spaces.Tuple([spaces.Box(-1, 1, (2,), np.float64), spaces.MultiDiscrete([3, 4], start=[1, 2])]),
            picture=spaces.Box(0, 255, (2, 2), np.uint8),
        )
        self.taken: list[Any] = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        if self.fails and self.t == 1:
            raise ValueError("out\nof ink")
        self.t += 1
        self.taken.append(action)
        return self._obs(), 1.0, self.t == 2, False, {}

    def _obs(self):
        pair = np.array([0.1, 0.25 * self.t]), np.array([1 + self.t, 5])
        return {"time": np.int64(5 + self.t), "pair": pair, "picture": np.full((2, 2), 100 * self.t, np.uint8)}


def kinds(action_space: Any, made: list[Any] | None = None, **how: Any):
    def kinds():
        env = Kinds(action_space, **how)
        if made is not None:
            made.append(env)
        return env

    return gym_env(kinds, "kinds")


def test_observations_are_ours_in_structure_numbers_and_dtypes_and_final_ones_too():
    env = kinds(spaces.Discrete(2))
    space: Any = env.observation_space
    assert space["time"] == Discrete(3) and space["pair"][1] == MultiDiscrete((3, 4))
    assert isinstance(space["pair"][0], Box) and space["pair"][0].dtype == np.float32
    _, like = env.reset(jax.random.key(0))
    assert env.outside is not None
    envs = env.outside(2)

    def expected(t):
        pair = np.array([[0.1, 0.25 * t]] * 2, np.float32), np.array([[t, 3]] * 2, np.int32)
        return {"time": np.full(2, t, np.int32), "pair": pair, "picture": np.full((2, 2, 2), 100 * t, np.uint8)}

    def check(obs, t):
        jax.tree.map(np.testing.assert_array_equal, obs, expected(t))
        jax.tree.map(lambda x, like: np.testing.assert_equal(x[0].dtype, like.dtype), obs, like)

    check(envs.reset([1, 2]), 0)
    first, second = (envs.step(np.zeros(2, np.int32)) for _ in range(2))
    for obs, t in ((first.obs, 1), (first.next_obs, 1), (second.obs, 0), (second.next_obs, 2)):
        check(obs, t)
    assert second.terminated.all() and not second.truncated.any() and first.taken.all() and second.taken.all()


@pytest.mark.parametrize(
    ("space", "ours", "expected"),
    [
        (spaces.Discrete(3, start=-1), np.array([0, 2], np.int32), [-1, 1]),
        (spaces.MultiDiscrete([2, 3], start=[0, 4]), np.array([[1, 2], [0, 0]], np.int32), [[1, 6], [0, 4]]),
        (
            spaces.Box(np.array([0.1, -3.0]), np.array([0.3, 1.0]), dtype=np.float64),
            np.array([[1.0, -1.0], [0.0, 7.0]], np.float32),  # canonical
            [[0.3, -3.0], [0.2, 1.0]],
        ),
    ],
    ids=["discrete", "multi_discrete", "box"],
)
def test_actions_reach_the_environment_in_its_own_numbers_and_within_its_bounds(space, ours, expected):
    made: list[Any] = []
    env = kinds(space, made)
    assert env.outside is not None
    envs = env.outside(2)
    envs.reset([0, 1])
    envs.step(np.asarray(in_units(env.action_space, ours)))
    taken = np.array([one.taken[0] for one in made[-2:]])
    np.testing.assert_allclose(taken, expected, rtol=1e-6)
    assert all(space.contains(one.taken[0]) for one in made[-2:])


def test_each_environment_gets_a_seed_of_its_own_and_the_same_seed_gives_the_same_episode():
    env = make("gym/CartPole-v1")
    assert env.outside is not None
    envs = env.outside(3)
    first = envs.reset([7, 8, 7])
    np.testing.assert_array_equal(first[0], first[2])
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(envs.reset([8, 7, 1])[:2], first[1::-1])


def test_cart_pole_is_that_of_gymnax_step_by_step_and_its_time_limit_truncates():
    env, twin = make("gym/CartPole-v1", {"max_episode_steps": 6}), make("gymnax/CartPole-v1")
    assert env.max_episode_steps == 6 and make("gym/CartPole-v1").max_episode_steps == 500
    assert env.outside is not None
    envs = env.outside(2)
    obs = envs.reset([0, 1])
    state, _ = jax.vmap(twin.reset)(jax.random.split(jax.random.key(0), 2))
    names = "x", "x_dot", "theta", "theta_dot"
    state = state.replace(**dict(zip(names, obs.T, strict=True)))
    step = quick_jit(jax.vmap(twin.step, (None, 0, 0)))
    found = None
    for t in range(6):
        action = np.array([t % 2, 1], np.int32)
        state, expected = step(jax.random.key(1), state, action)
        found = envs.step(action)
        np.testing.assert_allclose(found.next_obs, expected.obs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(found.reward, expected.reward)
        assert found.truncated.all() == (t == 5) and not found.terminated.any()
    assert found and (np.abs(found.obs) <= 0.05).all()  # a fresh episode


def test_a_process_for_each_environment_steps_them_alike():
    obs = {}
    for asynchronous in (False, True):
        env = make("gym/CartPole-v1", {"asynchronous": asynchronous, "max_episode_steps": 2})
        assert env.outside is not None
        envs = env.outside(2)
        envs.reset([3, 4])
        obs[asynchronous] = [envs.step(np.array([1, 0])) for _ in range(3)]
        envs.close()
    jax.tree.map(np.testing.assert_array_equal, obs[True], obs[False])


def test_atari_is_preprocessed_with_the_newest_frame_last():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    env = make("gym/ALE/Pong-v5", {"noop_max": 0})
    space: Any = env.observation_space
    assert space.shape == (84, 84, 4) and space.dtype == np.uint8 and env.max_episode_steps == 27_000
    assert env.outside is not None
    envs = env.outside(1)
    obs = envs.reset([0])
    np.testing.assert_array_equal(obs, np.repeat(obs[..., -1:], 4, axis=-1))
    following = envs.step(np.array([0])).obs
    np.testing.assert_array_equal(following[..., :3], obs[..., 1:])


def test_what_cannot_be_bridged_is_refused_in_one_line():
    def message(function, *arguments, **more):
        with pytest.raises(UsageError) as error:
            function(*arguments, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "gym/CartPol-v1 cannot be made" in message(make, "gym/CartPol-v1")
    assert "foo" in message(make, "gym/CartPole-v1", {"foo": 1})
    assert "max_episode_steps (0) must be" in message(make, "gym/CartPole-v1", {"max_episode_steps": 0})
    assert "action_repeat (2) cannot be set on gym/CartPole" in message(make, "gym/CartPole-v1", {"action_repeat": 2})
    assert "kinds: its actions are MultiBinary(3); the kinds known" in message(kinds, spaces.MultiBinary(3))
    assert "kinds: its actions are a Box of int64" in message(kinds, spaces.Box(0, 3, (1,), np.int64))
    assert "kinds: its observations are Text" in message(kinds, spaces.Discrete(2), space=spaces.Text(4))
    assert "takes an id or a function" in message(gym_env, 3)

    def without_resets(num_envs):
        return SyncVectorEnv([lambda: Kinds(spaces.Discrete(2))] * num_envs, autoreset_mode=AutoresetMode.DISABLED)

    env = gym_env(without_resets)
    assert env.outside is not None
    assert "autoreset_mode AutoresetMode.DISABLED, but must say" in message(env.outside, 2)

    failing = kinds(spaces.Discrete(2), fails=True)
    assert failing.outside is not None
    envs = failing.outside(2)
    envs.reset([0, 1])
    envs.step(np.zeros(2, int))
    said = message(envs.step, np.zeros(2, int))
    assert said.startswith("kinds failed in step: ValueError: out of ink (test_gymnasium.py, line ")


class Drawn(Kinds):
    """Draws the number of its steps."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(spaces.Discrete(2))
        self.render_mode = render_mode

    def render(self):
        if self.t == 1:
            raise ValueError("out\nof paint")
        return np.full((2, 3, 3), 10 + self.t, np.uint8)


def test_the_picture_is_that_of_the_first_environment_in_its_render_mode():
    def picture(render_mode, num_steps):
        env = gym_env(functools.partial(Drawn, render_mode), "mine")
        assert env.outside is not None and env.render is not None
        envs = env.outside(2)
        envs.reset([0, 1])
        for _ in range(num_steps):
            envs.step(np.zeros(2, np.int32))
        return env.render(envs)

    np.testing.assert_array_equal(picture("rgb_array", 0), np.full((2, 3, 3), 10, np.uint8))
    with pytest.raises(UsageError, match=r"^mine cannot be drawn: ValueError: out of paint \(test_gymnasium.py, line"):
        picture("rgb_array", 1)
    with pytest.raises(UsageError, match=r"^mine cannot be drawn: its render_mode \(None\) must be rgb_array$"):
        picture(None, 0)


def test_an_environment_of_gymnasiums_own_is_made_so_that_it_can_be_drawn():
    for params, mode in ({}, "rgb_array"), ({"render_mode": None}, None):
        envs = make("gym/CartPole-v1", params).outside(1)  # pyright: ignore[reportOptionalCall]
        assert envs._envs.render_mode == mode
        envs.close()


def test_a_registered_environment_that_takes_no_render_mode_is_made_without():
    class Sloppy(Kinds):
        metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

        def __init__(self):
            super().__init__(spaces.Discrete(2))

    gymnasium.register("Sloppy-v0", entry_point=Sloppy)
    try:
        make("gym/Sloppy-v0").outside(1).close()  # pyright: ignore[reportOptionalCall]
    finally:
        del gymnasium.registry["Sloppy-v0"]
