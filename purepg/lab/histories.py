"""Policies with memory on finite processes: their objective as a sum over every trajectory, its gradient, and the bias
of the gradient where backpropagation through time stops at the edges of windows.

A policy observes the process through `alias`, as in `mdp_env(mdp, observe_alias=True)`. All functions compute in the
precision of the parameters; `exact.in_float64` makes it double.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.lax import stop_gradient

from purepg.envs.finite_mdp import FiniteMDP
from purepg.equations.advantages import total_return
from purepg.lab.exact import is_float
from purepg.lab.pomdp import longest_episode
from purepg.lab.trajectories import enumerate_trajectories
from purepg.types import Array, Moment, Network, Params, Transition, UsageError, Window, first_memory, has_memory


class Cut(NamedTuple):
    """Gradients take the memory before each step t with (t + offset) % window == 0 as a constant: windows of so many
    steps, and an episode that begins at the step `offset` of one."""

    window: Array | int
    offset: Array | int = 0


class Histories(NamedTuple):
    """All trajectories of a policy with memory, as `trajectories.Enumeration` has them of others."""

    trajectory: Transition  # leaves [T, N, ...]; `obs` is a `Window`, `next_obs` a `Moment`
    mask: Array  # [T, N]
    probability: Array  # [N], sum 1; like `trajectory.log_prob` a differentiable function of the parameters


def enumerate_histories(mdp: FiniteMDP, network: Network, params: Params, cut: Cut | None = None) -> Histories:
    """Enumerates every trajectory of a policy with memory, from the start to its end.

    Args:
      network: a network with memory (`types.has_memory`).
      cut: None: gradients flow from an episode's last step to its first.
    Raises:
      UsageError: the network has no memory, or as `enumerate_trajectories` does.
    """
    if not has_memory(network):
        raise UsageError(f"{mdp.name}: a network without memory has no histories: use enumerate_trajectories")
    S, A = mdp.reward.shape
    trajectory, mask, probability = enumerate_trajectories(mdp, np.full((S, A), -np.log(A)))
    T, N = mask.shape
    alias = jnp.asarray(mdp.alias, jnp.int32)

    def step(memory, now):
        t, obs, action = now
        if cut is not None:
            edge = (t + cut.offset) % cut.window == 0
            memory = jax.tree.map(lambda x: jnp.where(edge, stop_gradient(x), x), memory)
        (policy, _), after = network.remember(params, Moment(obs, memory))  # pyright: ignore
        return after, (memory, after, policy.log_prob(action))

    dtype = jnp.result_type(*jax.tree.leaves(params))
    first = jax.tree.map(lambda x: x.astype(dtype) if is_float(x) else x, first_memory(network)(N))
    obs = alias[trajectory.obs]
    _, (before, after, log_prob) = jax.lax.scan(step, first, (jnp.arange(T), obs, trajectory.action))
    log_prob = jnp.where(mask, log_prob, 0.0)
    starts = jnp.broadcast_to(jnp.arange(T)[:, None] == 0, (T, N))
    of_process = jnp.asarray(probability * float(A) ** mask.sum(axis=0), dtype)  # that of all but the actions
    return Histories(
        trajectory._replace(
            obs=Window(obs, starts, before),
            log_prob=log_prob,
            next_obs=Moment(alias[trajectory.next_obs], after),
        ),
        jnp.asarray(mask),
        of_process * jnp.exp(jnp.sum(log_prob, axis=0)),
    )


def history_objective(mdp: FiniteMDP, network: Network, params: Params, cut: Cut | None = None) -> Array:
    """J = sum over all trajectories tau of P(tau) R(tau), R(tau) = sum_t gamma^t r_t, a scalar.

    A cut leaves its value as it is and makes its gradient sum_tau P(tau) R(tau) sum_t grad log pi(a_t | h_t), with the
    cut gradient of log pi.
    """
    trajectory, mask, probability = enumerate_histories(mdp, network, params, cut)
    return probability @ total_return(trajectory.reward.astype(probability.dtype), mask, mdp.gamma)[0]


def history_gradient(mdp: FiniteMDP, network: Network, params: Params, cut: Cut | None = None) -> Params:
    """dJ/dtheta of a policy with memory; with a cut, the mean of the gradient through windows.

    That mean is the same for every weight of grad log pi that differs from R(tau) by a baseline or by earlier rewards:
    the cut gradient of log pi(. | h), too, has the mean 0 under pi(. | h).
    """
    return jax.grad(lambda params: history_objective(mdp, network, params, cut))(params)


class WindowBias(NamedTuple):
    """Of the mean gradient g_L through windows of each of several lengths, `[K]`, against the exact g."""

    bias: Array  # |g_L - g| / |g|
    cosine: Array  # of the angle between g_L and g
    gradient: Array  # g_L of the flattened parameters, [K, D]


def window_bias(
    mdp: FiniteMDP, network: Network, params: Params, lengths: Sequence[int], anywhere: bool = False
) -> WindowBias:
    """The bias of the policy gradient through windows of L steps, for each L of `lengths`.

    Args:
      anywhere: an episode begins at any step of a window, each equally likely, as in long rollouts; g_L is the mean
        over these. If L is no less than the longest episode's length H, the bias is then H / L of that for L = H.
        False: an episode begins with a window.
    """
    cuts = [(L, offset) for L in lengths for offset in range(L if anywhere else 1)]
    nowhere = (longest_episode(mdp), 0)  # but before the first step, where the memory is a constant
    window, offset = jnp.array([*cuts, nowhere]).T

    def gradient(cut):
        return ravel_pytree(history_gradient(mdp, network, params, cut))[0]

    gradients = jax.vmap(gradient)(Cut(window, offset))
    each, exact = gradients[:-1], gradients[-1]
    of_length = np.array([[of == L for of, _ in cuts] for L in lengths])  # [K, cuts]
    g = (of_length / of_length.sum(axis=1, keepdims=True)) @ each
    size = jnp.linalg.norm(exact)
    cosine = g @ exact / (size * jnp.linalg.norm(g, axis=1))
    return WindowBias(jnp.linalg.norm(g - exact, axis=1) / size, cosine, g)
