"""config.json and summary.json: read, and compared where a run is resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purepg.config import ANNEAL_UPDATES
from purepg.run.folder.files import CONFIG, SUMMARY, plain, read_json
from purepg.types import UsageError

# What may differ when a run is resumed: none of it changes what is computed, except that more steps add to it.
FREE = (
    *("total_steps", "log_every", "checkpoint_every", "keep", "compile_cache", "out", "overwrite", "resume"),
    *("wandb", "wandb_per", "wandb_project", "wandb_group"),
)

# What is read of a config.json, beside the comparison of all of it.
KNOWN = {"run": dict, "code": dict, "settings": list, "num_updates": list, "layout": list, "schedules": list}
KNOWN |= {"versions": dict}


def read_config(out: Path) -> dict[str, Any]:
    """The config.json of a run.

    Raises:
      UsageError: the folder holds none, or one that is not a run's.
    """
    config = read_json(out / CONFIG, "it is not the folder of a run")
    if not isinstance(config, dict) or not all(isinstance(config.get(name), kind) for name, kind in KNOWN.items()):
        raise UsageError(f"{out / CONFIG} is not that of a run of this version of purepg")
    return config


def read_summary(out: Path) -> dict[str, Any]:
    """The summary.json of a run.

    Raises:
      UsageError: the folder holds none, or one that is not a run's.
    """
    summary = read_json(out / SUMMARY, "its run has not finished")
    if not isinstance(summary, dict) or not {"settings", "interrupted"} <= summary.keys():
        raise UsageError(f"{out / SUMMARY} is not that of a run")
    return summary


def refuse_differences(out: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UsageError where a run cannot be resumed with this config; the message names every field that differs."""
    then, now = _comparable(stored), _comparable(plain(config))
    different = [
        f"{name} (was {then.get(name)}, is {now.get(name)})"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if different:
        raise UsageError(f"cannot resume {out} with another configuration: {', '.join(different)}")
    if config["run"]["total_steps"] < stored["run"]["total_steps"]:
        steps = stored["run"]["total_steps"]
        raise UsageError(f"total_steps ({config['run']['total_steps']}) must be at least {steps}, to resume {out}")


def changed_versions(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The packages whose versions changed; with another version, the last bits of a result may differ."""
    now = config["versions"]
    return [f"{name} {was} is {now.get(name)}" for name, was in stored["versions"].items() if now.get(name) != was]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that must be equal when a run is resumed, by name."""
    named = {
        f"{section}.{field}": value
        for section, fields in config.items()
        if isinstance(fields, Mapping) and section not in ("run", "versions", "platform", "code")
        for field, value in fields.items()
        if field != ANNEAL_UPDATES
    }
    named |= {name: value for name, value in config["run"].items() if name not in FREE}
    others = ("settings", "layout", "devices", "xla_flags", "start_digest", "spaces")
    named |= {name: config.get(name) for name in others}
    return named | {"backend": config.get("platform", {}).get("backend")}
