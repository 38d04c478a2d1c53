"""Carries out a plan: trains its jobs in order, records them, and returns the results."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from purepg.run import processes
from purepg.run.console import Progress, say
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.config import changed_devices, changed_versions, refuse_differences, shared
from purepg.run.folder.files import CURVES, HEATMAP, PARALLEL, SEARCH, RecordError, write_whole
from purepg.run.folder.log import Logged, chunk_metrics, covered
from purepg.run.folder.record import Record
from purepg.run.loop import (
    HostMetrics,
    Interrupt,
    Job,
    Outcome,
    Saved,
    Saving,
    ctrl_c_finishes_the_block,
    run_job,
)
from purepg.run.memory import forecast
from purepg.run.outside_population import OutsidePopulation
from purepg.run.plan import Plan, describe
from purepg.run.population import Population
from purepg.run.processes import agreed, by_first
from purepg.run.results import Results
from purepg.run.summary import Part, collapsed, diverged, joined, summarize
from purepg.run.sweep import Chunk
from purepg.run.watch.heatmap import heatmap_figure
from purepg.run.watch.sink import WandbSink

PICTURES = CURVES, HEATMAP, SEARCH, PARALLEL


def launch(plan: Plan, name: str) -> Results:
    """Trains, evaluates and records the whole population. Without `plan.run.out`, it writes nothing.

    Args:
      name: the run's name in titles.
    Raises:
      UsageError: the folder cannot be written. RecordError: the disk is full at the start.
    """
    results = _launched(plan, name)
    results.lost[:] = agreed(results.lost)
    return results


def _launched(plan: Plan, name: str) -> Results:
    out = plan.run.out
    if out and processes.number() > 1:
        processes.refuse_differences(shared(describe(plan, name)))
        processes.refuse_unshared(out)
    with ctrl_c_finishes_the_block() as interrupt:
        if out is None:
            plan, jobs = fit(plan)
            return _Session(plan, name, interrupt).run(jobs)
        if plan.stored:
            return _resume(plan, out, name, interrupt)
        with _of_first(lambda: Record.open(out, plan.run.overwrite)) as record:
            plan, jobs = fit(plan, lambda plan: by_first(lambda: record and record.write_config(describe(plan, name))))
            return _Session(plan, name, interrupt, record).run(jobs)


def _of_first(open_record: Callable[[], Record]) -> contextlib.AbstractContextManager[Record | None]:
    """The run's record, which the first of its processes alone has."""
    return by_first(open_record) or contextlib.nullcontext()


def fit(plan: Plan, write_config: Callable[[Plan], None] = lambda plan: None) -> tuple[Plan, list[Job]]:
    """Reports how much memory the population needs, and splits it into smaller chunks if that exceeds what is free.

    Args:
      write_config: called before anything compiles, so that a run killed during compilation can be resumed; called
        again if the population is split.
    Returns:
      (plan, jobs): `max_parallel` is set in the plan if the population was split.
    """
    write_config(plan)
    jobs = _jobs(plan)
    for job in {id(job.population): job for job in reversed(jobs)}.values():
        members, lengths = job.chunk.members, job.chunk.block_lengths(plan.run.log_every)
        job.population.start_compiling(members, *lengths)
        found = forecast(job.population.memory(members, lengths[0]), job.population.num_members)
        fitting = min(processes.gathered(found.fit))
        if fitting < job.population.num_members:
            say(f"{found.line}: training {fitting} at a time")
            return fit(replace(plan, run=replace(plan.run, max_parallel=fitting)), write_config)
        say(found.line)
    return plan, jobs


def _jobs(plan: Plan) -> list[Job]:
    """One job for each of the plan's chunks; chunks of one program and shape share a population."""
    made: dict[Any, Population] = {}
    jobs = []
    for i, chunk in enumerate(plan.chunks):
        key = chunk.program, chunk.shape
        made[key] = made.get(key) or (OutsidePopulation if plan.env.outside else Population)(plan, *key)
        jobs.append(Job(i, chunk, made[key]))
    return jobs


def _resume(plan: Plan, out: Path, name: str, interrupt: Interrupt) -> Results:
    """Resumes the run in the folder. Everything is read, and unreadable files are reported, before any write."""
    assert plan.stored
    config = describe(plan, name)
    refuse_differences(out, plan.stored, config)
    for change in changed_versions(plan.stored, config) + changed_devices(plan.stored, config):
        say(f"{change}: the result may differ in its last bits from that of a run that was never stopped")
    if plan.env.outside:
        say(f"{plan.env.name} is not JAX: its environments begin anew, so the result differs from an unstopped run's")
    jobs = _jobs(plan)
    opened = [Checkpoints(out, job.number) for job in jobs]
    updates = agreed([checkpoints.latest() or 0 for checkpoints in opened])
    logged = covered(out, [job.chunk for job in jobs], updates)
    jobs = [job._replace(saved=_saved(out, job, logged, opened[job.number], updates[job.number])) for job in jobs]
    for job, checkpoints in zip(jobs, opened, strict=True):
        if job.saved:
            checkpoints.restore(job.saved.update, job.population.abstract_state(job.chunk.members))
    with _of_first(lambda: Record.reopen(out, logged.num_bytes, keep_wandb=plan.run.wandb == "disabled")) as record:
        by_first(lambda: record and record.write_config(config))
        return _Session(plan, name, interrupt, record).run(jobs, logged)


def _saved(out: Path, job: Job, logged: Logged, checkpoints: Checkpoints, update: int) -> Saved | None:
    """The checkpoint from which a job resumes; None if it starts from the beginning."""
    if update == 0:
        return None
    facts = checkpoints.facts(update)
    metrics = chunk_metrics(out, logged, job.number, job.chunk.shape, update, facts["dtypes"])
    return Saved(update, metrics, facts["run_seconds"], facts["total_steps"], facts["spent"])


class _Session:
    """A run in progress: it logs metrics to every sink and collects the errors of failed writes."""

    def __init__(self, plan: Plan, name: str, interrupt: Interrupt, record: Record | None = None):
        run = plan.run
        self._plan, self._interrupt, self._record = plan, interrupt, record
        self._name = name
        self._lost: list[str] = []
        self._progress = Progress(run.total_steps * len(plan.settings) * run.num_seeds)
        self._wandb = None
        if record:
            hyperparameters = [setting.hyperparameters for setting in plan.settings]
            group, seeds = run.wandb_group or record.folder.name, list(range(run.num_seeds))
            to = run.wandb, run.wandb_per, run.wandb_project, group, record.folder, record.config
            self._wandb = WandbSink(*to, hyperparameters, seeds, run.log_every or 1)

    def run(self, jobs: Sequence[Job], logged: Logged | None = None) -> Results:
        """Trains, evaluates and records the jobs that have no outcome yet."""
        summary: dict[str, Any] = {}
        plan, run, record = self._plan, self._plan.run, self._record
        try:
            self._log_again(jobs, logged or Logged())
            parts = self._train(jobs)
            metrics, num_updates = joined(parts, len(plan.settings), run.num_seeds)
            summary = summarize(plan.settings, parts, metrics, num_updates, self._interrupt.requested)
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

    def _show(self, chunk: Chunk, start: int, metrics: HostMetrics) -> None:
        if self._wandb:
            self._wandb.log_block(chunk.settings, start, metrics, chunk.seeds)
        self._progress.update(start, metrics)

    def _log_again(self, jobs: Sequence[Job], logged: Logged) -> None:
        """Sends a resumed run's logged blocks to W&B again, because a kill may have left W&B's own files incomplete."""
        for block in logged.blocks:
            job = jobs[block.chunk]
            assert job.saved  # only blocks that a checkpoint covers are in `logged`
            metrics = {name: x[..., block.start : block.end] for name, x in job.saved.metrics.items()}
            self._show(job.chunk, block.start, metrics)

    def _train(self, jobs: Sequence[Job]) -> list[Part]:
        """Trains the jobs in order. Ctrl-C or a full disk ends it early, but at least one job gets an outcome."""
        parts: list[Part] = []
        for job in jobs:
            self._interrupt.agree()
            ending = self._interrupt.requested and bool(parts)
            outcome = self._known_outcome(job, ending)
            if outcome is None and not ending:
                outcome = self._outcome(job, first=not parts)
            if outcome is None:
                continue
            if len(jobs) > 1:  # they were divided because a device cannot hold them all
                outcome = outcome._replace(state=jax.device_get(outcome.state))
            parts.append(Part(job.chunk, outcome))
            self._say_what_went_wrong(parts[-1])
        self._interrupt.agree()
        return parts

    def _known_outcome(self, job: Job, ending: bool) -> Outcome | None:
        """The stored outcome of a job that had finished before the resume or, if `ending`, had been evaluated."""
        saved, out = job.saved, self._plan.run.out
        evaluation = Checkpoints(out, job.number).evaluation(saved.update) if saved and out else None
        known = agreed(evaluation is not None)
        if not saved or not evaluation or not known or not (ending or saved.total_steps == self._plan.run.total_steps):
            return None
        return Outcome(saved.metrics, **evaluation, compile_seconds=0.0, run_seconds=saved.run_seconds)

    def _outcome(self, job: Job, first: bool) -> Outcome | None:
        """Trains a job. If its folder cannot be written, returns None, or raises if the job is the first."""
        env, run = self._plan.env, self._plan.run
        if not run.out:
            return run_job(job, env, run.log_every, self._log, self._interrupt)
        try:
            checkpoints = Checkpoints(run.out, job.number, run.keep)
        except RecordError as error:
            if first:
                raise
            self._failed(error)
            return None
        saving = Saving(checkpoints, run.checkpoint_every, self._failed)
        outcome = run_job(job, env, run.log_every, self._log, self._interrupt, saving)
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
                say(
                    f"{label}, seed {seed}: parameters became non-finite at update {update}; frozen as they were "
                    "before it"
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
    """What draws each file: the learning curves, and a search's fields, or a heat map of another sweep over two fields."""
    settings = results.summary["settings"]
    if results.plan.run.search:
        return {CURVES: results.plot, SEARCH: results.plot_search, PARALLEL: results.plot_parallel}
    if len(settings[0]["hyperparameters"]) == 2:
        return {CURVES: results.plot, HEATMAP: lambda: heatmap_figure(settings, results.title)}
    return {CURVES: results.plot}


def write_picture(file: Path, draw: Callable[[], Any]) -> None:
    """Writes a figure. Raises RecordError if the file could not be written."""
    figure = draw()
    write_whole(file, lambda opened: figure.savefig(opened, format="png"))
