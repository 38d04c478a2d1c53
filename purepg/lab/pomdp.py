"""The best return of a finite process that a policy observes through `alias`, with memory and without.

For episodes of bounded length: a horizon that terminates, or no way to stay in the process for ever. A time limit
changes nothing, as in `exact`. All is computed in float64.
"""

from itertools import product
from typing import NamedTuple

import numpy as np

from purepg.envs.finite_mdp import FiniteMDP
from purepg.types import UsageError

MAX_BELIEFS = 100_000  # at one step
MAX_POLICIES = 100_000


class WithMemory(NamedTuple):
    objective: float
    num_beliefs: int  # that differ, at all steps together


class WithoutMemory(NamedTuple):
    objective: float
    action: np.ndarray  # [O], of each value of `alias`; 0 where only terminal states have it


def longest_episode(mdp: FiniteMDP) -> int:
    """The number of steps of the longest episode. Raises UsageError if there is none."""
    limit = mdp.horizon if mdp.horizon_terminates else None
    reached, t = mdp.start > 0, 0
    edge = mdp.transition.sum(axis=1) > 0
    while reached.any() and t != limit:
        if limit is None and t == mdp.num_states:  # some state was visited twice
            raise UsageError(f"{mdp.name} has episodes of any length: give it a horizon that terminates")
        reached, t = edge[reached].any(axis=0) & ~mdp.terminal, t + 1
    return t


def optimum_with_memory(mdp: FiniteMDP) -> WithMemory:
    """The best policy that remembers everything it has observed and done, by dynamic programming over beliefs:

        V_t(b) = max_a sum_s b(s) r(s, a) + gamma * sum_o P(o | b, a) V_{t+1}(P(s' | b, a, o))

    b(s) = P(s_t = s | the history), from P(s_0 = s | o_0) on (Astrom 1965; Smallwood & Sondik 1973). Beliefs that agree
    to 1e-12 are taken for one. The best policy is deterministic and so knows its own actions: one that remembers only
    observations, as `networks.memory`, can do as well. It knows the time, too, and that the episode has not ended.

    Raises:
      UsageError: `longest_episode` does, or a step has more than 100,000 beliefs.
    """
    alive = ~mdp.terminal
    onward = mdp.transition * alive[:, None, None] * alive
    possible, *first = _by_observation(mdp, mdp.start)
    beliefs, outcomes = [possible], []
    for _ in range(longest_episode(mdp) - 1):
        belief, *outcome = _by_observation(mdp, np.tensordot(beliefs[-1], onward, 1))
        beliefs.append(belief)
        outcomes.append(outcome)

    value = np.max(beliefs[-1] @ mdp.reward, axis=1)
    for belief, (following, probability) in zip(beliefs[-2::-1], outcomes[::-1], strict=True):
        later = np.sum(probability * value[following], axis=-1)
        value = np.max(belief @ mdp.reward + mdp.gamma * later, axis=1)
    following, probability = first
    return WithMemory(float(probability @ value[following]), sum(map(len, beliefs)))


def _by_observation(mdp: FiniteMDP, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an observation tells of the state. `mass`, P(s) of each of several cases, is `[..., S]`.

    Returns:
      (beliefs `[B, S]`, all different; the index of the one that follows each case and observation, `[..., O]`, 0 where
      that cannot be; and the observation's probability, `[..., O]`).
    """
    sees = mdp.alias == np.unique(mdp.alias)[:, None]  # [O, S]
    joint = mass[..., None, :] * sees
    probability = joint.sum(axis=-1)
    can_be = probability > 0
    belief = joint[can_be] / probability[can_be][:, None]
    _, which, index = np.unique(np.round(belief, 12), axis=0, return_index=True, return_inverse=True)
    if len(which) > MAX_BELIEFS:
        raise UsageError(f"{mdp.name} has more than {MAX_BELIEFS} beliefs at one step; take a smaller one or less time")
    following = np.zeros(can_be.shape, int)
    following[can_be] = index
    return belief[which], following, probability


def optimum_without_memory(mdp: FiniteMDP) -> WithoutMemory:
    """The best deterministic policy that reads the present observation only, and not the time, among all of them.

    A stochastic one can be better (Singh, Jaakkola & Jordan 1994), but not where J is linear in every pi(. | o), as
    where an observation that matters is met once in an episode, or actions do not move the state.

    Raises:
      UsageError: `longest_episode` does, or there are more than 100,000 policies.
    """
    A = mdp.num_actions
    seen = np.unique(mdp.alias[~mdp.terminal])
    if A ** len(seen) > MAX_POLICIES:
        raise UsageError(f"{mdp.name} has {A}^{len(seen)} policies without memory, more than {MAX_POLICIES}")
    best, best_action = -np.inf, np.zeros(mdp.alias.max() + 1, int)
    for actions in product(range(A), repeat=len(seen)):
        action = np.zeros_like(best_action)
        action[seen] = actions
        objective = objective_without_memory(mdp, np.eye(A)[action[mdp.alias]])
        if objective > best:
            best, best_action = objective, action
    return WithoutMemory(best, best_action)


def objective_without_memory(mdp: FiniteMDP, pi: np.ndarray) -> float:
    """J of a policy `[S, A]`. Raises UsageError if `longest_episode` does."""
    alive = ~mdp.terminal
    step = np.einsum("sa,sat->st", pi, mdp.transition) * alive
    reward = np.sum(pi * mdp.reward, axis=1)
    mass, objective = mdp.start, 0.0
    for t in range(longest_episode(mdp)):
        objective += mdp.gamma**t * (mass @ reward)
        mass = mass @ step
    return float(objective)
