"""Compares the returns of agents that are spread over several devices with those of agents on one device.

Over several devices, minibatches are dealt otherwise and sums are rounded otherwise, so that an agent differs from the
one of the same seed on one device, as two seeds differ. The returns of many seeds must agree. The devices are those
that the CPU is split into.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ppo
import ppo_pendulum
import sac

from purepg.algorithms.grpo import GRPOConfig, grpo
from purepg.config import Count
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.study import Study, main
from purepg.run.summary import with_interval
from purepg.runtime import split_cpu
from purepg.types import UsageError

SAC = replace(sac.CONFIG, num_envs=4, num_gradient_steps=4)
GROUPS = GRPOConfig(num_prompts=4, group_size=8, num_epochs=4, num_minibatches=2, kl_coef=0.0)
TASKS = {  # with budgets after which no task is solved: algorithm, its config, network, its config, run
    "PPO, Acrobot-v1": (*ppo.EXPERIMENT[:4], RunConfig("Acrobot-v1", 10_240, num_seeds=16)),
    "PPO, Pendulum-v1": (*ppo_pendulum.EXPERIMENT[:4], RunConfig("Pendulum-v1", 204_800, num_seeds=16)),
    "SAC, Pendulum-v1": (sac.sac, SAC, *sac.EXPERIMENT[2:4], RunConfig("Pendulum-v1", 3_000, num_seeds=16)),
    "GRPO, CartPole-v1": (grpo, GROUPS, actor_critic, NetworkConfig(), RunConfig("CartPole-v1", 50_000, num_seeds=16)),
}


@dataclass(frozen=True)
class Config:
    """What is trained.

    Attributes:
      tasks: of this script's list.
      devices: numbers of devices of each agent.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    devices: tuple[Count, ...] = (1, 2, 4)


def trained(task: str, devices: int) -> Mapping[str, Any]:
    """The statistics over seeds of the final evaluation."""
    algorithm, config, network, network_config, run = TASKS[task]
    run = replace(run, devices_per_agent=devices)
    (found,) = train_population(algorithm, config, network, network_config, run).summary["settings"]
    return {name: found[name] for name in ("iqm", "interval", "finals")}


def study(config: Config) -> Study:
    """Trains all tasks.

    Raises:
      UsageError: there is no such task, or the devices do not divide its environments.
    """
    if unknown := [task for task in config.tasks if task not in TASKS]:
        raise UsageError(f"task ({unknown[0]}) must be one of: {'; '.join(TASKS)}")
    split_cpu(max(config.devices), 2 * max(config.devices))
    found: dict[str, dict[int, Mapping[str, Any]]] = {task: {} for task in config.tasks}
    for task, of_task in found.items():
        for n in config.devices:
            of_task[n] = trained(task, n)
            print(f"{task}, {n} devices: {with_interval(of_task[n]['iqm'], of_task[n]['interval'])}", flush=True)
    header = ["IQM over seeds [95 %]", "env steps", "seeds"]
    header += [f"{n} device{'s' * (n > 1)}" for n in config.devices]
    rows = []
    for task, of_task in found.items():
        run = TASKS[task][-1]
        returns = [with_interval(x["iqm"], x["interval"]) for x in of_task.values()]
        rows.append([task, f"{run.total_steps:,}", str(run.num_seeds), *returns])
    written = table(header, rows)
    return Study(written, found, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
