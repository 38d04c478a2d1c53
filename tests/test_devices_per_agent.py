"""One agent over several devices: it learns what it learns on one, exchanges little, and deals minibatches uniformly.

The facts are found by this file as a script, in a process with four CPU devices and in float64.
"""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SeparateNetwork, TinyNetwork, TinyQNetwork, arms_env, found_by
from parts.compiled_cost import exchanges_of

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.trpo import TRPOConfig, trpo
from purepg.experience import replay
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.optimize import init_train_state, minibatch_epochs, step_direction
from purepg.run.devices import Spread, prepare_devices
from purepg.run.experiment import train_population
from purepg.run.folder.config import read_summary
from purepg.run.plan import RunConfig, prepare
from purepg.train import averaged, train
from purepg.types import Box, Env, UsageError

N, T, K, KEYS = 4, 6, 3, 3000  # of environments, steps, minibatches and, for the deal, keys
CAPACITY = 16
EPOCHS = 2
UNBOUNDED: Any = Box(np.full(1, -np.inf, np.float32), np.full(1, np.inf, np.float32))
ROLLOUT: Any = {"num_envs": N, "num_steps": 6, "gamma": 0.9}


def in_float64(env: Env, rewards: bool) -> Env:
    """The environment with its observations in float64, and its rewards too unless a replay buffer keeps them."""

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(float), tree)

    def reset(key):
        state, obs = env.reset(key)
        return state, wide(obs)

    def step(key, state, action):
        state, after = env.step(key, state, action)
        return state, after._replace(obs=wide(after.obs), reward=wide(after.reward) if rewards else after.reward)

    return env._replace(reset=reset, step=step)


CASES: dict[str, tuple[Callable, Any, Callable, Env]] = {
    "ppo": (
        ppo,
        PPOConfig(**ROLLOUT, num_epochs=2, num_minibatches=1, normalize_obs=True, scale_reward=True),
        TinyNetwork,
        arms_env()._replace(costly_reset=True),
    ),
    "trpo": (
        trpo,
        TRPOConfig(**ROLLOUT, num_cg_steps=3, num_value_epochs=1, num_value_minibatches=1),
        SeparateNetwork,
        arms_env(),
    ),
    "grpo": (grpo, GRPOConfig(num_prompts=N, group_size=3), TinyNetwork, arms_env()),
    "sac": (
        sac,
        SACConfig(num_envs=N, num_steps=3, batch_size=16, capacity=CAPACITY, warmup_steps=4, normalize_obs=True),
        lambda space: TinyQNetwork("tanh_gaussian"),
        arms_env(UNBOUNDED),
    ),
}


PLACES = [(name, devices) for name in CASES for devices in (1, 2 if name == "ppo" else 4)]

# --- in a process of its own ---


def spread(function: Callable, devices: int) -> tuple[Any, str]:
    """(the result, the compiled program) of one agent's `function(key)` on so many devices."""
    whole = jax.jit(Spread(1, 1, devices, devices)(lambda hyper, s: function(jax.random.fold_in(jax.random.key(0), s))))
    arguments = {"unused": {"float": jnp.zeros(1)}}, jnp.zeros(1, jnp.int32)
    compiled = whole.lower(*arguments).compile()
    return jax.tree.map(lambda x: np.asarray(x[0, 0]), compiled(*arguments)), compiled.as_text() or ""


def two_updates(name: str, **changes: Any) -> Callable:
    """The learner and the metrics of an algorithm after two updates."""
    algorithm, config, network, env = CASES[name]
    made = algorithm(
        in_float64(env, rewards=algorithm is not sac), network(env.action_space), replace(config, **changes)
    )

    def run(key):
        k_init, k_train = jax.random.split(key)
        state, metrics = train(k_train, made, made.init(k_init), 0, 2)
        return state.learner, metrics

    return run


def in_order(key: Any, buffer: Any, batch_size: int, num_filled: Any) -> Any:
    """In place of `replay.sample`: the whole buffer, one environment after another, so that no deal is left."""
    del key, num_filled
    return replay.take(buffer, jnp.arange(batch_size).reshape(CAPACITY // N, -1).T.ravel())


def deals(key: Any) -> Any:
    """For many keys, the number of the minibatch in which every step was dealt, `[KEYS, EPOCHS, T, N]`, by plain
    gradient steps of which the i-th adds 10^i to the parameter of each of its steps."""
    index = jnp.arange(T * N).reshape(T, N)
    first = init_train_state(sgd := step_direction("sgd", None), (jnp.zeros(T * N), jnp.zeros(())))

    def loss(params, dealt):
        x, i = params
        return -jnp.sum(x[dealt]) * jax.lax.stop_gradient(10**i) - i, {}

    def deal(key):
        return minibatch_epochs(key, loss, sgd, 1.0, first, index, EPOCHS, K)[0].params[0]

    digits = jax.vmap(deal)(jax.random.split(key, KEYS))[:, None] // 10 ** jnp.arange(EPOCHS * K)[:, None] % 10
    return digits.reshape(KEYS, EPOCHS, K, T, N)


def find(folder: Path) -> None:
    """Writes the results and the compiled programs, by name and number of devices, and two runs of a population."""
    found = {}
    with jax.enable_x64(True):
        for name, devices in PLACES:
            replay.sample, sample = in_order if name == "sac" else replay.sample, replay.sample
            found[name, devices] = spread(two_updates(name), devices)
            replay.sample = sample
        found["minibatches", 2] = spread(two_updates("ppo", num_minibatches=2, normalize_advantage="off"), 2)
        found["deals", 2] = spread(deals, 2)
    (folder / "found").write_bytes(pickle.dumps(found))

    config = DDPGConfig(num_envs=N, num_steps=3, batch_size=4, capacity=CAPACITY, warmup_steps=4)
    network = ActorQConfig("deterministic", hidden=(4,))
    sizes: Any = {"num_seeds": 2, "devices": 4, "devices_per_agent": 2, "log_every": 1, "wandb": "disabled"}
    run = RunConfig("Pendulum-v1", 48, eval_episodes=2, eval_max_steps=3, **sizes)
    for out, total_steps, resume in ("whole", 48, False), ("resumed", 24, False), ("resumed", 48, True):
        now = replace(run, out=folder / out, total_steps=total_steps, resume=resume)
        train_population(ddpg, config, actor_q, network, now)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    find(Path(sys.argv[1]))


# --- what it found ---


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    return found_by(__file__, folder) | {"folder": folder}


@pytest.mark.parametrize("name, devices", [place for place in PLACES if place[1] > 1])
def test_two_updates_are_those_of_one_device_to_1e_12(found, name, devices):
    """In float64, from the same random numbers: parameters, optimiser's states, normalisers' moments, all metrics."""
    (learner, metrics), _ = found[name, 1]
    (spread_learner, spread_metrics), _ = found[name, devices]
    assert any(x.dtype == np.float64 for x in jax.tree.leaves(learner))
    one, several = (learner, averaged(metrics)), (spread_learner, averaged(spread_metrics))
    assert jax.tree.structure(one) == jax.tree.structure(several)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        exact = 1e-12 if x.dtype == np.float64 else 1e-6  # counts, and what is kept in float32
        np.testing.assert_allclose(y, x, rtol=exact, atol=exact)


@pytest.mark.parametrize("name, devices", [place for place in PLACES if place[1] > 1])
def test_devices_exchange_sums_and_nothing_else(found, name, devices):
    assert {x.kind for x in exchanges_of(found[name, devices][1])} == {"all-reduce"}


def test_a_gradient_step_exchanges_gradients_and_means_once_and_a_rollout_nothing(found):
    """Of the loops of PPO's updates, only that over minibatches, in the one over epochs, exchanges anything: for each
    parameter that the loss uses its gradient, and the loss's metrics, policy_loss, value_loss and approx_kl."""
    (learner, _), program = found["minibatches", 2]
    params = [x for name, x in learner.train_state.params.items() if name != "log_std"]  # actions are discrete
    (step,) = [x for x in exchanges_of(program) if len(x.trips) > 1]
    assert step.trips == (2, 2, 2) and step.times == 8  # updates, epochs and minibatches
    assert step.num_bytes == 8 * (sum(x.size for x in params) + 3)


def test_a_gradient_step_of_policy_and_critic_is_one_exchange_each(found):
    """SAC's rounds of acting and learning are one loop: they exchange nothing but the two sums of gradients."""
    rounds = [x.trips for x in exchanges_of(found["sac", 4][1]) if len(x.trips) > 1]
    assert rounds == 2 * [(2, 3)]


def test_each_device_deals_its_own_steps_uniformly(found):
    """Every epoch deals each step once; a minibatch takes as many from each device; two steps of one device meet as
    often as in a uniform deal of that device's steps, and two of different devices as if dealt independently."""
    dealt, devices = found["deals", 2][0].astype(int), 2
    assert (dealt.sum(2) == 1).all()
    by_device = dealt.reshape(KEYS, EPOCHS, K, T, devices, N // devices).sum((3, 5))
    assert (by_device == T * N // devices // K).all()
    np.testing.assert_allclose(dealt.mean((0, 1)), 1 / K, atol=0.04)

    steps = dealt.swapaxes(3, 4).reshape(-1, T * N)  # a row for each minibatch; a device's steps are together
    meet = K * (steps.T @ steps) / len(steps)
    of_device = T * N // devices
    same = np.kron(np.eye(devices), np.ones((of_device, of_device))).astype(bool)
    expected = np.where(same, (of_device // K - 1) / (of_device - 1), 1 / K)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(meet, expected, atol=0.04)  # the two differ by 0.06, and the estimates by 0.006
    # Another epoch, and another device, has another deal.
    first, second = steps.reshape(KEYS, EPOCHS, K, T * N).swapaxes(0, 1)
    np.testing.assert_allclose((first * second).sum(1).mean(0), 1 / K, atol=0.05)


def test_a_run_on_several_devices_resumes_bit_for_bit(found):
    """Two agents on two devices each, whose replay buffers are divided."""
    config = json.loads((found["folder"] / "whole" / "config.json").read_text())
    assert len(config["devices"]) == 4 and config["run"]["devices_per_agent"] == 2
    whole, resumed = (np.load(found["folder"] / out / "metrics.npz") for out in ("whole", "resumed"))
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name], err_msg=name)
    finals = [read_summary(found["folder"] / out)["settings"][0]["finals"] for out in ("whole", "resumed")]
    assert finals[0] == finals[1]


# --- what is refused ---


@pytest.fixture
def four_devices(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)


@pytest.mark.parametrize(
    "algorithm, config, sizes, expected",
    [
        (ppo, PPOConfig(num_envs=6), {}, r"num_envs \(6\) must be divisible by devices_per_agent \(4\)"),
        (grpo, GRPOConfig(num_prompts=6), {}, r"num_prompts \(6\) must be divisible by devices_per_agent \(4\)"),
        (
            *(grpo, GRPOConfig(num_prompts=4, skip_groups_without_signal=True, max_rounds=2), {}),
            r"max_rounds \(2\) must be 1 with devices_per_agent \(4\)",
        ),
        (reinforce, REINFORCEConfig(num_episodes=2), {}, r"num_episodes \(2\) must be divisible by"),
        (sac, SACConfig(num_envs=4, batch_size=6), {}, r"batch_size \(6\) must be divisible by devices_per_agent"),
        (clone, CloneConfig(), {}, r"devices_per_agent \(4\) must be 1: clone has no environments to spread"),
        (
            *(ppo, PPOConfig(num_envs=4, num_steps=2, num_minibatches=8), {}),
            r"num_envs \* num_steps \(8\) must be divisible by num_minibatches \(8\) times devices_per_agent \(4\)",
        ),
        (ppo, PPOConfig(), {"devices": 2}, r"devices \(2\) must be divisible by devices_per_agent \(4\)"),
        (ppo, PPOConfig(), {"devices": 8}, r"devices \(8\) / devices_per_agent \(4\) must divide num_seeds \(1\)"),
        (ppo, PPOConfig(), {"devices_per_agent": 8}, r"devices_per_agent \(8\) must be at most 4"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(four_devices, algorithm, config, sizes, expected):
    configs = {algorithm.__name__: config, "network": NetworkConfig()}
    run = RunConfig(**{"num_seeds": 1, "devices_per_agent": 4, "compile_cache": False} | sizes)
    with pytest.raises(UsageError, match=expected):
        prepare(algorithm, actor_critic, configs, run, {})


def test_an_environment_that_is_not_jax_refuses_several_devices(four_devices):
    outside = arms_env()._replace(outside=lambda num: None, name="diary")
    for source in (outside, lambda: outside):  # of which the second is not known to be outside before it is made
        with pytest.raises(UsageError, match=r"devices_per_agent \(2\) must be 1: diary is not JAX"):
            run = RunConfig(devices_per_agent=2, compile_cache=False)
            prepare(ppo, actor_critic, {"ppo": PPOConfig(), "network": NetworkConfig()}, run, {}, source)


def test_agents_share_the_devices_that_are_left(four_devices):
    assert prepare_devices(None, 6, 1, per_agent=2) == 4
    assert prepare_devices(None, 5, 1, per_agent=2) == 2
    assert prepare_devices(None, 5, 1, per_agent=4) == 4
