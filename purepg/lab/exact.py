"""Exact objectives and policy gradients of finite MDPs.

A policy is given by its table `log_pi`, `[S, A]`, or, to be differentiated, by a function from parameters to that table
(`log_policy` makes one from any network). All functions are pure and compute in the precision of their input;
`in_float64` makes it double.

Conventions: J = E sum_t gamma^t r_t from t = 0. d(s) = sum_t gamma^t P(s_t = s) is not normalised, and is zero at
terminal states. A time limit (a `horizon` that does not terminate) changes nothing here. A horizon that terminates
makes values depend on time; these functions then require `unroll(mdp)`, whose states include the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient

from purepg.envs.finite_mdp import FiniteMDP
from purepg.equations.distributions import Categorical
from purepg.types import Array, Network, Params, UsageError

LogPolicy = Callable[[Params], Array]  # parameters -> log pi(a|s), [S, A]


def in_float64(function: Callable, *args: Any) -> Any:
    """Evaluates `function(*args)` with all floats in double precision and returns a tree of NumPy arrays."""
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: jnp.asarray(x, float) if is_float(x) else x, args)
        return jax.tree.map(np.asarray, function(*args))


def is_float(x: Any) -> bool:
    return isinstance(x, float) or (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating))


def log_policy(network: Network, num_states: int) -> LogPolicy:
    """Returns the table of a network whose `apply` returns a Categorical, or a tuple that begins with one."""

    def table(params: Params) -> Array:
        out = network.apply(params, jnp.arange(num_states))
        return jax.nn.log_softmax((out if isinstance(out, Categorical) else out[0]).logits)

    return table


class Values(NamedTuple):
    value: Array  # [S], 0 at terminal states
    q: Array  # [S, A]
    advantage: Array  # [S, A]


def values(mdp: FiniteMDP, log_pi: Array, entropy_coef: Array | float = 0.0) -> Values:
    """V, Q and A of a policy, from a linear solve of V = r_pi + gamma P_pi V.

    With `entropy_coef` tau, the reward is r - tau log pi(a|s); as usual, Q = r + gamma P V omits the entropy of (s, a);
    A = Q - tau log pi - V.
    """
    _refuse_a_clock(mdp)
    pi, transition, reward = jnp.exp(log_pi), onward(mdp), jnp.asarray(mdp.reward)
    alive = jnp.asarray(~mdp.terminal)[:, None]
    bonus = -entropy_coef * jnp.where(alive & (pi > 0), log_pi, 0.0)
    value = jnp.linalg.solve(_resolvent(transition, pi, mdp.gamma), jnp.sum(pi * (reward + bonus), axis=1))
    q = reward + mdp.gamma * transition @ value
    return Values(value, q, q + bonus - value[:, None])


def objective(mdp: FiniteMDP, log_pi: Array, entropy_coef: Array | float = 0.0) -> Array:
    """J = sum_s start(s) V(s), a scalar."""
    return jnp.asarray(mdp.start) @ values(mdp, log_pi, entropy_coef).value


def visitation(mdp: FiniteMDP, log_pi: Array) -> Array:
    """d(s) = sum_t gamma^t P(s_t = s), `[S]`; its sum is 1 / (1 - gamma) if nothing terminates."""
    _refuse_a_clock(mdp)
    resolvent = _resolvent(onward(mdp), jnp.exp(log_pi), mdp.gamma)
    return jnp.linalg.solve(resolvent.T, jnp.asarray(mdp.start))


def onward(mdp: FiniteMDP) -> Array:
    """P(s' | s, a) between states that are not terminal, `[S, A, S]`; the mass missing to 1 has terminated."""
    alive = ~mdp.terminal
    return jnp.asarray(mdp.transition * alive[:, None, None] * alive)


def _resolvent(transition: Array, pi: Array, gamma: float) -> Array:
    return jnp.eye(len(pi)) - gamma * jnp.einsum("sa,sat->st", pi, transition)


def _refuse_a_clock(mdp: FiniteMDP) -> None:
    if mdp.horizon_terminates:
        raise UsageError(f"{mdp.name}: values depend on the number of steps left: use unroll(mdp)")


# --- two forms of the gradient of J; `trajectories.trajectory_gradient` is the third ---


def bellman_gradient(mdp: FiniteMDP, policy: LogPolicy, params: Params, entropy_coef: Array | float = 0.0) -> Params:
    """dJ/dtheta by automatic differentiation through the solution of the Bellman equation."""
    return jax.grad(lambda params: objective(mdp, policy(params), entropy_coef))(params)


def occupancy_gradient(mdp: FiniteMDP, policy: LogPolicy, params: Params, entropy_coef: Array | float = 0.0) -> Params:
    """dJ/dtheta = sum_s d(s) sum_a pi(a|s) grad log pi(a|s) Q(s, a), the policy gradient theorem (Sutton et al. 2000);
    with entropy, Q - tau log pi replaces Q."""
    log_pi = policy(params)
    weight = values(mdp, log_pi, entropy_coef)
    return weighted_gradient(policy, params, visitation(mdp, log_pi), weight.advantage + weight.value[:, None])


def weighted_gradient(policy: LogPolicy, params: Params, distribution: Array, weight: Array) -> Params:
    """sum_s distribution(s) sum_a pi(a|s) grad log pi(a|s) weight(s, a), the mean of any estimator of this form.
    `distribution` is `[..., S]` and `weight` `[..., S, A]`; leading axes are summed over."""
    mass = stop_gradient(distribution[..., None] * jnp.exp(policy(params)) * weight)
    return jax.grad(lambda params: jnp.sum(mass * policy(params)))(params)


def score(policy: LogPolicy, params: Params) -> Array:
    """grad log pi(a|s) with respect to the flattened parameters, `[S, A, D]`."""
    flat, unravel = ravel_pytree(params)
    return jax.jacobian(lambda flat: policy(unravel(flat)))(flat)


def fisher(mdp: FiniteMDP, policy: LogPolicy, params: Params) -> Array:
    """F = sum_s d(s) / sum(d) sum_a pi(a|s) grad log pi grad log pi^T, `[D, D]` for the flattened parameters.

    d is normalised here, so F is the mean over the states visited, as in estimates of it.
    """
    log_pi = policy(params)
    d, phi = visitation(mdp, log_pi), score(policy, params)
    return jnp.einsum("s,sa,sai,saj->ij", d / jnp.sum(d), jnp.exp(log_pi), phi, phi)


def natural_gradient(mdp: FiniteMDP, policy: LogPolicy, params: Params) -> Params:
    """F^+ dJ/dtheta (Kakade 2001). F^+ is the pseudo-inverse, because a softmax has more logits than it needs.

    For a tabular softmax without terminal states it is A / (1 - gamma), up to a constant in each state. Eigenvalues of
    F below 1e-10 of the largest, or below 1e-12, count as zero: those of a nearly deterministic policy are as small as
    the gradient's rounding error. Use double precision.
    """
    gradient, unravel = ravel_pytree(bellman_gradient(mdp, policy, params))
    eigenvalue, vector = jnp.linalg.eigh(fisher(mdp, policy, params))
    kept = eigenvalue > jnp.maximum(1e-10 * eigenvalue[-1], 1e-12)
    inverse = jnp.where(kept, 1 / jnp.where(kept, eigenvalue, 1.0), 0.0)
    return unravel(vector @ (inverse * (gradient @ vector)))


class Optimum(NamedTuple):
    objective: float
    pi: np.ndarray  # [S, A]
    q: np.ndarray  # [S, A]


def optimum(mdp: FiniteMDP, entropy_coef: float = 0.0) -> Optimum:
    """The best policy that observes the true state, by policy iteration; with entropy by soft policy iteration, pi =
    softmax(Q / entropy_coef). Computed in float64. Raises RuntimeError if it does not converge in 10,000 iterations
    (gamma near 1 with entropy; gamma = 1 and a cycle without cost)."""
    S, A = mdp.reward.shape
    pi, best = np.full((S, A), 1 / A), -np.inf
    for _ in range(10_000):
        with np.errstate(divide="ignore"):
            V, Q, _ = in_float64(lambda log_pi: values(mdp, log_pi, entropy_coef), np.log(pi))
        J = float(mdp.start @ V)
        if np.all(np.abs(V - best) <= 1e-13 * (1 + np.abs(V))):
            return Optimum(J, pi, Q)
        best = V
        if entropy_coef:
            pi = np.exp((Q - Q.max(1, keepdims=True)) / entropy_coef)
            pi /= pi.sum(1, keepdims=True)
        else:
            pi = np.eye(A)[np.argmax(np.round(Q, 12), axis=1)]
    raise RuntimeError(f"{mdp.name}: the optimum did not converge in 10000 iterations")
