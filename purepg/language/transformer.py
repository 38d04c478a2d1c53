"""A decoder-only transformer with the Llama and Qwen architectures: p(token_{i+1} | token_0, ..., token_i), with a
cache of keys and values for sampling one column at a time.

    h = x + attention(norm(x))        grouped queries, rotary positions
    y = h + mlp(norm(h))              down(silu(gate(h)) * up(h))

Axes: `B` rows, `n` columns of a call, `L` columns of a cache, `V` tokens of the vocabulary, `H` query heads, `K` heads
of keys and values, `d` size of a head. Computation is in the parameters' dtype. If that is narrower than float32,
norms, rotations, softmax and outputs are float32, and every narrow result is `rounded`, so that sampling and scoring
agree whatever program they are compiled in.
"""

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from purepg.config import Config, Count, Positive, check
from purepg.language.lora import LoRA
from purepg.language.sharding import whole
from purepg.precision import at_least_float32, rounded
from purepg.types import Array, Params, UsageError

ONE_HOT_TOKENS = 64  # largest vocabulary for which `embed` multiplies one-hot rows


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer; the defaults are a small model for a small vocabulary.

    Attributes:
      hidden_size: width of the residual stream.
      num_layers: number of blocks of attention and MLP.
      num_heads: number of query heads.
      num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads query heads (Ainslie et al. 2023);
        num_heads gives multi-head attention, 1 multi-query attention.
      head_dim: size of a head, even; None: hidden_size / num_heads.
      mlp_size: hidden width of the gated MLP (SwiGLU, Shazeer 2020).
      rope_theta: base of the rotary wavelengths, which run from 2 pi to nearly 2 pi rope_theta tokens.
      rope_factor: multiplies the wavelengths, for texts longer than those that a model was first trained on.
      rope_context: length of those texts, as in Llama 3: wavelengths below a quarter of it stay, those above it are
        multiplied, with a smooth transition between. None: all are multiplied.
      rms_eps: added to the mean square in every RMSNorm.
      tied_head: use the embedding matrix for the logits.
      qkv_bias: add biases to queries, keys and values, as Qwen2 does.
      qk_norm: RMSNorm of every head's query and key before the rotation, as in Qwen3.
      value_head: also output a scalar V for every prefix.
    """

    hidden_size: Count = 64
    num_layers: Count = 2
    num_heads: Count = 4
    num_kv_heads: Count = 2
    head_dim: Count | None = None
    mlp_size: Count = 128
    rope_theta: Positive = 10_000.0
    rope_factor: Positive = 1.0
    rope_context: Count | None = None
    rms_eps: Positive = 1e-6
    tied_head: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    value_head: bool = False

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


class Cache(NamedTuple):
    """Rotated keys, and values, of the columns so far."""

    key: Array  # [num_layers, B, L, K, d]
    value: Array  # [num_layers, B, L, K, d]
    present: Array  # [B, L] bool: the column holds a token


def init_cache(config: TransformerConfig, batch_size: int, length: int, dtype: Any = jnp.float32) -> Cache:
    """Returns a cache of `length` empty columns; `dtype` is the parameters', or a narrower one to save memory."""
    config = check_transformer(config)
    shape = (config.num_layers, batch_size, length, config.num_kv_heads, config.head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size, length), bool))


def check_transformer(config: Config) -> Config:
    """Returns a transformer's config after `check`. Raises UsageError also if its numbers do not fit together."""
    checked = check(config)
    c: Any = checked
    if c.num_heads % c.num_kv_heads:
        raise UsageError(f"num_heads ({c.num_heads}) must be divisible by num_kv_heads ({c.num_kv_heads})")
    if c.head_dim is None and c.hidden_size % c.num_heads:
        raise UsageError(
            f"hidden_size ({c.hidden_size}) must be divisible by num_heads ({c.num_heads}), or set head_dim"
        )
    if c.head_size % 2:
        raise UsageError(f"head_dim ({c.head_size}) must be even, because rotary positions rotate pairs")
    return checked


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich 2019)."""

    eps: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = at_least_float32(x)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return rounded(scale * rounded(normed, x.dtype))


class Attention(nn.Module):
    """Causal attention with grouped queries: query head h uses the keys and values of head h // (H / K)."""

    config: TransformerConfig
    layer: Any  # index of this layer's keys and values in the cache
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self, x: Array, angle: Array, visible: Array, cache: Cache | None, column: Array | int
    ) -> tuple[Array, Cache | None]:
        """Returns the attention's output `[B, n, hidden_size]` and the cache with the new keys and values.

        Args:
          x: `[B, n, hidden_size]`.
          angle: `[B, n, d / 2]`, the rotary angles.
          visible: `[B, n, L]` bool, the columns that each query may attend to; without a cache L is n.
          cache, column: as in `Transformer`; `present` is not used.
        """
        c, (B, n, _) = self.config, x.shape
        K, G, d = c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_size
        query = _dense(x, K * G * d, "query", self.lora, c.qkv_bias).reshape(B, n, K * G, d)
        key = _dense(x, K * d, "key", self.lora, c.qkv_bias).reshape(B, n, K, d)
        value = _dense(x, K * d, "value", self.lora, c.qkv_bias).reshape(B, n, K, d)
        if c.qk_norm:
            query, key = RMSNorm(c.rms_eps, name="query_norm")(query), RMSNorm(c.rms_eps, name="key_norm")(key)
        query, key = rotate(query, angle).reshape(B, n, K, G, d), rotate(key, angle)
        if cache is not None:  # one array for all layers, so that a scan over columns updates it in place
            at = (self.layer, 0, column, 0, 0)
            cache = cache._replace(
                key=lax.dynamic_update_slice(cache.key, rounded(key[None], cache.key.dtype), at),
                value=lax.dynamic_update_slice(cache.value, rounded(value[None], cache.value.dtype), at),
            )
            key, value = cache.key[self.layer].astype(x.dtype), cache.value[self.layer].astype(x.dtype)
        score = at_least_float32(rounded(jnp.einsum("bnkgd,blkd->bkgnl", query, key))) / math.sqrt(d)
        # The smallest finite number, not -inf: a query at padding, which attends to nothing, must not become NaN.
        score = jnp.where(visible[:, None, None], score, jnp.finfo(score.dtype).min)
        weight = rounded(nn.softmax(score), x.dtype)
        read = rounded(jnp.einsum("bkgnl,blkd->bnkgd", weight, value)).reshape(B, n, K * G * d)
        return _dense(read, c.hidden_size, "output", self.lora, scale=_residual_scale(c)), cache


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: TransformerConfig
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        gate = rounded(nn.silu(at_least_float32(_dense(x, c.mlp_size, "gate", self.lora))), x.dtype)
        inside = rounded(gate * _dense(x, c.mlp_size, "up", self.lora))
        return _dense(inside, c.hidden_size, "down", self.lora, scale=_residual_scale(c))


def _block(
    c: TransformerConfig,
    lora: LoRA | None,
    layer: Any,
    suffix: str,
    x: Array,
    angle: Array,
    visible: Array,
    cache: Cache | None,
    column: Array | int,
) -> tuple[Array, Cache | None]:
    normed = RMSNorm(c.rms_eps, name=f"attention_norm{suffix}")(x)
    read, cache = Attention(c, layer, lora, name=f"attention{suffix}")(normed, angle, visible, cache, column)
    x = rounded(x + read)
    normed = RMSNorm(c.rms_eps, name=f"mlp_norm{suffix}")(x)
    return rounded(x + MLP(c, lora, name=f"mlp{suffix}")(normed)), cache


class Block(nn.Module):
    """A layer of a scan over them."""

    config: TransformerConfig
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, carry: Any, layer: Array, angle: Array, visible: Array, column: Array | int) -> tuple[Any, None]:
        x, cache = carry
        return _block(self.config, self.lora, layer, "", x, angle, visible, cache, column), None


class Transformer(nn.Module):
    """Logits of the next token, and V, after every prefix of every row.

    A row holds tokens and padding (-1), to the left of a prompt and to the right of a response. Nothing attends to
    padding, and a token's position is the number of tokens before it in its row, so padding does not change the result.
    Outputs at padding are finite and meaningless.

    Attributes:
      lora: adds adapters to the linear layers that it names, as further parameters.
      remat: keep only the inputs of each block for a gradient, which computes the block again.
      scan_layers: compile one block for all layers. Its parameters are those of `stacked`.
      gather: parameters are divided over the agent's devices, and are gathered where they are used.
    """

    config: TransformerConfig
    num_tokens: int
    lora: LoRA | None = None
    remat: bool = False
    scan_layers: bool = False
    gather: bool = False

    @nn.compact
    def __call__(
        self, token: Array, cache: Cache | None = None, column: Array | int = 0, with_logits: bool = True
    ) -> tuple[Array, Array | None, Cache | None]:
        """Applies the model to n columns.

        Args:
          token: `[B, n]` int, each in [0, num_tokens) or -1.
          cache: the previous columns. None: `token` holds complete rows.
          column: int or traced integer, the first of the cache's columns that `token` fills; column + n must not exceed
            the cache's length. Later columns are ignored.
          with_logits: False: return hidden states `[B, n, hidden_size]`, of which `logits_of` are the logits.
        Returns:
          (logits `[B, n, V]`, V `[B, n]` or None, the updated cache or None).
        Raises:
          UsageError: the config's numbers do not fit together. AssertionError: an array has the wrong shape.
        """
        c = check_transformer(self.config)
        chex.assert_rank(token, 2)
        chex.assert_type(token, int)
        B, n = token.shape
        small = nn.initializers.normal(0.02)  # keeps the first logits small, also with a tied head
        embedding = self.param("embedding", small, (self.num_tokens, c.hidden_size))
        present = token >= 0
        position = jnp.cumsum(present, axis=1) - present
        own = jnp.arange(n)
        if cache is None:
            visible = present[:, None, :] & (own <= own[:, None])
        else:
            L = cache.present.shape[1]
            chex.assert_shape(cache.present, (B, L))
            chex.assert_shape([cache.key, cache.value], (c.num_layers, B, L, c.num_kv_heads, c.head_size))
            assert n <= L and not (isinstance(column, int) and column + n > L), f"{column} + {n} columns exceed {L}"
            before = cache.present & (jnp.arange(L) < column)
            position += jnp.sum(before, axis=1, keepdims=True)
            cache = cache._replace(present=lax.dynamic_update_slice(cache.present, present, (0, column)))
            visible = cache.present[:, None, :] & (jnp.arange(L) <= column + own[:, None])

        gather = self.gather and not self.is_initializing()
        embedding = whole(embedding) if gather else embedding
        x = embed(embedding, token)
        angle = rotary_angle(
            position, c.head_size, c.rope_theta, at_least_float32(x).dtype, c.rope_factor, c.rope_context
        )
        remat = self.remat and cache is None
        if self.scan_layers:
            kind: Any = nn.map_variables(Block, "params", whole) if gather else Block
            kind = nn.remat(kind, prevent_cse=False) if remat else kind
            axes: Any = {"variable_axes": {"params": 0}, "in_axes": (0, *[nn.broadcast] * 3)}
            blocks = nn.scan(kind, split_rngs={"params": True}, length=c.num_layers, **axes)(
                c, self.lora, name="blocks"
            )
            (x, cache), _ = blocks((x, cache), jnp.arange(c.num_layers), angle, visible, column)
        else:

            def block(self, i, x, cache):
                return _block(c, self.lora, i, f"_{i}", x, angle, visible, cache, column)

            block = nn.map_variables(block, "params", whole) if gather else block
            block = nn.remat(block, static_argnums=(1,)) if remat else block
            for i in range(c.num_layers):
                x, cache = block(self, i, x, cache)
        x = RMSNorm(c.rms_eps, name="final_norm")(x)
        head = embedding if c.tied_head else Head(self.num_tokens, name="head")(c.hidden_size)
        head = whole(head) if gather else head
        value = None
        if c.value_head:
            value = nn.Dense(1, kernel_init=nn.initializers.zeros, name="value_head")(x).squeeze(-1)
            value = at_least_float32(rounded(value))
        return logits_of(x, head, c.tied_head) if with_logits else x, value, cache


BLOCK = ("attention_norm", "attention", "mlp_norm", "mlp")  # the modules of a layer


def stacked(params: Params, num_layers: int) -> Params:
    """Parameters of layer after layer, such as `attention_0`, as those of `blocks`, whose first axis is the layer's."""
    own = dict(params["params"])
    held = [name for name in BLOCK if f"{name}_0" in own]
    layers = [{name: own.pop(f"{name}_{i}") for name in held} for i in range(num_layers)]
    return {"params": own | {"blocks": jax.tree.map(_stack, *layers)}}


def _stack(*x: Any) -> Any:
    return (np if isinstance(x[0], np.ndarray) else jnp).stack(x)


def unstacked(params: Params) -> Params:
    """What `stacked` was made of; other parameters stay unchanged."""
    own = dict(params["params"])
    blocks = own.pop("blocks", {})
    layers = range(len(jax.tree.leaves(blocks)[0]) if blocks else 0)
    return {
        "params": own | {f"{name}_{i}": jax.tree.map(itemgetter(i), blocks[name]) for name in blocks for i in layers}
    }


class Head(nn.Module):
    """The matrix of an output layer of its own, `[hidden_size, V]`."""

    num_tokens: int

    @nn.compact
    def __call__(self, hidden_size: int) -> Array:
        return self.param("kernel", nn.initializers.normal(0.02), (hidden_size, self.num_tokens))


def logits_of(hidden: Array, head: Array, tied: bool) -> Array:
    """The logits `[..., V]`, at least float32, of hidden states `[..., hidden_size]`.

    Args:
      head: the embedding `[V, hidden_size]` if it is tied, else `[hidden_size, V]`.
    """
    contracted = (((hidden.ndim - 1,), (1 if tied else 0,)), ((), ()))
    return at_least_float32(_rounded_product(hidden, head, contracted))


def embed(embedding: Array, token: Array) -> Array:
    """Returns rows `[..., hidden_size]` of `embedding` `[V, hidden_size]`; padding gets token 0's row, to stay finite.

    A small vocabulary is multiplied as one-hot rows: the gradient of a gather is a scatter, which on a CPU processes
    rows one at a time, and again for each vmapped seed. The cost of the product grows with V.
    """
    token = jnp.maximum(token, 0)
    if embedding.shape[0] <= ONE_HOT_TOKENS:
        return jax.nn.one_hot(token, embedding.shape[0], dtype=embedding.dtype) @ embedding
    return jnp.take(embedding, token, axis=0)


def rotary_angle(
    position: Array,
    head_dim: int,
    theta: Array | float,
    dtype: Any = jnp.float32,
    factor: Array | float = 1.0,
    context: int | None = None,
) -> Array:
    """position * theta^(-2 i / d) for i = 0, ..., d / 2 - 1 (Su et al. 2021, sec. 3.2.2): `[...]` to `[..., d / 2]`.

    Frequencies are divided by `factor`: all of them (Chen et al. 2023, "position interpolation"), or with a `context`
    those that turn less than once in it, while those that turn four times or more stay (Llama 3).
    """
    frequency = 1 / jnp.asarray(theta, dtype) ** (jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    turns = 0.0 if context is None else context * frequency / (2 * math.pi)
    kept = jnp.clip((turns - 1) / 3, 0, 1)
    return position[..., None].astype(dtype) * frequency * (kept + (1 - kept) / factor)


def rotate(x: Array, angle: Array) -> Array:
    """Rotates the pairs (x_i, x_{i + d/2}) of every head of `x` `[..., n, heads, d]` by the `angle` `[..., n, d / 2]`
    of its column, so that the product of a query and a key depends only on the difference of their positions.

    Su et al. pair neighbours, (x_{2i}, x_{2i+1}); these pairs are Hugging Face's, for which checkpoints are stored.
    """
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    first, second = jnp.split(at_least_float32(x), 2, axis=-1)
    return rounded(jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), x.dtype)


class Linear(nn.Module):
    """A linear layer with kernels of standard deviation scale / sqrt(inputs), which preserves the scale of activations
    at any width. GPT-2's and Llama's 0.02 suits a width of about 2000; at 64 it would make a layer's output nearly 0.

    Attributes:
      lora: adds an adapter (`purepg.language.lora`).
    """

    size: int
    use_bias: bool = False
    scale: float = 1.0
    lora: LoRA | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal")
        y = _product(x, self.param("kernel", init, (x.shape[-1], self.size)))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.size,))
        if self.lora is not None:
            down = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], self.lora.rank))
            up = self.param("lora_b", nn.initializers.zeros, (self.lora.rank, self.size))
            y += rounded(self.lora.scale * at_least_float32(_product(_product(x, down), up)), y.dtype)
        return rounded(y)


def _dense(x: Array, size: int, name: str, lora: LoRA | None, use_bias: bool = False, scale: float = 1.0) -> Array:
    return Linear(size, use_bias, scale, lora if lora and name in lora.targets else None, name=name)(x)


def _product(x: Array, kernel: Array) -> Array:
    return _rounded_product(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _rounded_product(*args: Any, **kwargs: Any) -> Array:
    return rounded(lax.dot_general(*args, **kwargs))


def _residual_scale(config: TransformerConfig) -> float:
    """Scales the two additions per layer to the residual stream, so that it does not grow with depth (GPT-2)."""
    return 1 / math.sqrt(2 * config.num_layers)
