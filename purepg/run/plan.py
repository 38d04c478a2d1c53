"""What a run is, checked before anything compiles: its settings, its programs, its devices, and how it is kept."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import jax

from purepg import envs
from purepg.config import ANNEAL_UPDATES, Count, CountOrZero, NonNegative, Seed, check
from purepg.language.model import LanguageModelConfig, with_sizes
from purepg.run.load import reference
from purepg.run.population import (
    Chunk,
    Configs,
    Group,
    Make,
    Population,
    Setting,
    chunks,
    find_field,
    grid,
    group_by_program,
    most_devices,
)
from purepg.run.record import say
from purepg.run.resume import keep_schedules, read_config
from purepg.run.start import read_start
from purepg.runtime import backend_is_running, split_cpu
from purepg.types import Algorithm, Env, UsageError


@dataclass(frozen=True)
class RunConfig:
    """What to run, beside the algorithm.

    Attributes:
      env: name of the environment.
      total_steps: environment steps of each seed.
      num_seeds: agents trained for each setting.
      seed: seed of the run; agent s of every setting is keyed by (seed, s).
      log_every: updates in a block: the progress bar and log.jsonl move once a block, and W&B gets a row, the mean over
        it. 0: the whole run is one program, and W&B gets a row of every update at its end.
      eval_episodes: episodes of the final evaluation, for each seed.
      eval_seed: seed of the evaluation, the same for every agent.
      eval_max_steps: an evaluation episode is cut after this many steps; None: at the environment's time limit.
      max_parallel: agents trained at once; None: all of them, or as many as fit into memory.
      devices: devices that the agents are spread over; None: as many as divide them. On a CPU, a device is a core.
      compile_cache: keep compiled programs on disk, so that the next start is quick.
      checkpoint_every: seconds between checkpoints, each at the end of a block; there is one at the end in any case.
      keep: checkpoints that are kept, the latest.
      out: folder of the results; None: a new one under runs/.
      overwrite: replace the run that the folder holds.
      resume: go on with the run that the folder holds, as if it had never stopped. `total_steps` may be more than it
        was; a schedule stays as long as it first was.
      wandb: online (log in once with `wandb login`), offline (files in the folder), or disabled.
      wandb_per: a W&B run for every seed, or for every setting with mean and interval.
      wandb_project: W&B's project.
      wandb_group: W&B's group; None: the folder's name.
    """

    env: str = "CartPole-v1"
    total_steps: Count = 100_000
    num_seeds: Count = 16
    seed: Seed = 0
    log_every: CountOrZero = 10
    eval_episodes: Count = 128
    eval_seed: Seed = 0
    eval_max_steps: Count | None = None
    max_parallel: Count | None = None
    devices: Count | None = None
    compile_cache: bool = True
    checkpoint_every: NonNegative = 300.0
    keep: Count = 2
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False
    wandb: Literal["online", "offline", "disabled"] = "offline"
    wandb_per: Literal["seed", "setting"] = "seed"
    wandb_project: str = "purepg"
    wandb_group: str | None = None


MakeAlgorithm = Callable[[Env, Any, Any], Algorithm]
MakeNetwork = Callable[[Env, Any], Any]  # a network of the kind that the algorithm takes


@dataclass(frozen=True)
class Plan:
    """A run that was checked: nothing in it can be refused any more but its folder."""

    run: RunConfig
    env: Env
    make: Make
    settings: list[Setting]
    groups: list[Group]
    num_devices: int
    eval_max_steps: int
    code: dict[str, str]  # where the algorithm and its parts are to be found again
    stored: dict[str, Any] | None  # config.json of the run to go on with
    start_digest: str | None  # of the parameters that a language model starts from

    @property
    def order(self) -> list[tuple[Group, Chunk]]:
        """The run's chunks, as they are trained one after another."""
        run = self.run
        parts = [(group, chunks(len(group.settings), run.num_seeds, run.max_parallel)) for group in self.groups]
        return [(group, chunk) for group, of_group in parts for chunk in of_group]

    def population(self, group: Group, shape: tuple[int, int]) -> Population:
        """What trains a group's chunks of one shape."""
        run = self.run
        evaluation = run.eval_seed, run.eval_episodes, self.eval_max_steps
        return Population(self.env, self.make, group, shape, run.seed, run.total_steps, self.num_devices, *evaluation)


def prepare(
    algorithm: MakeAlgorithm,
    network: MakeNetwork,
    configs: Configs,
    run: RunConfig,
    sweep: Mapping[str, Sequence[Any]],
) -> Plan:
    """Checks everything that can be checked before anything compiles.

    Args:
      algorithm, network: how to make them from `configs[algorithm's name]` and `configs["network"]`.
      sweep: name of a field to its values; the settings are the grid of all.
    Raises:
      UsageError: in one line, what is wrong and what to do.
    """
    run = check(run)
    configs = {name: check(config) for name, config in configs.items()}
    if run.resume and (run.out is None or run.overwrite):
        raise UsageError("--resume needs --out, the folder of the run to go on with, and no --overwrite")
    stored = read_config(run.out) if run.resume and run.out else None
    configs = {name: _with_absolute_start(config) for name, config in configs.items()}
    settings = grid(configs, sweep)
    if stored:
        settings = keep_schedules(settings, stored)
    settings = [
        setting._replace(configs={name: check(config) for name, config in setting.configs.items()})
        for setting in settings
    ]
    if stored and run.max_parallel is None:  # a split of the population is part of its last bits
        run = replace(run, max_parallel=stored["run"].get("max_parallel"))
    num_devices = prepare_devices(run.devices, run.num_seeds, len(settings))
    if run.compile_cache:
        use_compile_cache()
    settings = _with_sizes_of_starts(settings)
    env = envs.make(run.env)
    eval_max_steps = run.eval_max_steps or env.max_episode_steps
    if eval_max_steps is None:
        raise UsageError(f"{env.name} has no time limit: set --eval-max-steps")

    algorithm_name = next(name for name in configs if name != "network")

    def make(configs: Configs) -> Algorithm:
        return algorithm(env, network(env, configs["network"]), configs[algorithm_name])

    groups = group_by_program(settings, make, run.total_steps)
    code = {
        "name": algorithm_name,
        "algorithm": reference(algorithm),
        "config": reference(type(configs[algorithm_name])),
        "network": reference(network),
        "network_config": reference(type(configs["network"])),
    }
    digest = getattr(network(env, configs["network"]), "digest", None)
    return Plan(run, env, make, settings, groups, num_devices, eval_max_steps, code, stored, digest)


def _with_absolute_start(config: Any) -> Any:
    """A config whose `start` is found again from any folder."""
    start = getattr(config, "start", None)
    return config if start is None else replace(config, start=str(Path(start).absolute()))


def _with_sizes_of_starts(settings: Sequence[Setting]) -> list[Setting]:
    """The settings with the sizes that a language model has from its `start`, so that config.json holds those in use;
    says where others were asked for.

    Raises:
      UsageError: a start cannot be read, or sizes are swept that it does not have.
    """
    resolved, lines = [], []
    for setting in settings:
        config = setting.configs["network"]
        if isinstance(config, LanguageModelConfig) and config.start is not None:
            found = with_sizes(config, read_start(Path(config.start).absolute())[0])
            overruled = {
                field.name: f"{field.name} ({getattr(config, field.name)}) is {getattr(found, field.name)}"
                for field in fields(config)
                if getattr(config, field.name) not in (field.default, getattr(found, field.name))
            }
            for name in setting.hyperparameters:
                where, field = find_field(setting.configs, name)
                if where == "network" and getattr(config, field) != getattr(found, field):
                    raise UsageError(
                        f"cannot sweep {name}: start ({config.start}) has its own, {getattr(found, field)}"
                    )
            if overruled:
                lines.append(f"sizes are those of start ({config.start}): {', '.join(overruled.values())}")
            setting = setting._replace(configs=setting.configs | {"network": found})
        resolved.append(setting)
    for line in dict.fromkeys(lines):
        say(line)
    return resolved


def prepare_devices(devices: int | None, num_seeds: int, num_settings: int) -> int:
    """Splits the CPU into devices, where that is still possible, and says over how many the agents are spread.

    Raises:
      UsageError: more devices than there are, or a number that divides neither seeds nor settings.
    """
    if devices is not None and most_devices(devices, num_seeds, num_settings) != devices:
        raise UsageError(f"devices ({devices}) must divide num_seeds ({num_seeds}) or the settings ({num_settings})")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not backend_is_running():
        cpu_devices = devices or most_devices(cores, num_seeds, num_settings)
        if cpu_devices > 1:
            split_cpu(cpu_devices, cores)
    available = jax.device_count()
    if devices is not None and devices > available:
        raise UsageError(f"devices ({devices}) must be at most {available}, what this machine has")
    return devices or most_devices(available, num_seeds, num_settings)


def use_compile_cache() -> None:
    """Turns JAX's persistent compilation cache on, in the user's own folder where they chose one."""
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "purepg" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def describe(plan: Plan, script: str) -> dict[str, Any]:
    """What config.json holds: all arguments, versions, and the population's layout, which its last bits depend on."""
    packages = ("purepg", "jax", "jaxlib", "flax", "optax", "gymnax", "numpy")
    devices = jax.devices()[: plan.num_devices]
    return {
        "script": script,
        "run": asdict(plan.run),
        **{name: asdict(config) for name, config in plan.groups[0].configs.items()},
        "code": plan.code,
        "start_digest": plan.start_digest,
        "settings": [setting.hyperparameters for setting in plan.settings],
        "schedules": [_schedule(plan, h) for h in range(len(plan.settings))],
        "num_updates": [next(g.num_updates for g in plan.groups if h in g.settings) for h in range(len(plan.settings))],
        "layout": [dict(zip(("settings", "seeds"), chunk.members(group), strict=True)) for group, chunk in plan.order],
        "devices": [device.device_kind for device in devices],
        "platform": {"backend": jax.default_backend(), "python": platform.python_version(), "os": platform.platform()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _schedule(plan: Plan, h: int) -> int | None:
    """How many updates a setting's schedules last; None: it has none."""
    group = next(g for g in plan.groups if h in g.settings)
    return next((c.anneal_updates for c in group.configs.values() if hasattr(c, ANNEAL_UPDATES)), None)
