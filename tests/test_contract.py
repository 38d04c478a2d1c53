"""What an environment promises, and the units of its actions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TinyNetwork, TinyQNetwork, arms_env, quick_jit

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.envs.contract import check_environment, in_units
from purepg.experience.rollout import episodes, reset_all, rollout
from purepg.run.films.episodes import play
from purepg.train import evaluate
from purepg.types import Actor, Box, Discrete, Env, TimeStep, UsageError


def box(low: Any, high: Any) -> Box:
    return Box(np.array(low, np.float32), np.array(high, np.float32))


@pytest.mark.parametrize(
    ("space", "action", "taken"),
    [
        (box([-2.0, 0.0], [2.0, 10.0]), [[-9.0, -1.0], [0.5, 0.5], [1.0, 9.0]], [[-2.0, 0.0], [1.0, 7.5], [2.0, 10.0]]),
        (box([-2.0, -np.inf], [np.inf, 3.0]), [[-9.0, -9.0], [0.5, 0.5], [9.0, 9.0]], [[-2, -9], [0.5, 0.5], [9, 3]]),
        (box([-np.inf], [np.inf]), [[-9.0], [9.0]], [[-9.0], [9.0]]),
        (Discrete(3), [0, 2], [0, 2]),
    ],
)
def test_a_bounded_box_is_scaled_to_and_what_bounds_there_are_hold(space, action, taken):
    np.testing.assert_array_equal(in_units(space, jnp.array(action)), taken)


def paid_env() -> Env:
    """Actions in [-2, 6], each paid what it is, in episodes of one step."""

    def reset(key):
        del key
        return jnp.int32(0), jnp.zeros(1)

    def step(key, state, action):
        del key
        return state, TimeStep(jnp.zeros(1), action[0], jnp.bool_(True), jnp.bool_(False))

    return Env(reset, step, box([-1.0], [1.0]), box([-2.0], [6.0]), 1)


def test_whoever_steps_an_environment_does_so_in_its_units_and_keeps_the_canonical_action():
    env, canonical = paid_env(), jnp.array([[-3.0], [-1.0], [0.0], [0.5], [1.0], [3.0]])
    actor = Actor(lambda key, obs: None, lambda noise, memory, obs: (memory, canonical, jnp.zeros(6)))

    @quick_jit
    def run(key):
        return (
            rollout(key, env, actor, reset_all(key, env, 6), 1)[1][1:4:2],
            episodes(key, env, actor, 6, 1).trajectory[1:4:2],
            (canonical[None], evaluate(key, env, actor, 6, 1).episode_return[None]),
        )

    key = jax.random.key(0)
    filmed = np.stack([episode.reward for episode in play(key, env, lambda _: actor, None, 6, 1)], axis=1)
    for action, reward in [*run(key), (canonical[None], filmed)]:
        np.testing.assert_array_equal(action[0], canonical)
        np.testing.assert_array_equal(reward[0], [-2, -2, 2, 4, 6, 6])


def altered(**changes: Any) -> Env:
    """An environment with a tree for an observation, whose step gives something else in places."""

    def reset(key):
        del key
        return {"t": jnp.int32(0)}, {"x": jnp.zeros(2), "seen": jnp.zeros((), bool)}

    def step(key, state, action):
        given = {"state": {"t": state["t"] + 1}, "obs": reset(key)[1], "reward": action[0] * 1.0} | changes
        flags = given.get("terminated", jnp.bool_(False)), given.get("truncated", jnp.bool_(False))
        return given["state"], TimeStep(given["obs"], given["reward"], *flags)

    spaces: Any = {"x": box([-1.0, -1.0], [1.0, 1.0]), "seen": Discrete(2)}
    return Env(reset, step, changes.get("observation_space", spaces), box([-1.0], [1.0]), 1, "Altered")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"obs": {"x": np.zeros(2, jnp.bfloat16), "seen": False}}, "obs['x'] must have dtype float32, but has bf"),
        ({"obs": {"x": np.zeros(2), "seen": np.zeros(1, bool)}}, "obs['seen'] must have shape (), but has (1,)"),
        ({"obs": {"x": np.zeros(2)}}, "its step's obs['seen'] must be there, but is not"),
        ({"state": {"t": np.float32(0)}}, "its step's state['t'] must have dtype int32, but has float32"),
        ({"state": {"t": np.int32(0), "u": 0}}, "its step's state['u'] must not be there, but is"),
        ({"reward": np.zeros(1)}, "its step's reward must have shape (), but has (1,)"),
        ({"reward": np.int32(1)}, "its step's reward must have dtype float, but has int32"),
        ({"terminated": np.float32(0)}, "its step's terminated must have dtype bool, but has float32"),
        ({"truncated": np.zeros(1, bool)}, "its step's truncated must have shape (), but has (1,)"),
        (
            {"observation_space": {"x": Discrete(2), "seen": Discrete(2)}},
            "reset's obs['x'] must have shape (), but has (2,)",
        ),
    ],
)
def test_what_differs_between_reset_and_step_is_said_in_one_line(changes, says):
    check_environment(altered())
    with pytest.raises(UsageError, match=r"^Altered: its ") as error:
        check_environment(altered(**changes))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_reset_and_step_give_is_named_where_it_is_no_pair():
    env = altered()
    with pytest.raises(
        UsageError, match="its reset must return a pair, a state and an observation, but returns a dict"
    ):
        check_environment(env._replace(reset=lambda key: env.reset(key)[1]))
    with pytest.raises(UsageError, match="its step must return a state and a TimeStep, but returns a tuple"):
        check_environment(env._replace(step=lambda *args: (args[1], tuple(env.step(*args)[1]))))
    with pytest.raises(UsageError, match="its action space must be Discrete, MultiDiscrete or a Box of floats"):
        check_environment(env._replace(action_space=Box(np.zeros(1, int), np.ones(1, int), np.int32)))


def test_every_kind_of_algorithm_and_an_evaluation_refuse_an_environment_whose_step_changes_a_dtype():
    toy = arms_env(box([-1.0], [1.0]))

    def step(key, state, action):
        state, time_step = toy.step(key, state, action)
        return state, time_step._replace(obs=time_step.obs.astype(jnp.float16))

    env = toy._replace(step=step)
    network, critics = TinyNetwork(env.action_space), TinyQNetwork("tanh_gaussian")
    same = Actor.of(lambda key, obs: obs[:, :1])
    for make in (
        lambda: a2c(env, network, A2CConfig()),
        lambda: sac(env, critics, SACConfig()),
        lambda: reinforce(env, network, REINFORCEConfig()),
        lambda: grpo(env, network, GRPOConfig()),
        lambda: jax.eval_shape(lambda key: evaluate(key, env, same, 2, 4), jax.random.key(0)),
    ):
        with pytest.raises(UsageError, match="toy: its step's obs must have dtype float32, but has float16"):
            make()


def test_an_environment_is_traced_once_however_often_it_is_checked():
    env, calls = altered(), []

    def step(key, state, action):
        calls.append(1)
        return env.step(key, state, action)

    for _ in range(3):
        check_environment(env._replace(step=step, name="a copy"))
    jax.eval_shape(lambda: check_environment(env._replace(step=step)))
    assert len(calls) == 1
