"""Rollouts and whole episodes of an environment whose observations say which episode and which step they are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diary_env, episode_length, loops_are_unbatched, quick_jit, terminates, truncates

import purepg.experience.rollout
from purepg.equations.distributions import Categorical
from purepg.experience.rollout import draw, episode_info, episodes, reset_all, rollout, step, truncation_as_termination
from purepg.train import averaged
from purepg.types import Actor, Discrete, Env, TimeStep

ENV = diary_env()
T, N = 7, 6


def logits(obs, slope=1.0):
    id, t = obs[..., 0].astype(jnp.float32), obs[..., 1].astype(jnp.float32)
    return slope * jnp.stack([jnp.sin(id), 0.3 * t], axis=-1)


def actor(slope=1.0) -> Actor:
    def act(noise, memory, obs):
        distribution = Categorical(logits(obs, slope))
        action = distribution.transform(noise)
        return memory, action, distribution.log_prob(action)

    return Actor(lambda key, obs: jax.random.bits(key, obs.shape[:1]), act)


def expected_log_prob(obs, action, slope=1.0):
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits(obs, slope))), action[..., None], -1)[..., 0]


# --- fixed length ---


@pytest.fixture(scope="module")
def two_rollouts():
    """(world before, trajectory, info, world after), the second beginning where the first left off."""
    k_start, *keys = jax.random.split(jax.random.key(0), 3)
    world = jax.jit(lambda key: reset_all(key, ENV, N))(k_start)
    run = quick_jit(lambda key, world: rollout(key, ENV, actor(), world, T))
    results = []
    for key in keys:
        after, trajectory, info = run(key, world)
        world_before, trajectory, world_after = jax.tree.map(np.asarray, (world, trajectory, after))
        results.append((world_before, trajectory, averaged(info), world_after))
        world = after
    return results


def test_a_rollout_begins_a_new_episode_exactly_where_one_ended_and_next_obs_is_the_one_before(two_rollouts):
    id, t = two_rollouts[0][0].obs.T
    assert not t.any()
    for _, trajectory, _, after in two_rollouts:
        for k in range(T):
            np.testing.assert_array_equal(trajectory.obs[k], np.stack([id, t], -1))
            np.testing.assert_array_equal(trajectory.next_obs[k], np.stack([id, t + 1], -1))
            np.testing.assert_allclose(trajectory.reward[k], id + t + 0.5 * trajectory.action[k])
            ended = t + 1 == episode_length(id)
            np.testing.assert_array_equal(trajectory.terminated[k], ended & terminates(id))
            np.testing.assert_array_equal(trajectory.truncated[k], ended & truncates(id))
            following = trajectory.obs[k + 1] if k + 1 < T else after.obs
            id, t = np.where(ended, following[:, 0], id), np.where(ended, 0, t + 1)
            np.testing.assert_array_equal(following, np.stack([id, t], -1))


def test_every_kind_of_ending_was_met(two_rollouts):
    """What the tests of this file say, they say about all of them."""
    flags = [np.stack([x.terminated, x.truncated], -1).reshape(-1, 2) for _, x, _, _ in two_rollouts]
    assert len(np.unique(np.concatenate(flags), axis=0)) == 4
    for _, trajectory, _, _ in two_rollouts:
        assert (trajectory.terminated | trajectory.truncated)[-1].any()


def test_the_state_carries_over_so_that_an_episode_may_span_rollouts(two_rollouts):
    (_, _, _, between), (begun, trajectory, _, _) = two_rollouts
    jax.tree.map(np.testing.assert_array_equal, between, begun)
    np.testing.assert_array_equal(trajectory.obs[0], between.obs)
    assert between.obs[:, 1].any()
    np.testing.assert_array_equal(between.episode_length, between.obs[:, 1])


def test_info_has_the_means_over_the_episodes_that_ended_in_this_rollout(two_rollouts):
    running_return, running_length = np.zeros(N), np.zeros(N, int)
    for _, trajectory, info, after in two_rollouts:
        returns, lengths = [], []
        for k in range(T):
            running_return += trajectory.reward[k]
            running_length += 1
            ended = trajectory.terminated[k] | trajectory.truncated[k]
            returns += list(running_return[ended])
            lengths += list(running_length[ended])
            running_return, running_length = np.where(ended, 0, running_return), np.where(ended, 0, running_length)
        assert info["num_episodes"] == len(returns)
        np.testing.assert_allclose(info["episode_return"], np.mean(returns), rtol=1e-5)
        np.testing.assert_allclose(info["episode_length"], np.mean(lengths), rtol=1e-6)
        assert info["env_steps"] == T * N
        np.testing.assert_allclose(after.episode_return, running_return, rtol=1e-5)
        np.testing.assert_array_equal(after.episode_length, running_length)


def test_where_no_episode_ended_the_means_are_nan_and_the_number_zero():
    world = reset_all(jax.random.key(0), ENV, N)
    info = averaged(quick_jit(lambda key, world: rollout(key, ENV, actor(), world, 1)[2])(jax.random.key(1), world))
    assert np.isnan([info["episode_return"], info["episode_length"]]).all()
    assert info["num_episodes"] == 0
    assert info["env_steps"] == N


def test_the_log_prob_is_that_of_the_policy_that_acted_and_actions_vary(two_rollouts):
    for _, trajectory, _, _ in two_rollouts:
        expected = expected_log_prob(trajectory.obs, trajectory.action)
        np.testing.assert_allclose(trajectory.log_prob, expected, rtol=1e-4, atol=1e-6)
        assert (trajectory.action != trajectory.action[0]).any()
        assert (trajectory.action != trajectory.action[:, :1]).any()


def test_resets_too_large_to_be_made_beforehand_are_the_same_resets(two_rollouts, monkeypatch):
    monkeypatch.setattr(purepg.experience.rollout, "SMALL_RESET_BYTES", 0)
    begun, *expected = two_rollouts[1]
    _, _, key = jax.random.split(jax.random.key(0), 3)
    after, trajectory, info = quick_jit(lambda key, world: rollout(key, ENV, actor(), world, T))(key, begun)
    jax.tree.map(np.testing.assert_array_equal, [trajectory, averaged(info), after], expected)


def test_steps_taken_one_at_a_time_on_the_draws_of_a_rollout_are_the_rollout(two_rollouts):
    world, *expected = two_rollouts[1]
    _, _, key = jax.random.split(jax.random.key(0), 3)
    draws = quick_jit(lambda key, world: draw(key, ENV, actor().noise, world, T))(key, world)
    advance = quick_jit(lambda world, draws: step(ENV, actor(), world, draws))
    transitions, finished = [], []
    for t in range(T):
        world, transition, finished_now = advance(world, jax.tree.map(lambda x, t=t: x[t], draws))
        transitions.append(transition)
        finished.append(finished_now)
    trajectory = jax.tree.map(lambda *x: np.stack(x), *transitions)
    info = averaged(episode_info(ENV, jnp.stack(finished).sum(0), jnp.int32(T * N)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), [trajectory, info, world], expected)


def test_truncation_as_termination_changes_the_terminated_flag_alone(two_rollouts):
    trajectory = two_rollouts[0][1]
    mistaken = truncation_as_termination(trajectory)
    np.testing.assert_array_equal(mistaken.terminated, trajectory.terminated | trajectory.truncated)
    assert (mistaken.terminated != trajectory.terminated).any()
    assert mistaken._replace(terminated=trajectory.terminated) == trajectory


class KeyState(NamedTuple):
    t: jax.Array


def key_env() -> Env:
    """Observes the key that it was given; episodes of three steps."""

    def bits(key):
        return jax.random.key_data(key)

    def reset(key):
        return KeyState(jnp.int32(0)), bits(key)

    def step(key, state, action):
        t = state.t + 1
        return KeyState(t), TimeStep(bits(key), jnp.float32(action), t >= 3, jnp.bool_(False))

    return Env(reset, step, Discrete(2), Discrete(2), 3)


def key_actor() -> Actor:
    """Its actions are the policy's own key."""

    def noise(key, obs):
        return jnp.full(obs.shape[0], jax.random.key_data(key)[-1])

    return Actor(noise, lambda noise, memory, obs: (memory, noise, jnp.zeros(obs.shape[0])))


def test_no_key_is_given_twice():
    env = key_env()
    world = reset_all(jax.random.key(0), env, N)
    first = np.asarray(world.obs)
    _, trajectory, _ = quick_jit(lambda key, world: rollout(key, env, key_actor(), world, T))(jax.random.key(1), world)
    whole = quick_jit(lambda key: episodes(key, env, key_actor(), N, 4))(jax.random.key(2))
    fresh = np.asarray(trajectory.obs[1:])[np.asarray(trajectory.terminated[:-1])]
    assert len(fresh) == 2 * N
    seen = [first, trajectory.next_obs.reshape(-1, 2), fresh, whole.trajectory.obs[0]]
    seen = np.concatenate([*seen, whole.trajectory.next_obs[:3].reshape(-1, 2)])
    assert len(np.unique(seen, axis=0)) == len(seen)
    for action, num_steps in ((trajectory.action, T), (whole.trajectory.action[:3], 3)):
        assert len(np.unique(action)) == num_steps


# --- whole episodes ---


@pytest.fixture(scope="module", params=[3, 6], ids=["cut", "uncut"])
def whole_episodes(request):
    """(max_steps, episodes): of 2, 3 or 4 steps, which 3 cuts and 6 does not."""
    run = quick_jit(lambda key: episodes(key, ENV, actor(), 24, request.param))
    trajectory, mask, info = run(jax.random.key(5))
    return request.param, (*jax.tree.map(np.asarray, (trajectory, mask)), averaged(info))


def test_the_mask_is_true_from_the_first_step_to_the_last_and_nothing_is_left_beyond(whole_episodes):
    max_steps, (trajectory, mask, info) = whole_episodes
    id, t = trajectory.obs[0, :, 0], np.arange(max_steps)[:, None]
    length = np.minimum(episode_length(id), max_steps)
    np.testing.assert_array_equal(mask, t < length)
    assert set(length) == ({2, 3} if max_steps == 3 else {2, 3, 4})

    t = np.broadcast_to(t, mask.shape)
    expected_obs = np.stack([np.broadcast_to(id, mask.shape), t], -1)
    np.testing.assert_array_equal(trajectory.obs[mask], expected_obs[mask])
    np.testing.assert_array_equal(trajectory.next_obs[mask], expected_obs[mask] + [0, 1])
    np.testing.assert_allclose(trajectory.reward[mask], (id + t + 0.5 * trajectory.action)[mask])
    log_prob = expected_log_prob(trajectory.obs, trajectory.action)
    np.testing.assert_allclose(trajectory.log_prob[mask], log_prob[mask], rtol=1e-4, atol=1e-6)
    assert len(set(trajectory.action[mask])) == 2
    for leaf in trajectory:
        assert not leaf[~mask].any()  # a NaN would count as any

    assert info["env_steps"] == mask.sum()
    assert info["num_episodes"] == 24
    np.testing.assert_allclose(info["episode_length"], length.mean(), rtol=1e-6)
    np.testing.assert_allclose(info["episode_return"], trajectory.reward.sum(0).mean(), rtol=1e-5)


def test_an_episode_still_running_after_max_steps_is_truncated_there_and_others_end_as_they_did(whole_episodes):
    max_steps, (trajectory, _, _) = whole_episodes
    id = trajectory.obs[0, :, 0]
    cut = episode_length(id) > max_steps
    last = np.minimum(episode_length(id), max_steps) - 1
    for flag, by_itself, if_cut in (
        (trajectory.terminated, terminates(id), False),
        (trajectory.truncated, truncates(id), True),
    ):
        np.testing.assert_array_equal(flag[last, np.arange(24)], np.where(cut, if_cut, by_itself))
        assert flag.sum() == flag[last, np.arange(24)].sum()
    # Among them, episodes that terminate, and nothing else, at the very step of the limit.
    at_limit = (episode_length(id) == max_steps) & ~truncates(id)
    assert at_limit.any() or max_steps == 6


def test_episodes_in_nested_lanes_are_those_of_a_plain_loop():
    """Two policies by three seeds, whose episodes end at different times."""

    def run(key, slope):
        return episodes(key, ENV, actor(slope), 1, 6)

    keys, slopes = jax.random.split(jax.random.key(7), 3), jnp.array([0.5, 3.0])
    nested = jax.vmap(jax.vmap(run, (0, None)), (None, 0))
    assert loops_are_unbatched(nested, keys, slopes)
    population, alone = quick_jit(nested)(keys, slopes), quick_jit(run)
    for h in range(2):
        for s in range(3):
            member = jax.tree.map(lambda x, h=h, s=s: x[h, s], population)
            expected = alone(keys[s], slopes[h])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), member, expected)
    assert len(np.unique(population.info["env_steps"][0])) > 1


# --- resets that are made only where an episode ended ---


def bulky(costly: bool, metrics: bool = False) -> Env:
    """The diary, with a large state, so that resets are not drawn beforehand, and with an episode's own number."""

    def reset(key):
        state, obs = ENV.reset(key)
        return (state, jnp.full(100, obs[0].astype(jnp.float32))), obs

    def env_step(key, state, action):
        inner, step = ENV.step(key, state[0], action)
        info = {"odd_steps": (inner.t // 2).astype(jnp.float32)} if metrics else ()
        return (inner, state[1]), step._replace(info=info)

    return ENV._replace(reset=reset, step=env_step, costly_reset=costly, metrics=("odd_steps",) if metrics else ())


@pytest.mark.parametrize("num_envs", [1, 6, 130])
def test_resetting_only_ended_environments_gives_what_resetting_all_gives(num_envs):
    """Also in each lane of a population, whose lanes end different numbers of episodes."""

    @quick_jit
    def run(key):
        found = []
        for costly in (False, True):
            env = bulky(costly)

            def lane(key, env=env):
                k_start, k_run = jax.random.split(key)
                return rollout(k_run, env, actor(), reset_all(k_start, env, num_envs), T)

            found.append(jax.vmap(lane)(jax.random.split(key, 3)))
        return found

    all_reset, ended_reset = jax.device_get(run(jax.random.key(0)))
    assert all_reset[2]["num_episodes"].min() >= num_envs
    jax.tree.map(np.testing.assert_array_equal, all_reset, ended_reset)


def test_costly_resets_run_for_the_64th_part_of_the_environments_at_a_time_and_only_as_often_as_needed():
    env, num_envs, calls = bulky(costly=True), 128, []
    counted = env._replace(reset=lambda key: (jax.debug.callback(lambda: calls.append(1)), env.reset(key))[1])
    world = jax.jit(lambda key: reset_all(key, env, num_envs))(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), num_envs)
    restart = jax.jit(lambda ended: purepg.experience.rollout.restart(counted, ended, keys, world[:2]))
    for num_ended in (0, 1, 2, 3, 128):
        calls.clear()
        jax.block_until_ready(restart(jnp.arange(num_envs) >= num_envs - num_ended))
        jax.effects_barrier()
        assert len(calls) == -(-num_ended // 2)  # one call for the two environments of a pass


def test_an_episodes_own_numbers_are_averaged_over_the_episodes_that_ended():
    env = bulky(costly=True, metrics=True)

    @quick_jit
    def run(key):
        k_start, k_run = jax.random.split(key)
        return rollout(k_run, env, actor(), reset_all(k_start, env, N), T), episodes(k_run, env, actor(), 5, 4)

    (_, trajectory, info), whole = jax.device_get(run(jax.random.key(2)))
    ended = trajectory.terminated | trajectory.truncated
    expected = (trajectory.next_obs[..., 1] // 2)[ended].mean()
    assert averaged(info)["info/odd_steps"] == pytest.approx(expected)
    lengths = whole.mask.sum(0)
    assert averaged(whole.info)["info/odd_steps"] == pytest.approx((lengths // 2).mean())
