"""From blocks of metrics to the rows of each W&B run: means over updates, and over seeds where a run is a setting."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from purepg.run.folder.files import nested_lists
from purepg.run.reliability import mean_interval
from purepg.run.watch.members import Member, Per

Columns = Mapping[str, np.ndarray]
Row = dict[str, Any]


class Rows:
    """Makes a population's rows as its blocks arrive.

    A row is the mean over `every` updates of a block, at the `env_steps` that the member has consumed so far (or, for a
    setting, their mean over seeds). Metrics that are not finite are left out. A member that has stopped, with 0 or NaN
    `env_steps`, has no more rows.
    """

    def __init__(self, per: Per, num_seeds: int, every: int):
        self._per: Per = per
        self._every = every
        self._num_seeds = num_seeds
        self._env_steps = defaultdict(lambda: np.zeros(num_seeds, np.int64))  # consumed so far, by setting
        self._waiting: dict[int, list[list[Columns]]] = {}  # by setting and seed: what other seeds have not reached
        self._num_updates: dict[int, int] = defaultdict(int)  # of each setting's rows so far, where a run is a setting

    def of_block(
        self, settings: Sequence[int], seeds: Sequence[int], start: int, metrics: Columns
    ) -> Iterator[tuple[Member, Row]]:
        """The rows of a block of metrics `[H', S', U']`, whose first update is `start`. As seeds may be trained in
        turns, and after a resume in blocks of other lengths, a setting has a row once all its seeds have reached it."""
        for i, setting in enumerate(settings):
            own = {name: value[i] for name, value in metrics.items()}
            if self._per == "setting":
                waiting = self._waiting.setdefault(setting, [[] for _ in range(self._num_seeds)])
                for j, seed in enumerate(seeds):
                    waiting[seed].append({name: value[j] for name, value in own.items()})
                yield from self._of_setting(setting, min)
                continue
            active, totals = self._advance(setting, seeds, own["env_steps"])
            for j, seed in enumerate(seeds):
                columns = {name: value[j] for name, value in own.items()} | {"env_steps": totals[j]}
                yield from self._made(Member(setting, seed), start, columns, active[j])

    def rest(self) -> Iterator[tuple[Member, Row]]:
        """The rows that waited for seeds which never reached them, over the seeds that did."""
        for setting in sorted(self._waiting):
            yield from self._of_setting(setting, max)

    def _of_setting(self, setting: int, until: Callable[[list[int]], int]) -> Iterator[tuple[Member, Row]]:
        """A setting's rows, up to the `min` or `max` of the numbers of updates that its seeds have reached: the mean
        over active seeds, and the ends of its 95 % interval under `lo/` and `hi/`."""
        waiting = self._waiting[setting]
        num_updates = until([sum(len(block["env_steps"]) for block in blocks) for blocks in waiting])
        if num_updates == 0:
            return
        names = next(blocks[0] for blocks in waiting if blocks)
        metrics = {name: np.full((self._num_seeds, num_updates), np.nan) for name in names}
        for seed, blocks in enumerate(waiting):
            if blocks:
                whole = {name: np.concatenate([block[name] for block in blocks]) for name in names}
                for name, value in whole.items():
                    metrics[name][seed, : len(value)] = value[:num_updates]
                left = {name: value[num_updates:] for name, value in whole.items()}
                waiting[seed] = [left] if len(left["env_steps"]) else []
        active, totals = self._advance(setting, range(self._num_seeds), metrics["env_steps"])
        # Seeds that have stopped count here too, so that the mean does not decrease when one stops.
        columns = {"env_steps": totals.mean(axis=0).round().astype(np.int64)}
        for name in names:
            if name != "env_steps":
                found = mean_interval(np.where(active, metrics[name], np.nan), axis=0)
                for key, column in zip((name, f"lo/{name}", f"hi/{name}"), found, strict=True):
                    columns[key] = column.astype(np.float32)
        yield from self._made(Member(setting, None), self._num_updates[setting], columns, np.max(active, axis=0))
        self._num_updates[setting] += num_updates

    def _advance(self, setting: int, seeds: Sequence[int], env_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds a block's `env_steps [S', U']` to what its members have consumed.

        Returns:
          (active, totals), each `[S', U']`: whether the member still made this update, and its steps after it.
        """
        active = np.asarray(env_steps > 0)  # False for NaN
        totals = self._env_steps[setting][list(seeds), None] + np.cumsum(np.where(active, env_steps, 0), axis=1)
        self._env_steps[setting][list(seeds)] = totals[:, -1]
        return active, totals.astype(np.int64)

    def _made(self, member: Member, start: int, columns: Columns, active: np.ndarray) -> Iterator[tuple[Member, Row]]:
        last, means = thinned(columns, active, self._every)
        lists = {name: nested_lists(value) for name, value in means.items()}
        for i, u in enumerate(last):
            row = {name: values[i] for name, values in lists.items() if values[i] is not None}
            yield member, row | {"update": start + int(u)}


def thinned(columns: Columns, active: np.ndarray, every: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One row for every `every` updates: the means over the active updates with a finite value, and the last
    `env_steps`.

    Args:
      columns: each `[U']`.
      active: `[U']` whether the member made this update.
    Returns:
      (last, rows): each row's last active update, and its columns. Rows without an active update are left out.
    """
    num_updates = len(active)
    first = np.arange(0, num_updates, every)
    place = np.where(active, np.arange(num_updates), -1)
    last = np.maximum.reduceat(place, first)
    kept = last >= 0
    rows = {}
    for name, column in columns.items():
        if name == "env_steps" or every == 1:
            rows[name] = (column + 0)[last[kept]]  # + 0 makes booleans numbers, which W&B can plot
            continue
        counts = active & np.isfinite(column)
        number = np.add.reduceat(counts.astype(int), first)[kept]
        total = np.add.reduceat(np.where(counts, column, 0).astype(np.float64), first)[kept]
        mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        rows[name] = mean.astype(column.dtype) if column.dtype.kind == "f" else mean
    return last[kept], rows
