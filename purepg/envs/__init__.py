"""Environments: one thin adapter per suite into `purepg.types.Env`, and our own, of which everything is known.

Imports `types` and `config` alone. To add an environment or a suite, write a function that returns an `Env` and give it
a name in `make`.
"""

from collections.abc import Mapping
from typing import Any

from purepg.envs import finite_mdp, lqr, tasks
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.gymnax import gymnax_env
from purepg.envs.lqr import lqr_env
from purepg.types import Env


def make(name: str, params: Mapping[str, Any] | None = None, **constructor_kwargs: Any) -> Env:
    """The environment of a name, as scripts take it from `--env NAME`: one of `finite_mdp.NAMED`, `lqr.NAMED` or
    `tasks.TASKS`, whose arguments are `constructor_kwargs`, or else a gymnax environment (`gymnax_env`)."""
    if name in finite_mdp.NAMED and params is None:
        return mdp_env(finite_mdp.NAMED[name](**constructor_kwargs))
    if name in lqr.NAMED and params is None:
        return lqr_env(lqr.NAMED[name](**constructor_kwargs))
    if name in tasks.TASKS and params is None:
        task = tasks.TASKS[name](**constructor_kwargs)
        return tasks.token_env(task)._replace(held_out=tasks.token_env(task, held_out=True))
    return gymnax_env(name, params, **constructor_kwargs)
