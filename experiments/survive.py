"""Kills training with SIGKILL, resumes it, and compares the results bit for bit with a run that was never killed.

Each algorithm of the package is killed once at a moment drawn uniformly over the run's time, and once while a
checkpoint is being written. The runs are those of the algorithms' scripts, but short, with a checkpoint every block.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import purepg.algorithms
from purepg.config import Count, Seed, check_choice
from purepg.run.folder.files import CHECKPOINTS, CONFIG, LOG, METRICS
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.runtime import users_environment

HERE = Path(__file__).parent
ALGORITHMS = purepg.algorithms.names()
LANGUAGE = ("clone", "dpo", "reward_model")
REPLAY = ("ddpg", "td3", "sac", "sac_discrete")
TITLES = {
    "reinforce": "REINFORCE",
    "q_actor_critic": "Q actor-critic",
    "off_policy_pg": "off-policy policy gradient",
    "ppo_penalty": "PPO-Penalty",
    "ppo": "PPO-Clip",
    "sac_discrete": "SAC, discrete",
    "grpo": "GRPO (CartPole)",
    "clone": "cloning",
}
TIMEOUT = 300
ENVIRONMENT = users_environment()


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      seed: seed of the moments at which runs are killed.
      steps: environment steps of each agent; algorithms with a replay buffer take a tenth of them.
      num_seeds: number of agents in each run.
      kills: number of kills at uniformly drawn moments, for each algorithm.
      kills_in_save: number of kills while a checkpoint is being written, for each algorithm.
      only: names of the algorithms to test. Empty: all of the package's.
    """

    seed: Seed = 0
    steps: Count = 60_000
    num_seeds: Count = 2
    kills: Count = 1
    kills_in_save: Count = 1
    only: tuple[str, ...] = ()


def command(name: str, config: Config, out: Path, *flags: str) -> list[str]:
    steps = config.steps // 10 if name in REPLAY else config.steps
    sizes = ["--total-steps", str(steps), "--num-seeds", str(config.num_seeds), "--log-every", "5"]
    start = ["--network.start", "None"] if name in LANGUAGE else []
    quiet = [*start, "--wandb", "disabled", "--checkpoint-every", "0", "--eval-episodes", "8"]
    return [sys.executable, str(HERE / f"{name}.py"), *sizes, *quiet, "--out", str(out), *flags]


def finish(arguments: list[str]) -> float:
    """Runs a command to its end, and returns the seconds it took."""
    begun = time.perf_counter()
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=ENVIRONMENT)
    if result.returncode:
        sys.exit(f"survive: error: {' '.join(arguments)} ended with {result.returncode}: {result.stderr[-500:]}")
    return time.perf_counter() - begun


def kill_after(arguments: list[str], seconds: float) -> None:
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    time.sleep(seconds)
    process.kill()
    process.wait()


def kill_in_save(arguments: list[str], out: Path, which: int) -> bool:
    """Kills a run while it writes its `which`-th or a later checkpoint. Returns whether a partial one was left."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    seen: set[str] = set()
    while process.poll() is None:
        half = {path.name for path in (out / CHECKPOINTS).glob("*/*tmp*")}
        seen |= half
        if half and len(seen) >= which:
            process.kill()
            process.wait()
            return any((out / CHECKPOINTS).glob("*/*tmp*"))
    return False


def same(a: Path, b: Path) -> bool:
    """Whether the logs, metrics and evaluations of two runs are equal bit for bit."""
    if (a / LOG).read_bytes() != (b / LOG).read_bytes():
        return False
    x, y = np.load(a / METRICS), np.load(b / METRICS)
    names = set(x.files) | set(y.files)
    if not all(name in x and name in y and np.array_equal(x[name], y[name], equal_nan=True) for name in names):
        return False
    (e, f) = (sorted((run / CHECKPOINTS).glob("*/evaluation-*.json")) for run in (a, b))
    return [p.read_bytes() for p in e] == [p.read_bytes() for p in f] and [p.name for p in e] == [p.name for p in f]


def go_on(arguments: list[str], out: Path) -> None:
    """Resumes a run that was killed, or starts it again if it was killed before it wrote anything."""
    finish([*arguments, "--resume"] if (out / CONFIG).exists() else [*arguments, "--overwrite"])


def compute(config: Config) -> dict[str, Any]:
    for name in config.only:
        check_choice("only", name, Literal[ALGORITHMS])  # pyright: ignore[reportInvalidTypeForm]
    draw, rows = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as folder:
        for name in config.only or ALGORITHMS:
            whole = Path(folder) / f"{name}-whole"
            finish(command(name, config, whole))  # fills the compile cache, so that the next run's time excludes it
            seconds = finish(command(name, config, whole, "--overwrite"))
            size = max(
                sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                for path in (whole / CHECKPOINTS / "0").iterdir()
                if path.is_dir()
            )
            row: dict[str, Any] = {"algorithm": name, "seconds": seconds, "checkpoint_bytes": size}
            survived = {"anywhere": 0, "in a save": 0}
            inside = 0
            for i in range(config.kills + config.kills_in_save):
                out = Path(folder) / f"{name}-{i}"
                arguments = command(name, config, out)
                if i < config.kills:
                    kill_after(arguments, draw.uniform(0, seconds))
                else:
                    inside += kill_in_save(arguments, out, draw.randint(1, 8))
                go_on(arguments, out)
                survived["anywhere" if i < config.kills else "in a save"] += same(whole, out)
                shutil.rmtree(out)
            row |= {"survived": survived, "killed_in_a_save": inside}
            rows.append(row)
            print(f"{name}: {survived}, half-written checkpoints left {inside}", flush=True)
    counts = {"kills": config.kills, "kills_in_save": config.kills_in_save, "num_seeds": config.num_seeds}
    return {"rows": rows, **counts}


def report(numbers: dict[str, Any]) -> str:
    rows = [
        (
            row["algorithm"],
            f"{row['survived']['anywhere']} of {numbers['kills']}",
            f"{row['survived']['in a save']} of {numbers['kills_in_save']}",
            str(row["killed_in_a_save"]),
            f"{row['checkpoint_bytes'] / 1e6:.2f}",
        )
        for row in numbers["rows"]
    ]
    heading = ("algorithm", "same to the bit, killed anywhere", "in a save", "left half written", "checkpoint MB")
    return table(heading, rows)


def page_table(numbers: dict[str, Any]) -> str:
    """The table of experiments/survival.md."""
    kills, in_save = numbers["kills"], numbers["kills_in_save"]
    rows = []
    for row in numbers["rows"]:
        survived = row["survived"]["anywhere"], row["survived"]["in a save"]
        exact = "yes" if survived == (kills, in_save) else "no"
        counts = f"{survived[0]} of {kills}", f"{survived[1]} of {in_save}"
        name = TITLES.get(row["algorithm"], row["algorithm"].upper())
        rows.append((name, exact, *counts, f"{row['checkpoint_bytes'] / 1e6:.2f}"))
    agents = f"checkpoint of {numbers['num_seeds']} agents, MB"
    return table(("algorithm", "exact resume", "killed at any moment", "killed in a save", agents), rows)


def study(config: Config) -> Study:
    numbers = compute(config)
    return Study(report(numbers), numbers, table=page_table(numbers))


if __name__ == "__main__":
    main(study, Config(), __doc__)
