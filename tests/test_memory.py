"""The memory that a run says it will take: what its replay holds, and what it advises where memory is short."""

import re
from typing import Any

import pytest

import purepg.run.memory
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.envs import make as make_env
from purepg.networks import ActorQConfig, actor_q
from purepg.run.memory import MIB, forecast, free_bytes
from purepg.run.population import Chunk, Memory, Population, grid, group_by_program

CAPACITY = 100_000
TRANSITION_BYTES = 3 * 4 + 4 + 4 + 1 + 1 + 3 * 4  # Pendulum's obs, action, reward, flags, next_obs
MEMBERS = 3


class CPU:
    platform = "cpu"

    def __init__(self, **statistics: int):
        self._statistics = statistics

    def memory_stats(self) -> Any:
        return self._statistics


@pytest.fixture(scope="module")
def memory():
    env = make_env("Pendulum-v1")
    sizes: Any = {"num_steps": 2, "batch_size": 4, "capacity": CAPACITY, "warmup_steps": 2}
    configs = {"ddpg": DDPGConfig(**sizes), "network": ActorQConfig("deterministic", hidden=(4,), num_critics=1)}

    def make(configs):
        return ddpg(env, actor_q(env, configs["network"]), configs["ddpg"])

    (group,) = group_by_program(grid(configs, {}), make, 4)
    population = Population(env, make, group, (1, MEMBERS), 0, 4, 1, 0, 1, 1)
    members = population.members(Chunk(slice(0, 1), slice(0, MEMBERS)))
    population.start_compiling(members, 2)
    return population.memory(members, 2)


def test_the_replay_is_capacity_times_members_times_a_transitions_bytes(memory):
    assert memory.replay == CAPACITY * MEMBERS * TRANSITION_BYTES


def test_a_program_writes_its_replay_in_place(memory):
    """Were the buffer copied once, it would take twice as much; XLA may copy one leaf at a block's start."""
    assert memory.replay < memory.per_device < 1.5 * memory.replay


def test_the_forecast_says_members_bytes_and_replay(monkeypatch):
    monkeypatch.setattr(purepg.run.memory, "free_bytes", lambda device: 10**12)
    assert forecast(Memory(30 * MIB, 2, 40 * MIB), 8) == "memory: 8 agents at once take 60 MiB, 40 MiB of it replay"
    assert forecast(Memory(30 * MIB, 1, 0), 8) == "memory: 8 agents at once take 30 MiB"


def test_where_memory_is_short_the_forecast_advises_what_fits(monkeypatch):
    monkeypatch.setattr(purepg.run.memory, "free_bytes", lambda device: 25 * MIB)
    line = forecast(Memory(30 * MIB, 2, 40 * MIB), 8)  # two devices of one CPU share what is free
    assert line.endswith("; only 25 MiB are free: try --max-parallel 3")
    assert "try --max-parallel 1" in forecast(Memory(3000 * MIB, 1, 0), 8)


def test_free_memory_is_the_devices_own_or_the_systems():
    assert free_bytes(CPU(bytes_limit=100, bytes_in_use=30)) == 70
    free = free_bytes(CPU())
    assert free is None or 1e6 < free < 1e15


def test_a_forecast_is_one_line():
    assert re.fullmatch(r"memory: 1 agents at once take [\d,]+ MiB[^\n]*", forecast(Memory(MIB, 1, 0), 1))
