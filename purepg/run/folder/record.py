"""The folder of a run that is being written."""

import contextlib
import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from purepg.run.console import reason, say
from purepg.run.folder.files import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    FILMS,
    HEATMAP,
    LOG,
    METRICS,
    SUMMARY,
    WANDB,
    remove_folder,
    write_json,
    write_whole,
)
from purepg.run.folder.log import line_of
from purepg.types import UsageError

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None


class Record:
    """A run's folder, open for writing. `append_block` never raises for want of disk; other writes raise
    `RecordError`."""

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
        """Opens the folder of a run that is resumed, and cuts its log to the first `num_bytes`.

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
        self, settings: Sequence[int], start: int, metrics: Mapping[str, np.ndarray], seeds: Sequence[int]
    ) -> None:
        """Appends one line to log.jsonl. Where it cannot be written, says so once and goes on: the run matters more.

        Args:
          settings, seeds: the `H'` settings and `S'` seeds of the block.
          start: the block's first update.
          metrics: each `[H', S', U']`.
        """
        data = memoryview(line_of(settings, seeds, start, metrics))
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
        write_json(self.folder / CONFIG, config)

    def write_metrics(self, metrics: Mapping[str, np.ndarray], num_updates: np.ndarray) -> None:
        """Writes metrics.npz: each metric `[H, S, U]`, and `num_updates [H]`."""
        arrays: dict[str, Any] = {**metrics, "num_updates": num_updates}
        self.write(METRICS, lambda file: np.savez(file, **arrays))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        write_json(self.folder / SUMMARY, summary)

    def write(self, name: str, save: Callable[[IO[bytes]], object]) -> None:
        """Writes another file of the folder whole or not at all."""
        write_whole(self.folder / name, save)

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
