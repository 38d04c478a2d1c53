"""The generic loops, as pure functions: training an algorithm, guarding it, evaluating a policy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.contract import check_environment, in_units
from purepg.equations.distributions import executed
from purepg.experience.responses import pay
from purepg.experience.rollout import RolloutState, reset_all
from purepg.lanes import any_lane, step_if
from purepg.loops import all_finite, scan
from purepg.types import Actor, Algorithm, Array, Env, Key, Mean, Metrics, Obs, State


def train(key: Key, algorithm: Algorithm, state: State, start: Array | int, num_updates: int) -> tuple[State, Metrics]:
    """`num_updates` updates from update number `start` on, as one scan. Leaves of the metrics are `[num_updates]`;
    `averaged` turns them into plain arrays.

    Update u uses `fold_in(key, u)`, so that blocks of any length give what one long block gives, bit for bit.
    """

    def update(state, u):
        return algorithm.step(jax.random.fold_in(key, u), state, u)

    return scan(update, state, jnp.int32(start) + jnp.arange(num_updates, dtype=jnp.int32))


def averaged(metrics: Metrics) -> dict[str, np.ndarray]:
    """Metrics as NumPy arrays, each `Mean` divided.

    The mean of no values is NaN, such as `episode_return` where no episode ended. So is every float of an update with
    no environment steps, whose member had stopped.
    """
    values = jax.device_get(metrics)
    made = np.asarray(values["env_steps"]) > 0
    return {name: _averaged(value, made) for name, value in values.items()}


def _averaged(value: Any, made: np.ndarray) -> np.ndarray:
    if isinstance(value, Mean):
        total, num = map(np.asarray, value)
        return np.divide(total, num, out=np.full_like(total, np.nan), where=made & (num > 0))
    value = np.asarray(value)
    return np.where(made, value, np.asarray(np.nan, value.dtype)) if value.dtype.kind == "f" else value


class Guard(NamedTuple):
    """What `guard` knows of a member."""

    finite: Array  # bool: False from the first update that gave a non-finite number
    env_steps_left: Array  # int32: how many more environment steps the learner may consume
    num_updates: Array | None  # int32: updates so far; None where all updates take as many environment steps


def guard(algorithm: Algorithm, max_env_steps: int) -> Algorithm:
    """The same algorithm, made safe for long runs and for populations.

    - An update that makes the learner non-finite is undone, and the learner is frozen from then on. The metric `finite`
      is False from that update. Other members of a population are not affected.
    - Where updates vary in length, a member stops before the update that could exceed `max_env_steps`: its learner
      stays as it is, and its metrics are 0. Once every member has stopped, updates cost nothing. Each member counts its
      updates, so that it can go on from there with a larger budget. Where all updates have one length, the caller knows
      their number, and nothing is counted.
    """
    counts = algorithm.update_steps.vary

    def init(key):
        state = algorithm.init(key)
        left, num_updates = (jnp.int32(max_env_steps), jnp.int32(0)) if counts else (jnp.int32(0), None)
        return state._replace(guard=Guard(jnp.bool_(True), left, num_updates))

    def advance(key, state, update):
        finite, left, num_updates = state.guard
        new, metrics = algorithm.step(key, state._replace(guard=None), update)
        finite &= all_finite(new.learner)
        learner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new.learner, state.learner)
        left = left - metrics["env_steps"].astype(left.dtype) if counts else left
        after = Guard(finite, left, num_updates + 1 if counts else None)
        return State(learner, new.world, after), metrics | {"finite": finite}

    def advance_within_budget(key, state, update):
        within = state.guard.env_steps_left >= algorithm.update_steps.most
        new, metrics = step_if(any_lane(within), lambda state: advance(key, state, update), state)
        learner, after = jax.tree.map(
            lambda new, old: jnp.where(within, new, old), (new.learner, new.guard), (state.learner, state.guard)
        )
        metrics = jax.tree.map(lambda x: jnp.where(within, x, jnp.zeros_like(x)), metrics)
        return State(learner, new.world, after), metrics | {"finite": after.finite}

    return algorithm._replace(init=init, step=advance_within_budget if counts else advance)


def scheduled(make: Callable[[Array | int], Algorithm]) -> Algorithm:
    """An algorithm whose floats change between updates.

    Args:
      make: `make(update)`, the algorithm as it is in that update.
    """

    def step(key, state, update):
        return make(update).step(key, state, update)

    return make(np.iinfo(np.int32).max)._replace(init=make(0).init, step=step, explorer=None)


def measured(algorithm: Algorithm, every: int) -> Algorithm:
    """The same algorithm, whose metrics have what it measures before the first update and before every `every`-th one,
    and no value elsewhere. 0: only before the first."""
    measure = algorithm.measure
    assert measure is not None

    def step(key, state, update):
        now = (update % every if every else update) == 0
        _, found = step_if(now, lambda carry: (carry, measure(state)), ())
        state, metrics = algorithm.step(key, state, update)
        return state, metrics | {name: Mean(x, now.astype(x.dtype)) for name, x in found.items()}

    return algorithm._replace(step=step)


class EpisodeStats(NamedTuple):
    """Evaluation episodes; leaves are `[num_episodes]`."""

    episode_return: Array  # raw rewards, undiscounted
    episode_length: Array
    terminated: Array
    truncated: Array
    last_obs: Obs  # when the last episode had ended; environments are stepped on after their own episode's end


def evaluate(key: Key, env: Env, actor: Actor, num_episodes: int, max_steps: int) -> EpisodeStats:
    """Whole episodes in the raw environment; one still running after `max_steps` is truncated.

    Every episode counts once. In a rollout of fixed length, short episodes would be over-represented. A language model
    responds as a whole, with a cache of keys and values, where `max_steps` leaves room for the longest response.
    """
    check_environment(env)
    k_start, k_run = jax.random.split(key)
    world = reset_all(k_start, env, num_episodes, actor.memory)
    if env.task is not None and actor.respond is not None and max_steps >= env.task.response_length:
        return _evaluate_responses(k_run, env, actor.respond, world)

    def body(carry):
        t, (env_state, memory), stats = carry
        k_act, k_step = jax.random.split(jax.random.fold_in(k_run, t))
        alive = ~(stats.terminated | stats.truncated)
        memory, action, _ = actor(k_act, memory, stats.last_obs)
        taken = in_units(env.action_space, executed(action))
        env_state, time_step = jax.vmap(env.step)(jax.random.split(k_step, num_episodes), env_state, taken)
        stats = EpisodeStats(
            stats.episode_return + jnp.where(alive, time_step.reward, 0.0),
            stats.episode_length + alive,
            stats.terminated | (alive & time_step.terminated),
            stats.truncated | (alive & (time_step.truncated | ((t == max_steps - 1) & ~time_step.terminated))),
            time_step.obs,
        )
        return t + 1, (env_state, memory), stats

    def running(carry):
        return any_lane(~(carry[2].terminated | carry[2].truncated))

    never = jnp.zeros(num_episodes, bool)
    stats = EpisodeStats(world.episode_return, world.episode_length, never, never, world.obs)
    return jax.lax.while_loop(running, body, (jnp.int32(0), (world.env_state, world.memory), stats))[2]


def _evaluate_responses(key: Key, env: Env, respond: Callable[[Key, Obs], Array], world: RolloutState) -> EpisodeStats:
    """`evaluate` of responses to the prompts of environments that have just been reset."""
    k_respond, k_step = jax.random.split(key)
    token = respond(k_respond, world.obs)
    reward, terminated, truncated, mask = (x[:, 0] for x in pay(k_step, env, world.env_state, token[:, None]))
    L = env.task.prompt_length
    return EpisodeStats(
        jnp.sum(reward, axis=-1),
        jnp.sum(mask, axis=-1, dtype=jnp.int32),
        jnp.any(terminated, axis=-1),
        jnp.any(truncated, axis=-1),
        token.at[:, L:].set(jnp.where(mask, token[:, L:], -1)),
    )
