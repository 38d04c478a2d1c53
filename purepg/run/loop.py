"""The host's loop over blocks of updates: block i is logged while block i + 1 runs. No program calls back."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from purepg.run.checkpoint import Checkpoints
from purepg.run.population import Chunk, Group, Population, block_lengths
from purepg.run.record import RecordError
from purepg.train import averaged

HostMetrics = dict[str, np.ndarray]  # each [H, S, U]


class Sink(Protocol):
    """Where blocks of metrics go as they come: the record, W&B."""

    def __call__(self, settings: list[int], start: int, metrics: HostMetrics, seeds: list[int], /) -> None: ...


class Interrupt:
    """Set by the first Ctrl-C; a second one ends the process at once."""

    requested = False


@contextmanager
def ctrl_c_finishes_the_block() -> Iterator[Interrupt]:
    """Within it, Ctrl-C asks the loop to stop after the block that runs."""
    interrupt = Interrupt()

    def handle(signum, frame):
        del signum, frame
        interrupt.requested = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tqdm.write("interrupted: finishing the running block, then writing what there is", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: its owner handles signals
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class Progress:
    """The live line: updates, environment steps a second, mean return, time left."""

    def __init__(self, total_steps: int, shown: bool | None = None):
        disable = None if shown is None else not shown  # None: where there is a terminal
        self._bar = tqdm(
            total=total_steps, unit="step", unit_scale=True, disable=disable, smoothing=0.1, dynamic_ncols=True
        )

    def __call__(self, settings: list[int], start: int, metrics: HostMetrics, seeds: list[int]) -> None:
        del settings, seeds
        returns = metrics["episode_return"]
        described = {"updates": start + returns.shape[-1]}
        if np.isfinite(returns).any():
            described["return"] = f"{np.nanmean(returns):.1f}"
        self._bar.set_postfix(described, refresh=False)
        self._bar.update(int(metrics["env_steps"].sum()))

    def close(self) -> None:
        self._bar.close()


class Outcome(NamedTuple):
    """What became of one chunk."""

    metrics: HostMetrics  # each [H, S, U]
    sampled: np.ndarray  # [H, S] mean evaluation return
    mode: np.ndarray
    compile_seconds: float
    run_seconds: float  # training alone
    rows: np.ndarray | None = None  # [H, S, n, L + R] of a token task: prompts with responses
    earned: np.ndarray | None = None  # [H, S, n]: the return of each


class Saved(NamedTuple):
    """What a chunk goes on from."""

    update: int
    metrics: HostMetrics  # of the updates before it
    run_seconds: float
    total_steps: int  # what its members were given to consume
    spent: bool  # by all of them: none has anything left to do


class Saving(NamedTuple):
    """Where and how often a chunk's state is saved."""

    checkpoints: Checkpoints
    every: float  # seconds
    failed: Callable[[RecordError], None]  # what is done where it cannot be
    start_digest: str | None  # of the parameters that the agents started from


def run_chunk(
    population: Population,
    group: Group,
    chunk: Chunk,
    log_every: int,
    sinks: list[Sink],
    interrupt: Interrupt,
    saving: Saving | None = None,
    saved: Saved | None = None,
) -> Outcome:
    """Trains and evaluates a chunk.

    Args:
      log_every: updates in a block; 0 makes the whole run one block.
      saved: what it goes on from; the sinks have had its metrics.
    """
    settings, seeds = chunk.members(group)
    members = population.members(chunk)
    first = saved.update if saved else 0
    blocks: list[HostMetrics] = [saved.metrics] if saved else []
    run_before = saved.run_seconds if saved else 0.0
    spent = saved is not None and saved.spent and saved.total_steps == population.total_steps
    lengths = [] if spent else block_lengths(group, log_every, first)
    population.start_compiling(members, *lengths)
    if saved and saving:
        state = saving.checkpoints.restore(first, population.abstract_state(members))
        state = population.with_more_steps(state, population.total_steps - saved.total_steps)
    else:
        state = population.init(members)
    begun, compiled = time.perf_counter(), population.compile_seconds

    def run_seconds() -> float:
        return run_before + time.perf_counter() - begun - (population.compile_seconds - compiled)

    def fetch(start, device_metrics) -> bool:
        """Logs a block once it is done. False where no member moved in its last update: all have spent their budget."""
        metrics = averaged(device_metrics)
        for sink in sinks:
            sink(settings, start, metrics, seeds)
        blocks.append(metrics)
        return bool(metrics["env_steps"][..., -1].any())

    def save(update, state) -> None:
        assert saving
        facts = {
            "dtypes": {name: str(value.dtype) for name, value in blocks[-1].items()},
            "run_seconds": run_seconds(),
            "total_steps": population.total_steps,
            "spent": not moved,
            "start_digest": saving.start_digest,
        }
        try:
            saving.checkpoints.save(update, state, facts)
        except RecordError as error:
            saving.failed(error)

    running = None  # the block that the device works on while the one before it is logged
    start, last_saved, moved = first, begun, not spent
    for length in lengths:
        state, device_metrics = population.advance(members, state, start, length)
        if running is not None and not fetch(*running):
            running, moved = None, False
            break
        running = (start, device_metrics)
        start += length
        if saving and time.perf_counter() - last_saved >= saving.every:
            # A checkpoint covers what is logged, and so waits for its own block.
            moved, running = fetch(*running), None
            save(start, state)
            last_saved = time.perf_counter()
        if interrupt.requested or not moved:
            break
    if running is not None:
        moved = fetch(*running)
    seconds = run_seconds()
    if saving and lengths:
        save(start, state)
    evaluation = jax.device_get(population.final(members, state))
    if saving:
        try:
            saving.checkpoints.wait()
            if start >= group.num_updates or not moved:
                saving.checkpoints.write_evaluation(start, evaluation._asdict())
        except RecordError as error:
            saving.failed(error)
    metrics = {name: np.concatenate([b[name] for b in blocks], axis=-1) for name in blocks[0]}
    compile_seconds = population.new_compile_seconds()
    return Outcome(
        metrics, evaluation.sampled, evaluation.mode, compile_seconds, seconds, evaluation.rows, evaluation.earned
    )
