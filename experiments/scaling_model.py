"""A model of PPO on several H100s: what spreading one agent's environments gains, and from how many environments on.

Nothing is timed. The program of an update is compiled twice. Compiled for the CPU's devices, it tells what they
exchange, how often and how many bytes. Compiled for one H100, which needs `pip install "jax[cuda13]"` and no GPU, it
tells how many kernels an update launches and how many bytes they move. With N environments on D GPUs, an update takes

    t(N, D) = launches + N / D * (bytes moved / memory's bandwidth + multiplications / their rate)
              + sum over exchanges of latency + 2 (D - 1) / D * bytes / link's bandwidth            (only where D > 1)

Launches do not become fewer as environments are spread; bytes and multiplications do.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from gpu_cost import Config as Target
from gpu_cost import compiled, planned, target_of
from parts.compiled_cost import Device, Exchange, exchanges_of

from purepg.config import Count, Positive
from purepg.run.devices import Spread
from purepg.run.pages import table
from purepg.run.population import Member
from purepg.run.study import Study, main

# NVIDIA's data sheet of the H100 SXM (nvidia.com/en-us/data-center/h100): 989 teraFLOPS of TF32 with sparsity, so half
# without; NVLink with 900 GB/s for each GPU, half of it in each direction. JAX multiplies float32 in TF32 by default.
FLOPS = 494.5e12
NVLINK = 450e9
# NVIDIA's data sheet of the DGX H100 (nvidia.com/en-us/data-center/dgx-h100): 400 Gb/s of InfiniBand for each GPU.
INFINIBAND = 50e9
GPUS_OF_NODE = 8
BUDGET = 10**6  # environment steps of the planned run, of which only a block is compiled


@dataclass(frozen=True)
class Config:
    """The programs and what is assumed.

    Attributes:
      networks: widths of the layers of the policy and of the critic.
      gpus: numbers of GPUs; up to 8 are one node.
      num_envs: of the table.
      updates: length of the compiled block.
      node_latency_us: microseconds of a small exchange within a node. An assumption.
      cluster_latency_us: microseconds of a small exchange between nodes. An assumption.
    """

    networks: tuple[str, ...] = ("64x64", "1024x1024x1024")
    gpus: tuple[Count, ...] = (8, 64)
    num_envs: tuple[Count, ...] = (2**11, 2**13, 2**15, 2**17, 2**20)
    updates: Count = 10
    node_latency_us: Positive = 20.0
    cluster_latency_us: Positive = 40.0


class Link(NamedTuple):
    """What connects GPUs."""

    latency: float  # seconds of an exchange of no bytes
    bandwidth: float  # bytes a second that leave a GPU


class Work(NamedTuple):
    """Of an update on one GPU, in seconds."""

    launches: float
    of_env: float


def exchange_seconds(exchanges: Iterable[Exchange], gpus: int, link: Link) -> float:
    """Of an update: a ring sends 2 (D - 1) / D of the bytes from each GPU. One GPU exchanges nothing."""
    if gpus == 1:
        return 0.0
    share = 2 * (gpus - 1) / gpus
    return sum(x.times * (link.latency + share * x.num_bytes / link.bandwidth) for x in exchanges)


def seconds(work: Work, exchanged: float, num_envs: float, gpus: int) -> float:
    """Of an update, of which `exchanged` are spent on exchanges."""
    return work.launches + num_envs / gpus * work.of_env + exchanged


def speedup(work: Work, exchanges: Sequence[Exchange], num_envs: float, gpus: int, link: Link) -> float:
    """How many times as fast as on one GPU."""
    spread = seconds(work, exchange_seconds(exchanges, gpus, link), num_envs, gpus)
    return seconds(work, 0.0, num_envs, 1) / spread


def pays_from(work: Work, exchanges: Sequence[Exchange], gpus: int, link: Link) -> float:
    """The number of environments from which on D GPUs are D / 2 times as fast as one, an efficiency of one half:

    launches + N of_env = D / 2 (launches + N / D of_env + exchanged)
    """
    exchanged = exchange_seconds(exchanges, gpus, link)
    return max(0.0, ((gpus - 2) * work.launches + gpus * exchanged) / work.of_env)


def link_of(gpus: int, config: Config, slower: float = 1.0) -> Link:
    """NVLink where all GPUs are of one node, else InfiniBand, which is then the slowest link of the ring; with `slower`
    times the assumed latency."""
    if gpus <= GPUS_OF_NODE:
        return Link(slower * config.node_latency_us / 1e6, NVLINK)
    return Link(slower * config.cluster_latency_us / 1e6, INFINIBAND)


def exchanges_in(program: str, updates: int, per_agent: int) -> list[Exchange]:
    """What an update of a program exchanges on two of the CPU's devices; neither their number nor that of environments
    changes it.

    Args:
      per_agent: devices of each agent, of the two.
    """
    plan, _ = planned(program, total_steps=BUDGET, devices=2, devices_per_agent=per_agent)
    (chunk,) = plan.chunks()
    over = Spread(*chunk.shape, plan.num_devices, plan.run.devices_per_agent)
    member = Member(plan, chunk.program)
    state = over.abstract(jax.eval_shape(over(member.init), *chunk.members))
    block = over(lambda hyper, s, state: member.advance(hyper, s, state, jnp.int32(0), updates))
    compiled = jax.jit(block, out_shardings=(over.placed, None)).lower(*chunk.members, state).compile()
    return [x._replace(trips=x.trips[1:]) for x in exchanges_of(compiled.as_text() or "") if x.trips]


class Program(NamedTuple):
    """PPO with one network."""

    network: str
    work: Work
    launches: float  # of an update
    memory_of_env: float  # bytes of temporaries on one GPU
    exchanges: list[Exchange]  # of an update


def program_with(network: str, config: Config, target: tuple[Any, Device]) -> Program:
    """The cost of PPO with a network, from programs with 2048 and with 4096 environments."""
    few, more = 2048, 4096
    label, device = f"ppo:{{}}x1:network.hidden={network}", target[1]
    one, two = (compiled(label.format(n), Target(updates=config.updates), *target) for n in (few, more))
    plan, _ = planned(label.format(few), total_steps=BUDGET, devices=1)
    ppo = plan.programs[0].configs["ppo"]
    params = jax.eval_shape(plan.algorithm_of(0).init, jax.random.key(0)).learner.train_state.params
    forward = 2 * sum(x.size for x in jax.tree.leaves(params))  # a multiplication and an addition
    operations = ppo.num_steps * forward * (1 + 3 * ppo.num_epochs)  # a gradient costs three forward passes
    moved = (two.cost.bytes_moved - one.cost.bytes_moved) / (more - few)
    work = Work(one.cost.launches * device.launch_seconds, moved / device.bytes_per_second + operations / FLOPS)
    exchanges = exchanges_in(label.format(64), config.updates, per_agent=2)
    return Program(network, work, one.cost.launches, (two.temporaries - one.temporaries) / (more - few), exchanges)


def exchange_row(name: str, exchanges: Sequence[Exchange]) -> list[str]:
    """A row of the table of exchanges; gradient steps are in the innermost loop."""
    depth = max((len(x.trips) for x in exchanges), default=0)
    inner = [x.num_bytes for x in exchanges if len(x.trips) == depth]
    times, num_bytes = sum(x.times for x in exchanges), sum(x.times * x.num_bytes for x in exchanges)
    return [name, *(f"{x:,.0f}" for x in (len(inner), sum(inner), times, num_bytes))]


def study(config: Config) -> Study:
    """The exchanges, the speedups, and from how many environments on GPUs pay.

    Raises:
      UsageError: a network is not one, or the plugin for CUDA is not installed.
    """
    target = target_of("h100")
    jax.config.update("jax_num_cpu_devices", 2)
    found = [program_with(network, config, target) for network in config.networks]
    others = {
        "SAC's script with 4 environments": exchanges_in("sac:4x1", config.updates, per_agent=2),
        "PPO, 16 agents spread, 64x64": exchanges_in("ppo:64x16", config.updates, per_agent=1),
    }
    header = ["program", "exchanges of a gradient step", "bytes", "exchanges of an update", "bytes of an update"]
    rows = [exchange_row(f"PPO, {x.network}", x.exchanges) for x in found]
    exchanged = table(header, rows + [exchange_row(*x) for x in others.items()])

    header = ["PPO's network", "environments", "GiB on one GPU", "on one GPU, ms"]
    rows = []
    for x in found:
        for n in config.num_envs:
            gains = [speedup(x.work, x.exchanges, n, gpus, link_of(gpus, config)) for gpus in config.gpus]
            memory, alone = n * x.memory_of_env / 2**30, 1e3 * seconds(x.work, 0.0, n, 1)
            rows.append([x.network, f"{n:,}", f"{memory:,.1f}", f"{alone:,.1f}", *(f"{gain:.2f}" for gain in gains)])
    gained = table([*header, *(f"speedup on {n}" for n in config.gpus)], rows)

    header = ["PPO's network", "launches of an update", "us of each environment"]
    rows = []
    for x in found:
        cells = [x.network, f"{x.launches:,.0f}", f"{1e6 * x.work.of_env:.2f}"]
        for gpus in config.gpus:
            links = [link_of(gpus, config, slower) for slower in (1.0, 0.5, 2.0)]
            middle, low, high = (f"{math.ceil(pays_from(x.work, x.exchanges, gpus, link)):,}" for link in links)
            cells.append(f"{middle} [{low}, {high}]")
        rows.append(cells)
    pays = table([*header, *(f"{n} GPUs pay from" for n in config.gpus)], rows)
    numbers = {x.network: x._asdict() for x in found}
    written = f"{exchanged}\n\n{gained}\n\n{pays}"
    return Study(written, {"ppo": numbers, "others": others}, table=written)


if __name__ == "__main__":
    main(study, Config(), __doc__)
