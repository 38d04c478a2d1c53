"""What the algorithms with a replay buffer share: their state, and the rounds of acting and learning of an update.

An algorithm's own file has its exploration and `learn`, its gradient steps on a batch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.algorithms.configs import ReplayConfig
from purepg.envs.contract import check_environment
from purepg.equations.distributions import Categorical, Distribution
from purepg.experience import normalize, replay, rollout
from purepg.experience.acting import evaluation_policy
from purepg.experience.exploration import Exploration, random_action
from purepg.experience.normalize import Moments
from purepg.experience.rollout import RolloutState
from purepg.networks.actor_critic import output
from purepg.optimize import TrainState
from purepg.types import (
    Algorithm,
    Array,
    Discrete,
    Env,
    Key,
    Mean,
    Metrics,
    Params,
    QNetwork,
    State,
    Transition,
    UpdateSteps,
    UsageError,
)


class Learner(NamedTuple):
    train_state: TrainState  # in halves
    target: Params  # what targets are computed from, in the same halves; no policy where it has no target
    log_temperature: TrainState | None = None  # of SAC, where it is learned
    obs_moments: Moments | None = None

    @property
    def params(self) -> Params:
        return self.train_state.params


class World(NamedTuple):
    envs: RolloutState
    noise: Any  # of the last step's exploration, [N, ...]
    buffer: Transition  # leaves [capacity, ...]


Learn = Callable[[Key, Learner, Transition, Array], tuple[Learner, Metrics]]  # (key, learner, batch, gradient step)
INT32_MAX = 2**31 - 1


def assemble(
    env: Env,
    network: QNetwork,
    c: ReplayConfig,
    init_learner: Callable[[Params], Learner],
    exploration: Exploration,
    learn: Learn,
    period: int = 1,
) -> Algorithm:
    """The algorithm whose update is `num_steps` rounds, each of them one step of every environment and then
    `num_gradient_steps` times `learn`, each on a batch of its own.

    Until the buffer holds `warmup_steps` transitions, actions are random and nothing learns. Metrics are a `Mean` over
    the gradient steps.

    Args:
      learn: reads batches `[B, ...]` with normalised observations, and the number of its gradient step, which is right
        up to a multiple of `period`: it starts again from 0 before int32 overflows.
    Raises:
      UsageError: categories to be normalised, or a capacity that the environments do not divide or the warm-up exceeds.
    """
    check_environment(env)
    if c.normalize_obs:
        normalize.check_space(env)
    if c.capacity % c.num_envs or c.capacity < c.warmup_steps:
        raise UsageError(
            f"capacity ({c.capacity}) must be a multiple of num_envs ({c.num_envs}), and at least warmup_steps "
            f"({c.warmup_steps})"
        )
    N, T, G = c.num_envs, c.num_steps, c.num_gradient_steps
    warmup_rounds, ring = -(-c.warmup_steps // N), c.capacity // N
    # Rounds are counted up to a multiple of what reads them, and, where it matters how many there were, up to a full
    # ring. Both depend on the update's number alone, so a population shares them and what depends on them is a branch.
    cycle = math.lcm(T, ring, period) // T  # updates
    if (cycle + 1) * T * G > INT32_MAX:
        raise UsageError(
            f"capacity ({c.capacity}) must be a multiple of num_envs * num_steps ({N * T}), or share more factors with "
            "it, so that an update's place in the buffer can be counted"
        )

    def draw_noise(key, obs):
        k_noise, k_random = jax.random.split(key)
        return exploration.noise(k_noise, obs), random_action(k_random, env, N)

    def init(key):
        k_params, k_world, k_noise = jax.random.split(key, 3)
        envs = rollout.start(k_world, env, N)
        learner = init_learner(network.init(k_params, envs.obs))
        obs = jax.tree.map(lambda x: x[0], envs.obs)
        learner = learner._replace(obs_moments=normalize.init(obs) if c.normalize_obs else None)
        first_noise, action = draw_noise(k_noise, envs.obs)
        flag, reward = jnp.bool_(False), jnp.float32(0)
        example = Transition(obs, jax.tree.map(lambda x: x[0], action), None, reward, flag, flag, obs)
        return State(learner, World(envs, first_noise, replay.init(example, c.capacity)))

    def learn_on(learner, batches, keys, first):
        def gradient_step(learner, inputs):
            key, batch, number = inputs
            obs, next_obs = (normalize.apply(learner.obs_moments, x) for x in (batch.obs, batch.next_obs))
            learner, metrics = learn(key, learner, batch._replace(obs=obs, next_obs=next_obs), number)
            return learner, {name: x if isinstance(x, Mean) else Mean.of(x) for name, x in metrics.items()}

        return jax.lax.scan(gradient_step, learner, (keys, batches, first + jnp.arange(G, dtype=jnp.int32)))

    def step(key, state, update):
        k_draw, k_sample, k_learn = jax.random.split(key, 3)
        draws = rollout.draw(k_draw, env, draw_noise, state.world.envs, T)
        k_sample, k_learn = jax.random.split(k_sample, (T, G)), jax.random.split(k_learn, (T, G))
        first_round, rounds_before = update % cycle * T, jnp.minimum(update, -(-ring // T)) * T

        def round(carry, inputs):
            learner, (envs, noise, buffer), finished = carry
            r, draws, k_sample, k_learn = inputs
            number, num_rounds = first_round + r, rounds_before + r

            noise = exploration.carry(noise, draws.noise[0], envs.episode_length == 0)

            def act(draws, obs):
                action = exploration.act(learner.params, noise, normalize.apply(learner.obs_moments, obs))
                return jnp.where(num_rounds < warmup_rounds, draws[1], action), None

            envs, transition, finished_now = rollout.step(env, act, envs, draws)
            if not c.bootstrap_at_truncation:
                transition = rollout.truncation_as_termination(transition)
            buffer = replay.add(buffer, transition, number)

            num_filled = replay.num_filled(buffer, num_rounds + 1, N)
            batches = jax.vmap(lambda key: replay.sample(key, buffer, c.batch_size, num_filled))(k_sample)
            shapes = jax.eval_shape(learn_on, learner, batches, k_learn, number)[1]

            def wait(learner, *_):
                return learner, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

            learner, metrics = jax.lax.cond(
                num_rounds + 1 >= warmup_rounds, learn_on, wait, learner, batches, k_learn, number * G
            )
            carry = (learner, World(envs, noise, buffer), finished + finished_now)
            return carry, (metrics, transition.obs if c.normalize_obs else jnp.zeros(()))

        carry = (state.learner, state.world, jnp.zeros(3))
        (learner, world, finished), (metrics, obs) = jax.lax.scan(
            round, carry, (jnp.arange(T, dtype=jnp.int32), draws, k_sample, k_learn)
        )
        if c.normalize_obs:
            learner = learner._replace(obs_moments=normalize.update(learner.obs_moments, obs))
        info = rollout.episode_info(finished, jnp.int32(T * N))
        return State(learner, world), info | jax.tree.map(jnp.sum, metrics)

    def policy(state, deterministic):
        return evaluation_policy(network, state.learner.params, deterministic, state.learner.obs_moments)

    return Algorithm(init, step, policy, UpdateSteps(N * T, N * T))


def require(env: Env, network: QNetwork, algorithm: str, kinds: dict[str, type[Distribution]]) -> None:
    """Raises UsageError where a network's policy is none of `kinds`, given by the names that `ActorQConfig` has, where
    the environment's actions are not of that kind, or where the network scores no actions."""
    policy, _ = output(env, network)
    if not isinstance(policy, tuple(kinds.values())):
        raise UsageError(
            f"{algorithm} needs a policy of kind {' or '.join(kinds)}; that of this network on {env.name} is a "
            f"{type(policy).__name__}"
        )
    if isinstance(policy, Categorical) != isinstance(env.action_space, Discrete):
        space = type(env.action_space).__name__
        raise UsageError(f"a {type(policy).__name__} policy does not fit {env.name}, whose actions are a {space}")
    if not hasattr(network, "q"):
        raise UsageError(f"{algorithm} needs a critic Q(s, a), which this network has not; one of actor_q has")
