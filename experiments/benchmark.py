"""How fast algorithms train: environment steps a second, compile seconds and peak memory, at several sizes.

PPO on CartPole (128 steps, 4 epochs, 4 minibatches, two 64-wide tanh layers), SAC and TD3 on Pendulum (a gradient step
of 256 transitions for every environment step, two critics, two 64-wide relu layers, replay of 100,000). Every
measurement runs in a process of its own, compiled and warmed up before it is timed. With `--peer rejax`, rejax does the
same work in an environment of its own, the two in turn: A B A B.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from purepg.runtime import SCHEDULER_FLAG, users_environment

SIZES = (  # algorithm:environments x seeds
    *("ppo:4x1", "ppo:4x4", "ppo:4x16", "ppo:64x1", "ppo:64x16", "ppo:2048x1"),
    *("sac:1x1", "sac:1x16", "td3:1x1", "td3:1x16"),
)
# About a second of work, so that a run is long against the clock and short against the machine's moods.
STEPS_PER_RUN = {"ppo": 400_000, "sac": 8_000, "td3": 8_000}
NUM_STEPS = {"ppo": 128, "sac": 50, "td3": 50}
WARMUP_STEPS = 300  # over before anything is timed
PEERS = {"rejax": ("rejax==0.1.3", "gymnax==0.0.9", "jax==0.10.2", "jaxlib==0.10.2")}
HERE = Path(__file__).parent


def make(name: str, num_envs: int):
    """The algorithm, its config, its network's maker and config, and the environment's name."""
    from purepg.algorithms.ppo import PPOConfig, ppo
    from purepg.algorithms.sac import SACConfig, sac
    from purepg.algorithms.td3 import TD3Config, td3
    from purepg.networks import ActorQConfig, NetworkConfig, actor_critic, actor_q

    steps: dict[str, Any] = {"num_envs": num_envs, "num_steps": NUM_STEPS[name]}
    if name == "ppo":
        config = PPOConfig(**steps, learning_rate=2.5e-4, entropy_coef=0.01)
        return ppo, config, actor_critic, NetworkConfig(), "CartPole-v1"
    if name == "sac":
        config = SACConfig(**steps, warmup_steps=WARMUP_STEPS)
        return sac, config, actor_q, ActorQConfig(policy="tanh_gaussian"), "Pendulum-v1"
    config = TD3Config(**steps, warmup_steps=WARMUP_STEPS)
    return td3, config, actor_q, ActorQConfig(policy="deterministic"), "Pendulum-v1"


def purepg_worker(name: str, num_envs: int, num_seeds: int, num_updates: int, devices: int | None) -> None:
    """Compiles a population, says so, and trains it once for every line `run` on stdin."""
    import jax

    from purepg.run.plan import RunConfig, prepare
    from purepg.run.population import Population, chunks
    from purepg.run.summary import peak_memory_bytes

    algorithm, config, network, network_config, env = make(name, num_envs)
    total_steps = num_envs * NUM_STEPS[name] * num_updates
    run = RunConfig(env=env, num_seeds=num_seeds, total_steps=total_steps, devices=devices, compile_cache=False)
    plan = prepare(algorithm, network, {name: config, "network": network_config}, run, {})
    (group,) = plan.groups
    (chunk,) = chunks(1, num_seeds, None)
    population = Population(plan.env, plan.make, group, chunk.shape, 0, total_steps, plan.num_devices, 0, 1, 1)
    members = population.members(chunk)
    state = population.init(members)

    def train(state, start):
        state, metrics = population.advance(members, state, start, num_updates)
        jax.block_until_ready(metrics)
        return state

    before = population.compile_seconds
    state, start = train(state, 0), num_updates
    answer(
        ready=True,
        compile_seconds=population.compile_seconds - before,
        devices=plan.num_devices,
        device=jax.devices()[0].device_kind,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    for line in sys.stdin:
        if line.strip() != "run":
            break
        begun = time.perf_counter()
        state, start = train(state, start), start + num_updates
        answer(
            seconds=time.perf_counter() - begun,
            env_steps=total_steps * num_seeds,
            peak_memory_bytes=peak_memory_bytes(),
        )


def answer(**values) -> None:
    print(json.dumps(values), flush=True)


class Worker:
    """A process that trains at every call."""

    def __init__(self, command: list[str], **variables: str):
        self._command = " ".join(command)
        pipe = subprocess.PIPE
        environment = users_environment() | variables
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        self.ready = self._answer()

    def _answer(self) -> dict:
        line = self._output.readline()
        if not line:
            sys.exit(f"benchmark: error: a worker ended early: {self._command}")
        return json.loads(line)

    def run(self) -> dict:
        self._input.write("run\n")
        self._input.flush()
        return self._answer()

    def close(self) -> None:
        self._input.close()
        self._process.wait()


def peer_python(peer: str) -> Path:
    """The Python of a virtual environment that holds the peer; made at the first call."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purepg" / "peers" / peer
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed"
    if not done.exists():
        print(f"installing {' '.join(PEERS[peer])} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        done.touch()
    return python


def measure(size: str, peer: str | None, repeats: int, devices: int | None) -> dict:
    """Times one size: medians over `repeats`, and against the peer the ratio pair by pair."""
    name, shape = size.split(":")
    num_envs, num_seeds = map(int, shape.split("x"))
    num_updates = max(1, STEPS_PER_RUN[name] // (num_envs * num_seeds * NUM_STEPS[name]))
    sizes = [name, str(num_envs), str(num_seeds), str(num_updates)]
    workers = {"purepg": Worker([sys.executable, __file__, "--worker", *sizes, str(devices or 0)])}
    if peer:
        names = ("--algorithm", "--num-envs", "--num-seeds", "--num-updates", "--num-steps")
        sizes.append(str(NUM_STEPS[name]))
        flags = [part for pair in zip(names, sizes, strict=True) for part in pair]
        # Without purepg's cure, jaxlib 0.10.2 deadlocks on few cores whoever wrote the program.
        cure = {"XLA_FLAGS": f"--{SCHEDULER_FLAG}=false"}
        workers[peer] = Worker([str(peer_python(peer)), str(HERE / "peers" / f"{peer}_worker.py"), *flags], **cure)
    runs = {side: [] for side in workers}
    for _ in range(repeats):
        for side, worker in workers.items():
            runs[side].append(worker.run())
    result = {"size": size, "num_updates": num_updates, "repeats": repeats}
    for side, worker in workers.items():
        worker.close()
        result[side] = {
            **worker.ready,
            "env_steps_per_second": statistics.median(r["env_steps"] / r["seconds"] for r in runs[side]),
            "peak_memory_bytes": runs[side][-1].get("peak_memory_bytes"),
            "seconds": [r["seconds"] for r in runs[side]],
        }
    if peer:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["purepg"], runs[peer], strict=True)]
        result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def row(result: dict, peer: str | None) -> str:
    """A line of the table."""
    ours = result["purepg"]
    text = (
        f"{result['size']:>10}  {ours['env_steps_per_second']:>12,.0f}  {ours['compile_seconds']:>9.1f}  "
        f"{ours['peak_memory_bytes'] / 2**20:>8,.0f}  {ours['devices']:>7}"
    )
    if peer:
        theirs, ratio = result[peer], result["ratio"]
        text += f"  {theirs['env_steps_per_second']:>12,.0f}  {theirs['compile_seconds']:>9.1f}"
        text += f"  {ratio['median']:>5.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, help="time it in turn; installed on first use")
    parser.add_argument(
        "--sizes", default=",".join(SIZES), help="algorithm:environments x seeds (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--devices", type=int, help="devices for the seeds (default: as many as divide them)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, *numbers = arguments.worker
        num_envs, num_seeds, num_updates, devices = map(int, numbers)
        purepg_worker(name, num_envs, num_seeds, num_updates, devices or None)
        return

    heading = f"{'size':>10}  {'steps/s':>12}  {'compile s':>9}  {'peak MiB':>8}  {'devices':>7}"
    if arguments.peer:
        heading += f"  {arguments.peer + ' steps/s':>12}  {'compile s':>9}  ratio: median [range]"
    print(heading)
    results = []
    for size in arguments.sizes.split(","):
        results.append(measure(size, arguments.peer, arguments.repeats, arguments.devices))
        print(row(results[-1], arguments.peer), flush=True)
    sides = ["purepg", *([arguments.peer] if arguments.peer else [])]
    for side in sides:
        print(f"{side}: {results[0][side]['device']}, XLA_FLAGS={results[0][side]['xla_flags']!r}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
