"""Carries out a plan: trains its jobs in order, records them, and returns the results."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from purepg.run import processes
from purepg.run.console import say
from purepg.run.description import describe
from purepg.run.folder.checkpoint import Checkpoints
from purepg.run.folder.config import changed_devices, changed_versions, refuse_differences, shared
from purepg.run.folder.log import Logged, chunk_metrics, covered
from purepg.run.folder.record import Record
from purepg.run.loop import Interrupt, Job, Saved, ctrl_c_finishes_the_block
from purepg.run.memory import forecast
from purepg.run.plan import Plan
from purepg.run.processes import agreed, by_first
from purepg.run.results import Results
from purepg.run.rounds import Round, after, iqms, rounds
from purepg.run.session import Jobs, Session


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
            return Session(*fit(plan), name, interrupt).run()
        if plan.stored:
            return _resume(plan, out, name, interrupt)
        with _of_first(lambda: Record.open(out, plan.run.overwrite)) as record:
            plan, jobs = fit(plan, lambda plan: by_first(lambda: record and record.write_config(describe(plan, name))))
            return Session(plan, jobs, name, interrupt, record).run()


def _of_first(open_record: Callable[[], Record]) -> contextlib.AbstractContextManager[Record | None]:
    """The run's record, which the first of its processes alone has."""
    return by_first(open_record) or contextlib.nullcontext()


def fit(plan: Plan, write_config: Callable[[Plan], None] = lambda plan: None) -> tuple[Plan, Jobs]:
    """Reports how much memory the first round needs, and splits it into smaller chunks if that exceeds what is free.

    Args:
      write_config: called before anything compiles, so that a run killed during compilation can be resumed; called
        again if the population is split.
    Returns:
      (plan, jobs): `max_parallel` is set in the plan if the population was split.
    """
    write_config(plan)
    jobs = Jobs()
    for job in {id(job.population): job for job in reversed(jobs.of(next(rounds(plan))))}.values():
        members, lengths = job.chunk.members, job.chunk.block_lengths(plan.run.log_every)
        job.population.start_compiling(members, *lengths)
        found = forecast(job.population.memory(members, lengths[0]), job.population.num_members)
        fitting = min(processes.gathered(found.fit))
        if fitting < job.population.num_members:
            say(f"{found.line}: training {fitting} at a time")
            return fit(replace(plan, run=replace(plan.run, max_parallel=fitting)), write_config)
        say(found.line)
    return plan, jobs


def _resume(plan: Plan, out: Path, name: str, interrupt: Interrupt) -> Results:
    """Resumes the run in the folder. Everything is read, and unreadable files are reported, before any write."""
    assert plan.stored
    config = describe(plan, name)
    refuse_differences(out, plan.stored, config)
    for change in changed_versions(plan.stored, config) + changed_devices(plan.stored, config):
        say(f"{change}: the result may differ in its last bits from that of a run that was never stopped")
    if plan.env.outside:
        say(f"{plan.env.name} is not JAX: its environments begin anew, so the result differs from an unstopped run's")
    made = Jobs()
    jobs = _begun(plan, made, out)
    opened = [Checkpoints(out, job.number) for job in jobs]
    updates = agreed([checkpoints.latest() or 0 for checkpoints in opened])
    logged = covered(out, [job.chunk for job in jobs], updates)
    saved = [_saved(out, job, logged, opened[job.number], updates[job.number]) for job in jobs]
    for job, point in zip(jobs, saved, strict=True):
        if point:
            opened[job.number].restore(point.update, job.population.abstract_state(job.chunk.members))
    with _of_first(lambda: Record.reopen(out, logged.num_bytes, keep_wandb=plan.run.wandb == "disabled")) as record:
        by_first(lambda: record and record.write_config(config))
        return Session(plan, made, name, interrupt, record).run(saved, logged)


def _begun(plan: Plan, made: Jobs, out: Path) -> list[Job]:
    """The jobs of all rounds that the run in a folder has begun."""
    jobs, order = [], rounds(plan)
    todo: Round | None = next(order)
    while todo:
        new = made.of(todo, len(jobs))
        jobs += new
        found = [(job.chunk, x) for job in new if (x := _returns(out, job)) is not None]
        todo = after(order, iqms(found, todo.settings)) if len(found) == len(new) else None
    return jobs


def _returns(out: Path, job: Job) -> np.ndarray | None:
    """The stored final evaluations of a job's agents, `[H, S]`; None if it has not finished."""
    checkpoints = Checkpoints(out, job.number)
    update, found = checkpoints.latest(), None
    if update is not None and checkpoints.facts(update)["total_steps"] == job.total_steps:
        found = checkpoints.evaluation(update)
    sampled: Any = agreed(found and found["sampled"].tolist())
    return None if sampled is None else np.array(sampled)


def _saved(out: Path, job: Job, logged: Logged, checkpoints: Checkpoints, update: int) -> Saved | None:
    """The checkpoint from which a job resumes; None if it starts from the beginning."""
    if update == 0:
        return None
    facts = checkpoints.facts(update)
    metrics = chunk_metrics(out, logged, job.number, job.chunk.shape, update, facts["dtypes"])
    return Saved(update, metrics, facts["run_seconds"], facts["total_steps"], facts["spent"])
