"""The environments of one agent, spread over several devices.

`run.devices.Spread` traces an agent within a mesh whose axis `env` is left to XLA's partitioner. Arrays of environments
are divided over it, parameters are whole on every device (but for those of language models that say otherwise,
`language.sharding`), and each reduction over environments, such as a loss's mean, is one over all devices: XLA adds the
exchange. So the equations and the algorithms do not mention devices. What each device does with its own environments,
and XLA could do only by moving them, says so by `within_device`: stepping and resetting them, dealing minibatches, and
replay. On one device, these functions change nothing.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, get_abstract_mesh
from jax.sharding import PartitionSpec as P

from purepg.types import Key, UsageError

AXIS = "env"  # of the mesh
SPREAD = ("num_envs", "num_episodes", "num_prompts")  # fields of configs that count what is spread
DIVIDED = (*SPREAD, "batch_size", "num_held_out")  # fields of which each device takes an equal part


def num_devices() -> int:
    """How many devices the agent that is traced is spread over; 1 within one of them."""
    mesh = get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.auto_axes else 1


def within_device(f: Callable, in_axes: Any, out_axes: Any) -> Callable:
    """`f`, applied on each device to its own environments, without an exchange. `f` may not close over traced arrays.

    Args:
      in_axes: for each argument, the axis of environments in its leaves, or None where all devices have the whole.
      out_axes: the same of the result.
    """
    if num_devices() == 1:
        return f

    def specs(axes):
        return jax.tree.map(lambda i: P() if i is None else P(*[None] * i, AXIS), axes, is_leaf=lambda i: i is None)

    return jax.shard_map(f, in_specs=specs(in_axes), out_specs=specs(out_axes), axis_names={AXIS}, check_vma=False)


def divided(x: Any, axis: int | None) -> Any:
    """The array, divided over the agent's devices along an axis; None: whole on each of them."""
    if num_devices() == 1:
        return x
    spec = P() if axis is None else P(*[None] * (axis % x.ndim), AXIS)
    return jax.lax.with_sharding_constraint(x, spec)


def own_key(key: Key) -> Key:
    """Within a device, a key that no other device has."""
    return jax.random.fold_in(key, jax.lax.axis_index(AXIS)) if AXIS in get_abstract_mesh().manual_axes else key


def spread_over(devices: int) -> contextlib.AbstractContextManager:
    """Within it, `num_devices` is `devices`, so that settings can be checked before anything is traced."""
    return (
        jax.sharding.use_abstract_mesh(AbstractMesh((devices,), (AXIS,))) if devices > 1 else contextlib.nullcontext()
    )


def check_divided(config: Any, name: str, from_file: bool = False) -> None:
    """Raises UsageError where the devices of an agent cannot take equal parts of what the config of the algorithm
    `name` counts, or where it has no environments, and no rows from a file, whose batches are divided."""
    found = {field: vars(config)[field] for field in DIVIDED if field in vars(config)}
    if (devices := num_devices()) > 1 and not (from_file or found.keys() & set(SPREAD)):
        raise UsageError(f"devices_per_agent ({devices}) must be 1: {name} has no environments to spread")
    for field, value in found.items():
        if value % devices:
            raise UsageError(f"{field} ({value}) must be divisible by devices_per_agent ({devices})")
