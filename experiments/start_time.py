"""Measures where the time goes from pressing Enter to the first update, and to the end of the job.

Each start is a process of its own that runs an experiment script of this folder. The first start finds no compiled
programs, the later ones read those of the first from disk. A stage ends where the next one begins, except that programs
are compiled, or read, in threads while the first process goes on: how long that takes is a row of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from purepg.config import Count
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.runtime import users_environment
from purepg.types import UsageError

HERE = Path(__file__).parent
STAGES = {  # what a worker reports, and its row of the table
    "jax": "Python starts, and imports JAX",
    "purepg": "imports purepg, flax and optax",
    "traced": "reads the command line, makes the environment",
    "first_block": "traces, compiles and runs the first block",
    "trained": "trains until the last block",
    "done": "evaluates, draws and writes",
}
WITHIN = {
    "tracing": "of the first block: tracing",
    "lowering": "of the first block: lowering to StableHLO",
    "compiling": "of the first block, in threads: compiling, or reading compiled programs",
}


@dataclass(frozen=True)
class Config:
    """The starts.

    Attributes:
      script: name of an experiment script beside this one.
      repeats: later starts, whose medians are reported.
      cold: first starts, each with an empty cache of compiled programs.
    """

    script: str = "ppo"
    repeats: Count = 7
    cold: Count = 3


def start(script: str, cache: Path) -> dict[str, float]:
    """Starts a script; returns seconds from Enter to the end of each stage, and the seconds within.

    Raises:
      UsageError: the script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        environment = users_environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        command = [sys.executable, str(HERE / "parts" / "start_time.py"), script, str(out), str(time.time())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"{script}.py failed: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout.splitlines()[-1])


def rows(starts: Mapping[str, Sequence[dict[str, float]]]) -> list[list[str]]:
    """The table's rows: the seconds that each stage takes, and when it ends, for each kind of start."""

    def median(name: str, before: str | None, found: Sequence[dict[str, float]]) -> str:
        return f"{statistics.median(x[name] - (x[before] if before else 0.0) for x in found):.2f}"

    order = list(STAGES)
    made = []
    for before, name in zip([None, *order], order, strict=False):
        made.append([STAGES[name], *(median(name, before, found) for found in starts.values())])
        if name == "first_block":
            made += [[label, *(median(x, None, found) for found in starts.values())] for x, label in WITHIN.items()]
            made.append(["from Enter to the end of the first block", *map(of(name), starts.values())])
    return [*made, ["the whole job", *map(of("done"), starts.values())]]


def of(name: str) -> Callable[[Sequence[dict[str, float]]], str]:
    """A function from starts to the median of a time, with its range."""

    def told(found: Sequence[dict[str, float]]) -> str:
        times = [x[name] for x in found]
        return f"{statistics.median(times):.2f} [{min(times):.2f}, {max(times):.2f}]"

    return told


def study(config: Config) -> Study:
    """Starts the script again and again.

    Raises:
      UsageError: there is no such script, or it failed.
    """
    if not (HERE / f"{config.script}.py").is_file():
        raise UsageError(f"script ({config.script}) must be an experiment beside start_time.py, such as ppo")
    first, later = [], []
    for _ in range(config.cold):
        with tempfile.TemporaryDirectory() as cache:
            first.append(start(config.script, Path(cache)))
            repeats = config.repeats if len(first) == config.cold else 0
            later += [start(config.script, Path(cache)) for _ in range(repeats)]
    starts = {"first start, s": first, "later starts, s": later}
    written = table([f"{config.script}.py on {os.cpu_count()} cores", *starts], rows(starts))
    return Study(written, starts, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
