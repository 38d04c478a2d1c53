"""One file for each algorithm: its config, its loss and its update, next to the equations that they implement.

Algorithms do not import each other. What several share is in `configs`, `on_policy`, `off_policy`, `groups` and
`preferences`. To write an algorithm of your own, copy the nearest file.
"""

import importlib
import pkgutil


def names() -> tuple[str, ...]:
    """The names of the algorithms: the modules of this package that define a function of the same name."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), name))
