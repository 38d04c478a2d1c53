"""The environment of prompts from files: a token task with a tokenizer, whose rewards are Python."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.stops import automaton, of_words
from purepg.envs.tasks import Judge, Task, token_env
from purepg.language.tokenizer import Tokenizer, load_tokenizer
from purepg.run.folder.config import read_config
from purepg.run.folder.files import LOG
from purepg.run.text.config import FileRunConfig, TextRunConfig
from purepg.run.text.prompts import Prompts, read_prompts, table
from purepg.run.text.rewards import Learned, Reward, find_rewards
from purepg.types import Array, Env, UsageError

TextOf = Callable[[np.ndarray], str]  # of a response `[R]`


def text_env(run: TextRunConfig, network: Any) -> Env:
    """The environment of a run on prompts; its `held_out` has the evaluation's.

    Args:
      network: the config of the language model, whose `start` has the tokenizer.
    Raises:
      UsageError: a file, a reward or the tokenizer is missing or does not fit, or a prompt is too long.
    """
    if run.env != "text" or run.env_params:
        raise UsageError(f"env ({run.env}) must be text, without env_params: prompts are those of --prompts")
    if run.prompts is None:
        raise UsageError("prompts (None) must be a file with one prompt a line, as in --prompts train.jsonl")
    train = read_prompts(run.prompts, "prompts")
    held_out = read_prompts(run.eval_prompts or run.prompts, "eval_prompts").first(run.eval_episodes)
    rewards = find_rewards(run.reward, (train, held_out))
    tokenizer = tokenizer_of(run, network)
    tables = [table(prompts, tokenizer, run.chat, run.prompt_length) for prompts in (train, held_out)]
    stop, text_of = stop_table(tokenizer, run.stop), partial(completion, tokenizer, run.stop)
    env, own = (
        _env(prompts, token, tokenizer, rewards, run.response_length, stop, text_of)
        for prompts, token in zip((train, held_out), tables, strict=True)
    )
    return env._replace(held_out=own)


def tokenizer_of(run: FileRunConfig, network: Any) -> Tokenizer:
    """The tokenizer of a run on text from files.

    Args:
      network: the config of the language model.
    Raises:
      UsageError: there is none, or it has no chat template where the run needs one.
    """
    place = run.tokenizer or tokenizer_beside(getattr(network, "start", None))
    if place is None:
        raise UsageError("tokenizer (None) must be a Hugging Face folder or a .gguf file, where network.start is None")
    tokenizer = load_tokenizer(place)
    if run.chat and tokenizer.template is None:
        raise UsageError(f"{place} has no chat template: pass --no-chat, and write prompts as the model reads them")
    return tokenizer


def tokenizer_beside(start: str | None) -> str | None:
    """Where the tokenizer of a checkpoint or of a run is; None where there is none."""
    if start is None or not (Path(start) / LOG).exists():
        return start
    stored = read_config(Path(start))
    return stored["run"].get("tokenizer") or tokenizer_beside(stored.get("network", {}).get("start"))


def _env(
    prompts: Prompts,
    token: np.ndarray,
    tokenizer: Tokenizer,
    rewards: Sequence[Reward | Learned],
    response_length: int,
    stop: np.ndarray,
    text_of: TextOf,
) -> Env:
    def prompt(key: Array, held_out: bool) -> Array:
        del held_out
        return jnp.asarray(token)[jax.random.randint(key, (), 0, len(token))]

    def reward(prompt: Array, response: Array) -> Array:
        return jnp.float32(jnp.nan)  # only the judge knows

    def demonstration(key: Array, prompt: Array) -> Array:
        raise UsageError(f"{prompts.file} has prompts, and no demonstrations")

    sizes = tokenizer.stop[0], token.shape[1], response_length
    judged = judge(prompts, token, text_of, rewards)
    task = Task(prompts.file.stem, (), *sizes, prompt, demonstration, reward, stop, tokenizer, judged)
    return token_env(task)._replace(describe=describing(prompts, token, text_of))


def judge(prompts: Prompts, token: np.ndarray, text_of: TextOf, rewards: Sequence[Reward | Learned]) -> Judge:
    """What rewards responses to a table of prompts: each reward's function is called once for all of them."""

    def reward(place: np.ndarray, response: np.ndarray) -> np.ndarray:
        completions = [text_of(row) for row in response]
        found = [reward(prompts, place.tolist(), completions) for reward in written]
        return np.array(found, np.float32).reshape(-1, len(response))

    written = [reward for reward in rewards if isinstance(reward, Reward)]
    learned = [reward for reward in rewards if not isinstance(reward, Reward)]
    ordered = [*written, *learned]
    weights = np.array([reward.weight for reward in ordered], np.float32)
    folders = tuple(reward.folder for reward in learned)
    return Judge(token, tuple(reward.name for reward in ordered), reward, weights, folders)


def stop_table(tokenizer: Tokenizer, stop: Sequence[str] = ()) -> np.ndarray:
    """`Task.stop` of a tokenizer: its own tokens end a response, and so does the token that completes a text.

    Raises:
      UsageError: a text is empty, or the bytes of the tokenizer's tokens are not known.
    """
    if "" in stop:
        raise UsageError(f"stop ({' '.join(map(repr, stop))}) must be texts that are not empty")
    empty = np.zeros((1, tokenizer.num_tokens), np.int32)
    found = of_words(automaton(map(str.encode, stop), 256), tokenizer.pieces) if stop else empty
    found[:, list(tokenizer.stop)] = len(found)
    return found.astype(np.min_scalar_type(len(found)))


def completion(tokenizer: Tokenizer, stop: Sequence[str], response: np.ndarray) -> str:
    """The text of a response, without the token or the text that ends it."""
    token = [token for token in response.tolist() if token >= 0 and token not in tokenizer.stop]
    text = tokenizer.decode(token)
    if not stop:
        return text
    read = b"".join(tokenizer.pieces[x] for x in token)
    begins = [at for at in (read.find(x.encode()) for x in stop) if at >= 0]
    ended = read[min(begins) :].decode(errors="replace") if begins else ""
    return text[: max(0, len(text) - len(ended))]  # counted from the end: a decoder may strip the beginning


def describing(prompts: Prompts, token: np.ndarray, text_of: TextOf) -> Callable[[np.ndarray], dict[str, str]]:
    """`Env.describe`: a prompt as its file has it, and the response."""
    length, text = token.shape[1], prompts.text
    prompt_of = {row.tobytes(): text[i] for i, row in enumerate(token)}

    def describe(obs: np.ndarray) -> dict[str, str]:
        obs = np.asarray(obs, np.int32)
        return {"prompt": prompt_of[obs[:length].tobytes()], "response": text_of(obs[length:])}

    return describe
