"""The names of a run's files, atomic writes, and conversion to and from JSON."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from purepg.run.console import reason
from purepg.types import UsageError

CONFIG = "config.json"
LOG = "log.jsonl"
SAMPLES = "samples.jsonl"
METRICS = "metrics.npz"
SUMMARY = "summary.json"
CURVES = "curves.png"
HEATMAP = "heatmap.png"
SEARCH = "search.png"
PARALLEL = "parallel.png"
LINEAGE = "lineage.png"
BEST = "best.json"
WINNER = "winner"
WANDB = "wandb"
CHECKPOINTS = "checkpoints"
FILMS = "setting-*-seed-*.gif"


class RecordError(RuntimeError):
    """A result could not be written; the message names the file and the reason in one line."""


def write_whole(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file atomically: `save` fills a temporary file, which then replaces `path`.

    Raises:
      RecordError: it could not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            save(file)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RecordError(f"cannot write {path}: {reason(error)}") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically. Raises RecordError if it cannot be written."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path, missing: str) -> Any:
    """Reads a JSON file.

    Args:
      missing: the explanation that the error gives if the file does not exist.
    Raises:
      UsageError: the file does not exist or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UsageError(f"{path.parent} does not exist: name the folder of a run") from None
        raise UsageError(f"{path.parent} has no {path.name}: {missing}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def folder_for(out: Path | None, script: str) -> Iterator[Path]:
    """Yields the folder `out`, or a new one, `runs/<script>-<date>-<time>`. If the caller raises while the new folder
    is still empty, it is removed.

    Raises:
      UsageError: the folder cannot be made.
    """
    folder = out or new_folder(script)
    try:
        yield folder
    except BaseException:
        if out is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only where it is empty
                folder.parent.rmdir()
        raise


def new_folder(script: str, root: Path = Path("runs")) -> Path:
    """Makes a new folder `root/<script>-<date>-<time>`; no two calls, even in different processes, get the same one.

    Raises:
      UsageError: the folder cannot be made.
    """
    name = f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = root / name, 1
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                number += 1
                folder = root / f"{name}-{number}"
    except OSError as error:
        raise UsageError(f"cannot make {folder}: {reason(error)}; choose another --out") from error


def remove_folder(folder: Path) -> None:
    """Removes a folder if it exists; if it is a symbolic link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def nested_lists(x: np.ndarray, infinities: bool = False) -> list:
    """Converts an array for JSON: floats become the shortest decimals that read back exactly, non-finite ones None.

    Args:
      infinities: write infinities as the strings "inf" and "-inf", which NumPy reads back.
    """
    if x.dtype.kind != "f":
        return x.tolist()
    shortest = x.astype(str).astype(np.float64)  # float32 0.1 as 0.1, not 0.10000000149011612
    lists = np.where(np.isfinite(x), shortest, np.array(None))
    if infinities:
        lists[np.isinf(x)] = x[np.isinf(x)].astype(str)
    return lists.tolist()


def plain(value: Any) -> Any:
    """Converts a value for JSON: NaN and infinities become None, unsupported types become strings."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return nested_lists(np.asarray(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
