"""To go on with a run: what its folder holds, and whether it is the run that was asked for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from purepg.config import ANNEAL_UPDATES
from purepg.run.loop import HostMetrics
from purepg.run.population import Chunk, Group, Setting
from purepg.run.record import CONFIG, LOG, plain, reason
from purepg.types import UsageError

# What a run may be resumed with otherwise: none of it changes what is computed, but more steps add to it.
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
    path = out / CONFIG
    config, known = {}, False
    try:
        config = json.loads(path.read_text())
        known = all(isinstance(config[name], kind) for name, kind in KNOWN.items())
    except FileNotFoundError:
        raise UsageError(f"{out} holds no run: it has no {CONFIG}") from None
    except (KeyError, TypeError):
        pass
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot go on from {out}: {path} cannot be read ({reason(error)})") from error
    if not known:
        raise UsageError(f"cannot go on from {out}: {path} is not that of a run")
    return config


def keep_schedules(settings: Sequence[Setting], stored: Mapping[str, Any]) -> list[Setting]:
    """The settings, with schedules as long as they first were where no other length is asked for."""
    if len(stored["schedules"]) != len(settings):
        return list(settings)  # `refuse_differences` will say what differs

    def kept(config: Any, length: int) -> Any:
        return replace(config, anneal_updates=length) if getattr(config, ANNEAL_UPDATES, 0) is None else config

    return [
        setting._replace(configs={name: kept(config, length) for name, config in setting.configs.items()})
        for setting, length in zip(settings, stored["schedules"], strict=True)
    ]


def refuse_differences(out: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises UsageError where a run would not go on as what it was: names every field that differs."""
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
    """The packages that are not what they were, with which a result may differ in its last bits."""
    now = config["versions"]
    return [f"{name} {was} is {now.get(name)}" for name, was in stored["versions"].items() if now.get(name) != was]


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name to value of all that must not differ."""
    named = {
        f"{section}.{field}": value
        for section, fields in config.items()
        if isinstance(fields, Mapping) and section not in ("run", "versions", "platform", "code")
        for field, value in fields.items()
        if field != ANNEAL_UPDATES
    }
    named |= {name: value for name, value in config["run"].items() if name not in FREE}
    others = ("settings", "layout", "devices", "xla_flags", "script", "start_digest")
    named |= {name: config.get(name) for name in others}
    return named | {"backend": config.get("platform", {}).get("backend")}


class Block(NamedTuple):
    """A line of log.jsonl."""

    chunk: int  # its place in the run's order
    start: int
    end: int
    metrics: dict[str, list]  # each [H', S', U'], as JSON holds it


class Logged(NamedTuple):
    """What of a log its checkpoints cover."""

    num_bytes: int
    blocks: list[Block]


def covered(out: Path, order: Sequence[tuple[Group, Chunk]], updates: Sequence[int]) -> Logged:
    """The part of log.jsonl up to the first line that no checkpoint covers: what came after it is computed again.

    Args:
      order: the run's chunks. updates: how many updates of each the latest checkpoint has.
    Raises:
      UsageError: the log cannot be read.
    """
    place = {str(chunk.members(group)): i for i, (group, chunk) in enumerate(order)}
    num_bytes, blocks = 0, []
    try:
        with (out / LOG).open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                chunk = place[str((found["settings"], found["seeds"]))]
                start, metrics = found["start"], found["metrics"]
                end = start + len(metrics[min(metrics)][0][0])
                if end > updates[chunk]:
                    break
                num_bytes += len(line)
                blocks.append(Block(chunk, start, end, metrics))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _unreadable(out, error) from error
    return Logged(num_bytes, blocks)


def chunk_metrics(
    out: Path, logged: Logged, chunk: int, shape: tuple[int, int], update: int, dtypes: Mapping[str, str]
) -> HostMetrics:
    """A chunk's metrics up to `update`, each `[H, S, update]`, to the bit what they were before they were written.

    Updates that the log lacks (a disk was full) are NaN, or 0 where a metric counts.

    Raises:
      UsageError: the log holds something else.
    """
    metrics = {
        name: np.full((*shape, update), np.nan if np.dtype(dtype).kind == "f" else 0, dtype)
        for name, dtype in dtypes.items()
    }
    try:
        for block in logged.blocks:
            if block.chunk == chunk:
                for name in metrics.keys() | block.metrics.keys():
                    metrics[name][..., block.start : block.end] = np.array(block.metrics[name], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(out, error) from error
    return metrics


def _unreadable(out: Path, error: Exception) -> UsageError:
    return UsageError(f"cannot resume {out}: its {LOG} cannot be read ({reason(error)})")
