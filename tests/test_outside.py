"""Environments that are not JAX: what is recorded of them, learned from it, saved and evaluated."""

import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    NUM_IDS,
    TinyNetwork,
    TinyQNetwork,
    arms_env,
    diary_env,
    episode_length,
    quick_jit,
    read_log,
    terminates,
    truncates,
)

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.on_policy import RolloutWorld
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.envs.outside import HostStep, outside_env
from purepg.envs.wrappers import repeated, time_limited
from purepg.experience.acting import actor
from purepg.experience.rollout import Recording, RolloutState, reset_all, rollout
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.evaluation import Choice, on_the_host, report
from purepg.run.experiment import train_population
from purepg.run.films.film import check_drawing, film
from purepg.run.films.outside import play_outside
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.load import load
from purepg.run.outside import Recorder, evaluate_outside, seed_of
from purepg.run.outside_population import OutsidePopulation, _Member
from purepg.run.plan import RunConfig, prepare
from purepg.train import averaged, evaluate
from purepg.types import Actor, Box, Discrete, Env, Transition, UsageError

T, N = 7, 6


class Diary:
    """The environment of `helpers.diary_env` in NumPy, whose episodes' ids are given or else follow from seeds.

    `next_step`: the step after an episode's end only resets.
    """

    def __init__(self, num_envs: int, ids: Any = None, next_step: bool = False, fails_at: int | None = None):
        self.num_envs, self.next_step, self.fails_at, self.closed = num_envs, next_step, fails_at, False
        self.ids = None if ids is None else [list(own) for own in ids]
        self.num_steps = 0

    def reset(self, seeds):
        if self.ids is None:
            self.random = [np.random.default_rng(seed) for seed in seeds]
        self.id, self.t = np.array([self._next(i) for i in range(self.num_envs)]), np.zeros(self.num_envs, int)
        self.resets_next = np.zeros(self.num_envs, bool)
        return self._obs()

    def step(self, action):
        assert action.shape == (self.num_envs,)
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise UsageError("diary failed in step: ValueError: out of ink")
        taken = ~self.resets_next
        reward = np.where(taken, self.id + self.t + 0.5 * action, np.nan).astype(np.float32)
        self.t = self.t + taken
        next_obs, ended = self._obs(), taken & (self.t == episode_length(self.id))
        terminated, truncated = ended & terminates(self.id), ended & truncates(self.id)
        fresh = self.resets_next if self.next_step else ended
        for i in np.flatnonzero(fresh):
            self.id[i], self.t[i] = self._next(i), 0
        self.resets_next = ended if self.next_step else self.resets_next
        return HostStep(self._obs(), reward, terminated, truncated, next_obs, taken)

    def close(self):
        self.closed = True

    def _next(self, i):
        return self.random[i].integers(NUM_IDS) if self.ids is None else self.ids[i].pop(0)

    def _obs(self):
        return np.stack([self.id, self.t], -1).astype(np.int32)


def diary(**how: Any) -> Env:
    bound = np.full(2, NUM_IDS, np.int32)
    return outside_env("diary", lambda n: Diary(n, **how), Box(-bound, bound, np.int32), Discrete(2), 4)


DIARY = diary()


def rule(obs):
    return (obs[..., 0] + obs[..., 1]) % 2


@pytest.fixture(scope="module")
def twin():
    """30 steps in the twin in JAX under `rule`, leaves `[30, N, ...]`, and the ids of each environment's episodes."""
    env = diary_env()
    by_rule = Actor(lambda key, obs: (), lambda noise, memory, obs: (memory, rule(obs), -1.0 * rule(obs)))

    def run(key):
        return rollout(key, env, by_rule, reset_all(jax.random.key(8), env, N), 30)[1]

    trajectory = jax.tree.map(np.asarray, quick_jit(run)(jax.random.key(9)))
    first = trajectory.obs[..., 1] == 0
    return trajectory, [trajectory.obs[first[:, i], i, 0] for i in range(N)]


def recorder(env, agents=(N,), num_envs=1, num_steps=T):
    return Recorder(env, agents, num_envs, num_steps, list(range(N)))


def by_rule(t, obs, starts):
    del t, starts
    return rule(obs), -1.0 * rule(obs).astype(np.float32), ((), ()), rule(obs)


@pytest.mark.parametrize(("agents", "num_envs"), [((N,), 1), ((2,), N // 2), ((), N)])
def test_recordings_are_the_rollout_of_the_twin_in_jax(twin, agents, num_envs):
    trajectory, ids = twin
    rec = recorder(diary(ids=ids), agents, num_envs)
    for start in (0, T, 2 * T):
        found = rec.record(by_rule)
        expected = jax.tree.map(lambda x, start=start: x[start : start + T], trajectory)
        for name, a, b in zip(Transition._fields, found.trajectory, expected, strict=True):
            a = np.moveaxis(np.asarray(a).reshape(-1, T, num_envs, *a.shape[len(agents) + 2 :]), 1, 0)
            np.testing.assert_array_equal(a.reshape(b.shape), b, err_msg=f"{name} from {start}")


def test_a_step_that_only_resets_is_not_recorded_and_those_ahead_skip_what_an_older_policy_did(twin):
    trajectory, ids = twin
    rec, position, skipped = recorder(diary(ids=ids, next_step=True), (), N), np.zeros(N, int), 0
    parted, num_parted = np.zeros(N, bool), 0
    episodes = trajectory.terminated | trajectory.truncated
    for _ in range(3):
        before = position.copy()
        found = rec.record(by_rule)
        np.testing.assert_array_equal(rec.parted, parted)
        num_parted += rec.parted.sum()
        for i in range(N):
            for name, a, b in zip(Transition._fields, found.trajectory, trajectory, strict=True):
                np.testing.assert_array_equal(a[:, i], b[position[i] :][:T, i], err_msg=name)
        # All take the same number of calls: T, and as many as the one with the most resets needed for them.
        starts_with_a_reset = np.array([position[i] > 0 and episodes[position[i] - 1, i] for i in range(N)])
        needed = [T + starts_with_a_reset[i] + episodes[position[i] :][: T - 1, i].sum() for i in range(N)]
        for i in range(N):
            left = max(needed) - starts_with_a_reset[i]
            while left > 0:  # a step, and the reset after it where it ended an episode
                left -= 1 + episodes[position[i], i]
                position[i] += 1
        skipped += (position - before - T).sum()
        parted = np.array([episodes[before[i] + T : position[i], i].any() for i in range(N)])
        ended = sum(episodes[before[i] : position[i], i].sum() for i in range(N))
        assert found.finished[:, 2].sum() == ended
    assert skipped > 0 and num_parted > 0


def test_a_running_return_ends_with_its_episode_also_where_no_recording_has_the_end():
    nothing: Any = ()
    world = RolloutWorld(RolloutState(*[nothing] * 5), jnp.array([1.0, 2.0, 3.0]))
    recording, parted = Recording(nothing, nothing), jnp.array([False, True, False])
    found = _Member.held(object.__new__(_Member), world, (recording, parted))
    assert found.running_return.tolist() == [1, 0, 3] and found.envs.env_state is recording


def test_every_call_of_an_update_has_a_number_of_its_own_for_its_random_numbers():
    for next_step in (False, True):
        numbers = []

        def act(t, obs, starts, numbers=numbers):
            numbers.append(t)
            return by_rule(t, obs, starts)

        recorder(diary(next_step=next_step), (), N).record(act)
        assert numbers == list(range(len(numbers)))
        assert (len(numbers) > T) == next_step


def test_finished_counts_each_episode_at_its_end_with_its_whole_return(twin):
    trajectory, ids = twin
    rec = recorder(diary(ids=ids), (), N)
    finished = np.concatenate([rec.record(by_rule).finished for _ in range(3)])
    running = np.zeros((N, 2))
    for t in range(3 * T):
        running += np.stack([trajectory.reward[t], np.ones(N)], -1)
        ended = trajectory.terminated[t] | trajectory.truncated[t]
        np.testing.assert_allclose(finished[t], [*running[ended].sum(0), ended.sum()])
        running[ended] = 0


def test_starts_marks_the_first_steps_of_episodes():
    """In both modes; only where an observation is acted on that begins no episode may it be false."""
    for next_step in (False, True):
        seen = []

        def act(t, obs, starts, seen=seen):
            seen.append((obs[:, 1].copy(), starts.copy(), obs[:, 1] == episode_length(obs[:, 0])))
            return by_rule(t, obs, starts)

        rec = recorder(diary(next_step=next_step), (), N)
        for _ in range(2):
            rec.record(act)
        t, starts, is_last = map(np.stack, zip(*seen, strict=True))
        np.testing.assert_array_equal(starts[~is_last], t[~is_last] == 0)
        assert is_last.any() == next_step


# --- learning from a recording ---


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def with_recording(state, trajectory, finished):
    envs = state.world.envs._replace(env_state=Recording(trajectory, finished))
    return state._replace(world=state.world._replace(envs=envs))


def finished_of(metrics, num_steps):
    sums = [metrics["episode_return"].total, metrics["episode_length"].total, metrics["num_episodes"]]
    return jnp.zeros((num_steps, 3)).at[-1].set(jnp.stack([jnp.float32(x) for x in sums]))


def test_ppos_update_from_a_recording_is_its_update_in_the_environment():
    env = arms_env()
    sizes: Any = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "normalize_obs": True, "scale_reward": True}
    network = TinyNetwork(env.action_space)
    algorithm = ppo(env, network, PPOConfig(**sizes))
    step = quick_jit(algorithm.step)
    key, update = jax.random.key(3), jnp.int32(0)
    state = quick_jit(algorithm.init)(jax.random.key(2))
    state, _ = step(jax.random.key(5), state, update)  # statistics of its own
    expected, metrics = step(key, state, update)

    def record(key, state):
        policy = actor(network, state.learner.params, state.learner.obs_moments)
        return rollout(jax.random.split(key)[0], env, policy, state.world.envs, 8)[1]

    trajectory = quick_jit(record)(key, state)
    found, found_metrics = step(key, with_recording(state, trajectory, finished_of(metrics, 8)), update)
    same(found.learner, expected.learner)
    same(averaged(found_metrics), averaged(metrics))
    same(found.world.running_return, expected.world.running_return)


def test_sacs_update_from_a_recording_is_its_update_in_the_environment():
    env = arms_env(Box(np.full(1, -2, np.float32), np.full(1, 2, np.float32)))
    sizes: Any = {"num_envs": 3, "num_steps": 4, "batch_size": 8, "capacity": 48, "warmup_steps": 12}
    algorithm = sac(env, TinyQNetwork("tanh_gaussian"), SACConfig(**sizes, normalize_obs=True))
    step, state = quick_jit(algorithm.step), quick_jit(algorithm.init)(jax.random.key(2))
    for u in range(3):
        key, update = jax.random.key(u), jnp.int32(u)
        expected, metrics = step(key, state, update)
        # The ring's next 12 slots: what this update's rounds added.
        trajectory = jax.tree.map(lambda x, u=u: x[12 * u :][:12].reshape(4, 3, *x.shape[1:]), expected.world.buffer)
        found, found_metrics = step(key, with_recording(state, trajectory, finished_of(metrics, 4)), update)
        same((found.learner, found.world.buffer), (expected.learner, expected.world.buffer))
        same(averaged(found_metrics), averaged(metrics))
        state = expected
    begun = quick_jit(algorithm.init)(jax.random.key(2)).learner.params
    assert (state.learner.params["policy"]["mean"] != begun["policy"]["mean"]).all()


def test_ppo_explores_by_its_policy_and_records_its_log_prob():
    env = arms_env()
    network = TinyNetwork(env.action_space)
    algorithm = ppo(env, network, PPOConfig(num_envs=4, num_steps=8))
    learner = quick_jit(algorithm.init)(jax.random.key(0)).learner
    obs, none = jax.random.normal(jax.random.key(1), (500, 2)), jnp.zeros(500, bool)
    assert algorithm.explorer is not None
    explore = quick_jit(algorithm.explorer.act)
    action, log_prob, memories, carry = explore(jax.random.key(2), learner, (), 0, 0, obs, none)
    policy, _ = network.apply(learner.params, obs)
    np.testing.assert_allclose(log_prob, policy.log_prob(action), rtol=1e-6)
    expected = jnp.exp(policy.log_prob(jnp.ones(500, jnp.int32)))
    standard_error = float(jnp.sqrt(jnp.sum(expected * (1 - expected)))) / 500
    np.testing.assert_allclose(action.mean(), expected.mean(), atol=4 * standard_error)
    assert (memories, carry) == (((), ()), ())


def test_a_replay_algorithm_explores_at_random_until_the_warm_up_ends_and_then_by_its_policy_with_noise_that_goes_on():
    env = arms_env(Box(np.full(1, -2, np.float32), np.full(1, 2, np.float32)))
    network = TinyQNetwork("deterministic")
    config = DDPGConfig(num_envs=3, num_steps=4, capacity=24, warmup_steps=15, noise_correlation=1.0)
    algorithm = ddpg(env, network, config)
    learner, obs = quick_jit(algorithm.init)(jax.random.key(0)).learner, jax.random.normal(jax.random.key(1), (3, 2))
    explorer = algorithm.explorer
    assert explorer is not None
    noise, begins, explore = explorer.carry(obs)[0], jnp.ones(3, bool), quick_jit(explorer.act)

    def act(u, t, noise, starts):
        action, log_prob, _, carry = explore(jax.random.key(100 * u + t), learner, (noise, ()), u, t, obs, starts)
        return action, log_prob, carry[0]

    mode = network.apply(learner.params, obs)[0].mode()
    last_random, _, noise = act(1, 0, noise, begins)  # 15 transitions are 5 rounds of 3
    assert (jnp.abs(last_random - mode) > 0.5).any()
    later_call, _, _ = act(0, 7, noise, begins)  # calls beyond num_steps, for resets, are the last round's
    assert (jnp.abs(later_call - mode) > 0.5).any()
    action, log_prob, after = act(1, 1, noise, ~begins)
    np.testing.assert_allclose(action - mode, 0.1 * noise, rtol=1e-5, atol=1e-7)
    assert log_prob is None
    again, _, _ = act(2, 0, after, ~begins)  # correlation 1: the same noise, until an episode begins
    np.testing.assert_allclose(again, action, rtol=1e-6)
    fresh, _, _ = act(2, 0, after, begins.at[1:].set(False))
    np.testing.assert_array_equal(fresh != action, [[True], [False], [False]])


# --- runs ---

CONFIG = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, learning_rate=1e-2, scale_reward=True)
NETWORK = NetworkConfig(hidden=(8,))
QUICK: Any = {"eval_episodes": 5, "wandb": "disabled", "devices": 1, "checkpoint_every": 0.0, "log_every": 2}


def ran(out=None, env: Env = DIARY, steps=96, num_seeds=2, sweep=None, **more):
    run = RunConfig(total_steps=steps, num_seeds=num_seeds, out=out, **{**QUICK, **more})
    return train_population(ppo, CONFIG, actor_critic, NETWORK, run, env=env, sweep=sweep)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "diary"
    return ran(out, sweep={"learning_rate": [1e-2, 3e-3]}), out


def test_a_run_reports_its_episodes_and_seeds_meet_the_same_environments_in_every_setting(finished_run):
    results, out = finished_run
    metrics = read_log(out / "log.jsonl")
    np.testing.assert_array_equal(metrics["env_steps"], np.full((2, 2, 6), 16))
    length = metrics["episode_length"]
    assert ((length >= 2) & (length <= 4)).all()
    first = metrics["episode_return"][:, :, 0]
    np.testing.assert_array_equal(first[0], first[1])
    assert first[0, 0] != first[0, 1]
    assert np.isfinite(results.metrics["policy_loss"]).all()


def test_steps_that_must_join_are_refused_where_a_reset_takes_a_step_of_its_own():
    """Steps beyond an update's T are not recorded there, so that the next update's do not follow its last ones."""
    env = diary(next_step=True)
    rec = Recorder(env, (), N, T, list(range(N)), joined=True)

    def act(t, obs, starts):
        action = np.zeros(obs.shape[:-1], int)
        return action, None, ((), ()), action

    with pytest.raises(UsageError, match=r"takes a step for each reset \(next-step mode\).*AutoresetMode.SAME_STEP"):
        rec.record(act)
    rec.close()


def test_a_checkpoint_holds_no_environment_and_its_agent_evaluates(finished_run):
    results, out = finished_run
    agent = load(out, setting=1, seed=0, env=DIARY)
    assert agent.state.world.envs.env_state == () and not np.any(agent.state.world.envs.obs)
    assert Checkpoints(out, 0).latest() == 6
    expected = results.summary["settings"][1]["finals"][0]
    actor = agent.algorithm.policy(agent.state, False)
    act = jax.jit(lambda turn, t, memory, obs: actor(jax.random.key(t), memory, obs)[:2])
    stats = evaluate_outside(act, actor.memory, DIARY, (), 5, 4, seed=0)
    # Returns differ by the actions alone, half a point a step; the episodes are the same.
    np.testing.assert_allclose(stats.episode_return.mean(), expected, atol=2.0)


def test_the_command_that_evaluates_plays_on_the_host(finished_run, monkeypatch):
    _, out = finished_run
    monkeypatch.setattr("purepg.run.evaluation.load", lambda *arguments: load(*arguments, env=DIARY))
    said = report(Choice(out, setting=0, seed=1, episodes=40))
    ids = [np.random.default_rng(seed_of(1, i)).integers(NUM_IDS) for i in range(40)]
    assert f"length {np.mean([episode_length(id) for id in ids]):.1f};" in said and "40 episodes" in said


@pytest.mark.parametrize("next_step", [False, True])
def test_a_film_shows_the_pictures_of_the_episodes_that_it_counts(finished_run, next_step, monkeypatch):
    """A picture's upper left pixel is (id, t) of its state; where a step that ends an episode begins the next, the last
    picture is that before it."""
    monkeypatch.setattr("purepg.run.films.outside.MAX_FRAMES", 2)
    env = diary(next_step=next_step)

    def render(envs):
        return np.full((4, 4, 3), [int(envs.id[0]) % 256, int(envs.t[0]), 0], np.uint8)

    agent = load(finished_run[1], setting=0, seed=1, env=env._replace(render=render))
    episodes = play_outside(agent, Choice(finished_run[1], episodes=12), 3)
    stats = on_the_host(agent, Choice(finished_run[1], episodes=12), 3, at_once=1)
    ids = [np.random.default_rng(seed_of(1, i)).integers(NUM_IDS) for i in range(12)]
    assert {episode_length(id) for id in ids} == {2, 3, 4}
    for i, (id, episode) in enumerate(zip(ids, episodes, strict=True)):
        length = min(episode_length(id), 3)
        last = length - (episode_length(id) <= 3)
        assert episode.every == 2 and len(episode.reward) == length == stats.episode_length[i]
        assert episode.reward.sum() == stats.episode_return[i]
        assert (episode.terminated, episode.truncated) == (stats.terminated[i], stats.truncated[i])
        assert episode.state[:, 0, 0].tolist() == [[id % 256, t, 0] for t in [*range(0, length, 2), last]]
    assert film(agent.env, episodes, "diary").num_frames == sum(len(range(0, len(x.reward), 2)) + 1 for x in episodes)
    closed = []
    monkeypatch.setattr(Diary, "close", lambda self: closed.append(self))
    check_drawing(agent.env)
    with pytest.raises(UsageError, match=r"^diary cannot be drawn: it is not JAX, and `outside_env` was given no `r"):
        check_drawing(env)
    assert len(closed) == 1


def test_evaluation_counts_each_episode_once_with_its_seed_and_cuts_it_at_max_steps():
    def act(turn, t, memory, obs):
        np.testing.assert_array_equal(memory, np.full(obs.shape[:-1], t))  # begun anew with the episodes of a turn
        return memory + 1, np.zeros(obs.shape[:-1], int)

    def memory(num_envs):
        return np.zeros((2, num_envs), int)

    for next_step in (False, True):
        stats = evaluate_outside(act, memory, diary(next_step=next_step), (2,), 7, 3, seed=4, at_once=3)
        ids = np.array([np.random.default_rng(seed_of(4, i)).integers(NUM_IDS) for i in range(7)])
        length = np.minimum(episode_length(ids), 3)
        cut = episode_length(ids) > 3
        for agent in range(2):
            np.testing.assert_array_equal(stats.episode_length[agent], length)
            np.testing.assert_allclose(stats.episode_return[agent], length * ids + length * (length - 1) / 2)
            np.testing.assert_array_equal(stats.terminated[agent], ~cut & terminates(ids))
            np.testing.assert_array_equal(stats.truncated[agent], cut | truncates(ids))
        assert cut.any() and not cut.all()


def test_a_resumed_run_says_that_its_environments_begin_anew_and_goes_on_from_its_learners(tmp_path, capsys):
    ran(tmp_path, steps=64)
    before = read_log(tmp_path / "log.jsonl")
    state = load(tmp_path, seed=0, env=DIARY).state
    assert np.any(state.world.running_return)
    capsys.readouterr()
    ran(tmp_path, steps=96, resume=True)
    said = capsys.readouterr().err
    assert "diary is not JAX: its environments begin anew, so the result differs from an unstopped run's\n" in said
    after = read_log(tmp_path / "log.jsonl")
    assert after["env_steps"].shape[-1] == 6
    for name, values in before.items():
        np.testing.assert_array_equal(after[name][..., :4], values)


def test_a_resume_resets_the_running_return_that_scales_rewards(finished_run):
    _, out = finished_run
    state = load(out, setting=0, seed=0, env=DIARY).state
    population = OutsidePopulation.__new__(OutsidePopulation)
    population._updates_vary = False
    found = population.with_more_steps(state, 0)
    assert np.any(state.world.running_return) and not np.any(found.world.running_return)
    assert found.learner is state.learner


def test_an_environment_that_fails_ends_the_run_in_one_line_and_loses_no_finished_update(tmp_path):
    made = []

    def make(n):
        made.append(Diary(n, fails_at=3 * 8 + 2))
        return made[-1]

    env = DIARY._replace(outside=make)
    with pytest.raises(UsageError, match=r"^diary failed in step: ValueError: out of ink$"):
        ran(tmp_path, env=env)
    assert [envs.closed for envs in made] == [True]
    assert read_log(tmp_path / "log.jsonl")["env_steps"].shape[-1] == 3  # a block of 2, and half of the next
    assert Checkpoints(tmp_path, 0).latest() == 3
    ran(tmp_path, resume=True)
    assert read_log(tmp_path / "log.jsonl")["env_steps"].shape[-1] == 6


def test_ctrl_c_ends_the_run_after_the_current_update(tmp_path):
    class Pressed(Diary):
        def step(self, action):
            if self.num_steps == 9:
                signal.raise_signal(signal.SIGINT)
            return super().step(action)

    results = ran(tmp_path, env=DIARY._replace(outside=Pressed), log_every=6)
    assert results.interrupted and results.metrics["env_steps"].shape[-1] == 2
    assert Checkpoints(tmp_path, 0).latest() == 2


def test_one_device_is_used_and_said_so_where_more_are_asked_for(capsys):
    configs = {"ppo": CONFIG, "network": NETWORK}
    for source in (DIARY, lambda: DIARY):  # of which the second is not known to be outside before it is made
        for devices in (None, 1):
            run = RunConfig(total_steps=16, num_seeds=2, devices=devices)
            assert prepare(ppo, actor_critic, configs, run, {}, source).num_devices == 1
        assert "device" not in capsys.readouterr().err
    prepare(ppo, actor_critic, configs, RunConfig(total_steps=16, num_seeds=2, devices=2), {}, DIARY)
    assert capsys.readouterr().err == "devices (2): diary is not JAX, so that one device is used\n"


# --- what is refused ---


def test_what_needs_a_compiled_step_is_refused_in_one_line():
    config = {"reinforce": REINFORCEConfig(), "network": NETWORK}
    with pytest.raises(
        UsageError, match=r"^diary is not JAX, and reinforce plays whole episodes .* those that work: a2c"
    ):
        prepare(reinforce, actor_critic, config, RunConfig(total_steps=1000, devices=1), {}, DIARY)
    with pytest.raises(UsageError, match="diary is not JAX, so that no compiled program can step it"):
        evaluate(jax.random.key(0), DIARY, Actor.of(lambda key, obs: jnp.zeros(3, jnp.int32)), 3, 4)
    with pytest.raises(UsageError, match=r"action_repeat \(2\) cannot be set on diary"):
        repeated(DIARY, 2)
    with pytest.raises(UsageError, match=r"max_episode_steps \(3\) cannot be set on diary"):
        time_limited(DIARY, 3)
    with pytest.raises(UsageError, match="has no time limit: set --eval-max-steps"):
        ran(env=DIARY._replace(max_episode_steps=None))
