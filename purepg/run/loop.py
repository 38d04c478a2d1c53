"""The host's loop over blocks of updates. Block i is logged while block i + 1 runs; compiled code never calls back."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from purepg.run.console import say
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.files import RecordError
from purepg.run.population import Population
from purepg.run.processes import gathered, is_first, number
from purepg.run.sweep import Chunk
from purepg.train import averaged
from purepg.types import Env, State, UsageError

HostMetrics = dict[str, np.ndarray]  # each [H, S, U]
LogBlock = Callable[[Chunk, int, HostMetrics], None]  # (chunk, number of the block's first update, its metrics)
LogSamples = Callable[[Chunk, np.ndarray, list], None]  # (chunk, updates before it [H, S], what it shows [H][S][SHOWN])


FINISHING = "interrupted: finishing the current block, then writing the results so far"


class Interrupt:
    """Whether Ctrl-C was pressed, in any process of the run. The first press sets `requested`, where there are several
    processes once they have `agree`d; a second one ends the process at once."""

    requested = False
    _pressed = False

    def press(self) -> None:
        self._pressed = True
        self.requested |= number() == 1

    def agree(self, due: bool = False) -> bool:
        """Makes `requested` the same in all processes. Returns the first one's `due`."""
        found = gathered([due, self._pressed])
        if any(pressed for _, pressed in found) and not self.requested and number() > 1:
            self.requested = True
            say(FINISHING)
        return found[0][0]


@contextmanager
def ctrl_c_finishes_the_block() -> Iterator[Interrupt]:
    """A context in which Ctrl-C makes the loop stop after the current block."""
    interrupt = Interrupt()

    def handle(signum, frame):
        del signum, frame
        interrupt.press()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if interrupt.requested:
            say(FINISHING)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: its owner handles signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Saved(NamedTuple):
    """The point from which a chunk is resumed."""

    update: int
    metrics: HostMetrics  # of the updates before it
    run_seconds: float
    total_steps: int  # each agent's budget of environment steps
    spent: bool  # whether every agent has used up its budget
    state: State | None = None  # None: in the chunk's checkpoint


class Job(NamedTuple):
    """A chunk of agents to train, and the population that trains it."""

    number: int  # its position in the run's order
    chunk: Chunk
    population: Population
    total_steps: int  # each agent's budget of environment steps
    saved: Saved | None = None


class Saving(NamedTuple):
    """Where and how often a job's state is saved."""

    checkpoints: Checkpoints
    every: float  # seconds
    failed: Callable[[RecordError], None]  # called if a save fails


class Outcome(NamedTuple):
    """The results of one job."""

    metrics: HostMetrics
    sampled: np.ndarray  # [H, S] mean evaluation return
    mode: np.ndarray
    responses: list | None  # [H][S][SHOWN] of dicts: `Env.describe` of a final observation, and the episode's `reward`
    compile_seconds: float
    run_seconds: float  # training only
    state: State | None = None  # of all agents; None if checkpoints keep it
    measures: dict[str, np.ndarray] | None = None  # `Evaluation.measures`


def run_job(
    job: Job,
    env: Env,
    log_every: int,
    log: LogBlock,
    interrupt: Interrupt,
    saving: Saving | None = None,
    log_samples: LogSamples = lambda *samples: None,
) -> Outcome:
    """Trains and evaluates a chunk.

    Args:
      log_every: updates in a block; 0 makes the whole run one block.
      log: called with every new block of metrics; blocks in `job.saved` are not logged again.
      saving: how checkpoints are saved. None: no checkpoints; the outcome holds the final state.
      log_samples: called with what each evaluation has shown, the final one included, where it shows any.
    """
    return _Training(job, env, log, interrupt, saving, log_samples).run(log_every)


class _Training:
    """A job in progress."""

    def __init__(
        self, job: Job, env: Env, log: LogBlock, interrupt: Interrupt, saving: Saving | None, log_samples: LogSamples
    ):
        self._job, self._log, self._interrupt, self._saving = job, log, interrupt, saving
        self._env, self._log_samples = env, log_samples
        saved = job.saved
        self._blocks: list[HostMetrics] = [saved.metrics] if saved else []
        self._seconds_before = saved.run_seconds if saved else 0.0
        # Whether any agent took a step in the last logged update; if none did, all have used up their budget.
        self._moved = not (saved and saved.spent and saved.total_steps == job.total_steps)

    def run(self, log_every: int) -> Outcome:
        job, population, saving = self._job, self._job.population, self._saving
        members, first = job.chunk.members, job.saved.update if job.saved else 0
        lengths = job.chunk.block_lengths(log_every, first) if self._moved else []
        population.start_compiling(members, *lengths)
        state = self._first_state()
        self._begun, self._compiled = time.perf_counter(), population.compile_seconds
        state, update = self._advance(state, first, lengths)
        seconds = self._run_seconds()
        if saving and lengths:
            self._save(update, state)
        try:
            evaluation = jax.device_get(population.final(members, state))
        except UsageError:  # of Python, such as a reward of the user's own
            if saving:
                saving.checkpoints.wait()
            raise
        responses = described(self._env, evaluation.last_obs, evaluation.returns)
        found: dict[str, Any] = {"sampled": evaluation.sampled, "mode": evaluation.mode, "responses": responses}
        if evaluation.measures is not None:
            found["measures"] = evaluation.measures
        self._show()
        if saving:
            try:
                saving.checkpoints.wait()
                if is_first() and (update >= job.chunk.program.num_updates or not self._moved):
                    saving.checkpoints.write_evaluation(update, found)
            except RecordError as error:
                saving.failed(error)
        metrics = {name: np.concatenate([b[name] for b in self._blocks], axis=-1) for name in self._blocks[0]}
        return Outcome(
            metrics,
            **found,
            compile_seconds=population.new_compile_seconds(),
            run_seconds=seconds,
            state=None if saving else state,
        )

    def _first_state(self) -> State:
        job, population, saving = self._job, self._job.population, self._saving
        members = job.chunk.members
        before = job.saved.total_steps if job.saved else population.total_steps
        if not job.saved:
            state = population.init(members)
        elif job.saved.state is not None:
            state = population.placed(members, job.saved.state)
        else:
            assert saving
            state = saving.checkpoints.restore(job.saved.update, population.abstract_state(members))
        return population.with_more_steps(state, job.total_steps - before)

    def _advance(self, state: State, update: int, lengths: list[int]) -> tuple[State, int]:
        """Trains block after block until the end or an interrupt; returns the state and its number of updates."""
        job, saving, last_saved = self._job, self._saving, self._begun
        running = None  # the block that the device computes while the previous one is logged
        for length in lengths:
            state, device_metrics = job.population.advance(job.chunk.members, state, update, length, self._interrupted)
            if running is not None:
                self._fetch(*running)
                running = None
                if not self._moved:
                    break
            self._show()
            if device_metrics:
                running = (update, device_metrics)
                update += device_metrics["env_steps"].shape[-1]
            if job.population.failure:
                self._fail(job.population.failure, running, update, state)
            due = self._interrupt.agree(bool(saving) and time.perf_counter() - last_saved >= saving.every)
            if saving and due:
                # A checkpoint must not be ahead of the log, so its own block is logged first.
                if running is not None:
                    self._fetch(*running)
                running = None
                self._save(update, state)
                last_saved = time.perf_counter()
            if self._interrupt.requested or not self._moved:
                break
        if running is not None:
            self._fetch(*running)
        return state, update

    def _interrupted(self) -> bool:
        return self._interrupt.requested

    def _fail(self, failure: UsageError, running: tuple[int, Any] | None, update: int, state: State) -> None:
        """Logs and saves the updates before an environment failed, and raises its error."""
        if running is not None:
            self._fetch(*running)
        if self._saving and self._blocks:
            self._save(update, state)
            self._saving.checkpoints.wait()
        raise failure

    def _fetch(self, start: int, device_metrics: Any) -> None:
        """Waits for a block to finish and logs it."""
        metrics = averaged(device_metrics)
        self._log(self._job.chunk, start, metrics)
        self._blocks.append(metrics)
        self._moved = bool(metrics["env_steps"][..., -1].any())

    def _show(self) -> None:
        """Logs what evaluations in Python have shown."""
        for updates, last_obs, returns in self._job.population.new_samples():
            self._log_samples(self._job.chunk, updates, described(self._env, last_obs, returns) or [])

    def _run_seconds(self) -> float:
        compiling = self._job.population.compile_seconds - self._compiled
        return self._seconds_before + time.perf_counter() - self._begun - compiling

    def _save(self, update: int, state: State) -> None:
        assert self._saving
        facts = {
            "dtypes": {name: str(value.dtype) for name, value in self._blocks[-1].items()},
            "run_seconds": self._run_seconds(),
            "total_steps": self._job.total_steps,
            "spent": not self._moved,
        }
        try:
            self._saving.checkpoints.save(update, state, facts)
        except RecordError as error:
            self._saving.failed(error)


def described(env: Env, last_obs: Any, returns: Any) -> list | None:
    """Describes an evaluation's final observations by the environment's `describe`, and adds each episode's reward."""
    describe = (env.held_out or env).describe
    if describe is None or returns is None:
        return None

    def of_episode(index: tuple[int, ...]) -> dict[str, Any]:
        return {**describe(jax.tree.map(lambda x: x[index], last_obs)), "reward": float(returns[index])}

    H, S, n = returns.shape
    return [[[of_episode((h, s, i)) for i in range(n)] for s in range(S)] for h in range(H)]
