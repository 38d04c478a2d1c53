"""Environments: one thin adapter per suite into `purepg.types.Env`, and our own, whose solutions are known.

Imports only `types` and `config`. To add an environment, return an `Env` from a function and name it in `make`.
"""

from collections.abc import Mapping
from typing import Any

from purepg.envs.finite_mdp import mdp_env
from purepg.envs.gymnax import gymnax_env
from purepg.envs.lqr import LQRS, lqr_env
from purepg.envs.named_mdps import MDPS
from purepg.envs.named_tasks import TASKS
from purepg.envs.tasks import token_env
from purepg.types import Env


def make(name: str, params: Mapping[str, Any] | None = None, **constructor_kwargs: Any) -> Env:
    """Returns the environment that scripts call `--env NAME`: a key of `MDPS`, `LQRS` or `TASKS`, whose functions take
    `constructor_kwargs`, or else the name of a gymnax environment."""
    if name in MDPS and params is None:
        return mdp_env(MDPS[name](**constructor_kwargs))
    if name in LQRS and params is None:
        return lqr_env(LQRS[name](**constructor_kwargs))
    if name in TASKS and params is None:
        task = TASKS[name](**constructor_kwargs)
        return token_env(task)._replace(held_out=token_env(task, held_out=True))
    return gymnax_env(name, params, **constructor_kwargs)
