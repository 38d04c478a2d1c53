"""Compares the convergence of exact policy gradients with theory, in float64 and without sampling.

With the softmax policy gradient, the gap to the optimum shrinks as 1/t. With entropy, it converges linearly to the
regularised optimum. The natural gradient stays below a bound of order 1/T throughout, and in the end converges linearly
to the optimum itself.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from parts.softmax_convergence import draw, steps_above_floor

from purepg.config import Positive, Range, Seed
from purepg.envs.finite_mdp import FiniteMDP, unroll
from purepg.envs.named_mdps import bandit, garnet
from purepg.lab.exact import (
    LogPolicy,
    bellman_gradient,
    in_float64,
    log_policy,
    natural_gradient,
    objective,
    optimum,
    values,
)
from purepg.networks.tabular import tabular_policy
from purepg.run.pages import table
from purepg.run.study import Study, main
from purepg.types import Array, Params, UsageError

FEW = 20  # number of steps over which the two forms of the natural gradient are compared


@dataclass(frozen=True)
class Config:
    """Step sizes and lengths.

    Attributes:
      seed: seed of the random Garnet MDP.
      num_steps: number of gradient steps. Once a gap is no larger than rounding errors, the later steps are ignored.
      bandit_step, garnet_step: step sizes of the policy gradient on the bandits and on the Garnet.
      entropy_coef: entropy coefficient tau.
      garnet_entropy_step: step size with entropy on the Garnet; the bandit uses bandit_step.
      natural_step: step size eta of the natural gradient.
    """

    seed: Seed = 0
    num_steps: Annotated[int, Range(1000)] = 100_000
    bandit_step: Positive = 0.4
    garnet_step: Positive = 1.0
    entropy_coef: Positive = 0.5
    garnet_entropy_step: Positive = 3.0
    natural_step: Positive = 0.1


class Row(NamedTuple):
    """A line of the table."""

    process: str
    method: str
    step: float
    quantity: str
    fitted: float
    theory: float | str


class Curve(NamedTuple):
    """A gap `[T + 1]`, before the first step and after each, and its theoretical value, NaN for early steps."""

    label: str
    gap: np.ndarray
    theory: np.ndarray


def follow(
    direction: Callable[[Params], Params], watch: Callable[[Params], Array], start: Params, step: float, num_steps: int
) -> np.ndarray:
    """Iterates theta <- theta + step * direction(theta); returns `watch(theta)` at the start and after each step."""

    def advance(params, _):
        return jax.tree.map(lambda x, g: x + step * g, params, direction(params)), watch(params)

    return in_float64(jax.jit(lambda params: jax.lax.scan(advance, params, length=num_steps + 1)[1]), start)


def softmax(mdp: FiniteMDP) -> tuple[LogPolicy, Params]:
    """The tabular softmax policy, and the parameters of the uniform policy, from which it starts."""
    network = tabular_policy(mdp)
    return log_policy(network, mdp.num_states), network.init(jax.random.key(0), jnp.int32(0))


def policy_gradient_gap(mdp: FiniteMDP, step: float, num_steps: int, entropy_coef: float = 0.0) -> np.ndarray:
    """The gap J* - J during gradient ascent; both J include the entropy bonus."""
    policy, start = softmax(mdp)

    def direction(params):
        return bellman_gradient(mdp, policy, params, entropy_coef)

    J = follow(direction, lambda params: objective(mdp, policy(params), entropy_coef), start, step, num_steps)
    return optimum(mdp, entropy_coef).objective - J


# --- what theory says ---


def softmax_constant(mdp: FiniteMDP, step: float) -> float:
    """The limit of t * gap for softmax policy gradient: S (K - 1) / (K * step), with S states and K actions.

    gap = sum_s d(s) sum_a x(s, a), x = pi(a|s) * (action gap of a). In the limit, each step lowers the logit of a
    suboptimal action by step * d(s) * x(s, a), and raises the best one's by their sum. So x tends to the same c(s) / t
    for all suboptimal actions of a state, where 1 / t = step * d(s) * K * c(s) / t. The rewards and d cancel.
    """
    S, K = int(np.sum(~mdp.terminal)), mdp.num_actions
    return S * (K - 1) / (K * step)


def entropy_slope(mdp: FiniteMDP, step: float, entropy_coef: float) -> float:
    """Log-slope of the regularised gap: 2 log(1 - step * lambda), with lambda the smallest nonzero eigenvalue of the
    Hessian of -J at the optimum. Each step multiplies the error of theta by 1 - step * lambda, and the gap is quadratic
    in it. (The code takes the largest |1 - step * lambda|: for large steps, that is another eigenvalue's.)

    Raises:
      UsageError: the step is too large to converge.
    """
    policy, params = softmax(mdp)
    unravel = ravel_pytree(params)[1]
    row, state = np.unique(mdp.alias, return_index=True)  # one state for each row of logits
    logits = optimum(mdp, entropy_coef).q[state] / entropy_coef

    def regularised(flat):
        return objective(mdp, policy(unravel(flat)), entropy_coef)

    eigenvalue = np.linalg.eigvalsh(-in_float64(jax.jit(jax.hessian(regularised)), logits.ravel()))
    eigenvalue = eigenvalue[len(row) :]  # drops a zero for each row: adding a constant to its logits changes nothing
    if step * eigenvalue[-1] >= 2:
        limit = 2 / eigenvalue[-1]
        raise UsageError(f"{mdp.name}: the step with entropy ({step:g}) must be below {limit:.3g} to converge")
    return float(2 * np.log(np.max(np.abs(1 - step * eigenvalue))))


def bounded(mdp: FiniteMDP) -> FiniteMDP:
    """The same MDP with rewards shifted and scaled to [0, 1], as the bound on the natural gradient requires."""
    low, high = mdp.reward.min(), mdp.reward.max()
    return dataclasses.replace(mdp, reward=(mdp.reward - low) / (high - low))


def smallest_action_gap(mdp: FiniteMDP) -> float:
    q = np.sort(optimum(mdp).q, axis=1)
    return float(np.min(q[:, -1] - q[:, -2]))


# --- the three processes ---


def log_slope(gap: np.ndarray, name: str) -> float:
    """Slope of log(gap) per step, by least squares over the last third of the steps whose gap exceeds rounding."""
    n = steps_above_floor(gap)
    t = np.arange(2 * n // 3, n)
    if len(t) < 3:
        raise UsageError(f"{name}: only {n} steps are above rounding, too few for a slope; choose a smaller step")
    return float(np.polyfit(t, np.log(gap[t]), 1)[0])


def line(gap: np.ndarray, slope: float) -> np.ndarray:
    """A line of the given slope in log(gap), through the middle of the range of `log_slope`; NaN in the first half."""
    n = steps_above_floor(gap)
    t, middle = np.arange(len(gap)), 5 * n // 6
    return np.where(t >= n // 2, gap[middle] * np.exp(slope * (t - middle)), np.nan)


def plain_gradient(config: Config) -> tuple[list[Row], list[Curve]]:
    """The softmax policy gradient, whose gap shrinks as 1 / t."""
    rows, curves = [], []
    method, T = "policy gradient", config.num_steps
    for name, mdp, step in (
        ("bandit (1, 0)", unroll(bandit()), config.bandit_step),
        ("bandit (1, .5, 0)", unroll(bandit((1.0, 0.5, 0.0))), config.bandit_step),
        (f"garnet {config.seed}", garnet(config.seed), config.garnet_step),
    ):
        gap, constant = policy_gradient_gap(mdp, step, T), softmax_constant(mdp, step)
        if (n := steps_above_floor(gap)) <= T:
            raise UsageError(
                f"{name}: the gap is only rounding after {n} of {T} steps; choose a smaller step or fewer steps"
            )
        t, last = np.arange(T + 1), slice(T // 10, None)  # the last decade
        fitted = float(np.polyfit(np.log(t[last]), np.log(gap[last]), 1)[0])
        rows.append(Row(name, method, step, "slope of log gap by log t", fitted, -1.0))
        rows.append(Row(name, method, step, "t * gap at the end", float(T * gap[-1]), constant))
        curves.append(Curve(name, gap, np.where(t >= 10, constant / np.maximum(t, 1), np.nan)))
    return rows, curves


def with_entropy(config: Config) -> tuple[list[Row], list[Curve]]:
    """The policy gradient with entropy, whose regularised gap converges linearly to 0."""
    rows, curves, tau = [], [], config.entropy_coef
    for name, mdp, step in (
        ("bandit (1, .5, 0)", unroll(bandit((1.0, 0.5, 0.0))), config.bandit_step),
        (f"garnet {config.seed}", garnet(config.seed), config.garnet_entropy_step),
    ):
        slope, gap = entropy_slope(mdp, step, tau), policy_gradient_gap(mdp, step, config.num_steps, tau)
        fitted = log_slope(gap, name)
        rows.append(Row(name, f"policy gradient, entropy {tau:g}", step, "slope of log gap", fitted, slope))
        curves.append(Curve(f"{name}, step {step:g}", gap, line(gap, slope)))
    return rows, curves


def with_natural_gradient(config: Config) -> tuple[list[Row], list[Curve]]:
    """The natural gradient, whose gap stays below log|A| / (eta T) + 1 / ((1 - gamma)^2 T) (Agarwal et al. 2021) and
    in the end converges linearly to 0.

    The last suboptimal action to vanish is the one with the smallest action gap: each step multiplies its probability
    by exp(-eta * (action gap) / (1 - gamma)). What remains of the next one makes the fitted slope slightly steeper.
    """
    mdp, eta = bounded(garnet(config.seed)), config.natural_step
    policy, start = jax.nn.log_softmax, np.zeros_like(mdp.reward)  # parameters are the logits themselves
    horizon = 1 / (1 - mdp.gamma)

    def by_fisher(logits):
        return natural_gradient(mdp, policy, logits)

    def by_advantage(logits):
        return values(mdp, policy(logits)).advantage * horizon

    def pi(logits):
        return jnp.exp(policy(logits))

    distance = np.abs(follow(by_fisher, pi, start, eta, FEW) - follow(by_advantage, pi, start, eta, FEW)).max()
    # The long run uses the second form, because near a deterministic policy F's eigenvalues are lost to rounding.
    J = follow(by_advantage, lambda logits: objective(mdp, policy(logits)), start, eta, config.num_steps)
    gap = optimum(mdp).objective - J
    T = np.arange(1, len(gap))
    bound = np.append(np.nan, (np.log(mdp.num_actions) / eta + horizon**2) / T)
    slope = -eta * smallest_action_gap(mdp) * horizon
    name, method = f"garnet {config.seed}, rewards in [0, 1]", "natural gradient"
    rows = [
        Row(name, method, eta, f"distance to pi exp(eta A/(1-gamma)), {FEW} steps", float(distance), 0.0),
        Row(name, method, eta, "largest gap / bound", float(np.max(gap[1:] / bound[1:])), "at most 1"),
        Row(name, method, eta, "slope of log gap", log_slope(gap, name), slope),
    ]
    return rows, [Curve("gap", gap, line(gap, slope)), Curve("bound", bound, np.full_like(gap, np.nan))]


# --- the report ---


def study(config: Config) -> Study:
    """Runs all processes, and fits their rates."""
    parts = [plain_gradient(config), with_entropy(config), with_natural_gradient(config)]
    rows = [row for rows, _ in parts for row in rows]
    numbers = {"config": dataclasses.asdict(config), "rows": [row._asdict() for row in rows]}
    return Study(say(rows), numbers, draw(parts), say(rows))


def say(rows: list[Row]) -> str:
    def number(x):
        return x if isinstance(x, str) else f"{x:.5g}"

    lines = [[row.process, row.method, f"{row.step:g}", row.quantity, *map(number, row[4:])] for row in rows]
    return table(Row._fields, lines)


if __name__ == "__main__":
    main(study, Config(), __doc__)
