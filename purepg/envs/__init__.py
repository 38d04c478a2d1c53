"""Environments: one thin adapter per suite into `purepg.types.Env`."""

from collections.abc import Mapping
from typing import Any

from purepg.envs.finite_mdp import NAMED, mdp_env
from purepg.envs.gymnax import gymnax_env
from purepg.types import Env


def make(name: str, params: Mapping[str, Any] | None = None, **constructor_kwargs: Any) -> Env:
    """The environment of a name, as scripts take it from `--env NAME`: one of `finite_mdp.NAMED`, whose arguments are
    `constructor_kwargs`, or else a gymnax environment (`gymnax_env`)."""
    if name in NAMED and params is None:
        return mdp_env(NAMED[name](**constructor_kwargs))
    return gymnax_env(name, params, **constructor_kwargs)
