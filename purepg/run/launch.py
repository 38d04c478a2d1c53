"""From a plan to its results: the order in which everything on the host happens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from purepg.run.checkpoint import Checkpoints
from purepg.run.loop import Interrupt, Outcome, Progress, Saved, Saving, ctrl_c_finishes_the_block, run_chunk
from purepg.run.memory import forecast
from purepg.run.plan import Plan, describe
from purepg.run.population import Chunk, Group, Population, Setting, block_lengths
from purepg.run.record import CURVES, HEATMAP, Record, RecordError, new_folder, say, setting_label
from purepg.run.resume import Logged, changed_versions, chunk_metrics, covered, refuse_differences
from purepg.run.summary import Part, add_responses, assemble, collapsed, diverged, summarize
from purepg.run.watch.curves import curves_figure
from purepg.run.watch.heatmap import heatmap_figure
from purepg.run.watch.sink import WandbSink


class Results(NamedTuple):
    """What is left of a run."""

    summary: dict[str, Any]  # the contents of summary.json
    out: Path
    lost: list[str]  # what could not be written, a line each


def launch(plan: Plan, script: str) -> Results:
    """Trains, evaluates and records the whole population.

    Raises:
      UsageError: the folder cannot be written. RecordError: it is full from the start.
    """
    out = plan.run.out or new_folder(script)
    with ctrl_c_finishes_the_block() as interrupt:
        if plan.stored:
            return _go_on(plan, plan.stored, out, script, interrupt)
        with Record.open(out, plan.run.overwrite) as record:
            record.write_config(describe(plan, script))  # before it compiles: what is killed then can be resumed
            plan, populations = fit(plan)
            nothing: list[Saved | None] = [None] * len(populations)
            config = describe(plan, script)
            return _run(plan, out, script, config, populations, Logged(0, []), nothing, record, interrupt)


def _go_on(plan: Plan, stored: Mapping[str, Any], out: Path, script: str, interrupt: Interrupt) -> Results:
    """The same for a run that was begun before. What cannot be read is found before anything is written."""
    config, order = describe(plan, script), plan.order
    refuse_differences(out, stored, config)
    for change in changed_versions(stored, config):
        say(f"{change}: the result may differ in its last bits from that of a run that was never stopped")
    updates = [Checkpoints(out, i).latest() or 0 for i in range(len(order))]
    logged = covered(out, order, updates)
    saved = [_saved(out, i, order[i][1], logged, updates[i]) for i in range(len(order))]
    populations = _populations(plan)
    for i, (before, population) in enumerate(zip(saved, populations, strict=True)):
        if before:
            abstract = population.abstract_state(population.members(order[i][1]))
            Checkpoints(out, i).restore(before.update, abstract)
    with Record.reopen(out, logged.num_bytes, keep_wandb=plan.run.wandb == "disabled") as record:
        return _run(plan, out, script, config, populations, logged, saved, record, interrupt)


def _populations(plan: Plan) -> list[Population]:
    """What trains each chunk: one for all of a group that have one shape."""
    made: dict[Any, Population] = {}
    for group, chunk in plan.order:
        if (group.settings, chunk.shape) not in made:
            made[group.settings, chunk.shape] = plan.population(group, chunk.shape)
    return [made[group.settings, chunk.shape] for group, chunk in plan.order]


def fit(plan: Plan) -> tuple[Plan, list[Population]]:
    """Says how much memory the population takes, and trains it in smaller parts where that is more than is free.

    Returns:
      (plan, populations): the plan, with `max_parallel` set where it had to be, and what trains each of its chunks.
    """
    populations = _populations(plan)
    first = {id(population): i for i, population in reversed(list(enumerate(populations)))}
    for i in sorted(first.values()):
        (group, chunk), population = plan.order[i], populations[i]
        members, lengths = population.members(chunk), block_lengths(group, plan.run.log_every)
        population.start_compiling(members, *lengths)
        found = forecast(population.memory(members, lengths[0]), population.num_members)
        if found.fit < population.num_members:
            say(f"{found.line}: training {found.fit} at a time")
            return fit(replace(plan, run=replace(plan.run, max_parallel=found.fit)))
        say(found.line)
    return plan, populations


def _run(
    plan: Plan,
    out: Path,
    script: str,
    config: dict[str, Any],
    populations: list[Population],
    logged: Logged,
    saved: list[Saved | None],
    record: Record,
    interrupt: Interrupt,
) -> Results:
    """Trains, evaluates and records what is left to do."""
    run, order = plan.run, plan.order
    record.write_config(config)
    hyperparameters = [setting.hyperparameters for setting in plan.settings]
    labels = [setting_label(h) or script for h in hyperparameters]
    group, seeds = run.wandb_group or out.name, list(range(run.num_seeds))
    every = run.log_every or 1
    wandb = WandbSink(run.wandb, run.wandb_per, run.wandb_project, group, out, config, hyperparameters, seeds, every)
    title = f"{script} on {run.env}"
    summary: dict[str, Any] = {}
    lost: list[str] = []
    try:
        parts, interrupted = _train(plan, out, order, populations, logged, saved, record, wandb, lost, interrupt)
        metrics, num_updates = assemble(parts, len(plan.settings), run.num_seeds)
        summary = summarize(plan.settings, parts, metrics, num_updates, interrupted)
        if plan.env.task:
            add_responses(summary, plan.env.task, parts)
        for write in (
            lambda: record.write_summary(summary),  # the smallest first, where a disk is nearly full
            lambda: record.write(CURVES, lambda f: curves_figure(metrics, labels, title).savefig(f, format="png")),
            *_heatmap(record, summary, title),
            lambda: record.write_metrics(metrics, num_updates),
        ):
            try:
                write()
            except RecordError as error:
                lost.append(str(error))
    finally:  # W&B keeps what it was given, whatever went wrong here
        wandb.finish(summary, [out / name for name in (CURVES, HEATMAP)])
    return Results(summary, out, lost)


def _heatmap(record: Record, summary: dict[str, Any], title: str) -> list[Callable[[], None]]:
    """What writes the heat map of a sweep of two fields, and nothing after another sweep."""
    settings = summary["settings"]
    if len(settings[0]["hyperparameters"]) != 2:
        return []
    return [lambda: record.write(HEATMAP, lambda f: heatmap_figure(settings, title).savefig(f, format="png"))]


def _saved(out: Path, i: int, chunk: Chunk, logged: Logged, update: int) -> Saved | None:
    """What chunk `i` goes on from; None: from the start."""
    if update == 0:
        return None
    facts = Checkpoints(out, i).facts(update)
    metrics = chunk_metrics(out, logged, i, chunk.shape, update, facts["dtypes"])
    return Saved(update, metrics, facts["run_seconds"], facts["total_steps"], facts["spent"])


def _train(
    plan: Plan,
    out: Path,
    order: list[tuple[Group, Chunk]],
    populations: list[Population],
    logged: Logged,
    saved: list[Saved | None],
    record: Record,
    wandb: WandbSink,
    lost: list[str],
    interrupt: Interrupt,
) -> tuple[list[Part], bool]:
    """Trains chunk after chunk; true where Ctrl-C, or a disk that is full, ended it early."""
    run = plan.run
    parts: list[Part] = []
    progress = Progress(run.total_steps * len(plan.settings) * run.num_seeds)

    def failed(error: RecordError) -> None:
        interrupt.requested = True
        if str(error) in lost:
            return
        lost.append(str(error))
        say(f"{error}; ending the run with what it has")

    for block in logged.blocks:  # W&B records it anew, whatever a kill has left of its files
        (group, chunk), before = order[block.chunk], saved[block.chunk]
        assert before  # it covers the block
        metrics = {name: x[..., block.start : block.end] for name, x in before.metrics.items()}
        settings, seeds = chunk.members(group)
        for sink in (wandb.log_block, progress):
            sink(settings, block.start, metrics, seeds)
    for i, ((group, chunk), population, before) in enumerate(zip(order, populations, saved, strict=True)):
        evaluation = Checkpoints(out, i).evaluation(before.update) if before else None
        is_over = before is not None and before.total_steps == run.total_steps
        if before and evaluation and (is_over or (interrupt.requested and parts)):
            outcome = Outcome(before.metrics, **evaluation, compile_seconds=0.0, run_seconds=before.run_seconds)
        elif interrupt.requested and parts:
            continue
        else:
            try:
                checkpoints = Checkpoints(out, i, run.keep)
            except RecordError as error:
                if not parts:
                    raise
                failed(error)
                continue
            outcome = run_chunk(
                population,
                group,
                chunk,
                run.log_every,
                [record.append_block, wandb.log_block, progress],
                interrupt,
                saving=Saving(checkpoints, run.checkpoint_every, failed, plan.start_digest),
                saved=before,
            )
            try:
                checkpoints.close()
            except RecordError as error:
                failed(error)
        parts.append(Part(group, chunk, outcome))
        _say_divergence(plan.settings, parts[-1])
        if plan.env.task:
            _say_collapse(plan.settings, parts[-1])
    progress.close()
    return parts, interrupt.requested


def _say_divergence(settings: Sequence[Setting], part: Part) -> None:
    for row, h in enumerate(part.group.settings[part.chunk.settings]):
        for member in diverged(part.outcome.metrics["finite"][row]):
            label = setting_label(settings[h].hyperparameters) or "the only setting"
            say(
                f"{label}, seed {part.chunk.seeds.start + member['seed']}: parameters became non-finite at update "
                f"{member['update']}; frozen as they were before it"
            )


def _say_collapse(settings: Sequence[Setting], part: Part) -> None:
    for row, h in enumerate(part.group.settings[part.chunk.settings]):
        for line in collapsed({name: x[row] for name, x in part.outcome.metrics.items()}):
            say(f"{setting_label(settings[h].hyperparameters) or 'the only setting'}: {line}")
