"""Every trajectory of a finite MDP with its probability, and the distribution of the states in an experience."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.finite_mdp import FiniteMDP
from purepg.equations.advantages import total_return
from purepg.lab.exact import LogPolicy, in_float64
from purepg.types import Array, Params, Transition, UsageError

MAX_TRAJECTORIES = 1_000_000


class Enumeration(NamedTuple):
    """All trajectories, in the layout of `rollout.Episodes`, with their probabilities."""

    trajectory: Transition  # leaves [T, N, ...], in JAX's current precision
    mask: np.ndarray  # [T, N]
    probability: np.ndarray  # [N] float64, sum 1


def enumerate_trajectories(mdp: FiniteMDP, log_pi: Array | np.ndarray, num_steps: int | None = None) -> Enumeration:
    """Enumerates every trajectory from the start to its end.

    Args:
      log_pi: `[S, A]`, the policy that acts.
      num_steps: trajectories still running then are truncated; None: the horizon, or until all have terminated.
    Raises:
      UsageError: there are more than a million trajectories, or no longest one.
    """
    if num_steps is not None and num_steps < 1:
        raise UsageError(f"num_steps ({num_steps}) must be at least 1")
    pi = np.exp(np.asarray(log_pi, np.float64))
    limit = min(x for x in (num_steps, mdp.horizon, np.inf) if x is not None)
    (state,) = np.nonzero(mdp.start)
    probability, alive = mdp.start[state], np.ones(len(state), bool)
    steps = []  # lists of [N] arrays, extended as trajectories branch
    while alive.any() and len(steps) < limit:
        if len(steps) == mdp.num_states and np.isinf(limit):  # some state was visited twice
            raise UsageError(f"{mdp.name} has trajectories of any length: num_steps (None) must be set")
        joint = np.where(alive[:, None, None], pi[state][:, :, None] * mdp.transition[state], 0.0)
        joint[~alive, 0, 0] = 1.0  # an ended trajectory does not branch
        parent, action, next_state = np.nonzero(joint)
        if len(parent) > MAX_TRAJECTORIES:
            raise UsageError(
                f"{mdp.name} has more than {MAX_TRAJECTORIES} trajectories of {len(steps) + 1} steps; "
                "enumerate a smaller process or a shorter horizon"
            )
        steps = [[x[parent] for x in step] for step in steps]
        probability = probability[parent] * joint[parent, action, next_state]
        state, alive = state[parent], alive[parent]
        at_horizon, at_limit = len(steps) + 1 == mdp.horizon, len(steps) + 1 == limit
        terminated = alive & (mdp.terminal[next_state] | (at_horizon & mdp.horizon_terminates))
        truncated = alive & ((at_horizon and not mdp.horizon_terminates) | (at_limit & ~terminated))
        log_prob = np.log(np.where(alive, pi[state, action], 1.0))
        now = (state, action, log_prob, mdp.reward[state, action], terminated, truncated, next_state)
        steps.append([*(np.where(alive, x, np.zeros_like(x)) for x in now), alive])
        state, alive = next_state, alive & ~(terminated | truncated)
    *trajectory, mask = (np.stack(x) for x in zip(*steps, strict=True))
    return Enumeration(Transition(*map(jnp.asarray, trajectory)), mask, probability)


def trajectory_gradient(mdp: FiniteMDP, policy: LogPolicy, params: Params, num_steps: int | None = None) -> Params:
    """dJ/dtheta = sum over all trajectories tau of p(tau) grad log p(tau) R(tau), R(tau) = sum_t gamma^t r_t.

    It does not bootstrap: a truncated trajectory contributes only its rewards up to the truncation.
    """
    trajectory, mask, probability = enumerate_trajectories(mdp, in_float64(policy, params), num_steps)
    dtype = jnp.result_type(float)
    reward = jnp.asarray(trajectory.reward, dtype)
    R = total_return(reward, jnp.asarray(mask), mdp.gamma)[0]

    def expected(params: Params) -> Array:
        log_prob = jnp.sum(policy(params)[trajectory.obs, trajectory.action], axis=0, where=jnp.asarray(mask))
        return jnp.sum(jnp.asarray(probability, dtype) * R * log_prob)

    return jax.grad(expected)(params)


def state_distributions(mdp: FiniteMDP, log_pi: Array | np.ndarray, num_steps: int, restart: bool) -> np.ndarray:
    """P(s_t = s and the episode is running), `[num_steps, S]`, for experience that begins with a reset. `restart`
    resets where an episode ends, as `rollout` does; without it, as in `episodes`, mass is lost."""
    pi, S = np.exp(np.asarray(log_pi, np.float64)), mdp.num_states
    step = np.einsum("sa,sat->st", pi, mdp.transition) * ~mdp.terminal
    by_clock = np.zeros((mdp.horizon or num_steps, S))  # [t, S], probability by the episode's time
    by_clock[0] = mdp.start
    out = []
    for _ in range(num_steps):
        out.append(by_clock.sum(0))
        now = by_clock @ step
        by_clock = np.concatenate([np.zeros((1, S)), now[:-1]])
        if restart:
            by_clock[0] = (1 - by_clock.sum()) * mdp.start
    return np.stack(out)
