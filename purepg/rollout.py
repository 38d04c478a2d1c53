"""Experience from a policy: `rollout` (fixed length, resets where an episode ends) and `episodes` (whole, masked).

The only place where environments are reset.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.lanes import any_lane
from purepg.types import Actor, Array, Env, Key, Metrics, Obs, Transition

SMALL_RESET_BYTES = 256


class RolloutState(NamedTuple):
    """N running environments; leaves are `[N, ...]`."""

    env_state: Any
    obs: Obs
    episode_return: Array  # raw reward so far in the running episode
    episode_length: Array


def start(key: Key, env: Env, num_envs: int) -> RolloutState:
    """N freshly reset environments."""
    env_state, obs = jax.vmap(env.reset)(jax.random.split(key, num_envs))
    return RolloutState(env_state, obs, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))


def select(ended: Array, fresh: Any, current: Any) -> Any:
    """`fresh` where `ended` (`[N]`), else `current`; leaves are `[N, ...]`."""

    def choose(fresh, current):
        return jnp.where(ended.reshape(ended.shape + (1,) * (current.ndim - ended.ndim)), fresh, current)

    return jax.tree.map(choose, fresh, current)


def rollout(
    key: Key, env: Env, actor: Actor, world: RolloutState, num_steps: int
) -> tuple[RolloutState, Transition, Metrics]:
    """Acts for `num_steps` steps in N environments, beginning a new episode wherever one ends.

    Returns:
      (world, trajectory, info): the trajectory's leaves are `[T, N, ...]` and `next_obs` is the observation before any
      reset. `info` has the means of `episode_return` and `episode_length` over the episodes that ended in this rollout
      (NaN if none did), their number `num_episodes`, and `env_steps` = T * N.
    """
    num_envs = world.episode_return.shape[0]
    k_act, k_step, k_reset = jax.random.split(key, 3)
    noise = jax.vmap(actor.noise, in_axes=(0, None))(jax.random.split(k_act, num_steps), world.obs)
    k_step = jax.random.split(k_step, (num_steps, num_envs))
    # Small resets are made in one batch for every step that might need one, which is far cheaper than a little
    # randomness in every step of the loop; large ones would fill the memory.
    reset = jax.vmap(env.reset)
    resets = jax.random.split(k_reset, (num_steps, num_envs))
    resets_are_small = _num_bytes(jax.eval_shape(env.reset, key)) <= SMALL_RESET_BYTES
    if resets_are_small:
        resets = jax.vmap(reset)(resets)

    def step(carry, inputs):
        world, finished = carry
        noise, k_step, fresh = inputs
        action, log_prob = actor.act(noise, world.obs)
        env_state, (next_obs, reward, terminated, truncated) = jax.vmap(env.step)(k_step, world.env_state, action)
        transition = Transition(world.obs, action, log_prob, reward, terminated, truncated, next_obs)

        ended = terminated | truncated
        episode_return, episode_length = world.episode_return + reward, world.episode_length + 1
        finished += jnp.stack(
            [
                jnp.sum(episode_return, where=ended),
                jnp.sum(episode_length, where=ended).astype(jnp.float32),
                jnp.sum(ended).astype(jnp.float32),
            ]
        )
        env_state, obs = select(ended, fresh if resets_are_small else reset(fresh), (env_state, next_obs))
        world = RolloutState(env_state, obs, jnp.where(ended, 0.0, episode_return), jnp.where(ended, 0, episode_length))
        return (world, finished), transition

    (world, finished), trajectory = jax.lax.scan(step, (world, jnp.zeros(3)), (noise, k_step, resets))
    return_sum, length_sum, num_episodes = finished
    return world, trajectory, _info(return_sum, length_sum, num_episodes, jnp.int32(num_steps * num_envs))


def _num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _info(return_sum: Array, length_sum: Array, num_episodes: Array, env_steps: Array) -> Metrics:
    some = num_episodes > 0
    count = jnp.where(some, num_episodes, 1.0)
    return {
        "episode_return": jnp.where(some, return_sum / count, jnp.nan),
        "episode_length": jnp.where(some, length_sum / count, jnp.nan),
        "num_episodes": num_episodes.astype(jnp.int32),
        "env_steps": env_steps,
    }


def truncation_as_termination(trajectory: Transition) -> Transition:
    """The common mistake, on purpose: a time limit is taken for a death, so that nothing bootstraps from it."""
    return trajectory._replace(terminated=trajectory.terminated | trajectory.truncated)


class Episodes(NamedTuple):
    """N whole episodes. `mask` is true from an episode's first step to its last; beyond it the trajectory is zeros."""

    trajectory: Transition  # leaves [T, N, ...]
    mask: Array  # [T, N]
    info: Metrics


def episodes(key: Key, env: Env, actor: Actor, num_episodes: int, max_steps: int) -> Episodes:
    """N episodes from their resets to their ends, stepped until the last one has ended, in any lane of a population.

    An episode still running after `max_steps` is truncated there. `info` is as for `rollout`, and `env_steps` counts
    the steps inside the mask.
    """
    k_start, k_run = jax.random.split(key)
    world = start(k_start, env, num_episodes)

    def act_and_step(t, world):
        k_act, k_step = jax.random.split(jax.random.fold_in(k_run, t))
        action, log_prob = actor.act(actor.noise(k_act, world.obs), world.obs)
        env_state, time_step = jax.vmap(env.step)(jax.random.split(k_step, num_episodes), world.env_state, action)
        truncated = time_step.truncated | ((t == max_steps - 1) & ~time_step.terminated)
        transition = Transition(
            world.obs, action, log_prob, time_step.reward, time_step.terminated, truncated, time_step.obs
        )
        return world._replace(env_state=env_state, obs=time_step.obs), transition

    def body(carry):
        t, world, alive, trajectory, mask = carry
        world, transition = act_and_step(t, world)
        trajectory = jax.tree.map(
            lambda buffer, x: buffer.at[t].set(select(alive, x, jnp.zeros_like(x))), trajectory, transition
        )
        mask = mask.at[t].set(alive)
        alive &= ~(transition.terminated | transition.truncated)
        return t + 1, world, alive, trajectory, mask

    shapes = jax.eval_shape(act_and_step, jnp.int32(0), world)[1]
    trajectory = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), shapes)
    carry = (jnp.int32(0), world, jnp.ones(num_episodes, bool), trajectory, jnp.zeros((max_steps, num_episodes), bool))
    *_, trajectory, mask = jax.lax.while_loop(lambda carry: any_lane(carry[2]), body, carry)
    env_steps = jnp.sum(mask)
    info = _info(jnp.sum(trajectory.reward), env_steps.astype(jnp.float32), jnp.float32(num_episodes), env_steps)
    return Episodes(trajectory, mask, info)
