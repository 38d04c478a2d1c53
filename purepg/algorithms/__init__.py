"""One file per algorithm: its config, its loss and its update, to be read like its equation.

Imports `equations`, `networks`, `experience` and `language`, and never another algorithm. What several algorithms share
is in `configs`, `on_policy`, `off_policy`, `groups` and `preferences`. Copy a file to start an algorithm of your own.
"""

import importlib
import pkgutil


def names() -> tuple[str, ...]:
    """The algorithms' names: those modules here that have a function of their own name."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), name))
