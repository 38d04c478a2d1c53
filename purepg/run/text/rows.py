"""The environment of rows from files: demonstrations, or pairs of responses, as tables of tokens."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.tasks import Task, token_env
from purepg.language.tokenizer import Tokenizer
from purepg.run.text.config import DemonstrationsRunConfig, RowsRunConfig
from purepg.run.text.environment import completion, describing, stop_table, tokenizer_of
from purepg.run.text.prompts import Prompts, padded, read_prompts, table
from purepg.types import Array, Env, Key, UsageError


def rows_env(run: RowsRunConfig, network: object) -> Env:
    """The environment of a run on rows from files; that in its `held_out` has the held-out rows.

    Its prompts are those of the rows. The reward of a response is 1 if it is the completion, or the chosen response,
    of a row with that prompt, to the token, and 0 otherwise.

    Args:
      network: the config of the language model, whose `start` has the tokenizer.
    Raises:
      UsageError: a file or the tokenizer is missing or does not fit, or a prompt or a response is too long.
    """
    if run.env_params:
        raise UsageError(f"env_params ({' '.join(run.env_params)}) are of environments, and not of rows from a file")
    of_rows, of_held_out = run.FILES
    path = run.files.get(of_rows)
    if path is None:
        raise UsageError(f"{of_held_out} ({run.files[of_held_out]}) is given without {of_rows}, the rows to learn from")
    names = ("completion",) if isinstance(run, DemonstrationsRunConfig) else ("chosen", "rejected")
    held_out = read_prompts(run.files.get(of_held_out, path), of_held_out).first(run.eval_episodes)
    files = read_prompts(path, of_rows), held_out
    tokenizer = tokenizer_of(run, network)
    prompts = [table(found, tokenizer, run.chat, run.prompt_length) for found in files]
    responses = [_responses(found, names, tokenizer, run.response_length) for found in files]
    rows = zip(_equally_wide(prompts, left=True), _equally_wide(responses, left=False), strict=True)
    env, apart = (_env(found, tokenizer, *tables) for found, tables in zip(files, rows, strict=True))
    return env._replace(held_out=apart)


def _responses(found: Prompts, names: tuple[str, ...], tokenizer: Tokenizer, longest: int) -> np.ndarray:
    """The tokens of the responses in these columns `[N, K, R]`, each ended by the tokenizer's stop token."""
    rows = []
    for i, line in enumerate(found.line):
        for name in names:
            if name not in found.columns:
                raise UsageError(f"{found.file}, row {line} lacks {name}: a row must have {' and '.join(names)}")
            text = found.columns[name][i]
            if not isinstance(text, str):
                raise UsageError(f"{found.file}, row {line}: {name} must be text")
            tokens = [*tokenizer.encode(text), tokenizer.stop[0]]
            if ends := set(tokens[:-1]).intersection(tokenizer.stop):
                end = tokenizer.decode([min(ends)], skip_special=False)
                raise UsageError(f"{found.file}, row {line}: {name} must not hold {end}, which ends a response")
            if len(tokens) > longest:
                allowed = f"{longest} (response_length), with the token that ends it"
                raise UsageError(f"{found.file}, row {line}: {name} has {len(tokens)} tokens; it may have {allowed}")
            rows.append(tokens)
        if len(names) > 1 and rows[-1] == rows[-2]:
            raise UsageError(f"{found.file}, row {line}: {' and '.join(names)} must differ")
    return padded([row[::-1] for row in rows])[:, ::-1].reshape(len(found.line), len(names), -1)


def _equally_wide(tables: list[np.ndarray], left: bool) -> list[np.ndarray]:
    """The tables, padded with -1 to the columns of the widest."""
    widest = max(x.shape[-1] for x in tables)

    def missing(x):
        more = widest - x.shape[-1]
        return [(0, 0)] * (x.ndim - 1) + [(more, 0) if left else (0, more)]

    return [np.pad(x, missing(x), constant_values=-1) for x in tables]


def _env(found: Prompts, tokenizer: Tokenizer, prompts: np.ndarray, responses: np.ndarray) -> Env:
    """The environment of the rows in a file, whose tokens are `[N, L]` and `[N, K, R]`."""
    N, K, R = responses.shape
    L = prompts.shape[1]
    rows = np.concatenate([np.broadcast_to(prompts[:, None], (N, K, L)), responses], axis=-1)

    def prompt(key: Key, held_out: bool) -> Array:
        del held_out
        return jnp.asarray(prompts)[jax.random.randint(key, (), 0, N)]

    def demonstration(key: Key, prompt: Array) -> Array:
        of_prompt = jnp.all(prompts == prompt, axis=-1)
        return jnp.asarray(responses)[jax.random.categorical(key, jnp.log(of_prompt)), 0]

    def reward(prompt: Array, response: Array) -> Array:
        same = jnp.all(rows[:, 0] == jnp.concatenate([prompt, response]), axis=-1)
        return jnp.any(same).astype(jnp.float32)

    sizes = tokenizer.stop[0], L, R
    task = Task(found.file.stem, (), *sizes, prompt, demonstration, reward, stop_table(tokenizer), tokenizer, rows=rows)
    return token_env(task)._replace(describe=describing(found, prompts, partial(completion, tokenizer, ())))
