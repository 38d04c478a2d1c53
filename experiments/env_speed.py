"""Measures environments alone: steps a second of random play, what a reset costs, and an environment's share of PPO.

Each environment has a process of its own, which compiles and warms up before it is timed; the other side of each
comparison is timed in turn with it. `reset all` resets all of 64 environments at every step and selects, as is cheapest
for small states; `reset ended` resets only those whose episode ended. Of these two columns, the one that is not the
environment's own way has a figure; all others take its own. The last column is the time of random play in 64
environments for 64 steps, in per cent of the time of a whole PPO update on as many (4 epochs, 4 minibatches, two
64-wide tanh layers for the policy and for the critic).
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from purepg import envs
from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.config import Count, check
from purepg.experience.exploration import random_actor
from purepg.experience.rollout import reset_all, rollout
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.run.cli import leave, parse_flags
from purepg.run.pages import cells, read_block, table, write_block
from purepg.runtime import users_environment
from purepg.types import Env, UsageError

MARKER = "env_speed"
SIZES = (1, 64, 1024)
OTHER_RESETS = "reset all", "reset ended"
NAMES = (
    *("CartPole-v1", "Breakout-MinAtar", "craftax/Craftax-Classic-Symbolic", "craftax/Craftax-Symbolic"),
    *("playground/CartpoleBalance", "playground/CheetahRun", "brax/fast", "brax/inverted_pendulum"),
    *("brax/halfcheetah", "brax/ant", "xminigrid/MiniGrid-Empty-8x8", "xminigrid/MiniGrid-DoorKey-8x8"),
    *("octax/brix", "popgym_arcade/CartPoleEasy", "pgx/2048", "pgx/minatar-breakout", "jumanji/Snake"),
    "popgym/RepeatPreviousEasy",
)


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Attributes:
      names: the environments; those whose suite is not installed are left out, with one line.
      seconds: the least length of one timed run.
      repeats: timed runs, of which the median counts.
      page: Markdown page whose block <!-- env_speed --> holds the table, in which each row measured replaces the one of
        the same environment. None: no page.
      worker: measures one environment in this process and prints its results as JSON; used by the script itself.
    """

    names: tuple[str, ...] = NAMES
    seconds: float = 1.0
    repeats: Count = 3
    page: Path | None = None
    worker: str | None = None


Run = Callable[[int], Any]  # runs a compiled program once, with a number for its key, and waits for it


def play(env: Env, num_envs: int, num_steps: int) -> Run:
    """Random play of N environments; each run goes on from where the last one stopped."""
    world = jax.jit(lambda key: reset_all(key, env, num_envs))(jax.random.key(0))
    program = jax.jit(lambda key, world: rollout(key, env, random_actor(env), world, num_steps)[0])
    carried = [world]

    def run(i):
        carried[0] = jax.block_until_ready(program(jax.random.key(i), carried[0]))

    return run


def update(env: Env, num_envs: int, num_steps: int) -> Run:
    """One PPO update."""
    algorithm = ppo(env, actor_critic(env, NetworkConfig()), PPOConfig(num_envs=num_envs, num_steps=num_steps))
    state = jax.jit(algorithm.init)(jax.random.key(0))
    carried = [state]
    program = jax.jit(algorithm.step, donate_argnums=1)

    def run(i):
        carried[0], _ = jax.block_until_ready(program(jax.random.key(i), carried[0], 0))

    return run


def seconds_of(runs: dict[str, Run], least: float, repeats: int) -> dict[str, float]:
    """Seconds of one call of each: the median over `repeats`, taken in turn, of means over enough calls."""
    calls = {}
    for name, run in runs.items():
        run(0)
        begun = time.perf_counter()
        run(1)
        calls[name] = max(1, round(least / (time.perf_counter() - begun)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begun = time.perf_counter()
            for i in range(calls[name]):
                run(i)
            found[name].append((time.perf_counter() - begun) / calls[name])
    return {name: statistics.median(times) for name, times in found.items()}


def measured(name: str, least: float, repeats: int) -> dict[str, Any]:
    """The figures of one environment."""
    env = envs.make(name)
    lengths = {n: max(16, min(256, 16_384 // n)) for n in SIZES}
    begun = time.perf_counter()
    first = play(env, 64, lengths[64])
    first(0)
    compile_seconds = time.perf_counter() - begun
    runs: dict[str, Run] = {str(n): first if n == 64 else play(env, n, lengths[n]) for n in SIZES}
    runs["ppo"] = update(env, 64, 64)
    other = OTHER_RESETS[not env.costly_reset]
    runs[other] = play(env._replace(costly_reset=not env.costly_reset), 64, lengths[64])
    found = seconds_of(runs, least, repeats)
    rates = {str(n): n * lengths[n] / found[str(n)] for n in SIZES}
    rates[other] = 64 * lengths[64] / found[other]
    share = 100 * found["64"] * 64 / lengths[64] / found["ppo"]
    return {"rates": rates, "share": share, "compile": compile_seconds}


def row(name: str, found: dict[str, Any]) -> list[str]:
    columns = (*map(str, SIZES), *OTHER_RESETS)
    rates = [f"{found['rates'][key]:,.0f}" if key in found["rates"] else "" for key in columns]
    return [name, *rates, f"{found['compile']:.1f}", f"{found['share']:.0f}"]


def rows_of(block: str) -> dict[str, list[str]]:
    """The rows of the page's table, by environment."""
    return {row[0]: row for row in map(cells, block.splitlines()[2:])}


def in_order(rows: dict[str, list[str]]) -> list[list[str]]:
    """The rows in the order of `NAMES`, then any others."""
    return sorted(rows.values(), key=lambda row: NAMES.index(row[0]) if row[0] in NAMES else len(NAMES))


def main() -> None:
    try:
        choice = check(parse_flags(Choice, sys.argv[1:], __doc__))
        if choice.worker:
            print(json.dumps(measured(choice.worker, choice.seconds, choice.repeats)))
            return
        rows = rows_of(read_block(choice.page, MARKER)) if choice.page else {}
    except UsageError as error:
        leave("env_speed", error, 2)
    measured_at = (*(f"{n:,}" for n in SIZES), *(f"64, {way}" for way in OTHER_RESETS))
    header = ["environment", *measured_at, "compile s", "% of PPO"]
    for name in choice.names:
        flags = ["--worker", name, "--seconds", str(choice.seconds), "--repeats", str(choice.repeats)]
        command = [sys.executable, __file__, *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=users_environment())
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
            print(f"left out {name}: {said[-1]}", file=sys.stderr)
            continue
        rows[name] = row(name, json.loads(done.stdout.strip().splitlines()[-1]))
        print("  ".join(rows[name]), flush=True)
        if choice.page:
            write_block(choice.page, MARKER, table(header, in_order(rows)))
    print(table(header, in_order(rows)))


if __name__ == "__main__":
    main()
