"""A run in progress: its rounds are trained, logged to every sink, evaluated and recorded."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from purepg.run import processes
from purepg.run.console import Progress, say
from purepg.run.description import describe
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.files import CURVES, HEATMAP, LINEAGE, PARALLEL, SEARCH, RecordError, write_whole
from purepg.run.folder.log import Logged
from purepg.run.folder.record import Record
from purepg.run.lineage import best_members, of_repetitions
from purepg.run.loop import HostMetrics, Interrupt, Job, Outcome, Saved, Saving, run_job
from purepg.run.outside import not_jax
from purepg.run.outside_population import OutsidePopulation
from purepg.run.plan import Plan
from purepg.run.population import Population
from purepg.run.processes import agreed, by_first
from purepg.run.results import Results
from purepg.run.rounds import Round, after, all_steps, carried, iqms, rounds
from purepg.run.summary import Found, Part, collapsed, diverged, joined, summarize
from purepg.run.sweep import Chunk
from purepg.run.text.config import TextRunConfig
from purepg.run.text.population import TextPopulation
from purepg.run.text.utilisation import utilisation
from purepg.run.watch.heatmap import heatmap_figure
from purepg.run.watch.sink import WandbSink
from purepg.types import Env, State

PICTURES = CURVES, HEATMAP, SEARCH, PARALLEL, LINEAGE


class Jobs:
    """Makes a run's jobs. Chunks of one program and shape share a population, in all rounds."""

    def __init__(self):
        self._made: dict[Any, Population] = {}

    def of(self, todo: Round, first: int = 0) -> list[Job]:
        """One job for each of a round's chunks, numbered from `first` on."""
        return [
            Job(i, chunk, self._trains(todo.plan, chunk), todo.total_steps)
            for i, chunk in enumerate(todo.chunks, first)
        ]

    def _trains(self, plan: Plan, chunk: Chunk) -> Population:
        key = chunk.program.static, chunk.shape
        if key not in self._made:
            self._made[key] = _kind(plan.env)(plan, chunk.program, chunk.shape)
        return self._made[key]


def _kind(env: Env) -> type[Population]:
    if not not_jax(env):
        return Population
    return OutsidePopulation if env.outside else TextPopulation


class Session:
    """A run in progress: it logs metrics to every sink and collects the errors of failed writes."""

    def __init__(self, plan: Plan, jobs: Jobs, name: str, interrupt: Interrupt, record: Record | None = None):
        run = plan.run
        self._plan, self._jobs, self._interrupt, self._record = plan, jobs, interrupt, record
        self._name = name
        self._lost: list[str] = []
        self._progress = Progress(all_steps(plan))
        self._wandb = None
        if record:
            hyperparameters = [setting.hyperparameters for setting in plan.settings]
            group, seeds = run.wandb_group or record.folder.name, list(range(run.num_seeds))
            to = run.wandb, run.wandb_per, run.wandb_project, group, record.folder, record.config
            self._wandb = WandbSink(*to, hyperparameters, seeds, run.log_every or 1)

    def run(self, saved: Sequence[Saved | None] = (), logged: Logged | None = None) -> Results:
        """Trains, evaluates and records all rounds, except for the jobs that have an outcome already.

        Args:
          saved: where the first jobs go on, in their order.
        """
        summary: dict[str, Any] = {}
        record = self._record
        try:
            parts, found = self._train_rounds(saved, logged or Logged())
            plan = self._plan
            metrics, num_updates = joined(parts, len(plan.settings), plan.run.num_seeds)
            summary = summarize(plan.settings, parts, metrics, num_updates, self._interrupt.requested, found)
            if isinstance(plan.run, TextRunConfig):
                summary |= utilisation(plan, metrics, summary["run_seconds"])
            if plan.tuning:
                best = best_members(metrics, plan.tuning.every)
                summary["pbt"] = of_repetitions(summary["settings"], best, metrics)
            results = Results(plan, self._name, metrics, num_updates, summary, parts, self._lost)
            if record:
                self._write(record, results)
            return results
        finally:  # close W&B even after an error, so that it keeps what was logged
            self._progress.close()
            if self._wandb and record:
                self._wandb.finish(summary, [record.folder / name for name in PICTURES])

    def _log(self, chunk: Chunk, start: int, metrics: HostMetrics) -> None:
        if self._record:
            self._record.append_block(chunk.settings, start, metrics, chunk.seeds)
        self._show(chunk, start, metrics)

    def _log_samples(self, chunk: Chunk, updates: np.ndarray, samples: list) -> None:
        try:
            if self._record:
                self._record.write_samples(chunk.settings, chunk.seeds, updates, samples)
        except RecordError as error:
            self._failed(error)
        if self._wandb:
            self._wandb.log_samples(chunk.settings, chunk.seeds, updates, samples)

    def _show(self, chunk: Chunk, start: int, metrics: HostMetrics) -> None:
        if self._wandb:
            self._wandb.log_block(chunk.settings, start, metrics, chunk.seeds)
        self._progress.update(start, metrics)

    def _log_again(self, jobs: Sequence[Job], logged: Logged) -> None:
        """Sends a resumed run's logged blocks to W&B again, because a kill may have left W&B's own files incomplete."""
        of = {job.number: job for job in jobs}
        for block in logged.blocks:
            if (job := of.get(block.chunk)) is None:
                continue
            assert job.saved  # only blocks that a checkpoint covers are in `logged`
            metrics = {name: x[..., block.start : block.end] for name, x in job.saved.metrics.items()}
            self._show(job.chunk, block.start, metrics)

    def _train_rounds(self, saved: Sequence[Saved | None], logged: Logged) -> tuple[list[Part], list[Found]]:
        """Trains round after round. Ctrl-C or a full disk ends it early, but at least one job gets an outcome."""
        parts: list[Part] = []
        found: list[Found] = []
        layout: list[list[Chunk]] = []
        known, order = dict(enumerate(saved)), rounds(self._plan)
        before: list[tuple[Job, Part]] = []
        todo: Round | None = next(order)
        while todo:
            jobs = [job._replace(saved=known.get(job.number)) for job in self._jobs.of(todo, sum(map(len, layout)))]
            layout.append([job.chunk for job in jobs])
            if len(layout) > 1:
                self._begin(todo, layout)
            self._log_again(jobs, logged)
            trained: list[tuple[Job, Part]] = []
            for job in jobs:
                if part := self._part(job, before if todo.goes_on else (), first=not parts, alone=len(jobs) == 1):
                    trained.append((job, part))
                    parts.append(part)
            self._interrupt.agree()
            iqm = iqms([(part.chunk, part.outcome.sampled) for _, part in trained], todo.settings)
            found.append(Found(todo.total_steps, list(todo.settings), iqm))
            ended = self._interrupt.requested or len(trained) < len(jobs)
            todo, before = None if ended else after(order, iqm), trained
        return parts, found

    def _begin(self, todo: Round, layout: Sequence[Sequence[Chunk]]) -> None:
        """Records what a later round is about to train."""
        self._plan = todo.plan

        def write_config() -> None:
            if record := self._record:
                started = record.config["started"]
                record.write_config(describe(todo.plan, self._name, layout) | {"started": started})

        by_first(write_config)
        if self._wandb:
            self._wandb.hyperparameters = [setting.hyperparameters for setting in todo.plan.settings]

    def _part(self, job: Job, before: Sequence[tuple[Job, Part]], first: bool, alone: bool) -> Part | None:
        """Trains a job, unless it has an outcome already; None if the run ends without one."""
        self._interrupt.agree()
        ending = self._interrupt.requested and not first
        job = self._going_on(job, before) if before and not ending else job
        outcome = self._known_outcome(job, ending)
        if outcome is None and not ending:
            outcome = self._outcome(job, first)
        if outcome is None:
            return None
        if not alone:  # the agents were divided because a device cannot hold them all
            outcome = outcome._replace(state=jax.device_get(outcome.state))
        self._say_what_went_wrong(part := Part(job.chunk, outcome))
        return part

    def _going_on(self, job: Job, before: Sequence[tuple[Job, Part]]) -> Job:
        """A job of agents that the round before has trained."""
        if job.saved is None:
            return job._replace(saved=carried(job.chunk, before, self._state))
        for name, x in carried(job.chunk, before).metrics.items():  # they are logged as those of other chunks
            job.saved.metrics[name][..., : x.shape[-1]] = x
        return job

    def _state(self, job: Job, part: Part) -> State:
        """The final state of a part."""
        if part.outcome.state is not None:
            return part.outcome.state
        assert self._plan.run.out  # otherwise no checkpoint would hold it
        checkpoints = Checkpoints(self._plan.run.out, job.number)
        return checkpoints.restore(agreed(checkpoints.latest() or 0), job.population.abstract_state(job.chunk.members))

    def _known_outcome(self, job: Job, ending: bool) -> Outcome | None:
        """The stored outcome of a job that had finished before the resume or, if `ending`, had been evaluated."""
        saved, out = job.saved, self._plan.run.out
        evaluation = Checkpoints(out, job.number).evaluation(saved.update) if saved and out else None
        known = agreed(evaluation is not None)
        if not saved or not evaluation or not known or not (ending or saved.total_steps == job.total_steps):
            return None
        return Outcome(saved.metrics, **evaluation, compile_seconds=0.0, run_seconds=saved.run_seconds)

    def _outcome(self, job: Job, first: bool) -> Outcome | None:
        """Trains a job. If its folder cannot be written, returns None, or raises if the job is the first."""
        env, run = self._plan.env, self._plan.run
        if not run.out:
            return run_job(job, env, run.log_every, self._log, self._interrupt, None, self._log_samples)
        try:
            checkpoints = Checkpoints(run.out, job.number, run.keep)
        except RecordError as error:
            if first:
                raise
            self._failed(error)
            return None
        saving = Saving(checkpoints, run.checkpoint_every, self._failed)
        outcome = run_job(job, env, run.log_every, self._log, self._interrupt, saving, self._log_samples)
        try:
            checkpoints.close()
        except RecordError as error:
            self._failed(error)
        return outcome

    def _failed(self, error: RecordError) -> None:
        if processes.number() > 1:  # the others wait for this process to save
            raise error
        self._interrupt.press()
        if str(error) not in self._lost:
            self._lost.append(str(error))
            say(f"{error}; ending the run with what it has")

    def _say_what_went_wrong(self, part: Part) -> None:
        """Prints a line for each agent that diverged and for each way in which language models collapsed."""
        for row, h in enumerate(part.chunk.settings):
            label = self._plan.settings[h].label or "the only setting"
            metrics = {name: x[row] for name, x in part.outcome.metrics.items()}
            for found in diverged(metrics["finite"]):
                seed, update = part.chunk.seeds[found["seed"]], found["update"]
                until = " until it copies another" if self._plan.tuning else ""
                say(
                    f"{label}, seed {seed}: parameters became non-finite at update {update}; frozen as they were "
                    f"before it{until}"
                )
            if self._plan.env.describe:
                for line in collapsed(metrics):
                    say(f"{label}: {line}")

    def _write(self, record: Record, results: Results) -> None:
        writes = [
            lambda: record.write_summary(results.summary),  # the smallest first, in case the disk is nearly full
            *(partial(write_picture, record.folder / name, draw) for name, draw in pictures(results).items()),
            lambda: record.write_metrics(results.metrics, results.num_updates),
        ]
        for write in writes:
            try:
                write()
            except RecordError as error:
                self._lost.append(str(error))


def pictures(results: Results) -> dict[str, Callable[[], Any]]:
    """What draws each file: learning curves, and the lineage of population-based training, or the fields of another
    search, or a heat map of another sweep over two."""
    settings = results.summary["settings"]
    if results.plan.tuning:
        return {CURVES: results.plot, LINEAGE: results.plot_lineage}
    if results.plan.run.search:
        return {CURVES: results.plot, SEARCH: results.plot_search, PARALLEL: results.plot_parallel}
    if len(settings[0]["hyperparameters"]) == 2:
        return {CURVES: results.plot, HEATMAP: lambda: heatmap_figure(settings, results.title)}
    return {CURVES: results.plot}


def write_picture(file: Path, draw: Callable[[], Any]) -> None:
    """Writes a figure. Raises RecordError if the file could not be written."""
    figure = draw()
    write_whole(file, lambda opened: figure.savefig(opened, format="png"))
