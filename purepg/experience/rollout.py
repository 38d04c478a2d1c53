"""Experience from a policy: `rollout` (fixed length, resets where an episode ends) and `episodes` (whole, masked).

All environments that take actions are reset in this module: by `reset_all` before the first step, and by `step` where
an episode ends. Other modules call `Env.reset` only for an example of an observation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.envs.contract import in_units
from purepg.equations.distributions import executed
from purepg.lanes import any_lane, select
from purepg.loops import scan
from purepg.spread import within_device
from purepg.types import (
    Actor,
    Array,
    Env,
    EpisodeMetrics,
    Key,
    Mean,
    Memory,
    Metrics,
    Obs,
    Transition,
    Window,
    moment,
    no_memory,
    seen,
)

SMALL_RESET_BYTES = 256
STEPS_PER_ITERATION = 8  # of a rollout's loop on a GPU
COSTLY_RESETS_AT_ONCE = 1 / 64  # of the environments; see `restart`


class RolloutState(NamedTuple):
    """N running environments; leaves are `[N, ...]`."""

    env_state: Any  # or a `Recording`
    obs: Obs
    episode_return: Array  # raw reward so far in the running episode
    episode_length: Array
    memory: Memory = ()  # the policy's, before it sees `obs`

    @property
    def seen(self) -> Any:
        """What a network is applied to before the first step: the observations, or a `Moment`."""
        return moment(self.obs, self.memory)


class Recording(NamedTuple):
    """T steps of N environments that were taken outside of the program. Where it stands in place of
    `RolloutState.env_state`, `rollout` and `step` return these steps instead of taking any."""

    trajectory: Transition  # leaves [T, N, ...]; the memory before the first step is [1, N, ...]
    finished: Array  # [T, 3 + K], as `step` returns it


def reset_all(key: Key, env: Env, num_envs: int, memory: Callable[[int], Memory] = no_memory) -> RolloutState:
    """Resets N environments, each with its own key, and the memory of the policy that will act in them."""
    env_state, obs = within_device(jax.vmap(env.reset), (0,), 0)(jax.random.split(key, num_envs))
    return RolloutState(env_state, obs, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32), memory(num_envs))


class Draws(NamedTuple):
    """All random numbers of T steps of N environments, drawn before the first step; leaves are `[T, ...]`."""

    noise: Any  # the policy's random numbers
    k_step: Any  # keys [T, N]
    reset: Any  # [T, N, ...], a fresh environment for every step, or only the key to reset it
    recorded: Recording | None = None  # the steps themselves, if they have been taken already


def draw(key: Key, env: Env, noise: Callable[[Key, Obs], Any], world: RolloutState, num_steps: int) -> Draws:
    """Draws the random numbers of `num_steps` steps.

    If resets are small, they are computed here in one batch, which is far cheaper than drawing a few random numbers in
    every step of a loop. Large ones would take too much memory.
    """
    num_envs = world.episode_return.shape[0]
    k_act, k_step, k_reset = jax.random.split(key, 3)
    noise = jax.vmap(noise, in_axes=(0, None))(jax.random.split(k_act, num_steps), world.obs)
    if isinstance(world.env_state, Recording):
        return Draws(noise, None, None, world.env_state)
    reset = jax.random.split(k_reset, (num_steps, num_envs))
    if _resets_are_small(env):
        reset = within_device(jax.vmap(jax.vmap(env.reset)), (1,), 1)(reset)
    return Draws(noise, jax.random.split(k_step, (num_steps, num_envs)), reset)


def step(env: Env, actor: Actor, world: RolloutState, draws: Draws) -> tuple[RolloutState, Transition, Array]:
    """Steps N environments once and resets those whose episode ends.

    Args:
      draws: this step's random numbers, without a time axis.
    Returns:
      (world, transition, finished). `finished` `[3 + K, N]` is, for the episodes that ended in this step, the return,
        the length and one, and the K `Env.metrics`, and 0 elsewhere; `episode_info` takes the sum over steps. (Summed
        over environments at every step, it would cost a GPU several kernels.)
    """
    if draws.recorded is not None:
        finished = jnp.zeros_like(none_finished(env, world.episode_return.shape[0]))
        return world, draws.recorded.trajectory, finished.at[:, 0].set(draws.recorded.finished)
    memory, action, log_prob = actor.act(draws.noise, world.memory, world.obs)
    taken = in_units(env.action_space, executed(action))
    env_state, time_step = within_device(jax.vmap(env.step), (0, 0, 0), 0)(draws.k_step, world.env_state, taken)
    next_obs, reward, terminated, truncated, info = time_step
    before, after = seen(world.obs, world.episode_length == 0, world.memory), moment(next_obs, memory)
    transition = Transition(before, action, log_prob, reward, terminated, truncated, after)

    ended = terminated | truncated
    episode_return, episode_length = world.episode_return + reward, world.episode_length + 1
    of_episode = episode_return, episode_length, jnp.ones_like(ended), *(info[name] for name in env.metrics)
    finished = jnp.stack([jnp.where(ended, x, 0).astype(jnp.float32) for x in of_episode])
    own_restart = within_device(partial(restart, env), (0, 0, 0), 0)
    env_state, obs = own_restart(ended, draws.reset, (env_state, next_obs))
    memory = select(ended, actor.memory(ended.shape[0]), memory)
    episode_return, episode_length = jnp.where(ended, 0.0, episode_return), jnp.where(ended, 0, episode_length)
    return RolloutState(env_state, obs, episode_return, episode_length, memory), transition, finished


def restart(env: Env, ended: Array, reset: Any, current: tuple[Any, Obs]) -> tuple[Any, Obs]:
    """Replaces every environment whose episode ended by a fresh one.

    Cheap resets are computed for all N environments, and selected. Where `env.costly_reset`, a loop resets N / 64
    environments at a time (at least one), and runs only as often as the episodes that ended require. Both use the same
    keys, so that they give the same environments; no two environments ever share a fresh state.

    Args:
      ended: `[N]`.
      reset: the step's `Draws.reset`.
      current: (environment states, observations) before any reset, leaves `[N, ...]`.
    """
    if not env.costly_reset:
        return select(ended, reset if _resets_are_small(env) else jax.vmap(env.reset)(reset), current)
    N = ended.shape[0]
    K = max(1, int(COSTLY_RESETS_AT_ONCE * N))
    num_ended = jnp.sum(ended, dtype=jnp.int32)
    (order,) = jnp.nonzero(ended, size=N, fill_value=N)  # the ended environments, then N, where nothing is written

    def reset_some(carry):
        i, current = carry
        index = order.at[i * K + jnp.arange(K)].get(mode="fill", fill_value=N)
        fresh = jax.vmap(env.reset)(reset[jnp.minimum(index, N - 1)])
        return i + 1, jax.tree.map(lambda x, new: x.at[index].set(new, mode="drop"), current, fresh)

    return jax.lax.while_loop(lambda carry: any_lane(carry[0] * K < num_ended), reset_some, (jnp.int32(0), current))[1]


def rollout(
    key: Key, env: Env, actor: Actor, world: RolloutState, num_steps: int
) -> tuple[RolloutState, Transition, Metrics]:
    """Takes `num_steps` steps in N environments, starting a new episode where one ends.

    Returns:
      (world, trajectory, info). The trajectory's leaves are `[T, N, ...]`; `next_obs` is the observation before any
        reset. `info` has `episode_return`, `episode_length` and `info/NAME` of the `Env.metrics`, each a `Mean` over
        the episodes that ended in this rollout, their number `num_episodes`, and `env_steps` = T * N.
    """

    def advance(carry, draws):
        world, finished = carry
        world, transition, finished_now = step(env, actor, world, draws)
        return (world, finished + finished_now), _with_memory(transition, ())

    if isinstance(world.env_state, Recording):
        trajectory, finished = world.env_state
        return world, trajectory, episode_info(env, finished.sum(0)[:, None], jnp.int32(trajectory.reward.size))
    draws = draw(key, env, actor.noise, world, num_steps)
    carry = world, none_finished(env, world.episode_return.shape[0])
    (end, finished), trajectory = scan(advance, carry, draws, unroll=STEPS_PER_ITERATION)
    before = _memory_before(trajectory, world.memory, actor.memory(world.episode_return.shape[0]))
    return end, _with_memory(trajectory, before), episode_info(env, finished, jnp.int32(trajectory.reward.size))


def _with_memory(trajectory: Transition, memory: Memory) -> Transition:
    """The trajectory with this memory before its observations, where they are a `Window`."""
    obs = trajectory.obs
    return trajectory._replace(obs=obs._replace(memory=memory)) if isinstance(obs, Window) else trajectory


def _memory_before(trajectory: Transition, first: Memory, begun: Memory) -> Memory:
    """The memory before each step: `first`, and then that after the step before, or `begun` where an episode starts.
    Only a few steps of it are read, and a program computes no others."""
    if not isinstance(trajectory.obs, Window):
        return ()
    starts = trajectory.obs.starts

    def before(first, begun, after):
        return jnp.concatenate([first[None], select(starts[1:], begun, after[:-1])])

    return jax.tree.map(before, first, begun, trajectory.next_obs.memory)


def _resets_are_small(env: Env) -> bool:
    shapes = jax.eval_shape(env.reset, jax.eval_shape(jax.random.key, 0))
    small = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) <= SMALL_RESET_BYTES
    return small and not env.costly_reset


def none_finished(env: Env, num_envs: int) -> Array:
    """`step`'s `finished` where no episode ended."""
    return jnp.zeros((3 + len(env.metrics), num_envs))


def episode_info(env: Env, finished: Array, env_steps: Array) -> Metrics:
    """Returns a rollout's metrics from the sum over steps of `step`'s `finished`, `[3 + K, N]`."""
    return_sum, length_sum, num_episodes, *own = jnp.sum(finished, axis=1)
    info = EpisodeMetrics(
        episode_return=Mean(return_sum, num_episodes),
        episode_length=Mean(length_sum, num_episodes),
        num_episodes=num_episodes.astype(jnp.int32),
        env_steps=env_steps,
    )
    return dict(info) | {f"info/{name}": Mean(x, num_episodes) for name, x in zip(env.metrics, own, strict=True)}


def truncation_as_termination(trajectory: Transition) -> Transition:
    """Marks truncated steps as terminated, so that nothing bootstraps from them: a common bug, on purpose."""
    return trajectory._replace(terminated=trajectory.terminated | trajectory.truncated)


class Episodes(NamedTuple):
    """N whole episodes. `mask` is true from an episode's first step to its last; outside it the trajectory is zero."""

    trajectory: Transition  # leaves [T, N, ...]; the memory before the first step is [1, N, ...]
    mask: Array  # [T, N]
    info: Metrics


def episodes(key: Key, env: Env, actor: Actor, num_episodes: int, max_steps: int) -> Episodes:
    """Runs N whole episodes, until the last of them has ended in every lane of the population.

    Episodes are truncated after `max_steps`. `info` is as for `rollout`; `env_steps` counts the steps in the mask.
    """
    k_start, k_run = jax.random.split(key)
    return episodes_from(k_run, env, actor, reset_all(k_start, env, num_episodes, actor.memory), max_steps)


def episodes_from(key: Key, env: Env, actor: Actor, world: RolloutState, max_steps: int) -> Episodes:
    """Runs `episodes` in N environments that the caller has just reset, such as copies of one initial state."""
    num_episodes = world.episode_return.shape[0]

    def act_and_step(t, world):
        k_act, k_step = jax.random.split(jax.random.fold_in(key, t))
        memory, action, log_prob = actor(k_act, world.memory, world.obs)
        taken = in_units(env.action_space, executed(action))
        k_step = jax.random.split(k_step, num_episodes)
        env_state, time_step = within_device(jax.vmap(env.step), (0, 0, 0), 0)(k_step, world.env_state, taken)
        obs, reward, terminated, truncated, info = time_step
        truncated |= (t == max_steps - 1) & ~terminated
        before, after = seen(world.obs, jnp.full(num_episodes, t == 0), world.memory), moment(obs, memory)
        transition = Transition(before, action, log_prob, reward, terminated, truncated, after)
        world = world._replace(env_state=env_state, obs=obs, memory=memory)
        return world, _with_memory(transition, ()), info

    def body(carry):
        t, world, alive, trajectory, mask, last_info = carry
        world, transition, info = act_and_step(t, world)
        masked = select(alive, transition, jax.tree.map(jnp.zeros_like, transition))
        trajectory = jax.tree.map(lambda buffer, x: buffer.at[t].set(x), trajectory, masked)
        still_alive = alive & ~(transition.terminated | transition.truncated)
        return t + 1, world, still_alive, trajectory, mask.at[t].set(alive), select(alive, info, last_info)

    _, *shapes = jax.eval_shape(act_and_step, jnp.int32(0), world)
    trajectory = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), shapes[0])
    info = jax.tree.map(jnp.zeros_like, shapes[1])
    mask = jnp.zeros((max_steps, num_episodes), bool)
    carry = (jnp.int32(0), world, jnp.ones(num_episodes, bool), trajectory, mask, info)
    *_, trajectory, mask, info = jax.lax.while_loop(lambda carry: any_lane(carry[2]), body, carry)
    env_steps = jnp.sum(mask, dtype=jnp.int32)
    sums = [jnp.sum(trajectory.reward), env_steps, num_episodes, *(jnp.sum(info[name]) for name in env.metrics)]
    finished = jnp.stack([jnp.asarray(x, jnp.float32) for x in sums])
    trajectory = _with_memory(trajectory, jax.tree.map(lambda x: x[None], world.memory))  # before the first step
    return Episodes(trajectory, mask, episode_info(env, finished[:, None], env_steps))
