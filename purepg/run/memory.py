"""Forecasts how much memory a population takes, and how many of its agents fit at once."""

import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purepg.run import processes

MIB = 2**20


class Memory(NamedTuple):
    """The bytes that a population takes during training."""

    per_device: int
    num_devices: int
    replay: int  # replay buffers, summed over devices


class Forecast(NamedTuple):
    """The memory that a population takes, compared with the free memory."""

    line: str  # a sentence for the user
    fit: int  # agents that fit into free memory at once, at least 1; all of them if free memory is unknown


def forecast(memory: Memory, num_members: int) -> Forecast:
    """Compares a population's memory with what is free now."""
    device = jax.local_devices()[0]
    shared = device.platform == "cpu"  # all CPU devices of a machine share one memory
    here = memory.num_devices * processes.neighbours() // processes.number()
    needed = memory.per_device * (here if shared else 1)
    line = f"memory: {num_members} agents at once take {memory.per_device * memory.num_devices / MIB:,.0f} MiB"
    if memory.replay:
        line += f", {memory.replay / MIB:,.0f} MiB of it replay"
    free = free_bytes(device)
    if free is None or needed <= free:
        return Forecast(line, num_members)
    line += f"; only {free / MIB:,.0f} MiB are free{'' if shared else ' on a device'}"
    return Forecast(line, max(1, int(num_members * free / needed)))


def free_bytes(device: Any) -> int | None:
    """The free memory of a device, or on a CPU of the system; None if it is unknown."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def peak_memory_bytes() -> int:
    """The peak memory of the device, or on a CPU of the process."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
