"""Trains PPO with several kinds of memory in T-mazes of growing length, and draws which lengths each one solves.

A cue at the entrance says which way to turn at the junction, `length` steps later. With memory the best return is 1,
and without it 0.5 (experiments/memory_bias.py computes both). Each memory is trained on whole rollouts and on shorter
windows of `window` steps, through whose edges no gradient passes.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from purepg.algorithms.ppo import PPOConfig, ppo
from purepg.config import Count, Positive, Seed
from purepg.networks.actor_critic import NetworkConfig, actor_critic
from purepg.networks.memory import MemoryKind
from purepg.run.console import say
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.study import Study, main
from purepg.run.summary import with_interval
from purepg.run.watch.style import dress, look, over_num_seeds
from purepg.types import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOLVED = 0.95
NAMES = {"feedforward": "no memory", "stack": "stack of 4"}  # of those that no window matters to


@dataclass(frozen=True)
class Config:
    """The mazes and the agents.

    Attributes:
      lengths: steps from the cue to the junction.
      memories: kinds of memory, as of --network.memory; feedforward is a policy without.
      windows: steps of a window, each a divisor of num_steps.
      seeds: agents of each kind.
      seed: seed of every run.
      steps: budget of environment steps of each agent.
      num_envs: parallel environments.
      num_steps: steps that each environment takes in an update.
      learning_rate: step size of Adam, which falls to 0.
      hidden: width of the layer before the memory, and of the memory. A transformer looks back num_steps steps.
    """

    lengths: tuple[Count, ...] = (5, 10, 20, 40, 80)
    memories: tuple[Literal["feedforward", "stack", "gru", "lstm", "lru", "transformer"], ...] = (
        "feedforward",
        "stack",
        "gru",
        "lru",
        "transformer",
    )
    windows: tuple[Count, ...] = (96, 12)
    seeds: Count = 10
    seed: Seed = 0
    steps: Count = 100_000
    num_envs: Count = 16
    num_steps: Count = 96
    learning_rate: Positive = 2e-3
    hidden: Count = 32


class Cell(NamedTuple):
    """Agents of one kind in one maze."""

    iqm: float
    interval: tuple[float, float]
    finals: list[float]


def trained(config: Config, length: int, kind: MemoryKind | None, window: int) -> Cell:
    """The final returns of agents with this memory, trained on windows of this length."""
    own = PPOConfig(
        num_envs=config.num_envs,
        num_steps=config.num_steps,
        window=window if kind else None,
        learning_rate=config.learning_rate,
        anneal_learning_rate=True,
        entropy_coef=0.01,
    )
    sizes = {None: None, "stack": 4, "transformer": config.num_steps}
    network = NetworkConfig(hidden=(config.hidden,), memory=kind, memory_size=sizes.get(kind, config.hidden))
    run = RunConfig("tmaze", config.steps, config.seeds, seed=config.seed, env_params=(f"length={length}",))
    (setting,) = train_population(ppo, own, actor_critic, network, run).summary["settings"]
    return Cell(setting["iqm"], tuple(setting["interval"]), setting["finals"])


def rows_of(config: Config) -> list[tuple[str, MemoryKind | None, int]]:
    """(name, memory, window) of every kind of agent."""
    found = []
    for name in config.memories:
        windows = config.windows[:1] if name in NAMES else config.windows
        kind = None if name == "feedforward" else name
        found += [(NAMES.get(name, f"{name}, window {L}"), kind, L) for L in windows]
    return found


def picture(found: Mapping[str, Mapping[int, Cell]], config: Config) -> "Figure":
    """Final return against length, a line for each kind of agent."""
    from matplotlib.ticker import NullLocator

    from purepg.run.watch.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for i, (name, of_lengths) in enumerate(found.items()):
        colour, style = look(i)
        lengths = list(of_lengths)
        cells = [of_lengths[length] for length in lengths]
        axes.plot(lengths, [x.iqm for x in cells], style, marker="o", markersize=4, color=colour, label=name)
        low, high = ([x.interval[i] for x in cells] for i in (0, 1))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(config.lengths, [str(length) for length in config.lengths])
    axes.set_ylim(0.3, 1.05)
    axes.set_xlabel("length of the corridor")
    axes.set_ylabel("final return")
    note = f"{over_num_seeds(config.seeds)} after {config.steps:,} steps; band: 95 % interval"
    dress(axes, "T-maze: what is remembered until the junction", note)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def study(config: Config) -> Study:
    """Trains all agents."""
    if bad := [window for window in config.windows if config.num_steps % window]:
        raise UsageError(f"windows ({', '.join(map(str, bad))}) must divide num_steps ({config.num_steps})")
    found: dict[str, dict[int, Cell]] = {}
    for name, kind, window in rows_of(config):
        found[name] = {}
        for length in config.lengths:
            say(f"{name}, length {length}")
            found[name][length] = trained(config, length, kind, window)
    rows = []
    for name, of_lengths in found.items():
        solved = [length for length, x in of_lengths.items() if x.iqm >= SOLVED]
        cells = [with_interval(x.iqm, x.interval) for x in of_lengths.values()]
        rows.append([name, *cells, str(max(solved)) if solved else "-"])
    text = table(["memory", *(f"length {length}" for length in config.lengths), f"longest with {SOLVED}"], rows)
    numbers = {name: {str(L): x._asdict() for L, x in of_lengths.items()} for name, of_lengths in found.items()}
    return Study(text, {"config": dataclasses.asdict(config), "agents": numbers}, picture(found, config), text)


if __name__ == "__main__":
    main(study, Config(), __doc__)
