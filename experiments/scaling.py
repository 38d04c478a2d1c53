"""Times PPO on CartPole with one agent's environments, or several agents, spread over devices.

The devices are those that the CPU is split into. Every measurement has its own process, which compiles and warms up
before it is timed; 1, 2 and 4 devices take turns. PPO is that of experiments/benchmark.py: 128 steps, 4 epochs, 4
minibatches, two 64-wide layers for the policy and for the critic.
"""

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmark import NUM_STEPS, PUREPG, STEPS_PER_RUN, Worker

from purepg.config import Count
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.types import UsageError


@dataclass(frozen=True)
class Config:
    """What is timed.

    Attributes:
      sizes: each ENVIRONMENTSxAGENTS. Several agents are spread over the devices; of one agent, the environments are.
      devices: numbers of devices; the first is what the others are compared with.
      repeats: rounds, in each of which every number of devices is timed once.
    """

    sizes: tuple[str, ...] = ("4x16", "64x16", "64x1", "2048x1")
    devices: tuple[Count, ...] = (1, 2, 4)
    repeats: Count = 3


def timed(num_envs: int, num_agents: int, devices: int) -> float:
    """Environment steps a second of all agents, in a process of its own."""
    num_updates = max(1, STEPS_PER_RUN["ppo"] // (num_envs * num_agents * NUM_STEPS["ppo"]))
    sizes = num_envs, num_agents, num_updates, NUM_STEPS["ppo"], devices, devices if num_agents == 1 else 1
    worker = Worker([sys.executable, PUREPG, "speed", "ppo", *map(str, sizes)])
    done = worker.run()
    worker.close()
    return done["env_steps"] / done["seconds"]


def shape(size: str) -> tuple[int, int]:
    """(environments, agents) of a size. Raises UsageError if it is of another form."""
    numbers = size.split("x")
    if len(numbers) != 2 or not all(x.isdigit() and int(x) for x in numbers):
        raise UsageError(f"size ({size}) must be ENVIRONMENTSxAGENTS, as in 64x16")
    return int(numbers[0]), int(numbers[1])


def row(size: str, found: Mapping[int, Sequence[float]]) -> list[str]:
    """A row of the table: median speeds, and their ratios within each round."""
    first, *others = found
    spread = "environments" if shape(size)[1] == 1 else "agents"
    ratios = [[x / one for x, one in zip(found[n], found[first], strict=True)] for n in others]
    return [
        size.replace("x", " x "),
        spread,
        *(f"{statistics.median(speeds):,.0f}" for speeds in found.values()),
        *(f"{statistics.median(x):.2f} [{min(x):.2f}, {max(x):.2f}]" for x in ratios),
    ]


def study(config: Config) -> Study:
    """Times all sizes.

    Raises:
      UsageError: a size is not of the form ENVIRONMENTSxAGENTS, or the devices do not divide what is spread.
    """
    for size in config.sizes:
        num_envs, num_agents = shape(size)
        spread = num_envs if num_agents == 1 else num_agents
        if wrong := [n for n in config.devices if spread % n]:
            raise UsageError(f"devices ({wrong[0]}) must divide what is spread in {size}, which is {spread}")
    speeds = {size: {n: [] for n in config.devices} for size in config.sizes}
    for size, found in speeds.items():
        for _ in range(config.repeats):
            for n in config.devices:
                found[n].append(timed(*shape(size), n))
        print(" ".join(row(size, found)), flush=True)
    first, *others = config.devices
    header = ["environments x agents", "spread", *(f"{n} device{'s' * (n > 1)}, steps/s" for n in config.devices)]
    header += [f"{n} against {first}" for n in others]
    rows = [row(size, found) for size, found in speeds.items()]
    written = f"On {os.cpu_count()} cores; medians of {config.repeats}.\n\n{table(header, rows)}"
    return Study(written, speeds, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
