"""`reward_scale`: what is learned is learned from rewards times a constant; what is reported is not."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SeparateNetwork, TinyQNetwork, arms_env, equations, moments_of, quick_jit

from purepg.algorithms.a2c import A2CConfig, a2c
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.on_policy import collect
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.train import averaged, train
from purepg.types import Box, Discrete, Env, State, UsageError

REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
SCALE = 3.0
STEPS: dict[str, Any] = {"num_envs": 4, "num_steps": 6, "gamma": 0.8}
REPLAY: dict[str, Any] = {"num_envs": 4, "num_steps": 6, "batch_size": 8, "capacity": 96, "warmup_steps": 8}
CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "a2c": (a2c, A2CConfig(**STEPS, learning_rate=0.1, max_grad_norm=None), Discrete(2), SeparateNetwork(Discrete(2))),
    "q_actor_critic": (
        q_actor_critic,
        QActorCriticConfig(**STEPS, learning_rate=0.1),
        Discrete(2),
        TinyQNetwork("categorical"),
    ),
    "ddpg": (ddpg, DDPGConfig(**REPLAY, policy_learning_rate=0.1), REAL, TinyQNetwork("deterministic")),
}


def paying(env: Env, factor: Any) -> Env:
    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(reward=factor * time_step.reward)

    return env._replace(step=step)


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_on_an_environment_that_pays_as_much_more_and_returns_stay_raw(name):
    algorithm, config, actions, network = CASES[name]

    @quick_jit
    def run(key, factor, scale):
        made = algorithm(paying(arms_env(actions), factor), network, replace(config, reward_scale=scale))
        state, metrics = train(key, made, made.init(key), jnp.int32(0), 2)
        return state.learner.params, metrics

    key = jax.random.key(0)
    found = [run(key, *scales) for scales in ((1.0, SCALE), (SCALE, 1.0), (1.0, 1.0))]
    scaled, paid, plain = [params for params, _ in found]
    of_scaled, of_paid, of_plain = [averaged(jax.device_get(metrics))["episode_return"] for _, metrics in found]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), scaled, paid)
    np.testing.assert_allclose(SCALE * of_scaled, of_paid, rtol=1e-5)
    assert of_scaled[0] == of_plain[0] > 0  # of the same first policy, before anything is learned
    difference = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (scaled, plain)), strict=True)]
    assert max(difference) > 1e-2  # the scale does matter


def test_the_constant_multiplies_what_scale_reward_leaves():
    env, network = arms_env(), SeparateNetwork(Discrete(2))
    config = A2CConfig(**STEPS, scale_reward=True)

    @quick_jit
    def rewards(key):
        learner, world, _ = a2c(env, network, config).init(key)
        state = State(learner._replace(return_moments=moments_of(jnp.float32(1), jnp.float32(4), 10)), world)
        return [
            (data.reward, after.learner.return_moments)
            for c in (config, replace(config, reward_scale=SCALE))
            for data, after, _ in [collect(key, env, network, c, state)]
        ]

    (once, moments), (scaled, same_moments) = rewards(jax.random.key(0))
    assert once.max() == 0.5  # a reward of 1, and a deviation of 2
    np.testing.assert_allclose(scaled, SCALE * once, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, moments, same_moments)  # its statistics are those of raw returns


@pytest.mark.parametrize("name", CASES)
def test_without_it_an_update_has_no_operation_more(name):
    algorithm, config, actions, network = CASES[name]
    counts = []
    for c in (config, replace(config, reward_scale=SCALE)):
        made = algorithm(arms_env(actions), network, c)
        state = jax.eval_shape(made.init, jax.random.key(0))
        counts.append(sum(e.primitive.name == "mul" for e in equations(made.step, jax.random.key(0), state, 0)))
    assert counts[1] == counts[0] + 1


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(value):
    with pytest.raises(UsageError, match=r"^reward_scale \(.*\) must be above 0"):
        a2c(arms_env(), SeparateNetwork(Discrete(2)), A2CConfig(reward_scale=value))
