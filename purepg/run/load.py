"""Loads one agent of a saved population: its environment, algorithm and state, from which its policy follows.

agent = load("runs/x", best=True)
actor = agent.algorithm.policy(agent.state, True)
memory, action, _ = actor(key, actor.memory(N), obs)      # obs [N, ...] to actions [N, ...]; then with this memory
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax

from purepg.pbt import with_hyper
from purepg.run.code import at_address
from purepg.run.config import RunConfig
from purepg.run.environment import env_of_run
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.config import read_config, read_summary
from purepg.run.sweep import Setting, grid
from purepg.run.tuning import settled
from purepg.train import guard
from purepg.types import Actor, Algorithm, Env, Params, State, UsageError


class Agent(NamedTuple):
    """One agent of a run."""

    env: Env
    algorithm: Algorithm
    state: State
    setting: int  # its place in the sweep
    seed: int
    label: str  # its setting's name; empty where nothing was swept
    update: int  # updates it has had
    frozen: Params | None = None  # what a language model's adapters adapt
    with_frozen: Callable[[Params], Algorithm] | None = None  # the algorithm with `frozen` as a program's argument

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}" if self.label else f"seed {self.seed}"

    def policy(self, frozen: Params | None, state: State, deterministic: bool) -> Actor:
        """The policy within a program that has `frozen` and a state as arguments, not as constants."""
        algorithm = self.algorithm if frozen is None or self.with_frozen is None else self.with_frozen(frozen)
        return algorithm.policy(state, deterministic)

    def max_steps(self, asked: int | None) -> int:
        """The given limit on an episode's steps, or else the environment's. Raises UsageError if there is neither."""
        limit = asked or self.env.max_episode_steps
        if limit is None:
            raise UsageError(f"{self.env.name} has no time limit: set --max-steps")
        return limit


def load(
    out: Path | str, setting: int | None = None, seed: int | None = None, best: bool = False, env: Env | None = None
) -> Agent:
    """Loads an agent from the latest checkpoint of its run.

    Args:
      out: the run's folder.
      setting: position of the agent's setting in the sweep. None: the only one.
      seed: the agent's seed. None: the only one.
      best: choose the agent with the highest final evaluation, among those that match `setting` and `seed`.
      env: the environment; needed if the run was given an Env object that cannot be made again.
    Raises:
      UsageError: the folder holds no run, the run has no such agent, or several agents match.
    """
    out = Path(out)
    config = read_config(out)
    finals = [entry["finals"] for entry in read_summary(out)["settings"]] if best else None
    num_settings, num_seeds = len(config["settings"]), config["run"]["num_seeds"]
    setting, seed = choose(str(out), num_settings, num_seeds, setting, seed, finals)

    env, network_of, of_setting = _rebuild(config, env)
    stored, pbt = _setting(config, setting), config["run"].get("pbt")
    layout = list(enumerate(config["layout"]))  # an agent's last chunk is that of its last round
    chunk = next(i for i, part in reversed(layout) if setting in part["settings"] and seed in part["seeds"])
    checkpoints = Checkpoints(out, chunk)
    update = checkpoints.latest()
    if update is None:
        raise UsageError(f"{out} holds no checkpoint of setting {setting}, seed {seed}")
    layout = config["layout"][chunk]
    shape = len(layout["settings"]), len(layout["seeds"])
    init = of_setting(stored, network_of(stored)).init
    member = jax.eval_shape(
        lambda key: with_hyper(init(key), stored.hyperparameters) if pbt else init(key),
        jax.eval_shape(jax.random.key, 0),
    )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype), member)
    place = layout["settings"].index(setting), layout["seeds"].index(seed)
    state = jax.tree.map(lambda x: x[place], checkpoints.restore(update, abstract))
    state, now = settled(state, stored)
    network = network_of(now)
    agent = Agent(env, of_setting(now, network), state, setting, seed, now.label, update)
    if (frozen := getattr(network, "frozen", None)) is None:
        return agent
    return agent._replace(frozen=frozen, with_frozen=lambda x: of_setting(now, network._replace(start=x)))


def choose(
    where: str,
    num_settings: int,
    num_seeds: int,
    setting: int | None,
    seed: int | None,
    finals: Sequence[Sequence[float | None]] | None,
) -> tuple[int, int]:
    """Resolves which agent is meant, as (setting, seed).

    Args:
      where: the run's name in error messages.
      setting, seed: as the caller gave them. None: not given.
      finals: `[H][S]` final evaluations if the best agent is wanted, else None.
    Raises:
      UsageError: no agent matches, or several do.
    """
    for name, value, number in (("setting", setting, num_settings), ("seed", seed, num_seeds)):
        if value is not None and not 0 <= value < number:
            raise UsageError(f"{name} ({value}) must be from 0 to {number - 1}, to be one of {where}")
    if finals is not None:
        found = {
            (h, s): value
            for h, of_setting in enumerate(finals)
            for s, value in enumerate(of_setting)
            if value is not None and math.isfinite(value) and setting in (None, h) and seed in (None, s)
        }
        if not found:
            raise UsageError(f"{where} has evaluated no such agent")
        return max(found, key=lambda member: found[member])
    setting = 0 if setting is None and num_settings == 1 else setting
    seed = 0 if seed is None and num_seeds == 1 else seed
    if setting is None or seed is None:
        raise UsageError(f"{where} holds {num_settings} settings of {num_seeds} seeds: name one, or ask for the best")
    return setting, seed


def stored_network(out: Path | str, setting: int = 0) -> Any:
    """The network's config in one setting of a saved run."""
    return _setting(read_config(Path(out)), setting).configs["network"]


def _rebuild(
    config: Mapping[str, Any], env: Env | None
) -> tuple[Env, Callable[[Setting], Any], Callable[[Setting, Any], Algorithm]]:
    """Rebuilds the environment from a run's config.json, and what makes the network of a setting and its algorithm."""
    code, address = config["code"], config["code"].get("env")
    if env is None and address == "unknown":
        name = config["run"]["env"]
        raise UsageError(f"{name} was an Env object that cannot be made again: pass it, as in load(folder, env=env)")
    found = env or (at_address(address) if address else None)
    network = _setting(config, 0).configs["network"]
    made = found if isinstance(found, Env) else found() if found else env_of_run(_run(config), network)

    def network_of(setting: Setting) -> Any:
        return at_address(code["network"])(made, setting.configs["network"])

    def of_setting(setting: Setting, network: Any) -> Algorithm:
        algorithm = at_address(code["algorithm"])(made, network, setting.configs[code["name"]])
        return guard(algorithm, config["run"]["total_steps"])

    return made, network_of, of_setting


def _run(config: Mapping[str, Any]) -> RunConfig:
    """The settings of a run."""
    of_run = at_address(config["code"]["run"]) if "run" in config["code"] else RunConfig
    return _dataclass(of_run, config["run"])


def _setting(config: Mapping[str, Any], setting: int) -> Setting:
    """A setting of a run, with its configs of the algorithm and of the network."""
    code = config["code"]
    name = code["name"]
    configs = {
        name: _dataclass(at_address(code["config"]), config[name]),
        "network": _dataclass(at_address(code["network_config"]), config["network"]),
    }
    swept = {field: [_tuples(value)] for field, value in config["settings"][setting].items()}
    return grid(configs, swept)[0]


def _dataclass(cls: type, values: Mapping[str, Any]) -> Any:
    return cls(**{field.name: _tuples(values[field.name]) for field in fields(cls) if field.name in values})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
