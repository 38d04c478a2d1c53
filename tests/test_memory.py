"""The memory that a run says it will take: what its replay holds, and what it advises where memory is short."""

import json
import os
import re
from typing import Any

import numpy as np
import pytest
from jax.stages import Lowered

import purepg.run.launch
import purepg.run.memory
from purepg.algorithms.ddpg import DDPGConfig, ddpg
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
from purepg.run import cli
from purepg.run.memory import MIB, Memory, forecast, free_bytes
from purepg.run.plan import RunConfig, prepare
from purepg.run.population import Population

pytestmark = pytest.mark.usefixtures("programs")

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
    sizes: Any = {"num_steps": 2, "batch_size": 4, "capacity": CAPACITY, "warmup_steps": 2}
    configs = {"ddpg": DDPGConfig(**sizes), "network": ActorQConfig("deterministic", hidden=(4,), num_critics=1)}
    run = RunConfig("Pendulum-v1", 4, MEMBERS, eval_episodes=1, eval_max_steps=1, devices=1)
    plan = prepare(ddpg, actor_q, configs, run, {})
    (chunk,) = plan.chunks()
    population = Population(plan, chunk.program, chunk.shape)
    compiled, preset = Lowered.compile, "xla_cpu_opt_preset"
    options: Any = {preset: "CPU_OPT_PRESET_DEFAULT"} if preset in os.environ.get("XLA_FLAGS", "") else None
    with pytest.MonkeyPatch.context() as patch:  # as users compile: the tests' fast preset copies more
        patch.setattr(Lowered, "compile", lambda self, compiler_options: compiled(self, options))
        population.start_compiling(chunk.members, 2)
        return population.memory(chunk.members, 2)


def test_the_replay_is_capacity_times_members_times_a_transitions_bytes(memory):
    assert memory.replay == CAPACITY * MEMBERS * TRANSITION_BYTES


def test_a_program_writes_its_replay_in_place(memory):
    """Were the buffer copied once, it would take twice as much; XLA may copy one leaf at a block's start."""
    assert memory.replay < memory.per_device < 1.5 * memory.replay


def test_the_forecast_says_members_bytes_and_replay(monkeypatch):
    monkeypatch.setattr(purepg.run.memory, "free_bytes", lambda device: 10**12)
    assert (
        forecast(Memory(30 * MIB, 2, 40 * MIB), 8).line == "memory: 8 agents at once take 60 MiB, 40 MiB of it replay"
    )
    assert forecast(Memory(30 * MIB, 1, 0), 8) == ("memory: 8 agents at once take 30 MiB", 8)


def test_where_memory_is_short_the_forecast_says_how_many_fit(monkeypatch):
    monkeypatch.setattr(purepg.run.memory, "free_bytes", lambda device: 25 * MIB)
    line, fit = forecast(Memory(30 * MIB, 2, 40 * MIB), 8)  # two devices of one CPU share what is free
    assert line.endswith("; only 25 MiB are free") and fit == 3
    assert forecast(Memory(3000 * MIB, 1, 0), 8).fit == 1


def test_a_population_that_does_not_fit_is_trained_in_parts_and_resumed_in_the_same(monkeypatch, tmp_path, capsys):
    """A run that asks for parts gives the same without a stop; a resume keeps them where there is more memory again."""
    config = PPOConfig(num_envs=2, num_steps=8, num_epochs=1, num_minibatches=1, anneal_learning_rate=False)
    network = NetworkConfig(hidden=(4,))

    def command(name: str, *flags: str) -> int:
        small = RunConfig(total_steps=32, num_seeds=4, log_every=1, eval_episodes=1, eval_max_steps=5, devices=1)
        arguments = ["--out", str(tmp_path / name), "--wandb", "disabled", *flags]
        with pytest.raises(SystemExit) as exit_:
            cli.main(ppo, config, actor_critic, network, small, arguments=arguments)
        assert isinstance(exit_.value.code, int)
        return exit_.value.code

    of_parts: list[int] = []

    def remember(memory: Memory, num_members: int) -> Any:
        of_parts.append(memory.per_device)
        return forecast(memory, num_members)

    monkeypatch.setattr(purepg.run.launch, "forecast", remember)
    assert command("asked", "--max-parallel", "2", "--total-steps", "64") == 0
    monkeypatch.setattr(purepg.run.memory, "free_bytes", lambda device: of_parts[0])  # just enough for two
    capsys.readouterr()
    assert command("split") == 0
    said = capsys.readouterr().err
    assert "memory: 4 agents at once" in said and " at a time" in said and "memory: 2 agents at once" in said
    monkeypatch.undo()
    split, asked = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("split", "asked"))
    assert split["layout"] == asked["layout"] and split["run"]["max_parallel"] in (2, 3)
    assert command("split", "--resume", "--total-steps", "64") == 0
    with np.load(tmp_path / "split" / "metrics.npz") as metrics, np.load(tmp_path / "asked" / "metrics.npz") as same:
        for name in same:
            np.testing.assert_array_equal(metrics[name], same[name], err_msg=name)


def test_free_memory_is_the_devices_own_or_the_systems():
    assert free_bytes(CPU(bytes_limit=100, bytes_in_use=30)) == 70
    free = free_bytes(CPU())
    assert free is None or 1e6 < free < 1e15


def test_a_forecast_is_one_line():
    assert re.fullmatch(r"memory: 1 agents at once take [\d,]+ MiB[^\n]*", forecast(Memory(MIB, 1, 0), 1).line)
