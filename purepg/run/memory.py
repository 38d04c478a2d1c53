"""How much memory a population takes, said before it runs, and how many agents of it would fit."""

import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

MIB = 2**20


class Memory(NamedTuple):
    """Bytes that a population takes while it trains."""

    per_device: int
    num_devices: int
    replay: int  # of all devices together


class Forecast(NamedTuple):
    """The memory that a population takes, and what there is."""

    line: str  # says so
    fit: int  # agents at once that fit into what is free, at least 1; all of them where nothing reports what is free


def forecast(memory: Memory, num_members: int) -> Forecast:
    """Whether a population fits into what is free now."""
    device = jax.devices()[0]
    shared = device.platform == "cpu"  # by all its devices
    needed = memory.per_device * (memory.num_devices if shared else 1)
    line = f"memory: {num_members} agents at once take {memory.per_device * memory.num_devices / MIB:,.0f} MiB"
    if memory.replay:
        line += f", {memory.replay / MIB:,.0f} MiB of it replay"
    free = free_bytes(device)
    if free is None or needed <= free:
        return Forecast(line, num_members)
    line += f"; only {free / MIB:,.0f} MiB are free{'' if shared else ' on a device'}"
    return Forecast(line, max(1, int(num_members * free / needed)))


def free_bytes(device: Any) -> int | None:
    """Memory that a device, or on a CPU the system, can still give; None where nothing reports it."""
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
    """The most memory that the device, or on a CPU the process, has held at once."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
