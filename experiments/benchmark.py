"""How fast algorithms train: environment steps a second, compile seconds and peak memory, at several sizes.

PPO on CartPole (128 steps, 4 epochs, 4 minibatches, two 64-wide tanh layers), SAC and TD3 on Pendulum (a gradient step
of 256 transitions for every environment step, two critics, two 64-wide relu layers, replay of 100,000), GRPO on
additions by a transformer of two layers (32 prompts, 8 responses each, one gradient step; a step is a generated token).
Every measurement runs in a process of its own, compiled and warmed up before it is timed. With `--peer rejax`, rejax
does the same work in an environment of its own, the two in turn: A B A B. With `--overhead`, what watching and saving
a run costs.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from purepg.run.study import page_help, read_block, table, write_block
from purepg.runtime import SCHEDULER_FLAG, users_environment
from purepg.types import UsageError

SIZES = (  # algorithm:environments x seeds, or grpo:width x seeds
    *("ppo:4x1", "ppo:4x4", "ppo:4x16", "ppo:64x1", "ppo:64x16", "ppo:2048x1"),
    *("sac:1x1", "sac:1x16", "td3:1x1", "td3:1x16"),
    *("grpo:64x1", "grpo:64x4", "grpo:128x1", "grpo:256x1"),
)
OVERHEAD_SIZES = ("ppo:4x16", "sac:1x4")
MARKERS = {"ppo": "benchmark_ppo", "sac": "benchmark_replay", "td3": "benchmark_replay", "grpo": "benchmark_grpo"}
OVERHEAD_MARKER = "benchmark_overhead"
OVERHEADS = ("log.jsonl", "progress bar", "W&B", "a checkpoint")
# About a second of work, so that a run is long against the clock and short against the machine's moods.
STEPS_PER_RUN = {"ppo": 400_000, "sac": 8_000, "td3": 8_000, "grpo": 20_000}
NUM_STEPS = {"ppo": 128, "sac": 50, "td3": 50, "grpo": 16}  # grpo: so that 20 updates are a run, whatever the width
WARMUP_STEPS = 300  # over before anything is timed
PEERS = {"rejax": ("rejax==0.1.3", "gymnax==0.0.9", "jax==0.10.2", "jaxlib==0.10.2")}
HERE = Path(__file__).parent


def make(name: str, size: int) -> tuple[Any, Any, Any, Any, str]:
    """The algorithm, its config, its network's maker and config, and the environment's name.

    Args:
      size: environments, or the width of a language model.
    """
    from purepg.algorithms.grpo import GRPOConfig, grpo
    from purepg.algorithms.ppo import PPOConfig, ppo
    from purepg.algorithms.sac import SACConfig, sac
    from purepg.algorithms.td3 import TD3Config, td3
    from purepg.language.model import LanguageModelConfig
    from purepg.networks.actor_critic import ActorQConfig, NetworkConfig, actor_critic, actor_q
    from purepg.run.start import language_model

    if name == "grpo":
        config = GRPOConfig(num_prompts=32, group_size=8, num_held_out=0)
        return grpo, config, language_model, LanguageModelConfig(hidden_size=size, mlp_size=2 * size), "addition"
    steps: dict[str, Any] = {"num_envs": size, "num_steps": NUM_STEPS[name]}
    if name == "ppo":
        config = PPOConfig(**steps, learning_rate=2.5e-4, entropy_coef=0.01)
        return ppo, config, actor_critic, NetworkConfig(), "CartPole-v1"
    if name == "sac":
        config = SACConfig(**steps, warmup_steps=WARMUP_STEPS)
        return sac, config, actor_q, ActorQConfig(policy="tanh_gaussian"), "Pendulum-v1"
    config = TD3Config(**steps, warmup_steps=WARMUP_STEPS)
    return td3, config, actor_q, ActorQConfig(policy="deterministic"), "Pendulum-v1"


def prepared(name: str, size: int, num_seeds: int, num_updates: int, devices: int | None):
    """A plan with room for a thousand runs of so many updates, its population, and its only chunk."""
    from purepg.run.plan import RunConfig, prepare
    from purepg.run.population import chunks

    algorithm, config, network, network_config, env = make(name, size)
    most = 32 * 8 * 4 if name == "grpo" else size * NUM_STEPS[name]  # steps of an update
    run = RunConfig(env, 1000 * most * num_updates, num_seeds, devices=devices, compile_cache=False)
    plan = prepare(algorithm, network, {name: config, "network": network_config}, run, {})
    (group,) = plan.groups
    (chunk,) = chunks(1, num_seeds, None)
    return plan, group, chunk, plan.population(group, chunk.shape)


def purepg_worker(name: str, size: int, num_seeds: int, num_updates: int, devices: int | None) -> None:
    """Compiles a population, says so, and trains it once for every line `run` on stdin."""
    import jax
    import numpy as np

    from purepg.run.summary import peak_memory_bytes

    plan, _, chunk, population = prepared(name, size, num_seeds, num_updates, devices)
    members = population.members(chunk)
    state = population.init(members)

    def train(state, start):
        state, metrics = population.advance(members, state, start, num_updates)
        return state, int(np.asarray(metrics["env_steps"], np.int64).sum())

    before = population.compile_seconds
    (state, _), start = train(state, 0), num_updates
    answer(
        ready=True,
        compile_seconds=population.compile_seconds - before,
        devices=plan.num_devices,
        device=jax.devices()[0].device_kind,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    generate = generation(size, num_seeds) if name == "grpo" else None
    for line in sys.stdin:
        if line.strip() != "run":
            break
        begun = time.perf_counter()
        state, env_steps = train(state, start)
        seconds, start = time.perf_counter() - begun, start + num_updates
        generated = generate(state.learner.params, start) if generate else None
        answer(
            seconds=seconds, env_steps=env_steps, generated_per_second=generated, peak_memory_bytes=peak_memory_bytes()
        )


def generation(width: int, num_seeds: int) -> Callable[[Any, int], float]:
    """What samples the responses of one update, for every seed, and says how many tokens a second that was."""
    import jax
    import numpy as np

    from purepg import envs
    from purepg.algorithms.groups import source

    _, config, network, network_config, env = make("grpo", width)
    env = envs.make(env)
    groups = source(env, network(env, network_config))

    @jax.jit
    def sample(key, params):
        def of_seed(key, params):
            return groups.sample(key, params, config.num_prompts, config.group_size).mask.sum()

        return jax.vmap(of_seed)(jax.random.split(key, num_seeds), params)

    def tokens_per_second(params: Any, seed: int) -> float:
        params = jax.tree.map(lambda x: x[0], params)
        np.asarray(sample(jax.random.key(seed), params))
        begun, tokens = time.perf_counter(), 0
        for i in range(5):
            tokens += int(np.asarray(sample(jax.random.key(seed + i), params)).sum())
        return tokens / (time.perf_counter() - begun)

    return tokens_per_second


def overhead_worker(name: str, size: int, num_seeds: int, num_updates: int, devices: int | None) -> None:
    """Compiles a population, and trains it once for every line on stdin, which names what watches or saves the run."""
    from purepg.run.checkpoint import Checkpoints
    from purepg.run.loop import Interrupt, Progress, Saving, run_chunk
    from purepg.run.record import Record
    from purepg.run.watch.sink import WandbSink

    plan, group, chunk, population = prepared(name, size, num_seeds, num_updates, devices)
    log_every = plan.run.log_every
    group = group._replace(num_updates=num_updates)
    run_chunk(population, group, chunk, log_every, [], Interrupt())
    answer(ready=True)
    for line in sys.stdin:
        what = line.strip()
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
            out, sinks, saving = Path(folder), [], None
            if what == "log.jsonl":
                record = ends.enter_context(Record.open(out))
                sinks.append(record.append_block)
            elif what == "progress bar":
                bar = Progress(plan.run.total_steps, shown=True)
                ends.callback(bar.close)
                sinks.append(bar)
            elif what == "W&B":
                members = list(range(num_seeds))
                sink = WandbSink("offline", "seed", "benchmark", "benchmark", out, {}, [{}], members, log_every)
                ends.callback(sink.finish, {})
                sinks.append(sink.log_block)
            elif what == "a checkpoint":
                checkpoints = Checkpoints(out, 0, 2)
                ends.callback(checkpoints.close)
                saving = Saving(checkpoints, 1e9, lambda error: sys.exit(str(error)), None)  # the one at the end
            outcome = run_chunk(population, group, chunk, log_every, sinks, Interrupt(), saving)
            trained = outcome.run_seconds
        answer(seconds=time.perf_counter() - begun, trained=trained)


def overhead(
    sizes: Sequence[str], overheads: Sequence[str], length: float, repeats: int, devices: int | None
) -> list[dict]:
    """Prints, for every size, by how many per cent each of them lengthens a run; in turn with a run that nothing
    watches."""
    print(f"{'size':>10}  {'updates':>8}  {'seconds':>7}  per cent more of training, and of all until it is written")
    results = []
    for size in sizes:
        name, shape = size.split(":")
        num_envs, num_seeds = map(int, shape.split("x"))
        rate = {"ppo": 500_000, "sac": 5_000, "td3": 6_000}[name]  # roughly, of two cores
        num_updates = max(20, 10 * round(length * rate / (num_envs * num_seeds * NUM_STEPS[name] * 10)))
        sizes_ = [name, str(num_envs), str(num_seeds), str(num_updates), str(devices or 0)]
        worker = Worker([sys.executable, __file__, "--overhead-worker", *sizes_])
        shares: dict[str, list[tuple[float, float]]] = {what: [] for what in overheads}
        seconds = []
        for _ in range(repeats):
            for what in overheads:
                nothing, something = worker.run("nothing"), worker.run(what)
                seconds.append(nothing["seconds"])
                shares[what].append(tuple(100 * (something[k] / nothing[k] - 1) for k in ("trained", "seconds")))
        worker.close()
        medians = {what: [statistics.median(x) for x in zip(*pairs, strict=True)] for what, pairs in shares.items()}
        said = ", ".join(f"{what} {a:+.1f} / {b:+.1f}" for what, (a, b) in medians.items())
        print(f"{size:>10}  {num_updates:>8}  {statistics.median(seconds):>7.1f}  {said}", flush=True)
        results.append({"size": size, "num_updates": num_updates, "seconds": seconds, "per_cent": shares})
    return results


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

    def run(self, what: str = "run") -> dict:
        self._input.write(f"{what}\n")
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
            "generated_per_second": runs[side][-1].get("generated_per_second"),
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
    if ours["generated_per_second"]:
        text += f"  generation alone {ours['generated_per_second']:,.0f}/s"
    if peer:
        theirs, ratio = result[peer], result["ratio"]
        text += f"  {theirs['env_steps_per_second']:>12,.0f}  {theirs['compile_seconds']:>9.1f}"
        text += f"  {ratio['median']:>5.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
    return text


def page_table(marker: str, results: Sequence[dict], peer: str | None) -> str:
    """The table of experiments/speed.md that shows these results, all of one marker."""
    first = {"benchmark_replay": "algorithm, environments x seeds", "benchmark_grpo": "width x seeds"}
    rates = ["whole update", "generation alone"] if marker == "benchmark_grpo" else ["steps/s"]
    header = [first.get(marker, "environments x seeds"), *rates, "compile s", "peak MiB", "devices"]
    header += [f"{peer} steps/s", "ratio: median [range]"] if peer else []
    rows = []
    for result in results:
        name, shape = result["size"].split(":")
        ours, size = result["purepg"], shape.replace("x", " x ")
        of_rate = [ours["env_steps_per_second"], ours["generated_per_second"]][: len(rates)]
        row = [f"{name.upper()}, {size}" if marker == "benchmark_replay" else size, *(f"{x:,.0f}" for x in of_rate)]
        row += [f"{ours['compile_seconds']:.1f}", f"{ours['peak_memory_bytes'] / 2**20:,.0f}", str(ours["devices"])]
        if peer:
            ratio = result["ratio"]
            row.append(f"{result[peer]['env_steps_per_second']:,.0f}")
            row.append(f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]")
        rows.append(row)
    return table(header, rows)


def overhead_table(results: Sequence[dict], overheads: Sequence[str]) -> str:
    """The table of experiments/speed.md that shows what watching and saving a run costs."""
    rows = []
    for result in results:
        name, shape = result["size"].split(":")
        num_envs, num_seeds = shape.split("x")
        row = [f"{name.upper()}, {num_envs} environments x {num_seeds} agents"]
        row.append(f"{statistics.median(result['seconds']):.1f} s")
        for what in overheads:
            medians = (statistics.median(x) for x in zip(*result["per_cent"][what], strict=True))
            row.append(" / ".join(f"{x:+.1f}" for x in medians))
        rows.append(row)
    return table(["run", "length", *overheads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", choices=PEERS, help="time it in turn; installed on first use")
    parser.add_argument(
        "--sizes", help=f"algorithm:environments x seeds, or grpo:width x seeds (default: {','.join(SIZES)})"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--devices", type=int, help="devices for the seeds (default: as many as divide them)")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    what = f"what watching and saving a run costs: {', '.join(OVERHEADS)}, or all of them"
    parser.add_argument("--overhead", nargs="*", choices=OVERHEADS, metavar="WHAT", help=what)
    parser.add_argument("--seconds", type=float, default=8, help="length of a run for --overhead (default: about 8)")
    parser.add_argument("--page", type=Path, help=page_help("benchmark_..."))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--overhead-worker", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for work, given in ((purepg_worker, arguments.worker), (overhead_worker, arguments.overhead_worker)):
        if given:
            name, *numbers = given
            size, num_seeds, num_updates, devices = map(int, numbers)
            work(name, size, num_seeds, num_updates, devices or None)
            return
    sizes = arguments.sizes.split(",") if arguments.sizes else SIZES if arguments.overhead is None else OVERHEAD_SIZES
    kinds = {OVERHEAD_MARKER} if arguments.overhead is not None else {MARKERS[x.split(":")[0]] for x in sizes}
    if arguments.page:
        try:
            for marker in sorted(kinds):
                read_block(arguments.page, marker)
        except UsageError as error:
            parser.exit(2, f"benchmark: error: {error}\n")
    if arguments.overhead is not None:
        overheads = arguments.overhead or OVERHEADS
        results = overhead(sizes, overheads, arguments.seconds, arguments.repeats, arguments.devices)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        if arguments.page:
            write_block(arguments.page, OVERHEAD_MARKER, overhead_table(results, overheads))
        return

    heading = f"{'size':>10}  {'steps/s':>12}  {'compile s':>9}  {'peak MiB':>8}  {'devices':>7}"
    if arguments.peer:
        heading += f"  {arguments.peer + ' steps/s':>12}  {'compile s':>9}  ratio: median [range]"
    print(heading)
    results = []
    for size in sizes:
        results.append(measure(size, arguments.peer, arguments.repeats, arguments.devices))
        print(row(results[-1], arguments.peer), flush=True)
    sides = ["purepg", *([arguments.peer] if arguments.peer else [])]
    for side in sides:
        print(f"{side}: {results[0][side]['device']}, XLA_FLAGS={results[0][side]['xla_flags']!r}")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.page:
        for marker in sorted(kinds):
            of_kind = [x for x in results if MARKERS[x["size"].split(":")[0]] == marker]
            write_block(arguments.page, marker, page_table(marker, of_kind, arguments.peer))


if __name__ == "__main__":
    main()
