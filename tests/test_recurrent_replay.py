"""Policies and critics with memory, off the policy: what is replayed in windows is what was acted on, and algorithms
learn from it what cannot be learned without."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import arms_env, quick_jit
from test_recurrence import recall_env

from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.algorithms.off_policy import ReplayLearner, replay_algorithm
from purepg.algorithms.q_actor_critic import QActorCriticConfig, q_actor_critic
from purepg.algorithms.sac import SACConfig, sac
from purepg.algorithms.sac_discrete import DiscreteSACConfig, sac_discrete
from purepg.algorithms.td3 import TD3Config, td3
from purepg.experience.exploration import gaussian_noise
from purepg.networks.actor_critic import ActorQConfig, actor_q
from purepg.optimize import TrainState
from purepg.run.plan import RunConfig, prepare
from purepg.train import averaged, evaluate, train
from purepg.types import Box, Discrete, Env, Following, Moment, UsageError, Window

REAL = Box(-np.ones(1, np.float32), np.ones(1, np.float32))
CELLS = ["gru", "lstm", "lru", "stack", "transformer"]
L, N = 12, 3


def network_of(env: Env, kind: Any, policy: Any, scale: float = 1.0, **more: Any) -> Any:
    config = ActorQConfig(
        policy=policy, hidden=(8,), policy_scale=scale, memory=kind, memory_size=4 if kind else None, **more
    )
    return actor_q(env, config)


# --- the network ---


def mode_and_q(network: Any, params: Any, seen: Any, action: Any) -> Any:
    return quick_jit(lambda *args: (network.apply(*args[:2])[0].mode(), network.q(*args)))(params, seen, action)


@pytest.fixture(scope="module", params=CELLS)
def stepped(request):
    """A network's outputs along L steps of N environments, one step at a time; episodes start at some of them."""
    env = arms_env(Discrete(2)) if request.param == "lstm" else arms_env(REAL)
    network = network_of(env, request.param, "categorical" if request.param == "lstm" else "deterministic")
    obs = jax.random.normal(jax.random.key(0), (L, N, 2))
    starts = jax.random.bernoulli(jax.random.key(1), 0.3, (L, N)).at[0].set(True)
    discrete = isinstance(env.action_space, Discrete)
    action = jnp.ones((L, N), jnp.int32) if discrete else jax.random.uniform(jax.random.key(2), (L, N, 1))

    @quick_jit
    def run():
        params = network.init(jax.random.key(3), Moment(obs[0], network.memory(N)))

        def step(memory, inputs):
            obs, starts, action = inputs
            first = network.memory(N)
            memory = jax.tree.map(lambda x, y: jnp.where(starts.reshape(-1, *[1] * (x.ndim - 1)), x, y), first, memory)
            seen = Moment(obs, memory)
            (distribution, _), after = network.remember(params, seen)
            return after, (memory, after, distribution.mode(), network.q(params, seen, action))

        return params, jax.lax.scan(step, network.memory(N), (obs, starts, action))[1]

    params, (before, after, mode, q) = run()
    seen, action = jax.tree.map(np.asarray, (Window(obs, starts, before), action))
    return network, params, seen, action, after, mode, np.moveaxis(q, 0, 1)


def test_a_window_gives_what_single_steps_give_for_the_policy_and_each_critic(stepped):
    network, params, window, action, _, mode, q = stepped
    assert q.shape == (2, L, N) and np.abs(q[0] - q[1]).max() > 0.1 and np.ptp(q) > 0.1
    for found, expected in zip(mode_and_q(network, params, window, action), (mode, q), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_what_follows_a_window_has_the_memory_after_each_of_its_steps(stepped):
    network, params, window, action, after, _, _ = stepped
    obs = jax.random.normal(jax.random.key(9), window.obs.shape)
    following, moments = (mode_and_q(network, params, x, action) for x in (Following(window, obs), Moment(obs, after)))
    for found, expected in zip(following, moments, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_a_window_after_a_burn_in_begins_with_its_memory_as_a_constant(stepped):
    network, params, window, action, _, _, q = stepped
    b = 5
    rest = jax.tree.map(lambda x: x[b:], window)
    burnt = rest._replace(
        memory=jax.tree.map(lambda x: x[:1], window.memory), burn_in=(window.obs[:b], window.starts[:b])
    )

    @quick_jit
    def gradient(window):
        def loss(params):
            q = network.q(params, window, action[b:])
            return jnp.sum(jnp.square(q)), q

        return jax.grad(loss, has_aux=True)(params)

    (of_burnt, found), (of_rest, _) = gradient(burnt), gradient(rest)
    np.testing.assert_allclose(found, q[:, b:], rtol=0, atol=2e-6)
    # The stored memory of step b is that of these parameters, and a constant.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), of_burnt, of_rest)


def test_a_critic_without_a_cell_reads_the_observations_alone():
    env = arms_env(REAL)
    whole, without = network_of(env, "gru", "deterministic"), network_of(env, None, "deterministic")
    network = whole._replace(critic=without.critic)
    obs, action = jax.random.normal(jax.random.key(0), (L, N, 2)), jnp.ones((L, N, 1))

    @quick_jit
    def run():
        first = network.memory(N)
        params = network.init(jax.random.key(1), Moment(obs[0], first))
        window = Window(obs, jnp.zeros((L, N), bool), jax.tree.map(lambda x: x[None], first))
        following = Following(window, obs + 1)
        (distribution, _), after = network.remember(params, Moment(obs[0], first))
        modes = distribution.mode(), network.apply(params, window)[0].mode()[0]
        with_cells = network.q(params, window, action), network.q(params, following, action)
        alone = without.q(params, obs, action), without.q(params, obs + 1, action)
        return modes, after, list(zip(with_cells, alone, strict=True))

    (mode, mode_of_window), after, pairs = jax.tree.map(np.asarray, run())
    for with_cells, alone in pairs:
        np.testing.assert_array_equal(with_cells, alone)
    np.testing.assert_allclose(mode, mode_of_window, rtol=0, atol=2e-6)
    assert jax.tree.leaves(after["critic"]) == [] and np.any(after["policy"])


def test_a_size_without_a_memory_is_refused():
    with pytest.raises(
        UsageError, match=r"^memory_size \(8\) needs a memory: choose gru, lstm, lru, stack or transformer$"
    ):
        actor_q(arms_env(REAL), ActorQConfig(policy="deterministic", memory_size=8))


def test_a_size_counts_for_each_memory_of_a_sweep():
    configs = {"ddpg": DDPGConfig(warmup_steps=50), "network": ActorQConfig("deterministic", memory_size=8)}
    run = RunConfig("Pendulum-v1", 1000, num_seeds=1, eval_episodes=1, eval_max_steps=1, devices=1)
    plan = prepare(ddpg, actor_q, configs, run, {"memory": ("gru", "lru")})

    def shapes_of(algorithm):
        memory = jax.eval_shape(lambda key: algorithm.policy(algorithm.init(key), True).memory(1), jax.random.key(0))
        return [x.shape for x in jax.tree.leaves(memory["policy"])]

    assert [shapes_of(plan.algorithm_of(h)) for h in (0, 1)] == [[(1, 8)], [(1, 16)]]  # an LRU's states are complex


# --- the buffer ---


@pytest.mark.parametrize("burn_in", [0, 3])
@pytest.mark.parametrize("kind", ["gru", "lru", "transformer"])
def test_windows_from_the_buffer_are_scored_as_the_policy_scored_them_when_it_acted(kind, burn_in):
    """The parameters stay as they are and nothing is random after the warm-up, so that actions tell."""
    env = arms_env(REAL)
    network = network_of(env, kind, "deterministic")
    config: Any = DDPGConfig(
        num_envs=N, num_steps=8, num_gradient_steps=2, batch_size=4 * 6, window=4, burn_in=burn_in,
        capacity=13 * N, warmup_steps=7 * N, normalize_obs=False,
    )  # fmt: skip

    def compare(key, learner, batch, number):
        del key, number
        mode = network.apply(learner.params, batch.obs)[0].mode()
        ended = (batch.terminated | batch.truncated)[:-1]
        next_mode = network.apply(learner.params, batch.next_obs)[0].mode()
        assert mode.shape == (4, 6, 1)
        return learner, {
            "error": jnp.abs(mode - batch.action).max(),
            "next_error": jnp.where(ended[..., None], 0.0, jnp.abs(next_mode[:-1] - mode[1:])).max(),
            "ended": jnp.mean(ended),
            "spread": jnp.ptp(mode),
        }

    exploration = gaussian_noise(network, env, 0.0, 0.0)

    def init_learner(params):
        return ReplayLearner(TrainState(params, ()), params)

    algorithm = replay_algorithm(env, network, config, init_learner, exploration, compare)

    @quick_jit
    def run(key):
        state, _ = train(key, algorithm, algorithm.init(key), 0, 3)  # the ring, of 13 rounds, is written almost twice
        return train(key, algorithm, state, 3, 4)[1]

    metrics = {name: np.asarray(x) for name, x in averaged(run(jax.random.key(0))).items()}
    assert metrics["error"].max() < 2e-6 and metrics["next_error"].max() < 2e-6
    assert metrics["ended"].mean() > 0.2 and metrics["spread"].min() > 0.01


def test_windows_that_do_not_fit_are_refused():
    env = arms_env(REAL)
    network = network_of(env, "gru", "deterministic")
    config: Any = DDPGConfig(batch_size=256)
    for changed, message in [
        ({"batch_size": 100}, r"batch_size \(100\) must be divisible by window \(32\)"),
        (
            {"num_envs": 50, "burn_in": 8},
            r"warmup_steps \(1000\) must be at least num_envs \* \(burn_in \+ window\), 2000",
        ),
    ]:
        with pytest.raises(UsageError, match=message):
            ddpg(env, network, replace(config, **changed))
    with pytest.raises(UsageError, match=r"burn_in \(4\) must be 0 for a network without memory"):
        ddpg(env, network_of(env, None, "deterministic"), replace(config, burn_in=4))


# --- learning ---


REPLAY: Any = {
    "num_envs": 8, "num_steps": 12, "num_gradient_steps": 2, "batch_size": 96, "window": 6, "capacity": 4800,
    "warmup_steps": 192, "policy_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "tau": 0.05,
}  # fmt: skip
FRESH: Any = {"num_envs": 32, "num_steps": 12}
LEARNERS = {
    "sac": (sac, SACConfig(**REPLAY, temperature=0.05, learn_temperature=False), "lru", "tanh_gaussian"),
    "sac_discrete": (
        sac_discrete,
        DiscreteSACConfig(**REPLAY, temperature=0.05, learn_temperature=False),
        "gru",
        "categorical",
    ),
    "td3": (td3, TD3Config(**REPLAY, burn_in=3, exploration_std=0.3), "gru", "deterministic"),
    "ddpg": (ddpg, DDPGConfig(**REPLAY, exploration_std=0.3), "stack", "deterministic"),
    "dpg": (dpg, DPGConfig(**FRESH, exploration_std=0.3, policy_learning_rate=1e-2), "gru", "deterministic"),
    "q_actor_critic": (q_actor_critic, QActorCriticConfig(**FRESH, learning_rate=1e-2), "lstm", "categorical"),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_algorithm_with_a_critic_of_actions_learns_to_recall_a_bit(name):
    """Without memory no policy earns more than a coin: 0.5 of a bit, 0 of a sign."""
    algorithm, config, kind, policy = LEARNERS[name]
    env = recall_env(discrete=policy == "categorical")
    made = algorithm(env, network_of(env, kind, policy, scale=0.01), config)

    @quick_jit
    def run(key):
        state, _ = train(key, made, made.init(key), 0, 60)
        return evaluate(key, env, made.policy(state, True), 200, 3).episode_return.mean()

    assert run(jax.random.key(0)) > 0.9
