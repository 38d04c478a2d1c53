"""log.jsonl: one line per block of updates, written when the block ends and read back when the run is resumed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from purepg.run.console import reason
from purepg.run.folder.files import LOG, nested_lists
from purepg.run.sweep import Chunk
from purepg.types import UsageError


def line_of(settings: Sequence[int], seeds: Sequence[int], start: int, metrics: Mapping[str, np.ndarray]) -> bytes:
    """Encodes a block as a line of the log."""
    line = {
        "settings": [int(h) for h in settings],
        "seeds": [int(s) for s in seeds],
        "start": int(start),
        "metrics": {name: nested_lists(value, infinities=True) for name, value in metrics.items()},
    }
    return json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"


class LoggedBlock(NamedTuple):
    """A decoded line of the log."""

    chunk: int  # the chunk's position in the run's order
    start: int
    end: int
    metrics: dict[str, list]  # each [H', S', U'], as JSON holds it


class Logged(NamedTuple):
    """The part of a log that the checkpoints cover."""

    num_bytes: int = 0
    blocks: Sequence[LoggedBlock] = ()


def covered(out: Path, order: Sequence[Chunk], updates: Sequence[int]) -> Logged:
    """Reads log.jsonl up to the first line that no checkpoint covers; updates from there on will be computed again.

    Args:
      order: the run's chunks.
      updates: for each chunk, the number of updates in its latest checkpoint.
    Raises:
      UsageError: the log cannot be read.
    """
    place = {str((chunk.settings, chunk.seeds)): i for i, chunk in enumerate(order)}
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
                blocks.append(LoggedBlock(chunk, start, end, metrics))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _unreadable(out, error) from error
    return Logged(num_bytes, blocks)


def chunk_metrics(
    out: Path, logged: Logged, chunk: int, shape: tuple[int, int], update: int, dtypes: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """A chunk's metrics of the first `update` updates, each `[H, S, update]`, bit for bit as they were logged.

    Updates missing from the log, because the disk was full, are NaN, or 0 in integer metrics.

    Raises:
      UsageError: the log's metrics have other names or shapes.
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
