"""Spreads agents over the machine's devices, and sets up the cache of compiled programs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purepg.loops import lanes
from purepg.runtime import backend_is_running, split_cpu
from purepg.types import UsageError

# A CPU's devices for each core. With two, a core has work while the other agents of a device wait for their last one:
# PPO, SAC and TD3 train 4 to 30 % faster on two cores than with one.
CPU_DEVICES_PER_CORE = 2


def prepare_devices(devices: int | None, num_seeds: int, num_settings: int, wide: bool = False) -> int:
    """Splits the CPU into devices if no JAX backend runs yet, and returns the number of devices to spread agents over.

    Args:
      wide: whether the program has many operations that can run at once, as those of other suites' environments have;
        its devices then get more worker threads (`split_cpu`).
    Raises:
      UsageError: `devices` exceeds what the machine has, or divides neither the seeds nor the settings.
    """
    if devices is not None and most_devices(devices, num_seeds, num_settings) != devices:
        raise UsageError(f"devices ({devices}) must divide num_seeds ({num_seeds}) or the settings ({num_settings})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not backend_is_running():
        cpu_devices = devices or most_devices(CPU_DEVICES_PER_CORE * cores, num_seeds, num_settings)
        if cpu_devices > 1:
            split_cpu(cpu_devices, (8 if wide else 2) * max(cores, cpu_devices))
    available = jax.device_count()
    if devices is not None and devices > available:
        raise UsageError(f"devices ({devices}) must be at most {available}, the number that this machine has")
    return devices or most_devices(available, num_seeds, num_settings)


def most_devices(available: int, num_seeds: int, num_settings: int) -> int:
    """The largest number of devices, at most `available`, that divides the number of seeds or of settings."""
    return max(n for n in range(1, available + 1) if num_seeds % n == 0 or num_settings % n == 0)


def use_compile_cache() -> None:
    """Turns on JAX's persistent compilation cache; a cache folder that the user has set is kept."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "purepg" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Spread:
    """Maps a function of one agent, (hyper, seed, *rest), over `[H, S]`, and shards it over devices along the axis
    that their number divides: seeds if possible, else settings."""

    def __init__(self, num_settings: int, num_seeds: int, num_devices: int):
        self.num_devices = num_devices = most_devices(num_devices, num_seeds, num_settings)
        self._mesh = Mesh(np.array(jax.devices()[:num_devices]), ("member",)) if num_devices > 1 else None
        everywhere, spread = P(), P("member")
        self._hyper, self._seeds, self._leaf = (
            (everywhere, spread, P(None, "member")) if num_seeds % num_devices == 0 else (spread, everywhere, spread)
        )

    def __call__(self, member: Callable) -> Callable:
        def population(hyper, s, *rest):
            def with_hyper(hyper, *rest):
                return vmap_unless_one(lambda s, *rest: member(hyper, s, *rest))(s, *rest)

            return vmap_unless_one(with_hyper)(hyper, *rest)

        if self._mesh is None:
            return population

        def sharded(hyper, s, *rest):
            in_specs = (self._hyper, self._seeds, *(self._leaf for _ in rest))
            # Devices do not communicate, so shard_map's check of values that vary over them is not needed.
            spread = jax.shard_map(
                population, mesh=self._mesh, in_specs=in_specs, out_specs=self._leaf, check_vma=False
            )
            return spread(hyper, s, *rest)

        return sharded

    def abstract(self, state: Any) -> Any:
        """A state's shapes and dtypes, annotated with their sharding. XLA keeps arrays of size 0 on every device."""
        if (mesh := self._mesh) is None:
            return state

        def annotated(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, self._leaf if x.size else P()))

        return jax.tree.map(annotated, state)


def vmap_unless_one(f: Callable) -> Callable:
    """`jax.vmap(f)`, except that a batch of one is computed without its batch axis: unbatched products are faster."""

    def mapped(*args):
        num = jax.tree.leaves(args)[0].shape[0]
        if num > 1:
            with lanes(num):
                return jax.vmap(f)(*args)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), f(*jax.tree.map(lambda x: x[0], args)))

    return mapped
