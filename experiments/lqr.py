"""Deterministic policy gradient on linear-quadratic regulation, compared with the exact solution.

DPG learns a quadratic Q and a linear policy that follows its gradient. After every update, the exact cost of the
policy's gain is compared with the optimum by Riccati's equation, and the gradient by the learned Q with the exact one.
Two further settings show DPG with less exploration noise, and without gradient clipping.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np

from purepg.algorithms.dpg import DPGConfig, dpg
from purepg.config import Positive, Range, Seed
from purepg.envs.lqr import coupled_carts, lqr_env
from purepg.lab.riccati import gradient, objective, optimum, state_moment
from purepg.networks.linear import LinearQuadraticConfig, linear_quadratic
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.study import Study, main
from purepg.run.watch.style import COLOURS, GREY, dress
from purepg.types import Algorithm, Env, QNetwork, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LQR = coupled_carts()
ENV = lqr_env(LQR)
BEST = optimum(LQR)
NEAR = 0.01  # a gain counts as optimal if its cost exceeds the least by less than this share
WINDOW = 10  # updates whose cosines are pooled, since those of a single update are too noisy


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; DPG's hyperparameters are those of experiments/dpg.py.

    Attributes:
      seed: seed of the experiment.
      num_seeds: number of agents in each setting.
      num_updates: updates of each agent, over which its learning rates are annealed to 0.
      policy_learning_rate, critic_learning_rate: Adam's learning rates.
      exploration_std: deviation of the noise on actions. The optimal policy's first actions are about 3 in size.
      little_exploration: exploration_std of the second setting.
      max_grad_norm: bound on the norm of the policy's and the critic's gradients; the third setting has none.
    """

    seed: Seed = 0
    num_seeds: Annotated[int, Range(2)] = 10
    num_updates: Annotated[int, Range(20)] = 400
    policy_learning_rate: Positive = 0.03
    critic_learning_rate: Positive = 0.03
    exploration_std: Positive = 4.0
    little_exploration: Positive = 0.3
    max_grad_norm: Positive = 1.0


def settings(config: Config) -> dict[str, DPGConfig]:
    dpg = DPGConfig(
        num_envs=16,
        num_steps=8,
        num_critic_steps=20,
        policy_learning_rate=config.policy_learning_rate,
        critic_learning_rate=config.critic_learning_rate,
        anneal_learning_rate=True,
        anneal_updates=config.num_updates,
        gamma=LQR.gamma,
        exploration_std=config.exploration_std,
        max_grad_norm=config.max_grad_norm,
    )
    return {
        "DPG": dpg,
        f"noise of {config.little_exploration:g}": dataclasses.replace(dpg, exploration_std=config.little_exploration),
        "gradients not clipped": dataclasses.replace(dpg, max_grad_norm=None),
    }


# --- trained ---


class Path(NamedTuple):
    """What every agent learned at every update; leaves are float64 `[S, U, ...]`."""

    before: np.ndarray  # [S, U, m, n] the gain K of u = -K x
    after: np.ndarray
    matrix: (
        np.ndarray
    )  # [S, U, n + m, n + m] of the learned Q(z) = z^T matrix z + offset by which the gain took its step


def watched(env: Env, network: QNetwork, config: DPGConfig) -> Algorithm:
    """DPG with further metrics: each entry of the gain before and after an update, and of the learned Q."""
    base = dpg(env, network, config)

    def gain(state):
        return -state.learner.params["policy"]["params"]["weight"].T

    def step(key, state, update):
        after, metrics = base.step(key, state, update)
        matrix = after.learner.params["critic"]["params"]["matrix"][0]
        shown = {"before": gain(state), "after": gain(after), "matrix": (matrix + matrix.T) / 2}
        return after, metrics | {f"{name} {i}": x for name, of in shown.items() for i, x in enumerate(of.ravel())}

    return base._replace(step=step)


def trained(config: Config, setting: DPGConfig) -> Path:
    """Trains all seeds of a setting as one program."""
    steps = config.num_updates * setting.num_envs * setting.num_steps
    run = RunConfig(total_steps=steps, num_seeds=config.num_seeds, seed=config.seed, log_every=0, eval_episodes=1)
    found = train_population(watched, setting, linear_quadratic, LinearQuadraticConfig(), run, env=ENV)
    n, m = LQR.num_states, LQR.num_actions
    shapes = {"before": (m, n), "after": (m, n), "matrix": (n + m, n + m)}

    def of_entries(name: str, shape: tuple[int, int]) -> np.ndarray:
        entries = [found.metrics[f"{name} {i}"][0] for i in range(shape[0] * shape[1])]
        return np.stack(entries, axis=-1).reshape(*entries[0].shape, *shape).astype(np.float64)

    return Path(**{name: of_entries(name, shape) for name, shape in shapes.items()})


# --- held against what is known ---


def excess(gain: np.ndarray) -> np.ndarray:
    """By what share the cost of gains `[..., m, n]` exceeds the least cost, `[...]`; inf for an infinite cost."""
    least, out = objective(LQR, BEST), np.full(gain.shape[:-2], np.inf)
    for i in np.ndindex(out.shape):
        try:
            out[i] = objective(LQR, gain[i]) / least - 1
        except UsageError:
            continue
    return out


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def alignment(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cosines with the exact gradient, each `[S, U]`, NaN where the cost is infinite. The first is of the gradient by
    the learned Q, in expectation over the policy's states, so that Q is its only error. The second is of the step that
    Adam took, from the states of one rollout.
    """
    n = LQR.num_states
    by_q, by_step = np.full((2, *path.before.shape[:2]), np.nan)
    for i in np.ndindex(by_q.shape):
        K, H = path.before[i], -path.matrix[i]
        try:
            exact, visited = gradient(LQR, K), state_moment(LQR, K)
        except UsageError:
            continue
        by_q[i] = cosine(2 * (H[n:, :n] - H[n:, n:] @ K) @ visited, exact)
        by_step[i] = cosine(path.after[i] - K, exact)
    return by_q, by_step


def pooled(x: np.ndarray) -> np.ndarray:
    """Pools the values of all seeds and updates in each window: `[S, U]` to `[S * WINDOW, W]`."""
    num_windows = x.shape[1] // WINDOW
    windows = x[:, : num_windows * WINDOW].reshape(len(x), num_windows, WINDOW)
    return windows.swapaxes(1, 2).reshape(-1, num_windows)


def updates_needed(share: np.ndarray) -> np.ndarray:
    """Updates `[S]` after which the excess cost `[S, U]` stays below NEAR; inf if it is not below NEAR in the end."""
    last_far = np.array([np.max(np.flatnonzero(~(x < NEAR)), initial=-1) for x in share])
    return np.where(last_far + 1 < share.shape[1], last_far + 2.0, np.inf)


# --- the report ---


def study(config: Config) -> Study:
    """Trains each setting, and compares it with Riccati's gain and the exact gradient."""
    chosen = settings(config)
    paths = {name: trained(config, setting) for name, setting in chosen.items()}
    shares = {name: excess(path.after) for name, path in paths.items()}
    by_q, by_step = alignment(paths["DPG"])
    per_update = chosen["DPG"].num_envs * chosen["DPG"].num_steps
    steps = {name: per_update * updates_needed(share) for name, share in shares.items()}
    learned = paths["DPG"].after[:, -1]
    report = "\n\n".join(
        [say_settings(config, shares, steps, per_update), say_path(shares["DPG"], by_q, by_step, per_update)]
    )
    numbers = {
        "config": dataclasses.asdict(config),
        "least cost": -objective(LQR, BEST),
        "riccati": BEST,
        "learned": learned,
        "final excess": {name: share[:, -1] for name, share in shares.items()},
        "env steps to 1 %": steps,
        "cosine of Q's gradient": np.nanmedian(pooled(by_q), axis=0),
        "cosine of the step": np.nanmedian(pooled(by_step), axis=0),
    }
    return Study(report, numbers, draw(shares, by_q, by_step, learned, per_update), settings_table(shares, steps))


def percent(x: float) -> str:
    return "infinite" if np.isinf(x) else f"{100 * x:.3g} %"


def settings_table(shares: dict, steps: dict) -> str:
    header = ["setting", "within 1 %", "above the least cost, median", "worst", "env steps to 1 %, median", "slowest"]
    rows = []
    for name, share in shares.items():
        final = share[:, -1]
        found = f"{np.sum(final < NEAR)} of {len(final)}"
        needed = [f"{x:,.0f}" if np.isfinite(x) else "never" for x in (np.median(steps[name]), steps[name].max())]
        rows.append([name, found, percent(float(np.median(final))), percent(float(final.max())), *needed])
    return table(header, rows)


def say_settings(config: Config, shares: dict, steps: dict, per_update: int) -> str:
    least = -objective(LQR, BEST)
    start = -objective(LQR, np.zeros_like(BEST)) / least
    return (
        f"{LQR.num_states} state and {LQR.num_actions} action dimensions. The least cost is {least:.4f}; without any "
        f"action it is {start:.1f} times as much. {config.num_seeds} seeds, {config.num_updates} updates of "
        f"{per_update} environment steps\n{settings_table(shares, steps)}"
    )


def say_path(share: np.ndarray, by_q: np.ndarray, by_step: np.ndarray, per_update: int) -> str:
    header = ["env steps", "above the least cost", "cosine of Q's gradient", "cosine of the step"]
    rows, cosines = [], [np.nanmedian(pooled(x), axis=0) for x in (by_q, by_step)]
    for w in np.unique(np.geomspace(1, len(cosines[0]), 8).astype(int)):
        last = w * WINDOW - 1
        above = percent(float(np.median(share[:, last])))
        rows.append([f"{(last + 1) * per_update:,}", above, *(f"{x[w - 1]:.3f}" for x in cosines)])
    return (
        f"During training: medians over the seeds; the cosines are with the exact gradient, over {WINDOW} updates\n"
        f"{table(header, rows)}"
    )


def draw(
    shares: dict[str, np.ndarray], by_q: np.ndarray, by_step: np.ndarray, learned: np.ndarray, per_update: int
) -> "Figure":
    """Plots the costs, the cosines and the final gains."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(12.5, 4.2), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    end = per_update * by_q.shape[1]

    def band(axes: "Axes", x: np.ndarray, levels: tuple[float, float, float], colour: str, label: str) -> None:
        lower, median, upper = np.nanquantile(x, levels, axis=0, method="nearest")
        env_steps = np.linspace(0, end, len(median) + 1)[1:]
        axes.fill_between(env_steps, lower, upper, color=colour, alpha=0.2, linewidth=0)
        axes.plot(env_steps, median, color=colour, linewidth=1.8, label=label)

    for (name, share), colour in zip(shares.items(), COLOURS, strict=False):
        band(left, 100 * share, (0.0, 0.5, 1.0), colour, name)
    left.axhline(100 * NEAR, linestyle="--", color="black", linewidth=0.9)
    left.set(yscale="log", ylim=(1e-3, 1e4), ylabel="% above the least cost")
    dress(left, "Cost of the learned gain", f"exact; median and range of {len(learned)} seeds; dashed: {NEAR:.0%}")
    left.legend(frameon=False, fontsize=9)

    band(middle, pooled(by_q), (0.25, 0.5, 0.75), COLOURS[2], "gradient by the learned Q")
    band(middle, pooled(by_step), (0.25, 0.5, 0.75), COLOURS[3], "step taken (Adam, one rollout)")
    middle.axhline(0, color=GREY, linewidth=0.8)
    middle.set(ylim=(-0.55, 1.05), ylabel="cosine")
    dress(middle, "Angle to the exact gradient", f"median and quartiles over seeds and {WINDOW} updates")
    middle.legend(frameon=False, fontsize=9, loc="lower left")
    for axes in (left, middle):
        axes.set(xlabel="environment steps per seed", xlim=(0, end))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    place = np.arange(BEST.size)
    right.hlines(BEST.ravel(), place - 0.35, place + 0.35, color="black", linewidth=1.2, label="Riccati")
    spread = np.linspace(-0.2, 0.2, len(learned))
    for s, gain in enumerate(learned):
        label = "learned" if s == 0 else None
        right.plot(place + spread[s], gain.ravel(), "o", color=COLOURS[0], markersize=3.5, alpha=0.8, label=label)
    names = [f"$u_{i + 1}$, ${x}_{j}$" for i in range(LQR.num_actions) for j in (1, 2) for x in ("x", "v")]
    right.set_xticks(place, names, rotation=45)
    right.set(ylabel="gain", ylim=(0, None))
    dress(right, "Gains at the end", "of each motor on each cart's place and velocity; dots: seeds")
    right.legend(frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    main(study, Config(), __doc__)
