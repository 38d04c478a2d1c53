"""The command line that films an agent of a saved run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from purepg.config import Count, check
from purepg.run.cli import leave, parse_flags
from purepg.run.console import reason, say
from purepg.run.evaluation import Choice, run_first
from purepg.run.films.episodes import play
from purepg.run.films.film import check_drawing, film
from purepg.run.films.outside import play_outside
from purepg.run.folder.config import read_config
from purepg.run.load import load
from purepg.run.watch.opening import Mode, open_run, set_up
from purepg.types import UsageError


@dataclass(frozen=True)
class FilmChoice(Choice):
    """Which agent is filmed, and for how long.

    Attributes:
      episodes: whole episodes, shown one after another.
      out: the GIF's path; None: a file in the run's folder, named after the agent.
      wandb: log the film to W&B, as a run in the group of the training's runs.
    """

    episodes: Count = 1
    out: Path | None = None
    wandb: Mode = "offline"


def main(description: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Films an agent and prints what the film shows. Exits with 2 on a bad argument and 1 on a failed write."""
    script = Path(sys.argv[0]).stem
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        choice = check(parse_flags(FilmChoice, run_first(arguments), description))
        agent = load(choice.run, choice.setting, choice.seed, choice.best)
        max_steps = agent.max_steps(choice.max_steps)
        check_drawing(agent.env)  # refuses an environment that cannot be drawn before anything long is played
        if agent.env.outside:
            episodes = play_outside(agent, choice, max_steps)
        else:
            episodes = play(
                jax.random.key(choice.eval_seed),
                agent.env,
                lambda state: agent.algorithm.policy(state, not choice.sampled),
                agent.state,
                choice.episodes,
                max_steps,
                thinned=agent.env.render is not None,
            )
    except UsageError as error:
        leave(script, error, 2)

    made = film(agent.env, episodes, f"{agent.env.name}: {agent.name}")
    out = choice.out or choice.run / f"setting-{agent.setting}-seed-{agent.seed}.gif"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(made.data)
    except OSError as error:
        leave(script, f"cannot write {out}: {reason(error)}", 1)
    returns = [float(episode.reward.sum(dtype=np.float64)) for episode in episodes]
    every = f", every {made.stride} steps" if made.stride > 1 else ""
    print(f"{agent.name}: returns " + ", ".join(f"{x:.4g}" for x in returns))
    print(f"wrote {out}: {made.num_frames} frames{every}, {len(made.data) / 1e6:.2f} MB")
    if choice.wandb != "disabled":
        log(choice.run, out, agent.name, returns, choice.wandb)


def log(run: Path, out: Path, name: str, returns: Sequence[float], mode: Mode) -> None:
    """Logs the film to W&B, offline where it cannot be online. A failure is said in one line."""
    import wandb

    training = read_config(run)["run"]
    place = {"project": training["wandb_project"], "group": training["wandb_group"] or run.resolve().name}
    try:
        set_up(mode)
        logged, _ = open_run(mode, run, f"film: {name}", lambda line: say(f"wandb: {line}"), job_type="render", **place)
        logged.log({"film": wandb.Video(str(out), format="gif"), "episode_return": float(np.mean(returns))})
        logged.finish()
    except Exception as error:
        say(f"wandb: the film was not logged ({reason(error)}); {out} is there")
