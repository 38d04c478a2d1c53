"""One file per algorithm: its hyperparameters, its loss and its update, to be read like its equation."""

import importlib
import pkgutil


def names() -> tuple[str, ...]:
    """The algorithms' names: those modules here that have a function of their own name."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return tuple(name for name in modules if hasattr(importlib.import_module(f"{__name__}.{name}"), name))
