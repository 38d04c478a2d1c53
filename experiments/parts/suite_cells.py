"""The cells of experiments/suite.py: which algorithm is trained on which environment, and with which settings."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from purepg.config import check, hints
from purepg.envs.gymnax import library
from purepg.envs.suites import SUITES
from purepg.run.console import reason
from purepg.run.environment import named_env
from purepg.run.plan import RunConfig
from purepg.run.values import parse_value
from purepg.types import Discrete, UsageError

# Each algorithm's scripts, whose module-level EXPERIMENT holds its defaults on one environment; its own script first.
# One that ends in GENERAL has settings for any environment with discrete actions.
GENERAL = "_general"
SCRIPTS = {
    **{name: (name,) for name in ("reinforce", "q_actor_critic", "off_policy_pg", "npg")},
    "a2c": ("a2c", "a2c_general"),
    "trpo": ("trpo", "trpo_pendulum", "trpo_mountaincar"),
    "ppo": ("ppo", "ppo_general", "ppo_pendulum", "ppo_breakout"),
    "ppo_penalty": ("ppo_penalty",),
    "ddpg": ("ddpg", "ddpg_mountaincar"),
    **{name: (name,) for name in ("td3", "sac", "sac_discrete")},
}
CLASSIC = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "MountainCarContinuous-v0")
ENDINGS = {"minatar": "-MinAtar", "bsuite": "-bsuite"}  # of the names of gymnax's environments


class Cell(NamedTuple):
    """One algorithm on one environment."""

    algorithm: str  # as it was asked for, such as ppo or ppo:network.memory=gru
    env: str  # as it was asked for, such as Catch-bsuite or CartPole-v1:observed=0,2
    script: str  # whose defaults it takes
    experiment: tuple[Any, Any, Any, Any, RunConfig]  # algorithm, its config, network, its config, run

    @property
    def name(self) -> str:
        return f"{self.algorithm} on {self.env}"


class Missing(NamedTuple):
    """A cell that is not trained, and why, in one line."""

    algorithm: str
    env: str
    why: str
    failed: bool = False  # by an error, and not because it does not fit


def groups() -> dict[str, tuple[str, ...]]:
    """The groups of environments, by name: gymnax's, and those of every suite that lists its names."""
    of_gymnax = {
        group: tuple(name for name in library().registered_envs if name.endswith(ending))
        for group, ending in ENDINGS.items()
    }
    of_suites = {
        suite: tuple(f"{suite}/{name}" for name in entry.names) for suite, entry in SUITES.items() if entry.names
    }
    return {"classic": CLASSIC} | of_gymnax | of_suites


def named(text: str) -> tuple[str, tuple[str, ...]]:
    """`name:KEY=VALUE:KEY=VALUE` as (the name, its settings). A name may hold a colon too: gym/my_module:MyEnv-v0."""
    name, *settings = re.split(r":(?=[\w.-]+=)", text)
    return name, tuple(settings)


def environments(names: Sequence[str]) -> tuple[dict[str, bool], list[tuple[str, str]]]:
    """Whether the actions of each environment are discrete, and which environments of a group cannot be made, and why.

    Args:
      names: groups and environments, perhaps with parameters. One that is named twice, or is in two groups, counts
        once.
    Raises:
      UsageError: an environment that was named itself cannot be made.
    """
    known, discrete, missing = groups(), {}, []
    for name in names:
        for env in known.get(name, (name,)):
            try:
                discrete[env] = isinstance(named_env(*named(env)).action_space, Discrete)
            except Exception as error:  # a suite's own too, as where its package does not fit another's version
                if name in known:
                    missing.append((env, why(error)))
                elif isinstance(error, UsageError) and not named(name)[1]:  # with parameters it is no group
                    raise UsageError(f"{error}; the groups are {', '.join(known)}") from None
                else:
                    raise
    return discrete, missing


def overrides(texts: Sequence[str], algorithms: Sequence[str]) -> dict[str, dict[str, str]]:
    """Parses `["ppo.learning_rate=1e-3", "network.hidden=128x128"]` into texts by config and field.

    Args:
      algorithms: the names that a text may begin with, beside `network`.

    Raises:
      UsageError: a text is of another form, or names no algorithm of the table.
    """
    known = [*algorithms, *(["sac_discrete"] if "sac" in algorithms else []), "network"]
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        config, dot, field = name.strip().replace("-", "_").partition(".")
        if not (equals and dot and field and value.strip()):
            raise UsageError(f"set ({text!r}) must be ALGORITHM.FIELD=VALUE, as in ppo.learning_rate=1e-3")
        if config not in known:
            raise UsageError(f"set ({text!r}) must begin with one of {', '.join(dict.fromkeys(known))}")
        if field in found.setdefault(config, {}):
            raise UsageError(f"set names {config}.{field} twice: keep one")
        found[config][field] = value.strip()
    return found


def cell(
    label: str, env: str, discrete: bool, labels: Sequence[str], changes: Mapping[str, Mapping[str, str]]
) -> Cell | Missing:
    """A cell with the settings of its script: the one for this environment, else, on discrete actions, the general one,
    else one for an environment of its group, else the algorithm's own. On discrete actions, sac is `sac_discrete`.
    The settings of the algorithm's own label come last. Settings of sac are those of its sac_discrete too, where that
    has the same field and no setting of its own.

    Args:
      discrete: whether the environment's actions are.
      labels: all of the table.
      changes: what `overrides` returns.
    Raises:
      UsageError: a change does not fit the configs.
    """
    algorithm, own_settings = named(label)
    trained = "sac_discrete" if algorithm == "sac" and discrete else algorithm
    if trained != algorithm and ":".join([trained, *own_settings]) in labels:
        return Missing(label, env, "its actions are discrete, and sac_discrete is in the table itself")
    group_of = {env: group for group, names in groups().items() for env in names}

    def distance(script: str) -> int:
        own = import_module(script).EXPERIMENT[4].env
        if own == named(env)[0]:
            return 0
        if script.endswith(GENERAL):
            return 1
        return 2 if own in group_of and group_of.get(named(env)[0]) == group_of[own] else 3

    script = min((x for x in SCRIPTS[trained] if discrete or not x.endswith(GENERAL)), key=distance)
    make_algorithm, config, network, network_config, run = import_module(script).EXPERIMENT
    kinds, asked = hints(type(config)), hints(type(import_module(algorithm).EXPERIMENT[1]))
    foreign = {field for field in asked if kinds.get(field) != asked[field]}
    for each in (changes, overrides(own_settings, [algorithm])):
        shared = {field: text for field, text in each.get(algorithm, {}).items() if field not in foreign}
        config = _changed(trained, config, shared | dict(each.get(trained, {})))
        network_config = _changed("network", network_config, each.get("network", {}))
    return Cell(label, env, script, (make_algorithm, config, network, network_config, run))


def _changed(name: str, config: Any, texts: Mapping[str, str]) -> Any:
    if unknown := [field for field in texts if field not in vars(config)]:
        near = difflib.get_close_matches(unknown[0], vars(config), n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(vars(config))}"
        raise UsageError(f"set: {name} has no field {', '.join(unknown)}; {hint}")
    kinds = hints(type(config))
    return check(replace(config, **{x: parse_value(f"set {name}.{x}", kinds[x], text) for x, text in texts.items()}))


def folder_of(out: Path, algorithm: str, env: str) -> Path:
    """The folder of a cell's run."""
    return out / re.sub(r"[^\w.=,-]", "-", f"{algorithm}-{env}")


def why(error: BaseException) -> str:
    """The reason why a cell is missing, in one line."""
    return " ".join(str(error).split()) if isinstance(error, UsageError) else reason(error)
