"""Weights & Biases beside the training, which neither waits for it nor fails with it.

A thread of its own opens the runs and logs to them: opening sixteen takes more than a second offline, and the time-out
of a dead network online. `log_block` only queues arrays. Each kind of failure is said once, and training goes on.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purepg.run.console import reason, say
from purepg.run.folder.files import plain
from purepg.run.watch.members import Member, Per, member_summary, name_and_config
from purepg.run.watch.opening import Mode, open_run, set_up, sync
from purepg.run.watch.rows import Row, Rows

PATIENCE_SECONDS = 60  # `finish` gives up once nothing has happened for this long
NUM_FINISHERS = 16  # runs that end at the same time


@dataclass(eq=False)
class WandbSink:
    """Logs a population to W&B: a run per setting and seed, or per setting with mean and 95 % interval over seeds.

    Args:
      mode: "online" falls back to offline where there is no key or no network; `wandb sync` uploads such runs later.
      per: one W&B run per "seed" (of each setting) or per "setting".
      out: an existing folder. W&B's files are in its `wandb`.
      config: the experiment's config, in which each run replaces the values of its own hyperparameters.
      hyperparameters: per setting, name to value. May be replaced by a longer one before a block of the new settings.
      seeds: `[S]` the numbers by which the seeds are named.
      every: updates per row. W&B takes a third of a millisecond per row, in which a small agent makes several updates.
    """

    mode: Mode
    per: Per
    project: str
    group: str
    out: Path
    config: Mapping[str, Any]
    hyperparameters: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    every: int = 1

    def __post_init__(self):
        self._rows = Rows(self.per, len(self.seeds), self.every)
        self._runs: dict[Member, Any] = {}
        self._said: set[str] = set()
        self._say_lock = threading.Lock()
        self._blocks: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()  # None: the end
        self._progress = time.monotonic()
        # A daemon thread: a dead network must not keep alive a process that ends without `finish`.
        self._thread = threading.Thread(target=self._work, name="wandb-sink", daemon=True)
        if self.mode != "disabled":
            self._thread.start()

    def log_block(
        self, settings: Sequence[int], start: int, metrics: Mapping[str, np.ndarray], seeds: Sequence[int] | None = None
    ) -> None:
        """Queues a block of `metrics [H', S', U']`, with the `env_steps` of every update, and returns at once.

        The arrays are read later, so they must not be written to.

        Args:
          settings, seeds: the positions of the block's members in the population; None: all seeds.
          start: the block's first update.
        """
        if self._thread.is_alive():
            self._blocks.put((settings, range(len(self.seeds)) if seeds is None else seeds, start, metrics))

    def log_samples(
        self, settings: Sequence[int], seeds: Sequence[int], updates: np.ndarray, samples: Sequence
    ) -> None:
        """Queues a table of an evaluation's samples `[H'][S'][n]`, dicts, for runs of one seed, and returns at once."""
        if self._thread.is_alive() and self.per == "seed":
            self._blocks.put((settings, seeds, updates, samples))

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[Path] = ()) -> None:
        """Gives every run its part of the summary and the pictures, ends it, and waits while there is progress.

        Args:
          summary: the contents of summary.json.
          pictures: shown with every run under their files' names. Files that do not exist are left out.
        """
        if not self._thread.is_alive():
            return
        self._shown = summary, pictures
        self._blocks.put(None)
        self._progress = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.1)
            if time.monotonic() - self._progress > PATIENCE_SECONDS:
                self._say_once("finish", f"gave up waiting; {sync(self.out, '*run-*')} sends what is missing")
                return

    def _work(self) -> None:
        """The thread: opens the runs, logs blocks as they come, and ends the runs."""
        with self._saying("work", "stopped"):
            set_up(self.mode)
            num_open = self._open_from(0)
            while block := self._blocks.get():
                num_open = self._open_from(num_open)
                if isinstance(block[-1], Mapping):
                    self._log(self._rows.of_block(*block))
                else:
                    self._log(_tables(*block))
            self._log(self._rows.rest())
            self._end()

    def _open_from(self, first: int) -> int:
        """Opens the runs of the settings from number `first` on, and returns the number of settings."""
        known = len(self.hyperparameters)
        for h in range(first, known):
            for s in range(len(self.seeds)) if self.per == "seed" else [None]:
                self._open(Member(h, s))
        return known

    def _open(self, member: Member) -> None:
        name, config = name_and_config(member, self.config, self.hyperparameters[member.setting], self.seeds)
        mode, self.mode = self.mode, "offline"  # where going online fails, each later run would wait for the time-out
        with self._saying("open", "cannot open a run"):
            place: Any = {"project": self.project, "group": self.group, "config": plain(config)}
            run, self.mode = open_run(mode, self.out, name, lambda line: self._say_once("online", line), **place)
            run.define_metric("env_steps")
            run.define_metric("*", step_metric="env_steps")
            self._runs[member] = run

    def _log(self, rows: Iterable[tuple[Member, Row]]) -> None:
        for member, row in rows:
            if member in self._runs:
                with self._saying("log", "a row was not logged"):
                    self._runs[member].log(row)

    def _end(self) -> None:
        """Gives every run its summary and pictures. Ends the runs in parallel, as each waits for its own upload."""
        missing = f"{sync(self.out, '*run-*')} sends what is missing"
        runs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for member, run in self._runs.items():
            with self._saying("finish", "a run did not end well", missing):
                _show(run, member, *self._shown)  # in one thread: PIL's import fails in many
            runs.put(run)

        def finish_runs() -> None:
            with contextlib.suppress(queue.Empty):
                while True:
                    run = runs.get_nowait()
                    with self._saying("finish", "a run did not end well", missing):
                        run.finish()

        finishers = [threading.Thread(target=finish_runs, daemon=True) for _ in range(NUM_FINISHERS)]
        for thread in finishers:
            thread.start()
        for thread in finishers:
            thread.join()

    @contextlib.contextmanager
    def _saying(self, kind: str, what: str, remedy: str = "training goes on without it") -> Iterator[None]:
        """Goes on after a failure, and says the first of its kind."""
        try:
            yield
        except Exception as error:
            self._say_once(kind, f"{what} ({reason(error)}); {remedy}")
        self._progress = time.monotonic()

    def _say_once(self, kind: str, line: str) -> None:
        with self._say_lock:
            if kind not in self._said:
                self._said.add(kind)
                say(f"wandb: {line}")


def _tables(
    settings: Sequence[int], seeds: Sequence[int], updates: np.ndarray, samples: Sequence
) -> Iterator[tuple[Member, Row]]:
    """A row for each agent, with a table of what it answered."""
    for setting, of_setting, row in zip(settings, samples, updates, strict=True):
        for seed, of_seed, update in zip(seeds, of_setting, row, strict=True):
            yield Member(setting, seed), {"samples": _table(of_seed), "update": int(update)}


def _table(responses: Sequence[Mapping[str, Any]]) -> Any:
    import wandb

    return wandb.Table(columns=list(responses[0]), data=[list(response.values()) for response in responses])


def _show(run: Any, member: Member, summary: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """Gives a run its summary, its pictures and, for one seed, what it answered to prompts."""
    import wandb

    own = member_summary(member, summary)
    responses = own.pop("responses", None)
    run.summary.update(plain(own))
    if responses and member.seed is not None:
        run.log({"responses": _table(responses)})
    images = {path.stem: wandb.Image(str(path)) for path in pictures if path.exists()}
    if images:
        run.log(images)
