"""Addresses of functions, classes and environments. config.json stores them, so that a saved run can be rebuilt."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from purepg.run.console import reason
from purepg.types import Env, UsageError


def address_of(value: Any) -> str:
    """The address of a function or a class: `module:name`, or `file.py:name` where a script defines it."""
    if not hasattr(value, "__qualname__"):  # a partial function, say
        return repr(value)
    return f"{_address_of_module(value.__module__)}:{value.__qualname__}"


def address_of_env(env: Env) -> str | None:
    """The address of the module-level variable that holds this environment; None if there is none."""
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is env:
                return f"{_address_of_module(module_name)}:{name}"
    return None


def at_address(address: str) -> Any:
    """Imports the function, class or environment at an address. Raises UsageError if it no longer exists."""
    module, _, name = address.rpartition(":")
    try:
        if not module.endswith(".py"):
            return getattr(importlib.import_module(module), name)
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        assert spec and spec.loader
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return getattr(found, name)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise UsageError(f"cannot find {address}, which the run was made with: {reason(error)}") from error


def _address_of_module(name: str) -> str:
    file = getattr(sys.modules[name], "__file__", None)
    return str(Path(file).absolute()) if name == "__main__" and file else name
