"""Population-based training (Jaderberg et al. 2017), as a combinator on the members of a population.

H members with different hyperparameters train side by side. In a round, after every so many updates, each member has a
score, the mean return of the episodes that ended since the last round. Then

    exploit: a member of the lowest fifth copies one of the highest fifth, drawn uniformly, if that has a higher score
    explore: each hyperparameter of a copy is multiplied by 0.8 or 1.2, or drawn anew from its range

A copy takes over the learner: parameters, optimiser state, normalisers and coefficients. The world stays the member's
own: environments, replay and what a policy remembers of its running episodes. So the first episodes to end after a
round are partly those of the learner before.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from purepg.types import Algorithm, Array, Key, Mean, Metrics, State

POPULATION = "population"  # the name of the members' axis under `jax.vmap`
FACTORS = 0.8, 1.2  # as in the paper
RESAMPLED = 0.25  # the probability that a hyperparameter is drawn anew

Hyper = Mapping[str, Array]  # the hyperparameters that are tuned, by name


class Interval(NamedTuple):
    """The range of a hyperparameter, uniform on a linear or on a logarithmic scale."""

    low: float
    high: float
    log: bool


class Tuned(NamedTuple):
    """What a member of the population knows beside its learner and its world: a state's `guard`."""

    guard: Any  # that of the algorithm
    hyper: Hyper
    score: Array  # of the last round in which an episode ended; -inf before
    returns: Mean  # of the episodes that ended since the last round


def with_hyper(state: State, hyper: Hyper) -> State:
    """A member's first state, from that of its algorithm."""
    hyper = {name: jnp.float32(x) for name, x in hyper.items()}
    nothing = Mean(jnp.float32(0.0), jnp.int32(0))
    return state._replace(guard=Tuned(state.guard, hyper, jnp.float32(-jnp.inf), nothing))


def tuned(
    make: Callable[[Hyper], Algorithm], hyper: Hyper, ranges: Mapping[str, Interval], key: Key, every: int
) -> Algorithm:
    """A member of a population under `jax.vmap` with the axis `POPULATION`.

    Its hyperparameters are part of its state. Rounds lie before the updates `every`, `2 * every`, ..., so that blocks
    of any length agree, and a run that is extended with one that was longer from the beginning. The metrics gain
    `hyper/NAME`, the values in use, and `parent`, the member that was copied before the update, or the member itself.

    Args:
      make: `make(hyper)`, a guarded algorithm; its floats may be tracers.
      hyper: the member's hyperparameters at the start.
      key: the same for all members. Round r uses `fold_in(key, r)`.
    """
    first = make(hyper)

    def init(key):
        return with_hyper(first.init(key), hyper)

    def step(k_update, state, update):
        def exploit_and_explore(learner, known):
            return _round(jax.random.fold_in(key, update // every), ranges, learner, known)

        def keep(learner, known):
            return learner, known, jax.lax.axis_index(POPULATION)

        turn = (update > 0) & (update % every == 0)
        learner, known, parent = jax.lax.cond(turn, exploit_and_explore, keep, state.learner, state.guard)
        new, metrics = make(known.hyper).step(k_update, State(learner, state.world, known.guard), update)
        returns = Mean(*(a + b for a, b in zip(known.returns, _returns(metrics), strict=True)))
        lineage = {f"hyper/{name}": x for name, x in known.hyper.items()} | {"parent": parent}
        return State(new.learner, new.world, known._replace(guard=new.guard, returns=returns)), metrics | lineage

    def policy(state, deterministic):
        return make(state.guard.hyper).policy(state, deterministic)

    return first._replace(init=init, step=step, policy=policy, explorer=None)


def _returns(metrics: Metrics) -> Mean:
    """The sum of the returns of the episodes that ended in an update, and their number."""
    found, num = metrics["episode_return"], metrics["num_episodes"].astype(jnp.int32)
    return Mean(found.total, num) if isinstance(found, Mean) else Mean(found * num, num)


def _round(key: Key, ranges: Mapping[str, Interval], learner: Any, known: Tuned) -> tuple[Any, Tuned, Array]:
    """One member's part of a round: its learner, what it knows, and which member it has copied, perhaps itself."""
    k_exploit, k_explore = jax.random.split(key)
    total, num = known.returns
    known = known._replace(
        score=jnp.where(num > 0, total / jnp.maximum(num, 1), known.score),
        returns=jax.tree.map(jnp.zeros_like, known.returns),
    )
    everyone = partial(jax.lax.all_gather, axis_name=POPULATION)
    own = jax.lax.axis_index(POPULATION)
    parent = parents(k_exploit, everyone(known.score), everyone(known.guard.finite))[own]
    learner, known = jax.tree.map(lambda x: everyone(x)[parent], (learner, known))
    keys = jax.random.split(jax.random.fold_in(k_explore, own), len(ranges))
    hyper = {
        name: jnp.where(parent == own, x, explored(k, x, ranges[name]))
        for k, (name, x) in zip(keys, sorted(known.hyper.items()), strict=True)
    }
    return learner, known._replace(hyper=hyper), parent


def parents(key: Key, score: Array, finite: Array) -> Array:
    """Truncation selection: which member each one copies, itself where none.

    A member that diverged, which can learn no more, or whose score is not finite, ranks lowest. Equal scores rank in
    random order.

    Args:
      score, finite: `[H]`.
    Returns:
      `[H]` int32.
    """
    H = score.shape[0]
    num = max(1, H // 5)
    k_ties, k_parents = jax.random.split(key)
    score = jnp.where(finite & jnp.isfinite(score), score, -jnp.inf)
    order = jnp.lexsort((jax.random.uniform(k_ties, (H,)), score))  # the lowest first
    lowest, drawn = order[:num], jax.random.choice(k_parents, order[-num:], (num,))
    return jnp.arange(H).at[lowest].set(jnp.where(score[drawn] > score[lowest], drawn, lowest))


def explored(key: Key, value: Array, interval: Interval) -> Array:
    """A hyperparameter multiplied by one of `FACTORS` and clipped to its range, or with the probability `RESAMPLED`
    drawn anew from the range. All are scalars."""
    low, high, log = interval
    k_factor, k_which, k_value = jax.random.split(key, 3)
    multiplied = jnp.clip(value * jax.random.choice(k_factor, jnp.float32(jnp.array(FACTORS))), low, high)
    u = jax.random.uniform(k_value)
    anew = jnp.clip(low * (high / low) ** u if log else low + u * (high - low), low, high)
    return jnp.where(jax.random.bernoulli(k_which, RESAMPLED), anew, multiplied)
