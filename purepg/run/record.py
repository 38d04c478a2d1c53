"""The out folder: everything a run leaves on disk.

config.json   all arguments, versions, device
log.jsonl     a line per block with every member's metrics for every update of it; flushed, so that a killed run
              leaves its curve
metrics.npz   every metric `[H, S, U]`, and `num_updates [H]`
summary.json  what the run came to
curves.png    the picture
heatmap.png   the final returns of a sweep of two fields
checkpoints/  states to go on from (`purepg.run.checkpoint`)
wandb/        the files of Weights & Biases
"""

import contextlib
import errno
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from purepg.types import UsageError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

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
    """A result that could not be written: one line that names the file and the reason."""


class Record:
    """One run's out folder. `append_block` never raises for want of disk; the final writes raise `RecordError`."""

    def __init__(self, folder: Path, log: IO[bytes]):
        self.folder = folder
        self._log = log
        self._log_failed = False

    @classmethod
    def open(cls, out: Path, overwrite: bool = False) -> "Record":
        """Makes `out` (and its parents) where needed and opens a new log in it.

        With `overwrite`, a run that `out` holds is removed first: its files and `wandb/`, and nothing else there.

        Raises:
          UsageError: `out` holds a run and `overwrite` is off, or it cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            files = [name for name in (CONFIG, LOG, METRICS, SUMMARY, CURVES, HEATMAP) if (out / name).exists()]
            held = files + [CHECKPOINTS] * (out / CHECKPOINTS).exists()
            if held and not overwrite:
                choices = "choose another --out, or pass --resume or --overwrite"
                raise UsageError(f"{out} already holds a run ({held[0]}): {choices}")
            if held:  # a wandb/ without a run beside it is somebody else's
                if LOG in files:
                    with (out / LOG).open("r+b") as running:
                        _lock(running, out)
                for file in (*(out / name for name in files), *out.glob(FILMS)):
                    file.unlink()
                remove_folder(out / WANDB)
                remove_folder(out / CHECKPOINTS)
            log = (out / LOG).open("xb", buffering=0)  # exclusive: of two runs that race for a folder, one is refused
            _lock(log, out)
        except OSError as error:
            raise UsageError(f"cannot write a run to {out}: {reason(error)}; choose another --out") from error
        return cls(out, log)

    @classmethod
    def reopen(cls, out: Path, num_bytes: int, keep_wandb: bool = False) -> "Record":
        """Opens the folder of a run that goes on, and cuts its log to the first `num_bytes`.

        Args:
          keep_wandb: leave what Weights & Biases recorded; else it is recorded again from the log.
        Raises:
          UsageError: it cannot be written, or another process is writing it.
        """
        try:
            log = (out / LOG).open("r+b", buffering=0)
            _lock(log, out)
            log.truncate(num_bytes)
            log.seek(num_bytes)
            if not keep_wandb:
                remove_folder(out / WANDB)
        except OSError as error:
            raise UsageError(f"cannot write to {out}: {reason(error)}") from error
        return cls(out, log)

    def append_block(
        self,
        settings: Sequence[int],
        start: int,
        metrics: Mapping[str, np.ndarray],
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Appends one line to log.jsonl. Where it cannot be written, says so once and goes on: the run matters more.

        Args:
          settings: the `H'` settings that the block holds.
          start: the block's first update.
          metrics: each `[H', S', U']`.
          seeds: the `S'` places on the seed axis that the block holds; None: the first `S'`, all of them as a rule.
        """
        seeds = seeds if seeds is not None else range(next(iter(metrics.values())).shape[1])
        line = {
            "settings": [int(h) for h in settings],
            "seeds": [int(s) for s in seeds],
            "start": int(start),
            "metrics": {name: nested_lists(value, infinities=True) for name, value in metrics.items()},
        }
        data = memoryview(json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        end = self._log.tell()
        try:
            while data:  # unbuffered, so a write may take a part; a buffer would carry the rest into a later line
                data = data[self._log.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # cut what was half written, so that later lines stay whole
                self._log.truncate(end)
                self._log.seek(end)
            if not self._log_failed:
                self._log_failed = True
                say(f"cannot append to {self.folder / LOG}: {reason(error)}; training goes on without it")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json."""
        self._write_json(CONFIG, config)

    def write_metrics(self, metrics: Mapping[str, np.ndarray], num_updates: np.ndarray) -> None:
        """Writes metrics.npz: each metric `[H, S, U]`, and `num_updates [H]`."""
        arrays: dict[str, Any] = {**metrics, "num_updates": num_updates}
        self.write(METRICS, lambda file: np.savez(file, **arrays))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        self._write_json(SUMMARY, summary)

    def write(self, name: str, save: Callable[[IO[bytes]], object]) -> None:
        """Writes a file of the folder whole or not at all: `save` fills a temporary one that then takes its place.

        Raises:
          RecordError: it could not be written.
        """
        write_whole(self.folder / name, save)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
        self.write(name, lambda file: file.write(text.encode()))

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _lock(log: IO[bytes], out: Path) -> None:
    """Keeps other processes from the folder for as long as its log is open. Raises UsageError where one has it."""
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # a file system without locks is written without one
            log.close()
            raise UsageError(f"{out} is being written by another process: wait for its end, or stop it") from error


def write_whole(path: Path, save: Callable[[IO[bytes]], object]) -> None:
    """Writes a file whole or not at all: `save` fills a temporary one that then takes its place.

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


def new_folder(script_name: str, root: Path = Path("runs")) -> Path:
    """Makes a new folder `root/<script>-<date>-<time>`; no other call, here or in another process, gets the same.

    Raises:
      UsageError: it cannot be made.
    """
    name = f"{Path(script_name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
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


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Rebuilds the metrics from a log.jsonl, that of a killed run too: a last line cut short is ignored.

    Returns:
      each metric `[H, S, U]` float64, NaN where the log has null or nothing. Cast to the dtype that was logged, a
      value is the one that was logged, to the bit.
    """
    with path.open() as file:
        blocks = [json.loads(line) for line in file if line.endswith("\n")]
    if not blocks:
        return {}
    arrays = [{name: np.array(value, np.float64) for name, value in block["metrics"].items()} for block in blocks]
    ends = [block["start"] + next(iter(values.values())).shape[2] for block, values in zip(blocks, arrays, strict=True)]
    num_settings, num_seeds = (1 + max(max(block[axis]) for block in blocks) for axis in ("settings", "seeds"))
    metrics = {name: np.full((num_settings, num_seeds, max(ends)), np.nan) for name in arrays[0]}
    for block, values, end in zip(blocks, arrays, ends, strict=True):
        members = np.ix_(block["settings"], block["seeds"])
        for name, value in values.items():
            metrics[name][(*members, slice(block["start"], end))] = value
    return metrics


def nested_lists(x: np.ndarray, infinities: bool = False) -> list:
    """An array as JSON can hold it: None for what is not finite, and the shortest decimals that read back the same.

    Args:
      infinities: they are the texts "inf" and "-inf", which NumPy reads as what they are.
    """
    if x.dtype.kind != "f":
        return x.tolist()
    shortest = x.astype(str).astype(np.float64)  # float32 0.1 as 0.1, not 0.10000000149011612
    lists = np.where(np.isfinite(x), shortest, np.array(None))
    if infinities:
        lists[np.isinf(x)] = x[np.isinf(x)].astype(str)
    return lists.tolist()


def plain(value: Any) -> Any:
    """A configuration or summary as JSON can hold it: NaN and infinities are None, what JSON does not know is text."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return nested_lists(np.asarray(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def setting_label(hyperparameters: Mapping[str, Any]) -> str:
    """A setting's name: `learning_rate=0.001,clip_eps=0.1`; empty where nothing is swept."""
    return ",".join(f"{name}={value}" for name, value in hyperparameters.items())


def say(line: str) -> None:
    """One line on stderr, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)


def reason(error: BaseException) -> str:
    """Why it failed, in one line: the system's words for an OSError, otherwise the error's type and first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def remove_folder(folder: Path) -> None:
    """Removes a folder where there is one; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
