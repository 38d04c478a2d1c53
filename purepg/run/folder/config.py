"""Reads config.json and summary.json, and compares configurations when a run is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purepg.config import ANNEAL_UPDATES
from purepg.run.folder.files import CONFIG, SUMMARY, plain, read_json
from purepg.types import UsageError

# Fields of the processes of a run.
PROCESSES = ("distributed", "coordinator", "num_processes", "process_id", "connect_timeout")
# Fields that may differ when a run is resumed. None of them changes the results, except that total_steps
# and epochs extend them.
FREE = (
    *("total_steps", "epochs", "log_every", "checkpoint_every", "keep", "compile_cache", "out", "overwrite", "resume"),
    *("wandb", "wandb_per", "wandb_project", "wandb_group", *PROCESSES),
)

# Entries of config.json that must be equal when a run is resumed.
FILES = tuple(f"{held_out}{rows}_digest" for rows in ("prompts", "data", "pairs") for held_out in ("", "eval_"))
IDENTITY = ("devices", "xla_flags", "start_digest", *FILES, "spaces")

# Entries of config.json that follow from others, and are named only where no other differs.
FOLLOWS = ("layout", "num_updates", "schedules", "spaces")

# Entries of config.json that depend on the machine.
MACHINE = ("devices", "xla_flags")

# The entries of config.json that other modules read, with their types.
KNOWN = {"run": dict, "code": dict, "settings": list, "num_updates": list, "layout": list, "schedules": list}
KNOWN |= {"versions": dict}


def read_config(out: Path) -> dict[str, Any]:
    """Reads a run's config.json.

    Raises:
      UsageError: the folder has no such file, or the file is not from a run of this version.
    """
    config = read_json(out / CONFIG, "it is not the folder of a run")
    if not isinstance(config, dict) or not all(isinstance(config.get(name), kind) for name, kind in KNOWN.items()):
        raise UsageError(f"{out / CONFIG} is not that of a run of this version of purepg")
    return config


def read_summary(out: Path) -> dict[str, Any]:
    """Reads a run's summary.json.

    Raises:
      UsageError: the folder has no such file, or the file is not from a run.
    """
    summary = read_json(out / SUMMARY, "its run has not finished")
    if not isinstance(summary, dict) or not {"settings", "interrupted"} <= summary.keys():
        raise UsageError(f"{out / SUMMARY} is not that of a run")
    return summary


def refuse_differences(out: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UsageError if a run cannot be resumed with this config; the message names every field that differs."""
    then, now = _comparable(stored), _comparable(plain(config))
    if stored["run"].get("distributed") or config["run"].get("distributed"):  # other hosts are said, not refused
        then, now = (named | dict.fromkeys(MACHINE) for named in (then, now))
    different = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    if different:
        chosen = [name for name in different if name not in FOLLOWS] or different
        told = ", ".join(f"{name} (was {then.get(name)}, is {now.get(name)})" for name in chosen)
        raise UsageError(
            f"cannot resume {out} with another configuration: {told}; use the same flags, or another --out"
        )
    steps, was = config["run"]["total_steps"], stored["run"]["total_steps"]
    if steps < was:
        raise UsageError(f"total_steps ({steps}) must be at least {was}, to resume {out}")
    if steps > was and (config["run"]["halve"] or config["run"]["tpe"]):
        raise UsageError(f"total_steps ({steps}) must be {was}, to resume {out}, as its rounds depend on it")


def changed_versions(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describes each package whose version has changed; results may then differ in their last bits."""
    now = config["versions"]
    return [f"{name} {was} is {now.get(name)}" for name, was in stored["versions"].items() if now.get(name) != was]


def changed_devices(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Describes a run's other devices, on which its last bits depend."""
    then, now = _comparable(stored), _comparable(plain(config))
    return [f"{name} {then[name]} is {now[name]}" for name in MACHINE if then[name] != now[name]]


def shared(config: Mapping[str, Any]) -> dict[str, Any]:
    """What all processes of a run must have in common, by name."""
    own = {name: value for name, value in config["run"].items() if name not in PROCESSES}
    return _comparable(plain(config)) | plain(own) | config["versions"]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value that must be equal when a run is resumed, by name."""
    named = {
        f"{section}.{field}": value
        for section, fields in config.items()
        if isinstance(fields, Mapping) and section not in ("run", "versions", "platform", "code")
        for field, value in fields.items()
        if field != ANNEAL_UPDATES
    }
    named |= {name: value for name, value in config["run"].items() if name not in FREE}
    named |= {name: config.get(name) for name in IDENTITY}
    # Later rounds follow from the returns of the first.
    first = [entry for entry in config["layout"] if entry.get("round", 0) == 0]
    named["layout"] = [(entry["settings"], entry["seeds"]) for entry in first]
    named["settings"] = config["settings"][: 1 + max(max(entry["settings"]) for entry in first)]
    return named | {"backend": config.get("platform", {}).get("backend")}
