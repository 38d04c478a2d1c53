"""What whole responses earn: tokens that a language model has sampled, sent through an environment's `step`.

Axes: `P` prompts, `G` group, `L` columns of a prompt, `R` of a response.
"""

import jax
import jax.numpy as jnp

from purepg.envs.stops import ended
from purepg.envs.tasks import Task, TokenStep
from purepg.types import Array, Env, EnvState, Key

Payment = tuple[Array, Array, Array, Array]  # reward, terminated, truncated, mask, each [P, G, R]


def pay(key: Key, env: Env, env_state: EnvState, token: Array) -> Payment:
    """(reward, terminated, truncated, mask), each `[P, G, R]`, of the rows `[P, G, L + R]` of tokens.

    A response ends where a step ends the episode; one that no step ends is truncated at its last token.

    Args:
      env_state: `[P, ...]`, after the reset.
    """
    # Sending all R columns through a task's own step would compute R rewards, of which only the last one counts.
    if env.step == TokenStep(env.task):
        return _paid_by_task(env.task, token)
    return _paid_by_steps(key, env, env_state, token)


def _paid_by_task(task: Task, token: Array) -> Payment:
    """`pay` by the task's own step: its reward at the last token."""
    score = jax.vmap(jax.vmap(lambda row: task.reward(row[: task.prompt_length], row[task.prompt_length :])))
    return paid(score(token), *flags(task, token))


def flags(task: Task, token: Array) -> tuple[Array, Array, Array]:
    """(terminated, truncated, mask), each `[P, G, R]`, of the rows of tokens: what ends a response terminates."""
    action = token[..., task.prompt_length :]
    mask = action >= 0
    last = mask & ~jnp.roll(mask, -1, axis=-1).at[..., -1].set(False)
    terminated = last & ended(task.stops, action)
    return terminated, last & ~terminated, mask


def paid(reward: Array, terminated: Array, truncated: Array, mask: Array) -> Payment:
    """The payment of rewards `[P, G]` for whole responses, at their last tokens."""
    return jnp.where(terminated | truncated, reward[..., None], 0.0), terminated, truncated, mask


def _paid_by_steps(key: Key, env: Env, env_state: EnvState, token: Array) -> Payment:
    """`pay` by sending every token through `env.step`."""

    def of_response(key, env_state, action):
        def step(carry, now):
            env_state, alive = carry
            key, action, is_last = now
            env_state, (_, reward, terminated, truncated, _) = env.step(key, env_state, jnp.maximum(action, 0))
            alive &= action >= 0
            truncated |= is_last & ~terminated
            paid = jnp.where(alive, reward, 0.0), alive & terminated, alive & truncated, alive
            return (env_state, alive & ~(terminated | truncated)), paid

        is_last = jnp.append(action[1:] < 0, True)
        keys = jax.random.split(key, action.shape[0])
        return jax.lax.scan(step, (env_state, jnp.bool_(True)), (keys, action, is_last))[1]

    keys = jax.random.split(key, token.shape[:2])
    of_group = jax.vmap(of_response, in_axes=(0, None, 0))
    return jax.vmap(of_group)(keys, env_state, token[..., env.task.prompt_length :])
