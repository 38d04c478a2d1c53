"""Time limits and repeated actions, on the environment whose observations say which episode and which step they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diary_env, episode_length, terminates, truncates

from purepg import envs
from purepg.envs.wrappers import repeated, time_limited
from purepg.types import UsageError

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
