"""The best setting of a search, trained again on fresh seeds.

The highest of many noisy values is above the true value of its setting. Seeds that had no part in the choice give an
unbiased value, which is what a report should say.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from purepg.run import processes
from purepg.run.console import say
from purepg.run.devices import shared_devices
from purepg.run.folder.config import read_config
from purepg.run.folder.files import BEST, SEARCH, SUMMARY, WINNER, RecordError, plain, write_json
from purepg.run.launch import launch
from purepg.run.plan import Plan, RunConfig, versions
from purepg.run.results import Results
from purepg.run.search import Sweep
from purepg.run.session import write_picture
from purepg.run.sweep import Configs
from purepg.types import UsageError

LEAST = 10  # fresh seeds after a search
AWAY = 2**31  # between a run's seed and the fresh one, so that seeds near a run's own remain free for other runs


def with_winner(results: Results, prepared: Callable[[Configs, RunConfig, Sweep], Plan]) -> Results:
    """Trains the setting with the highest IQM on fresh seeds, if the run asks for it and was not interrupted.

    Its folder is `winner/` in that of the run, where summary.json gets the entry `winner`, and best.json the arguments
    that repeat it. A resumed run resumes that of its winner, unless another setting has become the best.

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
    best = int(np.nanargmax(iqm))
    setting = plan.settings[best]
    fresh = replace(
        run,
        search=None,
        halve=None,
        first_rung=None,
        tpe=None,
        fresh_seeds=None,
        num_seeds=number,
        seed=fresh_seed(run.seed),
        eval_seed=fresh_seed(run.eval_seed),
        devices=run.devices if run.devices and number % run.devices == 0 else None,
    )
    repeated = replace(fresh, out=None, overwrite=False, resume=False)
    if run.out:
        resume = processes.agreed(run.resume and _holds(run, setting.hyperparameters))
        group = run.wandb_group or run.out.name
        fresh = replace(fresh, out=run.out / WINNER, resume=resume, overwrite=not resume, wandb_group=group)
    say(f"the best of {len(iqm)} settings, {setting.label}, is trained again on {number} fresh seeds")
    try:
        sweep = {name: [value] for name, value in setting.hyperparameters.items()}
        found = launch(prepared(setting.configs, fresh, sweep), f"{results.name}, winner")
    except (RecordError, UsageError) as error:  # the results of the search stay
        if processes.number() > 1 and isinstance(error, RecordError):  # perhaps of this process alone
            raise
        results.lost.append(str(error))
        return results
    of_winner, of_best = found.summary["settings"][0], results.summary["settings"][best]
    entry = {"setting": best, "seed": fresh.seed, **of_winner}
    entry["in_search"] = {name: of_best[name] for name in ("iqm", "interval", "mean", "finals")}
    summary = results.summary | {"winner": entry, "interrupted": found.interrupted}
    results = replace(results, summary=summary, winner=found, lost=results.lost + found.lost)
    if run.out and processes.is_first():
        best_arguments = {
            "script": results.name,
            "run": asdict(repeated),
            **{name: asdict(config) for name, config in setting.configs.items()},
            "code": plan.code,
            "versions": versions(),
        }
        try:
            write_json(run.out / SUMMARY, summary)
            write_json(run.out / BEST, best_arguments)
            if run.search:
                write_picture(run.out / SEARCH, results.plot_search)  # which shows the winner too
        except RecordError as error:
            results.lost.append(str(error))
    results.lost[:] = processes.agreed(results.lost)
    return results


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


def _holds(run: RunConfig, hyperparameters: dict[str, Any]) -> bool:
    """Whether the folder of the run's winner holds a run of this setting."""
    assert run.out
    try:
        return read_config(run.out / WINNER)["settings"] == [plain(hyperparameters)]
    except UsageError:
        return False
