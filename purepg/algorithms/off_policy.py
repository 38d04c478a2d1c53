"""What the algorithms with a replay buffer share: their state, the rounds of acting and learning that make an update,
and SAC's temperature. An algorithm's own file has its exploration and `learn`, its gradient steps on a batch.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from purepg.algorithms.configs import ReplayConfig, TemperatureConfig
from purepg.config import check_dealt
from purepg.envs.contract import check_environment
from purepg.equations.distributions import Categorical, Distribution
from purepg.equations.losses import squared_error
from purepg.experience import normalize, replay, rollout
from purepg.experience.acting import evaluation_policy
from purepg.experience.exploration import Exploration, random_actor
from purepg.experience.normalize import Moments
from purepg.experience.rollout import RolloutState
from purepg.lanes import select, step_if, step_where
from purepg.loops import alone, scan
from purepg.networks.actor_critic import output, refuse_multi_discrete
from purepg.optimize import TrainState, gradient_step, init_halves, init_train_state
from purepg.runtime import compiles_for_gpu
from purepg.spread import num_devices, own_key, within_device
from purepg.types import (
    Actor,
    Algorithm,
    Array,
    Discrete,
    Env,
    Explorer,
    Key,
    Mean,
    Memory,
    Metrics,
    Params,
    QNetwork,
    State,
    Step,
    Transition,
    UpdateSteps,
    UsageError,
    Window,
    following,
    has_memory,
    observed,
    seen,
)


class ReplayLearner(NamedTuple):
    train_state: TrainState  # in halves, {"policy", "critic"}
    target: Params  # the target networks, in the same halves; no policy where the policy has no target network
    log_temperature: TrainState | None = None  # SAC's log alpha; None where the temperature is fixed
    obs_moments: Moments | None = None

    @property
    def params(self) -> Params:
        return self.train_state.params


class ReplayWorld(NamedTuple):
    envs: RolloutState
    noise: Any  # of the last step's exploration, [N, ...]
    buffer: Transition  # leaves [capacity, ...]


# learn(key, learner, batch, number of the gradient step) -> (learner, metrics)
Learn = Callable[[Key, ReplayLearner, Transition, Array], tuple[ReplayLearner, Metrics]]


def replay_algorithm(
    env: Env,
    network: QNetwork,
    c: ReplayConfig,
    init_learner: Callable[[Params], ReplayLearner],
    exploration: Exploration,
    learn: Learn,
    period: int = 1,
) -> Algorithm:
    """The algorithm whose update is `num_steps` rounds. A round is one step of every environment, followed by
    `num_gradient_steps` calls of `learn`, each on a batch of its own.

    Until the buffer holds `warmup_steps` transitions, actions are random and nothing is learned. Each metric is a
    `Mean` over the gradient steps. Memory sees the observations of the warm-up too.

    Args:
      learn: takes batches `[B, ...]`, or in windows `[L, B / L, ...]`, with normalised observations and rewards times
        `reward_scale`, and the number of its gradient step. The number is exact modulo `period` only, because it
        starts again from 0 before int32 overflows. With memory, `obs` is a `Window` and `next_obs` a `Following`.
    Raises:
      UsageError: `normalize_obs` is on and an observation is a category, `capacity` is smaller than `warmup_steps` or
        no multiple of `num_envs`, or windows do not fit the minibatch or the warm-up.
    """
    check_environment(env)
    if c.normalize_obs:
        normalize.check_space(env)
    c = _with_windows(c, network)
    cycle, at_random = _cycle(c, period), random_actor(env)

    def draw_noise(key, obs):
        k_noise, k_random = jax.random.split(key)
        return exploration.noise(k_noise, obs), at_random.noise(k_random, obs)

    def init(key):
        k_params, k_world, k_noise = jax.random.split(key, 3)
        envs = rollout.reset_all(k_world, env, c.num_envs, exploration.memory)
        learner = init_learner(network.init(k_params, envs.seen))
        obs = jax.tree.map(lambda x: x[0], envs.obs)
        learner = learner._replace(obs_moments=normalize.init(obs, env.observation_space) if c.normalize_obs else None)
        first_noise, random = draw_noise(k_noise, envs.obs)
        _, action, _ = at_random.act(random, (), envs.obs)
        flag, reward = jnp.bool_(False), jnp.float32(0)
        before = seen(obs, flag, jax.tree.map(lambda x: x[0], envs.memory))
        example = Transition(before, jax.tree.map(lambda x: x[0], action), None, reward, flag, flag, obs)
        return State(learner, ReplayWorld(envs, first_noise, replay.init(example, c.capacity)))

    act = _acting(env, c, exploration)

    def explore(key, learner, carry, update, t, obs, starts):
        (noise, memory), fresh = carry, draw_noise(key, obs)
        noise = exploration.carry(noise, fresh[0], starts)
        before = select(starts, exploration.memory(c.num_envs), memory)
        num_rounds = _rounds_before(c, update) + jnp.minimum(t, c.num_steps - 1)
        after, action = act(learner, noise, fresh[1], num_rounds, before, obs)
        return action, None, (before, after), (noise, after)

    def nothing_yet(obs):
        shapes = jax.eval_shape(lambda: draw_noise(jax.random.key(0), obs)[0])
        return jax.tree.map(jnp.zeros_like, shapes), exploration.memory(c.num_envs)

    env_steps = c.num_envs * c.num_steps
    step = _rounds(env, c, exploration, draw_noise, act, learn, cycle)
    explorer = Explorer(c.num_envs, c.num_steps, nothing_yet, explore, joined=c.window is not None)
    return Algorithm(init, step, evaluation_policy(network), UpdateSteps(env_steps, env_steps), explorer)


def _with_windows(c: ReplayConfig, network: QNetwork) -> ReplayConfig:
    """The config; a `window` of None is 32 with memory. Raises UsageError where windows do not fit."""
    if not has_memory(network) and c.burn_in:
        raise UsageError(f"burn_in ({c.burn_in}) must be 0 for a network without memory")
    window = c.window or (32 if has_memory(network) else None)
    if window:
        check_dealt("batch_size", c.batch_size, window, "window")
    if window and c.warmup_steps < (least := c.num_envs * (c.burn_in + window)):
        raise UsageError(
            f"warmup_steps ({c.warmup_steps}) must be at least num_envs * (burn_in + window), {least}, so that the "
            "buffer holds a whole window when learning begins"
        )
    return replace(c, window=window)


def _cycle(c: ReplayConfig, period: int) -> int:
    """After how many updates the numbers of rounds may start again from 0: all that depends on a round's number depends
    on it modulo this many updates. Raises UsageError where the capacity does not fit."""
    if c.capacity % c.num_envs or c.capacity < c.warmup_steps:
        raise UsageError(
            f"capacity ({c.capacity}) must be a multiple of num_envs ({c.num_envs}), and at least warmup_steps "
            f"({c.warmup_steps})"
        )
    cycle = math.lcm(c.num_steps, c.capacity // c.num_envs, period) // c.num_steps
    if (cycle + 1) * c.num_steps * c.num_gradient_steps > jnp.iinfo(jnp.int32).max:
        raise UsageError(
            f"capacity ({c.capacity}) must be a multiple of num_envs * num_steps ({c.num_envs * c.num_steps}), or "
            "share more factors with it, so that the position of an update in the buffer can be counted in int32"
        )
    return cycle


def _rounds_before(c: ReplayConfig, update: Array) -> Array:
    """How many rounds came before an update, up to a full ring, so that int32 can count them."""
    T, ring = c.num_steps, c.capacity // c.num_envs
    return jnp.minimum(update, -(-ring // T)) * T


def _acting(env: Env, c: ReplayConfig, exploration: Exploration) -> Callable[..., tuple[Memory, Array]]:
    """`act(learner, noise, random, num_rounds, memory, obs)`: (memory, the action, random in the warm-up's rounds)."""
    warmup_rounds, at_random = -(-c.warmup_steps // c.num_envs), random_actor(env)

    def act(learner, noise, random, num_rounds, memory, obs):
        memory, action = exploration.act(learner.params, noise, memory, normalize.apply(learner.obs_moments, obs))
        _, uniform, _ = at_random.act(random, (), obs)
        return memory, jnp.where(num_rounds < warmup_rounds, uniform, action)

    return act


def _rounds(
    env: Env,
    c: ReplayConfig,
    exploration: Exploration,
    draw_noise: Callable[[Key, Any], Any],
    act: Callable[..., tuple[Memory, Array]],
    learn: Learn,
    cycle: int,
) -> Step:
    """The step of `replay_algorithm`."""
    N, T, G = c.num_envs, c.num_steps, c.num_gradient_steps
    warmup_rounds = -(-c.warmup_steps // N)
    step_unless_cold = step_where if compiles_for_gpu() else step_if

    def gradient_step(learner, inputs):
        key, batch, number = inputs
        obs, next_obs = (normalize.apply(learner.obs_moments, x) for x in (batch.obs, batch.next_obs))
        reward = normalize.times(c.reward_scale, batch.reward)
        learner, metrics = learn(key, learner, batch._replace(obs=obs, reward=reward, next_obs=next_obs), number)
        return learner, {name: x if isinstance(x, Mean) else Mean.of(x) for name, x in metrics.items()}

    def learn_on(learner, batches, keys, first):
        return scan(gradient_step, learner, (keys, batches, first + jnp.arange(G, dtype=jnp.int32)), join=False)

    def step(key, state, update):
        k_draw, k_sample, k_learn = jax.random.split(key, 3)
        draws = rollout.draw(k_draw, env, draw_noise, state.world.envs, T)
        k_sample, k_learn = jax.random.split(k_sample, (T, G)), jax.random.split(k_learn, (T, G))
        # Below, `number` is the round's number modulo a cycle, and `num_rounds` how many rounds came before it, up to a
        # full ring. Both follow from the update, which a population shares, so branches are cheap.
        first_round, rounds_before = update % cycle * T, _rounds_before(c, update)

        def round(carry, inputs):
            learner, (envs, noise, buffer), finished = carry
            r, draws, k_sample, k_learn = inputs
            number, num_rounds = first_round + r, rounds_before + r
            noise = exploration.carry(noise, draws.noise[0], envs.episode_length == 0)

            def act_now(draws, memory, obs):
                return *act(learner, noise, draws[1], num_rounds, memory, obs), None

            envs, transition, finished_now = rollout.step(
                env, Actor(draw_noise, act_now, exploration.memory), envs, draws
            )
            transition = transition._replace(next_obs=observed(transition.next_obs))
            if not c.bootstrap_at_truncation:
                transition = rollout.truncation_as_termination(transition)
            buffer = within_device(replay.add, (0, 0, None), 0)(buffer, transition, number)

            num_filled = replay.num_filled(buffer, num_rounds + 1, N)
            batches = jax.vmap(lambda key: _sample(key, c, buffer, number, num_filled))(k_sample)
            warm = num_rounds + 1 >= warmup_rounds
            learner, metrics = step_unless_cold(warm, learn_on, learner, batches, k_learn, number * G)
            carry = (learner, ReplayWorld(envs, noise, buffer), finished + finished_now)
            return carry, (metrics, observed(transition.obs) if c.normalize_obs else jnp.zeros(()))

        carry = (state.learner, state.world, rollout.none_finished(env, N))
        rounds = (jnp.arange(T, dtype=jnp.int32), draws, k_sample, k_learn)
        but_the_buffer: Any = (True, True, False)
        join = alone(), ReplayWorld(*but_the_buffer), True
        (learner, world, finished), (metrics, obs) = scan(round, carry, rounds, join=join)
        if c.normalize_obs:
            learner = learner._replace(obs_moments=normalize.update(learner.obs_moments, obs))
        info = rollout.episode_info(env, finished, jnp.int32(T * N))
        return State(learner, world), info | jax.tree.map(jnp.sum, metrics)

    return step


def _sample(key: Key, c: ReplayConfig, buffer: Any, newest: Array, num_filled: Array) -> Transition:
    """A minibatch, `[B, ...]` or in windows `[L, B / L, ...]`, of which each device draws an equal part from its own
    environments' transitions."""
    D = num_devices()
    own = replace(c, num_envs=c.num_envs // D, batch_size=c.batch_size // D)

    def sample(key, buffer, newest, num_filled):
        return _own_sample(own_key(key), own, buffer, newest, num_filled)

    axis = 0 if c.window is None else 1
    return within_device(sample, (None, 0, None, None), axis)(key, buffer, newest, num_filled // D)


def _own_sample(key: Key, c: ReplayConfig, buffer: Any, newest: Array, num_filled: Array) -> Transition:
    if c.window is None:
        return replay.sample(key, buffer, c.batch_size, num_filled)
    slots = replay.windows(key, buffer, c.num_envs, c.burn_in + c.window, c.batch_size // c.window, newest, num_filled)
    if not isinstance(buffer.obs, Window):
        return replay.take(buffer, slots)
    memory = replay.take(buffer.obs.memory, slots[:1])  # the only one that is read
    before = replay.take((buffer.obs.obs, buffer.obs.starts), slots[: c.burn_in]) if c.burn_in else None
    batch = replay.take(buffer._replace(obs=buffer.obs._replace(memory=())), slots[c.burn_in :])
    obs = batch.obs._replace(memory=memory, burn_in=before)
    return batch._replace(obs=obs, next_obs=following(obs, batch.next_obs))


def require(env: Env, network: QNetwork, algorithm: str, kinds: dict[str, type[Distribution]]) -> None:
    """Raises UsageError where the network's policy is none of `kinds`, keyed by their names in `ActorQConfig`, where
    the environment's actions are not of that kind or are MultiDiscrete, or where the network has no critic Q(s, a)."""
    refuse_multi_discrete(env, algorithm)
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


def critic_step(
    network: QNetwork,
    tx: optax.GradientTransformation,
    c: ReplayConfig,
    critic: TrainState,
    batch: Transition,
    target: Array,
) -> tuple[TrainState, Metrics]:
    """phi_k <- phi_k - lr * E[ grad (Q_k(s, a) - target)^2 / 2 ] for each critic, one gradient step."""

    def loss(critic, batch):
        transition, target = batch
        q = network.q({"critic": critic}, transition.obs, transition.action)
        loss = squared_error(q, jnp.broadcast_to(target, q.shape)).mean()
        return loss, {"loss": loss, "q": q.mean()}

    return gradient_step(loss, tx, c.critic_learning_rate, critic, (batch, target))


def soft_learner(tx: optax.GradientTransformation, c: TemperatureConfig, params: Params) -> ReplayLearner:
    """SAC's first learner: only the critics have target networks, and the temperature may be learned."""
    log_alpha = init_train_state(tx, jnp.log(jnp.float32(c.temperature))) if c.learn_temperature else None
    return ReplayLearner(init_halves(tx, params), {"critic": params["critic"]}, log_alpha)


def temperature_step(
    tx: optax.GradientTransformation, c: TemperatureConfig, log_alpha: TrainState | None, excess_entropy: Array
) -> TrainState | None:
    """log alpha <- log alpha - lr * (entropy - target entropy); None where the temperature is fixed."""
    if log_alpha is None:
        return None

    def loss(log_alpha, excess_entropy):
        return log_alpha * excess_entropy, {}

    return gradient_step(loss, tx, c.temperature_learning_rate, log_alpha, excess_entropy)[0]
