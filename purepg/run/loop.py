"""The host's loop over blocks of updates: block i is logged while block i + 1 runs. No program calls back."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import jax
import numpy as np
from tqdm import tqdm

from purepg.run.memory import forecast
from purepg.run.population import Chunk, Group, Population, block_lengths
from purepg.run.record import say

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

    def __init__(self, total_steps: int):
        self._bar = tqdm(
            total=total_steps, unit="step", unit_scale=True, disable=None, smoothing=0.1, dynamic_ncols=True
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


def run_chunk(
    population: Population,
    group: Group,
    chunk: Chunk,
    log_every: int,
    sinks: list[Sink],
    interrupt: Interrupt,
    announce: bool = False,
) -> Outcome:
    """Trains and evaluates a chunk. `log_every` 0 makes the whole run one block; `announce`: say its memory."""
    settings = list(group.settings[chunk.settings])
    seeds = list(range(chunk.seeds.start, chunk.seeds.stop))
    blocks: list[HostMetrics] = []

    def fetch(start, device_metrics) -> bool:
        """Logs a block once it is done. False where no member moved in its last update: all have spent their budget."""
        metrics = jax.device_get(device_metrics)
        for sink in sinks:
            sink(settings, start, metrics, seeds)
        blocks.append(metrics)
        return bool(metrics["env_steps"][..., -1].any())

    lengths = block_lengths(group, log_every)
    members = population.members(chunk)
    compiled_before = population.compile_seconds
    population.start_compiling(members, *lengths)
    if announce:
        say(forecast(population.memory(members, lengths[0]), population.num_members))
    state = population.init(members)
    begun, compiled = time.perf_counter(), population.compile_seconds
    running = None  # the block that the device works on while the one before it is logged
    start = 0
    for length in lengths:
        state, device_metrics = population.advance(members, state, start, length)
        if running is not None and not fetch(*running):
            running = None
            break
        running = (start, device_metrics)
        start += length
        if interrupt.requested:
            break
    if running is not None:
        fetch(*running)
    run_seconds = time.perf_counter() - begun - (population.compile_seconds - compiled)
    evaluation = jax.device_get(population.final(members, state))
    metrics = {name: np.concatenate([b[name] for b in blocks], axis=-1) for name in blocks[0]}
    return Outcome(
        metrics,
        evaluation.sampled,
        evaluation.mode,
        population.compile_seconds - compiled_before,
        run_seconds,
    )
