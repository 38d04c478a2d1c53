"""The theoretical mean or variance of estimators, in closed form or by a linear solve."""

import jax.numpy as jnp
import numpy as np

from purepg.envs.finite_mdp import FiniteMDP
from purepg.lab.exact import LogPolicy, onward, score, values
from purepg.types import Array, Params


def n_step_bias(mdp: FiniteMDP, log_pi: Array, error: Array, n: int, steps_left: int) -> Array:
    """E[A^(n) | s, a] - A(s, a) of the n-step advantage from V + error, `[S, A]`:

        -e(s) + gamma^m E[e(s_m) | s, a],  m = min(n, steps_left)

    Args:
      error: `[S]`, e; it counts as 0 at terminal states, whose value no estimator uses.
      steps_left: number of steps to the end of the data, L >= 1.
    """
    error = jnp.where(mdp.terminal, 0.0, error)
    transition = onward(mdp)
    step = jnp.einsum("sa,sat->st", jnp.exp(log_pi), transition)
    m = min(n, steps_left)
    later = error
    for _ in range(m - 1):
        later = step @ later
    return mdp.gamma**m * transition @ later - error[:, None]


def gae_bias(mdp: FiniteMDP, log_pi: Array, error: Array, lam: float, steps_left: int) -> Array:
    """E[A^GAE | s, a] - A(s, a) from V + error, `[S, A]`, the lambda-weighted mean of `n_step_bias`:

        -e(s) + sum_{k=1}^{L-1} (1 - lambda) lambda^(k-1) gamma^k E[e(s_k)] + lambda^(L-1) gamma^L E[e(s_L)]

    The first term does not depend on the action, so it does not change the gradient.
    """
    L = steps_left
    weight = [(1 - lam) * lam ** (k - 1) for k in range(1, L)] + [lam ** (L - 1)]
    return sum(w * n_step_bias(mdp, log_pi, error, k, L) for k, w in enumerate(weight, 1))  # type: ignore[return-value]


def optimal_baseline(mdp: FiniteMDP, policy: LogPolicy, params: Params) -> Array:
    """The baseline b(s), `[S]`, for which sum_t gamma^t grad log pi_t (G_t - b(s_t)) has the least variance.

    It is the least-squares fit of X = sum_t gamma^t phi_t G_t by Z_s = sum_t gamma^t phi_t 1{s_t = s}, phi = grad log
    pi. E[Z_s . Z_s'] is diagonal, so b(s) = E[Z_s . X] / E[Z_s . Z_s]. The numerator has three parts: the step at which
    s is visited, which alone gives the well-known E[|phi|^2 Q] / E[|phi|^2] (Greensmith et al. 2004), the later steps,
    and the earlier steps.
    """
    log_pi = policy(params)
    pi, phi, transition, q = jnp.exp(log_pi), score(policy, params), onward(mdp), values(mdp, log_pi).q
    step = jnp.einsum("sa,sat->st", pi, transition)
    identity, gamma = jnp.eye(len(pi)), mdp.gamma
    # sum_t gamma^2t P(s_t = s): the discount appears twice.
    d = jnp.linalg.solve((identity - gamma**2 * step).T, jnp.asarray(mdp.start))

    here = jnp.einsum("sa,sad,sad,sa->s", pi, phi, phi, q)
    phi_q = jnp.einsum("sa,sad,sa->sd", pi, phi, q)
    # after(s, a) = sum_k>=1 gamma^k E[phi_{t+k} Q_{t+k} | s_t = s, a_t = a]
    after = gamma * transition @ jnp.linalg.solve(identity - gamma * step, phi_q)
    # before(s) = sum_t gamma^2t E[1{s_t = s} sum_{t' < t} phi_t']
    arriving = jnp.einsum("s,sa,sad,sat->td", d, pi, phi, transition)
    before = jnp.linalg.solve((identity - gamma**2 * step).T, gamma**2 * arriving)

    numerator = d * (here + jnp.einsum("sa,sad,sad->s", pi, phi, after)) + jnp.einsum("sd,sd->s", before, phi_q)
    denominator = d * jnp.einsum("sa,sad,sad->s", pi, phi, phi)
    return jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1.0), 0.0)


def standardised_factor(group_size: int, p: float) -> float:
    """c_G(p): standardising G binary rewards (population deviation, 0 where all are equal) multiplies the gradient of
    the success probability p by c_G(p) = E[sqrt(K (G - K))] / (G p (1 - p)), K ~ Binomial(G, p)."""
    from scipy.stats import binom

    k = np.arange(group_size + 1)
    spread = np.sqrt(k * (group_size - k))
    return float(binom.pmf(k, group_size, p) @ spread / (group_size * p * (1 - p)))
