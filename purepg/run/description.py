"""What config.json says of a run, from which it can be repeated."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import jax

from purepg.envs.contract import space_name
from purepg.run.config import RunConfig
from purepg.run.folder.config import read_summary
from purepg.run.folder.files import SUMMARY
from purepg.run.plan import Plan
from purepg.run.sweep import Chunk, schedule_of
from purepg.run.text.prompts import digest
from purepg.run.values import sweep_texts
from purepg.types import Env, space_leaves


def describe(plan: Plan, script: str, layout: Sequence[Sequence[Chunk]] = ()) -> dict[str, Any]:
    """The contents of config.json: all arguments, versions, and the layout, on which the results' last bits depend.

    Args:
      layout: the chunks of each round so far. Empty: before the first.
    """
    served = [plan.program_of(h) for h in range(len(plan.settings))]
    return {
        "script": script,
        "run": asdict(plan.run),
        **{name: asdict(config) for name, config in plan.programs[0].configs.items()},
        "code": plan.code,
        "spaces": _spaces(plan.env),
        "start_digest": plan.start_digest,
        **digests_of_files(plan.run),
        "reward_digests": digests_of_rewards(plan.env),
        "sweep": sweep_texts(plan.sweep),
        "settings": [setting.hyperparameters for setting in plan.settings],
        "schedules": [schedule_of(program.configs) for program in served],
        "num_updates": [program.num_updates for program in served],
        "layout": [
            {"round": number, "settings": chunk.settings, "seeds": chunk.seeds}
            for number, of_round in enumerate(layout or [plan.chunks()])
            for chunk in of_round
        ],
        "devices": [device.device_kind for device in jax.devices()[: plan.num_devices]],
        "platform": {"backend": jax.default_backend(), "python": platform.python_version(), "os": platform.platform()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def digests_of_files(run: RunConfig) -> dict[str, str]:
    """The digests of the files of rows, if a run reads any."""
    return {f"{name}_digest": digest(file) for name, file in getattr(run, "files", {}).items()}


def digests_of_rewards(env: Env) -> dict[str, str]:
    """The digests of the summaries of learned rewards' runs, which change when one of them is trained again. Raises
    UsageError if one has not finished."""
    folders = env.task.judge.learned if env.task and env.task.judge else ()
    for folder in folders:
        read_summary(folder)
    return {folder.name: digest(str(folder / SUMMARY)) for folder in folders}


def versions() -> dict[str, str]:
    """The versions of the packages on which results depend."""
    packages = ("purepg", "jax", "jaxlib", "flax", "optax", "gymnax", "numpy", "scipy")
    return {package: importlib.metadata.version(package) for package in packages}


def _spaces(env: Env) -> str:
    """The environment's spaces and time limit in one line, to tell apart two environments of the same name."""
    observed = ", ".join(map(space_name, space_leaves(env.observation_space)))
    return f"{observed} -> {space_name(env.action_space)}, time limit {env.max_episode_steps}"
