"""The estimators of the policy gradient from the literature on one finite process, with their theoretical means.

The process is a random MDP of 5 states, 3 actions and 8 steps, unrolled. The estimators use four kinds of experience:
whole episodes, rollouts, episodes of an older policy, and rollouts in which a time limit truncates episodes half way.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from purepg.envs.finite_mdp import FiniteMDP, mdp_env, unroll
from purepg.envs.named_mdps import garnet
from purepg.equations.advantages import (
    batch_mean,
    discount_power,
    discounted_return,
    gae,
    leave_one_out_mean,
    n_step,
    per_time_mean,
    standardise,
    total_return,
)
from purepg.equations.losses import clipped_surrogate, policy_gradient, squared_error, surrogate
from purepg.equations.ratios import per_decision_ratio, trajectory_ratio
from purepg.lab.estimators import Experience, WithCritic, ascent, episode_experience, rollout_experience
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, values, visitation, weighted_gradient
from purepg.lab.theory import gae_bias, n_step_bias, optimal_baseline
from purepg.lab.trajectories import state_distributions
from purepg.networks.tabular import TabularValue, tabular_policy
from purepg.optimize import gradient_steps, init_train_state, step_direction
from purepg.types import Array, Key, Network, Params, Transition

Weights = dict[str, Array]  # weights of grad log pi, [T, N], by estimator

HORIZON, TIME_LIMIT = 8, 4
CLIP_EPS = 0.2
LAMBDAS = (0.0, 0.5, 0.9, 1.0)
CRITICS = ("exact", "learned", "wrong")
CUT = (("exact", 0.9), ("exact", 1.0), ("shifted", 1.0), ("wrong", 1.0))
GAE = tuple(f"GAE {lam:g}, {critic} V" for critic in CRITICS for lam in LAMBDAS)
FLIPPED, NO_DISCOUNT = "the baseline's sign flipped", "gamma^t dropped"
OFF_BY_ONE = "bootstrapped from the reset at truncation"
BROKEN = FLIPPED, NO_DISCOUNT, OFF_BY_ONE
# Every estimator and its mean in theory: "exact" for the exact gradient, "formula" for a biased mean, "" if unknown.
THEORY = {
    "whole episodes": {
        "total return": "exact",
        "return to go": "exact",
        "return to go - batch mean": "",
        "return to go, standardised": "",
        "return to go - per-time mean": "formula",
        "return to go - leave-one-out": "exact",
        "return to go - learned V": "exact",
        "return to go - exact V": "exact",
        "return to go - optimal baseline": "exact",
    },
    "rollouts": {"learned Q": "formula", "exact Q": "exact", "exact A": "exact"}
    | dict.fromkeys(("A2C 1-step, learned V", "A2C 3-step, learned V", *GAE), "formula"),
    "an older policy's episodes": {
        "trajectory ratio x total return": "exact",
        "trajectory ratio x exact A": "exact",
        "ratios to each reward": "exact",
        "ratio to t x exact A": "exact",
        "step ratio x return to go": "formula",
        "step ratio x exact A": "formula",
        "clipped ratio x exact A": "formula",
    },
    "rollouts cut by a time limit": dict.fromkeys((f"cut: GAE {lam:g}, {name} V" for name, lam in CUT), "formula"),
}
NAMES = tuple(name for group in THEORY.values() for name in group)


class Problem(NamedTuple):
    """The process, two policies on it, and the exact quantities; tables are float64."""

    mdp: FiniteMDP  # unrolled: a state is (t, s)
    params: Params
    old_params: Params  # the older policy, for importance sampling
    value: dict[str, np.ndarray]  # V: exact, learned, wrong
    q: dict[str, np.ndarray]  # Q: exact, learned
    advantage: np.ndarray
    optimal_baseline: np.ndarray
    exact: Params
    exact_cut: Params  # the gradient from the steps before the time limit
    mean: dict[str, Params]  # each estimator's theoretical mean


# --- the estimators ---


def estimates(problem: Problem, key: Key, batch: int) -> dict[str, Params]:
    """Returns one estimate by each estimator, `BROKEN` ones too, from `batch` episodes of each kind of experience."""
    mdp = problem.mdp
    env, limited_env = mdp_env(mdp), mdp_env(dataclasses.replace(mdp, horizon=TIME_LIMIT))
    network = WithCritic(tabular_policy(mdp), table(problem.value["exact"]))
    params = problem.params
    k_episodes, k_rollout, k_old, k_limited = jax.random.split(key, 4)

    def ascents(experience: Experience, weights: Weights, loss: Callable = policy_gradient) -> dict[str, Params]:
        """One estimate per weight, computed by one vmapped gradient."""
        stacked = jnp.stack([jnp.broadcast_to(w, experience.mask.shape) for w in weights.values()])
        out = jax.vmap(lambda w: ascent(network, params, experience, w, loss))(stacked)
        return {name: jax.tree.map(lambda x, i=i: x[i], out) for i, name in enumerate(weights)}

    episodes = episode_experience(k_episodes, env, network, params, batch, HORIZON)
    rollouts = rollout_experience(k_rollout, env, network, params, batch, HORIZON)
    limited = rollout_experience(k_limited, limited_env, network, params, batch, HORIZON)
    out = ascents(episodes, whole_episodes(problem, episodes))
    out |= ascents(rollouts, with_critics(problem, rollouts)) | ascents(limited, cut_by_a_time_limit(problem, limited))

    old = episode_experience(k_old, env, network, problem.old_params, batch, HORIZON)
    old_log_prob = old.trajectory.log_prob
    log_prob = network.apply(params, old.trajectory.obs)[0].log_prob(old.trajectory.action)
    constant, in_loss, clipped = from_an_older_policy(problem, old, log_prob)
    out |= ascents(old, constant)
    out |= ascents(old, in_loss, lambda log_prob, weight: surrogate(log_prob, old_log_prob, weight))
    return out | ascents(old, clipped, lambda log_prob, w: clipped_surrogate(log_prob, old_log_prob, w, CLIP_EPS))


def table(x: np.ndarray) -> Array:
    """Converts a float64 table to the float32 that sampling programs use."""
    return jnp.asarray(x, jnp.float32)


def whole_episodes(problem: Problem, experience: Experience) -> Weights:
    """REINFORCE: returns, with and without baselines."""
    (x, mask), gamma = experience, problem.mdp.gamma
    discount, G = discount_power(mask, gamma), discounted_return(x.reward, mask, gamma)
    learned, exact = (table(problem.value[name])[x.obs] for name in ("learned", "exact"))
    return {
        "total return": total_return(x.reward, mask, gamma),
        "return to go": discount * G,
        "return to go - batch mean": discount * (G - batch_mean(G, mask)),
        "return to go, standardised": discount * standardise(G, mask),
        "return to go - per-time mean": discount * (G - per_time_mean(G, mask)),
        "return to go - leave-one-out": discount * (G - leave_one_out_mean(G, mask)),
        "return to go - learned V": discount * (G - learned),
        "return to go - exact V": discount * (G - exact),
        "return to go - optimal baseline": discount * (G - table(problem.optimal_baseline)[x.obs]),
        NO_DISCOUNT: G,
    }


def gae_from(problem: Problem, x: Transition, critic: str, lam: float, sign: float = 1.0) -> Array:
    """GAE from a table of V; `sign` -1 adds the baseline instead of subtracting it."""
    V = table(problem.value[critic])
    return gae(x.reward, sign * V[x.obs], V[x.next_obs], x.terminated, x.truncated, problem.mdp.gamma, lam)[0]


def with_critics(problem: Problem, experience: Experience) -> Weights:
    """Q, n-step advantages and GAE."""
    (x, mask), gamma = experience, problem.mdp.gamma
    taken, V = (x.obs, x.action), table(problem.value["learned"])
    a2c = partial(n_step, x.reward, V[x.obs], V[x.next_obs], x.terminated, x.truncated, gamma)
    weights = {f"{name} Q": table(q)[taken] for name, q in problem.q.items()}
    weights |= {"exact A": table(problem.advantage)[taken], FLIPPED: gae_from(problem, x, "exact", 0.9, -1.0)}
    weights |= {f"A2C {n}-step, learned V": a2c(n)[0] for n in (1, 3)}
    weights |= {f"GAE {lam:g}, {name} V": gae_from(problem, x, name, lam) for name in CRITICS for lam in LAMBDAS}
    return {name: discount_power(mask, gamma) * w for name, w in weights.items()}


def cut_by_a_time_limit(problem: Problem, experience: Experience) -> Weights:
    """GAE that must bootstrap: each rollout holds two episodes, one after the other."""
    (x, mask), gamma = experience, problem.mdp.gamma
    discount = jnp.tile(discount_power(mask[:TIME_LIMIT], gamma), (HORIZON // TIME_LIMIT, 1))
    V = table(problem.value["exact"])[x.obs]
    off_by_one = jnp.roll(V, -1, axis=0)  # V of the rollout's next observation, even where an episode ended
    return {
        **{f"cut: GAE {lam:g}, {name} V": discount * gae_from(problem, x, name, lam) for name, lam in CUT},
        OFF_BY_ONE: discount * gae(x.reward, V, off_by_one, x.terminated, x.truncated, gamma, 0.9)[0],
    }


def from_an_older_policy(problem: Problem, experience: Experience, log_prob: Array) -> tuple[Weights, Weights, Weights]:
    """Importance sampling, with the ratio in the weight, in the loss, or in the loss and clipped there. `log_prob` `[T,
    N]` is under the policy whose gradient is estimated."""
    (x, mask), gamma = experience, problem.mdp.gamma
    discount = discount_power(mask, gamma)
    whole, to_t = (ratio(log_prob, x.log_prob, mask) for ratio in (trajectory_ratio, per_decision_ratio))
    advantage = discount * table(problem.advantage)[x.obs, x.action]
    constant = {
        "trajectory ratio x total return": whole * total_return(x.reward, mask, gamma),
        "trajectory ratio x exact A": whole * advantage,
        "ratios to each reward": discount * discounted_return(to_t * x.reward, mask, gamma),
        "ratio to t x exact A": to_t * advantage,
    }
    in_loss = {
        "step ratio x return to go": discount * discounted_return(x.reward, mask, gamma),
        "step ratio x exact A": advantage,
    }
    return constant, in_loss, {"clipped ratio x exact A": advantage}


# --- what theory says of them ---


def pose(seed: int) -> Problem:
    """Makes a random process, two policies, critics (exact, learned from 64 episodes, wrong) and theoretical means."""
    random = garnet(seed, num_states=5, horizon=HORIZON, horizon_terminates=True)
    mdp = unroll(dataclasses.replace(random, reward=random.reward + 1))  # baselines need rewards of mean not 0
    rng = np.random.default_rng(seed + 1)
    logits = 0.7 * rng.normal(size=(5, 3))
    params, old_params = ({"params": {"logits": x}} for x in (logits, logits + 0.4 * rng.normal(size=(5, 3))))
    policy = log_policy(tabular_policy(mdp), mdp.num_states)
    log_pi, log_old = in_float64(policy, params), in_float64(policy, old_params)
    V, Q, A = in_float64(lambda log_pi: values(mdp, log_pi), log_pi)
    learned_value, learned_q = learn(mdp, jax.tree.map(jnp.float32, params), jax.random.key(seed))
    value = {"exact": V, "learned": learned_value, "wrong": V + V.std() * rng.normal(size=V.shape), "shifted": V + 2.0}

    steps_left = np.arange(HORIZON, 0, -1)
    d = state_distributions(mdp, log_pi, HORIZON, restart=False) * mdp.gamma ** (HORIZON - steps_left)[:, None]
    d_cut = HORIZON // TIME_LIMIT * d[:TIME_LIMIT]

    def mean_of(distribution, weight):
        return in_float64(lambda params: weighted_gradient(policy, params, distribution, weight), params)

    def with_critic(distribution, bias, critic, *arguments):  # per step, because the bias depends on the steps left
        error = value[critic] - V
        weight = [A + in_float64(bias, mdp, log_pi, error, *arguments, L) for L in steps_left[-len(distribution) :]]
        return mean_of(distribution, np.stack(weight))

    exact = in_float64(lambda params: bellman_gradient(mdp, policy, params), params)
    mean = {name: exact for group in THEORY.values() for name, theory in group.items() if theory == "exact"}
    mean["learned Q"] = mean_of(d.sum(0), learned_q)
    mean |= {f"A2C {n}-step, learned V": with_critic(d, n_step_bias, "learned", n) for n in (1, 3)}
    mean |= {f"GAE {lam:g}, {name} V": with_critic(d, gae_bias, name, lam) for name in CRITICS for lam in LAMBDAS}
    mean |= {f"cut: GAE {lam:g}, {name} V": with_critic(d_cut, gae_bias, name, lam) for name, lam in CUT}
    d_old, q_old = in_float64(lambda log_pi: (visitation(mdp, log_pi), values(mdp, log_pi).q), log_old)
    ratio = np.exp(log_pi - log_old)
    counts = np.where(A >= 0, ratio <= 1 + CLIP_EPS, ratio >= 1 - CLIP_EPS)
    mean["step ratio x return to go"] = mean_of(d_old, q_old)
    mean["step ratio x exact A"] = mean_of(d_old, A)
    mean["clipped ratio x exact A"] = mean_of(d_old, A * counts)
    best = in_float64(lambda params: optimal_baseline(mdp, policy, params), params)
    params, old_params = jax.tree.map(jnp.float32, (params, old_params))
    return Problem(
        mdp, params, old_params, value, {"exact": Q, "learned": learned_q}, A, best, exact, mean_of(d_cut, A), mean
    )


def learn(mdp: FiniteMDP, params: Params, key: Key, num_episodes: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Fits V and Q to the returns to go of a few episodes."""
    network = WithCritic(tabular_policy(mdp), jnp.zeros(mdp.num_states))
    critics: dict[str, Network] = {"value": TabularValue(mdp.num_states), "q": TabularValue(*mdp.reward.shape)}
    tx = step_direction("adam", None)

    def loss(tables, batch):
        obs, action, target, mask = batch
        value, q = (critic.apply(tables[name], obs) for name, critic in critics.items())
        q = jnp.take_along_axis(q, action[..., None], axis=-1)[..., 0]
        error = squared_error(value, target) + squared_error(q, target)
        return jnp.mean(error, where=mask), {}

    @jax.jit
    def fit(key):
        x, mask = episode_experience(key, mdp_env(mdp), network, params, num_episodes, HORIZON)
        batch = (x.obs, x.action, discounted_return(x.reward, mask, mdp.gamma), mask)
        tables = {name: critic.init(key, x.obs) for name, critic in critics.items()}

        (tables, _), _ = gradient_steps(loss, tx, 0.05, init_train_state(tx, tables), batch, 500)
        return tuple(tables[name]["params"]["value"] for name in critics)

    V, Q = (np.asarray(x, np.float64) for x in fit(key))
    return V, Q
