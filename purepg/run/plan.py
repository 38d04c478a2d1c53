"""`RunConfig`, and the plan of a run: settings, programs and devices, all checked before anything compiles."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from purepg.config import Count, CountOrZero, NonNegative, Positive, Range, Seed, check
from purepg.envs.suites import suite_of
from purepg.run import processes
from purepg.run.code import address_of
from purepg.run.devices import prepare_devices, shared_devices, use_compile_cache
from purepg.run.environment import EnvSource, find_environment
from purepg.run.folder.config import read_config
from purepg.run.folder.files import plain
from purepg.run.outside import known_outside, one_device, refuse_without_explorer
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
from purepg.run.tuning import Tuning, tuning_of
from purepg.run.watch.opening import refuse_several_under_an_agent
from purepg.spread import check_divided, spread_over
from purepg.types import Algorithm, Env, Params, UsageError


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, apart from those of the algorithm and the network.

    Attributes:
      env: name of the environment, such as CartPole-v1 or craftax/Craftax-Symbolic.
      total_steps: budget of environment steps for each agent.
      num_seeds: number of agents trained for each setting.
      seed: seed of the run. Agent s of every setting derives its key from (seed, s).
      log_every: updates in a block. After each block the progress bar and log.jsonl advance, and W&B gets one row, the
        mean over the block. 0: the whole run is one program, and W&B gets a row for every update at the end.
      eval_episodes: number of episodes in each agent's final evaluation.
      eval_seed: seed of the final evaluation, the same for every agent.
      eval_max_steps: truncate evaluation episodes after this many steps. None: at the environment's time limit.
      search: number of settings drawn from the ranges and lists of the sweep, by Sobol points. None: the grid of lists.
      halve: after each rung, only the best 1/halve of the settings are trained on (successive halving). The first rung
        is so short that one setting is left in the last, which ends at total_steps. None: all are trained to the end.
      first_rung: environment steps of each agent in the first rung; later ones are halve times as long. None: as short
        as leaves one setting.
      tpe: number of settings that are trained at once in a search; the first are Sobol points, and those of each later
        round are proposed by Optuna's TPE, from the returns so far. None: all settings are Sobol points.
      pbt: population-based training of the search's settings (`purepg.pbt`): the environment steps between two rounds,
        in which the worst copy the best and change hyperparameters, rounded down to whole updates. None: off.
      fresh_seeds: number of seeds, unseen in the run, on which the best setting, or with pbt the schedule of the best
        member, is trained and evaluated again. None: after a search, as many as num_seeds, or the first multiple of it
        from 10 on; after a grid, none.
      schedule: float fields that change during the run, each as NAME=STEP:VALUE,STEP:VALUE,... in environment steps,
        such as learning_rate=0:1e-3,50000:1e-4.
      max_parallel: number of agents trained at once. None: all of them, or as many as fit into memory.
      devices: devices for the agents (a CPU is split); must divide the seeds or, without pbt, the settings. None: as
        many as can, on a CPU at most two for each core.
      devices_per_agent: devices over which the environments (or prompts, or episodes) of each agent are spread. The
        result is that of one device, up to rounding and to how minibatches are dealt.
      compile_cache: keep compiled programs on disk, so that the next run starts faster.
      checkpoint_every: seconds between checkpoints, which are saved at the ends of blocks, and always after the last.
      keep: number of checkpoints to keep; older ones are deleted.
      out: folder for the results. None: the command line makes a new one under runs/; Python writes no files.
      overwrite: replace the run in the folder.
      resume: continue the run in the folder, with the same results as if it had never stopped. total_steps may be
        raised; schedules keep their original length.
      wandb: online (log in once with `wandb login`), offline (files in the folder), or disabled.
      wandb_per: log one W&B run for each seed, or one for each setting, with mean and interval.
      wandb_project: name of the W&B project.
      wandb_group: name of the W&B group. None: the folder's name.
      distributed: this is one of several processes, perhaps on several hosts, which share the agents
        (experiments/clusters.md). All are started with the same arguments. On SLURM, Open MPI and Kubernetes, JAX finds
        the values of the next three fields.
      coordinator: HOST:PORT of process 0. None: JAX_COORDINATOR_ADDRESS.
      num_processes: number of processes. None: JAX_NUM_PROCESSES.
      process_id: this process's number, from 0. None: JAX_PROCESS_ID.
      connect_timeout: seconds for which a process waits for the others.
      env_params: parameters of the environment, each as KEY=VALUE, such as gravity=9.0, or of a wrapper
        around any: action_repeat, max_episode_steps, observed=0,2 and previous=true (`envs.make`).
    """

    env: str = "CartPole-v1"
    total_steps: Count = 100_000
    num_seeds: Count = 16
    seed: Seed = 0
    log_every: CountOrZero = 10
    eval_episodes: Count = 128
    eval_seed: Seed = 0
    eval_max_steps: Count | None = None
    search: Count | None = None
    halve: Annotated[int, Range(2)] | None = None
    first_rung: Count | None = None
    tpe: Count | None = None
    pbt: Count | None = None
    fresh_seeds: CountOrZero | None = None
    schedule: tuple[str, ...] = ()
    max_parallel: Count | None = None
    devices: Count | None = None
    devices_per_agent: Count = 1
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
    distributed: bool = False
    coordinator: str | None = None
    num_processes: Count | None = None
    process_id: CountOrZero | None = None
    connect_timeout: Positive = 60.0
    env_params: tuple[str, ...] = ()


MakeAlgorithm = Callable[[Env, Any, Any], Algorithm]
MakeNetwork = Callable[[Env, Any], Any]  # returns a network of the kind that the algorithm takes


@dataclass(frozen=True)
class Plan:
    """A checked run: only its folder can still be refused."""

    run: RunConfig
    env: Env
    make: Make
    start: Callable[[Configs], Params | None]  # the parameters that a language model starts from
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
    world, env_address = find_environment(run.env, run.env_params, env, saved=run.out is not None)
    run = replace(run, env=world.name if env else run.env)
    if world.outside:
        num_devices = one_device(world, run.devices, run.devices_per_agent)
    eval_max_steps = run.eval_max_steps or world.max_episode_steps
    if eval_max_steps is None:
        raise UsageError(f"{world.name} has no time limit: set --eval-max-steps")

    def make(configs: Configs, start: Params | None = None) -> Algorithm:
        made = network(world, configs["network"])
        return algorithm(world, made if start is None else made._replace(start=start), configs[name])

    def start(configs: Configs) -> Params | None:
        return getattr(network(world, configs["network"]), "start", None)

    code = {
        "name": name,
        "algorithm": address_of(algorithm),
        "config": address_of(type(configs[name])),
        "network": address_of(network),
        "network_config": address_of(type(configs["network"])),
        "env": env_address,
    }
    digest = getattr(network(world, configs["network"]), "digest", None)
    planned = _programs(settings, make, run, name)
    first = make(planned[0].configs)
    refuse_without_explorer(world, first, name)
    least = max(program.update_steps.most for program in planned)
    steps = rungs(run.total_steps, run.halve, run.first_rung, len(settings), least) if run.halve else []
    tuning = tuning_of(run.pbt, run.search, sweep, planned, first, world) if run.pbt else None
    update_steps, outside = first.update_steps, world.outside is not None
    changes = parse_schedule(run.schedule, planned[0].configs, list(sweep), update_steps, outside)
    checked = run, world, make, start, sweep, settings, planned, num_devices, eval_max_steps, code, stored, digest
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
    planned = _programs(settings, plan.make, plan.run, plan.code["name"] or "")
    return replace(plan, settings=settings, programs=planned)


def _programs(settings: list[Setting], make: Make, run: RunConfig, name: str) -> list[Program]:
    with spread_over(run.devices_per_agent):
        for setting in settings:
            check_divided(setting.configs[name], name)
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


def _prepare_devices(run: RunConfig, env: EnvSource | None, num_settings: int) -> int:
    """`prepare_devices`, from what is known of an environment before a function makes it, which may start JAX."""
    devices, per_agent = run.devices, run.devices_per_agent
    if known_outside(run.env, env) and processes.number() == 1:
        devices, per_agent = 1, 1
    wide = suite_of(run.env) is not None if env is None else isinstance(env, Env) and env.costly_reset
    return prepare_devices(devices, run.num_seeds, 1 if run.pbt else num_settings, wide, per_agent)


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
