"""Saves and restores the state of a population with orbax, atomically and bit for bit.

checkpoints/<chunk>/<update>/    the state of one of the run's chunks after that many updates, and a few facts about it
checkpoints/<chunk>/evaluation-<update>.json    the final evaluation of its agents, if that was their last update
"""

import contextlib
import errno
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from purepg.run.console import reason
from purepg.run.folder.files import CHECKPOINTS, RecordError, remove_folder, write_whole
from purepg.types import UsageError


class Checkpoints:
    """The checkpoints of one chunk. `save` returns at once and writes in the background.

    Args:
      out: the run's folder.
      chunk: the chunk's position in the run's order.
      keep: how many checkpoints to keep. None: open for reading only.
    """

    def __init__(self, out: Path, chunk: int, keep: int | None = None):
        import orbax.checkpoint as ocp

        silence()
        self._args, self._keep = ocp.args, keep
        self.folder = (out / CHECKPOINTS / str(chunk)).absolute()
        writes = keep is not None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=writes, read_only=not writes, cleanup_tmp_directories=writes
        )
        self._manager = None
        if writes or self.folder.is_dir():
            try:
                handlers = {"state": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
                self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
            except OSError as error:
                raise RecordError(f"cannot write {self.folder}: {reason(error)}") from error

    def latest(self) -> int | None:
        """The number of updates in the latest complete checkpoint; None if there is none."""
        return self._manager.latest_step() if self._manager else None

    def save(self, update: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Starts saving a state in the background; the caller may donate it once this returns.

        Args:
          facts: further JSON values, saved with the state.
        Raises:
          RecordError: this checkpoint or the previous one could not be written.
        """
        if self.latest() == update:
            return
        manager = self._manager
        assert manager
        args = self._args.Composite(
            state=self._args.StandardSave(_without_empty(state)), facts=self._args.JsonSave(dict(facts))
        )
        self._guarded(lambda: manager.save(update, args=args))

    def wait(self) -> None:
        """Waits until everything is written. Raises RecordError if a write failed."""
        if self._manager:
            self._guarded(self._manager.wait_until_finished)

    def facts(self, update: int) -> dict[str, Any]:
        """The facts saved with a state. Raises UsageError if they cannot be read."""
        return self._read(update, facts=self._args.JsonRestore())["facts"]

    def restore(self, update: int, abstract: Any) -> Any:
        """Restores a saved state.

        Args:
          abstract: the shapes, dtypes and shardings that the state must have.
        Raises:
          UsageError: the saved shapes or dtypes differ, or the checkpoint cannot be read.
        """
        # orbax silently casts to the requested dtypes, so the dtypes on disk are compared here.
        asked, found = _kinds(_without_empty(abstract)), _kinds(self._tree(update))
        different = [name for name in sorted(asked.keys() | found.keys()) if asked.get(name) != found.get(name)]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            named = ", ".join(different[:3]) + more
            raise UsageError(f"{self.folder / str(update)} holds another kind of state: {named} differs")
        placed = jax.tree.map(_placed, _without_empty(abstract))
        read = jax.tree.leaves(self._read(update, state=self._args.StandardRestore(placed))["state"])
        leaves, structure = jax.tree.flatten(abstract)
        return structure.unflatten([read.pop(0) if x.size else jnp.zeros(x.shape, x.dtype) for x in leaves])

    def write_evaluation(self, update: int, evaluation: Mapping[str, Any]) -> None:
        """Writes the agents' final evaluation: arrays `[H, S]` and JSON values, by name.

        Raises:
          RecordError: it cannot be written.
        """
        text = json.dumps(evaluation, default=np.ndarray.tolist)
        write_whole(self._evaluation(update), lambda file: file.write(text.encode()))

    def evaluation(self, update: int) -> dict[str, Any] | None:
        """Reads what `write_evaluation` wrote; None if there is nothing."""
        try:
            found = json.loads(self._evaluation(update).read_text())
        except (OSError, ValueError):
            return None
        if "measures" in found:
            found["measures"] = {name: np.array(x) for name, x in found["measures"].items()}
        return found | {name: np.array(found[name]) for name in ("sampled", "mode")}

    def close(self) -> None:
        if self._manager:
            try:
                self._guarded(self._manager.close)
            finally:
                self._tidy()

    def _evaluation(self, update: int) -> Path:
        return self.folder / f"evaluation-{update}.json"

    def _guarded(self, write: Any) -> Any:
        try:
            return write()
        except Exception as error:  # orbax and tensorstore raise several kinds of error when the disk is full
            self._tidy()
            full = any(word in str(error) for word in ("RESOURCE_EXHAUSTED", os.strerror(errno.ENOSPC)))
            why = os.strerror(errno.ENOSPC) if full else reason(error)
            raise RecordError(f"cannot save a checkpoint in {self.folder}: {why}") from error

    def _tidy(self) -> None:
        """Frees space for the run's results: removes what a save that failed left, which are half-written checkpoints
        and complete ones beyond the number to keep."""
        if self._keep is None or jax.process_index() > 0:
            return
        complete = sorted((x for x in self.folder.glob("*") if x.name.isdigit()), key=lambda x: int(x.name))
        for left in (*self.folder.glob("*.orbax-checkpoint-tmp*"), *complete[: -self._keep]):
            removed = left.with_name(f"{left.name.partition('.')[0]}.orbax-checkpoint-tmp-removed")
            with contextlib.suppress(OSError):  # under its old name, orbax could complete it while it is half removed
                remove_folder(left.rename(removed))

    def _read(self, update: int, **items: Any) -> Any:
        manager = self._manager
        assert manager
        return self._readable(update, lambda: manager.restore(update, args=self._args.Composite(**items)))

    def _tree(self, update: int) -> Any:
        """Shapes and dtypes of the state on disk."""
        manager = self._manager
        assert manager
        return self._readable(update, lambda: manager.item_metadata(update)["state"].tree)

    def _readable(self, update: int, read: Any) -> Any:
        try:
            return read()
        except Exception as error:
            raise UsageError(f"cannot read the checkpoint {self.folder / str(update)}: {reason(error)}") from error


def silence() -> None:
    """Hides what orbax prints in addition to the errors that it raises: its log, and the messages of all other arrays
    after the error of one."""
    for name in "absl", "asyncio":
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "without_closed_loops":
        return

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = without_closed_loops


def _kinds(tree: Any) -> dict[str, Any]:
    """Maps each leaf's path to (dtype, shape). Paths are comparable, although orbax turns named tuples into dicts."""

    def name(key: Any) -> str:
        return str(next(getattr(key, field) for field in ("name", "key", "idx") if hasattr(key, field)))

    def kind(leaf: Any) -> tuple[Any, tuple[int, ...]]:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # orbax stores a key's bits
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return leaf.dtype, tuple(leaf.shape)

    return {".".join(map(name, path)): kind(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _without_empty(tree: Any) -> Any:
    """The tree without arrays of size 0, which orbax refuses."""
    return jax.tree.map(lambda x: x if x.size else None, tree)


def _placed(x: Any) -> Any:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
