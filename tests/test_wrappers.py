"""Time limits, repeated actions, and observations with less or more, on the environment whose observations say which
episode and which step they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import choices_env, diary_env, episode_length, pair_env, terminates, truncates

from purepg import envs
from purepg.envs.contract import canonical, check_environment, in_units, legal_actions
from purepg.envs.wrappers import average_pooled, partially_observed, repeated, time_limited, with_previous
from purepg.experience import normalize
from purepg.run.environment import named_env
from purepg.types import Box, Discrete, Env, LegalActions, MultiDiscrete, TimeStep, UsageError

ENV = diary_env()


def episode(env, id, action=1, num_steps=4):
    """The steps of the episode with this id, without resets."""
    key = jax.random.key(0)
    state, _ = env.reset(key)
    inner = ENV.reset(key)[0]._replace(id=jnp.int32(id))
    state = state._replace(inner=inner) if hasattr(state, "inner") else inner
    found = []
    for _ in range(num_steps):
        state, step = env.step(key, state, jnp.int32(action))
        found.append(step)
    return found


@pytest.mark.parametrize("id", range(9))
def test_a_time_limit_truncates_at_its_step_and_leaves_every_other_end_as_it_was(id):
    plain, limited = episode(ENV, id, num_steps=3), episode(time_limited(ENV, 3), id, num_steps=3)
    for t, (a, b) in enumerate(zip(plain, limited, strict=True), start=1):
        assert bool(b.truncated) == (bool(a.truncated) or t == 3)
        assert bool(b.terminated) == bool(a.terminated)
        np.testing.assert_array_equal(a.obs, b.obs)
    assert time_limited(ENV, 3).max_episode_steps == 3
    assert time_limited(ENV, 30).max_episode_steps == ENV.max_episode_steps


@pytest.mark.parametrize("id", range(9))
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_repeated_action_adds_the_rewards_of_its_steps_until_the_episode_ends(id, times):
    length = episode_length(id)
    for k, step in enumerate(episode(repeated(ENV, times), id, num_steps=-(-length // times))):
        first, last = k * times, min((k + 1) * times, length)
        assert float(step.reward) == sum(id + t + 0.5 for t in range(first, last))
        np.testing.assert_array_equal(step.obs, [id, last])
        assert bool(step.terminated) == (last == length and bool(terminates(id)))
        assert bool(step.truncated) == (last == length and bool(truncates(id)))


def test_a_time_limit_counts_the_environments_own_steps_and_a_repeated_action_takes_several():
    assert repeated(ENV, 3).max_episode_steps == 2
    env = envs.make("Pendulum-v1", {"action_repeat": 4, "max_episode_steps": 21})
    assert env.max_episode_steps == 6
    state, _ = env.reset(jax.random.key(0))
    ends = []
    for _ in range(6):
        state, step = jax.jit(env.step)(jax.random.key(0), state, jnp.zeros(1))
        ends.append(bool(step.truncated))
    assert ends == [False] * 5 + [True]


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_count_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="must be a positive whole number"):
        time_limited(ENV, value)
    with pytest.raises(UsageError, match="must be a positive whole number"):
        repeated(ENV, value)


def test_parameters_reach_any_kind_of_environment():
    assert envs.make("garnet", {"seed": 3}).name == "garnet 3"
    assert envs.make("DeepSea-bsuite", {"size": 5}).observation_space.shape == (5, 5)
    assert envs.make("gymnax/CartPole-v1", {"max_steps_in_episode": 7}).max_episode_steps == 7
    assert envs.make("addition", {"num_digits": 1}).max_episode_steps == 3
    with pytest.raises(UsageError, match="lqr does not take these parameters"):
        envs.make("lqr", {"sprin": 2.0})


# --- observed ---


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        ((0, 2), [0, 2]),
        ("0,2", [0, 2]),
        (3, [3]),
        ("3", [3]),
        ("1-3", [1, 2, 3]),
        ("3, 0-1", [3, 0, 1]),
        (range(2), [0, 1]),
        (np.array([1, 0]), [1, 0]),
    ],
)
def test_the_entries_observed_are_those_named_in_their_order_and_the_space_follows(entries, kept):
    env = envs.make("CartPole-v1")
    partial = partially_observed(env, entries)
    check_environment(partial)
    state, obs = env.reset(jax.random.key(0))
    same, part = partial.reset(jax.random.key(0))
    np.testing.assert_array_equal(part, obs[np.array(kept)])
    _, step = env.step(jax.random.key(1), state, jnp.int32(1))
    _, seen = partial.step(jax.random.key(1), same, jnp.int32(1))
    np.testing.assert_array_equal(seen.obs, step.obs[np.array(kept)])
    assert (seen.reward, seen.terminated) == (step.reward, step.terminated)
    for name in ("low", "high"):
        bound = getattr(partial.observation_space, name)
        np.testing.assert_array_equal(bound, getattr(env.observation_space, name)[np.array(kept)])
    assert partial.max_episode_steps == 500


def test_an_array_is_flattened_before_entries_of_it_are_chosen():
    """Catch: the ball falls from the row 0-4, and the paddle is in the row 45-49."""
    env = named_env("Catch-bsuite", ["observed=0-4,45-49"])
    _, obs = env.reset(jax.random.key(0))
    assert env.observation_space.shape == obs.shape == (10,)
    assert float(obs[:5].sum()) == 1 and obs[5:].tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("name", "entries", "says"),
    [
        ("CartPole-v1", "0,4", r"^observed \(0,4\) must be below 4, the entries that CartPole-v1 observes$"),
        ("CartPole-v1", f"0-{10**15}", r"^observed \(0-1000000000000000\) must be below 4, the entries"),
        *[
            ("CartPole-v1", entries, r"^observed \(.*\) must be entries such as 0,2 or 0-4,45-49, each named once$")
            for entries in ("a", "", "0,", "3-1", "-1", "0,0", "0-2,1", "0:2", -1, 1.5, True, None, ())
        ],
        ("popgym/RepeatFirstEasy", "0", r"^observed \(0\) needs a Box to choose from, which RepeatFirstEasy's obs"),
        ("addition", "0", r"^observed \(0\) cannot be set on addition, whose observations and actions are tokens$"),
    ],
)
def test_entries_that_are_not_there_are_refused_in_one_line(name, entries, says):
    with pytest.raises(UsageError, match=says):
        envs.make(name, observed=entries)


# --- average_pool ---


@pytest.mark.parametrize("dtype", [bool, np.bool_, np.uint8, np.float32])
def test_a_pixel_is_the_mean_of_its_square_in_every_channel(dtype):
    is_bool = np.dtype(dtype) == bool
    images = np.random.default_rng(0).integers(0, 2 if is_bool else 256, (2, 4, 6, 3)).astype(dtype)
    space = Box(np.zeros((4, 6, 3), dtype), np.full((4, 6, 3), 1 if is_bool else 255, dtype), dtype)

    def step(key, state, action):
        return state, TimeStep(jnp.asarray(images[1]), jnp.float32(1), jnp.bool_(False), jnp.bool_(False))

    env = Env(lambda key: (jnp.int32(0), jnp.asarray(images[0])), step, space, Discrete(2), 5)
    env = average_pooled(env._replace(held_out=env), 2)
    check_environment(env)
    state, first = env.reset(jax.random.key(0))
    _, then = env.step(jax.random.key(0), state, jnp.int32(0))
    for image, shown in zip(images, (first, then.obs), strict=True):
        assert shown.shape == (2, 3, 3) and shown.dtype == (np.float32 if is_bool else dtype)
        for i, j, c in np.ndindex(2, 3, 3):
            mean = image[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].astype(float).mean()
            assert abs(float(shown[i, j, c]) - mean) <= (0.5 if dtype is np.uint8 else 1e-4)
    assert isinstance(env.observation_space, Box) and env.held_out is not None
    assert env.held_out.observation_space.shape == env.observation_space.shape == (2, 3, 3)
    assert env.observation_space.low.max() == 0 and env.observation_space.high.min() == space.high.min()
    assert {low.dtype for low in env.observation_space[:2]} == {first.dtype}


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("Breakout-MinAtar", 3, r"^average_pool \(3\) must divide 10 and 10, the size of Breakout-MinAtar's image$"),
        ("Breakout-MinAtar", 0, r"^average_pool \(0\) must be a positive whole number$"),
        ("CartPole-v1", 2, r"^average_pool \(2\) needs an image to reduce, which CartPole-v1's observation is not$"),
        ("addition", 2, r"^average_pool \(2\) cannot be set on addition, whose observations and actions are tokens$"),
    ],
)
def test_what_cannot_be_pooled_is_refused_in_one_line(name, size, says):
    with pytest.raises(UsageError, match=says):
        envs.make(name, average_pool=size)


# --- previous ---


def test_the_previous_action_and_reward_are_those_of_the_step_before_and_none_at_the_first():
    env = with_previous(ENV)
    check_environment(env)
    assert env.observation_space["previous_action"] == Discrete(3)
    assert env.observation_space["previous_reward"].shape == ()
    state, obs = env.reset(jax.random.key(0))
    assert (int(obs["previous_action"]), float(obs["previous_reward"])) == (2, 0)
    for t, action in enumerate([1, 0]):
        np.testing.assert_array_equal(obs["obs"], [state.id, t])
        state, step = env.step(jax.random.key(t), state, jnp.int32(action))
        obs = step.obs
        assert (int(obs["previous_action"]), obs["previous_reward"]) == (action, step.reward)
        assert float(step.reward) == state.id + t + 0.5 * action


def test_a_bounded_action_is_remembered_as_the_policy_took_it():
    env = envs.make("Pendulum-v1", previous=True)
    space = env.observation_space["previous_action"]
    np.testing.assert_array_equal([space.low, space.high], [[-1], [1]])
    state, obs = env.reset(jax.random.key(0))
    assert obs["previous_action"].tolist() == [0]
    for action, taken in ((-0.25, -0.25), (3.0, 1.0)):
        _, step = env.step(jax.random.key(0), state, in_units(env.action_space, jnp.array([action])))
        np.testing.assert_allclose(step.obs["previous_action"], [taken])


@pytest.mark.parametrize(
    ("low", "high", "actions"),
    [([-2.0, 0.0], [2.0, 10.0], [-1.0, 0.5]), ([-np.inf, 0.0], [np.inf, 9.0], [-7.0, 4.0]), ([3.0], [3.0], [0.0])],
)
def test_canonical_is_the_inverse_of_in_units(low, high, actions):
    space = Box(np.array(low, np.float32), np.array(high, np.float32))
    np.testing.assert_allclose(canonical(space, in_units(space, jnp.array(actions))), actions)


def test_each_choice_of_several_has_a_none_of_its_own():
    env = with_previous(choices_env(product=False))
    assert env.observation_space["previous_action"] == MultiDiscrete((3, 4))
    state, obs = env.reset(jax.random.key(0))
    np.testing.assert_array_equal(obs["previous_action"], [2, 3])
    _, step = env.step(jax.random.key(0), state, jnp.array([1, 2]))
    np.testing.assert_array_equal(step.obs["previous_action"], [1, 2])


def test_a_dict_keeps_its_entries_so_that_legal_actions_and_privileged_entries_are_found():
    plain = pair_env(masked=True)._replace(privileged=("x",))
    env = with_previous(plain)
    check_environment(env)
    assert set(env.observation_space) == {"legal", "x", "previous_action", "previous_reward"}
    assert env.observation_space["legal"] == LegalActions(4) and env.privileged == ("x",)
    _, obs = env.reset(jax.random.key(0))
    _, inner = plain.reset(jax.random.key(0))
    np.testing.assert_array_equal(legal_actions(env.observation_space, obs), inner["legal"])
    with pytest.raises(UsageError, match=r"toy observes previous_action and previous_reward already"):
        with_previous(env)


def test_what_else_an_environment_has_stays_with_it():
    def render(state):
        return np.full((2, 2, 3), state.t, np.uint8)

    def describe(obs):
        return {"id": str(obs[0])}

    def step(key, state, action):
        state, time_step = ENV.step(key, state, action)
        return state, time_step._replace(info={"length": 1.0 * state.t})

    full = ENV._replace(step=step, render=render, describe=describe, metrics=("length",), costly_reset=True)
    full = full._replace(held_out=full)
    for env in (partially_observed(full, "1"), with_previous(full)):
        assert env.held_out is not None
        wanted, found = (jax.tree.leaves(made.reset(jax.random.key(0))[1]) for made in (env, env.held_out))
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(a, b)
        assert (env.max_episode_steps, env.metrics, env.costly_reset) == (4, ("length",), True)
        state, _ = env.reset(jax.random.key(0))
        state, taken = env.step(jax.random.key(0), state, jnp.int32(0))
        assert float(taken.info["length"]) == 1
        assert env.render is not None and env.render(state)[0, 0, 0] == 1
    told = with_previous(full)
    assert told.describe is not None and told.describe({"obs": np.array([7, 1])}) == {"id": "7"}


def test_the_reward_is_that_of_all_repeats_and_the_order_on_the_command_line_does_not_matter():
    env = named_env("CartPole-v1", ["previous=true", "observed=0,2", "action_repeat=3", "max_episode_steps=9"])
    assert env.max_episode_steps == 3
    state, obs = env.reset(jax.random.key(0))
    assert obs["obs"].shape == (2,)
    _, step = env.step(jax.random.key(0), state, jnp.int32(1))
    assert float(step.obs["previous_reward"]) == 3 and int(step.obs["previous_action"]) == 1
    assert named_env("CartPole-v1", ["previous=false"]).observation_space.shape == (4,)
    for value in (1, "yes", None):
        with pytest.raises(UsageError, match=rf"^previous \({value}\) must be true or false$"):
            envs.make("CartPole-v1", previous=value)
    with pytest.raises(UsageError, match=r"^previous \(True\) cannot be set on addition, whose"):
        envs.make("addition", previous=True)


def test_normalised_observations_leave_a_discrete_previous_action_and_standardise_the_reward():
    env = with_previous(envs.make("popgym/RepeatFirstEasy"))
    normalize.check_space(env)
    _, obs = env.reset(jax.random.key(0))
    moments = normalize.init(obs, env.observation_space)
    assert moments.mean["obs"].size == moments.mean["previous_action"].size == 0
    batch = jax.tree.map(lambda x: jnp.stack([x, x, x]), obs) | {"previous_reward": jnp.array([0.0, 1.0, 5.0])}
    seen = normalize.apply(normalize.update(moments, batch), batch)
    np.testing.assert_array_equal(seen["previous_action"], [4, 4, 4])
    np.testing.assert_allclose(seen["previous_reward"], np.array([-2, -1, 3]) / np.sqrt(14 / 3), rtol=1e-5)
