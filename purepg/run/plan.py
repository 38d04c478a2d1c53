"""The plan of a run: settings, programs and devices, all checked before anything compiles."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purepg.config import check
from purepg.envs.suites import suite_of
from purepg.envs.tasks import TokenStep
from purepg.language.sharding import check_shard
from purepg.run import processes
from purepg.run.code import address_of
from purepg.run.config import RunConfig
from purepg.run.devices import prepare_devices, shared_devices, use_compile_cache
from purepg.run.environment import EnvSource, find_environment
from purepg.run.folder.config import read_config
from purepg.run.folder.files import plain
from purepg.run.outside import devices_for, known_outside, not_jax, refuse_without_explorer
from purepg.run.schedule import Change, parse_schedule
from purepg.run.search import Sweep, rungs, settings_of
from purepg.run.start import with_absolute_start, with_sizes_of_starts
from purepg.run.sweep import (
    Chunk,
    Configs,
    Make,
    Program,
    Setting,
    chunks,
    programs,
    with_schedule,
)
from purepg.run.text.config import FileRunConfig, RowsRunConfig, TextRunConfig
from purepg.run.tuning import Tuning, tuning_of
from purepg.run.watch.opening import refuse_several_under_an_agent
from purepg.spread import check_divided, spread_over
from purepg.types import Algorithm, Array, Env, Params, UsageError

MakeAlgorithm = Callable[[Env, Any, Any], Algorithm]
MakeNetwork = Callable[[Env, Any], Any]  # returns a network of the kind that the algorithm takes


class Warm(NamedTuple):
    """Arrays that are arguments of a run's programs, since a program would hold copies of its constants, and compute
    with them while it compiles."""

    start: Params | None  # what a language model starts from
    tables: dict[str, Array]  # by the field of `Task` that has them, where one does
    held_out: dict[str, Array]  # those of the held-out environment's


@dataclass(frozen=True)
class Plan:
    """A checked run: only its folder can still be refused."""

    run: RunConfig
    env: Env
    make: Make
    warm: Callable[[Configs], Warm]
    sweep: Sweep
    settings: list[Setting]
    programs: list[Program]
    num_devices: int
    eval_max_steps: int
    code: dict[str, str | None]  # addresses (`purepg.run.code`) from which the algorithm and its parts are rebuilt
    stored: dict[str, Any] | None  # config.json of the run to resume
    start_digest: str | None  # digest of a language model's initial parameters
    rungs: list[int]  # environment steps at the end of each, where settings are halved
    tuning: Tuning | None = None  # of population-based training
    schedule: tuple[Change, ...] = ()

    @property
    def eval_every(self) -> int:
        """Updates between evaluations within training; 0 where there are none but the first."""
        return self.run.eval_every if isinstance(self.run, FileRunConfig) else 0

    def chunks(self, settings: Collection[int] | None = None, total_steps: int | None = None) -> list[Chunk]:
        """The agents of these settings, divided into what is trained at once, in the order in which it is trained.

        Args:
          settings: positions. None: all.
          total_steps: the budget of each agent. None: that of the run.
        """
        settings = range(len(self.settings)) if settings is None else settings
        total_steps = self.run.total_steps if total_steps is None else total_steps
        run, kept = self.run, [program.only(settings, total_steps) for program in self.programs]
        sizes = run.num_seeds, run.max_parallel, self.tuning is not None
        return [chunk for program in kept if program for chunk in chunks(program, *sizes)]

    def program_of(self, h: int) -> Program:
        """The program that trains the setting at position `h` of the sweep."""
        return next(program for program in self.programs if h in program.settings)

    def algorithm_of(self, h: int, setting: Setting | None = None) -> Algorithm:
        """The algorithm of the setting at position `h`, or of another of its program; its schedules span the whole
        run."""
        return self.make(with_schedule((setting or self.settings[h]).configs, self.program_of(h).num_updates))


def prepare(
    algorithm: MakeAlgorithm,
    network: MakeNetwork,
    configs: Configs,
    run: RunConfig,
    sweep: Sweep,
    env: EnvSource | None = None,
) -> Plan:
    """Checks everything that can be checked before anything compiles.

    Args:
      algorithm, network: functions that make them from `configs[algorithm's name]` and `configs["network"]`.
      sweep: maps a field's name to its values; the settings are the grid of all of them, or drawn by `run.search`.
      env: replaces the environment named by `run.env`.
    Raises:
      UsageError: an argument is wrong; the message says what to do.
    """
    if isinstance(env, str):
        run, env = replace(run, env=env), None
    run = check(replace(run, out=Path(run.out)) if isinstance(run.out, str) else run)
    processes.start(run)
    name = next(name for name in configs if name != "network")
    for made_by, config in ((algorithm, configs[name]), (network, configs["network"])):
        _check_kind(made_by, config)
    configs = {name: with_absolute_start(check(config)) for name, config in configs.items()}
    if run.resume and (run.out is None or run.overwrite):
        raise UsageError("--resume needs --out, the folder of the run to resume, and no --overwrite")
    if run.distributed and run.out is None:
        raise UsageError("distributed needs out, a folder that all processes share")
    if run.wandb == "online" and run.out is None:
        raise UsageError("wandb (online) needs out, a folder for the files that W&B keeps until they are uploaded")
    stored = _with_later_fields(read_config(run.out), {**configs, "run": run}) if run.resume and run.out else None
    if stored and run.max_parallel is None:  # the last bits of the results depend on the chunks' sizes
        run = replace(run, max_parallel=stored["run"].get("max_parallel"))
    _check_rounds(run)
    settings = _settings(configs, sweep, run, stored)
    if run.out and run.wandb != "disabled":
        refuse_several_under_an_agent(len(settings) * (run.num_seeds if run.wandb_per == "seed" else 1))
    num_devices = _prepare_devices(run, env, len(settings))
    if run.compile_cache:
        use_compile_cache()
    settings = with_sizes_of_starts(settings)
    world, env_address = find_environment(run, configs["network"], env)
    run = _within_epochs(replace(run, env=world.name if env else run.env), world)
    num_devices = devices_for(world, num_devices, run.devices, run.devices_per_agent)
    num_devices = _devices_for_tensors(settings, num_devices, run)
    eval_max_steps = run.eval_max_steps or world.max_episode_steps
    if eval_max_steps is None:
        raise UsageError(f"{world.name} has no time limit: set --eval-max-steps")

    def make(configs: Configs, warm: Warm | None = None) -> Algorithm:
        own = world if warm is None else _with_tables(world, warm)
        made = network(own, configs["network"])
        start = warm and warm.start
        return algorithm(own, made if start is None else made._replace(start=start), configs[name])

    def warm(configs: Configs) -> Warm:
        start = getattr(network(world, configs["network"]), "start", None)
        return Warm(start, *(_tables(env and env.task) for env in (world, world.held_out)))

    code = {
        "name": name,
        "algorithm": address_of(algorithm),
        "config": address_of(type(configs[name])),
        "network": address_of(network),
        "network_config": address_of(type(configs["network"])),
        "env": env_address,
        "run": address_of(type(run)),
    }
    digest = getattr(network(world, settings[0].configs["network"]), "digest", None)
    planned = _programs(settings, make, run, name, world)
    first = make(planned[0].configs)
    refuse_without_explorer(world, first, name)
    least = max(program.update_steps.most for program in planned)
    steps = rungs(run.total_steps, run.halve, run.first_rung, len(settings), least) if run.halve else []
    tuning = tuning_of(run.pbt, run.search, sweep, planned, first, world) if run.pbt else None
    changes = parse_schedule(
        run.schedule, planned[0].configs, list(sweep), first.update_steps, not_jax(world) is not None
    )
    checked = run, world, make, warm, sweep, settings, planned, num_devices, eval_max_steps, code, stored, digest
    plan = Plan(*checked, steps, tuning, changes)
    shapes = {chunk.shape for chunk in plan.chunks()}
    if run.halve or run.tpe:  # later rounds may be as small as this
        shapes.add((1, run.num_seeds))
    for num_settings, num_seeds in shapes:
        apart = 1 if tuning else num_settings
        shared_devices(num_devices // run.devices_per_agent, num_seeds, apart, run.devices_per_agent)
    return plan


def with_settings(plan: Plan, settings: Sequence[Setting]) -> Plan:
    """The plan with further settings."""
    settings = [*plan.settings, *with_sizes_of_starts(list(map(_checked, settings)))]
    planned = _programs(settings, plan.make, plan.run, plan.code["name"] or "", plan.env)
    return replace(plan, settings=settings, programs=planned)


def _programs(settings: list[Setting], make: Make, run: RunConfig, name: str, env: Env) -> list[Program]:
    from_file = env.task is not None and env.task.rows is not None
    episodes = 0 if from_file or not_jax(env) else run.eval_episodes
    with spread_over(run.devices_per_agent):
        for setting in settings:
            check_shard(setting.configs["network"], run.devices_per_agent, episodes)
            check_divided(setting.configs[name], name, from_file)
        return programs(settings, make, run.total_steps)


def _check_rounds(run: RunConfig) -> None:
    """Raises UsageError where the fields that divide a search into rounds do not fit together."""
    if run.tpe and (run.search is None or run.tpe >= run.search):
        raise UsageError(f"tpe ({run.tpe}), the settings of a round, must be less than search ({run.search})")
    given = [f"{name} ({value})" for name in ("halve", "tpe", "pbt") if (value := getattr(run, name))]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are different ways to search: give one of them")
    if run.first_rung and not run.halve:
        raise UsageError(f"first_rung ({run.first_rung}) needs halve, such as --halve 3")


def _tables(task: Any) -> dict[str, Array]:
    """The fields of a task that are large arrays, where it has them."""
    found = {name: getattr(task, name, None) for name in ("rows", "stop")}
    return {name: table for name, table in found.items() if table is not None}


def _with_tables(env: Env, warm: Warm) -> Env:
    """The environment with tables that are arguments of a program."""

    def changed(env, tables):
        if not tables:
            return env
        task = env.task._replace(**tables)
        return env._replace(task=task, step=TokenStep(task) if env.step == TokenStep(env.task) else env.step)

    return changed(env, warm.tables)._replace(held_out=env.held_out and changed(env.held_out, warm.held_out))


def _within_epochs(run: RunConfig, env: Env) -> RunConfig:
    """The run with the environment steps of its epochs, where those are fewer than its own."""
    if not isinstance(run, RowsRunConfig) or run.epochs is None:
        return run
    if env.task is None or env.task.rows is None:
        raise UsageError(f"epochs ({run.epochs}) needs rows from a file: give --total-steps for {env.name}")
    one = env.task.rows[..., env.task.prompt_length :].size
    return replace(run, total_steps=min(run.total_steps, run.epochs * one))


def _prepare_devices(run: RunConfig, env: EnvSource | None, num_settings: int) -> int:
    """`prepare_devices`, from what is known of an environment before a function makes it, which may start JAX."""
    devices, per_agent = run.devices, run.devices_per_agent
    if known_outside(run.env, env) and processes.number() == 1:
        devices, per_agent = 1, 1
    split = not isinstance(run, TextRunConfig)  # agents of one device share the products of what is frozen
    wide = suite_of(run.env) is not None if env is None else isinstance(env, Env) and env.costly_reset
    return prepare_devices(devices, run.num_seeds, 1 if run.pbt else num_settings, wide, per_agent, split)


def _devices_for_tensors(settings: Sequence[Setting], found: int, run: RunConfig) -> int:
    """How many of the devices that were found divide models by `tensor`: on a CPU, those of one group of agents. There,
    XLA lets groups wait for each other in what they exchange while they sample, and responses differ in length. Raises
    UsageError where more were asked for."""
    shards = {getattr(setting.configs["network"], "shard", None) for setting in settings}
    one = run.devices_per_agent
    if "tensor" not in shards or found == one or jax.default_backend() != "cpu":
        return found
    if run.devices is not None:
        raise UsageError(f"devices ({found}) must be devices_per_agent ({one}) with shard tensor on a CPU")
    return one


def _settings(configs: Configs, sweep: Sweep, run: RunConfig, stored: Mapping[str, Any] | None) -> list[Setting]:
    """The settings, checked. When a run is resumed, its schedules keep their original length."""
    settings = settings_of(configs, sweep, run.search, run.seed, run.tpe)
    if run.fresh_seeds and len(settings) == 1:
        raise UsageError(f"fresh_seeds ({run.fresh_seeds}) needs several settings, as of a search or a sweep")
    if stored and len(stored["schedules"]) == len(settings):  # otherwise `refuse_differences` reports the difference
        settings = [
            setting._replace(configs=with_schedule(setting.configs, length))
            for setting, length in zip(settings, stored["schedules"], strict=True)
        ]
    return list(map(_checked, settings))


def _checked(setting: Setting) -> Setting:
    return setting._replace(configs={name: check(config) for name, config in setting.configs.items()})


def _with_later_fields(stored: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a run. Fields that its configs did not have yet have their defaults, as they had in effect."""
    later = {
        name: plain({field.name: field.default for field in fields(config) if field.default is not MISSING})
        for name, config in configs.items()
        if isinstance(stored.get(name), dict)
    }
    return dict(stored) | {name: defaults | stored[name] for name, defaults in later.items()}


def _check_kind(made_by: Callable, config: Any) -> None:
    """Raises UsageError where an algorithm or a network says that its config is of another kind. Kinds are compared by
    name, since a copy of an algorithm's file has a config class of its own."""
    kind, name = getattr(made_by, "__annotations__", {}).get("config"), getattr(made_by, "__name__", "it")
    if isinstance(kind, type) and kind.__name__ not in [base.__name__ for base in type(config).__mro__]:
        raise UsageError(f"{name} takes a {kind.__name__}, not a {type(config).__name__}")
