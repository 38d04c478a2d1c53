"""Exact solutions of linear-quadratic regulation: value, Q, objective, gradient and optimum of the policy u = -K x.

All functions take NumPy arrays and compute in double precision. As in `purepg.lab.exact`, J = E sum_t gamma^t r_t, and
a time limit changes nothing. Functions raise UsageError if the gain K `[m, n]` has infinite cost, which it has unless
sqrt(gamma) * |eigenvalues of A - B K| is below 1. Source of the gradient: Fazel et al. 2018, discounted.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

from purepg.envs.lqr import LQR
from purepg.types import UsageError


class QuadraticValues(NamedTuple):
    """V(x) = -x^T P x - c and Q(z) = -z^T H z - c, with z = (x, u)."""

    P: np.ndarray  # [n, n]
    H: np.ndarray  # [n + m, n + m]
    c: float


def closed_loop(lqr: LQR, K: np.ndarray) -> np.ndarray:
    """A - B K, `[n, n]`."""
    loop = lqr.A - lqr.B @ K
    growth = np.sqrt(lqr.gamma) * np.abs(np.linalg.eigvals(loop)).max()
    if not growth < 1:
        raise UsageError(f"{lqr.name}: this gain's cost is infinite: discounted states grow by {growth:.3g} per step")
    return loop


def values(lqr: LQR, K: np.ndarray) -> QuadraticValues:
    """P = Q + K^T R K + gamma (A - B K)^T P (A - B K), from a linear solve."""
    loop, g = closed_loop(lqr, K), lqr.gamma
    P = scipy.linalg.solve_discrete_lyapunov(np.sqrt(g) * loop.T, lqr.Q + K.T @ lqr.R @ K)
    c = g / (1 - g) * lqr.noise_std**2 * np.trace(P)
    onward = np.hstack([lqr.A, lqr.B])
    H = np.asarray(scipy.linalg.block_diag(lqr.Q, lqr.R)) + g * onward.T @ P @ onward
    return QuadraticValues(P, H, float(c))


def objective(lqr: LQR, K: np.ndarray) -> float:
    """J(K), minus the expected discounted cost."""
    P, _, c = values(lqr, K)
    return -float(lqr.start_std**2 * np.trace(P) + c)


def state_moment(lqr: LQR, K: np.ndarray) -> np.ndarray:
    """sum_t gamma^t E[x_t x_t^T], `[n, n]`."""
    loop, g = closed_loop(lqr, K), lqr.gamma
    source = (lqr.start_std**2 + g / (1 - g) * lqr.noise_std**2) * np.eye(lqr.num_states)
    return scipy.linalg.solve_discrete_lyapunov(np.sqrt(g) * loop, source)


def gradient(lqr: LQR, K: np.ndarray) -> np.ndarray:
    """dJ/dK, `[m, n]`: -2 ((R + gamma B^T P B) K - gamma B^T P A) sum_t gamma^t E[x_t x_t^T]."""
    P, g = values(lqr, K).P, lqr.gamma
    return -2 * ((lqr.R + g * lqr.B.T @ P @ lqr.B) @ K - g * lqr.B.T @ P @ lqr.A) @ state_moment(lqr, K)


def optimum(lqr: LQR) -> np.ndarray:
    """The best policy's gain, `[m, n]`, from Riccati's equation. Raises UsageError if no gain has a finite cost."""
    A, B = np.sqrt(lqr.gamma) * lqr.A, np.sqrt(lqr.gamma) * lqr.B
    try:
        P = scipy.linalg.solve_discrete_are(A, B, lqr.Q, lqr.R)
    except np.linalg.LinAlgError as error:
        raise UsageError(f"{lqr.name}: Riccati's equation has no solution: no gain has a finite cost") from error
    return np.linalg.solve(lqr.R + B.T @ P @ B, B.T @ P @ A)
