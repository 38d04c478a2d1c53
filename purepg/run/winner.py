"""The best setting of a search, trained again on fresh seeds. After population-based training it is a schedule: the
hyperparameters that the best member and its ancestors had, for agents that are trained alone.

The highest of many noisy values is above the true value of its setting. Seeds that had no part in the choice give an
unbiased value, which is what a report should say.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np

from purepg.run import processes
from purepg.run.console import say
from purepg.run.description import versions
from purepg.run.devices import shared_devices
from purepg.run.folder.config import read_config
from purepg.run.folder.files import BEST, SEARCH, SUMMARY, WINNER, RecordError, plain, write_json
from purepg.run.launch import launch
from purepg.run.lineage import schedule_of_best
from purepg.run.plan import Plan, RunConfig
from purepg.run.results import Results
from purepg.run.search import Sweep
from purepg.run.session import write_picture
from purepg.run.sweep import Configs, Setting, settings_at
from purepg.types import UsageError

LEAST = 10  # fresh seeds after a search
AWAY = 2**31  # between a run's seed and the fresh one, so that seeds near a run's own remain free for other runs


class Chosen(NamedTuple):
    """What is trained again."""

    number: int  # the position of its setting
    setting: Setting
    schedule: tuple[str, ...]
    said: str
    in_search: Mapping[str, Any]  # its statistics there; of a schedule, those of the best members


def with_winner(results: Results, prepared: Callable[[Configs, RunConfig, Sweep], Plan]) -> Results:
    """Trains what `_chosen` finds on fresh seeds, if the run asks for it and was not interrupted.

    Its folder is `winner/` in that of the run, where summary.json gets the entry `winner`, and best.json the arguments
    that repeat it. A resumed run resumes that of its winner, unless another has become the best.

    Args:
      prepared: checks configs, run and sweep, as `prepare` does.
    Returns:
      the results, with those of the winner.
    """
    plan, run = results.plan, results.plan.run
    # What was stopped early is not comparable.
    iqm = np.array([np.nan if "stopped_at" in x else x["iqm"] for x in results.summary["settings"]], float)
    number = num_fresh_seeds(run)
    if number == 0 or len(iqm) == 1 or results.interrupted or not np.isfinite(iqm).any():
        return results
    best = _chosen(results, iqm)
    fresh = replace(
        run,
        search=None,
        halve=None,
        first_rung=None,
        tpe=None,
        pbt=None,
        schedule=best.schedule,
        fresh_seeds=None,
        num_seeds=number,
        seed=fresh_seed(run.seed),
        eval_seed=fresh_seed(run.eval_seed),
        devices=run.devices if run.devices and number % run.devices == 0 else None,
    )
    repeated = replace(fresh, out=None, overwrite=False, resume=False)
    if run.out:
        resume = processes.agreed(run.resume and _holds(run, best))
        group = run.wandb_group or run.out.name
        fresh = replace(fresh, out=run.out / WINNER, resume=resume, overwrite=not resume, wandb_group=group)
    say(f"{best.said}, is trained again on {number} fresh seeds")
    try:
        sweep = {name: [value] for name, value in best.setting.hyperparameters.items()}
        found = launch(prepared(best.setting.configs, fresh, sweep), f"{results.name}, winner")
    except (RecordError, UsageError) as error:  # the results of the search stay
        if processes.number() > 1 and isinstance(error, RecordError):  # perhaps of this process alone
            raise
        results.lost.append(str(error))
        return results
    entry = {"setting": best.number, "seed": fresh.seed, **found.summary["settings"][0]}
    entry["in_search"] = {name: best.in_search[name] for name in ("iqm", "interval", "mean", "finals")}
    summary = results.summary | {"winner": entry, "interrupted": found.interrupted}
    results = replace(results, summary=summary, winner=found, lost=results.lost + found.lost)
    if run.out and processes.is_first():
        best_arguments = {
            "script": results.name,
            "run": asdict(repeated),
            **{name: asdict(config) for name, config in best.setting.configs.items()},
            "code": plan.code,
            "versions": versions(),
        }
        try:
            write_json(run.out / SUMMARY, summary)
            write_json(run.out / BEST, best_arguments)
            if run.search and not plan.tuning:
                write_picture(run.out / SEARCH, results.plot_search)  # which shows the winner too
        except RecordError as error:
            results.lost.append(str(error))
    results.lost[:] = processes.agreed(results.lost)
    return results


def _chosen(results: Results, iqm: np.ndarray) -> Chosen:
    """The setting with the highest IQM, or the schedule of the best of all members, by its training."""
    plan, summary = results.plan, results.summary
    if plan.tuning is None:
        h = int(np.nanargmax(iqm))
        setting, said = plan.settings[h], f"the best of {len(iqm)} settings, {plan.settings[h].label}"
        return Chosen(h, setting, plan.run.schedule, said, summary["settings"][h])
    s, h, schedule = schedule_of_best(results.metrics, plan.tuning.every)
    last = summary["pbt"]["hyperparameters"][s]
    (setting,) = settings_at(plan.settings[h].configs, list(last), [list(last.values())])
    setting, said = setting._replace(hyperparameters={}), f"the schedule of member {h}, the best, of seed {s}"
    return Chosen(h, setting, plan.run.schedule + schedule, said, summary["pbt"])


def check_winner(plan: Plan) -> None:
    """Raises UsageError where the processes of a run could share its settings, but not the fresh seeds of the best."""
    if len(plan.settings) > 1 and (fresh := num_fresh_seeds(plan.run)):
        per_agent = plan.run.devices_per_agent
        try:
            shared_devices(plan.num_devices // per_agent, fresh, 1, per_agent)
        except UsageError as error:
            raise UsageError(f"fresh_seeds ({fresh}): {error}") from error


def num_fresh_seeds(run: RunConfig) -> int:
    """The number of seeds on which a run trains its best setting again."""
    if run.fresh_seeds is not None:
        return run.fresh_seeds
    return 0 if run.search is None else -(-LEAST // run.num_seeds) * run.num_seeds


def fresh_seed(seed: int) -> int:
    """A seed of a run whose agents' random numbers are independent of those of a run with `seed`."""
    return (seed + AWAY) % 2**32


def _holds(run: RunConfig, best: Chosen) -> bool:
    """Whether the folder of the run's winner holds a run of what is trained again."""
    assert run.out
    try:
        stored = read_config(run.out / WINNER)
        found = stored["settings"], stored["run"].get("schedule", [])
        return found == ([plain(best.setting.hyperparameters)], list(best.schedule))
    except UsageError:
        return False
