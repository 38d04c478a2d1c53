"""Measures the bias, variance and direction of every gradient estimator against the exact policy gradient.

On a random MDP of 5 states, 3 actions and 8 steps, every estimator of `purepg.equations.advantages` is sampled through
`episodes` or `rollout`, all of them in one vmapped program for each batch size. Each estimator's mean is tested against
its theoretical value.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from parts.gradient_ladder import BROKEN, LAMBDAS, NAMES, OFF_BY_ONE, THEORY, Problem, estimates, pose
from scipy.stats import binom

from purepg.config import Count, Seed
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import bandit
from purepg.equations.advantages import standardise, total_return
from purepg.equations.losses import surrogate
from purepg.equations.ratios import trajectory_ratio
from purepg.lab.accuracy import Statistics, Verdict, sample, statistics, unbiasedness, variance_change
from purepg.lab.estimators import WithCritic, ascent, episode_experience
from purepg.lab.theory import standardised_factor
from purepg.networks.tabular import tabular_policy
from purepg.run.console import say
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.run.watch.style import COLOURS, dress
from purepg.types import Key, Params, UsageError


@dataclass(frozen=True)
class LadderConfig:
    """The problem, and the number of samples.

    Attributes:
      seed: seed of the MDP, the policies and the critics.
      sample_seed: seed of the estimates.
      batch: episodes per estimate in the tables.
      other_batches: further batch sizes, shown in the figure and in numbers.json.
      num_samples: estimates per estimator at `batch`. Other batch sizes use the same total number of episodes.
    """

    seed: Seed = 0
    sample_seed: Seed = 1
    batch: Count = 16
    other_batches: tuple[int, ...] = (4, 64)
    num_samples: Count = 20_000


class Row(NamedTuple):
    """An estimator at a batch size."""

    name: str
    statistics: Statistics  # against the exact gradient
    mean: Params | None  # the theoretical mean, if it is known
    against_mean: Statistics  # against the theoretical mean, else the exact gradient


def measure(problem: Problem, key: Key, batch: int, num_samples: int) -> tuple[dict[str, Row], dict[str, Params]]:
    """Every estimator's row, and the estimates."""
    samples = sample(lambda key: estimates(problem, key, batch), key, num_samples)
    rows = {}
    for name in (*NAMES, *BROKEN):
        estimate = samples[name]
        exact = problem.exact_cut if name.startswith("cut") or name == OFF_BY_ONE else problem.exact
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
    """Tests of each mean against its theoretical value."""
    header = ["estimator", "bias in theory", "bias measured", "largest z", "p (Holm)", "smallest bias it could see"]

    def cells(name: str, verdict: Verdict) -> list[str]:
        s, mean = rows[name].statistics, rows[name].mean
        theory = float(np.linalg.norm(np.ravel(jax.tree.leaves(mean)[0]) - s.exact))
        shares = [f"{x:.1%}" for x in (theory / s.length, np.linalg.norm(s.bias) / s.length)]
        return [name, *shares, f"{verdict.max_z:.1f}", f"{verdict.p:.2g}", f"{verdict.detectable:.1%}"]

    return table(header, [cells(name, verdict) for name, verdict in verdicts.items()])


def findings(rows: Mapping[str, Row], samples: Mapping[str, Params]) -> list[str]:
    """The main findings, one per line."""
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
    """The angle between an estimator's mean and the gradient, and the angle that noise alone would cause."""

    def cells(name: str, s: Statistics) -> list[str]:
        size = np.linalg.norm(s.mean)
        noise = np.sqrt(s.variance / s.num_samples) / size
        degrees = np.degrees([np.arccos(min(1.0, s.direction)), np.arctan(noise)])
        return [name, f"{s.batch_size}", f"{size / s.length:.3f}", f"{degrees[0]:.2f}", f"{degrees[1]:.2f}"]

    names = [f"return to go{how}" for how in (", standardised", " - batch mean", " - leave-one-out")]
    rows = [cells(name, by_batch[batch][name].statistics) for name in names for batch in sorted(by_batch)]
    return table(["mean over batches", "batch", "length / exact", "degrees off", "by noise alone"], rows)


def one_state(key: Key, num_samples: int) -> str:
    """Importance ratios on a bandit of two arms, one of which pays 1, pulled H times. The policy is pi = (.7, .3), the
    older policy (.5, .5)."""
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
            old_episode = episode_experience(key, mdp_env(mdp), network, old_params, 1, H)
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
        # Under the normalised weights pi^2 / old, the count of arm 0 is still binomial.
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
    """The factor by which standardising scales the gradient, for one parameter and rewards of 0 and 1."""
    rows = []
    for G, p in ((4, 0.5), (16, 0.5), (16, 0.9)):
        mdp = bandit()
        network = WithCritic(tabular_policy(mdp, pinned=True), jnp.zeros(1))
        params = {"params": {"logits": jnp.array([[np.log(p / (1 - p))]])}}

        def estimate(key, mdp=mdp, network=network, params=params, G=G):
            group = episode_experience(key, mdp_env(mdp), network, params, G, 1)
            return ascent(network, params, group, standardise(group.trajectory.reward, group.mask))

        exact = standardised_factor(G, p) * p * (1 - p)
        s = statistics(sample(estimate, jax.random.fold_in(key, G), num_samples), {"params": {"logits": exact}}, G)
        rows.append([f"{G}", f"{p:g}", f"{s.mean[0] / (p * (1 - p)):.3f}", f"{standardised_factor(G, p):.3f}"])
        rows[-1].append(f"{s.z[0]:.1f}")
    return table(["G", "p", "mean / gradient", "c_G(p)", "z"], rows)


def figure(by_batch: Mapping[int, Mapping[str, Row]]) -> Figure:
    """Plots variance and cosine of every estimator, for each batch size."""
    chart = Figure(figsize=(10, 9.5), dpi=100, layout="constrained")
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
    right.set_xlabel("cosine, mean over estimates")
    right.set_xlim(0, 1.02)
    dress(left, "Noise", "of a single episode's share in the estimate")
    dress(right, "Direction", "angle between one estimate and the exact gradient")
    for axes in (left, right):
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    left.legend(loc="lower right", fontsize=9)
    return chart


def ladder(config: LadderConfig) -> Study:
    """Measures every estimator at every batch size.

    Raises:
      UsageError: a batch size is below 2, which neither standardising nor leave-one-out allows.
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
    say("importance ratios and standardised rewards on problems with closed forms")
    ratios, binary = one_state(key, 10 * config.num_samples), binary_reward(key, 5 * config.num_samples)
    biased = [name for v in verdicts.values() for name, verdict in v.items() if not verdict.unbiased]
    report = [
        f"{problem.mdp.name}: exact value, mean and z are along the exact gradient; variance is total",
        estimators_table(rows),
        f"means against theory, {config.num_samples} estimates of {config.batch} episodes; smallest bias: the one that "
        "a test detects with probability .9, as a share of the exact gradient",
        tests_table(rows, verdicts[config.batch]),
        f"means that deviate from theory at the level .01, in {sum(map(len, verdicts.values()))} tests at batch sizes "
        f"{', '.join(map(str, by_batch))}: {', '.join(biased) or 'none'}",
        "\n".join(found),
        "how standardising changes the direction of the mean",
        turning(by_batch),
        "importance ratios of trajectories and of steps, on one state",
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
    return Study("\n\n".join(report), numbers, figure(by_batch), estimators_table(rows))


if __name__ == "__main__":
    main(ladder, LadderConfig(), __doc__)
