"""A language model as a policy: the prefix is the observation, the next token the action.

    pi(y | x) = prod_t softmax(logits(x, y_<t) / temperature)_{y_t}

`sampling.generate` samples whole responses with a cache of keys and values. `LanguageModel.score` computes the same
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

from purepg.config import Count, Positive, Share
from purepg.envs.contract import first_difference
from purepg.envs.tasks import Task
from purepg.equations.distributions import Categorical
from purepg.language.sampling import Truncation, generate
from purepg.language.transformer import Transformer, TransformerConfig, check_transformer
from purepg.types import Array, Env, Key, Obs, Params, UsageError


@dataclass(frozen=True)
class LanguageModelConfig(TransformerConfig):
    """A transformer, its sampling temperature, and where its parameters come from.

    Attributes:
      temperature: divides the logits, in sampling and in learning alike.
      top_k: sample only from the k most probable tokens; None: from all, here and below. Truncation is of sampling
        alone: learning has the whole policy, and weighs each response by its probability under it over that under the
        sampler.
      top_p: sample only from the most probable tokens, as few as have a probability of at least top_p together.
      min_p: sample only tokens at least min_p times as probable as the most probable one.
      start: warm start: the folder of a run, whose best agent is used (`experiments/clone.py` makes one), or a folder
        of safetensors in the Llama or Qwen2 layout. The model takes its sizes. None: random initialisation.
    """

    temperature: Positive = 1.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    start: str | None = None


class LanguageModel(NamedTuple):
    """A network that observes a task's rows of tokens, `[..., L + R]`; `language_model` makes it.

    Attributes:
      temperature: divides the logits.
      start: the parameters that `init` returns; None: `init` draws them at random.
      truncation: which tokens `generate` can sample.
    """

    transformer: Transformer
    task: Task
    temperature: Array | float = 1.0
    start: Params | None = None
    truncation: Truncation = Truncation()

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

    def generate(
        self, key: Key, params: Params, prompt: Array, group_size: int, greedy: bool = False
    ) -> tuple[Array, Array]:
        """Returns (token `[P, G, L + R]`, log_prob `[P, G, R]`) for prompts `[P, L]`; see `sampling.generate`."""
        how = self.task, self.temperature, self.truncation, greedy
        return generate(key, self.transformer, params, prompt, group_size, *how)

    def respond(self, key: Key, params: Params, obs: Obs, greedy: bool) -> Array:
        """Returns rows `[N, L + R]`: the prompts that `obs` `[N, L + R]` begins with, each with a whole response."""
        return self.generate(key, params, obs[:, : self.task.prompt_length], 1, greedy)[0][:, 0]

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
    truncation = Truncation(config.top_k, config.top_p, config.min_p)
    return LanguageModel(transformer, env.task, config.temperature, params, truncation)


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
