"""Adapters of other suites, one file each, which import their suite inside functions. Each suite is an extra:
`pip install -e ".[craftax]"`; `[suites]` installs all that install together. Only `popgym` is our own code, and needs
none.

To add a suite, write a file with `NAMES` and a function from a name and parameters to an `Env`, with the help of
`adapter.suite_env`, and list it in `SUITES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from purepg.envs.suites import craftax, gymnasium, jumanji, octax, pgx, physics, popgym, popgym_arcade, xminigrid
from purepg.types import Env


class Suite(NamedTuple):
    """A suite's adapter, and the names that it knows."""

    make: Callable[[str, Mapping[str, Any]], Env]
    names: tuple[str, ...]
    any_name: bool = False  # whether the suite may have registered more names, which its adapter checks
    outside: bool = False  # its environments are not JAX

    def knows(self, name: str) -> bool:
        return self.any_name or name in self.names


SUITES = {
    "craftax": Suite(craftax.craftax_env, craftax.NAMES),
    "playground": Suite(physics.playground_env, physics.PLAYGROUND, any_name=True),
    "brax": Suite(physics.brax_env, physics.BRAX),
    "xminigrid": Suite(xminigrid.xminigrid_env, xminigrid.NAMES),
    "octax": Suite(octax.octax_env, octax.NAMES),
    "popgym": Suite(popgym.popgym_env, popgym.NAMES),
    "popgym_arcade": Suite(popgym_arcade.popgym_arcade_env, popgym_arcade.NAMES),
    "pgx": Suite(pgx.pgx_env, pgx.NAMES),
    "jumanji": Suite(jumanji.jumanji_env, jumanji.NAMES),
    "gym": Suite(gymnasium.gym_named, (), any_name=True, outside=True),
}


def suite_of(name: str) -> Suite | None:
    """The suite of an environment, by `suite/Name` or by a bare name. Nothing is imported to say so."""
    prefix, slash, _ = name.partition("/")
    if slash:
        return SUITES.get(prefix)
    return next((suite for suite in SUITES.values() if name in suite.names), None)
