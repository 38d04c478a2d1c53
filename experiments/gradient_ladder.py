"""The ladder of estimators, each held against the exact policy gradient: bias, variance and direction.

On a random MDP of 5 states, 3 actions and 8 steps, every estimator of `purepg.advantages` is fed by `episodes` or
`rollout`, all of them in one vmapped program for each batch size. What theory says of a mean is computed and tested.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binom

from purepg.advantages import (
    batch_mean,
    discount_power,
    discounted_return,
    gae,
    leave_one_out_mean,
    n_step,
    per_decision_ratio,
    per_time_mean,
    standardise,
    total_return,
    trajectory_ratio,
)
from purepg.config import Count
from purepg.envs.finite_mdp import FiniteMDP, bandit, finite_mdp, garnet, unroll
from purepg.lab.estimators import Experience, WithCritic, ascent, episode_experience, rollout_experience
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, values, visitation, weighted_gradient
from purepg.lab.statistics import Statistics, Verdict, sample, statistics, unbiasedness, variance_change
from purepg.lab.theory import gae_bias, n_step_bias, optimal_baseline, standardised_factor
from purepg.lab.trajectories import state_distributions
from purepg.losses import clipped_surrogate, squared_error, surrogate
from purepg.networks import tabular_policy, tabular_q, tabular_value
from purepg.optimize import gradient_step, step_direction
from purepg.run.plot import COLOURS
from purepg.run.record import say
from purepg.run.study import Study, main, table
from purepg.types import Array, Key, Network, Params, UsageError


@dataclass(frozen=True)
class LadderConfig:
    """What is estimated, and from how much.

    Attributes:
      seed: of the process, the policies and the critics.
      sample_seed: of the estimates.
      batch: episodes in an estimate of the tables.
      other_batches: further batch sizes, for the figure and the numbers.
      num_samples: estimates by each estimator at `batch`; at other sizes, as many as use the same number of episodes.
    """

    seed: int = 0
    sample_seed: int = 1
    batch: Count = 16
    other_batches: tuple[int, ...] = (4, 64)
    num_samples: Count = 20_000


HORIZON, TIME_LIMIT = 8, 4
CLIP_EPS = 0.2
LAMBDAS = (0.0, 0.5, 0.9, 1.0)
CRITICS = ("exact", "learned", "wrong")
CUT = (("exact", 0.9), ("exact", 1.0), ("shifted", 1.0), ("wrong", 1.0))
GAE = tuple(f"GAE {lam:g}, {critic} V" for critic in CRITICS for lam in LAMBDAS)
BROKEN = ("the baseline's sign flipped", "gamma^t dropped", "bootstrapped from the reset at truncation")
# Every estimator, and what theory says of its mean: exact, a formula's, or nothing.
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
    "rollouts": {"learned Q": "formula", "exact Q": "exact", "exact A": "exact", "A2C 1-step, learned V": "formula"}
    | {"A2C 3-step, learned V": "formula"}
    | dict.fromkeys(GAE, "formula"),
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
    """The process, two policies on it, and all that is known of them; tables are float64."""

    mdp: FiniteMDP  # unrolled: a state is (t, s)
    params: Params
    old_params: Params  # an older policy's, for importance sampling
    value: dict[str, np.ndarray]  # V: exact, learned, wrong
    q: dict[str, np.ndarray]  # Q: exact, learned
    advantage: np.ndarray
    optimal_baseline: np.ndarray
    exact: Params
    exact_cut: Params  # of the first steps, until a time limit
    mean: dict[str, Params]  # what theory says of an estimator's mean


# --- the estimators ---


def estimates(problem: Problem, key: Key, batch: int) -> dict[str, Params]:
    """One estimate by every estimator, from `batch` episodes of each kind of experience."""
    mdp, gamma = problem.mdp, problem.mdp.gamma
    env = finite_mdp(mdp)
    policy = tabular_policy(mdp)
    table = {name: jnp.asarray(x, jnp.float32) for name, x in problem.value.items()}
    network = WithCritic(policy, table["exact"])
    k_episodes, k_rollout, k_old, k_limited = jax.random.split(key, 4)

    # Whole episodes of the policy itself.
    episodes = episode_experience(k_episodes, env, network, problem.params, batch, HORIZON)
    x, mask = episodes
    G = discounted_return(x.reward, mask, gamma)
    discount = discount_power(mask, gamma)
    best = jnp.asarray(problem.optimal_baseline, jnp.float32)
    out = ascents(network, problem.params, episodes, {
        "total return": total_return(x.reward, mask, gamma),
        "return to go": discount * G,
        BROKEN[1]: G,
        "return to go - batch mean": discount * (G - batch_mean(G, mask)),
        "return to go, standardised": discount * standardise(G, mask),
        "return to go - per-time mean": discount * (G - per_time_mean(G, mask)),
        "return to go - leave-one-out": discount * (G - leave_one_out_mean(G, mask)),
        "return to go - learned V": discount * (G - table["learned"][x.obs]),
        "return to go - exact V": discount * (G - table["exact"][x.obs]),
        "return to go - optimal baseline": discount * (G - best[x.obs]),
    })  # fmt: skip

    # Rollouts: what needs a learned value.
    rollouts = rollout_experience(k_rollout, env, network, problem.params, batch, HORIZON)
    x, mask = rollouts

    def estimate_from(critic: str) -> tuple:
        value = table[critic]
        return x.reward, value[x.obs], value[x.next_obs], x.terminated, x.truncated, gamma

    weight = {f"{name} Q": jnp.asarray(q, jnp.float32)[x.obs, x.action] for name, q in problem.q.items()}
    weight["exact A"] = jnp.asarray(problem.advantage, jnp.float32)[x.obs, x.action]
    weight |= {f"A2C {n}-step, learned V": n_step(*estimate_from("learned"), n=n)[0] for n in (1, 3)}
    weight |= {
        f"GAE {lam:g}, {critic} V": gae(*estimate_from(critic), lam=lam)[0] for critic in CRITICS for lam in LAMBDAS
    }
    value = table["exact"]
    weight[BROKEN[0]] = gae(x.reward, -value[x.obs], value[x.next_obs], x.terminated, x.truncated, gamma, 0.9)[0]
    out |= ascents(network, problem.params, rollouts, {name: discount * w for name, w in weight.items()})

    # Episodes of an older policy.
    old = episode_experience(k_old, env, network, problem.old_params, batch, HORIZON)
    x, mask = old
    log_prob = network.apply(problem.params, x.obs)[0].log_prob(x.action)
    decision, whole = per_decision_ratio(log_prob, x.log_prob, mask), trajectory_ratio(log_prob, x.log_prob, mask)
    advantage = discount * jnp.asarray(problem.advantage, jnp.float32)[x.obs, x.action]
    out |= ascents(network, problem.params, old, {
        "trajectory ratio x total return": whole * total_return(x.reward, mask, gamma),
        "trajectory ratio x exact A": whole * advantage,
        "ratio to t x exact A": decision * advantage,
        "ratios to each reward": discount * discounted_return(decision * x.reward, mask, gamma),
    })  # fmt: skip
    out["step ratio x return to go"] = ascent(
        network,
        problem.params,
        old,
        discount * discounted_return(x.reward, mask, gamma),
        lambda log_prob, weight: surrogate(log_prob, x.log_prob, weight),
    )
    out["step ratio x exact A"] = ascent(
        network, problem.params, old, advantage, lambda log_prob, weight: surrogate(log_prob, x.log_prob, weight)
    )
    out["clipped ratio x exact A"] = ascent(
        network,
        problem.params,
        old,
        advantage,
        lambda log_prob, weight: clipped_surrogate(log_prob, x.log_prob, weight, CLIP_EPS),
    )

    # Rollouts in which a time limit cuts every episode half way.
    limited_env = finite_mdp(dataclasses.replace(mdp, horizon=TIME_LIMIT))
    limited = rollout_experience(k_limited, limited_env, network, problem.params, batch, HORIZON)
    x, mask = limited
    discount = jnp.tile(discount_power(mask[:TIME_LIMIT], gamma), (HORIZON // TIME_LIMIT, 1))
    weight = {f"cut: GAE {lam:g}, {critic} V": gae(*estimate_from(critic), lam=lam)[0] for critic, lam in CUT}
    value = table["exact"]
    reset = jnp.roll(value[x.obs], -1, axis=0)  # what comes after in the rollout, which is no next_obs where one ends
    weight[BROKEN[2]] = gae(x.reward, value[x.obs], reset, x.terminated, x.truncated, gamma, 0.9)[0]
    return out | ascents(network, problem.params, limited, {name: discount * w for name, w in weight.items()})


def ascents(network: WithCritic, params: Params, experience: Experience, weights: Mapping[str, Array]) -> dict:
    """One estimate for each weight, all in one gradient's code."""
    shape = experience.mask.shape
    stacked = jnp.stack([jnp.broadcast_to(w, shape) for w in weights.values()])
    out = jax.vmap(lambda w: ascent(network, params, experience, w))(stacked)
    return {name: jax.tree.map(lambda x, i=i: x[i], out) for i, name in enumerate(weights)}


# --- what is known of them ---


def pose(seed: int) -> Problem:
    """The process of a seed, two policies, critics learned from 64 episodes or wrong, and what theory says of them."""
    random = garnet(seed, num_states=5, horizon=HORIZON, horizon_terminates=True)
    mdp = unroll(dataclasses.replace(random, reward=random.reward + 1))  # rewards of mean 0 would need no baseline
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

    def with_critic(distribution, bias, critic, *arguments):  # step by step, for the bias knows how much data is left
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
    """V and Q as a critic learns them: regressed on the returns to go of a few episodes."""
    network = WithCritic(tabular_policy(mdp), jnp.zeros(mdp.num_states))
    critics: dict[str, Network] = {"value": tabular_value(mdp), "q": tabular_q(mdp)}
    tx = step_direction("adam", None)

    def loss(tables, batch):
        obs, action, target, mask = batch
        value = critics["value"].apply(tables["value"], obs)
        q = jnp.take_along_axis(critics["q"].apply(tables["q"], obs), action[..., None], axis=-1)[..., 0]
        error = squared_error(value, target) + squared_error(q, target)
        return jnp.mean(error, where=mask), {}

    @jax.jit
    def fit(key):
        x, mask = episode_experience(key, finite_mdp(mdp), network, params, num_episodes, HORIZON)
        batch = (x.obs, x.action, discounted_return(x.reward, mask, mdp.gamma), mask)
        tables = {name: critic.init(key, x.obs) for name, critic in critics.items()}

        def step(carry, _):
            tables, opt_state = carry
            tables, opt_state, _ = gradient_step(loss, tx, 0.05, tables, opt_state, batch)
            return (tables, opt_state), None

        (tables, _), _ = jax.lax.scan(step, (tables, tx.init(tables)), length=500)
        return tables["value"]["params"]["value"], tables["q"]["params"]["value"]

    V, Q = fit(key)
    return np.asarray(V, np.float64), np.asarray(Q, np.float64)


# --- the study ---


class Row(NamedTuple):
    """An estimator at a batch size."""

    name: str
    statistics: Statistics  # against the exact gradient
    mean: Params | None  # what theory says of its mean
    against_mean: Statistics


def measure(problem: Problem, key: Key, batch: int, num_samples: int) -> tuple[dict[str, Row], dict[str, Params]]:
    """Every estimator's row, and the estimates."""
    samples = sample(lambda key: estimates(problem, key, batch), key, num_samples)
    rows = {}
    for name in (*NAMES, *BROKEN):
        estimate = samples[name]
        exact = problem.exact_cut if name.startswith("cut") or name == BROKEN[2] else problem.exact
        mean = problem.mean.get(name)
        if name == "return to go - per-time mean":
            mean = jax.tree.map(lambda x: (1 - 1 / batch) * x, problem.exact)
        against = statistics(estimate, exact if mean is None else mean, batch)
        rows[name] = Row(name, statistics(estimate, exact, batch), mean, against)
    return rows, samples


def estimators_table(rows: Mapping[str, Row]) -> str:
    header = ["estimator", "batch", "exact value", "mean", "standard error", "z", "variance", "cosine"]

    def cells(name: str, s: Statistics) -> list[str]:
        numbers = [f"{s.length:.3f}", f"{s.along:.3f}", f"{s.along_error:.4f}", f"{s.z_along:.1f}"]
        return [name, f"{s.batch_size}", *numbers, f"{s.variance:.3g}", f"{s.cosine:.3f}"]

    return table(header, [cells(name, rows[name].statistics) for name in NAMES])


def tests_table(rows: Mapping[str, Row], verdicts: Mapping[str, Verdict]) -> str:
    """Each mean against what theory says of it."""
    header = ["estimator", "bias in theory", "bias measured", "largest z", "p (Holm)", "smallest bias it could see"]

    def cells(name: str, verdict: Verdict) -> list[str]:
        s, mean = rows[name].statistics, rows[name].mean
        theory = float(np.linalg.norm(np.ravel(jax.tree.leaves(mean)[0]) - s.exact))
        shares = [f"{x:.1%}" for x in (theory / s.length, np.linalg.norm(s.bias) / s.length)]
        return [name, *shares, f"{verdict.max_z:.1f}", f"{verdict.p:.2g}", f"{verdict.detectable:.1%}"]

    return table(header, [cells(name, verdict) for name, verdict in verdicts.items()])


def findings(rows: Mapping[str, Row], samples: Mapping[str, Params]) -> list[str]:
    """What the ladder shows, in sentences."""
    s = {name: row.statistics for name, row in rows.items()}

    def against(name: str, reference: str) -> str:
        change, error = variance_change(samples[name], samples[reference])
        return f"variance {s[name].variance:.3g} against {s[reference].variance:.3g} (paired z {change / error:.0f})"

    def bias(name: str) -> str:
        theory = np.ravel(jax.tree.leaves(rows[name].mean)[0]) - s[name].exact
        shares = np.linalg.norm([theory, s[name].bias], axis=1) / s[name].length
        return f"{shares[1]:.1%} (formula {shares[0]:.1%})"

    to_go = "return to go"
    baselines = [f"{to_go} - {name}" for name in ("leave-one-out", "learned V", "exact V", "optimal baseline")]
    return [
        f"causality: {against(to_go, 'total return')}",
        *(f"{name}: {against(name, to_go)}, z of the mean {s[name].z_along:.1f}" for name in baselines),
        f"optimal baseline against exact V: {against(baselines[3], baselines[2])}",
        *(f"bias of GAE {lam:g} with a wrong V: {bias(f'GAE {lam:g}, wrong V')}" for lam in LAMBDAS),
        *(f"bias of {name}: {bias(name)}" for name in THEORY["rollouts cut by a time limit"]),
        *(f"bias of {name}: {bias(name)}" for name in ("step ratio x exact A", "clipped ratio x exact A")),
        *(f"broken, {name}: largest |z| {np.abs(s[name].z).max():.0f}" for name in BROKEN),
    ]


def turning(by_batch: Mapping[int, Mapping[str, Row]]) -> str:
    """How far the mean of an estimator points away from the gradient, beside what noise alone would make of it."""

    def cells(name: str, s: Statistics) -> list[str]:
        size = np.linalg.norm(s.mean)
        noise = np.sqrt(s.variance / s.num_samples) / size
        degrees = np.degrees([np.arccos(min(1.0, s.direction)), np.arctan(noise)])
        return [name, f"{s.batch_size}", f"{size / s.length:.3f}", f"{degrees[0]:.2f}", f"{degrees[1]:.2f}"]

    names = [f"return to go{how}" for how in (", standardised", " - batch mean", " - leave-one-out")]
    rows = [cells(name, by_batch[batch][name].statistics) for name in names for batch in sorted(by_batch)]
    return table(["mean over batches", "batch", "length / exact", "degrees off", "by noise alone"], rows)


def one_state(key: Key, num_samples: int) -> str:
    """Importance ratios where nothing but time passes: two arms, one of which pays 1, pulled H times; pi = (.7, .3),
    the older policy (.5, .5)."""
    policy = tabular_policy(bandit(), pinned=True)
    params, old_params = ({"params": {"logits": jnp.array([[x]])}} for x in (np.log(7 / 3), 0.0))
    pi, old = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    header = ["H", "variance of the ratio", "1.16^H - 1"]
    header += ["trajectory gradient's variance / mean^2", "theory", "step gradient's", ".16 / H"]
    rows = []
    for H in (1, 5, 10, 20):
        mdp = bandit(horizon=H)
        network = WithCritic(policy, jnp.zeros(1))

        def estimate(key, mdp=mdp, network=network, H=H):
            old_episode = episode_experience(key, finite_mdp(mdp), network, old_params, 1, H)
            x, mask = old_episode
            log_prob = network.apply(params, x.obs)[0].log_prob(x.action)
            ratio = trajectory_ratio(log_prob, x.log_prob, mask)
            advantage = jnp.where(x.action == 0, 1.0, 0.0) - pi[0]
            step = ascent(
                network, params, old_episode, advantage, lambda log_prob, w: surrogate(log_prob, x.log_prob, w)
            )
            trajectory = ascent(network, params, old_episode, ratio * total_return(x.reward, mask, 1.0))
            return ratio[0], trajectory["params"]["logits"], step["params"]["logits"]

        ratio, trajectory, step = (
            statistics(x, np.zeros(x.shape[1:]), H) for x in sample(estimate, jax.random.fold_in(key, H), num_samples)
        )
        # Under weights pi^2 / old, normalised, the count of arm 0 is binomial again.
        tilted = pi[0] ** 2 / old[0] / np.sum(pi**2 / old)
        k = np.arange(H + 1)
        second = np.sum(pi**2 / old) ** H * binom.pmf(k, H, tilted) @ (k * (k - H * pi[0])) ** 2
        exact = H * pi[0] * pi[1]
        relative = [second / exact**2 - 1, trajectory.variance / exact**2, step.variance / exact**2]
        errors = [trajectory.variance_error / exact**2, step.variance_error / exact**2]
        rows.append(
            [f"{H}", f"{ratio.variance:.3g} +- {ratio.variance_error:.2g}", f"{1.16**H - 1:.3g}"]
            + [f"{relative[1]:.4g} +- {errors[0]:.2g}", f"{relative[0]:.4g}"]
            + [f"{relative[2]:.4f} +- {errors[1]:.1g}", f"{0.16 / H:.4f}"]
        )
    return table(header, rows)


def binary_reward(key: Key, num_samples: int) -> str:
    """Standardising where it cannot turn anything: one parameter, rewards 0 and 1."""
    rows = []
    for G, p in ((4, 0.5), (16, 0.5), (16, 0.9)):
        mdp = bandit()
        network = WithCritic(tabular_policy(mdp, pinned=True), jnp.zeros(1))
        params = {"params": {"logits": jnp.array([[np.log(p / (1 - p))]])}}

        def estimate(key, mdp=mdp, network=network, params=params, G=G):
            group = episode_experience(key, finite_mdp(mdp), network, params, G, 1)
            return ascent(network, params, group, standardise(group.trajectory.reward, group.mask))

        exact = standardised_factor(G, p) * p * (1 - p)
        s = statistics(sample(estimate, jax.random.fold_in(key, G), num_samples), {"params": {"logits": exact}}, G)
        rows.append([f"{G}", f"{p:g}", f"{s.mean[0] / (p * (1 - p)):.3f}", f"{standardised_factor(G, p):.3f}"])
        rows[-1].append(f"{s.z[0]:.1f}")
    return table(["G", "p", "mean / gradient", "c_G(p)", "z"], rows)


def figure(by_batch: Mapping[int, Mapping[str, Row]]) -> Figure:
    """Variance and cosine of every estimator, for each batch size."""
    chart = Figure(figsize=(10, 9.5), dpi=110, layout="constrained")
    left, right = chart.subplots(1, 2, sharey=True)
    y, ticks, labels = 0, [], []
    for group, names in THEORY.items():
        left.text(0.02, y, group, transform=left.get_yaxis_transform(), fontweight="bold", va="center", ha="left")
        for name in names:
            y += 1
            ticks.append(y)
            labels.append(name)
            for colour, (batch, rows) in zip(COLOURS, sorted(by_batch.items()), strict=False):
                s = rows[name].statistics
                label = f"{batch} episodes" if y == 1 else None
                left.plot(batch * s.variance / (s.mean @ s.mean), y, "o", color=colour, alpha=0.8, label=label)
                right.plot(s.cosine, y, "o", color=colour, alpha=0.8)
        y += 1.5
    left.set_yticks(ticks, labels)
    left.set_ylim(y - 0.5, -1)
    left.set_xscale("log")
    left.set_xlabel("batch x variance / |mean|$^2$")
    right.set_xlabel("cosine to the exact gradient, mean over estimates")
    right.set_xlim(right=1.0)
    for axes in (left, right):
        axes.grid(axis="both", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower right")
    return chart


def ladder(config: LadderConfig) -> Study:
    """Measures every estimator at every batch size.

    Raises:
      UsageError: a batch of one, over which nothing can be standardised or left out.
    """
    for batch in (config.batch, *config.other_batches):
        if batch < 2:
            raise UsageError(f"batch ({batch}) must be at least 2: leave-one-out needs another episode")
    problem = pose(config.seed)
    key = jax.random.key(config.sample_seed)
    by_batch, found = {}, []
    for batch in (config.batch, *config.other_batches):
        say(f"estimates from {batch} episodes each")
        num_samples = max(2, config.num_samples * config.batch // batch)
        by_batch[batch], samples = measure(problem, jax.random.fold_in(key, batch), batch, num_samples)
        if batch == config.batch:
            found = findings(by_batch[batch], samples)
        del samples
    rows = by_batch[config.batch]
    verdicts = {
        batch: unbiasedness({name: row.against_mean for name, row in rows.items() if row.mean is not None})
        for batch, rows in by_batch.items()
    }
    say("importance ratios and standardised rewards where they are known in closed form")
    ratios, binary = one_state(key, 10 * config.num_samples), binary_reward(key, 5 * config.num_samples)
    biased = [name for v in verdicts.values() for name, verdict in v.items() if not verdict.unbiased]
    report = [
        f"{problem.mdp.name}: exact value, mean and z are along the exact gradient; variance is total",
        estimators_table(rows),
        f"means against theory, {config.num_samples} estimates of {config.batch} episodes; smallest bias seen with "
        "probability .9, as a share of the exact gradient",
        tests_table(rows, verdicts[config.batch]),
        f"off their theory at the level .01, in {sum(map(len, verdicts.values()))} tests at batches "
        f"{', '.join(map(str, by_batch))}: {', '.join(biased) or 'none'}",
        "\n".join(found),
        "what standardising does to the direction",
        turning(by_batch),
        "one state: ratios over trajectories and over steps",
        ratios,
        "standardised binary rewards",
        binary,
    ]
    numbers = {
        "config": dataclasses.asdict(config),
        "statistics": {b: {n: row.statistics._asdict() for n, row in rows.items()} for b, rows in by_batch.items()},
        "tests": {b: {n: verdict._asdict() for n, verdict in v.items()} for b, v in verdicts.items()},
        "findings": found,
    }
    return Study("\n\n".join(report), numbers, figure(by_batch))


if __name__ == "__main__":
    main(ladder, LadderConfig(), __doc__)
