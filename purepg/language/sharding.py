"""Parameters of a language model, divided over the devices of an agent (`purepg.spread`).

    parameters   every matrix is divided along one axis where it is kept, with its optimiser's state and its reference,
                 and is gathered where a block computes; each device computes with its own rows of tokens
                 (Rajbhandari et al. 2020, ZeRO; "FSDP")
    tensor       each device has its own hidden units of every MLP, heads and words, and computes these for all rows
                 (Shoeybi et al. 2019, Megatron)

What the number of devices does not divide is whole on all of them. XLA adds the exchange, so that results are those of
one device up to rounding.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax

from purepg.spread import divided, num_devices
from purepg.types import Array, Params, UsageError

Shard = Literal["none", "parameters", "tensor"]
OF_HEADS = ("query", "key", "value", "output")
BY_INPUTS = ("output", "down")  # layers whose inputs are divided by `tensor`; of others the outputs are


def axis_of(config: Any, path: Sequence[Any], shape: Sequence[int], devices: int) -> int | None:
    """The axis along which a parameter, or a moment of it, is divided, counted from the last one, -1; None: it is
    whole.

    Args:
      config: a `LanguageModelConfig`.
      path: its place in a tree that ends as that of the parameters does.
      shape: it may have further axes before those of the parameter.
    """
    layer, kind = ["", "", *(key.key for key in path if isinstance(key, jax.tree_util.DictKey))][-2:]
    is_matrix = kind in ("kernel", "embedding", "lora_a", "lora_b") and layer != "value_head"
    if config.shard == "parameters" and is_matrix:
        axes = sorted((-1, -2), key=lambda axis: -shape[axis])
    elif config.shard == "tensor" and (is_matrix or kind == "bias"):
        if layer in OF_HEADS and config.num_kv_heads % devices:
            return None
        by_inputs = layer in BY_INPUTS or kind == "embedding"
        if kind == ("lora_b" if by_inputs else "lora_a"):
            return None
        axes = [-2 if by_inputs else -1]
    else:
        return None
    return next((axis for axis in axes if shape[axis] % devices == 0), None)


def divided_parameters(config: Any, params: Params) -> Params:
    """The parameters, divided as they are kept."""
    if config.shard == "none" or num_devices() == 1:
        return params

    def of(path, x):
        return divided(x, axis_of(config, path, x.shape, num_devices()))

    return jax.tree_util.tree_map_with_path(of, params)


def divided_rows(config: Any, x: Array) -> Array:
    """Rows `[B, ...]` as a model computes them: divided over the devices, but for `tensor` whole on each."""
    if config.shard == "none":
        return x
    return divided(x, None if config.shard == "tensor" or x.shape[0] % num_devices() else 0)


def whole(tree: Any) -> Any:
    """The arrays, gathered on every device."""
    return jax.tree.map(lambda x: divided(x, None), tree)


def check_shard(config: Any, devices: int, eval_episodes: int) -> None:
    """Raises UsageError where the devices of an agent cannot divide a model as its config says.

    Args:
      config: of a network, perhaps not a language model's.
      eval_episodes: those of a divided model are divided too.
    """
    shard = getattr(config, "shard", None)
    if shard not in (None, "none") and devices == 1:
        raise UsageError(f"shard ({shard}) divides a model over an agent's devices: set devices_per_agent above 1")
    if shard is None or devices == 1:
        return
    sizes = {"none": (), "parameters": ("hidden_size",), "tensor": ("mlp_size",)}[shard]
    at_once = ("rows_at_once", "tokens_at_once") if shard != "tensor" else ()
    counts = {name: getattr(config, name) for name in (*sizes, *at_once)}
    if shard != "none":
        counts["eval_episodes"] = eval_episodes
    for name, count in counts.items():
        if count is not None and count % devices:
            raise UsageError(f"{name} ({count}) must be divisible by devices_per_agent ({devices}) with shard {shard}")
