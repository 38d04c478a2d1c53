"""The command line that evaluates an agent of a saved run."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from purepg.config import Count, CountOrZero, Seed, check
from purepg.envs.contract import in_units
from purepg.equations.distributions import executed
from purepg.run.cli import leave, parse_flags
from purepg.run.load import Agent, load
from purepg.run.outside import EVALUATED_AT_ONCE, evaluate_outside, not_jax
from purepg.train import EpisodeStats, evaluate
from purepg.types import UsageError


@dataclass(frozen=True)
class Choice:
    """Which agent, and how it is evaluated.

    Attributes:
      run: the run's folder. The flag itself may be left out.
      best: choose the agent with the highest final evaluation.
      setting: position of the agent's setting in the sweep.
      seed: the agent's seed.
      episodes: number of whole episodes.
      sampled: sample the actions instead of taking the policy's mode.
      eval_seed: seed of the evaluation.
      max_steps: truncate episodes after this many steps. None: at the environment's time limit.
    """

    run: Path
    best: bool = False
    setting: CountOrZero | None = None
    seed: CountOrZero | None = None
    episodes: Count = 1000
    sampled: bool = False
    eval_seed: Seed = 1
    max_steps: Count | None = None


def main(description: str | None = None) -> None:
    """Evaluates an agent, prints its report, and exits with 2 if an argument is bad."""
    try:
        print(report(check(parse_flags(Choice, run_first(sys.argv[1:]), description))))
    except UsageError as error:
        leave(Path(sys.argv[0]).stem, error, 2)


def run_first(arguments: list[str]) -> list[str]:
    """Allows the run's folder as a first argument without its flag."""
    return ["--run", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def report(choice: Choice) -> str:
    """Evaluates an agent and describes its returns in three lines."""
    agent = load(choice.run, choice.setting, choice.seed, choice.best)
    if (name := not_jax(agent.env)) and not agent.env.outside:
        raise UsageError(f"{name} is Python: summary.json and samples.jsonl in {choice.run} have its evaluations")
    if agent.algorithm.measure and agent.algorithm.policy(agent.state, True).respond is None:
        raise UsageError(f"{choice.run} holds a reward model, which gives no responses: see its summary.json")
    max_steps = agent.max_steps(choice.max_steps)

    stats = (on_the_host if agent.env.outside else _compiled)(agent, choice, max_steps)
    returns = stats.episode_return.astype(np.float64)
    error = returns.std(ddof=1) / np.sqrt(len(returns)) if len(returns) > 1 else np.nan
    return (
        f"{choice.run}: {agent.name}, after {agent.update:,} updates, on {agent.env.name}\n"
        f"return {returns.mean():.2f} +- {error:.2f} (standard error), deviation {returns.std():.2f}, "
        f"from {returns.min():.1f} to {returns.max():.1f}, {len(returns):,} episodes\n"
        f"length {stats.episode_length.mean():.1f}; {stats.terminated.mean():.1%} terminated, "
        f"{stats.truncated.mean():.1%} truncated"
    )


def _compiled(agent: Agent, choice: Choice, max_steps: int) -> EpisodeStats:
    @jax.jit
    def run(frozen, key, state):
        actor = agent.policy(frozen, state, not choice.sampled)
        return evaluate(key, agent.env.held_out or agent.env, actor, choice.episodes, max_steps)

    return jax.device_get(run(agent.frozen, jax.random.key(choice.eval_seed), agent.state))


def on_the_host(agent: Agent, choice: Choice, max_steps: int, at_once: int = EVALUATED_AT_ONCE) -> EpisodeStats:
    """`evaluate_outside` of an agent."""

    @jax.jit
    def act(state, turn, t, memory, obs):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(choice.eval_seed), turn), t)
        memory, action, _ = agent.algorithm.policy(state, not choice.sampled)(key, memory, obs)
        return memory, in_units(agent.env.action_space, executed(action))

    memory = agent.algorithm.policy(agent.state, True).memory
    sizes = choice.episodes, max_steps, choice.eval_seed
    return evaluate_outside(partial(act, agent.state), memory, agent.env, (), *sizes, at_once)
