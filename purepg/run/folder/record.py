"""Writes the folder of a run."""

import contextlib
import errno
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from purepg.run.console import reason, say
from purepg.run.folder.files import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    FILMS,
    HEATMAP,
    LINEAGE,
    LOG,
    METRICS,
    PARALLEL,
    SAMPLES,
    SEARCH,
    SUMMARY,
    WANDB,
    WINNER,
    plain,
    remove_folder,
    write_json,
    write_whole,
)
from purepg.run.folder.log import line_of
from purepg.types import UsageError

try:
    import fcntl
except ImportError:  # this system has no file locks of this kind
    fcntl = None


class Record:
    """A run's folder, open for writing. If a write fails, `append_block` prints a warning; other methods raise
    `RecordError`."""

    def __init__(self, folder: Path, log: IO[bytes]):
        self.folder = folder
        self._log = log
        self._log_failed = False
        self.config: Mapping[str, Any] = {}

    @classmethod
    def open(cls, out: Path, overwrite: bool = False) -> "Record":
        """Makes the folder `out` if needed, with its parents, and opens a new log in it.

        With `overwrite`, a run in `out` is removed first: its own files, `winner/` and `wandb/`, but nothing else.

        Raises:
          UsageError: `out` holds a run and `overwrite` is off, or the folder cannot be written.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            own = CONFIG, LOG, SAMPLES, METRICS, SUMMARY, CURVES, HEATMAP, SEARCH, PARALLEL, LINEAGE, BEST
            files = [name for name in own if (out / name).exists()]
            held = files + [CHECKPOINTS] * (out / CHECKPOINTS).exists()
            if held and not overwrite:
                choices = "choose another --out, or pass --resume or --overwrite"
                raise UsageError(f"{out} already holds a run ({held[0]}): {choices}")
            if held:  # otherwise a wandb/ in the folder is not ours
                if LOG in files:
                    with (out / LOG).open("r+b") as running:
                        _lock(running, out)
                for file in (*(out / name for name in files), *out.glob(FILMS)):
                    file.unlink()
                remove_folder(out / WANDB)
                remove_folder(out / CHECKPOINTS)
                remove_folder(out / WINNER)
            log = (out / LOG).open("xb", buffering=0)  # exclusive: if two runs race for the folder, one is refused
            _lock(log, out)
        except OSError as error:
            raise UsageError(f"cannot write a run to {out}: {reason(error)}; choose another --out") from error
        return cls(out, log)

    @classmethod
    def reopen(cls, out: Path, num_bytes: int, keep_wandb: bool = False) -> "Record":
        """Opens the folder of a resumed run, and truncates its log to `num_bytes`.

        Args:
          keep_wandb: keep the files of Weights & Biases; otherwise they are removed, to be written again from the log.
        Raises:
          UsageError: the folder cannot be written, or another process is writing it.
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
        """Appends one line to log.jsonl. If that fails, warns once and lets training continue.

        Args:
          settings, seeds: the block's `H'` settings and `S'` seeds.
          start: number of the block's first update.
          metrics: each `[H', S', U']`.
        """
        data = memoryview(line_of(settings, seeds, start, metrics))
        end = self._log.tell()
        try:
            while data:  # unbuffered, so a write may be partial; a buffer could leak its rest into a later line
                data = data[self._log.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # remove the partial line, so that later lines stay intact
                self._log.truncate(end)
                self._log.seek(end)
            if not self._log_failed:
                self._log_failed = True
                say(f"cannot append to {self.folder / LOG}: {reason(error)}; training goes on without it")

    def write_samples(self, settings: Sequence[int], seeds: Sequence[int], updates: np.ndarray, samples: list) -> None:
        """Adds an evaluation's samples to samples.jsonl, a line each, in place of any from that update on.

        Args:
          settings, seeds: those of the agents.
          updates: `[H', S']` the number of each agent's updates before it.
          samples: `[H'][S'][n]` dicts.
        """
        file = self.folder / SAMPLES
        now = {(h, s): int(updates[i, j]) for i, h in enumerate(settings) for j, s in enumerate(seeds)}
        rows = [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
        kept = [row for row in rows if row["update"] < now.get((row["setting"], row["seed"]), math.inf)]
        new = [
            {"update": now[h, s], "setting": h, "seed": s, **sample}
            for h, of_setting in zip(settings, samples, strict=True)
            for s, of_seed in zip(seeds, of_setting, strict=True)
            for sample in of_seed
        ]
        text = "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in [*kept, *new])
        self.write(SAMPLES, lambda opened: opened.write(text.encode()))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json, and keeps it as `config`."""
        self.config = config
        write_json(self.folder / CONFIG, config)

    def write_metrics(self, metrics: Mapping[str, np.ndarray], num_updates: np.ndarray) -> None:
        """Writes metrics.npz: each metric `[H, S, U]`, and `num_updates [H]`."""
        arrays: dict[str, Any] = {**metrics, "num_updates": num_updates}
        self.write(METRICS, lambda file: np.savez(file, **arrays))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        write_json(self.folder / SUMMARY, summary)

    def write(self, name: str, save: Callable[[IO[bytes]], object]) -> None:
        """Writes another file of the folder atomically."""
        write_whole(self.folder / name, save)

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _lock(log: IO[bytes], out: Path) -> None:
    """Locks the folder until its log is closed. Raises UsageError if another process holds the lock."""
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # other errors: the file system has no locks, so do without
            log.close()
            raise UsageError(f"{out} is being written by another process: wait for its end, or stop it") from error
