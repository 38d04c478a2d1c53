"""A run's environment: made from its name and `env_params`, or given by the caller."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from purepg import envs
from purepg.run.code import address_of, address_of_env
from purepg.run.config import RunConfig
from purepg.run.console import reason, say
from purepg.run.text.config import RowsRunConfig, TextRunConfig
from purepg.run.text.environment import text_env
from purepg.run.text.rows import rows_env
from purepg.types import Env, UsageError

EnvSource = str | Env | Callable[[], Env]  # a name, the caller's own environment, or a function that makes it
WORDS = {"true": True, "false": False, "none": None}


def named_env(name: str, env_params: Sequence[str] = ()) -> Env:
    """The environment of this name, with parameters such as `["gravity=9.0", "action_repeat=4"]`.

    Raises:
      UsageError: the name or a parameter is unknown, a value is of the wrong kind, a text is not KEY=VALUE, or a key
        is given twice.
    """
    if not env_params:
        return envs.make(name)
    params = parsed(env_params)
    try:
        return envs.make(name, params)
    except UsageError:
        raise
    except Exception as error:  # a suite's code may raise anything
        raise UsageError(f"{name} cannot be made with env_params {' '.join(env_params)}: {reason(error)}") from error


def parsed(env_params: Sequence[str]) -> dict[str, Any]:
    """Parses `["gravity=9.0", "action_repeat=4"]` into values by key. A value is a whole number, another number, true,
    false or none if it reads as one, and text otherwise.

    Raises:
      UsageError: a text is not KEY=VALUE or holds two, or a key is given twice.
    """
    params: dict[str, Any] = {}
    for text in env_params:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not key or not equals or not value:
            raise UsageError(f"env_params ({text!r}) must be KEY=VALUE, as in gravity=9.0")
        if re.search(r",\s*\w+=", value):
            entries = "separate entries by spaces, or by colons in a name of suite.py"
            raise UsageError(f"env_params ({text!r}) holds more than one KEY=VALUE: {entries}")
        if key in params:
            raise UsageError(f"env_params names {key} twice: keep one of {key}={params[key]} and {text}")
        params[key] = _value(value)
    return params


def _value(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def env_of_run(run: RunConfig, network: Any) -> Env:
    """The environment that a run's settings describe; `network` is the network's config."""
    if isinstance(run, TextRunConfig):
        return text_env(run, network)
    if isinstance(run, RowsRunConfig) and run.files:
        return rows_env(run, network)
    return named_env(run.env, run.env_params)


def find_environment(run: RunConfig, network: Any, env: Env | Callable[[], Env] | None) -> tuple[Env, str | None]:
    """The environment of a run, and the address from which it can be made again; None if its settings are enough. Warns
    if a saved run's environment cannot be made again.

    Args:
      network: the network's config.
      env: the caller's own, in place of the named one.
    Raises:
      UsageError: the name or a parameter is wrong, or the caller's own environment is given parameters.
    """
    if env is None:
        return env_of_run(run, network), None
    env_params = run.env_params
    if env_params:
        raise UsageError(
            f"env_params ({' '.join(env_params)}) are for an environment that is given by its name; set those of your "
            "own where you make it"
        )
    if not isinstance(env, Env):
        return env(), address_of(env)
    address = address_of_env(env)
    if address is None and run.out is not None:
        say(
            f"{env.name}: no variable at the top level of a module holds this Env object, so evaluate.py, render.py "
            "and load cannot make it again; keep it in one, or pass it, as in load(folder, env=env)"
        )
    return env, address or "unknown"
