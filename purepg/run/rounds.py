"""The rounds of a run: which settings are trained, for how long, and which after that, given the returns so far."""

import math
import operator
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.run.loop import Job, Saved
from purepg.run.plan import Plan, with_settings
from purepg.run.proposals import Proposals
from purepg.run.reliability import iqm
from purepg.run.summary import Part
from purepg.run.sweep import Chunk, settings_at
from purepg.types import State


class Round(NamedTuple):
    """What is trained at once."""

    plan: Plan  # with all settings so far
    settings: Sequence[int]  # those that are trained, as positions in the plan
    total_steps: int  # of each agent, from its first update on
    goes_on: bool = False  # whether the agents are those of the round before

    @property
    def chunks(self) -> list[Chunk]:
        return self.plan.chunks(self.settings, self.total_steps)


Rounds = Generator[Round, np.ndarray, None]  # it is sent the IQM of each of the round's settings


def rounds(plan: Plan) -> Rounds:
    """The rounds of a run, in order."""
    if plan.run.halve is not None:
        return halving(plan, plan.run.halve)
    return proposing(plan, plan.run.tpe) if plan.run.tpe else one_round(plan)


def one_round(plan: Plan) -> Rounds:
    """All settings, to the end."""
    yield Round(plan, range(len(plan.settings)), plan.run.total_steps)


def halving(plan: Plan, factor: int) -> Rounds:
    """Successive halving (Karnin et al. 2013; Jamieson & Talwalkar 2016, algorithm 1): after every rung, of n settings
    the ceil(n / factor) with the highest returns are trained on."""
    kept: Sequence[int] = range(len(plan.settings))
    for number, total_steps in enumerate(plan.rungs):
        iqm = yield Round(plan, kept, total_steps, goes_on=number > 0)
        order = np.argsort(-np.where(np.isfinite(iqm), iqm, -np.inf), kind="stable")
        kept = sorted(kept[i] for i in order[: math.ceil(len(kept) / factor)])


def proposing(plan: Plan, at_once: int) -> Rounds:
    """Sobol points, then settings that Optuna's TPE proposes, `at_once` in a round."""
    number, names = plan.run.search, list(plan.sweep)
    assert number
    proposals = Proposals(plan.settings[0].configs, plan.sweep, plan.run.seed, plan.settings)
    new = range(len(plan.settings))
    while True:
        found = yield Round(plan, new, plan.run.total_steps)
        for h, value in zip(new, found, strict=True):
            proposals.tell(plan.settings[h], value)
        if (left := number - len(plan.settings)) == 0:
            return
        points = proposals.ask(min(at_once, left))
        new = range(len(plan.settings), len(plan.settings) + len(points))
        plan = with_settings(plan, settings_at(plan.settings[0].configs, names, points))


def all_steps(plan: Plan) -> int:
    """The environment steps of all agents together."""
    run, number = plan.run, len(plan.settings)
    if run.halve is None:
        return (run.search if run.tpe and run.search else number) * run.num_seeds * run.total_steps
    before = total = 0
    for steps in plan.rungs:
        before, total, number = steps, total + number * (steps - before), math.ceil(number / run.halve)
    return total * run.num_seeds


def iqms(returns: Sequence[tuple[Chunk, np.ndarray]], settings: Sequence[int]) -> np.ndarray:
    """The IQM over seeds of each setting's returns, `[n]`; NaN without any.

    Args:
      returns: chunks, and the final evaluations of their agents, `[H, S]`.
    """
    found = {h: [x[chunk.settings.index(h)] for chunk, x in returns if h in chunk.settings] for h in settings}
    return np.array([iqm(np.concatenate(found[h])) if found[h] else np.nan for h in settings])


def after(order: Rounds, found: np.ndarray) -> Round | None:
    """The round after the one with these IQMs; None after the last."""
    try:
        return order.send(found)
    except StopIteration:
        return None


def carried(
    chunk: Chunk, before: Sequence[tuple[Job, Part]], state_of: Callable[[Job, Part], State] | None = None
) -> Saved:
    """Where a chunk goes on: the agents that it has in common with those of the round before.

    Args:
      state_of: the final state of a part. None: without a state.
    """
    pieces = [
        (job, part, rows)
        for job, part in before
        if part.chunk.seeds == chunk.seeds
        and (rows := [i for i, h in enumerate(part.chunk.settings) if h in chunk.settings])
    ]
    length = max(part.outcome.metrics["env_steps"].shape[-1] for _, part, _ in pieces)
    metrics = {
        name: np.concatenate([_padded(part.outcome.metrics[name][rows], length) for _, part, rows in pieces])
        for name in pieces[0][1].outcome.metrics
    }
    state = None
    if state_of:
        states = [jax.tree.map(operator.itemgetter(np.array(rows)), state_of(job, part)) for job, part, rows in pieces]
        state = jax.tree.map(lambda *x: jnp.concatenate(x), *states)
    return Saved(length, metrics, 0.0, before[0][0].total_steps, False, state)


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    """Metrics `[H, S, U]` as `[H, S, length]`; updates that were not made are NaN, or 0 in integers."""
    after = ((0, 0), (0, 0), (0, length - x.shape[-1]))
    return np.pad(x, after, constant_values=np.nan if x.dtype.kind == "f" else 0)
