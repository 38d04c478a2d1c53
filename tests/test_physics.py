"""Physics in JAX, on a stand-in for the suites' interface: what becomes of a simulation that blows up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from purepg.envs.suites.physics import _physics, _Picture

BLOWS_UP = 3  # the step


class State(NamedTuple):
    t: Any
    obs: Any
    reward: Any
    done: Any
    metrics: Any


class Simulator:
    """Observes the number of the step, which is also the reward; never says that it is done."""

    action_size = 1

    def __init__(self, broken: float, where: str):
        self.broken, self.where = broken, where

    def reset(self, key):
        zero = jnp.float32(0)
        return State(jnp.int32(0), jnp.zeros(2), zero, zero, {"speed": zero})

    def step(self, state, action):
        t = state.t + 1
        x = t.astype(jnp.float32)
        bad = jnp.where(t >= BLOWS_UP, self.broken, x)
        obs = jnp.stack([x, bad if self.where == "obs" else x])
        reward = bad if self.where == "reward" else x
        return State(t, obs, reward, jnp.float32(0), {"speed": bad})


def test_a_step_that_is_not_finite_terminates_with_finite_numbers_and_the_steps_before_are_unchanged():
    for broken, where in ((np.nan, "obs"), (np.inf, "reward"), (-np.inf, "obs")):
        env = _physics(Simulator(broken, where), "simulator", 10, None)
        step, (state, _) = jax.jit(env.step), jax.jit(env.reset)(jax.random.key(0))
        for t in range(1, BLOWS_UP + 1):
            state, found = step(jax.random.key(0), state, jnp.zeros(1))
            assert bool(found.terminated) == (t == BLOWS_UP) and not found.truncated
            bad = {"obs": t, "reward": t} | ({where: 0} if t == BLOWS_UP else {})
            np.testing.assert_array_equal(found.obs, [t, bad["obs"]])
            assert found.reward == bad["reward"]
            assert found.info["speed"] == (1 + 2) / 3 if t == BLOWS_UP else np.isfinite(found.info["speed"])


def test_the_clock_truncates_at_its_step_and_a_picture_is_drawn_of_the_suites_own_state():
    env = _physics(Simulator(np.nan, "nowhere"), "simulator", 2, lambda state: state[0].obs)
    assert env.max_episode_steps == 2 and env.render is not None
    state, _ = env.reset(jax.random.key(0))
    for t in (1, 2, 3):
        state, found = jax.jit(env.step)(jax.random.key(0), state, jnp.zeros(1))
        assert bool(found.truncated) == (t >= 2) and not found.terminated
        np.testing.assert_array_equal(env.render(state), [t, t])


def test_a_picture_has_the_target_where_the_reset_put_it():
    mujoco = pytest.importorskip("mujoco")
    body = '<body name="{}" {}><geom size=".1"/>{}</body>'
    bodies = body.format("target", 'mocap="true"', "") + body.format("ball", "", "<freejoint/>")
    model = mujoco.MjModel.from_xml_string(f"<mujoco><worldbody>{bodies}</worldbody></mujoco>")
    ball, target = np.array([1.0, 2, 3, 1, 0, 0, 0]), np.array([[4.0, 5, 6]])
    data = _Picture("balls", model, lambda state: state).posed({"qpos": ball, "mocap_pos": target})
    np.testing.assert_array_equal(data.body("ball").xpos, ball[:3])
    np.testing.assert_array_equal(data.body("target").xpos, target[0])
