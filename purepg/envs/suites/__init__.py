"""Adapters of other suites, one file each, which import their suite inside functions. Each suite is an extra:
`pip install -e ".[craftax]"`; `[suites]` installs all.

To add a suite, write a file with `NAMES` and a function from a name and parameters to an `Env`, with the help of
`adapter.suite_env`, and list it in `SUITES`.
"""

from typing import NamedTuple

from purepg.envs.suites import craftax, gymnasium


class Suite(NamedTuple):
    """Where a suite's adapter is, and the names that it knows."""

    address: tuple[str, str]  # module and function
    names: tuple[str, ...]
    outside: bool = False  # it is not JAX; its function itself refuses names that it does not know

    def knows(self, name: str) -> bool:
        return self.outside or name in self.names


SUITES = {
    "craftax": Suite((craftax.__name__, "craftax_env"), craftax.NAMES),
    "gym": Suite((gymnasium.__name__, "gym_named"), (), outside=True),
}


def is_outside(name: str) -> bool:
    """Whether the environment of this name is not JAX. Nothing is imported to say so."""
    suite, slash, _ = name.partition("/")
    return bool(slash) and suite in SUITES and SUITES[suite].outside
