"""A population on the host: which settings share a program, how it is split, and that no split changes a result."""

import jax
import numpy as np
import pytest

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.envs import make as make_env
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.devices import most_devices
from purepg.run.launch import launch
from purepg.run.plan import RunConfig, prepare
from purepg.run.population import Population
from purepg.run.sweep import Chunk, Program, chunks, grid, programs
from purepg.types import Algorithm, UpdateSteps, UsageError

STEPS = 4 * 16


def sized(shortest, longest):
    """Makes algorithms of which only the updates' length is looked at."""

    def unused(*_):
        raise AssertionError

    return lambda configs: Algorithm(unused, unused, unused, UpdateSteps(shortest, longest))


def agents(num_settings, num_seeds, num_updates=1, one_length=True):
    """A chunk of all agents of a program of which only the sizes are looked at."""
    program = Program((), tuple(range(num_settings)), {}, {}, num_updates, UpdateSteps(8, 8 if one_length else 9))
    return Chunk(program, slice(0, num_settings), slice(0, num_seeds))


CONFIGS = {
    "ppo": PPOConfig(num_envs=2, num_steps=8, num_epochs=2, num_minibatches=2, learning_rate=1e-2),
    "network": NetworkConfig(hidden=(8,)),
}


@pytest.fixture(scope="module")
def env():
    return make_env("CartPole-v1", {"max_steps_in_episode": 20})


@pytest.fixture(scope="module")
def plan(env):
    """Settings x seeds, and how they are trained."""

    def plan(sweep, num_seeds=2, log_every=2, max_parallel=None):
        sizes = {"num_seeds": num_seeds, "max_parallel": max_parallel, "log_every": log_every, "devices": 1}
        run = RunConfig(total_steps=STEPS, eval_episodes=4, **sizes)
        return prepare(ppo, actor_critic, CONFIGS, run, sweep, env)

    return plan


@pytest.fixture(scope="module")
def run(plan):
    """Trains a plan and gives its parts, metrics and numbers of updates."""

    def train(*arguments, **sizes):
        results = launch(plan(*arguments, **sizes), "test")
        return results.parts, results.metrics, results.num_updates

    return train


@pytest.fixture(scope="module")
def swept(run):
    """The metrics of four settings of two seeds, all at once."""
    return run({"learning_rate": [1e-2, 3e-3], "gamma": [0.9, 0.99]})[1]


def test_a_split_population_agrees_with_the_whole_to_rounding(run, swept):
    """Into the single agents: its settings and its seeds in turns."""
    assert swept["policy_loss"].shape == (4, 2, 4)
    _, split, _ = run({"learning_rate": [1e-2, 3e-3], "gamma": [0.9, 0.99]}, max_parallel=1)
    assert split.keys() == swept.keys()
    for name in swept:
        np.testing.assert_allclose(split[name], swept[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_seeds_differ_and_are_the_same_for_every_setting(swept):
    first_returns = swept["episode_return"][:, :, 0]
    for of_setting in first_returns[1:]:
        np.testing.assert_array_equal(of_setting, first_returns[0])
    assert first_returns[0, 0] != first_returns[0, 1]


def test_static_settings_are_trained_apart_and_padded_to_one_length(run):
    parts, metrics, num_updates = run({"num_steps": [8, 16]})
    assert [part.chunk.program.settings for part in parts] == [(0,), (1,)]
    np.testing.assert_array_equal(num_updates, [4, 2])
    np.testing.assert_array_equal(metrics["env_steps"][:, 0], [[16, 16, 16, 16], [32, 32, np.nan, np.nan]])
    assert np.isnan(metrics["policy_loss"][1, :, 2:]).all() and np.isfinite(metrics["policy_loss"][1, :, :2]).all()


@pytest.fixture(scope="module")
def diverging(plan):
    """`diverging(learning_rate)`: the metrics of four settings, at another learning rate if one is given; otherwise the
    last two have one of 1e38. The policy's layer starts far smaller in the first and third than in the others."""
    swept = plan({"learning_rate": [1e-2, 1e38], "policy_scale": [1e-9, 10.0]})
    (chunk,) = swept.chunks()
    population, (hyper, seeds) = Population(swept, chunk.program, chunk.shape), chunk.members

    def train(learning_rate=None):
        members = hyper, seeds
        if learning_rate is not None:
            own = hyper["ppo"]
            rates = jax.numpy.full_like(own["learning_rate"], learning_rate)
            members = {**hyper, "ppo": {**own, "learning_rate": rates}}, seeds
        return jax.device_get(population.advance(members, population.init(members), 0, 4)[1])

    return train


def test_a_diverged_setting_is_frozen_and_leaves_the_others_bit_identical(diverging):
    # A step of 1e38 overflows a parameter: the injected infinity.
    healthy, metrics = diverging(1e-2), diverging()
    assert metrics["finite"][:2].all() and not metrics["finite"][2:].any()
    for found, expected in zip(*map(jax.tree.leaves, (metrics, healthy)), strict=True):
        np.testing.assert_array_equal(found[:2], expected[:2])
        np.testing.assert_array_equal(expected[2:], expected[:2])


def test_a_float_of_any_config_is_swept_inside_one_program(diverging):
    entropy = diverging()["entropy"][:, :, 0]
    assert (entropy[0] > entropy[1]).all()


def test_settings_that_differ_in_floats_share_a_program():
    settings = grid(CONFIGS, {"gamma": [0.9, 0.99], "hidden": [(4,), (8,)], "target_kl": [None, 0.01, 0.02]})
    assert len(settings) == 12
    found = programs(settings, sized(16, 16), STEPS)
    assert sorted(len(program.settings) for program in found) == [2, 2, 4, 4]
    for program in found:
        for h, gamma in zip(program.settings, program.hyper["ppo"]["gamma"], strict=True):
            assert np.float32(settings[h].hyperparameters["gamma"]) == gamma
            assert settings[h].configs["network"].hidden == program.configs["network"].hidden


@pytest.mark.parametrize("shortest, longest, total, expected", [(16, 16, 64, 4), (16, 16, 79, 4), (1, 10, 20, 11)])
def test_the_number_of_updates_is_the_most_that_the_budget_can_hold(shortest, longest, total, expected):
    (program,) = programs(grid(CONFIGS, {}), sized(shortest, longest), total)
    assert program.num_updates == expected
    # An update may begin while the longest one still fits.
    assert (expected - 1) * shortest + longest <= total < expected * shortest + longest


def test_a_budget_below_one_update_is_refused():
    with pytest.raises(UsageError, match=r"total_steps \(15\) must be at least 16"):
        programs(grid(CONFIGS, {}), sized(16, 16), 15)


@pytest.mark.parametrize("num_updates", [1, 7, 96, 97, 100])
@pytest.mark.parametrize("log_every", [0, 1, 5, 10, 200])
@pytest.mark.parametrize("one_length", [True, False])
def test_blocks_cover_the_run_in_at_most_two_lengths(num_updates, log_every, one_length):
    lengths = agents(1, 1, num_updates, one_length).block_lengths(log_every)
    assert sum(lengths) == num_updates if one_length else sum(lengths) >= num_updates
    assert max(lengths) <= (log_every or num_updates) and len(set(lengths[:-1])) <= 1
    if log_every and log_every < num_updates:
        assert min(lengths[:-1]) >= log_every / 2


def test_blocks_divide_the_run_where_they_can():
    assert agents(1, 1, 96, True).block_lengths(10) == [8] * 12


@pytest.mark.parametrize(
    "num_settings, num_seeds, at_most", [(3, 4, None), (3, 4, 12), (3, 4, 5), (3, 4, 8), (2, 7, 3)]
)
def test_chunks_hold_every_member_once_and_no_more_than_allowed(num_settings, num_seeds, at_most):
    count = np.zeros((num_settings, num_seeds), int)
    for chunk in chunks(agents(num_settings, num_seeds).program, num_seeds, at_most):
        assert count[chunk.place].size <= (at_most or num_settings * num_seeds)
        count[chunk.place] += 1
    assert (count == 1).all()


def test_devices_divide_the_seeds_or_the_settings():
    assert most_devices(8, 16, 1) == 8
    assert most_devices(8, 5, 1) == 5
    assert most_devices(4, 5, 6) == 3
    assert most_devices(4, 5, 7) == 1
