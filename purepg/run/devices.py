"""Spreads agents over the machine's devices, and sets up the cache of compiled programs."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purepg.loops import lanes
from purepg.pbt import POPULATION
from purepg.run import processes
from purepg.runtime import backend_is_running, split_cpu
from purepg.spread import AXIS
from purepg.types import State, UsageError

MEMBER = "member"  # the mesh's axis of agents
AxisOf = Callable[[Sequence[Any], Sequence[int], int], int | None]

# A CPU's devices for each core. With two, a core has work while the other agents of a device wait for their last one:
# PPO, SAC and TD3 train 4 to 30 % faster on two cores than with one.
CPU_DEVICES_PER_CORE = 2


def prepare_devices(
    devices: int | None,
    num_seeds: int,
    num_settings: int,
    wide: bool = False,
    per_agent: int = 1,
    split: bool = True,
) -> int:
    """Splits the CPU into devices if no JAX backend runs yet, and returns the number of devices to spread agents over.

    Args:
      devices: the number to use; None: as many as can.
      wide: whether the program has many operations that can run at once, as those of other suites' environments have;
        its devices then get more worker threads (`split_cpu`).
      per_agent: devices over which each agent is spread.
      split: whether a CPU is split further than `devices` and `per_agent` ask for.
    Raises:
      UsageError: `devices` or `per_agent` exceeds what the machine has, `devices` is no multiple of `per_agent` or of
        the number of processes, or the number of groups of devices divides neither the seeds nor the settings.
    """
    several = processes.number()
    for what, count in ("devices_per_agent", per_agent), ("the number of processes", several):
        if devices is not None and devices % count:
            raise UsageError(f"devices ({devices}) must be divisible by {what} ({count})")
    if devices is not None and most_devices(groups := devices // per_agent, num_seeds, num_settings) != groups:
        of_agents = f" / devices_per_agent ({per_agent})" if per_agent > 1 else ""
        or_settings = f" or the settings ({num_settings})" if num_settings > 1 else ""
        raise UsageError(f"devices ({devices}){of_agents} must divide num_seeds ({num_seeds}){or_settings}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not backend_is_running():
        own = max(1, CPU_DEVICES_PER_CORE * cores // processes.neighbours()) if split else 1
        at_most = max(1, several * min(processes.gathered(own)) // per_agent)
        cpu_devices = devices or per_agent * shared_devices(at_most, num_seeds, num_settings, per_agent)
        if cpu_devices > 1:
            own = cpu_devices // several
            split_cpu(own, (8 if wide else 2) * max(cores, own))
    available = jax.device_count()
    if len(set(numbers := processes.gathered(jax.local_device_count()))) > 1:
        raise UsageError(f"all processes must have as many devices; they have {', '.join(map(str, numbers))}")
    if devices is not None and devices > available:
        raise UsageError(f"devices ({devices}) must be at most {available}, the number that this machine has")
    if per_agent > available:
        raise UsageError(f"devices_per_agent ({per_agent}) must be at most {available}, what this machine has")
    return devices or per_agent * shared_devices(available // per_agent, num_seeds, num_settings, per_agent)


def most_devices(available: int, num_seeds: int, num_settings: int, unit: int = 1) -> int:
    """The largest number of devices, at most `available`, that divides the number of seeds or of settings, and that is
    a multiple of `unit`; 0 if there is none."""
    fitting = (n for n in range(unit, available + 1, unit) if num_seeds % n == 0 or num_settings % n == 0)
    return max(fitting, default=0)


def shared_devices(available: int, num_seeds: int, num_settings: int, per_agent: int) -> int:
    """`most_devices` in groups of `per_agent`, of which each process of the run has an equal part.

    Raises:
      UsageError: no number of groups is such.
    """
    several = processes.number()
    unit = several // math.gcd(several, per_agent)
    if found := most_devices(available, num_seeds, num_settings, unit):
        return found
    raise UsageError(
        f"{several} processes cannot take equal parts of {num_settings} settings of {num_seeds} seeds: the number of "
        f"settings or of seeds at once, and of devices, must be divisible by {unit}"
    )


def _first_devices(number: int) -> list[Any]:
    """So many devices, as many of each process of the run."""
    of_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(device)
    return [device for _, own in sorted(of_process.items()) for device in own[: number // len(of_process)]]


def use_compile_cache() -> None:
    """Turns on JAX's persistent compilation cache; a cache folder that the user has set is kept."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "purepg" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Spread:
    """Maps a function of one agent, (hyper, seed, *rest), over `[H, S]`, and shards it over devices along the axis
    that their number divides: seeds if possible, else settings.

    Args:
      per_agent: devices of each agent. With several, the mesh has a second axis, along which its environments are
        divided (`purepg.spread`).
      axis_of: the axis, counted from the last, along which a leaf of a learner or of a warm start is divided over the
        devices of an agent, from its path, shape and their number; None: it is whole.
      devices: from which to take them. None: the machine's.
      whole_world: every device of an agent has its whole world, as one that holds no environments.
    """

    def __init__(
        self,
        num_settings: int,
        num_seeds: int,
        num_devices: int,
        per_agent: int = 1,
        axis_of: AxisOf | None = None,
        devices: Sequence[Any] | None = None,
        whole_world: bool = False,
    ):
        groups = shared_devices(num_devices // per_agent, num_seeds, num_settings, per_agent)
        self.num_devices = num_devices = groups * per_agent
        shape, axes = ((groups, per_agent), (MEMBER, AXIS)) if per_agent > 1 else ((groups,), (MEMBER,))
        devices = _first_devices(num_devices) if devices is None else devices
        self._mesh = Mesh(np.reshape(devices, shape), axes) if num_devices > 1 else None
        everywhere, spread = P(), P(MEMBER)
        self._hyper, self._seeds, self._leaf = (
            (everywhere, spread, P(None, MEMBER)) if num_seeds % groups == 0 else (spread, everywhere, spread)
        )
        rows = P(*self._leaf, *[None] * (2 - len(self._leaf)), AXIS) if per_agent > 1 else self._leaf
        # How arrays `[H, S, N, ...]` are sharded, N of an agent's environments or prompts; None: on one device.
        self.rows = NamedSharding(self._mesh, rows) if self._mesh else None
        self._state = State(self._leaf, self._leaf if whole_world else rows, self._leaf)
        self.placed: Any = None  # how a state is sharded, for `jax.jit`; None: as XLA does without being told
        if self._mesh and per_agent > 1:
            self.placed = State(*(NamedSharding(self._mesh, spec) for spec in self._state))
        self.axis_of = axis_of if self._mesh and per_agent > 1 else None
        if self.axis_of:  # then as `divided` has it
            self.placed = self.placed._replace(learner=None)
        # How results that the host reads are sharded: every process of several has all of them.
        self.read = NamedSharding(self._mesh, P()) if self._mesh and processes.number() > 1 else None

    def __call__(self, member: Callable, whole: bool = False) -> Callable:
        """The function of the population.

        Args:
          whole: every device of an agent computes all of the function, without an exchange.
        """

        def population(hyper, s, *rest):
            def with_hyper(hyper, *rest):
                return vmap_unless_one(lambda s, *rest: member(hyper, s, *rest))(s, *rest)

            return vmap_unless_one(with_hyper, POPULATION)(hyper, *rest)

        if self._mesh is None:
            return population

        axes = set(self._mesh.axis_names) if whole else {MEMBER}

        def sharded(hyper, s, *rest):
            specs: Any = {"in_specs": (self._hyper, self._seeds, *(self._leaf for _ in rest)), "out_specs": self._leaf}
            # Agents do not communicate, so shard_map's check of values that vary over them is not needed.
            spread = jax.shard_map(population, mesh=self._mesh, **specs, axis_names=axes, check_vma=False)
            return spread(hyper, s, *rest)

        return sharded

    def everywhere(self, tree: Any) -> Any:
        """The tree's arrays, on all of the devices: whole on each but for those that `axis_of` divides."""
        return jax.device_put(tree, None if self._mesh is None else self.shared(tree))

    def shared(self, tree: Any) -> Any:
        """How `everywhere` places the tree's arrays on several devices."""
        return self._shardings(P(), tree, True)

    def divided(self, state: State) -> State:
        """A traced state, whose learner is divided as `axis_of` says."""
        if self.axis_of is None:
            return state
        shardings = self._shardings(self._leaf, state.learner, True)
        return state._replace(learner=jax.lax.with_sharding_constraint(state.learner, shardings))

    def abstract(self, state: State) -> State:
        """A state's shapes and dtypes, annotated with their sharding. XLA keeps arrays of size 0 on every device."""
        if self._mesh is None:
            return state

        def annotated(spec, part, by_axis):
            def of(x, sharding):
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            return jax.tree.map(of, part, self._shardings(spec, part, by_axis))

        return State(*map(annotated, self._state, state, (True, False, False)))

    def _shardings(self, spec: P, tree: Any, by_axis: bool) -> Any:
        """How the tree's leaves are sharded, whose first axes are as in `spec`.

        Args:
          by_axis: and further ones as `axis_of` says.
        """
        mesh: Any = self._mesh

        def of(path, x):
            axis = self.axis_of(path, x.shape, mesh.shape[AXIS]) if self.axis_of and by_axis else None
            if axis is None or not x.size:
                return NamedSharding(mesh, spec if x.size else P())
            return NamedSharding(mesh, P(*spec, *[None] * (x.ndim + axis - len(spec)), AXIS))

        return jax.tree_util.tree_map_with_path(of, tree)


def vmap_unless_one(f: Callable, axis_name: str | None = None) -> Callable:
    """`jax.vmap`, except that a batch of one is computed without its batch axis: unbatched products are faster."""

    def mapped(*args):
        num = jax.tree.leaves(args)[0].shape[0]
        if num > 1:
            with lanes(num):
                return jax.vmap(f, axis_name=axis_name)(*args)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), f(*jax.tree.map(lambda x: x[0], args)))

    return mapped
