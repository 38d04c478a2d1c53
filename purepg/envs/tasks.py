"""Tasks with verifiable rewards: a prompt is answered with tokens, and a program checks the answer.

Tokens are int32 indices into a vocabulary; -1 is padding, to the left of a prompt or after a response's EOS. A task's
functions take one prompt; the caller vmaps. `token_env` makes an `Env` with one token per step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from purepg.envs.stops import after, automaton
from purepg.types import Action, Array, Box, Discrete, Env, EnvState, Key, TimeStep, UsageError


class Judge(NamedTuple):
    """Rewards for responses to a table of prompts, which no compiled program of learning computes."""

    prompt: np.ndarray  # [n, prompt_length], the table
    names: tuple[str, ...]  # of the rewards
    reward: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (prompt's place [B], response [B, R]) -> each one's [K, B]
    weight: np.ndarray  # [K]; the response earns the weighted sum
    learned: tuple[Path, ...] = ()  # runs of reward models, whose rewards come after those of `reward`, among K


class Task(NamedTuple):
    """Prompts and a check of their answers. Arrays are int32 tokens."""

    name: str
    vocabulary: tuple[str, ...]  # each token's text, one character; padding (-1) has no entry; () with a tokenizer
    eos: int  # EOS, the token that ends a response
    prompt_length: int  # columns of a prompt; shorter prompts are left-padded with -1
    response_length: int  # the largest number of tokens in a response, with EOS
    prompt: Callable[[Key, bool], Array]  # (key, held_out) -> [prompt_length]; `held_out` is static
    demonstration: Callable[[Key, Array], Array]  # (key, prompt) -> [response_length], a right response with EOS
    reward: Callable[[Array, Array], Array]  # (prompt, response, -1 after EOS) -> float32, 1 if right, else 0
    stop: Any = None  # [S, V], the table of `envs.stops` that says what ends a response; None: EOS alone
    tokenizer: Any = None  # a `language.tokenizer.Tokenizer`
    judge: Judge | None = None  # gives the rewards in place of `reward`
    rows: np.ndarray | None = None  # [N, K, L + R] data from a file: a demonstration (K = 1), or a pair of responses
    # to one prompt (K = 2), of which the first is preferred

    @property
    def num_tokens(self) -> int:
        """The number of tokens, V."""
        return self.tokenizer.num_tokens if self.tokenizer else len(self.vocabulary)

    @property
    def stops(self) -> Any:
        """`stop`, also where EOS alone ends a response."""
        return automaton([(self.eos,)], self.num_tokens) if self.stop is None else self.stop


def encode(task: Task, text: str) -> list[int]:
    """Returns the text's tokens. Raises UsageError if a character is not in the vocabulary."""
    unknown = sorted(set(text) - set(task.vocabulary))
    if unknown:
        raise UsageError(f"text ({text!r}) must use {task.name}'s vocabulary, {''.join(task.vocabulary)!r}")
    return [task.vocabulary.index(character) for character in text]


def decode(task: Task, tokens: Sequence[int] | Array | np.ndarray) -> str:
    """Returns the text of `[length]` tokens, skipping padding."""
    present = [token for token in np.asarray(tokens, int).tolist() if token >= 0]
    return task.tokenizer.decode(present) if task.tokenizer else "".join(task.vocabulary[token] for token in present)


def describe(task: Task, obs: np.ndarray) -> dict[str, str]:
    """The prompt and the response in a final observation `[L + R]`, as text. Tokens after the response's end are no
    part of it."""
    state, stops, response = 0, task.stops, []
    for token in obs[task.prompt_length :]:
        if token >= 0 and state < len(stops):
            response.append(token)
            state = stops[state, token]
    return {"prompt": decode(task, obs[: task.prompt_length]), "response": decode(task, response)}


class TokenState(NamedTuple):
    obs: Array  # int32 [prompt_length + response_length]
    t: Array  # int32, number of tokens in the response so far
    stop: Array  # int32, state of `Task.stops` after them


@dataclass(frozen=True)
class TokenStep:
    """A task's `step`. Steps of the same task compare equal."""

    task: Task

    def __call__(self, key: Key, state: EnvState, action: Action) -> tuple[EnvState, TimeStep]:
        del key
        P, R = self.task.prompt_length, self.task.response_length
        obs = jnp.where(jnp.arange(P + R) == P + state.t, action, state.obs).astype(jnp.int32)
        stops = self.task.stops
        stop = after(stops, state.stop, action)
        terminated = stop == len(stops)
        truncated = ~terminated & (state.t + 1 >= R)
        reward = jnp.where(terminated | truncated, self.task.reward(obs[:P], obs[P:]), 0.0).astype(jnp.float32)
        return TokenState(obs, state.t + 1, stop), TimeStep(obs, reward, terminated, truncated)


def token_env(task: Task, held_out: bool = False, reward: Callable[[Array, Array], Array] | None = None) -> Env:
    """Returns the task as an environment: an action is the response's next token, and the last step earns the reward.

    The observation is the prompt followed by the response so far, padded with -1. What ends a response (EOS, or what
    `task.stop` says) terminates the episode; one that fills its last column without it is truncated. `held_out` draws
    held-out prompts. `reward`, a JAX function, replaces the task's reward, also in the environment's `task`, and its
    judge.
    """
    task = task if reward is None else task._replace(reward=reward, judge=None)
    P, R, V = task.prompt_length, task.response_length, task.num_tokens

    def reset(key: Key) -> tuple[EnvState, Array]:
        obs = jnp.concatenate([task.prompt(key, held_out), jnp.full(R, -1, jnp.int32)])
        return TokenState(obs, jnp.int32(0), jnp.int32(0)), obs

    space = Box(np.full(P + R, -1, np.int32), np.full(P + R, V - 1, np.int32), np.int32)
    return Env(reset, TokenStep(task), space, Discrete(V), R, task.name, task=task, describe=partial(describe, task))
