"""Trains a table of algorithms on environments, and writes the final returns and the learning curves.

Each cell is a run in a folder of its own under --out, with the settings of the algorithm's script. The same command
with the same --out goes on where it was stopped: finished cells are not trained again.
"""

import gc
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

import jax
from parts.suite_cells import SCRIPTS, Cell, Missing, cell, environments, folder_of, named, overrides, why
from parts.suite_table import Score, numbers, page, picture, read_score

from purepg.config import Count, Seed, check
from purepg.run.cli import leave, parse_flags
from purepg.run.description import describe
from purepg.run.experiment import train_population
from purepg.run.folder.config import read_summary, refuse_differences
from purepg.run.folder.files import CONFIG, SUMMARY, RecordError, folder_for, write_json, write_whole
from purepg.run.pages import read_block, write_block
from purepg.run.plan import RunConfig, prepare
from purepg.types import UsageError

TABLE, NUMBERS, CURVES = "table.md", "table.json", "curves.png"


@dataclass(frozen=True)
class Config:
    """The table.

    Attributes:
      algorithms: any of reinforce, q_actor_critic, a2c, off_policy_pg, npg, trpo, ppo, ppo_penalty, ddpg, td3, sac and
        sac_discrete, each perhaps with settings of its own, as in ppo:network.memory=gru:ppo.gamma=0.9. On discrete
        actions, sac is sac_discrete.
      envs: names of environments, perhaps with parameters, as in CartPole-v1:observed=0,2:action_repeat=2; or of
        groups: classic, minatar, bsuite, or a suite such as craftax.
      steps: budget of environment steps for each seed of each cell.
      seeds: seeds of each cell.
      seed: seed of every run.
      set: other settings, each as ALGORITHM.FIELD=VALUE or network.FIELD=VALUE, such as ppo.learning_rate=1e-3.
      eval_episodes: number of episodes in each agent's final evaluation.
      eval_max_steps: truncate evaluation episodes after this many steps. None: at the environment's time limit.
      wandb: log every run to Weights & Biases, in a group for each cell.
      out: folder of the table and of its runs. None: a new one under runs/.
      page: Markdown page whose block <!-- BLOCK --> holds the tables. None: no page.
      block: the name of that block.
    """

    algorithms: tuple[str, ...] = ("ppo", "a2c")
    envs: tuple[str, ...] = ("classic",)
    steps: Count = 100_000
    seeds: Count = 10
    seed: Seed = 0
    set: tuple[str, ...] = ()
    eval_episodes: Count = 128
    eval_max_steps: Count | None = None
    wandb: Literal["online", "offline", "disabled"] = "disabled"
    out: Path | None = None
    page: Path | None = None
    block: str = "suite"


def algorithms_of(config: Config) -> list[str]:
    """The table's algorithms, each once."""
    labels = map(named, config.algorithms)
    return list(dict.fromkeys(":".join([name.replace("-", "_"), *settings]) for name, settings in labels))


def cells_of(config: Config) -> tuple[list[Cell], list[Missing], list[str]]:
    """The cells to train, those that are left out, and the table's environments.

    Raises:
      UsageError: an algorithm, an environment or a setting is wrong.
    """
    algorithms = algorithms_of(config)
    if not algorithms or not config.envs:
        raise UsageError("name at least one algorithm and one environment")
    trained = [named(label)[0] for label in algorithms]
    if unknown := [name for name in trained if name not in SCRIPTS]:
        raise UsageError(f"algorithms ({', '.join(unknown)}) must be among {', '.join(SCRIPTS)}")
    changes = overrides(config.set, trained)
    discrete, not_made = environments(config.envs)
    found = [cell(label, env, discrete[env], algorithms, changes) for env in discrete for label in algorithms]
    missing = [Missing(label, env, reason) for env, reason in not_made for label in algorithms]
    missing += [x for x in found if isinstance(x, Missing)]
    return [x for x in found if isinstance(x, Cell)], missing, [*discrete, *(env for env, _ in not_made)]


def train_cell(made: Cell, config: Config, out: Path) -> bool:
    """Trains a cell, from its last checkpoint on if it has one, or not at all if it is finished. Returns whether Ctrl-C
    stopped it.

    Raises:
      UsageError: the cell does not fit, or its folder holds a run with other settings.
      RecordError: a result could not be written.
    """
    algorithm, own, network, network_config, run = made.experiment
    folder = folder_of(out, made.algorithm, made.env)
    begun = (folder / CONFIG).exists()
    env, env_params = named(made.env)
    run = replace(
        run,
        env=env,
        env_params=env_params,
        total_steps=config.steps,
        num_seeds=config.seeds,
        seed=config.seed,
        eval_episodes=config.eval_episodes,
        eval_max_steps=config.eval_max_steps,
        wandb=config.wandb,
        out=folder,
        resume=begun,
    )
    if begun and (folder / SUMMARY).exists() and is_finished(made, run, folder):
        print(f"{made.name}: finished before")
        return False
    print(f"{made.name}: {'going on' if begun else 'training'} with the settings of {made.script}.py", flush=True)
    results = train_population(algorithm, own, network, network_config, run, name=made.script)
    if results.lost:
        raise RecordError("; ".join(results.lost))
    return results.interrupted


def is_finished(made: Cell, run: RunConfig, folder: Path) -> bool:
    """Whether the run in a folder, which `run` would resume, is finished, with these settings and this number of steps.
    Raises UsageError where its settings are others."""
    algorithm, own, network, network_config, _ = made.experiment
    configs = {algorithm.__name__: own, "network": network_config}
    plan = prepare(algorithm, network, configs, run, {})
    assert plan.stored  # since the run resumes
    refuse_differences(folder, plan.stored, describe(plan, made.script))
    return plan.stored["run"]["total_steps"] == run.total_steps and not read_summary(folder)["interrupted"]


def train_cells(
    cells: list[Cell], missing: list[Missing], config: Config, out: Path
) -> tuple[list[Score], list[Missing], bool]:
    """Trains all cells. One that fails is reported, and the others are trained.

    Returns:
      (scores, missing cells with those in `missing`, whether Ctrl-C stopped it).
    """
    scores: list[Score] = []
    missing = list(missing)
    for x in missing:
        print(f"{x.algorithm} on {x.env} is left out: {x.why}")
    for i, one in enumerate(cells):
        try:
            stopped = train_cell(one, config, out)
            if not stopped:
                scores.append(read_score(folder_of(out, one.algorithm, one.env), one.algorithm, one.env))
            jax.clear_caches()  # compiled programs, which no other cell uses
            gc.collect()
        except KeyboardInterrupt:
            stopped = True
        except Exception as error:  # whatever it is, the other cells do not suffer from it
            stopped = False
            missing.append(Missing(one.algorithm, one.env, why(error), not isinstance(error, UsageError)))
            print(f"{one.name} has no result: {missing[-1].why}")
        if stopped:
            rest = [other for other in cells[i:] if other.name not in [f"{x.algorithm} on {x.env}" for x in scores]]
            return scores, [*missing, *(Missing(x.algorithm, x.env, "not trained to its end yet") for x in rest)], True
    return scores, missing, False


def write(out: Path, text: str, scores: list[Score], missing: list[Missing], config: Config) -> None:
    """Writes the table and the picture. Raises RecordError if one cannot be written."""
    write_whole(out / TABLE, lambda file: file.write(f"{text}\n".encode()))
    write_json(out / NUMBERS, numbers(scores, missing))
    if scores:
        figure = picture(scores, algorithms_of(config), config.seeds)
        write_whole(out / CURVES, lambda file: figure.savefig(file, format="png"))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Trains the table, prints and writes it. Exits with 0, 1 (a cell failed, or none has a result), 2 (bad argument)
    or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config: Config = check(parse_flags(Config, arguments, __doc__))
        cells, missing, envs = cells_of(config)  # what is wrong is said before a folder is made
        if config.page:
            read_block(config.page, config.block)
        with folder_for(config.out, "suite") as out:
            out.mkdir(parents=True, exist_ok=True)
            scores, missing, stopped = train_cells(cells, missing, config, out)
            text = page(scores, missing, envs, algorithms_of(config), config.seeds)
            print(f"\n{text}\n")
            write(out, text, scores, missing, config)
            if config.page and not stopped:
                write_block(config.page, config.block, text)
    except UsageError as error:
        leave("suite", error, 2)
    except (RecordError, OSError) as error:
        leave("suite", error, 1)
    print(f"wrote {out}")
    if stopped:
        given = [] if config.out else ["--out", str(out)]
        print(f"go on with it: {shlex.join(['python', sys.argv[0], *arguments, *given])}")
        sys.exit(130)
    sys.exit(int(not scores or any(x.failed for x in missing)))


if __name__ == "__main__":
    main()
