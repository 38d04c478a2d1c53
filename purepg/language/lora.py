"""Low-rank adaptation (Hu et al. 2022): a frozen model, and adapters A and B of its linear layers that learn.

    y = x W + (alpha / rank) (x A) B          A random, B zero: at the start, the policy is the frozen model's

Under `jax.vmap` over agents, W has no axis of agents: K sets of adapters share one frozen model, and the products with
it are those of a batch K times as large. Trees of parameters hold A and B as `lora_a` and `lora_b` beside `kernel`.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from purepg.precision import at_least_float32
from purepg.types import Array, Params

Target = Literal["query", "key", "value", "output", "gate", "up", "down"]
TARGETS: tuple[Target, ...] = ("query", "key", "value", "output", "gate", "up", "down")
ADAPTER = ("lora_a", "lora_b")


class LoRA(NamedTuple):
    """rank: columns of A. scale: alpha / rank. targets: the layers that have an adapter."""

    rank: int
    scale: Array | float
    targets: tuple[Target, ...]


def joined(frozen: Params, learned: Params) -> Params:
    """The parameters of both trees of dicts in one."""
    return {
        name: joined(frozen[name], learned[name])
        if name in frozen and name in learned
        else (learned if name in learned else frozen)[name]
        for name in {**frozen, **learned}
    }


def adapters(params: Params) -> dict[str, Any]:
    """The part of the tree that holds `lora_a` and `lora_b`."""
    found = {name: adapters(x) for name, x in params.items() if isinstance(x, dict)}
    own = {name: params[name] for name in ADAPTER if name in params}
    return own | {name: part for name, part in found.items() if part}


def merge(params: Params, scale: Array | float) -> Params:
    """Parameters with adapters as those of a plain model, with W + scale A B as kernels, at least in float32."""
    if not isinstance(params, dict):
        return at_least_float32(jnp.asarray(params))
    plain: Any = {name: merge(x, scale) for name, x in params.items() if name not in ADAPTER}
    if "lora_a" in params:
        change = scale * jnp.matmul(*(jnp.asarray(params[name]) for name in ADAPTER), precision="highest")
        plain["kernel"] += change
    return plain
