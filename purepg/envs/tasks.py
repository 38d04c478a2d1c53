"""Tasks with verifiable rewards: a prompt is answered with tokens, and a program says whether that was right.

Tokens are int32 numbers into a task's vocabulary; -1 marks an empty place, to the left of a prompt or after a
response's end. A task is pure functions of one prompt: batching is the caller's vmap. `token_env` makes an `Env` of a
task, one token a step. `named_tasks` has four of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from purepg.types import Action, Array, Box, Discrete, Env, EnvState, Key, TimeStep, UsageError


class Task(NamedTuple):
    """Prompts and what is right for them. Arrays are int32 tokens."""

    name: str
    vocabulary: tuple[str, ...]  # a token's text, one character; the empty place -1 is none of them
    eos: int  # the token that ends a response
    prompt_length: int  # columns of a prompt; shorter ones are left-padded with -1
    response_length: int  # the most tokens of a response, eos included
    prompt: Callable[[Key, bool], Array]  # (key, held_out) -> [prompt_length]; `held_out` is static
    demonstration: Callable[[Key, Array], Array]  # (key, prompt) -> [response_length]: a right response, eos, then -1
    reward: Callable[[Array, Array], Array]  # (prompt, response, -1 after eos) -> float32, 1 if exactly right, else 0


def encode(task: Task, text: str) -> list[int]:
    """The text's tokens. Raises UsageError where a character is none of the vocabulary's."""
    unknown = sorted(set(text) - set(task.vocabulary))
    if unknown:
        raise UsageError(f"text ({text!r}) must be written in {task.name}'s vocabulary, {''.join(task.vocabulary)!r}")
    return [task.vocabulary.index(character) for character in text]


def decode(task: Task, tokens: Sequence[int] | Array | np.ndarray) -> str:
    """The text of `[length]` tokens; empty places have none."""
    return "".join(task.vocabulary[token] for token in np.asarray(tokens, int).tolist() if token >= 0)


# --- as an environment ---


class TokenState(NamedTuple):
    obs: Array  # int32 [prompt_length + response_length]
    t: Array  # int32, tokens of the response so far


@dataclass(frozen=True)
class TokenStep:
    """A task's `step`; of one task all are equal."""

    task: Task

    def __call__(self, key: Key, state: EnvState, action: Action) -> tuple[EnvState, TimeStep]:
        del key
        P, R = self.task.prompt_length, self.task.response_length
        obs = jnp.where(jnp.arange(P + R) == P + state.t, action, state.obs).astype(jnp.int32)
        terminated = action == self.task.eos
        truncated = ~terminated & (state.t + 1 >= R)
        reward = jnp.where(terminated | truncated, self.task.reward(obs[:P], obs[P:]), 0.0).astype(jnp.float32)
        return TokenState(obs, state.t + 1), TimeStep(obs, reward, terminated, truncated)


def token_env(task: Task, held_out: bool = False, reward: Callable[[Array, Array], Array] | None = None) -> Env:
    """The task as an environment: an action is the response's next token, and the episode's last step earns the reward.

    It observes the prompt and after it the response so far, with -1 at empty places. eos terminates; a last column
    written without it truncates.

    Args:
      held_out: whether prompts are the held-out ones.
      reward: in place of the task's own, in the environment's `task` too.
    """
    task = task if reward is None else task._replace(reward=reward)
    P, R, V = task.prompt_length, task.response_length, len(task.vocabulary)

    def reset(key: Key) -> tuple[EnvState, Array]:
        obs = jnp.concatenate([task.prompt(key, held_out), jnp.full(R, -1, jnp.int32)])
        return TokenState(obs, jnp.int32(0)), obs

    space = Box(np.full(P + R, -1, np.int32), np.full(P + R, V - 1, np.int32), np.int32)
    return Env(reset, TokenStep(task), space, Discrete(V), R, task.name, task=task)
