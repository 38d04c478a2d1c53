"""Reads the arguments of a run from a file: the config.json of a run, or one of the same form written by hand."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from purepg.config import ANNEAL_UPDATES, alternatives, check, hints
from purepg.run.code import at_address
from purepg.run.config import RunConfig
from purepg.run.console import reason, say
from purepg.run.description import versions
from purepg.run.folder.config import PROCESSES, changed_versions
from purepg.run.folder.files import BEST, CONFIG
from purepg.run.sweep import Configs
from purepg.run.values import parse_sweep, parse_value
from purepg.types import UsageError

Config = TypeVar("Config")
OWN = ("out", "overwrite", "resume", *PROCESSES)  # arguments that every run is given for itself
NULL = ("null", "~", "")  # in YAML


class Arguments(NamedTuple):
    configs: Configs
    run: RunConfig
    sweep: Sequence[str]  # as `parse_sweep` takes it


def arguments(path: Path | str) -> dict[str, Any]:
    """The arguments of a saved run, with which `train_population(**arguments("runs/x"))` repeats it exactly.

    Args:
      path: the run's folder, or its config.json.
    Raises:
      UsageError: the file is not that of a run, or the algorithm or the network no longer exists or has other fields.
    """
    path = _file(path)
    found = _read(path)
    code = found.get("code")
    if not isinstance(code, Mapping) or not isinstance(code.get("name"), str):
        raise UsageError(f"{path} does not name an algorithm: give the folder of a run")
    if code["env"] == "unknown":
        raise UsageError(f"{path} is of an Env object that cannot be made again: pass the arguments with your env")
    defaults = {code["name"]: at_address(code["config"])(), "network": at_address(code["network_config"])()}
    run_config = at_address(code["run"])() if "run" in code else RunConfig()
    configs, run, sweep = _arguments(path, found, defaults, run_config)
    return {
        "algorithm": at_address(code["algorithm"]),
        "config": configs[code["name"]],
        "network": at_address(code["network"]),
        "network_config": configs["network"],
        "run": run,
        "env": at_address(code["env"]) if code["env"] else None,
        "sweep": parse_sweep(configs, sweep),
    }


def read_arguments(path: Path | str, configs: Configs, run: RunConfig) -> Arguments:
    """The arguments in a file. Says which packages have other versions than those that the file names.

    A file holds the sections `run`, `network` and that of the algorithm's name, and the list `sweep`. A field that a
    run's file lacks is newer than the run, and gets its type's default; one that another file lacks gets the default
    of `configs` and `run`.

    Args:
      path: a file in JSON or YAML, or the folder of a run.
    Raises:
      UsageError: the file cannot be read, is of another algorithm, or has an unknown or wrong field.
    """
    path = _file(path)
    return _arguments(path, _read(path), configs, run)


def _arguments(path: Path, found: dict[str, Any], configs: Configs, run: RunConfig) -> Arguments:
    name = next(name for name in configs if name != "network")
    of_run = isinstance(found.get("code"), dict)
    if of_run:
        found = _of_run(path, found, name, configs)
    elif unknown := [key for key in found if key not in (*configs, "run", "sweep")]:
        sections = f"it may have run, {', '.join(configs)} and sweep"
        raise UsageError(f"{path} has the unknown section {unknown[0]}; {sections}")
    sweep = found.get("sweep", [])
    if not isinstance(sweep, list) or not all(isinstance(text, str) for text in sweep):
        raise UsageError(f"{path}: sweep must be a list of texts, as in learning_rate=3e-4,1e-3")
    configs = {key: _replaced(path, key, default, found.get(key, {}), of_run) for key, default in configs.items()}
    return Arguments(configs, _replaced(path, "run", run, found.get("run", {}), of_run), sweep)


def _of_run(path: Path, found: dict[str, Any], name: str, configs: Configs) -> dict[str, Any]:
    """The file of a run, without schedules that are as long as the run. Refuses what cannot repeat the run."""
    if found["code"].get("name") != name:
        raise UsageError(f"{path} is of {found['code'].get('name')}, not of {name}")
    for line in changed_versions({"versions": found.get("versions", {})}, {"versions": versions()}):
        say(f"{line}: the result may differ in its last bits from that of {path}")
    settings, schedules = found.get("settings") or [{}], found.get("schedules", [])
    if "sweep" not in found and settings[0]:
        raise UsageError(f"{path} is of a sweep, and of an older version, which did not store it: pass it by --sweep")
    if schedules == found.get("num_updates"):
        sections = {key: found.get(key, {}) for key in configs}
        return found | {key: x | {ANNEAL_UPDATES: None} for key, x in sections.items() if ANNEAL_UPDATES in x}
    if len(set(schedules)) > 1 and not any(ANNEAL_UPDATES in label for label in settings[0]):
        raise UsageError(f"{path} is of a run that was resumed with more steps, with schedules of several lengths")
    return found


def _file(path: Path | str) -> Path:
    return Path(path) / CONFIG if Path(path).is_dir() else Path(path)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text()
        # The values of YAML stay text, which is read like a flag's, since YAML takes 1e-4 for text and off for false.
        found = json.loads(text) if path.suffix == ".json" else _with_none(yaml.load(text, yaml.BaseLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        hint = "; a search writes it, and --fresh-seeds" if path.name == BEST and not path.exists() else ""
        raise UsageError(f"config ({path}) cannot be read: {reason(error)}{hint}") from error
    if not isinstance(found, dict):
        raise UsageError(f"config ({path}) must have sections, such as run and network")
    return found


def _with_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_none(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return list(map(_with_none, value))
    return None if value in NULL else value


def _replaced(path: Path, section: str, default: Config, values: Any, of_run: bool) -> Config:
    """A config with the values of a section of the file."""
    kinds = hints(type(default))
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {section} must be a section with fields, such as {', '.join(list(kinds)[:2])}")
    for name in values:
        if name not in kinds:
            near = difflib.get_close_matches(str(name), kinds, n=1)
            raise UsageError(
                f"{path}: {section} has no field {name}" + (f"; did you mean {near[0]}?" if near else "; remove it")
            )
    later = {field.name: field.default for field in fields(default) if of_run and field.default is not MISSING}  # pyright: ignore[reportArgumentType]
    typed = {name: _typed(f"{path}: {section}.{name}", kinds[name], value) for name, value in values.items()}
    kept = {name: value for name, value in (later | typed).items() if section != "run" or name not in OWN}
    try:
        return check(replace(default, **kept))  # pyright: ignore[reportArgumentType]
    except UsageError as error:
        raise UsageError(f"{path}: {section}: {error}") from error


def _typed(name: str, hint: Any, value: Any) -> Any:
    """A value of JSON or YAML as one of a field's type."""
    kinds = dict(alternatives(hint))
    if isinstance(value, list):
        entry = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple), Any)
        return tuple(_typed(name, entry, x) for x in value)
    return parse_value(name, hint, value) if isinstance(value, str) and str not in kinds else value
