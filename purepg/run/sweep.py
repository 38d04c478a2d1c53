"""A sweep's settings, the compiled programs that train them, and the chunks of agents that are trained at once.

Settings that differ only in floats share a program: floats enter `jax.jit` as arrays, and the algorithm is built
inside the trace. Each value of a static field (an int, a string, a tuple, an optional float that is None) needs its
own compilation.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from purepg.config import ANNEAL_UPDATES, check_schedules, float_fields
from purepg.types import Algorithm, UpdateSteps, UsageError

INT32_MAX = 2**31 - 1

Configs = dict[str, Any]  # maps a config's name, such as "ppo" or "network", to the dataclass
Make = Callable[..., Algorithm]  # of configs and, if a program has them, `plan.Warm` arguments
Hyper = Mapping[str, Mapping[str, Any]]  # maps a config's name to the values of its float fields


class Setting(NamedTuple):
    """One point of a sweep."""

    hyperparameters: dict[str, Any]  # the swept values, by name
    configs: Configs

    @property
    def label(self) -> str:
        return label_of(self.hyperparameters)


def label_of(hyperparameters: Mapping[str, Any]) -> str:
    """A setting's name, such as `learning_rate=0.001,clip_eps=0.1`; empty if nothing is swept."""
    return ",".join(f"{name}={value}" for name, value in hyperparameters.items())


def grid(configs: Configs, sweep: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of the swept values. A name is `field` or `config.field`."""
    for name, values in sweep.items():
        if isinstance(values, str) or not np.iterable(values) or not len(values):
            raise UsageError(f"sweep {name} ({values}) must be a list of values")
    return settings_at(configs, list(sweep), product(*sweep.values()))


def settings_at(configs: Configs, names: Sequence[str], points: Iterable[Sequence[Any]]) -> list[Setting]:
    """The configs with the named fields at each of the points."""
    places = [find_field(configs, name) for name in names]
    settings = []
    for values in points:
        chosen = dict(configs)
        for (config, field), value in zip(places, values, strict=True):
            chosen[config] = replace(chosen[config], **{field: value})
        settings.append(Setting(dict(zip(names, values, strict=True)), chosen))
    return settings


def find_field(configs: Configs, name: str) -> tuple[str, str]:
    """Resolves a name to (config, field).

    Raises:
      UsageError: no field has that name; the message lists the fields that can be swept.
    """
    known = {f"{config}.{field}": (config, field) for config, values in configs.items() for field in vars(values)}
    matches = [place for full, place in known.items() if name in (full, place[1])]
    if not matches:
        near = difflib.get_close_matches(name, [*(field for _, field in known.values()), *known], n=1)
        hint = f": did you mean {near[0]}?" if near else f"; what can be swept: {', '.join(known)}"
        raise UsageError(f"cannot sweep {name!r}{hint}")
    return matches[0]


def with_schedule(configs: Configs, num_updates: int | None) -> Configs:
    """The configs, with `num_updates` as the length of every schedule whose `anneal_updates` is None."""
    return {
        name: replace(config, anneal_updates=num_updates) if getattr(config, ANNEAL_UPDATES, 0) is None else config
        for name, config in configs.items()
    }


def schedule_of(configs: Configs) -> int | None:
    """The length of a setting's schedules in updates; None if it has no schedules."""
    return next((vars(config)[ANNEAL_UPDATES] for config in configs.values() if ANNEAL_UPDATES in vars(config)), None)


@dataclass(frozen=True, eq=False)
class Program:
    """Settings that share one compiled program."""

    static: Any  # the fields that its settings share
    settings: tuple[int, ...]  # positions in the sweep
    configs: Configs  # of the first setting; the others have the same static fields
    hyper: dict[str, dict[str, np.ndarray]]  # float fields, each [H]
    num_updates: int  # the largest number of updates that the budget of environment steps allows
    update_steps: UpdateSteps

    def only(self, settings: Collection[int], total_steps: int) -> "Program | None":
        """The program for those of its settings that are among `settings`, with this budget; None if none is."""
        rows = [row for row, h in enumerate(self.settings) if h in settings]
        hyper = {config: {field: x[rows] for field, x in fields.items()} for config, fields in self.hyper.items()}
        kept, num_updates = tuple(self.settings[row] for row in rows), most_updates(total_steps, self.update_steps)
        return replace(self, settings=kept, hyper=hyper, num_updates=num_updates) if kept else None


def programs(settings: Sequence[Setting], make: Make, total_steps: int) -> list[Program]:
    """Groups settings that differ only in floats, and computes each group's number of updates.

    Raises:
      UsageError: the algorithm rejects a setting, or the budget is too small for one update.
    """
    by_static: dict[Any, list[int]] = {}
    for h, setting in enumerate(settings):
        static = tuple(
            (name, field, "float" if field in float_fields(config) else value)
            for name, config in setting.configs.items()
            for field, value in vars(config).items()
        )
        by_static.setdefault(static, []).append(h)
    return [_program(static, settings, members, make, total_steps) for static, members in by_static.items()]


def _program(static: Any, settings: Sequence[Setting], members: list[int], make: Make, total_steps: int) -> Program:
    configs = settings[members[0]].configs
    # Building the algorithm checks every value before anything compiles. Schedules get a placeholder length of 1.
    made = [make(with_schedule(settings[h].configs, 1)) for h in members]
    num_updates = most_updates(total_steps, made[0].update_steps)
    hyper = {
        name: {
            field: np.array([getattr(settings[h].configs[name], field) for h in members], np.float32)
            for field in float_fields(config)
        }
        for name, config in configs.items()
    }
    if made[0].update_steps.vary:  # `num_updates` is what the shortest updates would allow: no length for a schedule
        for config in configs.values():
            check_schedules(config)
    else:
        configs = with_schedule(configs, num_updates)
    return Program(static, tuple(members), configs, hyper, num_updates, made[0].update_steps)


def most_updates(total_steps: int, update_steps: UpdateSteps) -> int:
    """The largest number of updates that a budget of environment steps allows.

    Raises:
      UsageError: the budget is too small for one update, or too large to be counted.
    """
    shortest, longest = update_steps
    if total_steps < longest:
        raise UsageError(f"total_steps ({total_steps}) must be at least {longest}, what one update may take")
    if update_steps.vary and total_steps > INT32_MAX:  # members then count their steps on the device, as int32
        raise UsageError(f"total_steps ({total_steps}) must be at most {INT32_MAX} where updates vary in length")
    num_updates = (total_steps - longest) // shortest + 1
    if num_updates > INT32_MAX:
        raise UsageError(f"total_steps ({total_steps}) must be at most {INT32_MAX} updates of {shortest} steps")
    return num_updates


@dataclass(frozen=True, eq=False)
class Chunk:
    """Agents that are trained at once: a slice of a program's settings x a slice of the seeds."""

    program: Program
    rows: slice  # of the program's settings
    columns: slice  # of the seeds

    @property
    def settings(self) -> list[int]:
        """The chunk's settings, as positions in the sweep."""
        return list(self.program.settings[self.rows])

    @property
    def seeds(self) -> list[int]:
        return list(range(self.columns.start, self.columns.stop))

    @property
    def shape(self) -> tuple[int, int]:
        """(H, S)."""
        return len(self.settings), len(self.seeds)

    @property
    def place(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the chunk's agents in the whole sweep's `[H, S]` arrays."""
        return np.array(self.settings)[:, None], np.array(self.seeds)[None]

    @property
    def members(self) -> tuple[Hyper, np.ndarray]:
        """The program's arguments for these agents: float fields, each `[H]`, and seeds `[S]`."""
        hyper = {
            config: {field: values[self.rows] for field, values in fields.items()}
            for config, fields in self.program.hyper.items()
        }
        return hyper, np.array(self.seeds)

    def block_lengths(self, log_every: int, first: int = 0) -> list[int]:
        """Divides the updates from number `first` on into blocks of at most `log_every`; 0 means a single block.

        A shorter last block would need a compilation of its own. So all blocks have the same length if the number of
        updates has a divisor between half of `log_every` and `log_every`, or if updates vary in length, since then the
        budget of environment steps ends the run. The length does not depend on `first`, so a resumed run keeps it.
        """
        whole = self.program.num_updates
        n = max(whole - first, 0)
        if log_every == 0 or log_every >= whole:
            return [n] * (n > 0)
        if self.program.update_steps.vary:
            return [log_every] * -(-n // log_every)
        divisors = [length for length in range(-(-log_every // 2), log_every + 1) if whole % length == 0]
        block = max(divisors, default=log_every)
        return [block] * (n // block) + [n % block] * (n % block > 0)


def chunks(program: Program, num_seeds: int, max_parallel: int | None, together: bool = False) -> list[Chunk]:
    """Divides a program's agents into near-equal chunks of at most `max_parallel`; splits a setting only if it must.

    Args:
      together: the settings of a seed exchange their learners, so that only the seeds are divided.
    Raises:
      UsageError: not even the settings of one seed may be together.
    """
    num_settings = len(program.settings)
    if max_parallel is None or num_settings * num_seeds <= max_parallel:
        return [Chunk(program, slice(0, num_settings), slice(0, num_seeds))]
    if together:
        if max_parallel < num_settings:
            raise UsageError(f"max_parallel ({max_parallel}) must be at least {num_settings}, the members of pbt")
        columns = _parts(num_seeds, max_parallel // num_settings)
        return [Chunk(program, slice(0, num_settings), part) for part in columns]
    if max_parallel >= num_seeds:
        rows = _parts(num_settings, max_parallel // num_seeds)
        return [Chunk(program, part, slice(0, num_seeds)) for part in rows]
    columns = _parts(num_seeds, max_parallel)
    return [Chunk(program, slice(h, h + 1), part) for h in range(num_settings) for part in columns]


def _parts(n: int, at_most: int) -> list[slice]:
    num_parts = -(-n // at_most)
    edges = [n * i // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
