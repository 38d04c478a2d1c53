"""How much memory a population will take, said before it runs, and how many agents of it would fit."""

from pathlib import Path
from typing import Any, NamedTuple

import jax

from purepg.run.population import Memory

MIB = 2**20


class Forecast(NamedTuple):
    """What a population takes, and what there is."""

    line: str  # that says so
    fit: int  # agents at once that what is free would hold, at least 1; all of them where nobody says what is free


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
    """Memory that a device can still give; on a CPU, the system. None where nobody says."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024
