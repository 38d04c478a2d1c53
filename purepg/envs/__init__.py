"""Environments: one thin adapter per suite into `purepg.types.Env`."""

from collections.abc import Mapping
from typing import Any

from purepg.envs.gymnax import gymnax_env
from purepg.types import Env


def make(name: str, params: Mapping[str, Any] | None = None, **constructor_kwargs: Any) -> Env:
    """The environment of a name, as scripts take it from `--env NAME`; see `gymnax_env`."""
    return gymnax_env(name, params, **constructor_kwargs)
