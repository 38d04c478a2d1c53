"""A population: H settings x S seeds of one algorithm, trained together by compiled programs."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.language import sharding
from purepg.run.devices import Spread
from purepg.run.memory import Memory
from purepg.run.plan import Plan, Warm
from purepg.run.processes import gathered
from purepg.run.sweep import Hyper, Program
from purepg.runtime import compile_options
from purepg.train import evaluate, guard, measured, scheduled, train
from purepg.types import Algorithm, Array, Metrics, Obs, State, UsageError

# Agents' keys fold in their seed, counted from 0, so no agent ever uses the evaluation's tag.
EVALUATION_TAG = 2**31 - 1
ROUND_TAG = EVALUATION_TAG - 2  # nor that of population-based training
SHOWN = 8  # number of final observations per agent that the summary describes


class Evaluation(NamedTuple):
    """Final evaluations: mean returns over whole episodes, `[H, S]`."""

    sampled: Array  # with actions sampled from the policy
    mode: Array  # with the policy's most probable actions
    last_obs: Obs | None  # [H, S, SHOWN, ...] of sampled episodes; None if the environment has no `describe`
    returns: Array | None  # [H, S, SHOWN] of these episodes
    measures: dict[str, Any] | None = None  # others, each [H, S]


Members = tuple[Hyper, np.ndarray]  # a chunk's float fields, each [H], and seeds [S]


class Population:
    """H settings x S seeds of one program. Every leaf of a state is `[H, S, ...]`.

    Chunks of the same shape share one population; each call passes the chunk's `members`.

    Args:
      shape: (H, S).
    """

    failure: UsageError | None = None  # of Python between compiled programs

    def __init__(self, plan: Plan, program: Program, shape: tuple[int, int]):
        self.compile_seconds = 0.0
        self.num_members = shape[0] * shape[1]
        self.total_steps = plan.run.total_steps  # with which `init` begins
        apart = 1 if plan.tuning else shape[0]  # settings that exchange nothing may be on several devices
        network = program.configs["network"]
        axis_of = partial(sharding.axis_of, network) if getattr(network, "shard", "none") != "none" else None
        self._warm = plan.warm(program.configs)
        from_file = "rows" in self._warm.tables
        devices = plan.num_devices, plan.run.devices_per_agent
        self._spread = spread = Spread(apart, shape[1], *devices, axis_of, whole_world=from_file)
        if getattr(network, "lora_rank", None):  # the start stays frozen, and is always read
            self._warm = spread.everywhere(self._warm)
        else:
            self._warm = spread.everywhere(self._warm._replace(start=None))._replace(start=self._warm.start)
        member = partial(Member, plan, program)
        self._init = jax.jit(
            lambda warm, hyper, s: spread.divided(spread(member(warm).init)(hyper, s)),
            out_shardings=spread.placed,
        )

        def advance(warm, hyper, s, state, start, num_updates):
            state, metrics = spread(lambda hyper, s, state: member(warm).advance(hyper, s, state, start, num_updates))(
                hyper, s, state
            )
            return spread.divided(state), metrics

        self._advance = jax.jit(
            advance,
            static_argnames="num_updates",
            donate_argnames="state",
            out_shardings=(spread.placed, spread.read),
        )
        self._final = jax.jit(
            lambda warm, hyper, s, state: spread(member(warm).final, whole=not (axis_of or from_file))(hyper, s, state),
            out_shardings=spread.read,
        )
        self._updates_vary = program.update_steps.vary
        self._programs: dict[Any, Future] = {}
        self._ready: set[Any] = set()  # those that all processes of the run have compiled
        self._compilers = ThreadPoolExecutor()

    def start_compiling(self, members: Members, *block_lengths: int) -> None:
        """Traces the programs of training, and compiles them in parallel in the background. `advance` does so with that
        of the evaluation while the first block runs."""
        state = self.abstract_state(members)
        start = jax.eval_shape(lambda: jnp.int32(0))
        for num_updates in dict.fromkeys(block_lengths):  # the largest program first
            self._compile(self._advance, self._warm, *members, state, start, num_updates=num_updates)
        self._compile(self._init, self._warm, *members)

    def memory(self, members: Members, num_updates: int) -> Memory:
        """The memory of a block: the arguments, results and temporaries that XLA reports for its compiled program."""
        return self._memory_of((self._advance, ("num_updates", num_updates)), members)

    def _memory_of(self, program: Any, members: Members) -> Memory:
        found = self._compiled(program).memory_analysis()
        whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        buffer = getattr(jax.eval_shape(self._init, self._warm, *members).world, "buffer", ())
        replay = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(buffer))
        return Memory(whole - found.alias_size_in_bytes, self._spread.num_devices, replay)

    def abstract_state(self, members: Members) -> State:
        """A state's shapes, dtypes and sharding."""
        return self._spread.abstract(jax.eval_shape(self._init, self._warm, *members))

    def placed(self, members: Members, state: State) -> State:
        """A state of such agents, moved to the devices of this population."""
        return jax.tree.map(lambda x, of: jax.device_put(x, of.sharding), state, self.abstract_state(members))

    def with_more_steps(self, state: State, more: int) -> State:
        """Adds `more` environment steps to the agents' budgets, which a state holds only if updates vary in length."""
        if more == 0 or not self._updates_vary:
            return state
        left = state.guard.env_steps_left + more
        return state._replace(guard=state.guard._replace(env_steps_left=left))

    def lowered(self, members: Members, num_updates: int, place: Any) -> Any:
        """The program of a block, before it is compiled, for a device that this machine need not have.

        Args:
          place: the sharding of its arguments.
        """
        arguments = (self._warm, *members, jax.eval_shape(self._init, self._warm, *members), jnp.int32(0))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
        return self._advance.lower(*shapes, num_updates=num_updates)

    def init(self, members: Members) -> State:
        """The state before the first update."""
        return self._compile(self._init, self._warm, *members)(self._warm, *members)

    def advance(
        self,
        members: Members,
        state: State,
        start: int,
        num_updates: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[State, Metrics]:
        """Runs `num_updates` updates from number `start` on; if updates vary in length, each agent continues its own
        count. Donates `state`. Metrics are `[H, S, num_updates]`. Returns at once, before the device has finished.

        Args:
          stop: asked after every update by a population that can end between them, which a `HostPopulation` can.
        """
        del stop
        arguments = (self._warm, *members, state, jnp.int32(start))
        after = self._compile(self._advance, *arguments, num_updates=num_updates)(*arguments)
        if (self._final,) not in self._programs:
            self._compile(self._final, self._warm, *members, self.abstract_state(members))
        return after

    def final(self, members: Members, state: State) -> Evaluation:
        """Evaluates every agent's policy."""
        return self._compile(self._final, self._warm, *members, state)(self._warm, *members, state)

    def new_samples(self) -> list[tuple[np.ndarray, Any, Any]]:
        """What evaluations in Python have shown since the last call: (each agent's updates before it `[H, S]`, final
        observations `[H, S, SHOWN, ...]`, what they earned `[H, S, SHOWN]`)."""
        return []

    def new_compile_seconds(self) -> float:
        """Seconds spent on compiling since the last call."""
        spent, self.compile_seconds = self.compile_seconds, 0.0
        return spent

    def _compile(self, function: Any, *arguments: Any, **static: Any) -> Callable:
        """Compiles in a thread (XLA releases Python's lock); returns a function that awaits and calls the program."""
        program = (function, *static.items())
        begun = time.perf_counter()
        if program not in self._programs:
            lowered = function.lower(*arguments, **static)
            self._programs[program] = self._compilers.submit(lowered.compile, compiler_options=compile_options())
            self.compile_seconds += time.perf_counter() - begun
        return lambda *arguments: self._compiled(program)(*arguments)

    def _compiled(self, program: Any) -> Any:
        """Waits for a submitted program; the wait counts as compile time."""
        begun = time.perf_counter()
        compiled = self._programs[program].result()
        if program not in self._ready:  # JAX's processes wait half a minute for each other's first exchange, no longer
            self._ready.add(program)
            gathered(None)
        self.compile_seconds += time.perf_counter() - begun
        return compiled


class Member:
    """One agent of a program: init, train and evaluate as pure functions of its hyperparameters and seed.

    Args:
      warm: arguments of the program that is traced. None: constants, as the plan has them.
    """

    def __init__(self, plan: Plan, program: Program, warm: Warm | None = None):
        self._plan, self._program, self._warm = plan, program, warm

    def _algorithm(self, hyper: Hyper) -> Algorithm:
        def at(update: Array | int) -> Algorithm:
            configs = {name: replace(config, **hyper[name]) for name, config in self._program.configs.items()}
            for change in self._plan.schedule:
                configs[change.config] = replace(configs[change.config], **{change.field: change.at(update)})
            return self._plan.make(configs, self._warm)

        algorithm = scheduled(at) if self._plan.schedule else at(0)
        algorithm = measured(algorithm, self._plan.eval_every) if algorithm.measure else algorithm
        return guard(algorithm, self._plan.run.total_steps)

    def _tuned(self, hyper: Hyper, s: Array) -> Algorithm:
        """The algorithm; with population-based training, as a member of that."""
        tuning = self._plan.tuning
        if tuning is None:
            return self._algorithm(hyper)
        key = jax.random.fold_in(jax.random.key(self._plan.run.seed), ROUND_TAG)
        return tuning.member(self._algorithm, hyper, jax.random.fold_in(key, s))

    def _key(self, s: Array, training: bool) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(self._plan.run.seed), s))[int(training)]

    def init(self, hyper: Hyper, s: Array) -> State:
        return self._tuned(hyper, s).init(self._key(s, training=False))

    def advance(self, hyper: Hyper, s: Array, state: State, start: Array, num_updates: int) -> tuple[State, Metrics]:
        return train(self._key(s, training=True), self._tuned(hyper, s), state, self.first(state, start), num_updates)

    def first(self, state: State, start: Array) -> Array:
        """The number of the agent's next update, which `start` is where updates have one length."""
        return state.guard.num_updates if self._program.update_steps.vary else start

    def final(self, hyper: Hyper, s: Array, state: State) -> Evaluation:
        run, env = self._plan.run, self._plan.env
        key = jax.random.fold_in(jax.random.key(run.eval_seed), EVALUATION_TAG)
        algorithm = self._tuned(hyper, s)
        if algorithm.measure:
            return self._measured(key, algorithm, state)
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

    def _measured(self, key: Array, algorithm: Algorithm, state: State) -> Evaluation:
        """What held-out rows say of an agent, with its most probable responses to the first of them."""
        assert algorithm.measure
        measures = algorithm.measure(state)
        score = -next(iter(measures.values()))
        env, respond = self._plan.env.held_out, algorithm.policy(state, True).respond
        assert env is not None
        if respond is None:
            return Evaluation(score, score, None, None, measures)
        token = respond(key, jnp.asarray(env.task.rows[:SHOWN, 0]))
        length = env.task.prompt_length
        reward = jax.vmap(lambda row: env.task.reward(row[:length], row[length:]))(token)
        return Evaluation(score, score, token, reward, measures)
