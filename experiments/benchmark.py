"""Measures how fast algorithms train: environment steps per second, compile time and peak memory, at several sizes.

The jobs are PPO on CartPole (128 steps, 4 epochs, 4 minibatches, two 64-wide tanh layers; ppo_rnn has a GRU and layers
of 128, as PureJaxRL's ppo_rnn.py), SAC and TD3 on Pendulum (a gradient step on 256 transitions for every environment
step, two critics, two 64-wide relu layers, replay of 100,000), and GRPO on additions with a transformer of two layers
(32 prompts, 8 responses each, one gradient step; an environment step is a generated token). Every measurement has its
own process, which compiles and warms up before it is timed. With `--peer`, rejax (PPO, SAC and TD3) or PureJaxRL (its
ppo.py; as purejaxrl_rnn its ppo_rnn.py) does the same work in its own virtual environment, in turn with purepg. What
the update's matrix products alone would take, as one program on the same devices, is measured in turn too; and, beside
ppo_rnn, the same network without its GRU. `--overhead` measures what logging and saving a run costs instead.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from purepg.config import Count, Positive, check
from purepg.run.cli import leave, parse_flags
from purepg.run.pages import read_block, table, write_block
from purepg.runtime import SCHEDULER_FLAG, users_environment
from purepg.types import UsageError

SIZES = (  # algorithm:environments x seeds, or grpo:width x seeds
    *("ppo:4x1", "ppo:4x4", "ppo:4x16", "ppo:64x1", "ppo:64x16", "ppo:2048x1"),
    *("ppo_rnn:4x1", "ppo_rnn:64x1"),
    *("sac:1x1", "sac:1x16", "td3:1x1", "td3:1x16"),
    *("grpo:64x1", "grpo:64x4", "grpo:128x1", "grpo:256x1"),
)
OVERHEAD_SIZES = ("ppo:4x16", "sac:1x4")
MARKERS = {
    "ppo": "benchmark_ppo",
    "ppo_rnn": "benchmark_ppo_rnn",
    "sac": "benchmark_replay",
    "td3": "benchmark_replay",
    "grpo": "benchmark_grpo",
}
WITHOUT = "without memory"
FASTER = 10  # times, about, that a network is without its memory
OVERHEAD_MARKER = "benchmark_overhead"
OVERHEAD_RATES = {"ppo": 500_000, "sac": 5_000, "td3": 6_000}  # approximate steps per second on two cores
Overhead = Literal["log.jsonl", "progress bar", "W&B", "a checkpoint"]
OVERHEADS: tuple[Overhead, ...] = get_args(Overhead)
# About a second of work: long enough to time exactly, short enough that other load on the machine changes little.
STEPS_PER_RUN = {"ppo": 400_000, "ppo_rnn": 20_000, "sac": 8_000, "td3": 8_000, "grpo": 20_000}
NUM_STEPS = {
    "ppo": 128,
    "ppo_rnn": 128,
    "sac": 50,
    "td3": 50,
    "grpo": 16,
}  # grpo's value makes a run of 64x1 about 20 updates
# An environment for each peer; PureJaxRL's recurrent network needs the flax of its time, and so the JAX of its time.
PEERS = {
    "rejax": ("rejax==0.1.3", "gymnax==0.0.9", "jax==0.10.2", "jaxlib==0.10.2"),
    "purejaxrl": ("jax==0.10.2", "jaxlib==0.10.2", "flax", "optax", "distrax==0.1.9", "gymnax==0.0.9"),
    "purejaxrl_rnn": ("jax==0.4.13", "jaxlib==0.4.13", "flax==0.6.11", "gymnax==0.0.6", "distrax==0.1.5")
    + ("optax==0.1.7", "numpy<2", "scipy<1.13", "setuptools<70"),
    "trl": ("trl==1.16.0", "torch==2.13.0", "transformers==5.23.0", "peft==0.21.2"),  # of experiments/compare_trl.py
}
JOBS = {"rejax": ("ppo", "sac", "td3"), "purejaxrl": ("ppo",), "purejaxrl_rnn": ("ppo_rnn",)}
PUREJAXRL = "https://github.com/luchris429/purejaxrl", "31756b197773a52db763fdbe6d635e4b46522a73"
CHECKOUTS = {"purejaxrl": PUREJAXRL, "purejaxrl_rnn": PUREJAXRL}
HERE = Path(__file__).parent
PUREPG = str(HERE / "peers" / "purepg_worker.py")


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Attributes:
      peer: package that does the same work in turn; it is installed on first use.
      sizes: ALGORITHM:ENVIRONMENTSxSEEDS, or grpo:WIDTHxSEEDS. None: all of those in experiments/speed.md.
      repeats: timed runs of each size, of which the median counts.
      devices: devices for the seeds. None: as many as can divide them.
      overhead: measure what logging and saving a run costs instead. Without a value: all of these.
      seconds: length of a run whose overhead is measured.
      out: JSON file for the results. None: none.
      page: Markdown page whose blocks <!-- benchmark_... --> the tables replace. None: no page.
    """

    peer: Literal["rejax", "purejaxrl", "purejaxrl_rnn"] | None = None
    sizes: tuple[str, ...] | None = None
    repeats: Count = 7
    devices: Count | None = None
    overhead: tuple[Overhead, ...] | None = None
    seconds: Positive = 8.0
    out: Path | None = None
    page: Path | None = None


def overhead(
    sizes: Sequence[str], overheads: Sequence[str], length: float, repeats: int, devices: int | None
) -> list[dict]:
    """Prints, for every size, by how many per cent each kind of logging or saving lengthens a run, in turn with plain
    runs."""
    print(f"{'size':>10}  {'updates':>8}  {'seconds':>7}  per cent more time to train / until all is written")
    results = []
    for size in sizes:
        name, shape = size.split(":")
        num_envs, num_seeds = map(int, shape.split("x"))
        rate = OVERHEAD_RATES[name]
        num_updates = max(20, 10 * round(length * rate / (num_envs * num_seeds * NUM_STEPS[name] * 10)))
        sizes_ = [name, *map(str, (num_envs, num_seeds, num_updates, NUM_STEPS[name], devices or 0))]
        worker = Worker([sys.executable, PUREPG, "overhead", *sizes_])
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


class Worker:
    """A process that trains once per call of `run`."""

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
    """The Python of the peer's virtual environment, which the first call makes."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "purepg" / "peers" / peer
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed"
    if not done.exists():
        if peer == "purejaxrl_rnn" and sys.version_info >= (3, 12):
            sys.exit(f"benchmark: error: {peer} needs Python 3.11, the last that its JAX was built for")
        print(f"installing {' '.join(PEERS[peer])} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[peer]], check=True)
        if peer in CHECKOUTS:
            address, commit = CHECKOUTS[peer]
            subprocess.run(["git", "clone", "-q", address, folder / "purejaxrl"], check=True)
            subprocess.run(["git", "-C", folder / "purejaxrl", "checkout", "-q", commit], check=True)
        done.touch()
    return python


def measure(size: str, peer: str | None, repeats: int, devices: int | None) -> dict:
    """Times one size: medians over `repeats`, and the ratio to the peer within each pair of runs."""
    name, shape = size.split(":")
    num_envs, num_seeds = map(int, shape.split("x"))
    num_updates = max(1, STEPS_PER_RUN[name] // (num_envs * num_seeds * NUM_STEPS[name]))
    sizes = [name, *map(str, (num_envs, num_seeds, num_updates, NUM_STEPS[name]))]
    workers = {"purepg": Worker([sys.executable, PUREPG, "speed", *sizes, str(devices or 0)])}
    if name == "ppo_rnn":
        longer = ["ppo_without_memory", *sizes[1:3], str(FASTER * num_updates), *sizes[4:]]
        workers[WITHOUT] = Worker([sys.executable, PUREPG, "speed", *longer, str(devices or 0)])
    if peer:
        names = ("--algorithm", "--num-envs", "--num-seeds", "--num-updates", "--num-steps")
        flags = [part for pair in zip(names, sizes, strict=True) for part in pair]
        # Without the flag that purepg sets, jaxlib 0.10.2 can deadlock on few cores in any program.
        cure = {"XLA_FLAGS": f"--{SCHEDULER_FLAG}=false"}
        if peer == "purejaxrl_rnn":
            cure = {}  # its jaxlib does not know the flag
        script = HERE / "peers" / f"{peer.removesuffix('_rnn')}_worker.py"
        workers[peer] = Worker([str(peer_python(peer)), str(script), *flags], **cure)
    runs = {side: [] for side in workers}
    products = []
    for _ in range(repeats):
        for side, worker in workers.items():
            runs[side].append(worker.run())
        if name != "grpo":
            products.append(workers["purepg"].run("products")["seconds"] / runs["purepg"][-1]["seconds"])
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
    if products:
        result["purepg"]["products"] = statistics.median(products)
    if peer:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs["purepg"], runs[peer], strict=True)]
        result["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    if WITHOUT in runs:
        rates = [[r["env_steps"] / r["seconds"] for r in runs[side]] for side in (WITHOUT, "purepg")]
        result[WITHOUT]["times"] = statistics.median(a / b for a, b in zip(*rates, strict=True))
    return result


def row(result: dict, peer: str | None) -> str:
    """Formats a result as a line of the printed table."""
    ours = result["purepg"]
    text = (
        f"{result['size']:>10}  {ours['env_steps_per_second']:>12,.0f}  {ours['compile_seconds']:>9.1f}  "
        f"{ours['peak_memory_bytes'] / 2**20:>8,.0f}  {ours['devices']:>7}"
    )
    if ours["generated_per_second"]:
        text += f"  generation alone {ours['generated_per_second']:,.0f}/s"
    if "products" in ours:
        text += f"  {100 * ours['products']:>8.0f} %"
    if WITHOUT in result:
        text += f"  {WITHOUT} {_times_as_fast(result[WITHOUT])}"
    if peer:
        theirs, ratio = result[peer], result["ratio"]
        text += f"  {theirs['env_steps_per_second']:>12,.0f}  {theirs['compile_seconds']:>9.1f}"
        text += f"  {ratio['median']:>5.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]"
    return text


def _times_as_fast(side: dict) -> str:
    return f"{side['env_steps_per_second']:,.0f} ({side['times']:.1f} times)"


def page_table(marker: str, results: Sequence[dict], peer: str | None) -> str:
    """The table of experiments/speed.md with these results, which all belong to one marker."""
    first = {"benchmark_replay": "algorithm, environments x seeds", "benchmark_grpo": "width x seeds"}
    rates = ["whole update", "generation alone"] if marker == "benchmark_grpo" else ["steps/s"]
    header = [first.get(marker, "environments x seeds"), *rates, "compile s", "peak MiB", "devices"]
    header += [] if marker == "benchmark_grpo" else ["in products"]
    header += [f"{WITHOUT}, steps/s"] if marker == "benchmark_ppo_rnn" else []
    header += [f"{peer} steps/s", "ratio: median [range]"] if peer else []
    rows = []
    for result in results:
        name, shape = result["size"].split(":")
        ours, size = result["purepg"], shape.replace("x", " x ")
        of_rate = [ours["env_steps_per_second"], ours["generated_per_second"]][: len(rates)]
        row = [f"{name.upper()}, {size}" if marker == "benchmark_replay" else size, *(f"{x:,.0f}" for x in of_rate)]
        row += [f"{ours['compile_seconds']:.1f}", f"{ours['peak_memory_bytes'] / 2**20:,.0f}", str(ours["devices"])]
        row += [f"{100 * ours['products']:.0f} %"] if "products" in ours else []
        row += [_times_as_fast(result[WITHOUT])] if WITHOUT in result else []
        if peer:
            ratio = result["ratio"]
            row.append(f"{result[peer]['env_steps_per_second']:,.0f}")
            row.append(f"{ratio['median']:.2f} [{ratio['min']:.2f}, {ratio['max']:.2f}]")
        rows.append(row)
    return table(header, rows)


def marker_of(size: str, peer: str | None) -> str:
    """The block of experiments/speed.md with this size's row."""
    return "benchmark_ppo_purejaxrl" if peer == "purejaxrl" else MARKERS[size.split(":")[0]]


def overhead_table(results: Sequence[dict], overheads: Sequence[str]) -> str:
    """The table of experiments/speed.md that shows what logging and saving a run costs."""
    rows = []
    for result in results:
        name, shape = result["size"].split(":")
        num_envs, num_seeds = shape.split("x")
        row = [f"{name.upper()}, {num_envs} environment{'s' if num_envs != '1' else ''} x {num_seeds} agents"]
        row.append(f"{statistics.median(result['seconds']):.1f} s")
        for what in overheads:
            medians = (statistics.median(x) for x in zip(*result["per_cent"][what], strict=True))
            row.append(" / ".join(f"{x:+.1f}" for x in medians))
        rows.append(row)
    return table(["run", "length", *overheads], rows)


def sizes_of(choice: Choice) -> Sequence[str]:
    """The sizes to measure. Raises UsageError on one that cannot be."""
    timed = tuple(MARKERS) if choice.overhead is None else OVERHEAD_RATES
    if choice.peer:
        timed = JOBS[choice.peer]
    if not choice.sizes:
        return [x for x in (SIZES if choice.overhead is None else OVERHEAD_SIZES) if x.split(":")[0] in timed]
    for size in choice.sizes:
        if not re.fullmatch(r"\w+:[1-9]\d*x[1-9]\d*", size):
            raise UsageError(f"sizes ({size}) are such as {SIZES[0]}: an algorithm, its environments and its seeds")
        if (name := size.split(":")[0]) not in timed:
            by = choice.peer or ("--overhead" if choice.overhead is not None else "the benchmark")
            raise UsageError(f"sizes ({size}): {by} times {', '.join(timed)}, not {name}")
    return choice.sizes


def main() -> None:
    try:
        choice = check(parse_flags(Choice, sys.argv[1:], __doc__))
        sizes = sizes_of(choice)
        if choice.peer and choice.overhead is not None:
            raise UsageError("overhead is of purepg alone; leave --peer out")
        if choice.out and not choice.out.parent.is_dir():
            raise UsageError(f"out ({choice.out}) must be in a folder that exists")
        markers = sorted({OVERHEAD_MARKER if choice.overhead is not None else marker_of(x, choice.peer) for x in sizes})
        for marker in markers if choice.page else ():
            read_block(choice.page, marker)  # a missing page or block is reported before anything is measured
    except UsageError as error:
        leave("benchmark", error, 2)
    if choice.overhead is not None:
        overheads = choice.overhead or OVERHEADS
        results = overhead(sizes, overheads, choice.seconds, choice.repeats, choice.devices)
        tables = {OVERHEAD_MARKER: overhead_table(results, overheads)}
    else:
        results = speeds(sizes, choice)
        rows_of = {marker: [x for x in results if marker_of(x["size"], choice.peer) == marker] for marker in markers}
        tables = {marker: page_table(marker, rows, choice.peer) for marker, rows in rows_of.items()}
    if choice.out:
        choice.out.write_text(json.dumps(results, indent=2) + "\n")
    for marker, text in tables.items() if choice.page else ():
        write_block(choice.page, marker, text)


def speeds(sizes: Sequence[str], choice: Choice) -> list[dict]:
    """Measures every size and prints its row."""
    peer = choice.peer
    heading = f"{'size':>10}  {'steps/s':>12}  {'compile s':>9}  {'peak MiB':>8}  {'devices':>7}  products"
    if peer:
        heading += f"  {peer + ' steps/s':>12}  {'compile s':>9}  ratio: median [range]"
    print(heading)
    results = []
    for size in sizes:
        results.append(measure(size, peer, choice.repeats, choice.devices))
        print(row(results[-1], peer), flush=True)
    for side in ["purepg", *([peer] if peer else [])]:
        print(f"{side}: {results[0][side]['device']}, XLA_FLAGS={results[0][side]['xla_flags']!r}")
    return results


if __name__ == "__main__":
    main()
