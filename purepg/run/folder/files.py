"""The names of a run's files, and how any file is written whole, read, and put into JSON."""

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
METRICS = "metrics.npz"
SUMMARY = "summary.json"
CURVES = "curves.png"
HEATMAP = "heatmap.png"
WANDB = "wandb"
CHECKPOINTS = "checkpoints"
FILMS = "setting-*-seed-*.gif"


class RecordError(RuntimeError):
    """A result could not be written: one line that names the file and the reason."""


def write_whole(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file whole or not at all: `save` fills a temporary file that then takes its place.

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
    """Writes a JSON file whole or not at all. Raises RecordError where it could not be written."""
    text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path, missing: str) -> Any:
    """Reads a JSON file.

    Args:
      missing: what it means that the file does not exist.
    Raises:
      UsageError: it does not exist, or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}: {missing}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {reason(error)}") from error


@contextlib.contextmanager
def folder_for(out: Path | None, script: str) -> Iterator[Path]:
    """The folder `out`, or else a new one, `runs/<script>-<date>-<time>`, which is removed again if the caller raises
    before anything is in it.

    Raises:
      UsageError: it cannot be made.
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
    """Makes a new folder `root/<script>-<date>-<time>`; no other call, here or in another process, gets the same.

    Raises:
      UsageError: it cannot be made.
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
    """Removes a folder where there is one; of a link to a folder, only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def nested_lists(x: np.ndarray, infinities: bool = False) -> list:
    """An array as JSON can hold it: the shortest decimals that read back the same, and None for what is not finite.

    Args:
      infinities: write them as the texts "inf" and "-inf", which NumPy reads back as infinities.
    """
    if x.dtype.kind != "f":
        return x.tolist()
    shortest = x.astype(str).astype(np.float64)  # float32 0.1 as 0.1, not 0.10000000149011612
    lists = np.where(np.isfinite(x), shortest, np.array(None))
    if infinities:
        lists[np.isinf(x)] = x[np.isinf(x)].astype(str)
    return lists.tolist()


def plain(value: Any) -> Any:
    """A value as JSON can hold it: NaN and infinities become None, and what JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return nested_lists(np.asarray(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
