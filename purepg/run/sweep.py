"""A sweep's settings, the compiled programs that serve them, and the chunks of agents that are trained at once.

Settings that differ in floats alone share a program: the floats cross `jax.jit` as arrays, and the algorithm is made
inside the trace. Each value of a static field (an int, a string, a tuple, an optional float that is off) costs a
compile.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np

from purepg.config import ANNEAL_UPDATES, float_fields
from purepg.types import Algorithm, UsageError

INT32_MAX = 2**31 - 1

Configs = dict[str, Any]  # name of a config, "ppo" or "network", to the dataclass
Make = Callable[[Configs], Algorithm]
Hyper = Mapping[str, Mapping[str, Any]]  # name of a config to the values of its float fields


class Setting(NamedTuple):
    """One point of a sweep."""

    hyperparameters: dict[str, Any]  # the swept values, by name
    configs: Configs

    @property
    def label(self) -> str:
        return label_of(self.hyperparameters)


def label_of(hyperparameters: Mapping[str, Any]) -> str:
    """A setting's name: `learning_rate=0.001,clip_eps=0.1`; empty where nothing is swept."""
    return ",".join(f"{name}={value}" for name, value in hyperparameters.items())


def grid(configs: Configs, sweep: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination of the swept values. A name is a field's, or `config.field`."""
    places = {name: find_field(configs, name) for name in sweep}
    settings = []
    for values in product(*sweep.values()):
        chosen = dict(configs)
        for name, value in zip(sweep, values, strict=True):
            config, field = places[name]
            chosen[config] = replace(chosen[config], **{field: value})
        settings.append(Setting(dict(zip(sweep, values, strict=True)), chosen))
    return settings


def find_field(configs: Configs, name: str) -> tuple[str, str]:
    """The config and the field that a name means.

    Raises:
      UsageError: no field has that name; the message lists those that can be swept.
    """
    known = {f"{config}.{field}": (config, field) for config, values in configs.items() for field in vars(values)}
    matches = [place for full, place in known.items() if name in (full, place[1])]
    if not matches:
        raise UsageError(f"cannot sweep {name!r}; what can be swept: {', '.join(known)}")
    return matches[0]


def with_schedule(configs: Configs, num_updates: int | None) -> Configs:
    """The configs with `num_updates` as the length of every schedule that was given none."""
    return {
        name: replace(config, anneal_updates=num_updates) if getattr(config, ANNEAL_UPDATES, 0) is None else config
        for name, config in configs.items()
    }


def schedule_of(configs: Configs) -> int | None:
    """The number of updates over which a setting's schedules run; None where it has no schedules."""
    return next((vars(config)[ANNEAL_UPDATES] for config in configs.values() if ANNEAL_UPDATES in vars(config)), None)


@dataclass(frozen=True, eq=False)
class Program:
    """Settings that one compiled program serves."""

    settings: tuple[int, ...]  # positions in the sweep
    configs: Configs  # of the first setting: the static fields of all are equal
    hyper: dict[str, dict[str, np.ndarray]]  # float fields, each [H]
    num_updates: int  # the most that the budget of environment steps allows
    updates_have_one_length: bool


def programs(settings: Sequence[Setting], make: Make, total_steps: int) -> list[Program]:
    """Groups settings that differ in floats alone, and counts the updates of each group.

    Raises:
      UsageError: the algorithm refuses a setting, or the budget is below one update.
    """
    by_static: dict[Any, list[int]] = {}
    for h, setting in enumerate(settings):
        static = tuple(
            (name, field, "float" if field in float_fields(config) else value)
            for name, config in setting.configs.items()
            for field, value in vars(config).items()
        )
        by_static.setdefault(static, []).append(h)
    return [_program(settings, members, make, total_steps) for members in by_static.values()]


def _program(settings: Sequence[Setting], members: list[int], make: Make, total_steps: int) -> Program:
    configs = settings[members[0]].configs
    # Making the algorithm checks every value before anything compiles; the length of schedules is not known yet.
    made = [make(with_schedule(settings[h].configs, 1)) for h in members]
    shortest, longest = made[0].update_steps
    if total_steps < longest:
        raise UsageError(f"total_steps ({total_steps}) must be at least {longest}, what one update may take")
    if shortest < longest and total_steps > INT32_MAX:  # then a member counts its steps on the device
        raise UsageError(f"total_steps ({total_steps}) must be at most {INT32_MAX} where updates vary in length")
    num_updates = (total_steps - longest) // shortest + 1
    if num_updates > INT32_MAX:
        raise UsageError(f"total_steps ({total_steps}) must be at most {INT32_MAX} updates of {shortest} steps")
    hyper = {
        name: {
            field: np.array([getattr(settings[h].configs[name], field) for h in members], np.float32)
            for field in float_fields(config)
        }
        for name, config in configs.items()
    }
    return Program(tuple(members), with_schedule(configs, num_updates), hyper, num_updates, shortest == longest)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Agents that are trained at once: some of a program's settings, each with some of the seeds."""

    program: Program
    rows: slice  # of the program's settings
    columns: slice  # of the seeds

    @property
    def settings(self) -> list[int]:
        """Its settings, as positions in the sweep."""
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
        """Indices of its agents in arrays `[H, S]` of the whole sweep."""
        return np.array(self.settings)[:, None], np.array(self.seeds)[None]

    @property
    def members(self) -> tuple[Hyper, np.ndarray]:
        """The arguments of the program for these agents: float fields, each `[H]`, and seeds `[S]`."""
        hyper = {
            config: {field: values[self.rows] for field, values in fields.items()}
            for config, fields in self.program.hyper.items()
        }
        return hyper, np.array(self.seeds)

    def block_lengths(self, log_every: int, first: int = 0) -> list[int]:
        """Divides the updates from number `first` on into blocks of at most `log_every` (0: one block for all).

        A last block of another length would need another compile. So all blocks have one length where a divisor of the
        number of updates comes near enough to `log_every`, and where the budget of environment steps, not the number of
        updates, ends the run. A resumed run keeps the blocks that it had.
        """
        whole = self.program.num_updates
        n = max(whole - first, 0)
        if log_every == 0 or log_every >= whole:
            return [n] * (n > 0)
        if not self.program.updates_have_one_length:
            return [log_every] * -(-n // log_every)
        divisors = [length for length in range(-(-log_every // 2), log_every + 1) if whole % length == 0]
        block = max(divisors, default=log_every)
        return [block] * (n // block) + [n % block] * (n % block > 0)


def chunks(program: Program, num_seeds: int, max_parallel: int | None) -> list[Chunk]:
    """Divides a program's agents into near-equal chunks of at most `max_parallel`, with whole settings if they fit."""
    num_settings = len(program.settings)
    if max_parallel is None or num_settings * num_seeds <= max_parallel:
        return [Chunk(program, slice(0, num_settings), slice(0, num_seeds))]
    if max_parallel >= num_seeds:
        rows = _parts(num_settings, max_parallel // num_seeds)
        return [Chunk(program, part, slice(0, num_seeds)) for part in rows]
    columns = _parts(num_seeds, max_parallel)
    return [Chunk(program, slice(h, h + 1), part) for h in range(num_settings) for part in columns]


def _parts(n: int, at_most: int) -> list[slice]:
    num_parts = -(-n // at_most)
    edges = [n * i // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]
