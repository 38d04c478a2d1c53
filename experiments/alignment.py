"""Fine-tunes a cloned language model with every method of the family, at an equal number of generated tokens.

For each task, it clones demonstrations with several seeds, stopped early. From the median seed's clone it then trains
each method of `purepg.algorithms.family`, and DPO on pairs of the clone's responses. All methods of the family take
equally many gradient steps per update. Each method's learning rate, and DPO's beta, is the one with the highest
accuracy on a few seeds, which have no part in the results. Accuracy is on held-out prompts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import numpy as np

from purepg.algorithms.clone import CloneConfig, clone
from purepg.algorithms.dpo import DPOConfig, dpo
from purepg.algorithms.family import FAMILY
from purepg.algorithms.grpo import grpo
from purepg.config import Count, Positive, Range, Seed
from purepg.language import model as tokens
from purepg.language.model import LanguageModelConfig, digest
from purepg.run.experiment import train_population
from purepg.run.pages import table
from purepg.run.plan import RunConfig
from purepg.run.reliability import bootstrap_interval, iqm, iqm_and_quartiles
from purepg.run.results import Results
from purepg.run.study import Study, main
from purepg.run.summary import with_interval
from purepg.run.sweep import label_of
from purepg.run.watch.curves import on_common_grid
from purepg.run.watch.style import COLOURS, dress
from purepg.types import Params, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_CANDIDATES = 4  # responses to a prompt from which DPO takes a pair


class Task(NamedTuple):
    """A task's defaults."""

    clone_steps: int  # tokens of demonstrations (padding included) after which the clone's accuracy is 20 to 50 %
    num_tokens: int
    columns: float  # about how many tokens a response has
    env: str
    env_params: tuple[str, ...] = ()


TASKS = {
    "addition": Task(240_000, 500_000, 3.6, "addition"),
    "countdown": Task(1_000_000, 300_000, 6.0, "countdown"),
    "countdown4": Task(2_000_000, 500_000, 8.0, "countdown", ("num_numbers=4",)),
    "sorting": Task(200_000, 300_000, 5.0, "sorting"),
    "reversing": Task(200_000, 300_000, 5.0, "reversing"),
}
WINDOWS = 40  # points of a curve


@dataclass(frozen=True)
class Config:
    """Settings of the experiment.

    Attributes:
      tasks: addition, countdown (of three numbers), countdown4 (of four), sorting or reversing.
      methods: methods of `purepg.algorithms.family`, and dpo.
      seed: seed of the experiment.
      num_seeds: number of agents for each method, and number of clones.
      num_tokens: number of tokens that each agent generates. None: the task's default.
      num_prompts, group_size: prompts per update and responses per prompt, the same for all methods.
      num_minibatches: gradient steps per update, the same for all methods but DPO, whose updates are single ones.
      learning_rates: Adam's, of which each method but DPO takes the best.
      dpo_learning_rates, dpo_betas: of which DPO takes the best pair.
      tuning_seeds: number of agents with which they are chosen, other than those of the results.
      eval_prompts: number of held-out prompts in the final evaluation.
      clone_steps: number of demonstrations' tokens, padding included, for cloning. None: the task's default.
    """

    tasks: tuple[str, ...] = ("addition", "countdown")
    methods: tuple[str, ...] = (*FAMILY, "dpo")
    seed: Seed = 0
    num_seeds: Annotated[int, Range(2)] = 6
    num_tokens: Count | None = None
    num_prompts: Count = 64
    group_size: Count = 8
    num_minibatches: Count = 2
    learning_rates: tuple[Positive, ...] = (3e-4, 1e-3, 3e-3)
    dpo_learning_rates: tuple[Positive, ...] = (1e-5, 3e-5, 1e-4)
    dpo_betas: tuple[Positive, ...] = (0.1, 0.5)
    tuning_seeds: Count = 2
    eval_prompts: Count = 512
    clone_steps: Count | None = None


class Result(NamedTuple):
    """A method's results on a task; leaves are `[S]` or `[S, U]`."""

    sampled: np.ndarray  # held-out accuracy of sampled responses
    mode: np.ndarray  # held-out accuracy of greedy responses
    metrics: dict[str, np.ndarray]
    training: float  # accuracy on training prompts over the last tenth of the updates; NaN if training samples none
    tokens: float  # number of tokens that an agent generates
    responses: float  # number of responses of an agent; the verifier and the reference process each once
    seconds: float
    chosen: str = ""  # hyperparameters


def trained(
    config: Config, task: str, algorithm: Callable, own: Any, params: Params | None, total_steps: int, **tuned: Any
) -> tuple[Results, Result]:
    """Trains all seeds of a method as one program, from the parameters of a clone if given.

    Args:
      tuned: values of some hyperparameters, of which the best are found first on seeds of their own.
    """
    begun = time.perf_counter()
    several = any(len(values) > 1 for values in tuned.values())
    run = RunConfig(
        TASKS[task].env,
        total_steps,
        config.tuning_seeds if several else config.num_seeds,
        config.seed,
        env_params=TASKS[task].env_params,
        fresh_seeds=config.num_seeds if several else None,
        log_every=0,
        eval_episodes=config.eval_prompts,
    )
    sizes = LanguageModelConfig(value_head=getattr(own, "baseline", None) == "value")
    network = partial(tokens.language_model, params=params)
    found = train_population(algorithm, own, network, sizes, run, sweep={k: list(x) for k, x in tuned.items()})
    found = found.winner or found
    metrics = {name: x[0] for name, x in found.metrics.items()}
    generated = float(np.nansum(metrics["env_steps"], axis=-1).mean())
    responses, training = 0.0, np.nan
    if "kl_reference" in metrics:  # the method learns from its own responses
        responses = float(np.nansum(metrics["num_episodes"], axis=-1).mean())
        made = int((metrics["env_steps"] > 0).all(0).sum())
        training = float(metrics["episode_return"][:, -(-made * 9 // 10) : made].mean())
    sampled, mode = found.final_return[0], found.final_return_of_mode[0]
    chosen = label_of(found.plan.settings[0].hyperparameters)
    return found, Result(sampled, mode, metrics, training, generated, responses, time.perf_counter() - begun, chosen)


def cloned(config: Config, task: str) -> tuple[Params, int, Result]:
    """Returns the parameters of the median clone, its seed, and the results of all clones."""
    steps = config.clone_steps or TASKS[task].clone_steps
    found, result = trained(config, task, clone, CloneConfig(), None, steps)
    seed = int(np.argsort(result.sampled, kind="stable")[len(result.sampled) // 2])
    return jax.device_get(found.agent(seed=seed).state.learner.params), seed, result


def fine_tuned(config: Config, task: str, method: str, params: Params) -> Result:
    names = "num_prompts", "group_size", "num_minibatches"
    num_tokens = config.num_tokens or TASKS[task].num_tokens
    if method != "dpo":
        own = replace(FAMILY[method], **{name: getattr(config, name) for name in names})
        return trained(config, task, grpo, own, params, num_tokens, learning_rate=config.learning_rates)[1]
    # DPO's tokens are those of the candidates that it samples before the first step.
    num_pairs = int(num_tokens / (NUM_CANDIDATES * TASKS[task].columns))
    own = DPOConfig(num_pairs=num_pairs, num_candidates=NUM_CANDIDATES)
    tuned = {"learning_rate": config.dpo_learning_rates, "beta": config.dpo_betas}
    found, result = trained(config, task, dpo, own, params, 2 * num_tokens, **tuned)
    agents = [found.agent(seed=s) for s in range(config.num_seeds)]
    generated = float(np.mean([agent.state.world.num_tokens for agent in agents]))
    return result._replace(tokens=generated, responses=float(own.num_pairs * NUM_CANDIDATES))


def compute(config: Config) -> dict[str, dict[str, Result]]:
    unknown = sorted(set(config.methods) - {*FAMILY, "dpo"}) + sorted(set(config.tasks) - set(TASKS))
    if unknown:
        known = f"methods are {', '.join((*FAMILY, 'dpo'))}; tasks {', '.join(TASKS)}"
        raise UsageError(f"there is no {', '.join(unknown)}: {known}")
    results: dict[str, dict[str, Result]] = {}
    for task in config.tasks:
        params, seed, clones = cloned(config, task)
        start = Result(clones.sampled[[seed]], clones.mode[[seed]], {}, np.nan, 0, 0, 0)
        results[task] = {"clones": clones._replace(tokens=0, responses=0), f"start ({digest(params)})": start}
        print(f"{task}: clones {clones.sampled}, greedy {clones.mode}", flush=True)
        for method in config.methods:
            results[task][method] = found = fine_tuned(config, task, method, params)
            print(f"{task}, {method}: {iqm(found.sampled):.3f}, greedy {iqm(found.mode):.3f}", flush=True)
    return results


def accuracy(x: np.ndarray) -> str:
    """The IQM over seeds `[S]` with its interval."""
    return with_interval(float(iqm(x)), bootstrap_interval(x))


def report(results: dict[str, dict[str, Result]]) -> str:
    heading = (
        "task",
        "method",
        "greedy: IQM [95 %]",
        "sampled: IQM [95 %]",
        "training",
        "tokens",
        "responses",
        "seconds",
        "chosen",
    )
    rows = []
    for task, of_task in results.items():
        for method, found in of_task.items():
            accuracies = accuracy(found.mode), accuracy(found.sampled)
            counts = (f"{found.tokens:,.0f}", f"{found.responses:,.0f}", f"{found.seconds:.0f}")
            training = f"{found.training:.3f}" if np.isfinite(found.training) else ""
            rows.append((task, method, *accuracies, training, *counts, found.chosen))
    legend = (
        "training: accuracy on training prompts over the last tenth of the updates. tokens: generated by each agent,\n"
        "without prompts and padding. responses: of each agent; the verifier and the reference process each once.\n"
        "seconds: all seeds together, including compilation and the choice of hyperparameters, on seeds of its own."
    )
    return f"{table(heading, rows)}\n{legend}"


TITLES = {
    "clones": "the clones",
    "reinforce": "REINFORCE, batch mean",
    "rloo": "RLOO",
    "ppo": "PPO, critic",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
    "cispo": "CISPO",
    "dpo": "DPO, offline",
}


def page_table(results: dict[str, dict[str, Result]]) -> str:
    """The table of experiments/language_models.md: a row for each method, three columns for each task."""
    header = ["method", *(name for task in results for name in (f"{task}, greedy", "sampled", "training, sampled"))]
    rows = []
    # All tasks have the same methods in the same order, but the start's name holds the digest of the task's own clone.
    for of_method in zip(*(of_task.items() for of_task in results.values()), strict=True):
        method = of_method[0][0]
        row = ["their median, where all start" if method.startswith("start") else TITLES.get(method, method)]
        for _, found in of_method:
            training = f"{found.training:.3f}" if np.isfinite(found.training) else ""
            row += [accuracy(found.mode), accuracy(found.sampled), training]
        rows.append(row)
    return table(header, rows)


def figure(results: dict[str, dict[str, Result]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(results) + 1.4, 4.2), layout="constrained")
    styles = ("-", "--")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (task, of_task) in zip(panels, results.items(), strict=True):
        methods = [name for name in of_task if name in FAMILY]
        for i, method in enumerate(methods):
            found = of_task[method]
            window = -(-int((found.metrics["env_steps"] > 0).any(0).sum()) // WINDOWS)
            x, held_out = on_common_grid(found.metrics["env_steps"], found.metrics["held_out_return"], window)
            y = iqm_and_quartiles(held_out)[0]
            axes.plot(
                x / 1e3,
                y,
                color=COLOURS[i % len(COLOURS)],
                ls=styles[i // len(COLOURS)],
                lw=1.6,
                label=method.replace("_", " "),
            )
        start = next(found for name, found in of_task.items() if name.startswith("start"))
        axes.axhline(float(start.sampled[0]), color="0.6", lw=1, ls=":")
        axes.set_ylim(0, 1)
        axes.set_xlabel("tokens generated, thousands")
        dress(axes, task, "dotted: the clone that all start from")
    panels[0].set_ylabel("held-out accuracy, sampled\n(IQM over seeds)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def study(config: Config) -> Study:
    results = compute(config)
    numbers = {
        task: {name: {k: v for k, v in found._asdict().items() if k != "metrics"} for name, found in of_task.items()}
        for task, of_task in results.items()
    }
    return Study(report(results), numbers, figure(results), page_table(results))


if __name__ == "__main__":
    main(study, Config(), __doc__)
