"""Shows the bias of leaving out gamma^t (in the spirit of Nota & Thomas 2020).

On five states that the policy cannot distinguish, the usual update without gamma^t follows the gradient of neither the
discounted nor the undiscounted return, and converges to the policy that is worst by both. The policy has one parameter,
p = sigmoid(theta), the probability of action 0 in every state. The script computes the gradients exactly, estimates
them by REINFORCE's own update, and trains with each.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parts.discount_bias import draw

from purepg.algorithms.reinforce import REINFORCEConfig, reinforce
from purepg.config import Count, Positive, Range, Seed
from purepg.envs.finite_mdp import mdp_env
from purepg.envs.named_mdps import aliased
from purepg.equations.advantages import discount_power, discounted_return
from purepg.lab.accuracy import Statistics, sample, statistics
from purepg.lab.estimators import WithCritic, update_of
from purepg.lab.exact import bellman_gradient, in_float64, log_policy, objective, score, values, weighted_gradient
from purepg.lab.trajectories import enumerate_trajectories, state_distributions
from purepg.networks.tabular import tabular_policy
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.study import Study, main
from purepg.types import Algorithm, Env, Network, Params, UpdateSteps

MDP = aliased()
ENV = mdp_env(MDP)
UNDISCOUNTED = dataclasses.replace(MDP, gamma=1.0)
MAX_STEPS = 5  # length of the longest episode
NETWORK = tabular_policy(MDP, pinned=True)
POLICY = log_policy(NETWORK, MDP.num_states)
START = 0.5  # the p at which the update is estimated and training begins
NAMES = {True: "with gamma^t", False: "without gamma^t"}  # by `discount_states`
Z = 5.0  # number of standard errors from 0 at which a sign counts as certain


@dataclass(frozen=True)
class Config:
    """Settings of the estimates and of training; the exact results do not depend on them.

    Attributes:
      seed: seed of the experiment.
      num_samples: number of one-episode updates in each estimate.
      num_seeds: number of agents trained with gamma^t, and as many without.
      num_updates: updates of each agent.
      num_episodes: episodes per update.
      learning_rate: learning rate of plain gradient ascent (SGD).
    """

    seed: Seed = 0
    num_samples: Annotated[int, Range(100)] = 65_536
    num_seeds: Count = 16
    num_updates: Count = 800
    num_episodes: Count = 64
    learning_rate: Positive = 0.25


def parameters(p: float) -> Params:
    return {"params": {"logits": np.full((1, 1), np.log(p / (1 - p)))}}


def theta(params: Params) -> Any:
    """The only number in a tree of parameters or in a gradient."""
    return params["params"]["logits"][..., 0, 0]


# --- computed ---


def computed(p: float) -> dict[str, tuple[float, float]]:
    """The gradients and the mean updates at p, each as (computed by the laboratory, closed form)."""
    params, dp = parameters(p), p * (1 - p)
    visited = state_distributions(MDP, in_float64(POLICY, params), MAX_STEPS, restart=False)  # P(s_t = s), no gamma^t

    def mean_update(params):
        return weighted_gradient(POLICY, params, jnp.asarray(visited), values(MDP, POLICY(params)).q)

    update = float(theta(in_float64(mean_update, params)))
    return {
        "dJ_.5": (float(theta(in_float64(bellman_gradient, MDP, POLICY, params))), 0.25 * dp),
        "dJ_1": (float(theta(in_float64(bellman_gradient, UNDISCOUNTED, POLICY, params))), 6.5 * dp),
        "no gamma^t": (update, -0.5 * dp),
        # REINFORCE's `mean_over_steps`, also without gamma^t, divides the sum over a batch's steps by their number. As
        # the batch grows, the mean of this ratio tends to the ratio of the means, which is given here.
        "mean over steps": (update / float(visited.sum()), -0.5 * dp / (2 + 3 * p)),
    }


def one_episode(value: np.ndarray, discount_states: bool) -> tuple[float, float]:
    """Exact mean and standard deviation of REINFORCE's one-episode update at p = 1/2, by enumerating trajectories."""

    def moments(params):
        trajectory, mask, probability = jax.tree.map(jnp.asarray, enumerate_trajectories(MDP, POLICY(params)))
        weight = discounted_return(trajectory.reward, mask, MDP.gamma) - value[trajectory.obs]
        if discount_states:
            weight *= discount_power(mask, MDP.gamma)
        update = jnp.sum(score(POLICY, params)[trajectory.obs, trajectory.action, 0] * weight, axis=0, where=mask)
        mean = probability @ update
        return mean, jnp.sqrt(probability @ (update - mean) ** 2)

    mean, deviation = in_float64(moments, parameters(START))
    return float(mean), float(deviation)


def returns(p: np.ndarray) -> np.ndarray:
    """J_.5 and J_1, `[N, 2]`, of the policies p, `[N]`; p may be 0 or 1."""

    def both(p):
        log_pi = jnp.broadcast_to(jnp.log(jnp.stack([p, 1 - p])), MDP.reward.shape)
        return jnp.stack([objective(mdp, log_pi) for mdp in (MDP, UNDISCOUNTED)])

    return in_float64(jax.vmap(both), np.asarray(p, np.float64))


# --- estimated ---


def settings(config: Config, **changes: Any) -> REINFORCEConfig:
    """REINFORCE with the plain gradient of the return."""
    plain = REINFORCEConfig(
        num_episodes=config.num_episodes,
        max_steps=MAX_STEPS,
        optimizer="sgd",
        learning_rate=config.learning_rate,
        gamma=MDP.gamma,
        baseline="none",
        mean_over_steps=False,
        value_coef=0.0,
    )
    return dataclasses.replace(plain, **changes)


def with_critic(value: np.ndarray) -> Network:
    """The policy with a fixed critic, `value [S]`."""
    return WithCritic(NETWORK, jnp.asarray(value))


class Estimate(NamedTuple):
    """REINFORCE's one-episode update: sampled statistics, and the exact mean and deviation."""

    discounts: bool
    baseline: str
    sampled: Statistics
    mean: float
    deviation: float

    def z(self, target: float) -> float:
        """The distance of the sampled mean from `target`, in standard errors."""
        return float((self.sampled.mean[0] - target) / self.sampled.standard_error[0])


def estimated(config: Config) -> list[Estimate]:
    params = jax.tree.map(jnp.float32, parameters(START))
    value = in_float64(lambda params: values(MDP, POLICY(params)).value, parameters(START))
    out = []
    for baseline, V in {"none": 0 * value, "value": value}.items():
        for discounts in NAMES:
            one_episode_each = settings(config, num_episodes=1, baseline=baseline, discount_states=discounts)
            one = reinforce(ENV, with_critic(V), one_episode_each)
            key = jax.random.fold_in(jax.random.key(config.seed), len(out))
            samples = theta(sample(update_of(one, params, config.learning_rate), key, config.num_samples))
            mean, deviation = one_episode(V, discounts)
            out.append(Estimate(discounts, baseline, statistics(samples, np.float64(mean)), mean, deviation))
    return out


def episodes_needed(mean: float, deviation: float) -> float:
    """The number of episodes after which the mean is Z standard errors away from 0."""
    return (Z * deviation / mean) ** 2


# --- followed ---


def watched(env: Env, network: Network, config: REINFORCEConfig) -> Algorithm:
    """REINFORCE with p after each update as a further metric. Every update counts as many environment steps as the
    longest could take, so that a budget of environment steps fixes the number of updates."""
    base = reinforce(env, network, config)

    def step(key, state, update):
        state, metrics = base.step(key, state, update)
        return state, metrics | {"p": jax.nn.sigmoid(theta(state.learner.params))}

    return base._replace(step=step, update_steps=UpdateSteps(base.update_steps.most, base.update_steps.most))


def trained(config: Config) -> dict[bool, np.ndarray]:
    """p before the first update and after each, `[S, U + 1]`, by `discount_states`."""
    steps = config.num_updates * config.num_episodes * MAX_STEPS
    sizes: Any = {"num_seeds": config.num_seeds, "seed": config.seed, "eval_episodes": 1, "eval_max_steps": MAX_STEPS}
    found = train_population(
        watched,
        settings(config),
        lambda env, unused: with_critic(np.zeros(MDP.num_states)),
        run=RunConfig(total_steps=steps, log_every=0, **sizes),
        env=ENV,
        sweep={"discount_states": list(NAMES)},
    )
    of_policies = zip(NAMES, found.metrics["p"], strict=True)
    return {discounts: np.pad(p, ((0, 0), (1, 0)), constant_values=START) for discounts, p in of_policies}


def mean_path(config: Config, rate: float) -> np.ndarray:
    """p before the first update and after each, `[U + 1]`, if every update equalled its mean, rate * p (1 - p)."""
    logit, path = 0.0, [START]
    for _ in range(config.num_updates):
        logit += config.learning_rate * rate * path[-1] * (1 - path[-1])
        path.append(float(np.exp(-np.logaddexp(0.0, -logit))))  # sigmoid, without overflow
    return np.array(path)


# --- the report ---


def study(config: Config) -> Study:
    """Computes, estimates and trains, and reports each in a table."""
    exact = {p: computed(p) for p in (0.1, 0.3, 0.5, 0.7, 0.9)}
    estimates = estimated(config)
    path = trained(config)
    mean = {discounts: mean_path(config, 0.25 if discounts else -0.5) for discounts in NAMES}
    return Study(
        "\n\n".join([say_computed(exact), say_estimated(estimates, exact[START]), say_trained(config, path)]),
        {
            "config": dataclasses.asdict(config),
            "computed": {str(p): columns for p, columns in exact.items()},
            "estimated": [row._asdict() | {"sampled": row.sampled._asdict()} for row in estimates],
            "final_p": {NAMES[discounts]: p[:, -1] for discounts, p in path.items()},
        },
        draw(NAMES, path, mean, returns(np.array([0.0, 1.0]))),
        trained_table(path),
    )


def say_computed(exact: dict[float, dict[str, tuple[float, float]]]) -> str:
    forms = [".25 p(1-p)", "6.5 p(1-p)", "-.5 p(1-p)", "-.5 p(1-p)/(2+3p)"]
    header = ["p", *(x for pair in zip(exact[START], forms, strict=True) for x in pair)]
    rows = [[f"{p:g}", *(f"{x:.6f}" for pair in columns.values() for x in pair)] for p, columns in exact.items()]
    worst = max(abs(x - y) for columns in exact.values() for x, y in columns.values())
    return (
        f"Computed, and in closed form (largest difference {worst:.0e}). 'no gamma^t' is the mean update without it; "
        "'mean over steps' is the same divided by an episode's mean length, the limit for large batches\n"
        f"{table(header, rows)}"
    )


def say_estimated(estimates: list[Estimate], exact: dict[str, tuple[float, float]]) -> str:
    gradient, update = exact["dJ_.5"][1], exact["no gamma^t"][1]
    header = ["update", "baseline", "mean", "error", f"z to {gradient:g}", f"z to {update:g}"]
    header += ["deviation", "exact", f"episodes to z = {Z:g}", "exact"]
    rows = []
    for row in estimates:
        mean, deviation = row.sampled.mean[0], row.sampled.variance**0.5
        rows.append([
            NAMES[row.discounts],
            {"none": "none", "value": "exact V"}[row.baseline],
            f"{mean:.4f}",
            f"{row.sampled.standard_error[0]:.4f}",
            f"{row.z(gradient):.1f}",
            f"{row.z(update):.1f}",
            f"{deviation:.4f}",
            f"{row.deviation:.4f}",
            f"{episodes_needed(mean, deviation):,.0f}",
            f"{episodes_needed(row.mean, row.deviation):,.0f}",
        ])  # fmt: skip
    return (
        f"Estimated at p = {START:g}, where dJ_.5 = {gradient:g} and -.5 p(1-p) = {update:g}, from "
        f"{estimates[0].sampled.num_samples:,} one-episode updates of REINFORCE\n{table(header, rows)}"
    )


def trained_table(path: dict[bool, np.ndarray]) -> str:
    header = ["policy", "p, median", "lowest", "highest", "above .9", "below .1", "J_.5, median", "J_1, median"]
    rows = []
    for discounts, name in NAMES.items():
        p = path[discounts][:, -1]
        spread = [f"{x:.3f}" for x in (np.median(p), p.min(), p.max())]
        shares = [f"{np.mean(p > 0.9):.0%}", f"{np.mean(p < 0.1):.0%}"]
        rows.append([f"trained {name}", *spread, *shares, *(f"{x:.3f}" for x in np.median(returns(p), axis=0))])
    for p in (0.0, START, 1.0):
        rows.append([f"p = {p:g}", f"{p:.3f}", "", "", "", "", *(f"{x:.3f}" for x in returns(np.array([p]))[0])])
    return table(header, rows)


def say_trained(config: Config, path: dict[bool, np.ndarray]) -> str:
    return (
        f"Trained from p = {START:g}: {config.num_seeds} seeds, {config.num_updates} updates of {config.num_episodes} "
        f"episodes, learning rate {config.learning_rate:g}\n{trained_table(path)}"
    )


if __name__ == "__main__":
    main(study, Config(), __doc__)
