"""Weights & Biases, beside the training and never in its way.

A thread of its own opens the runs and logs to them: opening sixteen takes more than a second offline, and a dead
network's time-out online. `log_block` only queues arrays. Whatever fails is said once, and training goes on.
"""

import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from purepg.run.record import nested_lists, plain, reason, say, setting_label
from purepg.run.statistics import mean_interval

INIT_SECONDS = 15  # W&B's own time-outs: a run that cannot go online within it is recorded offline,
FINISH_SECONDS = 45  # and what is not uploaded by then stays on disk
PATIENCE_SECONDS = 60  # `finish` waits for as long as there is progress within this time
NUM_FINISHERS = 16  # runs that finish at once: each waits for its own upload

MAX_NAME_LENGTH = 128  # W&B's

Mode = Literal["online", "offline", "disabled"]
Per = Literal["seed", "setting"]


class Member(NamedTuple):
    """What one W&B run shows: a seed of a setting, or (`seed` None) a setting's mean over seeds."""

    setting: int
    seed: int | None  # position on the seed axis


class Block(NamedTuple):
    settings: Sequence[int]
    start: int
    metrics: Mapping[str, np.ndarray]  # each [H', S, U']


class End(NamedTuple):
    summary: Mapping[str, Any]
    curves: Path | None


class WandbSink:
    """Logs a population to W&B: a run per setting and seed, or per setting with mean and 95 % interval over seeds.

    A row per update, over `env_steps`: the environment steps a member has consumed so far, or their mean over seeds.
    A metric that is not finite is left out of its row, and a member that has stopped (its `env_steps` is 0 or NaN) has
    no row. Files lie in `out/wandb`; those of an offline run are sent with `wandb sync`.

    Args:
      mode: "online" falls back to offline where there is no key or no network. Nothing ever prompts or logs in.
      per: one W&B run per "seed" (of each setting) or per "setting".
      out: an existing folder.
      config: what every run is configured with; a setting's hyperparameters replace the entries of their names.
      hyperparameters: per setting, name to value.
      seeds: `[S]` the number each seed goes by, in a run's name and as `member_seed` in its config.
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
    ):
        self._mode: Mode = mode
        self._project = project
        self._group = group
        self._out = out
        self._config = config
        self._hyperparameters = hyperparameters
        self._seeds = seeds
        positions = range(len(seeds)) if per == "seed" else [None]
        self._members = [Member(h, s) for h in range(len(hyperparameters)) for s in positions]
        self._env_steps = np.zeros((len(hyperparameters), len(seeds)), np.int64)  # consumed so far
        self._runs: dict[Member, Any] = {}
        self._said: set[str] = set()
        self._queue: queue.SimpleQueue[Block | End] = queue.SimpleQueue()
        self._progress = time.monotonic()
        # A daemon: where the program ends without `finish`, a dead network must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        if mode != "disabled":
            self._thread.start()

    def log_block(self, settings: Sequence[int], start: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Queues a block's rows and returns at once. The arrays are read later: do not write to them.

        Args:
          settings: the `H'` settings that the block holds.
          start: the block's first update.
          metrics: each `[H', S, U']`, `env_steps` among them: those of one update.
        """
        if self._thread.is_alive():
            self._queue.put(Block(settings, start, metrics))

    def finish(self, summary: Mapping[str, Any], curves: Path | None = None) -> None:
        """Logs summary and picture to every run, ends them, and waits for as long as something moves.

        Args:
          summary: that of summary.json. A run gets the entry of its own setting, its own seed's number (`final`) in
            place of a list over seeds (`finals`), and what is common to all.
          curves: a picture to show with every run.
        """
        if not self._thread.is_alive():
            return
        self._queue.put(End(summary, curves))
        self._progress = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if time.monotonic() - self._progress > PATIENCE_SECONDS:
                self._say_once("wait", f"gave up waiting; `wandb sync {self._out}/wandb/*run-*` sends what is missing")
                return

    def _work(self) -> None:
        """The thread: opens the runs, logs blocks as they come, ends the runs."""
        try:
            import wandb

            # Silent for the process and not only for each run: else a missing key makes a terminal prompt for one.
            wandb.setup(wandb.Settings(silent=True, mode=self._mode))
            for member in self._members:
                self._open(member)
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
                sync = f"`wandb sync {self._out}/wandb/offline-run-*` sends the files"
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
            settings=wandb.Settings(  # new for each run: `init` writes into it
                silent=True,
                console="off",
                disable_git=True,
                x_save_requirements=False,  # reading them takes most of the time to open a run
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                reinit="create_new",
            ),
        )
        run.define_metric("env_steps")
        run.define_metric("*", step_metric="env_steps")
        return run

    def _log(self, block: Block) -> None:
        settings = list(block.settings)
        num_env_steps = np.nan_to_num(block.metrics["env_steps"].astype(np.float64)).astype(np.int64)  # [H', S, U']
        totals = self._env_steps[settings][:, :, None] + np.cumsum(num_env_steps, axis=-1)
        self._env_steps[settings] = totals[:, :, -1]
        active = np.asarray(num_env_steps > 0)
        if self._members[0].seed is None:
            columns = columns_over_seeds(block.metrics, active, totals)
            active = active.any(axis=1, keepdims=True)
        else:
            columns = dict(block.metrics) | {"env_steps": totals}
        lists = {name: nested_lists(value + 0) for name, value in columns.items()}  # + 0: W&B plots no booleans
        for i, setting in enumerate(block.settings):
            for s in range(active.shape[1]):
                member = Member(setting, None if self._members[0].seed is None else s)
                for u in np.flatnonzero(active[i, s]):
                    row = {name: value[i][s][u] for name, value in lists.items() if value[i][s][u] is not None}
                    self._send(member, row | {"update": block.start + int(u)})

    def _send(self, member: Member, row: dict[str, Any]) -> None:
        if member in self._runs:
            try:
                self._runs[member].log(row)
            except Exception as error:
                self._say_once("log", f"a row was not logged ({reason(error)}); training goes on")
        self._progress = time.monotonic()

    def _end(self, end: End) -> None:
        """Gives every run its summary and picture, and ends them side by side."""
        runs = queue.SimpleQueue()
        for member, run in self._runs.items():
            runs.put((member, run))

        def finish_runs() -> None:
            while True:
                try:
                    member, run = runs.get_nowait()
                except queue.Empty:
                    return
                try:
                    self._close(member, run, end)
                except Exception as error:
                    self._say_once("finish", f"a run did not end well ({reason(error)})")
                self._progress = time.monotonic()

        finishers = [threading.Thread(target=finish_runs, daemon=True) for _ in range(NUM_FINISHERS)]
        for thread in finishers:
            thread.start()
        for thread in finishers:
            thread.join()

    def _close(self, member: Member, run: Any, end: End) -> None:
        import wandb

        try:
            if end.curves is not None and end.curves.exists():
                run.log({"curves": wandb.Image(str(end.curves))})
            run.summary.update(plain(member_summary(end.summary, member)))
        finally:
            run.finish()

    def _say_once(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            say(f"wandb: {line}")


def columns_over_seeds(
    metrics: Mapping[str, np.ndarray], active: np.ndarray, totals: np.ndarray
) -> dict[str, np.ndarray]:
    """A setting's rows: each metric's mean over active seeds by its own name, the interval under `lo/` and `hi/`.

    Args:
      metrics: each `[H', S, U']`.
      active: `[H', S, U']` whether the member still made this update.
      totals: `[H', S, U']` environment steps so far. Their mean is over all seeds, those that have stopped too: it
        must not go back when one stops.
    Returns:
      each `[H', 1, U']`.
    """
    columns = {"env_steps": totals.mean(axis=1, keepdims=True).round().astype(np.int64)}
    for name, value in metrics.items():
        if name != "env_steps":
            mean, lo, hi = mean_interval(np.where(active, value, np.nan), axis=1)
            for key, column in ((name, mean), (f"lo/{name}", lo), (f"hi/{name}", hi)):
                columns[key] = column[:, None].astype(np.float32)
    return columns


def member_config(config: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with a setting's hyperparameters on top, and in the section that has an entry of that name."""

    def replace(section: Any) -> Any:
        if not isinstance(section, Mapping):
            return section
        return {name: hyperparameters.get(name, entry) for name, entry in section.items()}

    return {name: replace(section) for name, section in config.items()} | dict(hyperparameters)


def member_summary(summary: Mapping[str, Any], member: Member) -> dict[str, Any]:
    """What is common to all runs, and the entry of the member's setting; of a list over seeds, the member's number."""
    own = {name: value for name, value in summary.items() if name != "settings"}
    settings = summary.get("settings", ())
    for name, value in settings[member.setting].items() if settings else ():
        if name.startswith("finals") and member.seed is not None:
            own[name.replace("finals", "final", 1)] = value[member.seed]
        elif name != "hyperparameters":
            own[name] = value
    return own
