"""Compiles training programs for a GPU on a machine that has none, and counts what they will cost there.

The figures are exact for the compiled program and free of noise: how many kernels an update launches, how many bytes
they move, and the memory for temporaries. The floor is the least time that follows from them: each kernel takes a
launch at least (one microsecond, as within a captured graph) or as long as its bytes take at the device's bandwidth. A
real update takes longer. Needs `pip install "jax[cuda13]"`, which is several gigabytes, and no GPU. Kernels are not
autotuned, so that a real device may choose other tiles.
"""

import importlib.util
import logging
import re
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from parts.compiled_cost import Cost, Device, Loop, cost_of
from parts.suite_cells import SCRIPTS, Missing, cell, environments, named, overrides

from purepg.config import Count
from purepg.run.pages import table
from purepg.run.plan import Plan, prepare
from purepg.run.population import Population
from purepg.run.study import Study, main
from purepg.runtime import compiling_for
from purepg.types import UsageError

HERE = Path(__file__).parent / "parts"
TARGETS = {"h100": HERE / "h100.pbtxt", "a100": HERE / "a100.pbtxt"}
LAUNCH_SECONDS = 1e-6
SETTINGS = {  # of the published comparison with PureJaxRL, and of rejax's replay
    "ppo": "num_steps=128 num_epochs=4 num_minibatches=4 learning_rate=2.5e-4 entropy_coef=0.01 clip_value_eps=0.2 "
    "anneal_learning_rate=true anneal_clip_eps=false normalize_obs=false scale_reward=false",
    "sac": "num_steps=50 warmup_steps=300 batch_size=256 capacity=100000",
}


@dataclass(frozen=True)
class Config:
    """The programs.

    Attributes:
      programs: each ALGORITHM:ENVIRONMENTSxAGENTS, perhaps with settings, as in ppo:64x1:network.hidden=256x256. Those
        not given are the algorithm's script's, but for ppo and sac those of the comparison with PureJaxRL.
      env: name of the environment, perhaps with parameters, as in CartPole-v1:observed=0,2. None: that of the
        algorithm's script, such as CartPole-v1 for ppo.
      target: the GPU: h100, a100, or a file with XLA's description of another.
      updates: length of the compiled block.
    """

    programs: tuple[str, ...] = ("ppo:2048x1", "ppo:4x2048", "ppo:64x16", "ppo:64x1", "sac:1x1")
    env: str | None = None
    target: str = "h100"
    updates: Count = 10


class Compiled(NamedTuple):
    """A program's cost for each update."""

    program: str
    env: str
    env_steps: int  # of an update, of all agents
    cost: Cost
    loops: list[Loop]
    temporaries: int  # bytes
    seconds: float  # that it took to compile


def target_of(name: str) -> tuple[Any, Device]:
    """A device to compile for, and what its kernels cost.

    Raises:
      UsageError: there is no such target, or the plugin for CUDA is not installed.
    """
    path = TARGETS.get(name, Path(name))
    if not path.is_file():
        raise UsageError(f"target ({name}) must be {' or '.join(TARGETS)}, or a file with XLA's description of a GPU")
    if not (importlib.util.find_spec("jax_plugins") and importlib.util.find_spec("jax_plugins.xla_cuda13")):
        raise UsageError('to compile for a GPU needs its plugin: pip install "jax[cuda13]"')
    jax.config.update("jax_platforms", "cpu")
    logging.disable(logging.ERROR)  # it looks for a device, and says that there is none
    text = path.read_text()
    bandwidth = re.search(r"memory_bandwidth: *(\d+)", text)
    if bandwidth is None:
        raise UsageError(f"target ({name}) has no memory_bandwidth")
    try:
        found = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    except Exception as error:
        raise UsageError(f"target ({name}) is not a description that XLA reads: {error}") from error
    return found.devices[0], Device(float(bandwidth.group(1)), LAUNCH_SECONDS)


def planned(program: str, env: str | None = None, **sizes: Any) -> tuple[Plan, str]:
    """The plan of a program, and its environment.

    Args:
      sizes: fields of the run, such as devices.
    Raises:
      UsageError: it is not of the form ALGORITHM:ENVIRONMENTSxAGENTS, or its settings do not fit.
    """
    algorithm, _, rest = program.partition(":")
    shape, *own = rest.split(":")
    if not re.fullmatch(r"\d+x\d+", shape):
        raise UsageError(f"program ({program}) must be ALGORITHM:ENVIRONMENTSxAGENTS, as in ppo:64x1")
    if algorithm not in SCRIPTS:
        raise UsageError(f"program ({program}) must begin with one of {', '.join(SCRIPTS)}")
    num_envs, num_agents = map(int, shape.split("x"))
    chosen: str = env or import_module(SCRIPTS[algorithm][0]).EXPERIMENT[4].env
    settings = [f"{algorithm}.{x}" for x in SETTINGS.get(algorithm, "").split()]
    changes = overrides([*settings, f"{algorithm}.num_envs={num_envs}"], [algorithm])
    discrete, _ = environments([chosen])
    found = cell(":".join([algorithm, *own]), chosen, discrete[chosen], [algorithm], changes)
    if isinstance(found, Missing):
        raise UsageError(f"program ({program}): {found.why}")
    make, own_config, network, network_config, run = found.experiment
    env_name, env_params = named(chosen)
    run = replace(run, env=env_name, env_params=env_params, num_seeds=num_agents, compile_cache=False, **sizes)
    return prepare(make, network, {make.__name__: own_config, "network": network_config}, run, {}), chosen


def compiled(program: str, config: Config, place: Any, device: Device) -> Compiled:
    """Compiles one program. Raises UsageError as `planned` does."""
    with compiling_for("gpu"):
        plan, env = planned(program, config.env, total_steps=10**6, devices=1)
        chunk = plan.chunks()[0]
        population = Population(plan, chunk.program, chunk.shape)
        begun = time.time()
        lowered = population.lowered(chunk.members, config.updates, jax.sharding.SingleDeviceSharding(place))
        done = lowered.compile(compiler_options={"xla_gpu_autotune_level": "0"})  # to autotune needs the device
    steps = plan.run.num_seeds * plan.algorithm_of(0).update_steps.most
    cost, loops = cost_of(done.as_text(), device)
    temporaries = done.memory_analysis().temp_size_in_bytes
    return Compiled(program, env, steps, cost.times(1 / config.updates), loops, temporaries, time.time() - begun)


def study(config: Config) -> Study:
    """The costs of all programs, in a table.

    Raises:
      UsageError: a program or the target is wrong.
    """
    place, device = target_of(config.target)
    found = []
    for program in config.programs:
        found.append(compiled(program, config, place, device))
        print(told(found[-1]), flush=True)
    header = "program", "environment", "launches", "MiB moved", "MiB of temporaries", "floor, us", "at most, steps/s"
    rows = [
        (
            x.program,
            x.env,
            f"{x.cost.launches:,.0f}",
            f"{x.cost.bytes_moved / 2**20:,.0f}",
            f"{x.temporaries / 2**20:,.0f}",
            f"{1e6 * x.cost.seconds:,.0f}",
            f"{x.env_steps / x.cost.seconds:,.0f}",
        )
        for x in found
    ]
    made = f"Compiled for: {config.target}. All figures are of one update; the last two follow from those before.\n\n"
    written = made + table(header, rows)
    return Study(written, {x.program: x._asdict() for x in found}, table=written)


def told(x: Compiled) -> str:
    """A program's cost in words, and that of each of its loops."""
    moved = f"{x.cost.bytes_moved / 2**20:,.0f} MiB moved; compiled in {x.seconds:.0f} s"
    lines = [f"{x.program} on {x.env}: {x.cost.launches:,.0f} launches an update, {moved}"]
    for loop in x.loops:
        of_each = f"{loop.cost.launches:,.0f} launches, {loop.cost.bytes_moved / 2**20:,.2f} MiB"
        lines.append(f"{'  ' * (loop.depth + 1)}{loop.trips} times {of_each}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(study, Config(), __doc__)
