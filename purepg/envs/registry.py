"""`make`: every environment by its name."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from purepg.envs.finite_mdp import mdp_env
from purepg.envs.gymnax import gymnax_env, library
from purepg.envs.lqr import LQRS, lqr_env
from purepg.envs.named_mdps import MDPS
from purepg.envs.named_pomdps import POMDPS
from purepg.envs.named_tasks import TASKS
from purepg.envs.suites import SUITES
from purepg.envs.suites.adapter import CLOCK
from purepg.envs.tasks import token_env
from purepg.envs.wrappers import (
    UnknownParameterError,
    average_pooled,
    partially_observed,
    repeated,
    time_limited,
    with_previous,
)
from purepg.types import Env, UsageError

# In this order, so that a time limit counts the environment's own steps, as the limits of suites do, and the previous
# reward is that of the policy's step.
WRAPPERS: dict[str, Callable[[Env, Any], Env]] = {
    CLOCK: time_limited,
    "action_repeat": repeated,
    "observed": partially_observed,
    "average_pool": average_pooled,
    "previous": with_previous,
}


def make(name: str, params: Mapping[str, Any] | None = None, **more: Any) -> Env:
    """Returns the environment that scripts call `--env NAME --env-params KEY=VALUE ...`.

    Args:
      name: `suite/Name`, such as `craftax/Craftax-Symbolic`; or a bare name, which is looked up among `MDPS`, `POMDPS`,
        `LQRS`, `TASKS`, gymnax's environments and then all of `SUITES`.
      params: arguments of the environment's function, fields of the suite's own parameters; and, of any environment,
        `max_episode_steps` (truncate episodes after so many of the environment's own steps, whatever `action_repeat`
        is; the limit of a suite other than popgym is replaced, any other is kept if it comes first); and, of any in JAX
        but token tasks, `action_repeat` (take each action so many times, and add the rewards), `observed` (hide all but
        these entries of a Box observation: `(0, 2)`, or text such as `0-4,45-49`), `average_pool` (reduce an image by
        this whole factor) and `previous` (True: observe the previous action and reward too).
      more: the same as `params`, as arguments: `make("lqr", spring=2.0)`.
    Raises:
      UsageError: the name or a parameter is unknown, or the suite's packages are not installed.
    """
    suite, own_name = _find(name)
    given = {**(params or {}), **more}
    wrapped = {key: given.pop(key) for key in WRAPPERS if key in given and (suite is None or key != CLOCK)}
    try:
        env = _made(suite, own_name, given)
    except UnknownParameterError as error:
        raise UnknownParameterError(error.name, error.unknown, (*error.known, *WRAPPERS)) from None
    for key, value in wrapped.items():
        env = WRAPPERS[key](env, value)
    return env


def _made(suite: str | None, name: str, params: Mapping[str, Any]) -> Env:
    if suite is not None:
        return SUITES[suite].make(name, params)
    constructors: dict[str, Callable[..., Any]] = {**MDPS, **POMDPS, **LQRS, **TASKS}
    if name not in constructors:
        return _gymnax(name, params)
    try:
        made = constructors[name](**params)
    except TypeError as error:
        raise UsageError(f"{name} does not take these parameters: {error}") from None
    if name in TASKS:
        return token_env(made)._replace(held_out=token_env(made, held_out=True))
    return lqr_env(made) if name in LQRS else mdp_env(made, observe_alias=name in POMDPS)


def _gymnax(name: str, params: Mapping[str, Any]) -> Env:
    """A gymnax environment; parameters that are no fields of its `EnvParams` are its constructor's arguments."""
    gymnax = library()
    if name == "MNISTBandit-bsuite":
        return gymnax_env(name, params)  # constructing it would download its data, which `gymnax_env` refuses
    env, defaults = gymnax.make(name)
    known = [field.name for field in fields(defaults)]
    constructor = {key: value for key, value in params.items() if key not in known}
    try:
        gymnax.make(name, **constructor)
    except TypeError as error:
        arguments = inspect.signature(type(env)).parameters
        if unknown := [key for key in constructor if key not in arguments]:
            raise UnknownParameterError(name, unknown, (*known, *arguments)) from None
        raise UsageError(f"{name} does not take these parameters: {error}") from None
    return gymnax_env(name, {key: value for key, value in params.items() if key in known}, **constructor)


def _find(name: str) -> tuple[str | None, str]:
    """(suite, name in it); suite None: gymnax or our own."""
    prefix, slash, rest = name.partition("/")
    ours = (*MDPS, *POMDPS, *LQRS, *TASKS)
    if name in ours:
        return None, name
    if slash and prefix in SUITES and SUITES[prefix].knows(rest):
        return prefix, rest
    gymnax = library()
    if name.removeprefix("gymnax/") in gymnax.registered_envs:
        return None, name.removeprefix("gymnax/")
    found = [suite for suite, entry in SUITES.items() if name in entry.names]
    if len(found) > 1:
        raise UsageError(f"{name} is in several suites: choose {' or '.join(f'{suite}/{name}' for suite in found)}")
    if found:
        return found[0], name
    in_suites = [f"{suite}/{known}" for suite, entry in SUITES.items() for known in entry.names]
    if slash and prefix in SUITES:
        raise UsageError(unknown_name(name, [known for known in in_suites if known.startswith(f"{prefix}/")]))
    if name in SUITES:
        one = next(iter(SUITES[name].names), "CartPole-v1")
        raise UsageError(f"{name} is a suite: name one of its environments, as in {name}/{one}")
    known = f"{', '.join((*gymnax.registered_envs, *ours))}, and those of {', '.join(f'{suite}/' for suite in SUITES)}"
    message = unknown_name(name, [*gymnax.registered_envs, *ours, *in_suites], known)
    raise UsageError(f"{message} (Gymnasium's is gym/{name})" if re.search(r"-v\d+$", name) else message)


def unknown_name(name: str, known: Sequence[str], listed: str | None = None) -> str:
    """An error message that names the environments whose names are closest, or else all, as `listed`."""
    spellings = {}  # both "catch-bsuite" and "catch" mean Catch-bsuite; "snake" means jumanji/Snake
    for full in known:
        spellings[full.lower()] = full
        bare = full.rpartition("/")[2]
        for short in (bare, bare.rsplit("-", 1)[0]):
            spellings.setdefault(short.lower(), full)
    given = name.lower()
    close = difflib.get_close_matches(given, spellings, cutoff=0.7)
    within = [spelling for spelling in spellings if spelling in given or (len(given) > 3 and given in spelling)]
    near = list(dict.fromkeys(spellings[spelling] for spelling in (*close, *within)))[:6]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the known ones are {listed or ', '.join(known)}"
    return f"unknown environment {name!r}; {hint}"
