"""A population: H settings x S seeds of one algorithm, in as few compiled programs as the static settings allow.

Settings that differ in floats alone share a program: the floats cross jit as arrays, and the algorithm is made inside
the trace. Each value of a static field (an int, a string, a tuple, an optional float that is off) costs a compile.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from purepg.config import float_fields
from purepg.train import evaluate, guard, train
from purepg.types import Algorithm, Array, Env, Metrics, State, UsageError

# The evaluation's keys and the members' keys never meet: members are folded in by their seed, from 0 on.
EVALUATION_TAG = 2**31 - 1
INT32_MAX = 2**31 - 1
SHOWN = 8  # responses of each agent that are shown at the end

Configs = dict[str, Any]  # name of a config, "ppo" or "network", to the dataclass
Make = Callable[[Configs], Algorithm]
Hyper = Mapping[str, Mapping[str, Any]]  # name of a config to the values of its float fields


class Setting(NamedTuple):
    """One point of a sweep."""

    hyperparameters: dict[str, Any]  # what the sweep set, by its name
    configs: Configs


class Group(NamedTuple):
    """Settings that one compiled program serves."""

    settings: tuple[int, ...]  # positions in the sweep
    configs: Configs  # of the first of them: their static fields are equal
    hyper: dict[str, dict[str, np.ndarray]]  # float fields, each [H]
    num_updates: int  # the most that the budget of environment steps allows
    updates_have_one_length: bool


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
      UsageError: no field has that name; says which have.
    """
    known = {f"{config}.{field}": (config, field) for config, values in configs.items() for field in vars(values)}
    matches = [place for full, place in known.items() if name in (full, place[1])]
    if not matches:
        raise UsageError(f"cannot sweep {name!r}; what can be swept: {', '.join(known)}")
    return matches[0]


def group_by_program(settings: Sequence[Setting], make: Make, total_steps: int) -> list[Group]:
    """Puts settings that differ in floats alone together, and counts each group's updates.

    Raises:
      UsageError: a setting that the algorithm refuses, or a budget below one update.
    """
    by_static: dict[Any, list[int]] = {}
    for h, setting in enumerate(settings):
        static = tuple(
            (name, field, "float" if field in float_fields(config) else value)
            for name, config in setting.configs.items()
            for field, value in vars(config).items()
        )
        by_static.setdefault(static, []).append(h)
    groups = []
    for members in by_static.values():
        configs = settings[members[0]].configs
        # Every value is checked here, before anything compiles; the schedules' length is not known yet.
        made = [make(with_anneal_updates(settings[h].configs, 1)) for h in members]
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
        groups.append(
            Group(tuple(members), with_anneal_updates(configs, num_updates), hyper, num_updates, shortest == longest)
        )
    return groups


def with_anneal_updates(configs: Configs, num_updates: int) -> Configs:
    """Schedules that were given no length last as long as the run."""
    return {
        name: replace(config, anneal_updates=num_updates) if getattr(config, "anneal_updates", 0) is None else config
        for name, config in configs.items()
    }


@dataclass(frozen=True)
class Chunk:
    """The part of a group that is trained at once: some of its settings, some of the seeds."""

    settings: slice  # of the group's
    seeds: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.settings.stop - self.settings.start, self.seeds.stop - self.seeds.start

    def members(self, group: Group) -> tuple[list[int], list[int]]:
        """Its settings, by their positions in the sweep, and its seeds."""
        return list(group.settings[self.settings]), list(range(self.seeds.start, self.seeds.stop))


def chunks(num_settings: int, num_seeds: int, max_parallel: int | None) -> list[Chunk]:
    """Splits [H, S] into near-equal parts of at most `max_parallel` members, whole settings where they fit."""
    if max_parallel is None or num_settings * num_seeds <= max_parallel:
        return [Chunk(slice(0, num_settings), slice(0, num_seeds))]
    if max_parallel >= num_seeds:
        return [Chunk(part, slice(0, num_seeds)) for part in _split(num_settings, max_parallel // num_seeds)]
    return [Chunk(slice(h, h + 1), part) for h in range(num_settings) for part in _split(num_seeds, max_parallel)]


def _split(n: int, at_most: int) -> list[slice]:
    num_parts = -(-n // at_most)
    edges = [n * i // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


class Evaluation(NamedTuple):
    """Mean return over the evaluation's episodes, `[H, S]` each."""

    sampled: Array  # the policy's actions are sampled
    mode: Array  # its distribution's mode is taken
    rows: Array | None  # [H, S, SHOWN, L + R] of a token task: prompts with sampled responses
    earned: Array | None  # [H, S, SHOWN]: the return of each


class Memory(NamedTuple):
    """Bytes that a population takes while it trains."""

    per_device: int
    num_devices: int
    replay: int  # of all devices together


Members = tuple[Hyper, np.ndarray]  # float fields, each [H]; seeds [S]


class Population:
    """H settings x S seeds of a group, compiled and ready to advance. Every leaf of a state is `[H, S, ...]`.

    Chunks of one shape are trained by one population, each as its `members`.

    Args:
      make: configs to algorithm.
      group: the settings' static and float fields.
      shape: (H, S).
      seed: the run's; member s is keyed by `fold_in(key(seed), s)`, whatever its setting.
      num_devices: over how many devices the seeds (or else the settings) are spread, at most.
    """

    def __init__(
        self,
        env: Env,
        make: Make,
        group: Group,
        shape: tuple[int, int],
        seed: int,
        total_steps: int,
        num_devices: int,
        eval_seed: int,
        eval_episodes: int,
        eval_max_steps: int,
    ):
        self.compile_seconds = 0.0
        self.num_members = shape[0] * shape[1]
        self.total_steps = total_steps

        def algorithm(hyper: Hyper) -> Algorithm:
            configs = {name: replace(config, **hyper[name]) for name, config in group.configs.items()}
            return guard(make(configs), total_steps)

        def member_key(s: Array) -> tuple[Array, Array]:
            k_init, k_train = jax.random.split(jax.random.fold_in(jax.random.key(seed), s))
            return k_init, k_train

        def init(hyper: Hyper, s: Array) -> State:
            return algorithm(hyper).init(member_key(s)[0])

        def advance(hyper: Hyper, s: Array, state: State, start: Array, num_updates: int) -> tuple[State, Metrics]:
            first = start if group.updates_have_one_length else state.guard.num_updates
            return train(member_key(s)[1], algorithm(hyper), state, first, num_updates)

        def final(hyper: Hyper, s: Array, state: State) -> Evaluation:
            del s
            key = jax.random.fold_in(jax.random.key(eval_seed), EVALUATION_TAG)
            where = env.held_out or env
            sampled, mode = (
                evaluate(key, where, algorithm(hyper).policy(state, deterministic), eval_episodes, eval_max_steps)
                for deterministic in (False, True)
            )
            shown = (sampled.last_obs[:SHOWN], sampled.episode_return[:SHOWN]) if env.task else (None, None)
            return Evaluation(sampled.episode_return.mean(), mode.episode_return.mean(), *shown)

        self._over = over = _Spread(*shape, num_devices)
        self._init = jax.jit(over(init))
        self._advance = jax.jit(
            lambda hyper, s, state, start, num_updates: over(
                lambda hyper, s, state: advance(hyper, s, state, start, num_updates)
            )(hyper, s, state),
            static_argnames="num_updates",
            donate_argnames="state",
        )
        self._final = jax.jit(over(final))
        self._hyper = group.hyper
        self._updates_have_one_length = group.updates_have_one_length
        self._programs: dict[Any, Future] = {}
        self._compilers = ThreadPoolExecutor()

    def members(self, chunk: Chunk) -> Members:
        """The arguments that make this population the one of a chunk."""
        hyper = {
            config: {field: values[chunk.settings] for field, values in fields.items()}
            for config, fields in self._hyper.items()
        }
        return hyper, np.arange(chunk.seeds.start, chunk.seeds.stop)

    def start_compiling(self, members: Members, *block_lengths: int) -> None:
        """Traces every program and compiles them side by side, in the background."""
        state = self.abstract_state(members)
        start = jax.eval_shape(lambda: jnp.int32(0))
        for num_updates in dict.fromkeys(block_lengths):  # the largest program first
            self._compile(self._advance, *members, state, start, num_updates=num_updates)
        self._compile(self._init, *members)
        self._compile(self._final, *members, state)

    def memory(self, members: Members, num_updates: int) -> Memory:
        """What a block's program, once it is compiled, says of itself: arguments, results and temporaries."""
        found = self._compiled((self._advance, ("num_updates", num_updates))).memory_analysis()
        whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        buffer = getattr(jax.eval_shape(self._init, *members).world, "buffer", ())
        replay = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
        return Memory(whole - found.alias_size_in_bytes, self._over.num_devices, replay)

    def abstract_state(self, members: Members) -> State:
        """Shapes, dtypes and sharding of a state."""
        return self._over.abstract(jax.eval_shape(self._init, *members))

    def with_more_steps(self, state: State, more: int) -> State:
        """A state whose members may consume more environment steps than they were given, where they count them."""
        if more == 0 or self._updates_have_one_length:
            return state
        left = state.guard.env_steps_left + more
        return state._replace(guard=state.guard._replace(env_steps_left=left))

    def init(self, members: Members) -> State:
        """The state before the first update."""
        return self._compile(self._init, *members)(*members)

    def advance(self, members: Members, state: State, start: int, num_updates: int) -> tuple[State, Metrics]:
        """`num_updates` updates from number `start` on, or from each member's own where they vary in length; consumes
        `state`. Metrics are `[H, S, num_updates]`. Returns at once, while the device works."""
        arguments = (*members, state, jnp.int32(start))
        return self._compile(self._advance, *arguments, num_updates=num_updates)(*arguments)

    def final(self, members: Members, state: State) -> Evaluation:
        """The evaluation of every member's policy."""
        return self._compile(self._final, *members, state)(*members, state)

    def new_compile_seconds(self) -> float:
        """Seconds spent on compiling since the last call."""
        spent, self.compile_seconds = self.compile_seconds, 0.0
        return spent

    def _compile(self, function: Any, *arguments: Any, **static: Any) -> Callable:
        """The compiled program, as a function that waits for it. XLA compiles outside of Python's lock."""
        program = (function, *static.items())
        begun = time.perf_counter()
        if program not in self._programs:
            lowered = function.lower(*arguments, **static)
            self._programs[program] = self._compilers.submit(lowered.compile)
            self.compile_seconds += time.perf_counter() - begun
        return lambda *arguments: self._compiled(program)(*arguments)

    def _compiled(self, program: Any) -> Any:
        """A program that was sent to be compiled, once it is; the wait counts."""
        begun = time.perf_counter()
        compiled = self._programs[program].result()
        self.compile_seconds += time.perf_counter() - begun
        return compiled


class _Spread:
    """Lays a function of one member, (hyper, seed, *rest), over [H, S], and over devices along the axis they divide."""

    def __init__(self, num_settings: int, num_seeds: int, num_devices: int):
        self.num_devices = num_devices = most_devices(num_devices, num_seeds, num_settings)
        self._mesh = Mesh(np.array(jax.devices()[:num_devices]), ("member",)) if num_devices > 1 else None
        everywhere, spread = P(), P("member")
        self._hyper, self._seeds, self._leaf = (
            (everywhere, spread, P(None, "member")) if num_seeds % num_devices == 0 else (spread, everywhere, spread)
        )

    def __call__(self, member: Callable) -> Callable:
        def population(hyper, s, *rest):
            def over_seeds(hyper, *rest):
                return vmap_unless_one(lambda s, *rest: member(hyper, s, *rest))(s, *rest)

            return vmap_unless_one(over_seeds)(hyper, *rest)

        if self._mesh is None:
            return population

        def sharded(hyper, s, *rest):
            in_specs = (self._hyper, self._seeds, *(self._leaf for _ in rest))
            # Nothing is exchanged between devices, so there is nothing to check in what varies over them.
            spread = jax.shard_map(
                population, mesh=self._mesh, in_specs=in_specs, out_specs=self._leaf, check_vma=False
            )
            return spread(hyper, s, *rest)

        return sharded

    def abstract(self, state: Any) -> Any:
        """Shapes and dtypes of a state, with the sharding it will have."""
        if self._mesh is None:
            return state
        sharding = NamedSharding(self._mesh, self._leaf)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def vmap_unless_one(f: Callable) -> Callable:
    """`jax.vmap(f)`, but without a batch axis of length 1 on the way: plain products are faster than batched ones."""

    def mapped(*args):
        if jax.tree.leaves(args)[0].shape[0] > 1:
            return jax.vmap(f)(*args)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), f(*jax.tree.map(lambda x: x[0], args)))

    return mapped


def most_devices(available: int, num_seeds: int, num_settings: int) -> int:
    """The most devices, up to those available, that divide the seeds or else the settings."""
    return max(n for n in range(1, available + 1) if num_seeds % n == 0 or num_settings % n == 0)


def block_lengths(group: Group, log_every: int, first: int = 0) -> list[int]:
    """The run, from update `first` on, in blocks of at most `log_every` updates (0: one block for all).

    A last block of another length would have to be compiled. So all have one length where a divisor of the run's comes
    near enough to `log_every`, and where the budget, and not the number of updates, ends the run. A run that goes on
    keeps the blocks it had.
    """
    whole = group.num_updates
    n = max(whole - first, 0)
    if log_every == 0 or log_every >= whole:
        return [n] * (n > 0)
    if not group.updates_have_one_length:
        return [log_every] * -(-n // log_every)
    divisors = [length for length in range(-(-log_every // 2), log_every + 1) if whole % length == 0]
    block = max(divisors, default=log_every)
    return [block] * (n // block) + [n % block] * (n % block > 0)
