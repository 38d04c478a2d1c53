"""Out of a saved population, one agent: its algorithm and its state, and with them its policy.

agent = load("runs/x", best=True)
act = agent.algorithm.policy(agent.state, True)      # act(key, obs [N, ...]) -> actions [N, ...]
"""

import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purepg import envs
from purepg.run.checkpoint import Checkpoints
from purepg.run.population import Configs, grid
from purepg.run.record import SUMMARY, reason, setting_label
from purepg.run.resume import read_config
from purepg.train import guard
from purepg.types import Algorithm, Env, State, UsageError


class Loaded(NamedTuple):
    """One agent of a run."""

    env: Env
    algorithm: Algorithm
    state: State
    setting: int  # its place in the sweep
    seed: int
    label: str  # what its setting is called; empty where nothing was swept
    update: int  # updates it has had

    @property
    def name(self) -> str:
        """What the agent is called."""
        return f"{self.label}, seed {self.seed}" if self.label else f"seed {self.seed}"

    def max_steps(self, asked: int | None) -> int:
        """How long an episode may last: as asked, or the environment's time limit. Raises UsageError without either."""
        limit = asked or self.env.max_episode_steps
        if limit is None:
            raise UsageError(f"{self.env.name} has no time limit: set --max-steps")
        return limit


def load(out: Path | str, setting: int | None = None, seed: int | None = None, best: bool = False) -> Loaded:
    """An agent from the latest checkpoint of its run.

    Args:
      out: the run's folder.
      setting: its setting's place in the sweep; None: the only one. seed: its seed; None: the only one.
      best: the agent with the highest final evaluation, of those that `setting` and `seed` leave.
    Raises:
      UsageError: the folder holds no run, or none that has this agent, or nothing says which agent is meant.
    """
    out = Path(out)
    config = read_config(out)
    settings, seeds = config["settings"], range(config["run"]["num_seeds"])
    for name, value, number in (("setting", setting, len(settings)), ("seed", seed, len(seeds))):
        if value is not None and not 0 <= value < number:
            raise UsageError(f"{name} ({value}) must be from 0 to {number - 1}, to be one of {out}")
    if best:
        setting, seed = _best(out, setting, seed)
    setting = 0 if setting is None and len(settings) == 1 else setting
    seed = 0 if seed is None and len(seeds) == 1 else seed
    if setting is None or seed is None:
        raise UsageError(f"{out} holds {len(settings)} settings of {len(seeds)} seeds: name one, or ask for the best")

    env, algorithm = _rebuild(config, setting)
    chunk = next(i for i, part in enumerate(config["layout"]) if setting in part["settings"] and seed in part["seeds"])
    checkpoints = Checkpoints(out, chunk)
    update = checkpoints.latest()
    if update is None:
        raise UsageError(f"{out} holds no checkpoint of setting {setting}, seed {seed}")
    layout = config["layout"][chunk]
    shape = len(layout["settings"]), len(layout["seeds"])
    member = jax.eval_shape(algorithm.init, jax.eval_shape(jax.random.key, 0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype), member)
    place = layout["settings"].index(setting), layout["seeds"].index(seed)
    state = jax.tree.map(lambda x: x[place], checkpoints.restore(update, abstract))
    label = setting_label({name: _tuples(value) for name, value in settings[setting].items()})
    return Loaded(env, algorithm, state, setting, seed, label, update)


def reference(value: Any) -> str:
    """Where a function or a class is to be found again: `module:name`, or `file.py:name` of a script that was run."""
    if not hasattr(value, "__qualname__"):  # a partial function, say
        return repr(value)
    module = value.__module__
    if module == "__main__" and getattr(sys.modules[module], "__file__", None):
        module = str(Path(str(sys.modules[module].__file__)).absolute())
    return f"{module}:{value.__qualname__}"


def dereference(text: str) -> Any:
    """What `reference` named. Raises UsageError where it is not there any more."""
    module, _, name = text.rpartition(":")
    try:
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return getattr(found, name)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise UsageError(f"cannot find {text}, which the run was made with: {reason(error)}") from error


def stored_network(out: Path | str, setting: int = 0) -> Any:
    """The network's config of a saved run, as a setting has it."""
    return _configs(read_config(Path(out)), setting)["network"]


def _best(out: Path, setting: int | None, seed: int | None) -> tuple[int, int]:
    try:
        found = json.loads((out / SUMMARY).read_text())["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{out} has no {SUMMARY} to tell which agent is best: {reason(error)}") from error
    finals = {
        (h, s): value
        for h, entry in enumerate(found)
        for s, value in enumerate(entry["finals"])
        if value is not None and math.isfinite(value) and setting in (None, h) and seed in (None, s)
    }
    if not finals:
        raise UsageError(f"{out} has evaluated no such agent")
    return max(finals, key=lambda member: finals[member])


def _rebuild(config: Mapping[str, Any], setting: int) -> tuple[Env, Algorithm]:
    """The environment, and the algorithm of a setting, as the run made them."""
    code, configs = config["code"], _configs(config, setting)
    name = code["name"]
    env = envs.make(config["run"]["env"])
    network = dereference(code["network"])(env, configs["network"])
    algorithm = dereference(code["algorithm"])(env, network, configs[name])
    return env, guard(algorithm, config["run"]["total_steps"])


def _configs(config: Mapping[str, Any], setting: int) -> Configs:
    """The algorithm's and the network's config of a setting."""
    code = config["code"]
    name = code["name"]
    configs = {
        name: _dataclass(dereference(code["config"]), config[name]),
        "network": _dataclass(dereference(code["network_config"]), config["network"]),
    }
    swept = {field: [_tuples(value)] for field, value in config["settings"][setting].items()}
    return grid(configs, swept)[0].configs


def _dataclass(cls: type, values: Mapping[str, Any]) -> Any:
    return cls(**{field.name: _tuples(values[field.name]) for field in fields(cls) if field.name in values})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
