"""A population: the agents of one chunk, H settings x S seeds of one algorithm, as compiled programs."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.run.devices import Spread
from purepg.run.memory import Memory
from purepg.run.plan import Plan
from purepg.run.sweep import Hyper, Program
from purepg.train import evaluate, guard, train
from purepg.types import Algorithm, Array, Metrics, Obs, State

# The evaluation's keys and the agents' keys never meet: agents are folded in by their seed, from 0 on.
EVALUATION_TAG = 2**31 - 1
SHOWN = 8  # final observations of each agent that are described


class Evaluation(NamedTuple):
    """Final evaluations, `[H, S]` each: mean returns over whole episodes."""

    sampled: Array  # actions are sampled from the policy
    mode: Array  # the policy's most probable actions
    last_obs: Obs | None  # [H, S, SHOWN, ...] of sampled episodes, where `Env.describe` reads them
    returns: Array | None  # [H, S, SHOWN] of these episodes


Members = tuple[Hyper, np.ndarray]  # a chunk's float fields, each [H], and seeds [S]


class Population:
    """H settings x S seeds of a program, compiled and ready to advance. Every leaf of a state is `[H, S, ...]`.

    Chunks of one shape are trained by one population, which is given each chunk's `members`.

    Args:
      shape: (H, S).
    """

    def __init__(self, plan: Plan, program: Program, shape: tuple[int, int]):
        self.compile_seconds = 0.0
        self.num_members = shape[0] * shape[1]
        self.total_steps = plan.run.total_steps
        self._spread = spread = Spread(*shape, plan.num_devices)
        member = _Member(plan, program)
        self._init = jax.jit(spread(member.init))
        self._advance = jax.jit(
            lambda hyper, s, state, start, num_updates: spread(
                lambda hyper, s, state: member.advance(hyper, s, state, start, num_updates)
            )(hyper, s, state),
            static_argnames="num_updates",
            donate_argnames="state",
        )
        self._final = jax.jit(spread(member.final))
        self._updates_have_one_length = program.updates_have_one_length
        self._programs: dict[Any, Future] = {}
        self._compilers = ThreadPoolExecutor()

    def start_compiling(self, members: Members, *block_lengths: int) -> None:
        """Traces every program and compiles them side by side, in the background."""
        state = self.abstract_state(members)
        start = jax.eval_shape(lambda: jnp.int32(0))
        for num_updates in dict.fromkeys(block_lengths):  # the largest program first
            self._compile(self._advance, *members, state, start, num_updates=num_updates)
        self._compile(self._init, *members)
        self._compile(self._final, *members, state)

    def memory(self, members: Members, num_updates: int) -> Memory:
        """The memory of a block, by what its compiled program says of its arguments, results and temporaries."""
        found = self._compiled((self._advance, ("num_updates", num_updates))).memory_analysis()
        whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        buffer = getattr(jax.eval_shape(self._init, *members).world, "buffer", ())
        replay = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
        return Memory(whole - found.alias_size_in_bytes, self._spread.num_devices, replay)

    def abstract_state(self, members: Members) -> State:
        """Shapes, dtypes and sharding of a state."""
        return self._spread.abstract(jax.eval_shape(self._init, *members))

    def with_more_steps(self, state: State, more: int) -> State:
        """A state whose agents may take more environment steps than they were given, where they count them."""
        if more == 0 or self._updates_have_one_length:
            return state
        left = state.guard.env_steps_left + more
        return state._replace(guard=state.guard._replace(env_steps_left=left))

    def init(self, members: Members) -> State:
        """The state before the first update."""
        return self._compile(self._init, *members)(*members)

    def advance(self, members: Members, state: State, start: int, num_updates: int) -> tuple[State, Metrics]:
        """Makes `num_updates` updates from number `start` on, or from each agent's own where updates vary in length;
        consumes `state`. Metrics are `[H, S, num_updates]`. Returns at once, while the device works."""
        arguments = (*members, state, jnp.int32(start))
        return self._compile(self._advance, *arguments, num_updates=num_updates)(*arguments)

    def final(self, members: Members, state: State) -> Evaluation:
        """Evaluates every agent's policy."""
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
        """A program that was sent to be compiled, once it is; the wait counts as compile time."""
        begun = time.perf_counter()
        compiled = self._programs[program].result()
        self.compile_seconds += time.perf_counter() - begun
        return compiled


class _Member:
    """What a program does for one agent, as pure functions of its hyperparameters and its seed."""

    def __init__(self, plan: Plan, program: Program):
        self._plan, self._program = plan, program

    def _algorithm(self, hyper: Hyper) -> Algorithm:
        configs = {name: replace(config, **hyper[name]) for name, config in self._program.configs.items()}
        return guard(self._plan.make(configs), self._plan.run.total_steps)

    def _key(self, s: Array, training: bool) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(self._plan.run.seed), s))[int(training)]

    def init(self, hyper: Hyper, s: Array) -> State:
        return self._algorithm(hyper).init(self._key(s, training=False))

    def advance(self, hyper: Hyper, s: Array, state: State, start: Array, num_updates: int) -> tuple[State, Metrics]:
        first = start if self._program.updates_have_one_length else state.guard.num_updates
        return train(self._key(s, training=True), self._algorithm(hyper), state, first, num_updates)

    def final(self, hyper: Hyper, s: Array, state: State) -> Evaluation:
        del s
        run, env = self._plan.run, self._plan.env
        key = jax.random.fold_in(jax.random.key(run.eval_seed), EVALUATION_TAG)
        algorithm = self._algorithm(hyper)
        sampled, mode = (
            evaluate(
                key,
                env.held_out or env,
                algorithm.policy(state, deterministic),
                run.eval_episodes,
                self._plan.eval_max_steps,
            )
            for deterministic in (False, True)
        )
        shown = jax.tree.map(lambda x: x[:SHOWN], (sampled.last_obs, sampled.episode_return)) if env.describe else None
        return Evaluation(sampled.episode_return.mean(), mode.episode_return.mean(), *(shown or (None, None)))
