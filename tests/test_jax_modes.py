"""Every algorithm under JAX's own checks, in wider types and on trees of observations: no NaN, no key used twice, no
dtype that drifts, and the same learning whatever an observation is packed in."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SeparateNetwork, TinyNetwork, TinyQNetwork, arms_env, quick_jit
from test_algorithms import CASES, Case

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.ddpg import ddpg
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.npg import npg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reward_model import RewardConfig, reward_model
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.td3 import td3
from purepg.algorithms.trpo import trpo
from purepg.config import float_fields
from purepg.envs.named_tasks import addition
from purepg.envs.tasks import token_env
from purepg.language.model import LanguageModelConfig, language_model
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.networks.memory import MemoryKind
from purepg.train import averaged, evaluate, guard, train
from purepg.types import Box


def num_options(name: str) -> int:
    """How many fields of a case's config are not the default."""
    config = CASES[name].config
    return sum(getattr(config, field) != default for field, default in vars(type(config)()).items())


EACH = {  # of each algorithm the case with the most options
    case.algorithm.__name__: max((n for n, c in CASES.items() if c.algorithm is case.algorithm), key=num_options)
    for case in CASES.values()
}
TOKENS: dict[str, tuple[Any, Any]] = {
    "clone": (clone, CloneConfig(batch_size=4, num_held_out=0)),
    "dpo": (dpo, DPOConfig(batch_size=4, num_pairs=4, num_held_out=0)),
    "reward_model": (reward_model, RewardConfig(batch_size=4, num_pairs=4, num_held_out=4)),
}


def endless(case: Case):
    """A case's environment, of which no episode ends by itself."""
    env = arms_env(case.action_space)
    return env._replace(step=lambda key, state, action: env.step(key, state._replace(t=jnp.int32(0)), action))


class Cast:
    """A network whose parameters are of another dtype."""

    def __init__(self, network: Any, dtype: Any):
        self._network, self._dtype = network, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def init(self, key: Any, obs: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(self._dtype), self._network.init(key, obs))


def network_of(case: Case) -> Any:
    if case.q_network:
        return TinyQNetwork(case.q_network)
    return (SeparateNetwork if case.algorithm in (npg, trpo) else TinyNetwork)(case.action_space)


def two_updates(algorithm, key):
    """(first state, last state, metrics), where the budget of a member whose updates vary in length is one update."""
    algorithm = guard(algorithm, algorithm.update_steps.most)
    k_init, k_train = jax.random.split(key)
    first = algorithm.init(k_init)
    return first, *train(k_train, algorithm, first, 0, 2)


@pytest.mark.parametrize("name", [*EACH, *TOKENS])
def test_a_healthy_program_makes_no_nan_and_uses_no_key_twice(name):
    """Where no episode has ended, before learning begins, and after a member has spent its budget too."""
    if name in TOKENS:
        make, config = TOKENS[name]
        env = token_env(addition(1))
        size = LanguageModelConfig(
            hidden_size=4, num_layers=1, num_heads=1, num_kv_heads=1, mlp_size=4, value_head=True
        )
        algorithm = make(env, language_model(env, size), config)
    else:
        case = CASES[EACH[name]]
        algorithm = case.algorithm(endless(case), network_of(case), case.config)
    with jax.debug_nans(True), jax.debug_key_reuse(True):
        _, state, metrics = quick_jit(lambda key: two_updates(algorithm, key))(jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.learner, metrics)))
    found = averaged(metrics)
    if name in TOKENS:
        assert "episode_return" not in found
    else:
        assert np.isnan(found["episode_return"][1])  # as the host says of an update in which no episode ended


@pytest.mark.parametrize("name", EACH)
def test_every_algorithm_keeps_its_dtypes_where_jax_has_64_bits(name):
    """In float32, beside environments and schedules that are in float64 then, and in float64; floats swept or not."""
    case = CASES[EACH[name]]
    env = arms_env(case.action_space)

    def run(key, update, hyper, dtype):
        algorithm = case.algorithm(env, Cast(network_of(case), dtype), replace(case.config, **hyper))
        first, last, _ = two_updates(algorithm, key)
        stepped, _ = algorithm.step(key, algorithm.init(key), update)  # by a loop that counts in int64
        return first, last, stepped, evaluate(key, env, algorithm.policy(stepped, False), 2, 4)

    with jax.enable_x64(True):
        swept = {field: jnp.asarray(getattr(case.config, field)) for field in float_fields(case.config)}
        for dtype, hyper in ((jnp.float32, swept), (jnp.float64, {})):
            shapes = jax.eval_shape(partial(run, dtype=dtype), jax.random.key(0), jnp.int64(0), hyper)
            first, last, stepped, _ = jax.tree.map(lambda x: x.dtype, shapes)
            assert first == last
            assert first.learner == stepped.learner
            assert set(jax.tree.leaves(stepped.learner.params)) == {jnp.dtype(dtype)}


@pytest.mark.parametrize("kind", get_args(MemoryKind))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_memory_keeps_its_dtypes_where_64_bits_are_enabled(kind, dtype):
    env = arms_env(Box(-np.ones(1, np.float32), np.ones(1, np.float32), np.float32))
    size: Any = {"hidden": (4,), "memory": kind, "memory_size": 2}
    on_rollouts: Any = ppo, actor_critic, NetworkConfig(**size), PPOConfig(num_envs=2, num_steps=4, num_minibatches=1)
    replay: Any = {"num_envs": 2, "capacity": 64, "batch_size": 4, "window": 4, "burn_in": 2, "warmup_steps": 16}
    from_replay: Any = sac, actor_q, ActorQConfig(policy="tanh_gaussian", **size), SACConfig(**replay)
    with jax.enable_x64(True):
        for make, network, of_network, config in (on_rollouts, from_replay):
            algorithm = make(env, Cast(network(env, of_network), dtype), config)
            first, last, _ = jax.eval_shape(partial(two_updates, algorithm), jax.random.key(0))
            assert jax.tree.map(lambda x: x.dtype, first) == jax.tree.map(lambda x: x.dtype, last)
            assert {x.dtype for x in jax.tree.leaves(last.learner.params)} == {jnp.dtype(dtype)}


# --- observations that are trees ---


def packed(env):
    """The same environment, whose two observed numbers come in a dict, one in an array of its own shape."""

    def pack(obs):
        return {"first": obs[:1].reshape(1, 1), "second": obs[1:]}

    def reset(key):
        state, obs = env.reset(key)
        return state, pack(obs)

    def step(key, state, action):
        state, time_step = env.step(key, state, action)
        return state, time_step._replace(obs=pack(time_step.obs))

    low, high = env.observation_space.low, env.observation_space.high
    space = {"first": Box(low[:1].reshape(1, 1), high[:1].reshape(1, 1)), "second": Box(low[1:], high[1:])}
    return env._replace(reset=reset, step=step, observation_space=space)


POLICY: dict[Any, Any] = {ddpg: "deterministic", td3: "deterministic", sac: "tanh_gaussian"}


@pytest.mark.parametrize("algorithm", [ppo, sac])
def test_an_observation_in_a_dict_teaches_what_the_same_numbers_teach_in_an_array(algorithm):
    """But for rounding; running statistics included."""
    case = CASES[EACH[algorithm.__name__]]
    config = replace(case.config, normalize_obs=True)
    parameters = []
    for env in (arms_env(case.action_space), packed(arms_env(case.action_space))):
        if case.q_network:
            network = actor_q(env, ActorQConfig(hidden=(4,), policy=POLICY[algorithm]))
        else:
            network = actor_critic(env, NetworkConfig(hidden=(4,)))
        made = algorithm(env, network, config)
        first, last, _ = quick_jit(lambda key, made=made: two_updates(made, key))(jax.random.key(0))
        parameters.append((first.learner.params, last.learner.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *parameters)
    moved = jax.tree.map(lambda before, after: np.any(before != after), *parameters[0])
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", EACH)
def test_every_algorithm_takes_an_observation_in_a_dict(name):
    case = CASES[EACH[name]]
    env = packed(arms_env(case.action_space))
    if case.q_network:
        network = actor_q(env, ActorQConfig(hidden=(4,), policy=case.q_network))
    else:
        network = actor_critic(env, NetworkConfig(hidden=(4,)))
    algorithm = case.algorithm(env, network, case.config)
    first, last, _ = jax.eval_shape(lambda key: two_updates(algorithm, key), jax.random.key(0))
    assert first == last
