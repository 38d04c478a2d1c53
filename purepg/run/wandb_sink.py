"""Weights & Biases, beside the training and never in its way.

A thread of its own opens the runs and logs to them: opening sixteen takes more than a second offline, and a dead
network's time-out online. `log_block` only queues arrays. Whatever fails is said once, and training goes on.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from purepg.run.record import WANDB, nested_lists, plain, reason, say, setting_label
from purepg.run.reliability import mean_interval

INIT_SECONDS = 15  # W&B's own time-outs: a run that cannot go online within it is recorded offline,
FINISH_SECONDS = 30  # and what is not uploaded by then stays on disk
PATIENCE_SECONDS = 60  # `finish` waits for as long as there is progress within this time
NUM_FINISHERS = 16  # runs that finish at once

MAX_NAME_LENGTH = 128  # W&B's

Mode = Literal["online", "offline", "disabled"]
Per = Literal["seed", "setting"]


class Member(NamedTuple):
    """What one W&B run shows: a seed of a setting, or (`seed` None) a setting's mean over seeds."""

    setting: int
    seed: int | None  # position on the seed axis


class Block(NamedTuple):
    settings: Sequence[int]
    seeds: Sequence[int]
    start: int
    metrics: Mapping[str, np.ndarray]  # each [H', S', U']


class End(NamedTuple):
    summary: Mapping[str, Any]
    pictures: Sequence[Path]


class WandbSink:
    """Logs a population to W&B: a run per setting and seed, or per setting with mean and 95 % interval over seeds.

    A row for every so many updates of a block, the mean over them, over `env_steps`: the environment steps a member has
    consumed so far, or their mean over seeds. A metric that is not finite is left out, and a member that has stopped
    (its `env_steps` is 0 or NaN) has no row. Files lie in `out/wandb`; `wandb sync` sends those of an offline run.

    Args:
      mode: "online" falls back to offline where there is no key or no network. Nothing ever prompts or logs in.
      per: one W&B run per "seed" (of each setting) or per "setting".
      out: an existing folder.
      config: what every run is configured with; a setting's hyperparameters replace the entries of their names.
      hyperparameters: per setting, name to value.
      seeds: `[S]` the number each seed goes by, in a run's name and as `member_seed` in its config.
      every: updates of a row. A row takes W&B a third of a millisecond, in which a small agent makes several updates.
    """

    def __init__(
        self,
        mode: Mode,
        per: Per,
        project: str,
        group: str,
        out: Path,
        config: Mapping[str, Any],
        hyperparameters: Sequence[Mapping[str, Any]],
        seeds: Sequence[int],
        every: int = 1,
    ):
        self._every = every
        self._mode: Mode = mode
        self._project = project
        self._group = group
        self._out = out
        self._config = config
        self._hyperparameters = hyperparameters
        self._seeds = seeds
        self._per: Per = per
        self._env_steps = np.zeros((len(hyperparameters), len(seeds)), np.int64)  # consumed so far
        self._gathered: dict[int, list[list[dict[str, Any]]]] = {}  # see _gather
        self._num_logged = [0] * len(hyperparameters)  # updates of each setting, where a run is a setting
        self._runs: dict[Member, Any] = {}
        self._said: set[str] = set()
        self._say_lock = threading.Lock()
        self._queue: queue.SimpleQueue[Block | End] = queue.SimpleQueue()
        self._progress = time.monotonic()
        # A daemon: where the program ends without `finish`, a dead network must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        if mode != "disabled":
            self._thread.start()

    def log_block(
        self,
        settings: Sequence[int],
        start: int,
        metrics: Mapping[str, np.ndarray],
        seeds: Sequence[int] | None = None,
    ) -> None:
        """Queues a block's rows and returns at once. The arrays are read later: do not write to them.

        Args:
          settings: the `H'` settings that the block holds.
          start: the block's first update.
          metrics: each `[H', S', U']`, `env_steps` among them: those of one update.
          seeds: the `S'` places on the seed axis that the block holds; None: all.
        """
        if self._thread.is_alive():
            self._queue.put(Block(settings, seeds if seeds is not None else range(len(self._seeds)), start, metrics))

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[Path] = ()) -> None:
        """Logs summary and pictures to every run, ends them, and waits for as long as something moves.

        Args:
          summary: that of summary.json. A run gets the entry of its own setting, its own seed's number (`final`) in
            place of a list over seeds (`finals`), and what is common to all.
          pictures: to show with every run, by their names; those that do not exist are left out.
        """
        if not self._thread.is_alive():
            return
        self._queue.put(End(summary, pictures))
        self._progress = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if time.monotonic() - self._progress > PATIENCE_SECONDS:
                self._say_once("finish", f"gave up waiting; {self._sync('*run-*')} sends what is missing")
                return

    def _work(self) -> None:
        """The thread: opens the runs, logs blocks as they come, ends the runs."""
        try:
            import wandb

            # Silent for the process and not only for each run: else a missing key makes a terminal prompt for one.
            wandb.setup(wandb.Settings(silent=True, mode=self._mode))
            for h in range(len(self._hyperparameters)):
                for s in range(len(self._seeds)) if self._per == "seed" else [None]:
                    self._open(Member(h, s))
            while isinstance(item := self._queue.get(), Block):
                self._log(item)
            self._end(item)
        except Exception as error:
            self._say_once("work", f"stopped ({reason(error)}); training goes on without it")

    def _open(self, member: Member) -> None:
        if self._mode == "online":
            try:
                self._runs[member] = self._init(member)
            except Exception as error:
                self._mode = "offline"  # for the runs still to open too: each would wait for the time-out
                sync = f"{self._sync('offline-run-*')} sends the files"
                self._say_once("online", f"cannot go online ({reason(error)}); recording offline, {sync}")
        if member not in self._runs:
            try:
                self._runs[member] = self._init(member)
            except Exception as error:
                self._say_once("open", f"cannot open a run ({reason(error)}); training goes on without it")
        self._progress = time.monotonic()

    def _init(self, member: Member) -> Any:
        import wandb

        hyperparameters = self._hyperparameters[member.setting]
        label = setting_label(hyperparameters)
        config = member_config(self._config, hyperparameters)
        if member.seed is None:
            name = label or "all seeds"
        else:
            seed = self._seeds[member.seed]
            name = f"{label}/seed={seed}" if label else f"seed={seed}"
            config["member_seed"] = seed
        run = wandb.init(
            project=self._project,
            group=self._group,
            name=name[:MAX_NAME_LENGTH],
            id=secrets.token_hex(4),  # a WANDB_RUN_ID in the environment would make all of them one run
            config=plain(config),
            dir=self._out,
            mode=self._mode,
            settings=quiet_settings(),
        )
        run.define_metric("env_steps")
        run.define_metric("*", step_metric="env_steps")
        return run

    def _log(self, block: Block) -> None:
        for i, setting in enumerate(block.settings):
            metrics = {name: value[i] for name, value in block.metrics.items()}
            if self._per == "setting":
                self._gather(setting, block.seeds, metrics)
                continue
            active, totals = self._advance(setting, block.seeds, metrics["env_steps"])
            columns = metrics | {"env_steps": totals}
            for j, seed in enumerate(block.seeds):
                column = {name: value[j] for name, value in columns.items()}
                self._send(Member(setting, seed), block.start, column, active[j])

    def _gather(self, setting: int, seeds: Sequence[int], metrics: Mapping[str, np.ndarray]) -> None:
        """Logs a setting's updates, each `[S', U']`, once all its seeds have come to them: they may be trained in
        turns, and after a resume in blocks of other lengths."""
        waiting = self._gathered.setdefault(setting, [[] for _ in self._seeds])
        for i, seed in enumerate(seeds):
            waiting[seed].append({name: value[i] for name, value in metrics.items()})
        self._log_gathered(setting, min)

    def _log_gathered(self, setting: int, until: Callable[[list[int]], int]) -> None:
        """Logs as many updates as `until` says of the numbers that seeds wait with; what a seed lacks is NaN."""
        waiting = self._gathered[setting]
        num_updates = until([sum(len(block["env_steps"]) for block in blocks) for blocks in waiting])
        if num_updates == 0:
            return
        names = next(blocks[0] for blocks in waiting if blocks)
        metrics = {name: np.full((len(self._seeds), num_updates), np.nan) for name in names}
        for seed, blocks in enumerate(waiting):
            if blocks:
                whole = {name: np.concatenate([block[name] for block in blocks]) for name in names}
                for name, value in whole.items():
                    metrics[name][seed, : len(value)] = value[:num_updates]
                left = {name: value[num_updates:] for name, value in whole.items()}
                waiting[seed] = [left] if len(left["env_steps"]) else []
        active, totals = self._advance(setting, range(len(self._seeds)), metrics["env_steps"])
        columns = columns_over_seeds(metrics, active, totals)
        self._send(Member(setting, None), self._num_logged[setting], columns, np.max(active, axis=0))
        self._num_logged[setting] += num_updates

    def _advance(self, setting: int, seeds: Sequence[int], env_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds a block's `env_steps [S', U']` to what its members have consumed.

        Returns:
          (active, totals), each `[S', U']`: whether the member still made this update, and its steps after it.
        """
        active = np.asarray(env_steps > 0)  # NaN is not
        totals = self._env_steps[setting, list(seeds), None] + np.cumsum(np.where(active, env_steps, 0), axis=1)
        self._env_steps[setting, list(seeds)] = totals[:, -1]
        return active, totals.astype(np.int64)

    def _send(self, member: Member, start: int, columns: Mapping[str, np.ndarray], active: np.ndarray) -> None:
        """Logs rows of `every` updates, those among them that are active; every column is `[U']`."""
        if member not in self._runs:
            return
        last, means = thinned(columns, active, self._every)
        lists = {name: nested_lists(value) for name, value in means.items()}
        for i, u in enumerate(last):
            row = {name: values[i] for name, values in lists.items() if values[i] is not None}
            try:
                self._runs[member].log(row | {"update": start + int(u)})
            except Exception as error:
                self._say_once("log", f"a row was not logged ({reason(error)}); training goes on")
            self._progress = time.monotonic()

    def _end(self, end: End) -> None:
        """Gives every run its summary and pictures, and ends them side by side: each waits for its own upload."""
        import wandb

        for setting in sorted(self._gathered):  # of seeds that stopped a block before the others
            self._log_gathered(setting, max)
        runs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for member, run in self._runs.items():
            with self._ending():
                own = member_summary(end.summary, member)
                responses = own.pop("responses", None)
                run.summary.update(plain(own))
                if responses and member.seed is not None:
                    columns = list(responses[0])
                    rows: list[Any] = [[response[name] for name in columns] for response in responses]
                    run.log({"responses": wandb.Table(columns=columns, data=rows)})
                pictures = {path.stem: wandb.Image(str(path)) for path in end.pictures if path.exists()}
                if pictures:
                    run.log(pictures)  # not by many threads: PIL's import breaks
            runs.put(run)

        def finish_runs() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    run = runs.get_nowait()
                    with self._ending():
                        run.finish()

        finishers = [threading.Thread(target=finish_runs, daemon=True) for _ in range(NUM_FINISHERS)]
        for thread in finishers:
            thread.start()
        for thread in finishers:
            thread.join()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            sync = f"{self._sync('*run-*')} sends what is missing"
            self._say_once("finish", f"a run did not end well ({reason(error)}); {sync}")
        self._progress = time.monotonic()

    def _sync(self, runs: str) -> str:
        return f"`wandb sync {self._out}/{WANDB}/{runs}`"

    def _say_once(self, kind: str, line: str) -> None:
        with self._say_lock:
            if kind not in self._said:
                self._said.add(kind)
                say(f"wandb: {line}")


def quiet_settings() -> Any:
    """W&B's settings of one run, new for each: `init` writes into them. It prints nothing and looks at nothing."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        x_save_requirements=False,  # reading them takes most of the time to open a run
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        reinit="create_new",
    )


def columns_over_seeds(
    metrics: Mapping[str, np.ndarray], active: np.ndarray, totals: np.ndarray
) -> dict[str, np.ndarray]:
    """A setting's rows: each metric's mean over active seeds by its own name, the interval under `lo/` and `hi/`.

    Args:
      metrics: each `[S, U']`.
      active: `[S, U']` whether the member still made this update.
      totals: `[S, U']` environment steps so far. Their mean is over all seeds, those that have stopped too: it must
        not go back when one stops.
    Returns:
      each `[U']`.
    """
    columns = {"env_steps": totals.mean(axis=0).round().astype(np.int64)}
    for name, value in metrics.items():
        if name != "env_steps":
            mean, lo, hi = mean_interval(np.where(active, value, np.nan), axis=0)
            for key, column in ((name, mean), (f"lo/{name}", lo), (f"hi/{name}", hi)):
                columns[key] = column.astype(np.float32)
    return columns


def thinned(
    columns: Mapping[str, np.ndarray], active: np.ndarray, every: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One row of every `every` updates: the means over those that were active and finite, and the last `env_steps`.

    Args:
      columns: each `[U']`. active: `[U']`.
    Returns:
      (last, rows): the place of each row's last active update, and each column; rows without one are left out.
    """
    num_updates = len(active)
    first = np.arange(0, num_updates, every)
    place = np.where(active, np.arange(num_updates), -1)
    last = np.maximum.reduceat(place, first)
    kept = last >= 0
    rows = {}
    for name, column in columns.items():
        if name == "env_steps" or every == 1:
            rows[name] = (column + 0)[last[kept]]  # + 0: W&B plots no booleans
            continue
        counts = active & np.isfinite(column)
        number = np.add.reduceat(counts.astype(int), first)[kept]
        total = np.add.reduceat(np.where(counts, column, 0).astype(np.float64), first)[kept]
        mean = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        rows[name] = mean.astype(column.dtype) if column.dtype.kind == "f" else mean
    return last[kept], rows


def member_config(config: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a setting's hyperparameters in it: `section.field` in that section; a bare name in every
    section that has it, and on top."""
    own = {name: dict(entry) if isinstance(entry, Mapping) else entry for name, entry in config.items()}
    for name, value in hyperparameters.items():
        section, _, field = name.rpartition(".")
        for key, entry in own.items():
            if section in ("", key) and isinstance(entry, dict) and field in entry:
                entry[field] = value
        if not section:
            own[field] = value
    return own


def member_summary(summary: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """What is common to all runs, and the entry of the member's setting; of a list over seeds, the member's number."""

    def of_seed(entry: Mapping[str, Any], seed: int) -> dict[str, Any]:
        own: dict[str, Any] = dict(entry)
        for all_seeds, name in (("finals", "final"), ("responses", "responses")):
            if all_seeds in own:
                own[name] = own.pop(all_seeds)[seed]
        return {name: of_seed(value, seed) if isinstance(value, Mapping) else value for name, value in own.items()}

    own = {name: value for name, value in summary.items() if name != "settings"}
    if "settings" in summary:
        entry = {
            name: value for name, value in summary["settings"][member.setting].items() if name != "hyperparameters"
        }
        own |= entry if member.seed is None else of_seed(entry, member.seed)
    return own
